"""Initial tables: what the rows of a fresh memory start from.

| init | a row starts as |
| --- | --- |
| zero | zeros, in holes of sparse files |
| normal | normal numbers, each block of them from a generator of its own |
| embeddings | the mean of its n-gram's token embeddings, projected to the row's width (after NGM) |
| corpus | the mean of what the backbone computes where the n-gram ends, projected likewise (after Memory Grafting) |

The last two need a text. A row that n-grams of the text share has their mean by count, a row that none reads is zero.
States have root mean square 1 before the mean, so `std` is the size of a row's values in all cases.
Promises: the same bytes for the same seed, text and machine, however often a run was killed; a file is written part by
part, in bounded memory for "normal", and for a text with about `4 * head_dim + 200` bytes for each of its tokens. Never
writes a row of a table that is finished.
Source: NGM (arXiv 2605.16893) for means of embeddings, Memory Grafting for hidden states; the projections are ours.
"""

import hashlib
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils.logging import tqdm

from ..backbone_engram import find_decoder_layers
from ..configuration import EngramConfig
from ..files_atomic_engram import MEMORY_STEM
from ..files_safetensors_engram import read_header, start_of_data, torch_dtype
from ..modeling_engram import EngramForCausalLM
from ..rows_placement_engram import TABLES_PREFIX
from .receipt import Receipt


INITS = ("zero", "normal", "embeddings", "corpus")
OF_A_TEXT = ("embeddings", "corpus")

# Of a text's rows the larger of two that were tried: what they say must outlast the first steps of training.
_STD = {"normal": 0.02, "embeddings": 0.1, "corpus": 0.1}

# Values that one generator draws, blocks that are drawn ahead of the disk, and threads that draw.
_BLOCK, _AHEAD, _THREADS = 1 << 22, 4, 2

# Tokens of a pass through the backbone, of a piece of the text that is projected at once, and characters that are
# tokenised at once.
_WINDOW, _CHUNK, _CHARACTERS = 512, 1 << 14, 1 << 20


@dataclass(frozen=True)
class Init:
    """What tables start from, checked.

    Args:
        kind (`str`, *optional*, defaults to `"zero"`): one of `INITS`.
        text (`Path`, *optional*): UTF-8, for "embeddings" and "corpus".
        std (`float`, *optional*): size of the values; None for 0.02 if they are "normal", and 0.1 if of a text.

    Raises:
        `ValueError`: for an unknown kind, a text or deviation that the kind does not take, or a missing text.
        `FileNotFoundError`: if the text is missing.
    """

    kind: str = "zero"
    text: Path | None = None
    std: float | None = None

    def __post_init__(self):
        if self.kind not in INITS:
            raise ValueError(f"init={self.kind!r} is unknown: choose one of {', '.join(INITS)}.")
        if (self.text is not None) != (self.kind in OF_A_TEXT):
            wrong = "needs init_text, a file in UTF-8"
            if self.text is not None:
                wrong = "reads no text: leave init_text out, or name with init_from the memory that it is about"
            raise ValueError(f"init={self.kind!r} {wrong}.")
        if self.text is not None and not Path(self.text).is_file():
            raise FileNotFoundError(f"init_text '{self.text}' is missing or no file: give the path of a text in UTF-8.")
        if self.std is not None and self.kind == "zero":
            raise ValueError(
                f"init_std={self.std} is for other tables than those of zeros: leave it out, or give init."
            )
        if self.std is not None and not (isinstance(self.std, int | float) and 0 < self.std < math.inf):
            raise ValueError(f"init_std={self.std!r} must be a number above 0, such as 0.02.")


def fill_tables(draft: Path, init: Init, config: EngramConfig, ids: torch.Tensor | None, receipt: Receipt) -> None:
    """Fills the tables of a graft, which are zeros, file by file; files that the receipt lists are finished.

    Args:
        draft (`Path`): the graft, complete but for its tables' rows.
        init ([`Init`]): not "zero".
        config ([`EngramConfig`]): the graft's.
        ids (`torch.LongTensor` of shape `(tokens,)`, *optional*): the text, from [`text_ids`].
        receipt ([`Receipt`]): is told of each finished file.
    """
    files = [path for path in table_files(draft) if path.name not in receipt.outputs]
    std = init.std or _STD[init.kind]
    if init.kind == "normal":
        for path in files:
            receipt.finish(path.name, _draw(path, std, config.engram_seed))
        return
    if not files:
        return
    model = EngramForCausalLM.from_pretrained(draft, engram_placement="none")
    with tempfile.TemporaryDirectory(dir=draft) as spool:
        of_embeddings = init.kind == "embeddings"
        states = partial(_ngram_means, model, ids) if of_embeddings else _hidden_states(model, ids, Path(spool))
        filler = _TextFiller(model, ids, states, std)
        for path in files:
            filler.fill(path)
            receipt.finish(path.name)


def text_ids(path: Path, tokenizer) -> torch.Tensor:
    """Returns the token ids `(tokens,)` of a text, without special tokens.

    Raises:
        `ValueError`: if it is empty or not UTF-8.
    """
    ids: list[int] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            while lines := file.readlines(_CHARACTERS):
                ids += tokenizer("".join(lines), add_special_tokens=False)["input_ids"]
    except UnicodeDecodeError as error:
        raise ValueError(f"init_text '{path}' is not text in UTF-8 ({error}): save it in this encoding.") from error
    if not ids:
        raise ValueError(f"init_text '{path}' is empty: give a text.")
    return torch.tensor(ids, device="cpu")


def table_files(folder: Path) -> list[Path]:
    """Returns the files that hold tables."""
    return sorted(folder.glob(f"{MEMORY_STEM}-*.safetensors"))


def generator(*names) -> np.random.Generator:
    """Returns a generator whose numbers depend on all of the names, such as seed, table and block."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "big")))


def _draw(path: Path, std: float, seed: int) -> str:
    """Fills the tables of a file with normal numbers; returns the file's SHA-256."""
    header = sorted(read_header(path).items(), key=lambda item: item[1].begin)
    begin = start_of_data(path)
    bar = tqdm(total=path.stat().st_size - begin, unit="B", unit_scale=True, desc=f"drawing {path.name}", leave=False)
    with open(path, "r+b") as file, ThreadPoolExecutor(_THREADS) as pool, bar:
        digest = hashlib.sha256(file.read(begin))
        for data in _in_order(pool, _blocks(header, std, seed)):
            file.write(data)
            digest.update(data)
            bar.update(len(data))
    return digest.hexdigest()


def _blocks(header: list, std: float, seed: int) -> Iterator[Callable[[], memoryview]]:
    """Yields what draws each block of a file's tables, in the order of the file."""
    for name, entry in header:
        values = math.prod(entry.shape)
        for number, first in enumerate(range(0, values, _BLOCK)):
            count = min(_BLOCK, values - first)
            yield partial(_drawn, generator(seed, name, number), count, std, torch_dtype(entry.dtype))


def _drawn(source: np.random.Generator, count: int, std: float, dtype: torch.dtype) -> memoryview:
    """Draws `count` numbers; returns their bytes."""
    values = torch.from_numpy(source.standard_normal(count, dtype=np.float32)) * std  # (count,)
    return memoryview(values.to(dtype).view(torch.uint8).numpy())  # (count * bytes of a value,)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable]) -> Iterator:
    """Yields what jobs return, in their order, with a few of them done ahead."""
    waiting: deque = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _unit(states: torch.Tensor) -> torch.Tensor:
    """Scales vectors `(..., D)` to root mean square 1; a vector of zeros stays."""
    states = states.float()
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-12)


def _ngram_means(model, ids: torch.Tensor, layer: int, order: int, first: int, last: int) -> torch.Tensor:
    """Returns mean embeddings `(last - first, D)` of the n-grams that end at some positions; zeros precede the text."""
    reach = min(first, order - 1)
    embedded = model.get_input_embeddings().weight[ids[first - reach : last]].float()  # (last - first + reach, D)
    embedded = F.pad(embedded, (0, 0, order - 1 - reach, 0))  # (last - first + order - 1, D)
    return _unit(embedded.unfold(0, order, 1).mean(-1))  # (last - first, D)


def _hidden_states(model, ids: torch.Tensor, spool: Path) -> Callable[..., torch.Tensor]:
    """Runs the backbone over a text; returns what gives the layers' inputs, which are stored in files."""
    width = model.config.text_config.hidden_size
    layers = find_decoder_layers(model.backbone, model.config.text_config.num_hidden_layers)
    stored = {
        layer: np.memmap(spool / str(layer), np.float16, "w+", shape=(len(ids), width))
        for layer in model.config.engram_layer_ids
    }
    longest = min(_WINDOW, getattr(model.config.text_config, "max_position_embeddings", None) or _WINDOW)
    place = [0]

    def store(layer: int, module, args: tuple, kwargs: dict) -> None:
        stream = args[0] if args else kwargs["hidden_states"]  # (1, window, D) or (1, window, M, D)
        stream = stream.mean(2) if stream.ndim == 4 else stream  # (1, window, D)
        stored[layer][place[0] : place[0] + stream.shape[1]] = _unit(stream[0]).half().numpy()

    hooks = [layers[layer].register_forward_pre_hook(partial(store, layer), with_kwargs=True) for layer in stored]
    bar = tqdm(total=len(ids), unit=" tokens", desc="reading the text", leave=False)
    try:
        with torch.no_grad(), model.disable_memory(), bar:
            for window in ids.split(longest):
                model.backbone.base_model(input_ids=window[None], use_cache=False)
                place[0] += len(window)
                bar.update(len(window))
    finally:
        for hook in hooks:
            hook.remove()
    return lambda layer, order, first, last: torch.from_numpy(stored[layer][first:last]).float()


class _TextFiller:
    """Fills rows from states of a text.

    Args:
        model ([`EngramForCausalLM`]): has the hash.
        ids (`torch.LongTensor` of shape `(tokens,)`): the text.
        states (callable): gives states `(last - first, D)` for layer, order, first and last position.
        std (`float`): size of the values.
    """

    def __init__(self, model, ids: torch.Tensor, states: Callable, std: float):
        self.config, self.states, self.std = model.config, states, std
        _, rows = model.memory.hashing(ids[None])  # (layers, 1, tokens, orders, heads)
        self.rows = dict(zip(model.config.engram_layer_ids, rows[:, 0], strict=True))
        self.order_rows = model.memory.hashing.constants.order_rows()

    @torch.no_grad()
    def fill(self, path: Path) -> None:
        """Fills all tables of a file."""
        for name, entry in read_header(path).items():
            layer, order, part = name.removeprefix(TABLES_PREFIX).split(".")
            layer, order, part = int(layer), int(order.removeprefix("order")), int(part)
            index = self.config.engram_layer_ids.index(layer)
            height = self.order_rows[index][order - 2] // self.config.engram_table_parts
            shape = (entry.shape[0], (entry.end - entry.begin) // entry.shape[0])
            table = np.memmap(path, np.uint8, "r+", start_of_data(path) + entry.begin, shape)
            for head in tqdm(range(self.config.engram_n_heads), desc=f"filling {name}", leave=False):
                rows = self.rows[layer][:, order - 2, head] - part * height  # (tokens,)
                found, values = self.means(rows, entry.shape[0], layer, order, head)
                table[found.numpy()] = values.to(torch_dtype(entry.dtype)).view(torch.uint8).numpy()
            table.flush()

    def means(self, rows: torch.Tensor, height: int, layer: int, order: int, head: int) -> tuple:
        """Returns the rows `(found,)` of a part that the text reads, and their values `(found, W)`."""
        rows = torch.where((rows >= 0) & (rows < height), rows, height)  # (tokens,); others go into one more row
        found, place, counts = rows.unique(return_inverse=True, return_counts=True)
        hidden, width = self.config.text_config.hidden_size, self.config.engram_head_dim
        drawn = generator(self.config.engram_seed, layer, order, head).standard_normal(
            (hidden, width), dtype=np.float32
        )
        projection = torch.from_numpy(drawn) * (self.std / math.sqrt(hidden))  # (D, W)
        sums = torch.zeros(len(found), width, device="cpu")
        for first in range(0, len(rows), _CHUNK):
            last = min(first + _CHUNK, len(rows))
            sums.index_add_(0, place[first:last], self.states(layer, order, first, last) @ projection)
        inside = found < height
        return found[inside], (sums / counts[:, None])[inside]
