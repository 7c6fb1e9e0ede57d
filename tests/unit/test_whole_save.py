"""Saves: a checkpoint is replaced whole or stays as it was, and nothing of a dead save is left.

Run with `pytest tests/unit/test_whole_save.py`.
"""

import os

import pytest

from engram_transformers import shards_engram
from engram_transformers.shards_engram import (
    INDEX_NAME,
    SAVING_PREFIX,
    SINGLE_NAME,
    read_index,
    shard_name,
    whole_save,
)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(folder, count: int, value: bytes = b"new") -> None:
    """A save of `count` shards, an index and a config."""
    with whole_save(folder) as draft:
        for i in range(1, count + 1):
            (draft / shard_name("engram-memory", i, count)).write_bytes(value)
        (draft / INDEX_NAME).write_bytes(value)
        (draft / "config.json").write_bytes(value)


def test_a_save_replaces_a_checkpoint_and_leaves_no_stale_shard(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    save(folder, 3, b"old")
    (folder / shard_name("model", 1, 2)).write_bytes(b"stale")
    (folder / SINGLE_NAME).write_bytes(b"stale")
    (folder / "README.md").write_bytes(b"mine")
    (folder / "adapter.safetensors").write_bytes(b"mine")
    save(folder, 2)
    names = [shard_name("engram-memory", i, 2) for i in (1, 2)]
    assert contents(folder) == {
        **dict.fromkeys([*names, INDEX_NAME, "config.json"], b"new"),
        **dict.fromkeys(["README.md", "adapter.safetensors"], b"mine"),
    }


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
    assert not list(tmp_path.glob(f"{SAVING_PREFIX}*"))


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_save_interrupted_while_files_move_leaves_a_folder_that_does_not_load(moves, tmp_path, monkeypatch):
    save(tmp_path, 2, b"old")
    moved, replace = [], os.replace

    def fail_after_some(source, target):
        if len(moved) == moves:
            raise OSError("disk full")
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(shards_engram.os, "replace", fail_after_some)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        read_index(tmp_path)
    assert not list(tmp_path.glob(f"{SAVING_PREFIX}*"))
    save(tmp_path, 2)
    assert set(contents(tmp_path).values()) == {b"new"}


def test_the_index_is_moved_last(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(
        shards_engram.os, "replace", lambda source, target: (order.append(target.name), replace(source, target))
    )
    save(tmp_path, 2)
    assert order[-1] == INDEX_NAME
    assert len(order) == 4


def test_what_a_killed_save_left_behind_is_cleared(tmp_path):
    stale = tmp_path / f"{SAVING_PREFIX}killed"
    stale.mkdir()
    (stale / "half").write_bytes(b"x")
    save(tmp_path, 1)
    assert not stale.exists()
    assert (tmp_path / INDEX_NAME).exists()
