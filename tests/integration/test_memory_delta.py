"""Memory deltas: base and delta give the trained memory bit for bit, wherever its tables are; a delta has changed rows
and nothing else; one that is damaged, of another memory or of another base is refused and changes nothing.

Run: pytest tests/integration/test_pack.py
"""

import errno
import json
import shutil
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engram_transformers import EngramConfig, EngramForCausalLM, EngramFormatError
from engram_transformers.adapters import load_memory_delta, save_changes, save_memory_delta
from engram_transformers.adapters import memory_delta as deltas
from engram_transformers.adapters.memory_delta import DELTA_NAME, dense_weights, named_parts, read_delta_header

from ..conftest import examples
from .placed import loaded


PLACES = ("device", "cpu", "disk")


@torch.no_grad()
def change(model, seed: int = 0, rows: int = 5) -> dict[str, torch.Tensor]:
    """Stands for training: other values in some rows of every part and in the dense weights. The state afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for part in named_parts(model).values():
        height, width = part.table_shape
        chosen = torch.randperm(height, generator=generator)[:rows].sort().values
        part.write(chosen, torch.randn(rows, width, generator=generator))
    for weight in dense_weights(model).values():
        weight.add_(torch.randn(weight.shape, generator=generator))
    return state(model)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("to", PLACES)
@pytest.mark.parametrize("place", PLACES)
def test_base_and_pack_are_the_trained_memory(place, to, saved, tmp_path):
    trained = loaded(saved, place)
    expected = change(trained)
    assert not same(expected, state(loaded(saved))), "control: something was changed"
    path = save_memory_delta(trained, tmp_path / "delta")
    assert path == tmp_path / "delta" / DELTA_NAME
    model = loaded(saved, to)
    change(model, seed=1, rows=9)  # what is in it is undone, also in rows that the delta does not name
    assert load_memory_delta(model, path) is model
    assert model.memory.placement == to
    assert same(state(model), expected)


def test_a_pack_holds_changed_rows_and_is_the_same_file_wherever_the_tables_are(saved, tmp_path):
    held = {}
    for place in PLACES:
        model = loaded(saved, place)
        change(model)
        name, part = next(iter(named_parts(model).items()))
        part.write(torch.tensor([0]), loaded_part(saved, name).read(torch.tensor([0])))  # as it was
        held[place] = contents(save_memory_delta(model, tmp_path / f"{place}.safetensors"))
        header = read_delta_header(tmp_path / f"{place}.safetensors")
        assert all(4 <= count <= 5 for count in header.rows.values())
        assert header.base == str(saved.resolve())
        assert (tmp_path / f"{place}.safetensors").stat().st_size < 40_000
    for place in ("cpu", "disk"):
        assert same(held[place][0], held["device"][0]) and held[place][1] == held["device"][1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing half-written is left"


def loaded_part(saved, name):
    return named_parts(loaded(saved))[name]


def contents(path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping


@examples(10)
@given(seed=st.integers(0, 2**16), rows=st.integers(0, 30), parts=st.integers(1, 3))
def test_any_rows_of_any_parts_come_back(seed, rows, parts, tmp_path_factory, tiny_engram):
    folder = tmp_path_factory.mktemp("delta")
    tiny_engram(trained=True, engram_table_parts=parts, engram_table_dtype="bfloat16").save_pretrained(folder / "graft")
    model = loaded(folder / "graft", "disk")
    expected = change(model, seed, rows)
    save_memory_delta(model, folder)
    assert same(state(load_memory_delta(loaded(folder / "graft", "disk"), folder)), expected)
    assert same(state(load_memory_delta(loaded(folder / "graft"), folder)), expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_with_a_pack_alone_loads_as_base_and_pack(place, saved, tmp_path):
    model = loaded(saved, "disk").set_trainable("tables")
    expected = change(model)
    save_memory_delta(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=place)
    assert same(state(again), expected)
    assert (again.memory.placement, again.config.engram_trainable) == (place, "tables")
    held = {**dict(again.named_parameters()), **named_parts(again)}
    assert {name for name, part in held.items() if part.requires_grad} == set(named_parts(again))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement="none")
    assert plain.runs_as_donor


def test_what_is_made_from_the_configuration_of_a_pack_is_saved_whole(saved, tmp_path):
    save_changes(loaded(saved), tmp_path / "delta")
    config = EngramConfig.from_pretrained(tmp_path / "delta")
    assert config.engram_memory_delta == DELTA_NAME, "the control"
    model = EngramForCausalLM(config, token_map=loaded(saved).memory.hashing.token_map)
    change(model)
    model.save_pretrained(tmp_path / "whole")
    assert same(state(loaded(tmp_path / "whole")), state(model))


def test_a_base_that_is_gone_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "graft")
    model = loaded(tmp_path / "graft")
    expected = change(model)
    save_memory_delta(model, tmp_path / "delta")
    model.config.save_pretrained(tmp_path / "delta")
    (tmp_path / "graft").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"graft', which is not there.*load_memory_delta"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    moved = loaded(tmp_path / "elsewhere")
    assert same(state(load_memory_delta(moved, tmp_path / "delta")), expected), "the digest counts, not the path"


def test_a_memory_that_was_saved_since_is_its_own_base(saved, tmp_path):
    model = loaded(saved, "disk")
    change(model)
    model.save_pretrained(tmp_path / "saved")
    model = loaded(tmp_path / "saved", "disk")
    expected = change(model, seed=2)
    save_memory_delta(model, tmp_path / "delta")
    assert same(state(load_memory_delta(loaded(tmp_path / "saved"), tmp_path / "delta")), expected)
    with pytest.raises(EngramFormatError, match=r"has other rows or weights.*Load the delta's base"):
        load_memory_delta(loaded(saved), tmp_path / "delta", base=saved)


def test_a_pack_of_another_memory_is_refused(saved, tiny_engram, tmp_path):
    other = tiny_engram(trained=True, engram_seed=5)
    other.save_pretrained(tmp_path / "other")
    save_memory_delta(other, tmp_path / "delta")
    model = loaded(saved)
    before = state(model)
    with pytest.raises(EngramFormatError, match=r"another memory: its engram_hash_sha256.*Load the checkpoint"):
        load_memory_delta(model, tmp_path / "delta")
    assert same(state(model), before)


def test_what_has_no_base_or_no_tables_has_no_pack(saved, tiny_engram, tiny_donor, tmp_path):
    with pytest.raises(ValueError, match="came from no checkpoint"):
        save_memory_delta(tiny_engram(), tmp_path)
    with pytest.raises(ValueError, match="was not loaded"):
        save_memory_delta(loaded(saved, "none"), tmp_path)
    with pytest.raises(TypeError, match="LlamaForCausalLM has no memory"):
        save_memory_delta(tiny_donor(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'memory_delta.safetensors' is missing from"):
        load_memory_delta(loaded(saved), tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder 'me/delta' that could hold"):
        load_memory_delta(loaded(saved), "me/delta")
    assert not list(tmp_path.iterdir())


def rewritten(path, change_tensors=None, **metadata):
    """A delta with other contents, well formed as a safetensors file."""
    tensors, held = contents(path)
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, path, {**held, **metadata})


NAME = "memory.tables.1.order2.0"
DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "damaged"),
    "no safetensors": (lambda path: path.write_bytes(b"not ours, and long enough"), "not a complete safetensors"),
    "no delta": (lambda path: rewritten(path, kind="something"), "not a memory delta of version 1"),
    "of a later version": (lambda path: rewritten(path, version="2"), r"version '2'.*upgrade"),
    "digests that are not JSON": (lambda path: rewritten(path, digests="{"), "damaged header"),
    "of another base": (lambda path: rewritten(path, base_sha256="0" * 64), "has other rows or weights"),
    "rows too high": (
        lambda path: rewritten(path, lambda held: held[f"{NAME}.rows"].add_(10**6)),
        "not ascending and unique within",
    ),
    "rows below zero": (
        lambda path: rewritten(path, lambda held: held[f"{NAME}.rows"].sub_(10**6)),
        "not ascending and unique within",
    ),
    "rows twice": (
        lambda path: rewritten(path, lambda held: held[f"{NAME}.rows"].fill_(1)),
        "not ascending and unique within",
    ),
    "rows without values": (lambda path: rewritten(path, lambda held: held.pop(f"{NAME}.values")), "values' as noth"),
    "values without rows": (lambda path: rewritten(path, lambda held: held.pop(f"{NAME}.rows")), "damaged"),
    "fewer values": (
        lambda path: rewritten(path, lambda held: held.update({f"{NAME}.values": held[f"{NAME}.values"][1:].clone()})),
        "other sizes, or is damaged",
    ),
    "values in another type": (
        lambda path: rewritten(path, lambda held: held.update({f"{NAME}.values": held[f"{NAME}.values"].half()})),
        "other sizes, or is damaged",
    ),
    "no dense weights": (
        lambda path: rewritten(path, lambda held: held.pop("memory.layers.1.key_value.weight")),
        "key_value.weight' as nothing",
    ),
    "a tensor too many": (
        lambda path: rewritten(path, lambda held: held.update({"memory.tables.9.order2.0.rows": torch.zeros(1)})),
        "needs no such tensor",
    ),
}


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_refused_and_changes_nothing(damage, place, saved, tmp_path):
    model = loaded(saved, place)
    change(model)
    path = save_memory_delta(model, tmp_path)
    harm, message = DAMAGES[damage]
    harm(path)
    model = loaded(saved, place)
    before = change(model, seed=3)
    with pytest.raises(EngramFormatError, match=message):
        load_memory_delta(model, path)
    assert same(state(model), before)


@pytest.mark.parametrize("fails", ["save_file", "fsync", "replace"])
def test_a_full_disk_leaves_the_pack_that_was_there(fails, saved, tmp_path, monkeypatch):
    model = loaded(saved)
    expected = change(model)
    path = save_memory_delta(model, tmp_path)
    kept = path.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    change(model, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(deltas if fails == "save_file" else deltas.os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            save_memory_delta(model, tmp_path)
    assert path.read_bytes() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == [DELTA_NAME], "nothing half-written is left"
    assert same(state(load_memory_delta(loaded(saved), tmp_path)), expected)


def test_a_pack_says_where_it_comes_from(saved, tmp_path):
    model = loaded(saved)
    change(model)
    path = save_memory_delta(model, tmp_path / "mine.safetensors", note="what I read", tokens=12)
    header = read_delta_header(path)
    assert (header.provenance["note"], header.provenance["tokens"]) == ("what I read", 12)
    assert header.provenance["torch"] == torch.__version__
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["digests"]) == header.digests


@pytest.mark.parametrize("row", ["changed by the delta", "another"])
def test_a_base_that_differs_in_one_row_is_refused(row, saved, tmp_path, monkeypatch):
    """Saved from the same graft with the same dense weights: what training of tables alone leaves."""
    monkeypatch.setattr(deltas, "SAMPLED_ROWS", 2)  # the first row and the last one
    model = loaded(saved, "disk")
    name, part = next(iter(named_parts(model).items()))
    part.write(torch.tensor([7]), torch.ones(1, part.table_shape[1]))
    save_memory_delta(model, tmp_path / "delta")
    other = loaded(saved)
    with torch.no_grad():
        named_parts(other)[name][7 if row == "changed by the delta" else 0] += 1
    other.save_pretrained(tmp_path / "other")
    other = loaded(tmp_path / "other")
    before = state(other)
    with pytest.raises(EngramFormatError, match=r"has other rows or weights.*Load the delta's base"):
        load_memory_delta(other, tmp_path / "delta", base=tmp_path / "other")
    assert same(state(other), before)
    load_memory_delta(loaded(saved), tmp_path / "delta")  # control


def test_a_folder_with_a_pack_and_a_whole_checkpoint_is_refused(saved, tmp_path):
    folder = tmp_path / "graft"
    shutil.copytree(saved, folder)
    model = loaded(saved)
    change(model)
    with pytest.raises(ValueError, match="graft' holds a whole checkpoint.*name another folder"):
        save_memory_delta(model, folder)
    assert same(state(loaded(folder)), state(loaded(saved))), "control: nothing was written"
    shutil.copy(save_memory_delta(model, tmp_path / "delta"), folder)
    with pytest.raises(EngramFormatError, match="does not name the delta: they are of two saves"):
        loaded(folder)
    (folder / DELTA_NAME).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"engram_memory_delta": DELTA_NAME}))
    with pytest.raises(FileNotFoundError, match=f"{DELTA_NAME}, which is not there"):
        loaded(folder)


def test_two_saves_of_a_pack_into_one_folder_wait_for_each_other(saved, tmp_path, monkeypatch):
    model, written, go_on = loaded(saved), threading.Event(), threading.Event()
    change(model)
    problems = []

    def slowly(tensors, draft, metadata):
        save_file(tensors, draft, metadata)
        if threading.current_thread() is first:
            written.set()
            go_on.wait(10)

    def save():
        try:
            save_memory_delta(model, tmp_path)
        except OSError as error:
            problems.append(error)

    monkeypatch.setattr(deltas, "save_file", slowly)
    first, second = threading.Thread(target=save), threading.Thread(target=save)
    first.start()
    assert written.wait(10)
    second.start()
    second.join(0.2)
    go_on.set()
    first.join(10)
    second.join(10)
    assert not problems
    assert same(state(load_memory_delta(loaded(saved), tmp_path)), state(model))


# The Hub, as its client lays out files in the cache.


def publish(folder, cache, name: str, commit: str, branch: str = "main") -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)


@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_a_pack_on_the_hub_loads_with_the_commit_of_its_base(subfolder, saved, tmp_path):
    cache, old, new = tmp_path / "cache", "a" * 40, "b" * 40
    shutil.copytree(saved, tmp_path / "graft" / subfolder)
    publish(tmp_path / "graft", cache, "me/graft", old, branch="v1")
    where = {"cache_dir": cache, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained("me/graft", revision="v1", subfolder=subfolder, **where)
    model.set_trainable("tables")
    expected = change(model)
    # The branch moves on: the delta's base does not.
    moved_on = loaded(saved)
    change(moved_on, seed=5)
    moved_on.save_pretrained(tmp_path / "other" / subfolder)
    publish(tmp_path / "other", cache, "me/graft", new, branch="v1")
    save_changes(model, tmp_path / "trained")
    header = read_delta_header(tmp_path / "trained")
    assert (header.base, header.revision, header.subfolder) == ("me/graft", old, subfolder)
    publish(tmp_path / "trained", cache, "me/trained", new)
    for place in PLACES:
        again = AutoModelForCausalLM.from_pretrained("me/trained", engram_placement=place, **where)
        assert same(state(again), expected)
        assert (again.memory.placement, again.config.engram_trainable) == (place, "tables")
    save_changes(again, tmp_path / "next")
    assert read_delta_header(tmp_path / "next").revision == old, "what is trained on has the same base"
    other = AutoModelForCausalLM.from_pretrained("me/graft", revision="v1", subfolder=subfolder, **where)
    with pytest.raises(EngramFormatError, match=rf"'me/graft' \(revision {old}\).*revision='{old}'"):
        load_memory_delta(other, tmp_path / "trained")
