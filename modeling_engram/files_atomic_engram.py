"""Saves: what a folder holds, and how its files are replaced: whole or not at all, whenever a process dies.

What it chooses: `config.json` says what the weights of a folder are. With `engram_memory_delta` they are those of
another checkpoint and a memory delta; without, they are in the files that the index names. A save removes what an
earlier one left that would be read with it, adapters included.
A draft is written and flushed in a folder inside the checkpoint's (`.saving-*`), then marked complete, then moved file
by file. What a killed process leaves is settled by whoever saves or reads next: a draft that is marked is moved on from
where that stopped, one that is not is removed. The first file to be moved is the configuration: until then the old
checkpoint is whole and is read, from then on the new one is.
Promises: a save that runs is not disturbed by another one (it waits), nor by a reader; a reader gets the old checkpoint
or the new one, or an error. Never removes a finished draft, nor a file of another name than saves give.
Source: docs/format.md.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import logging

from .configuration_engram import EngramFormatError


try:
    import fcntl
except ImportError:  # Windows: saves are not kept apart there
    fcntl = None


logger = logging.get_logger(__name__)

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
DELTA_NAME = "memory_delta.safetensors"
OLD_DELTA_NAME = "memory_pack.safetensors"  # before 0.1; still read
# Says in `config.json`, or in an adapter's settings, that the folder's delta belongs to it, by the delta's file name.
DELTA_KEY = "engram_memory_delta"
OLD_DELTA_KEY = "engram_memory_pack"
# PEFT's. Transformers puts an adapter that lies in a checkpoint's folder on top of the checkpoint.
ADAPTER_NAME = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_NAME, "adapter_model.safetensors", "adapter_model.bin")

SAVING_PREFIX = ".saving-"
# In a draft: the names of its files, written when all of them are on the disk.
COMPLETE_NAME = ".complete.json"

# How often a folder is read before an error says that it is being saved, and how long moves of files are waited for.
TRIES = 4
SECONDS_TO_WAIT = 10.0


def checkpoint_in(folder: Path) -> str | None:
    """What a folder's own weights are, as its `config.json` says; an adapter beside them does not count.

    Args:
        folder (`Path`): a local folder.

    Returns:
        `str`: "delta" (those of another checkpoint, and a memory delta), "whole", or None for no Engram checkpoint.

    Raises:
        `FileNotFoundError`: if the delta is not there.
        [`EngramFormatError`]: if there is a delta, or an index, that does not fit what is said.
    """
    finish_saves(folder)
    said, has_index, has_delta = (
        named_delta(folder / CONFIG_NAME),
        (folder / INDEX_NAME).is_file(),
        _has_own_delta(folder),
    )
    if said and delta_file(folder) is None:
        raise FileNotFoundError(
            f"'{folder / CONFIG_NAME}' says that the memory is in {DELTA_NAME}, which is not there: copy it again."
        )
    if has_index and (said or has_delta):
        raise EngramFormatError(
            f"'{folder}' holds a whole checkpoint ({INDEX_NAME}) and a delta ({DELTA_NAME}), and its config.json "
            f"{'names' if said else 'does not name'} the delta: they are of two saves. If the delta is what you want, "
            "move it into another folder and call model.load_memory_delta(path) on a model of its base; if the "
            f"checkpoint is, delete {DELTA_NAME}{f' and {DELTA_KEY} in config.json' if said else ''}."
        )
    if has_index:
        return "whole"
    # Before `config.json` said it, a delta without an index was the sign.
    return "delta" if said or (has_delta and (folder / CONFIG_NAME).is_file()) else None


def named_delta(settings: Path) -> bool:
    """Whether a `config.json`, or an adapter's settings, says that a memory delta belongs to it."""
    try:
        said = json.loads(settings.read_text(encoding="utf-8"))
        return any(said.get(key) is not None for key in (DELTA_KEY, OLD_DELTA_KEY))
    except (OSError, ValueError, AttributeError):  # not there, or not ours: whoever reads the rest of it says so
        return False


def delta_file(folder: Path) -> Path | None:
    """A folder's delta, by its name of today or the one of before; None if there is none."""
    return next((folder / name for name in (DELTA_NAME, OLD_DELTA_NAME) if (folder / name).is_file()), None)


def _has_own_delta(folder: Path) -> bool:
    """Whether a folder has a delta that is not an adapter's."""
    return delta_file(folder) is not None and not named_delta(folder / ADAPTER_NAME)


def _is_own(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder is read as a part of it."""
    return name in (DELTA_NAME, OLD_DELTA_NAME, *ADAPTER_FILES) or WEIGHT_FILE.fullmatch(name) is not None


def remove_checkpoint(folder: Path) -> None:
    """Removes the configuration, indexes, weights, delta and adapter of a checkpoint; what is not ours stays."""
    with locked(folder):
        for name in (CONFIG_NAME, *INDEX_NAMES):
            (folder / name).unlink(missing_ok=True)
        for path in folder.iterdir():
            if _is_own(path.name):
                path.unlink()


# What systems and file systems answer that do not flush folders.
NOT_FLUSHED = (errno.EACCES, errno.EBADF, errno.EINVAL)


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
            finish_draft(left, folder)
        draft = Path(tempfile.mkdtemp(prefix=SAVING_PREFIX, dir=folder))
        try:
            yield draft
            mark_complete(draft)
        except BaseException:
            discard(draft)
            raise
        finish_draft(draft, folder)


def finish_saves(folder: Path) -> None:
    """Finishes saves that died while their files were moved, before the folder is read.

    Nothing is done where the old checkpoint is still whole, where a save is running, or where nothing can be written.
    """
    drafts = list(folder.glob(f"{SAVING_PREFIX}*/{COMPLETE_NAME}"))
    if not drafts:
        return
    with suppress(OSError), locked(folder, wait=False):
        for marker in drafts:
            if _is_begun(marker, folder) and marker.exists():
                finish_draft(marker.parent, folder)


def _is_begun(marker: Path, folder: Path) -> bool:
    """Whether files of a complete draft may have been moved already, so that the old checkpoint is not whole."""
    return not (marker.parent / CONFIG_NAME).exists() or not (folder / CONFIG_NAME).exists()


def read_undisturbed(folder: Path, read: Callable):
    """What `read()` returns, called again if a save moved files of the folder meanwhile.

    Args:
        folder (`Path`): a checkpoint's folder.
        read (callable): reads it.

    Raises:
        `BlockingIOError`: if the folder was saved again and again.
    """
    problem = None
    for _ in range(TRIES):
        before = _wait_for_moves(folder)
        try:
            found = read()
        except Exception as error:
            if identity(folder) == before:
                raise
            problem = error
        else:
            if identity(folder) == before:
                return found
    raise BlockingIOError(
        errno.EAGAIN,
        "a save into this folder is under way, and was at each of several tries: load it again",
        str(folder),
    ) from problem


def _wait_for_moves(folder: Path) -> tuple | None:
    """Waits until no save is moving files, for some seconds; the `identity` of what is there then."""
    end = time.monotonic() + SECONDS_TO_WAIT
    while True:
        finish_saves(folder)
        seen = identity(folder)
        moving = any(_is_begun(marker, folder) for marker in folder.glob(f"{SAVING_PREFIX}*/{COMPLETE_NAME}"))
        if not moving or time.monotonic() > end:
            return seen
        time.sleep(0.01)


def identity(folder: Path) -> tuple | None:
    """What is another after each save: its configuration is a new file, and the first that is moved."""
    try:
        status = (folder / CONFIG_NAME).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


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


def finish_draft(draft: Path, folder: Path) -> None:
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
    files = _draft_files(draft)
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
    left = _draft_files(draft)
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
        if _is_own(path.name) and path.name not in fresh:
            path.unlink()
            if path.name == ADAPTER_NAME:
                logger.warning(f"removed an older adapter from '{folder}': it would be put on top of what is saved.")
    flush(folder)
    for name in sorted(left, key=lambda name: (name in INDEX_NAMES, name)):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(left[name], folder / name)
    for place in {(folder / name).parent for name in left} | {folder}:
        flush(place)


def _draft_files(draft: Path) -> dict[str, Path]:
    """The files of a draft by their names in the checkpoint's folder."""
    files = (path for path in draft.rglob("*") if path.is_file() and path.parent.joinpath(COMPLETE_NAME) != path)
    return {path.relative_to(draft).as_posix(): path for path in files}


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    is_folder = path.is_dir()
    try:
        # Windows flushes what can be written to alone, and does not open folders.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (is_folder and error.errno in NOT_FLUSHED):
            raise
