"""Knowledge packs by themselves: the file, the look-up against a Python dictionary, the order of packs.

Run: pytest tests/unit/test_pack.py
"""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engram_transformers import EngramFormatError
from engram_transformers.knowledge_pack_engram import MODES, FoundRecords, KnowledgePack, PackRead, PackStack

from ..packs import ngrams_in


FITS = {"token_map": "a" * 64, "classes": 50, "layers": [1, 2], "widths": {"2": 4, "3": 4}, "reader": "b" * 64}
GRAMS = st.sets(st.lists(st.integers(0, 9), min_size=2, max_size=3).map(tuple), max_size=30)


def make(ngrams, seed=0, fits=FITS, **kwargs) -> KnowledgePack:
    generator = torch.Generator().manual_seed(seed)
    grams = {n: torch.tensor([g for g in sorted(ngrams) if len(g) == n], dtype=torch.int64).view(-1, n) for n in (2, 3)}
    rows = {n: (len(grams[n]), 4) for n in grams}
    vectors = {layer: {n: torch.randn(rows[n], generator=generator) for n in rows} for layer in fits["layers"]}
    return KnowledgePack(grams, vectors, fits, **kwargs)


def same(one: KnowledgePack, other: KnowledgePack) -> bool:
    return (
        (one.fits, one.mode, one.provenance) == (other.fits, other.mode, other.provenance)
        and one.ngrams() == other.ngrams()
        and all(
            torch.equal(records.vectors[layer], other.records[n].vectors[layer])
            for n, records in one.records.items()
            for layer in records.vectors
        )
    )


@given(
    packs=st.lists(st.tuples(GRAMS, st.sampled_from(MODES)), max_size=3), text=st.lists(st.integers(-1, 9), min_size=1)
)
def test_records_are_those_of_a_dictionary(packs, text):
    """Every position of every text, against tuples in a `dict` read one by one."""
    made = [make(grams, seed, mode=mode) for seed, (grams, mode) in enumerate(packs)]
    table = torch.randn(1, len(text), 8)
    alone = [([-1] * i + text)[: len(text)] for i in range(3)]  # entry i is i positions back
    windows = torch.tensor([[row] for row in alone])
    for i in (1, 2):
        windows[i] = windows[i].masked_fill(windows[i - 1] < 0, -1)
    read = FoundRecords([PackRead(pack) for pack in made], windows).apply(2, table)
    expected = table.clone()
    for place in range(len(text)):
        for pack in made:
            for n, records in pack.records.items():
                held = {tuple(g): v for g, v in zip(records.ngrams.tolist(), records.vectors[2], strict=True)}
                value = held.get(tuple(text[max(0, place - n + 1) : place + 1]))
                own = expected[0, place, 4 * (n - 2) : 4 * (n - 1)]
                if value is not None:
                    own.copy_(own + value if pack.mode == "add" else value)
    assert torch.equal(read, expected)


@given(grams=GRAMS, mode=st.sampled_from(MODES))
def test_a_file_holds_the_whole_pack(grams, mode, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    pack = make(grams, mode=mode, provenance={"licence": "CC0"})
    path = pack.save(folder / "one.engram-pack.safetensors")
    again = KnowledgePack.load(path)
    assert same(again, pack) and len(again) == len(grams)
    assert again.save(folder / "two").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == ["one.engram-pack.safetensors", "two"]


def test_keys_that_collide_are_told_apart(monkeypatch):
    """Two n-grams with one 64-bit key: other factors are drawn, and both are found."""
    draw, drawn = torch.randint, []

    def colliding(*args, **kwargs):
        drawn.append(args)
        return torch.tensor([0, 0]) if len(drawn) == 1 else draw(*args, **kwargs)  # factors 1, 1: (1, 2) and (2, 1)

    monkeypatch.setattr(torch, "randint", colliding)
    pack = make({(1, 2), (2, 1)})
    slots, matches = pack.records[2].find(torch.tensor([[[1, 2], [2, 1], [0, 3]]]))
    assert matches.tolist() == [[True, True, False]] and slots[0, 0] != slots[0, 1] and len(drawn) > 1


def test_removed_ngrams_are_gone_from_the_file(tmp_path):
    pack = make({(1, 2), (2, 3), (1, 2, 3)})
    left = KnowledgePack.load(pack.without([(2, 3)]).save(tmp_path / "left"))
    assert left.ngrams() == {(1, 2), (1, 2, 3)}
    kept = pack.records[3].vectors[1]
    assert torch.equal(left.records[3].vectors[1], kept)
    with pytest.raises(ValueError, match=r"no record of \[\(7, 7\)\]: nothing was removed"):
        pack.without([(1, 2), (7, 7)])


@pytest.mark.parametrize(
    ("ngrams", "message"),
    [
        ({(1, 50)}, r"n-gram \[1, 50\] is not made of the memory's token classes 0 to 49"),
        ({(-1, 2)}, r"n-gram \[-1, 2\] is not made"),
    ],
)
def test_an_ngram_of_no_text_is_refused(ngrams, message):
    with pytest.raises(ValueError, match=message):
        make(ngrams)


def test_wrong_tensors_are_refused():
    grams = {2: torch.tensor([[1, 2], [1, 2]]), 3: torch.empty(0, 3, dtype=torch.int64)}
    rows = {2: torch.zeros(2, 4), 3: torch.zeros(0, 4)}
    with pytest.raises(ValueError, match=r"n-gram \[1, 2\] is given twice"):
        KnowledgePack(grams, {1: rows, 2: rows}, FITS)
    with pytest.raises(ValueError, match=r"layers \[1, 2\]; given are .* layers \[1\]"):
        KnowledgePack(grams, {1: rows}, FITS)
    with pytest.raises(ValueError, match=r"layer 2, order 2 have shape \(1, 4\), needed is \(2, 4\)"):
        KnowledgePack(grams, {1: rows, 2: {**rows, 2: torch.zeros(1, 4)}}, FITS)
    with pytest.raises(ValueError, match="layer 2, order 2 hold infinity or NaN"):
        KnowledgePack(grams, {1: rows, 2: {**rows, 2: torch.full((2, 4), torch.nan)}}, FITS)
    with pytest.raises(ValueError, match="mode 'sum' of a pack must be one of 'add', 'replace'"):
        KnowledgePack(grams, {1: rows, 2: rows}, FITS, mode="sum")


def test_a_damaged_file_is_refused(tmp_path):
    whole = make({(1, 2), (1, 2, 3)}).save(tmp_path / "whole").read_bytes()
    header = struct.unpack("<Q", whole[:8])[0] + 8
    for cut in (0, 7, 8, header - 1, header, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(EngramFormatError, match=r"truncated|damaged|complete"):
            KnowledgePack.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        KnowledgePack.load(tmp_path / "none")


@pytest.mark.parametrize("change", ["kind", "version", "pack", "fits", "tensor", "class", "shape"])
def test_a_file_of_another_content_is_refused(change, tmp_path):
    path = make({(1, 2), (1, 2, 3)}).save(tmp_path / "pack")
    tensors = load_file(path)
    told = {"version": "1", "fits": FITS, "mode": "add", "provenance": {}}
    metadata = {"engram-pack": json.dumps(told)}
    save_file(tensors, path, metadata)
    assert len(KnowledgePack.load(path)) == 2  # the control: this is how a whole one is written
    if change == "kind":
        metadata = {"format": "pt"}
    elif change == "version":
        metadata["engram-pack"] = json.dumps({**told, "version": "2"})
    elif change == "pack":
        metadata["engram-pack"] = "[" * 100_000
    elif change == "fits":
        metadata["engram-pack"] = json.dumps({**told, "fits": {**FITS, "widths": {"2": 1 << 60}}})
    elif change == "tensor":
        del tensors["layers.2.order3.vectors"]
    elif change == "class":
        tensors["order2.ngrams"] += 1 << 40
    else:
        tensors["layers.2.order3.vectors"] = torch.zeros(1, 5)
    save_file(tensors, path, metadata)
    with pytest.raises(EngramFormatError, match="not a knowledge pack" if change == "kind" else "damaged or newer"):
        KnowledgePack.load(path)


@pytest.mark.parametrize("key", ["token_map", "classes", "layers", "widths", "reader"])
def test_a_pack_of_another_memory_is_refused(key):
    here = {
        **FITS,
        key: {"token_map": "c" * 64, "reader": "c" * 64, "classes": 51, "layers": [1], "widths": {"2": 4}}[key],
    }
    stack = PackStack()
    stack.load(make({(1, 2)}), "mine", FITS)
    with pytest.raises(ValueError, match="memory 'other' was made for"):
        stack.load(make({(1, 2)}), "other", here)
    assert stack.active == ("mine",) and set(stack.loaded) == {"mine"}


def test_a_pack_without_a_reader_fits_every_reader():
    stack = PackStack()
    stack.load(make({(1, 2)}, fits={**FITS, "reader": None}), "any", FITS)
    assert stack.active == ("any",)


def test_names_are_checked_and_nothing_changes():
    stack = PackStack()
    stack.load(make({(1, 2), (2, 3)}), "one", FITS)
    stack.load(make({(2, 3), (3, 4)}), "two", FITS)
    for act, message in [
        (lambda: stack.load(make(set()), "one", FITS), "named 'one' is loaded already"),
        (lambda: stack.unload("three"), r"no memory named 'three' is loaded; loaded are \['one', 'two'\]"),
        (lambda: stack.choose(["two", "three"]), "no memory named 'three'"),
        (lambda: stack.choose(["two", "two"]), "named twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            act()
    with pytest.raises(TypeError, match="names are a list"):
        stack.choose("two")
    assert stack.active == ("one", "two")
    assert stack.conflicts() == {(2, 3): ["one", "two"]}
    stack.choose(["two"])
    assert stack.conflicts() == {} and stack.active == ("two",)


def test_ngrams_of_a_text_are_those_of_python():
    assert ngrams_in([1, 2, 3]) == {(1, 2), (2, 3), (1, 2, 3)}
