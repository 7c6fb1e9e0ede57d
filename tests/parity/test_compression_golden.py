"""Token compression of a real tokenizer against the public demo's: every key and every class, exactly.

Run with `pytest tests/parity/test_compression_golden.py`.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from engram_transformers.hash_tokens_engram import (
    NORMALIZER,
    TokenCompressor,
    check_token_map,
    normalize_text,
    token_key,
)


GOLDEN = json.loads((Path(__file__).parent / "golden" / "compressed_tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compressor(tiny_tokenizer):
    return TokenCompressor.from_tokenizer(tiny_tokenizer)


def test_every_token_has_the_demos_class(compressor):
    assert compressor.lookup_table.tolist() == GOLDEN["lookup_table"]
    assert compressor.size == GOLDEN["compressed_size"] == 2763
    assert int(compressor.lookup_table[GOLDEN["pad_id"]]) == GOLDEN["compressed_pad_id"]


def test_every_token_has_the_demos_key(tiny_tokenizer):
    assert [token_key(tiny_tokenizer, i) for i in range(len(tiny_tokenizer))] == GOLDEN["keys"]


@pytest.mark.parametrize(("text", "key"), GOLDEN["normalizer_cases"].items())
def test_texts_are_normalised_as_in_the_demo(text, key):
    assert NORMALIZER.normalize_str(text) == key
    assert normalize_text(text) == (key or text)


def test_the_largest_classes_are_the_demos(compressor, tiny_tokenizer):
    sizes = Counter(compressor.lookup_table.tolist())
    by_key = {token_key(tiny_tokenizer, i): c for i, c in reversed(list(enumerate(compressor.lookup_table.tolist())))}
    assert {g["key"]: sizes[by_key[g["key"]]] for g in GOLDEN["top_groups"]} == {
        g["key"]: g["size"] for g in GOLDEN["top_groups"]
    }


def test_the_map_survives_a_backbone_with_more_rows_than_the_tokenizer(compressor, tiny_tokenizer):
    token_map = compressor.token_map(GOLDEN["vocab_size"] + 56)
    assert token_map.tolist() == GOLDEN["lookup_table"] + [-1] * 56
    check_token_map(token_map, tiny_tokenizer)
