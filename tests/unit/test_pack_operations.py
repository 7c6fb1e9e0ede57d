"""Merging and comparing knowledge packs, against Python dictionaries, and a pack's n-grams in words.

Run: pytest tests/unit/test_pack_operations.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engram_transformers.adapters import PackTexts, compare_packs, merge_packs
from engram_transformers.hash_tokens_engram import TokenCompressor, token_map_sha256
from engram_transformers.knowledge_pack_engram import MODES

from ..packs import ngrams_in
from ..tiny import GOLDEN
from .test_pack import FITS, GRAMS, make, same


def vectors_of(pack, layer=2) -> dict[tuple[int, ...], list[float]]:
    return {
        tuple(gram): row.tolist()
        for records in pack.records.values()
        for gram, row in zip(records.ngrams.tolist(), records.vectors[layer], strict=True)
    }


@given(grams=st.lists(GRAMS, min_size=1, max_size=3), conflicts=st.sampled_from(["sum", "later"]))
def test_a_merged_pack_is_a_merged_dictionary(grams, conflicts):
    packs = [make(own, seed, provenance={"number": seed}) for seed, own in enumerate(grams)]
    expected = {}
    for pack in packs:
        for gram, row in vectors_of(pack).items():
            before = torch.tensor(expected[gram]) if conflicts == "sum" and gram in expected else None
            expected[gram] = row if before is None else (before + torch.tensor(row)).tolist()
    merged = merge_packs(packs, conflicts=conflicts)
    assert vectors_of(merged) == expected
    assert merged.provenance == {"merged": [{"number": seed} for seed in range(len(packs))]}


@given(first=GRAMS, second=GRAMS, mode=st.sampled_from(MODES))
def test_what_was_merged_is_removed_and_the_rest_is_as_before(first, second, mode, tmp_path_factory):
    one = make(first - second, 0, mode=mode)
    other = make(second, 1, mode=mode)
    merged = merge_packs([one, other])
    again = merged.without(other.ngrams())
    again.provenance = one.provenance
    assert same(again, one) and not compare_packs(again, one)
    folder = tmp_path_factory.mktemp("packs")
    assert again.save(folder / "again").read_bytes() == one.save(folder / "one").read_bytes()
    left = compare_packs(merged, one)
    assert (set(left.only_first), left.only_second, left.changed) == (second, [], {}) and bool(left) == bool(second)


@given(first=GRAMS, second=GRAMS)
def test_a_difference_is_that_of_sets(first, second):
    """All records that both hold have other vectors, because their seeds differ."""
    one, other = make(first, 0), make(second, 1)
    found = compare_packs(one, other)
    assert set(found.only_first) == first - second and set(found.only_second) == second - first
    held, here = vectors_of(one), vectors_of(other)
    assert set(found.changed) == {gram for gram in first & second if held[gram] != here[gram]}
    for gram, apart in found.changed.items():
        by_layer = [
            (torch.tensor(vectors_of(one, layer)[gram]) - torch.tensor(vectors_of(other, layer)[gram])).abs().max()
            for layer in FITS["layers"]
        ]
        assert apart == max(by_layer)
    assert not compare_packs(one, make(first, 0, provenance={"of": "no matter"}))


def test_packs_of_another_mode_differ():
    assert compare_packs(make({(1, 2)}), make({(1, 2)}, mode="replace")).modes == ("add", "replace")
    assert compare_packs(make({(1, 2)}), make({(1, 2)}, mode="replace"))


@pytest.mark.parametrize(
    ("packs", "conflicts", "message"),
    [
        ([], "refuse", "give at least one"),
        ([make({(1, 2)})], "first", "conflicts='first' must be one of 'refuse', 'sum', 'later'"),
        ([make({(1, 2), (3, 4)}), make({(2, 3), (1, 2)})], "refuse", r"1 n-grams are in several .*: \(1, 2\)\."),
        ([make({(1, 2)}), make({(3, 4)}, mode="replace")], "sum", r"modes \['add', 'replace'\] make no single pack"),
        ([make({(1, 2)}, mode="replace")] * 2, "sum", 'conflicts="later" is what they do'),
        ([make({(1, 2)}), make({(3, 4)}, fits={**FITS, "reader": "c" * 64})], "sum", r"pack 2 .* \(other reader\)"),
        ([make({(1, 2)}), make({(3, 4)}, fits={**FITS, "token_map": "c"})], "later", r"pack 2 .* \(other token_map\)"),
    ],
)
def test_packs_that_do_not_belong_together_are_refused(packs, conflicts, message):
    with pytest.raises(ValueError, match=message):
        merge_packs(packs, conflicts=conflicts)


def test_a_reader_that_one_pack_needs_is_needed_by_the_merged_one():
    free, bound = make({(1, 2)}, fits={**FITS, "reader": None}), make({(3, 4)})
    for packs in ([free, bound], [bound, free]):
        assert merge_packs(packs).fits == FITS
    assert merge_packs([free]).fits["reader"] is None
    with pytest.raises(ValueError, match="pack 3"):
        merge_packs([free, bound, make({(5, 6)}, fits={**FITS, "reader": "c" * 64})])
    with pytest.raises(ValueError, match="other classes"):
        compare_packs(bound, make({(1, 2)}, fits={**FITS, "classes": 51}))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def fits(tokenizer):
    classes = TokenCompressor.from_tokenizer(tokenizer)
    return {**FITS, "token_map": token_map_sha256(classes.lookup_table), "classes": classes.size}


def test_a_names_ngrams_are_those_of_its_tokens(tokenizer, fits):
    """At the beginning of a text and after a space; both orders, and nothing of what is shorter than an n-gram."""
    texts = PackTexts(make(set(), fits=fits), tokenizer)
    classes = TokenCompressor.from_tokenizer(tokenizer).lookup_table
    expected = set()
    alone, after_space = (tokenizer(name, add_special_tokens=False)["input_ids"] for name in ("Łukasz", " Łukasz"))
    assert texts.ngrams("Łukasz") == ngrams_in(classes[alone].tolist()) | ngrams_in(classes[after_space].tolist())
    assert ngrams_in(classes[alone].tolist()) != ngrams_in(classes[after_space].tolist())
    for written in ("Zorvan Kelmir", " Zorvan Kelmir"):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        expected |= ngrams_in(classes[ids].tolist())
    assert texts.ngrams("Zorvan Kelmir") == expected and {len(gram) for gram in expected} == {2, 3}
    assert all("".join(texts.words(gram)) in "zorvankelmir" for gram in expected)
    assert texts.ngrams("a") == set()


def test_the_words_of_every_class_lead_back_to_it(tokenizer, fits):
    texts = PackTexts(make(set(), fits=fits), tokenizer)
    words = [texts.words([own])[0] for own in range(fits["classes"])]
    assert len(set(words)) == fits["classes"], "no two classes read the same"
    compressor = TokenCompressor.from_tokenizer(tokenizer)
    for token in tokenizer("Ada Lovelace was born in London.", add_special_tokens=False)["input_ids"]:
        word = words[int(compressor.lookup_table[token])]
        assert word == tokenizer.decode([token]).strip().lower()


def test_another_tokenizer_is_refused_and_added_tokens_are_not(tokenizer, fits):
    longer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    longer.add_tokens(["<brand new>"])
    pack = make({(4, 5)}, fits=fits)
    assert PackTexts(pack, longer).words((4, 5)) == PackTexts(pack, tokenizer).words((4, 5))
    assert PackTexts(pack, longer).ngrams("Dax<brand new>Bolun") <= PackTexts(pack, longer).ngrams("Dax") | (
        PackTexts(pack, longer).ngrams("Bolun")
    )
    for other in ({"token_map": "c" * 64}, {"token_map": None}, {"classes": fits["classes"] + 1}):
        with pytest.raises(ValueError, match="Use the tokenizer of the model"):
            PackTexts(make({(4, 5)}, fits={**fits, **other}), tokenizer)
