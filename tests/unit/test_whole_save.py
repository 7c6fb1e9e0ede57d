"""Saves: a checkpoint is replaced whole or stays as it was, at whatever operation on a file a process dies.

The control of every death is one operation later: sooner or later the save runs through and the new files are there.
Run: pytest tests/unit/test_whole_save.py
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest

from engram_transformers import files_atomic_engram
from engram_transformers.files_atomic_engram import (
    ADAPTER_FILES,
    COMPLETE_NAME,
    CONFIG_NAME,
    DELTA_NAME,
    INDEX_NAME,
    INDEX_NAMES,
    SAVING_PREFIX,
    SINGLE_NAME,
    WITHOUT_TABLES_NAME,
    checkpoint_in,
    finish_saves,
    read_undisturbed,
    remove_checkpoint,
    whole_save,
)
from engram_transformers.files_safetensors_engram import read_index, shard_name

from ..deaths import dies_at
from ..faults import Child, soon


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drafts(folder) -> list[Path]:
    return list(folder.glob(f"{SAVING_PREFIX}*"))


def write(draft, count: int, value: bytes) -> None:
    """`count` shards, configuration and indexes."""
    names = [shard_name("engram-memory", i, count) for i in range(1, count + 1)]
    (draft / "without_tables").mkdir()
    for name in [*names, *INDEX_NAMES, CONFIG_NAME, "generation_config.json"]:
        (draft / name).write_bytes(value)


def save(folder, count: int, value: bytes = b"new") -> None:
    with whole_save(folder) as draft:
        write(draft, count, value)


def expected(count: int, value: bytes) -> dict[str, bytes]:
    names = [shard_name("engram-memory", i, count) for i in range(1, count + 1)]
    return dict.fromkeys([*names, *INDEX_NAMES, CONFIG_NAME, "generation_config.json"], value)


def read(folder) -> dict[str, bytes]:
    """The checkpoint as a reader finds it, drafts left out."""
    finish_saves(folder)
    return {name: data for name, data in contents(folder).items() if not name.startswith(SAVING_PREFIX)}


@pytest.fixture
def unflushed(monkeypatch):
    """Nothing waits for the disk: a process that is killed loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_save_replaces_a_checkpoint_and_leaves_no_stale_shard(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    save(folder, 3, b"old")
    (folder / shard_name("model", 1, 2)).write_bytes(b"stale")
    (folder / SINGLE_NAME).write_bytes(b"stale")
    (folder / "README.md").write_bytes(b"mine")
    (folder / "adapter.safetensors").write_bytes(b"mine")
    save(folder, 2)
    mine = dict.fromkeys(["README.md", "adapter.safetensors"], b"mine")
    assert contents(folder) == expected(2, b"new") | mine
    assert not drafts(folder)


def test_an_index_that_the_new_save_has_not_goes(tmp_path):
    save(tmp_path, 2, b"old")
    with whole_save(tmp_path) as draft:
        (draft / INDEX_NAME).write_bytes(b"new")
    assert not (tmp_path / WITHOUT_TABLES_NAME).exists()
    assert (tmp_path / INDEX_NAME).read_bytes() == b"new"


def test_an_interrupted_save_leaves_the_old_checkpoint_as_it_was(tmp_path):
    save(tmp_path, 2, b"old")
    before = contents(tmp_path)

    class Interrupted(BaseException):
        """Stands for Ctrl-C, a full disk, a killed job."""

    with pytest.raises(Interrupted), whole_save(tmp_path) as draft:
        (draft / shard_name("engram-memory", 1, 1)).write_bytes(b"half")
        assert draft.parent == tmp_path  # so that moving it costs nothing
        raise Interrupted
    assert contents(tmp_path) == before
    assert not drafts(tmp_path)


def test_a_disk_that_is_full_when_the_draft_is_flushed_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 2, b"old")
    before = contents(tmp_path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert contents(tmp_path) == before
    assert not drafts(tmp_path)


def test_a_system_that_flushes_no_folder_and_nothing_opened_for_reading_saves(tmp_path, monkeypatch):
    """Windows: `os.fsync` needs a handle that may write, and there is none of a folder."""
    real, flushed = os.fsync, []

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 2)
    assert read(tmp_path) == expected(2, b"new")
    assert flushed


@pytest.mark.usefixtures("unflushed")
def test_a_process_killed_at_any_operation_of_a_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    old, new, third = expected(3, b"old"), expected(2, b"new"), expected(1, b"third")
    found, place, killed = [], 0, True
    while killed:
        folder = tmp_path / str(place)
        save(folder, 3, b"old")
        killed = dies_at(place, lambda folder=folder: save(folder, 2))
        seen = read(folder)
        assert seen in (old, new), place
        found.append(seen == new)
        save(folder, 1, b"third")
        assert contents(folder) == third, place
        place += 1
    assert found == sorted(found)  # once the new one is there, it stays
    assert not found[0] and found[-1] and 0 < found.index(True) < place - 10
    assert place > 30


@pytest.mark.usefixtures("unflushed")
def test_a_process_killed_while_it_finishes_a_dead_save_leaves_the_new_checkpoint(tmp_path):
    folder, new = tmp_path / "folder", expected(2, b"new")
    save(folder, 3, b"old")
    place = 0
    while True:  # until the configuration has been moved and no more
        shutil.copytree(folder, tmp_path / "half", dirs_exist_ok=True)
        dies_at(place, lambda: save(tmp_path / "half", 2))
        if (tmp_path / "half" / CONFIG_NAME).read_bytes() == b"new":
            break
        shutil.rmtree(tmp_path / "half")
        place += 1
    place, killed = 0, True
    while killed:
        again = tmp_path / str(place)
        shutil.copytree(tmp_path / "half", again)
        action = finish_saves if place % 2 else partial(save, count=2)  # by a reader, and by the next save
        killed = dies_at(place, lambda again=again, action=action: action(again))
        assert read(again) == new, place
        save(again, 3, b"old")
        assert contents(again) == expected(3, b"old")
        place += 1
    assert place > 10


@pytest.mark.usefixtures("unflushed")
def test_a_process_killed_while_it_removes_a_complete_draft_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    place, killed = 0, True
    while killed:
        folder, draft = tmp_path / str(place), tmp_path / str(place) / f"{SAVING_PREFIX}interrupted"
        save(folder, 3, b"old")
        draft.mkdir()
        write(draft, 2, b"new")
        files_atomic_engram.mark_complete(draft)
        killed = dies_at(place, lambda draft=draft: files_atomic_engram.discard(draft))
        with whole_save(folder) as other:
            left = {name: data for name, data in contents(folder).items() if not name.startswith(SAVING_PREFIX)}
            assert left in (expected(3, b"old"), expected(2, b"new")), place
            write(other, 1, b"third")
        assert contents(folder) == expected(1, b"third")
        place += 1
    assert place > 5


@pytest.mark.parametrize("moves", [0, 1, 3, 5])
def test_a_save_that_fails_while_files_move_is_finished_by_the_next_reader(moves, tmp_path, monkeypatch):
    save(tmp_path, 2, b"old")
    moved, replace = [], os.replace

    def fail_after_some(source, target):
        if Path(target).name != COMPLETE_NAME:
            if len(moved) == moves:
                raise OSError("disk gone")
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_after_some)
    with pytest.raises(OSError, match="disk gone"):
        save(tmp_path, 2)
    assert len(drafts(tmp_path)) == 1  # a finished draft is never removed
    finish_saves(tmp_path)  # fails again, without a word: what is left is up to the reader's own checks
    monkeypatch.undo()
    assert read(tmp_path) == expected(2, b"new" if moves else b"old")
    save(tmp_path, 1, b"third")
    assert contents(tmp_path) == expected(1, b"third")


@pytest.mark.parametrize("asks", ["the index", "what the folder holds"])
def test_who_reads_a_folder_finishes_a_save(asks, tmp_path):
    save(tmp_path, 2, b"old")
    draft = tmp_path / f"{SAVING_PREFIX}dead"
    draft.mkdir()
    write(draft, 1, b"new")
    (draft / INDEX_NAME).write_text(json.dumps({"weight_map": {"memory": "engram-memory-00001-of-00001.safetensors"}}))
    files_atomic_engram.mark_complete(draft)
    os.replace(draft / CONFIG_NAME, tmp_path / CONFIG_NAME)
    if asks == "the index":
        assert list(read_index(tmp_path)) == ["memory"]
    else:
        assert checkpoint_in(tmp_path) == "whole"
    assert not drafts(tmp_path)


def test_the_configuration_is_moved_first_and_the_index_last(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: (order.append(Path(target).name), replace(source, target))
    )
    save(tmp_path, 2)
    assert order[:2] == [COMPLETE_NAME, CONFIG_NAME]
    assert order[-2:] == [Path(name).name for name in INDEX_NAMES]
    assert len(order) == 1 + 6


def test_what_a_save_killed_while_it_wrote_left_behind_is_cleared(tmp_path):
    stale = tmp_path / f"{SAVING_PREFIX}killed"
    stale.mkdir()
    (stale / CONFIG_NAME).write_bytes(b"x")
    finish_saves(tmp_path)
    assert stale.exists()  # a reader leaves it alone
    save(tmp_path, 1)
    assert contents(tmp_path) == expected(1, b"new")


@pytest.mark.skipif(files_atomic_engram.fcntl is None, reason="this system has no locks of the kind that saves use")
def test_a_running_save_is_left_alone_by_readers_and_waited_for_by_other_saves(tmp_path):
    save(tmp_path, 3, b"old")
    ready, go_on = os.pipe(), os.pipe()

    def slowly() -> None:
        with whole_save(tmp_path) as draft:
            write(draft, 2, b"slow")
            files_atomic_engram.mark_complete(draft)  # as if it were in the middle of its moves
            os.replace(draft / CONFIG_NAME, tmp_path / CONFIG_NAME)
            os.write(ready[1], b"x")
            os.read(go_on[0], 1)
            os.replace(tmp_path / CONFIG_NAME, draft / CONFIG_NAME)

    child, other = Child(slowly), threading.Thread(target=save, args=(tmp_path, 1, b"third"))
    try:
        os.read(ready[0], 1)
        finish_saves(tmp_path)
        assert len(drafts(tmp_path)) == 1
        assert len(contents(drafts(tmp_path)[0])) == 6  # five files and the mark
        other.start()
        assert not soon(lambda: not other.is_alive(), seconds=0.2)
        assert len(drafts(tmp_path)) == 1
    finally:
        os.write(go_on[1], b"x")  # or the child would wait for good
    child.result()
    other.join(10)
    assert contents(tmp_path) == expected(1, b"third")


@pytest.mark.skipif(files_atomic_engram.fcntl is None, reason="this system has no locks of the kind that saves use")
def test_a_file_system_without_locks_is_saved_to(tmp_path, monkeypatch):
    def unknown(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files_atomic_engram.fcntl, "flock", unknown)
    save(tmp_path, 2, b"old")
    monkeypatch.setattr(files_atomic_engram, "fcntl", None)  # a system that knows none
    save(tmp_path, 1)
    assert contents(tmp_path) == expected(1, b"new")


def test_a_save_leaves_a_folder_as_if_it_had_been_empty_of_saves(tmp_path):
    for name in (DELTA_NAME, *ADAPTER_FILES, SINGLE_NAME, "notes.txt", "optimizer.safetensors"):
        (tmp_path / name).write_bytes(b"old")
    save(tmp_path, 1)
    assert contents(tmp_path) == expected(1, b"new") | {"notes.txt": b"old", "optimizer.safetensors": b"old"}
    remove_checkpoint(tmp_path)
    assert set(contents(tmp_path)) == {"generation_config.json", "notes.txt", "optimizer.safetensors"}


@pytest.mark.parametrize("raises", [True, False])
def test_a_reader_that_a_save_disturbed_reads_again(raises, tmp_path):
    save(tmp_path, 1, b"old")
    seen = []

    def read_configuration():
        found = (tmp_path / CONFIG_NAME).read_bytes()
        seen.append(found)
        if len(seen) == 1:
            save(tmp_path, 2)
            if raises:
                raise FileNotFoundError("a shard")
        return found

    assert read_undisturbed(tmp_path, read_configuration) == b"new"
    assert seen == [b"old", b"new"]


def test_a_reader_raises_its_own_error_and_one_that_is_always_disturbed_says_so(tmp_path):
    save(tmp_path, 1)

    def missing():
        raise FileNotFoundError("a shard")

    with pytest.raises(FileNotFoundError, match="a shard"):
        read_undisturbed(tmp_path, missing)
    with pytest.raises(BlockingIOError, match="a save into this folder is under way"):
        read_undisturbed(tmp_path, lambda: save(tmp_path, 1))
