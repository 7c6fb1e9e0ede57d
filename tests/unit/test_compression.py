"""Token compression: which tokens share a class, in what order classes appear, and the digest of the map.

The tables of a real tokenizer are compared in `tests/parity`; here the laws, on tokenizers made of random texts.
Run with `pytest tests/unit/test_compression.py`.
"""

import hashlib
import re
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engram_transformers.hash_tokens_engram import (
    DEAD,
    TokenCompressor,
    check_token_map,
    normalize_text,
    token_key,
    token_map_sha256,
)


class ListTokenizer:
    """A tokenizer whose ids decode to the given texts, and whose raw forms are `raw<id>`."""

    added_tokens_decoder = {}

    def __init__(self, texts: list[str]):
        self.texts = texts

    def get_vocab(self) -> dict[str, int]:
        return {f"raw{token_id}": token_id for token_id in range(len(self.texts))}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(self.texts[i] for i in ids)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"raw{token_id}"


# Few letters, in several shapes of each, so that classes do merge.
TEXTS = st.lists(st.text("aAáÁｂ\ufffd B\t\n\u0301", max_size=3), min_size=1, max_size=30)
# All of Unicode but the surrogates; `st.text()` would first sort it by category, which takes seconds.
ANY_TEXT = st.lists(st.integers(0, 0x10FFFF - 0x800), min_size=1, max_size=6).map(
    lambda points: "".join(chr(point if point < 0xD800 else point + 0x800) for point in points)
)
MAPS = st.lists(st.integers(-1, 5), min_size=1, max_size=12).map(lambda classes: torch.tensor(classes))


@pytest.mark.parametrize(
    "texts",
    [
        ["Apple", " apple", "APPLE ", "ápplé", "\tapple\n"],
        [" ", "  ", "\t", "\n", "\r\n \t", "\u3000", "\u00a0"],
        ["ﬁ", "fi", "FI"],
        ["①", "1"],
        ["a  b", "A\t\nB"],
    ],
)
def test_texts_that_read_the_same_share_a_key(texts):
    assert len({normalize_text(text) for text in texts}) == 1
    assert normalize_text("x") != normalize_text(texts[0])


@pytest.mark.parametrize(("one", "other"), [("ß", "ss"), ("ı", "i"), ("ς", "σ"), ("a b", "ab"), ("a", ""), (" ", "")])
def test_texts_that_read_differently_keep_their_keys(one, other):
    assert normalize_text(one) != normalize_text(other)


@given(text=ANY_TEXT)
def test_a_key_is_never_empty_and_has_no_outer_space(text):
    key = normalize_text(text)
    assert key
    assert key == " " or key == key.strip(" \t\r\n") or key == text


def test_a_lone_accent_stays_itself():
    assert normalize_text("\u0301") == "\u0301"


@given(texts=TEXTS)
def test_classes_follow_keys_in_order_of_first_appearance(texts):
    tokenizer = ListTokenizer(texts)
    compressor = TokenCompressor.from_tokenizer(tokenizer)
    keys = [token_key(tokenizer, token_id) for token_id in range(len(texts))]
    in_order = list(dict.fromkeys(keys))
    assert compressor.lookup_table.tolist() == [in_order.index(key) for key in keys]
    assert compressor.size == len(in_order)


def test_incomplete_characters_are_keyed_by_their_raw_form():
    tokenizer = ListTokenizer(["\ufffd", "\ufffd", "raw0"])
    assert token_key(tokenizer, 1) == "raw1"
    # The third token reads like the first one's raw form, so the two do share a class; the second does not.
    assert TokenCompressor.from_tokenizer(tokenizer).lookup_table.tolist() == [0, 1, 0]


@given(texts=TEXTS, padding=st.integers(0, 5))
def test_ids_without_an_entry_are_dead(texts, padding):
    compressor = TokenCompressor.from_tokenizer(ListTokenizer(texts))
    token_map = compressor.token_map(len(texts) + padding)
    assert token_map.tolist() == compressor.lookup_table.tolist() + [DEAD] * padding
    assert token_map.dtype == torch.int64


def test_a_tokenizer_larger_than_the_backbone_is_refused():
    compressor = TokenCompressor.from_tokenizer(ListTokenizer(["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"ids up to 2, .*those up to 1.*resize_token_embeddings\(3\)"):
        compressor.token_map(2)


@given(classes=MAPS, padding=st.integers(0, 4))
def test_the_digest_is_that_of_the_entries_up_to_the_last_live_one(classes, padding):
    live = classes.tolist()
    while live and live[-1] == DEAD:
        live.pop()
    expected = hashlib.sha256(struct.pack(f"<{len(live)}q", *live)).hexdigest()
    padded = torch.cat([classes, classes.new_full((padding,), DEAD)])
    assert token_map_sha256(padded) == token_map_sha256(padded.int()) == expected


@given(classes=MAPS, place=st.integers(0, 11), change=st.integers(1, 3))
def test_the_digest_changes_with_every_entry(classes, place, change):
    other = classes.clone()
    other[place % len(classes)] += change
    assert token_map_sha256(other) != token_map_sha256(classes)


@given(texts=TEXTS, padding=st.integers(0, 3), ids=st.sets(st.integers(0, 40), max_size=8))
def test_a_tokenizer_with_another_map_is_refused_with_the_first_ids_that_differ(texts, padding, ids):
    tokenizer = ListTokenizer(texts)
    stored = TokenCompressor.from_tokenizer(tokenizer).token_map(len(texts) + padding)
    check_token_map(stored, tokenizer)  # the control: dead ids at the end do not count
    wrong = sorted(i for i in ids if i < len(stored))
    stored[wrong] += 1
    if wrong:
        shown = [f"{i} ('raw{i}')" if i < len(texts) else str(i) for i in wrong[:5]]
        with pytest.raises(ValueError) as refusal:
            check_token_map(stored, tokenizer)
        assert f"({len(texts)} ids)" in str(refusal.value)
        assert f"in {len(wrong)} place(s); first ids that differ: {', '.join(shown)}. Use" in str(refusal.value)


def test_a_tokenizer_with_more_or_fewer_ids_is_refused():
    stored = TokenCompressor.from_tokenizer(ListTokenizer(["a", "b"])).lookup_table
    for texts, place in ((["a", "b", "c"], "2 ('raw2')"), (["a"], "1")):
        with pytest.raises(ValueError, match=rf"in 1 place\(s\); first ids that differ: {re.escape(place)}\. "):
            check_token_map(stored, ListTokenizer(texts))


def test_ids_between_tokens_are_dead_and_the_highest_counts():
    vocabulary = {"a": 0, "A": 1, "b": 4, "c": 9}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))
    assert len(tokenizer) == 4, "control: the number of ids is not the highest + 1"
    compressor = TokenCompressor.from_tokenizer(tokenizer)
    assert compressor.lookup_table.tolist() == [0, 0, DEAD, DEAD, 1, DEAD, DEAD, DEAD, DEAD, 2]
    with pytest.raises(ValueError, match=r"ids up to 9, but .* those up to 8.*resize_token_embeddings\(10\)"):
        compressor.token_map(9)
    stored = compressor.token_map(12)
    check_token_map(stored, tokenizer)
    for place, says in ((9, "9 ('c')"), (2, "2")):
        stored[place] += 1
        with pytest.raises(ValueError, match=re.escape(f"in 1 place(s); first ids that differ: {says}. Use")):
            check_token_map(stored, tokenizer)
        stored[place] -= 1


def test_the_map_is_int64_whatever_it_is_made_from():
    assert TokenCompressor(torch.tensor([0, 1, 1], dtype=torch.int32)).lookup_table.dtype == torch.int64
