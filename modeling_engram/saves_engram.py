"""Saves: a checkpoint's files are replaced whole or not at all, whenever a process dies.

What it chooses: a draft is written and flushed in a folder inside the checkpoint's (`.saving-*`), then marked complete,
then moved file by file. What a killed process leaves is settled by whoever saves or reads next: a draft that is marked
is moved on from where that stopped, one that is not is removed. The first file to be moved is the configuration: until
then the old checkpoint is whole and is read, from then on the new one is.
Promises: a save that runs is not disturbed by another one (it waits), nor by a reader. Never removes a finished draft.
Source: docs/format.md.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows: saves are not kept apart there
    fcntl = None


INDEX_NAME = "model.safetensors.index.json"
# The same without the tables: what is loaded when they stay in their files. Its file names count from the checkpoint's
# folder. In a folder of its own, because accelerate refuses a folder with two indexes.
WITHOUT_TABLES_NAME = "without_tables/model.safetensors.index.json"
INDEX_NAMES = (INDEX_NAME, WITHOUT_TABLES_NAME)
CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
MODEL_STEM = "model"
MEMORY_STEM = "engram-memory"
WEIGHT_FILE = re.compile(rf"{SINGLE_NAME}|({MODEL_STEM}|{MEMORY_STEM})-\d{{5}}-of-\d{{5}}\.safetensors")

SAVING_PREFIX = ".saving-"
# In a draft: the names of its files, written when all of them are on the disk.
COMPLETE_NAME = ".complete.json"


@contextmanager
def whole_save(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files replace a checkpoint's when the block ends well, and vanish when it does not.

    A save that fails while files are moved is finished by the next one, or by whoever reads the folder.

    Args:
        folder (`Path`): the checkpoint's folder, made if needed.

    Yields:
        `Path`: an empty folder on the same file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for left in folder.glob(f"{SAVING_PREFIX}*"):
            settle(left, folder)
        draft = Path(tempfile.mkdtemp(prefix=SAVING_PREFIX, dir=folder))
        try:
            yield draft
            mark_complete(draft)
        except BaseException:
            discard(draft)
            raise
        settle(draft, folder)


def finish_saves(folder: Path) -> None:
    """Finishes saves that died while their files were moved, before the folder is read.

    Nothing is done where the old checkpoint is still whole, where a save is running, or where nothing can be written.
    """
    drafts = list(folder.glob(f"{SAVING_PREFIX}*/{COMPLETE_NAME}"))
    if not drafts:
        return
    with suppress(OSError), locked(folder, wait=False):
        for marker in drafts:
            begun = not (marker.parent / CONFIG_NAME).exists() or not (folder / INDEX_NAME).exists()
            if begun and marker.exists():
                settle(marker.parent, folder)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keeps saves into one folder apart; the system lets go of a dead process's lock.

    Raises:
        `BlockingIOError`: if another process or thread has it, and nobody is to wait.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def settle(draft: Path, folder: Path) -> None:
    """Moves a draft that is complete into place, from wherever that stopped, and removes one that is not."""
    if (draft / COMPLETE_NAME).is_file():
        publish(draft, folder)
    discard(draft)


def discard(draft: Path) -> None:
    """Removes a draft; its mark first, because half of it must never be taken for the whole."""
    with suppress(OSError):
        (draft / COMPLETE_NAME).unlink(missing_ok=True)
        shutil.rmtree(draft, ignore_errors=True)


def mark_complete(draft: Path) -> None:
    """Flushes a draft to the disk, then says that it is whole."""
    files = draft_files(draft)
    for path in files.values():
        flush(path)
    for place in {path.parent for path in files.values()} | {draft}:
        flush(place)
    unfinished = draft / f"{COMPLETE_NAME}.unfinished"
    unfinished.write_text(json.dumps({"files": sorted(files)}) + "\n", encoding="utf-8")
    flush(unfinished)
    os.replace(unfinished, draft / COMPLETE_NAME)
    flush(draft)


def publish(draft: Path, folder: Path) -> None:
    """Moves a complete draft's files into place, or those that are left of them.

    The configuration goes first (see above), then the old indexes, without which a folder does not load; the new ones
    come last.
    """
    left = draft_files(draft)
    if not left:
        return
    fresh = set(json.loads((draft / COMPLETE_NAME).read_text(encoding="utf-8"))["files"])
    if CONFIG_NAME in left:
        os.replace(left.pop(CONFIG_NAME), folder / CONFIG_NAME)
        flush(folder)
    for name in INDEX_NAMES:
        if name in left or name not in fresh:
            (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if WEIGHT_FILE.fullmatch(path.name) and path.name not in fresh:
            path.unlink()
    flush(folder)
    for name in sorted(left, key=lambda name: (name in INDEX_NAMES, name)):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(left[name], folder / name)
    for place in {(folder / name).parent for name in left} | {folder}:
        flush(place)


def draft_files(draft: Path) -> dict[str, Path]:
    """The files of a draft by their names in the checkpoint's folder."""
    files = (path for path in draft.rglob("*") if path.is_file() and path.parent.joinpath(COMPLETE_NAME) != path)
    return {path.relative_to(draft).as_posix(): path for path in files}


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
