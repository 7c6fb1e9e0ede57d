"""A new checkpoint is written: its folder, the files that it shares with another one, its tensors and its receipt.

Promises: the folder appears whole and flushed to disk, or not at all, and never in place of another one; files that
stay are copied by reference where the file system can; tensors are written piece by piece, and blocks of zeros stay
holes. Never changes the checkpoint that it is made from.
Source: docs/surgery.md; docs/format.md.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ..configuration import EngramConfig, EngramFormatError
from ..files_atomic_engram import CONFIG_NAME, INDEX_NAMES, MEMORY_STEM, WEIGHT_FILE, flush
from ..files_checkpoint_engram import expected_shards
from ..files_safetensors_engram import (
    ZeroTensor,
    read_header,
    read_index,
    start_of_data,
    torch_dtype,
    write_index,
    write_shard,
    write_shards,
)
from ..modeling_engram import EngramForCausalLM
from ..rows_placement_engram import TABLES_PREFIX
from ..rows_quantised_engram import QUANTISED, quantise
from .donor import RECEIPT_NAME
from .reference_copy import copy_by_reference
from .source_checkpoint import SourceCheckpoint


# Blocks of a file of this many bytes stay holes if they are zero: the block of common file systems.
HOLE = 4096

# Bytes of a table that are held at once.
PIECE_BYTES = 1 << 24


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty draft, which becomes the folder `out` if the block succeeds, and is removed if it fails.

    Raises:
        `FileExistsError`: if `out` is in use.
    """
    out = Path(out)
    refuse_used(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.making-", dir=out.parent))
    draft.chmod(0o755)
    try:
        yield draft
        for path in sorted(draft.rglob("*")):
            flush(path)
        flush(draft)
        if out.exists():
            out.rmdir()
        os.replace(draft, out)
        flush(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_used(out: Path) -> None:
    """Raises FileExistsError if a folder is in use."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"'{out}' exists and is not empty: nothing is overwritten. Name another folder.")


def copy_other_files(source: Path, draft: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copies the files of a checkpoint's folder other than configuration, indexes and weights."""
    for path in sorted((*source.iterdir(), *source.glob("additional_chat_templates/*"))):
        own = path.name == CONFIG_NAME or path.name in INDEX_NAMES or WEIGHT_FILE.fullmatch(path.name)
        if path.is_file() and not own and not path.name.startswith(".") and wanted(path.name):
            target = draft / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            copy_by_reference(path, target)


def copy_weights(
    source: SourceCheckpoint, draft: Path, changed: Mapping[str, torch.Tensor] | None = None
) -> dict[str, str]:
    """Copies the weight files that hold no tables; a file with a changed tensor is written anew.

    Returns:
        `dict[str, str]`: file name of every tensor.
    """
    changed, weight_map = changed or {}, {}
    for file_name in sorted(set(source.weight_map.values())):
        names = [name for name, file in source.weight_map.items() if file == file_name]
        if names[0].startswith(TABLES_PREFIX):
            continue
        if any(name in changed for name in names):
            write_shard(draft / file_name, {name: changed.get(name, source.tensor(name)) for name in names})
        else:
            copy_by_reference(source.folder / file_name, draft / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    return weight_map


def write_zero_tables(draft: Path, config: EngramConfig, weight_map: dict[str, str], shard_bytes: int) -> None:
    """Writes tables of zeros, which take no disk, and the indexes over all files."""
    shapes = {name: entry for name, entry in expected_shards(config).items() if name.startswith(TABLES_PREFIX)}
    zeros = {name: ZeroTensor(shape, torch_dtype(dtype)) for name, (shape, dtype) in shapes.items()}
    weight_map = weight_map | write_shards(draft, MEMORY_STEM, zeros, shard_bytes)
    write_indexes(draft, weight_map)


def write_indexes(draft: Path, weight_map: dict[str, str]) -> None:
    """Writes the indexes over all files of a draft."""
    headers = [read_header(draft / file_name) for file_name in set(weight_map.values())]
    total = sum(entry.end - entry.begin for header in headers for entry in header.values())
    write_index(draft, weight_map, total, {name for name in weight_map if name.startswith(TABLES_PREFIX)})


class NewTensors:
    """Tensors in the weight files of a draft that are still zero, written piece by piece.

    Args:
        folder (`Path`): the draft, with its configuration and indexes.
    """

    def __init__(self, folder: Path):
        self.folder, self.weight_map = folder, read_index(folder)
        files = set(self.weight_map.values())
        self.headers = {file_name: read_header(folder / file_name) for file_name in files}
        self.starts = {file_name: start_of_data(folder / file_name) for file_name in files}
        self.table_dtype = getattr(torch, EngramConfig.from_pretrained(folder).engram_table_dtype)

    def write(self, name: str, rows: torch.Tensor, first: int = 0) -> None:
        """Writes rows of a tensor, from row `first` on, in its own type; values of a quantised table as records."""
        file_name = self.weight_map[name]
        entry = self.headers[file_name][name]
        if self.table_dtype in QUANTISED and name.startswith(TABLES_PREFIX) and rows.is_floating_point():
            rows = quantise(rows, self.table_dtype)
        if tuple(rows.shape[1:]) != entry.shape[1:] or first + len(rows) > entry.shape[0]:
            raise ValueError(f"rows {first} to {first + len(rows)} of {tuple(rows.shape)} do not fit into '{name}'.")
        rows = rows.to(torch_dtype(entry.dtype))
        at = self.starts[file_name] + entry.begin + first * rows[:1].nbytes
        with open(self.folder / file_name, "r+b") as file:
            write_but_zeros(file, _bytes_of(rows), at)

    def overwrite(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor over another one of its shape, zeros too."""
        file_name = self.weight_map[name]
        entry = self.headers[file_name][name]
        with open(self.folder / file_name, "r+b") as file:
            file.seek(self.starts[file_name] + entry.begin)
            file.write(memoryview(_bytes_of(tensor.to(torch_dtype(entry.dtype)))))

    def write_order(self, layer: int, order: int, rows: torch.Tensor, first: int) -> None:
        """Writes rows of an order's table, counted over all of its parts."""
        part, begin = 0, 0
        while len(rows):
            name = f"{TABLES_PREFIX}{layer}.order{order}.{part}"
            height = self.headers[self.weight_map[name]][name].shape[0]
            taken = rows[: max(0, begin + height - first)]  # (rows of this part, width)
            if len(taken):
                self.write(name, taken, first - begin)
            rows, first = rows[len(taken) :], first + len(taken)
            part, begin = part + 1, begin + height


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Returns the bytes of a tensor, `(bytes,)`."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def write_but_zeros(file, data: np.ndarray, at: int) -> None:
    """Writes bytes at a place of a file where it has zeros; blocks of zeros are left out."""
    lead = at % HOLE
    padded = np.zeros(-(-(lead + len(data)) // HOLE) * HOLE, np.uint8)  # whole blocks of the file
    padded[lead : lead + len(data)] = data
    live = padded.reshape(-1, HOLE).any(1)  # (blocks,)
    edges = np.flatnonzero(np.diff(live, prepend=False, append=False))
    for begin, end in zip(edges[::2] * HOLE, edges[1::2] * HOLE, strict=True):
        begin, end = max(begin, lead), min(end, lead + len(data))
        file.seek(at - lead + begin)
        file.write(memoryview(padded[begin:end]))


def pieces(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields a mapped tensor in pieces of rows, each with the number of its first row."""
    step = max(1, PIECE_BYTES // max(1, tensor[:1].nbytes))
    for first in range(0, len(tensor), step):
        yield first, tensor[first : first + step]


def write_receipt(draft: Path, source: Path, config: EngramConfig, verb: str, **said) -> None:
    """Adds to the receipt of the checkpoint that this one is made from what was done."""
    path = source / RECEIPT_NAME
    receipt = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    receipt.pop("outputs", None)  # files of the checkpoint that this one is made from
    receipt |= {"token_map_sha256": config.engram_token_map_sha256, "hash_sha256": config.engram_hash_sha256}
    versions = {name: version(name) for name in ("engram-transformers", "transformers", "torch")}
    receipt.setdefault("surgery", []).append({"verb": verb, **said, "versions": versions})
    (draft / RECEIPT_NAME).unlink(missing_ok=True)
    (draft / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def check_loads(draft: Path) -> None:
    """Raises EngramFormatError unless a draft loads strictly."""
    if problem := dry_load(draft):
        raise EngramFormatError(f"what was made does not load cleanly, so it was removed: {problem}.")


def dry_load(draft: Path) -> str | None:
    """Loads a finished draft with its tables on disk; returns what is wrong with it, or None."""
    try:
        _, info = EngramForCausalLM.from_pretrained(draft, engram_placement="disk", output_loading_info=True)
    except (EngramFormatError, RuntimeError) as error:  # RuntimeError: Transformers' report of misshapen tensors
        return str(error).splitlines()[0].replace(f"{draft}{os.sep}", "")  # it may go into a receipt
    left = [f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}" for kind in ("unexpected_keys", "mismatched_keys")]
    return "; ".join(
        text for text, kind in zip(left, ("unexpected_keys", "mismatched_keys"), strict=True) if info[kind]
    )
