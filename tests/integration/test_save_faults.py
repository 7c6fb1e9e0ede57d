"""Saves of a memory whose rows are read from files or host memory: byte for byte the original's, also over those files.

Proves that a save that fails (a full disk, Ctrl-C, a file that cannot be moved, a process that is killed) leaves the
loaded model reading right rows, and a folder that holds the old checkpoint or the new one, whole.

Run: pytest tests/integration/test_save_faults.py
"""

import errno
import os
import resource
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from engram_transformers import EngramFormatError, files_safetensors_engram
from engram_transformers.files_atomic_engram import SAVING_PREFIX
from engram_transformers.rows_accelerate_engram import rows_hook

from ..deaths import dies_at, operations
from ..faults import Child, ctrl_c_heard, logits, placed_at, plain, shard_of
from ..tiny import fill_memory


placed = pytest.mark.parametrize("placement", ["disk", "cpu"])


@pytest.fixture
def ids():
    """560 reads of each order: too many to be read without a thread."""
    return torch.randint(3, 4000, (4, 70))


@pytest.fixture
def expected(original, ids):
    return logits(original, ids)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@placed
def test_state_dict_and_saves_are_the_originals_byte_for_byte(placement, folder, original, ids, expected, tmp_path):
    model = placed_at(placement, folder)
    state, wanted = model.state_dict(), original.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    model.save_pretrained(tmp_path / "again")
    before, after = contents(folder), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(after[name] == data for name, data in before.items() if name.endswith((".safetensors", "index.json")))
    shutil.rmtree(tmp_path / "again")
    assert torch.equal(logits(model, ids), expected), "rows are still read from where the model came from"


@placed
def test_a_save_over_the_files_that_rows_are_read_from_goes_on_with_the_new_ones(placement, folder, ids, expected):
    model = placed_at(placement, folder).place_memory(placement, verify=True, prefetch=False)
    before = contents(folder)
    for _ in range(2):
        model.save_pretrained(folder)
        assert torch.equal(logits(model, ids), expected)
        hook = rows_hook(model.memory.tables["1"].order2)
        assert (hook.verify, hook.prefetch, hook.store.kind) == (True, False, placement)
    assert {name: data for name, data in contents(folder).items() if "safetensors" in name} == {
        name: data for name, data in before.items() if "safetensors" in name
    }
    if placement == "disk":
        os.truncate(shard_of(folder), 4096)
        with pytest.raises(EngramFormatError, match="changed"):
            logits(model, ids)  # it reads the new file, not one that is kept for it alone


def out_of_space(after: int):
    """`write_data` on a disk that is full after some tensors."""
    real, left = files_safetensors_engram.write_data, [after]

    def write(file, tensor):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(file, tensor)

    return write


@placed
@pytest.mark.parametrize("fault", ["limit", "first table", "last table", "ctrl-c"])
def test_a_save_that_fails_leaves_model_and_folder_as_they_were(fault, placement, folder, ids, expected, monkeypatch):
    model, before = placed_at(placement, folder), contents(folder)

    def fail():
        if fault == "limit":  # of the kernel: no file may be longer
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif fault == "ctrl-c":
            monkeypatch.setattr(
                files_safetensors_engram, "write_data", lambda *given: signal.raise_signal(signal.SIGINT)
            )
        else:
            monkeypatch.setattr(
                files_safetensors_engram, "write_data", out_of_space(0 if fault == "first table" else 3)
            )
        with ctrl_c_heard(), pytest.raises(BaseException, match="File too large|No space left|^$"):
            model.save_pretrained(folder)
        return torch.equal(logits(model, ids), expected)

    assert Child(fail).result()
    assert contents(folder) == before
    assert fault == "limit" or fail()  # a limit would hold for the whole process
    assert contents(folder) == before
    monkeypatch.undo()
    assert torch.equal(logits(placed_at(placement, folder), ids), expected)
    model.save_pretrained(folder)
    assert torch.equal(logits(model, ids), expected)


@placed
@pytest.mark.parametrize("moves", [0, 1, 4])
def test_a_save_that_fails_while_files_are_moved_leaves_the_model_right(
    moves, placement, folder, ids, expected, monkeypatch
):
    model, real, left = placed_at(placement, folder), os.replace, [moves]

    def fail(*paths):
        if not left[0]:
            raise OSError(errno.EIO, "Input/output error")
        left[0] -= 1
        real(*paths)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(logits(model, ids), expected)
    assert len(list(folder.glob(f"{SAVING_PREFIX}*"))) == (moves > 0)  # the first one says that the draft is complete
    assert torch.equal(logits(placed_at(placement, folder), ids), expected)
    assert torch.equal(logits(model, ids), expected)  # also when another process has finished the moves
    model.save_pretrained(folder)
    assert not list(folder.glob(f"{SAVING_PREFIX}*"))
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(placed_at(placement, folder), ids), expected)


def test_a_process_killed_while_it_saves_leaves_the_old_model_or_the_new_one(folder, ids, expected, tmp_path):
    other = fill_memory(placed_at("device", folder), seed=1)
    changed = logits(other, ids)
    assert not torch.equal(changed, expected)
    other.save_pretrained(tmp_path / "new")
    states = {"old": contents(folder), "new": contents(tmp_path / "new")}
    most = operations(lambda: other.save_pretrained(tmp_path / "counted"))
    found = []
    for place in sorted({0, most // 2, *range(max(0, most - 60), most + 6, 6)}):
        again = tmp_path / str(place)
        shutil.copytree(folder, again)
        dies_at(place, lambda again=again: other.save_pretrained(again))
        model = AutoModelForCausalLM.from_pretrained(again)
        found.append("new" if torch.equal(logits(model, ids), changed) else "old")
        assert found[-1] == "new" or torch.equal(logits(model, ids), expected)
        files = {name: data for name, data in contents(again).items() if not name.startswith(SAVING_PREFIX)}
        assert files == states[found[-1]], place
        model.save_pretrained(again)
        assert not list(again.glob(f"{SAVING_PREFIX}*"))
    assert found[0] == "old" and found[-1] == "new" and found == sorted(found, reverse=True)
    assert found.count("new") > 2


def test_other_rows_that_are_saved_over_the_own_files_are_not_the_models(folder, ids, expected, original):
    model = placed_at("disk", folder)
    state = {name: torch.zeros_like(t) if "tables" in name else t for name, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(placed_at("disk", folder), ids), plain(original, ids))


def test_rows_that_another_model_saved_here_since_are_not_taken_for_the_own(folder, ids, expected):
    model = placed_at("cpu", folder)
    model.save_pretrained(folder)
    other = fill_memory(placed_at("device", folder), seed=1)
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="differs from its file"):
        model.place_memory("disk")
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(placed_at("disk", folder), ids), logits(other, ids))
