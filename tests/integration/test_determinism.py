"""The same ids give the same rows: whatever stands beside a text in its batch, whatever pads are around it, in whatever
pieces, types, memory layouts, threads and processes it is read.

What has to come out is said by `naive_hash_ids` in plain Python, for each text alone, with constants derived anew. Rows
are integers and what is read is a copy of rows: both exact. Logits to 1e-5 in float32.
Run: pytest tests/integration/test_determinism.py
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig

from engram_transformers import EngramConfig
from engram_transformers.compat_engram import CACHE
from engram_transformers.hash_constants_engram import derive_constants
from engram_transformers.hash_ngrams_engram import naive_hash_ids
from engram_transformers.hash_tokens_engram import TokenCompressor
from engram_transformers.memory_engram import EngramMemory

from ..conftest import examples
from ..tiny import GOLDEN
from .backbones import BACKBONES


TOLERANCE = 1e-5
FLOATS = ["float32", "bfloat16", "float16"]
THREADS = st.sampled_from([1, 2])


@dataclass
class Batch:
    """Texts, and what is given to a model so that it reads them all at once.

    `ids` holds real ids at pads and where a text has -1: `own_ids` and the mask say that they are not to be read.
    """

    texts: list[list[int]]
    left: list[int]
    ids: torch.Tensor
    own_ids: torch.Tensor
    mask: torch.Tensor
    cuts: list[int]

    @property
    def pieces(self) -> list[slice]:
        return [slice(first, last) for first, last in pairwise([0, *self.cuts, self.ids.shape[1]])]

    def around(self, row: int) -> tuple[int, int]:
        """Pads before and after a text."""
        return self.left[row], self.ids.shape[1] - self.left[row] - len(self.texts[row])


LAYOUTS = {
    "whole": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "every second": lambda tensor: torch.stack([tensor, tensor.flip(1)], dim=2)[:, :, 0],
    "inside a wider one": lambda tensor: torch.nn.functional.pad(tensor, (3, 2))[:, 3:-2],
}


@st.composite
def batches(draw, vocabulary: int) -> Batch:
    """1 to 5 texts of 1 to 64 ids, with up to 8 pads on either side of the longest, split anywhere."""
    lengths = draw(st.lists(st.integers(1, 64), min_size=1, max_size=5), label="lengths")
    left = draw(st.lists(st.integers(0, 8), min_size=len(lengths), max_size=len(lengths)), label="left pads")
    width = max(map(sum, zip(lengths, left, strict=True))) + draw(st.integers(0, 8), label="right pads")
    cuts = sorted(draw(st.sets(st.integers(1, width), max_size=8), label="cuts") - {width})
    absent = draw(st.sampled_from([0.0, 0.1, 0.5]), label="share of -1")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))
    ids = torch.randint(vocabulary, (len(lengths), width), generator=generator)
    gone = torch.rand(ids.shape, generator=generator) < absent
    mask = torch.zeros_like(ids)
    for row, (first, length) in enumerate(zip(left, lengths, strict=True)):
        mask[row, first : first + length] = 1
    own_ids = ids.masked_fill(gone & mask.bool(), -1)
    texts = [own_ids[row][mask[row].bool()].tolist() for row in range(len(lengths))]
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)), label="layout")]
    integer = draw(st.sampled_from([torch.int64, torch.int32]), label="type of ids")
    return Batch(texts, left, layout(ids.to(integer)), layout(own_ids.to(integer)), layout(mask), cuts)


@dataclass
class Twin:
    """The rows that a memory must read, from its configuration and its token map alone."""

    token_map: list[int]
    multipliers: list[list[int]]
    primes: list[list[list[int]]]
    pad_class: int

    @classmethod
    def of(cls, config: EngramConfig, token_map: torch.Tensor) -> "Twin":
        made = derive_constants(config, token_map)
        return cls(token_map.tolist(), made.multipliers.tolist(), made.primes.tolist(), int(made.pad_class))

    def rows(self, text: list[int], pads: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """`(layers, length and pads, orders, heads)`, counted from the first row of their order, of a text alone.

        A pad reads what a text of a single -1 reads.
        """
        classes, layers = [self.token_map[i] if i >= 0 else -1 for i in text], []
        for multipliers, primes in zip(self.multipliers, self.primes, strict=True):
            pad = naive_hash_ids([-1], multipliers, primes, self.pad_class)
            alone = naive_hash_ids(classes, multipliers, primes, self.pad_class)
            starts = [sum(heads[:head]) for heads in primes for head in range(len(heads))]
            hashes = pad * pads[0] + alone + pad * pads[1]
            layers.append([[a + b for a, b in zip(position, starts, strict=True)] for position in hashes])
        return torch.tensor(layers).view(len(layers), -1, len(self.primes[0]), len(self.primes[0][0]))

    def batch(self, batch: Batch) -> torch.Tensor:
        """`(layers, batch, length, orders, heads)`."""
        return torch.stack([self.rows(text, batch.around(row)) for row, text in enumerate(batch.texts)], dim=1)


@contextmanager
def threads(count: int):
    """So many threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert torch.get_num_threads() == count
        yield
    finally:
        torch.set_num_threads(before)


class TableReads:
    """What a memory's tables are asked for and what they give, pass after pass."""

    def __init__(self, memory: EngramMemory):
        self.memory, self.asked, self.given = memory, {}, {}

    def __enter__(self) -> "TableReads":
        tables = self.memory.tables.items()
        self.hooks = [table.register_forward_hook(partial(self.note, int(layer))) for layer, table in tables]
        return self

    def note(self, layer: int, table, args, output):
        self.asked.setdefault(layer, []).append(args[0])
        self.given.setdefault(layer, []).append(output)

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    @property
    def rows(self) -> torch.Tensor:
        """`(layers, batch, length, orders, heads)` of all passes."""
        return torch.stack([torch.cat(self.asked[layer], dim=1) for layer in self.memory.layer_ids])

    def differing_vectors(self) -> int:
        """Values that are not, bit for bit, the table's at the rows that were asked for."""
        count = 0
        for layer, rows in zip(self.memory.layer_ids, self.rows, strict=True):
            orders = [torch.cat(list(parts)) for parts in self.memory.tables[str(layer)].orders()]
            wanted = torch.cat([table[rows[:, :, i]].flatten(-2) for i, table in enumerate(orders)], dim=-1)
            vectors = torch.cat(self.given[layer], dim=1)  # (batch, length, orders * heads * width)
            assert vectors.dtype == wanted.dtype
            count += int((vectors != wanted).sum())
        return count


def read_memory(memory: EngramMemory, batch: Batch) -> None:
    """Reads a batch piece by piece, with nothing but the memory and a cache."""
    layer = memory.cache_layer(DynamicCache(), backbone_layers=3)
    for piece in batch.pieces:
        reads = memory.read(batch.own_ids[:, piece], layer, alive=batch.mask[:, piece].bool())
        for layer_id in memory.layer_ids:
            reads.vectors(layer_id)
        reads.remember()


def read_model(model, batch: Batch) -> torch.Tensor:
    """Logits of a batch that a model reads piece by piece."""
    past, logits = DynamicCache(config=model.config.get_text_config()), []
    for piece in batch.pieces:
        out = model(
            batch.ids[:, piece],
            attention_mask=batch.mask[:, : piece.stop],
            engram_input_ids=batch.own_ids[:, piece],
            **{CACHE: past},
            use_cache=True,
        )
        logits.append(out.logits)
    return torch.cat(logits, dim=1)  # (batch, length, vocabulary)


VOCABULARY = 200


@st.composite
def memories(draw) -> tuple[EngramMemory, Twin]:
    """Orders 2 to 4, 1 to 4 heads of few rows, tables of every type in 1 to 3 parts, and a token map with dead ids."""
    n, classes = draw(st.integers(2, 4), label="N"), draw(st.integers(3, VOCABULARY), label="classes")
    config = EngramConfig(
        text_config=LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, pad_token_id=2),
        engram_layer_ids=draw(st.sampled_from([(0, 2), (1,), (2, 0, 1)]), label="layers"),
        engram_vocab_size=draw(st.lists(st.integers(3, 60), min_size=n - 1, max_size=n - 1), label="rows"),
        engram_max_ngram_size=n,
        engram_n_heads=draw(st.integers(1, 4), label="heads"),
        engram_head_dim=2,
        engram_seed=draw(st.integers(0, 5), label="seed"),
        engram_table_dtype=draw(st.sampled_from(FLOATS), label="table"),
        engram_table_parts=draw(st.integers(1, 3), label="parts"),
        engram_compressed_vocab_size=classes,
    )
    token_map = torch.arange(VOCABULARY) % classes
    token_map[VOCABULARY - draw(st.integers(0, 20), label="dead ids") :] = -1
    memory = EngramMemory(config, token_map)
    for parameter in memory.tables.parameters():
        parameter.data.normal_()
    return memory, Twin.of(config, token_map)


@examples(80)
@given(made=memories(), batch=batches(VOCABULARY), count=THREADS, grad=st.booleans())
def test_a_memory_reads_the_rows_of_each_text_alone(made, batch, count, grad):
    memory, twin = made
    with threads(count), torch.set_grad_enabled(grad), TableReads(memory) as reads:
        read_memory(memory, batch)
    assert torch.equal(reads.rows, twin.batch(batch))
    assert reads.rows.dtype == torch.int64
    assert reads.differing_vectors() == 0


@pytest.fixture
def graft(tiny_donor, tiny_tokenizer, tiny_engram):
    """Factory of trained grafts and their twins; the same arguments give the same graft."""
    token_map = TokenCompressor.from_tokenizer(tiny_tokenizer).token_map(4104)

    @cache
    def make(n: int = 3, dtype: str = "float32", **fields):
        donor = tiny_donor(BACKBONES["llama"]())
        model = tiny_engram(True, donor, (0, 2), engram_max_ngram_size=n, **fields)
        return model.to(getattr(torch, dtype)), Twin.of(model.config, token_map)

    return make


@torch.no_grad()
@examples(25)
@given(data=st.data(), batch=batches(4104), count=THREADS)
def test_a_model_reads_the_rows_of_each_text_alone(data, batch, count, graft):
    dtype, table = data.draw(st.sampled_from(FLOATS), label="model"), data.draw(st.sampled_from(FLOATS), label="table")
    heads, parts = data.draw(st.integers(1, 3), label="heads"), data.draw(st.integers(1, 2), label="parts")
    fields = {"engram_n_heads": heads, "engram_table_parts": parts, "engram_table_dtype": table}
    model, twin = graft(data.draw(st.integers(2, 4), label="N"), dtype, **fields)
    with threads(count), TableReads(model.memory) as reads:
        logits = read_model(model, batch)
    assert (logits.dtype, reads.given[0][0].dtype) == (getattr(torch, dtype), getattr(torch, table))
    assert torch.equal(reads.rows, twin.batch(batch))
    assert reads.differing_vectors() == 0


@torch.no_grad()
@examples(20)
@given(batch=batches(4104), n=st.integers(2, 4), count=THREADS)
def test_logits_of_a_text_are_those_of_the_text_alone(batch, n, count, graft):
    # The default gate is steep where its score is 0 (a slope of 500, and a step): rounding of 1e-7 in the backbone may
    # pass the tolerance there. 600 batches differed by up to 5e-6 with it, and by 2e-6 with this one.
    model, _ = graft(n=n, engram_gate="sigmoid")
    with threads(count):
        logits = read_model(model, batch)
    for row, text in enumerate(batch.texts):
        here = slice(batch.left[row], batch.left[row] + len(text))
        ids = batch.ids[row : row + 1, here]
        alone = model(ids, engram_input_ids=torch.tensor([text])).logits
        torch.testing.assert_close(logits[row : row + 1, here], alone, rtol=0, atol=TOLERANCE)
        if max(text) >= 0:
            with model.disable_memory():
                assert (model(ids).logits - alone).abs().max() > 1000 * TOLERANCE, "control: the memory is silent"


def some_batch() -> Batch:
    """One text of 12 ids, the sixth of them -1, with 3 pads before it, in pieces of 5 and 10."""
    ids = torch.arange(20, 35)[None]
    own_ids = ids.clone()
    own_ids[0, 8] = -1
    mask = (torch.arange(15) >= 3).long()[None]
    return Batch([own_ids[0, 3:].tolist()], [3], ids, own_ids, mask, [5])


CHANGES = {
    "nothing": lambda batch: batch,
    "the mask": lambda batch: replace(batch, mask=torch.ones_like(batch.mask)),
    "the -1": lambda batch: replace(batch, own_ids=batch.ids),
    "an id": lambda batch: replace(batch, own_ids=batch.own_ids + (torch.arange(15) == 12)),
    "the order of ids": lambda batch: replace(batch, own_ids=batch.own_ids.flip(1)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_other_ids_read_other_rows(change, graft):
    """The control: what the other tests compare does depend on every id that is text."""
    model, twin = graft()
    with TableReads(model.memory) as reads:
        read_model(model, CHANGES[change](some_batch()))
    assert torch.equal(reads.rows, twin.batch(some_batch())) == (change == "nothing")


@torch.no_grad()
def test_pieces_without_a_cache_read_other_rows(graft):
    model, twin = graft()
    batch = some_batch()
    with TableReads(model.memory) as reads:
        for piece in batch.pieces:
            model(batch.ids[:, piece], engram_input_ids=batch.own_ids[:, piece], attention_mask=batch.mask[:, piece])
    expected = twin.batch(batch)
    assert torch.equal(reads.rows[:, :, :5], expected[:, :, :5])
    assert not torch.equal(reads.rows[:, :, 5:7], expected[:, :, 5:7])  # N - 1 of them reach before the cut
    assert torch.equal(reads.rows[:, :, 7:], expected[:, :, 7:])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_of_a_batch_that_is_divided_among_threads_are_the_same(count, graft):
    # Torch divides what has 32,768 elements or more; 16,384 tokens have 65,536 rows and 262,144 values in a layer.
    model, twin = graft()
    texts = torch.randint(4104, (4, 4096), generator=torch.Generator().manual_seed(3))
    with threads(count), TableReads(model.memory) as reads:
        found = model.memory.read(texts, None)
        for layer in model.memory.layer_ids:
            found.vectors(layer)
    expected = torch.stack([twin.rows(text) for text in texts.tolist()], dim=1)
    assert torch.equal(reads.rows, expected)
    assert reads.differing_vectors() == 0


# A process of its own, which is given the tokenizer's folder and the fields of a configuration.

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig
from engram_transformers import EngramForCausalLM

folder, dtype, size, text_config, fields = (json.loads(argument) for argument in sys.argv[1:])
donor = AutoModelForCausalLM.from_config(LlamaConfig(**text_config))
model = EngramForCausalLM.from_backbone(donor, AutoTokenizer.from_pretrained(folder), **fields)
model.to(getattr(torch, dtype))
asked = []
for table in model.memory.tables.values():
    table.register_forward_hook(lambda table, args, output: asked.append(args[0]))
ids = (torch.arange(120) * 7919 % 4104).view(2, 60)
mask = torch.ones_like(ids)
mask[1, :9] = 0
cache = DynamicCache(config=donor.config)
with torch.no_grad():
    for first in range(0, 60, size):
        last = min(60, first + size)
        model(ids[:, first:last], attention_mask=mask[:, :last], cache=cache, use_cache=True)
rows = [torch.cat(asked[place::2], dim=1).tolist() for place in (0, 1)]
print(json.dumps({"rows": rows, "threads": torch.get_num_threads()}))
"""

TEXT_CONFIG = {"vocab_size": 4104, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
FIELDS = {
    "engram_layer_ids": [0, 2],
    "engram_vocab_size": 1000,
    "engram_max_ngram_size": 4,
    "engram_n_heads": 3,
    "engram_head_dim": 2,
    "engram_pad_token_id": 2,
    "engram_seed": 7,
}

# SHA-256 over the rows of both layers, little-endian int64. Never to be changed: trained rows lie where it says.
DIGEST = "ef53e9ff50f0ab814e357fa2e4ed2b0b69663a69bc2b253185025c800401024d"


def digest(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize(("hash_seed", "count", "dtype", "size"), [("0", 1, "float32", 60), ("4242", 2, "bfloat16", 7)])
def test_a_new_process_reads_the_rows_that_every_release_has_read(hash_seed, count, dtype, size, tmp_path):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": str(count)}
    arguments = [json.dumps(value) for value in (str(GOLDEN / "tokenizer"), dtype, size, TEXT_CONFIG, FIELDS)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    rows = torch.tensor(found["rows"])
    assert rows.shape == (2, 2, 60, 3, 3)
    assert digest(rows) == DIGEST
    assert found["threads"] == count


def test_the_rows_that_every_release_has_read_are_those_of_the_naive_twin(tiny_tokenizer):
    token_map = TokenCompressor.from_tokenizer(tiny_tokenizer).token_map(4104)
    classes = int(token_map.max()) + 1
    config = EngramConfig(text_config=LlamaConfig(**TEXT_CONFIG), engram_compressed_vocab_size=classes, **FIELDS)
    twin, ids = Twin.of(config, token_map), [i * 7919 % 4104 for i in range(120)]
    rows = torch.stack([twin.rows(ids[:60]), twin.rows(ids[69:], (9, 0))], dim=1)
    assert digest(rows) == DIGEST
    assert digest(torch.stack([twin.rows(ids[:60]), twin.rows(ids[60:])], dim=1)) != DIGEST  # control: the pads count
