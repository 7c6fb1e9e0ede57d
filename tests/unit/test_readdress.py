"""Re-addressing: a new row is the mean of the old rows of all reads that fall into it, whatever layouts and tokenizers.

The twin is plain Python: `naive_hash_ids` and dictionaries. Run: pytest tests/unit/test_readdress.py
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engram_transformers.conversion.readdress import (
    RowMeans,
    TextNgrams,
    aligned,
    pack_ngrams,
    readdress,
    rows_of,
    text_blocks,
)
from engram_transformers.hash_constants_engram import HashConstants, derive_multipliers, derive_primes, head_offsets
from engram_transformers.hash_ngrams_engram import NgramHasher, naive_hash_ids
from engram_transformers.knowledge_pack_engram import KnowledgePack

from ..tiny import GOLDEN


CLASSES, WIDTH, LAYERS = 30, 2, [1, 4]


def layout(rows: int, heads: int, seed: int = 0) -> NgramHasher:
    """Orders 2 and 3, two layers, every id its own class."""
    primes = torch.from_numpy(derive_primes(len(LAYERS), [rows, rows], heads))
    multipliers = torch.from_numpy(derive_multipliers(LAYERS, 3, CLASSES, seed))
    constants = HashConstants(multipliers, primes, head_offsets(primes), torch.tensor([0]))
    return NgramHasher(LAYERS, torch.arange(CLASSES), constants)


class Words:
    """A tokenizer whose tokens are numbers with spaces between them, or every `every` of them together."""

    is_fast = True

    def __init__(self, every: int = 1):
        self.every = every

    def __call__(self, text, return_offsets_mapping, **_):
        words, ends = text.split(" "), []
        for place in range(0, len(words), self.every):
            ends.append(len(" ".join(words[: place + self.every])))
        ids = [int(words[place]) for place in range(0, len(words), self.every)]
        return {"input_ids": ids} | ({"offset_mapping": [(0, end) for end in ends]} if return_offsets_mapping else {})


def source_of(hasher: NgramHasher, parts: int = 1) -> SimpleNamespace:
    """What `readdress` reads of a checkpoint, with random rows in parts."""
    generator, rows = torch.Generator().manual_seed(0), {}
    for layer, heights in zip(LAYERS, hasher.primes.sum(-1).tolist(), strict=True):
        for order, height in enumerate(heights, start=2):
            table = torch.randn(height, WIDTH, generator=generator)
            cut = height // parts
            rows[layer, order] = [
                *(table[p * cut : (p + 1) * cut] for p in range(parts - 1)),
                table[cut * (parts - 1) :],
            ]
    config = SimpleNamespace(engram_head_dim=WIDTH, engram_orders=[2, 3])
    read = {"order_parts": lambda layer, order: rows[layer, order], "values": lambda rows: rows}
    return SimpleNamespace(config=config, hasher=hasher, **read)


class Written(dict):
    """Stands for the new tables: what is written to them, by layer and order."""

    def __init__(self, hasher: NgramHasher):
        for layer, heights in zip(LAYERS, hasher.primes.sum(-1).tolist(), strict=True):
            self.update({(layer, order): torch.zeros(height, WIDTH) for order, height in enumerate(heights, start=2)})

    def write_order(self, layer, order, rows, first):
        self[layer, order][first : first + len(rows)] = rows


def naive_rows(hasher: NgramHasher, ids: list[int], layer: int) -> list[list[list[int]]]:
    """Row of each position, order and head, counted from the first of its order."""
    primes = hasher.primes[layer].tolist()
    hashes = naive_hash_ids(ids, hasher.multipliers[layer].tolist(), primes, int(hasher.pad_class))
    heads = len(primes[0])
    return [
        [[own[o * heads + h] + sum(primes[o][:h]) for h in range(heads)] for o in range(len(primes))] for own in hashes
    ]


TEXTS = st.lists(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=12), min_size=1, max_size=4)


@given(TEXTS, st.integers(2, 40), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2))
def test_a_new_row_is_the_mean_of_the_old_rows_of_its_reads(tmp_path, texts, rows, old_heads, new_heads, parts):
    old, new = layout(11, old_heads), layout(rows, new_heads)
    source, written = source_of(old, parts), Written(new)
    words = [" ".join(map(str, ids)) for ids in texts]
    report = readdress(source, new, TextNgrams(words, old, new, tok := Words(), tok), written, tmp_path)
    reads = defaultdict(list)
    for ids in texts:
        for layer, name in enumerate(LAYERS):
            for one, other in zip(naive_rows(old, ids, layer), naive_rows(new, ids, layer), strict=True):
                for order in range(2):
                    for head in range(new_heads):
                        table = torch.cat(source.order_parts(name, order + 2))
                        row = table[one[order][head % old_heads]]
                        reads[name, order + 2, other[order][head]].append(row)
    for (name, order), table in written.items():
        for row, values in enumerate(table):
            expected = torch.stack(reads[name, order, row]).mean(0) if (name, order, row) in reads else torch.zeros(2)
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert report.filled == len(reads) and report.tokens == report.aligned == sum(map(len, texts))
    assert report.rows == int(new.primes.sum())


@given(TEXTS)
def test_in_the_same_layout_every_row_that_is_read_keeps_its_bits(tmp_path, texts):
    hasher = layout(11, 2)
    source, written = source_of(hasher), Written(hasher)
    words = [" ".join(map(str, ids)) for ids in texts]
    readdress(source, hasher, TextNgrams(words, hasher, hasher, tok := Words(), tok), written, tmp_path)
    for (layer, order), table in written.items():
        read = table.any(-1)
        assert bool(read.any()) and torch.equal(table[read], source.order_parts(layer, order)[0][read])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=1, max_size=30), st.integers(1, 30))
def test_means_are_the_same_however_reads_are_cut(tmp_path, reads, cut):
    rows, values = torch.tensor([r for r, _ in reads]), torch.tensor([[float(v)] for _, v in reads])
    means = RowMeans(tmp_path, 4, 1)
    for first in range(0, len(rows), cut):
        means.add(rows[first : first + cut], values[first : first + cut])
    for row in range(4):
        own = values[rows == row]
        assert int(means.counts[row]) == len(own)
        torch.testing.assert_close(means.means[row], own.mean(0) if len(own) else torch.zeros(1), rtol=1e-4, atol=1e-5)


def test_the_mean_of_equal_vectors_is_that_vector(tmp_path):
    means = RowMeans(tmp_path, 1, 3)
    value = torch.tensor([[0.1, 1e-30, 3.3e7]])
    for count in (3, 1, 7):  # a sum of three times 0.1 is not 0.3
        means.add(torch.zeros(count, dtype=torch.int64), value.expand(count, -1))
    assert torch.equal(means.means, value)


def test_tokenizers_are_aligned_by_the_character_at_which_their_tokens_end(tmp_path):
    assert aligned([1, 3, 3, 6], [3, 4, 6]).tolist() == [[2, 3], [0, 2]], "the last of two that end together"
    old, new = layout(1009, 1), layout(2003, 1)
    source, written = source_of(old), Written(new)
    ngrams = TextNgrams(["1 2 3 4 5 6"], old, new, Words(), Words(every=2))
    report = readdress(source, new, ngrams, written, tmp_path)
    assert (report.tokens, report.aligned) == (3, 3)
    # The new layout reads the ids 1, 3, 5, which end where the old one has read 2, 4, 6.
    for place, row in enumerate(naive_rows(new, [1, 3, 5], 0)):
        before = naive_rows(old, [1, 2, 3, 4, 5, 6], 0)[2 * place + 1]
        assert torch.equal(written[1, 3][row[1][0]], source.order_parts(1, 3)[0][before[1][0]])


def test_a_pack_gives_its_own_ngrams_and_no_others(tmp_path):
    old, new = layout(1009, 2), layout(2003, 2)
    source, written = source_of(old), Written(new)
    fits = {"token_map": None, "classes": CLASSES, "layers": LAYERS, "widths": {"2": 4, "3": 4}, "reader": None}
    grams = {2: torch.tensor([[5, 6], [7, 8]]), 3: torch.tensor([[1, 2, 3]])}
    vectors = {layer: {order: torch.zeros(len(g), 4) for order, g in grams.items()} for layer in LAYERS}
    readdress(source, new, pack_ngrams(KnowledgePack(grams, vectors, fits), new), written, tmp_path)
    row, before = naive_rows(new, [1, 2, 3], 0)[2][1], naive_rows(old, [1, 2, 3], 0)[2][1]
    assert torch.equal(written[1, 3][row], source.order_parts(1, 3)[0][before])
    assert {order: int(table.any(-1).sum()) for (_, order), table in written.items()} == {2: 4, 3: 2}


def test_rows_are_those_that_the_model_reads():
    hasher, ids = layout(11, 2), torch.tensor([[3, 4, 5, 6]])
    lookback = hasher.lookback(hasher.compress(ids))
    assert torch.equal(rows_of(hasher, lookback), hasher.rows_of_classes(hasher.compress(ids))[:, 0])


def test_a_file_is_read_whole_and_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("engram_transformers.conversion.readdress.BLOCK_CHARACTERS", 10)
    path = tmp_path / "text"
    path.write_text("first line\nsecond line is long\n\nä\nend")
    blocks = list(text_blocks(path))
    assert "".join(blocks) == path.read_text() and max(map(len, blocks)) <= 20 and len(blocks) > 2


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [(None, FileNotFoundError, "not a file"), (b"", ValueError, "is empty"), (b"\xff\xfe", ValueError, "UTF-8")],
)
def test_a_text_that_cannot_be_read_is_refused(tmp_path, content, error, said):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(error, match=said):
        list(text_blocks(tmp_path / "text"))


def test_a_tokenizer_without_offsets_and_texts_without_ngrams_are_refused(tmp_path):
    hasher, slow = layout(11, 1), Words()
    slow.is_fast = False
    with pytest.raises(ValueError, match="does not say where its tokens are"):
        TextNgrams(["1"], hasher, hasher, Words(), slow)
    with pytest.raises(ValueError, match="not one n-gram"):
        none = TextNgrams([], hasher, hasher, slow, slow)
        readdress(source_of(hasher), hasher, none, Written(hasher), tmp_path)


def test_offsets_of_a_real_tokenizer_end_where_its_tokens_end():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    text = "An old text, with ümlauts."
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for place, (_, end) in enumerate(read["offset_mapping"], start=1):
        said = tokenizer.decode(read["input_ids"][:place])
        assert said == text[:end] or said.endswith("\ufffd")
