"""Atomic saves: a folder's checkpoint is replaced whole or not at all, whenever a process dies.

What it chooses: `config.json` says what the weights of a folder are: with `engram_memory_delta`, another checkpoint's
and a memory delta; without, those in the files of the index. A save removes files of an earlier one that would be read
with it, adapters included. A draft is written and flushed in a subfolder (`.saving-*`), marked complete, then moved
file by file, `config.json` first: until then the old checkpoint is whole and is read, from then on the new one is.
Whoever saves or reads next finishes the moves of a complete draft and removes an incomplete one.
Promises: a running save is not disturbed by another one (which waits) or by a reader; a reader gets the old checkpoint,
the new one, or an error. Never removes a complete draft, nor a file whose name a save does not use.
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
# Index without the tables, for loading when they stay in their files; paths are relative to the checkpoint's folder. It
# has its own folder because accelerate refuses a folder with two indexes.
WITHOUT_TABLES_NAME = "without_tables/model.safetensors.index.json"
INDEX_NAMES = (INDEX_NAME, WITHOUT_TABLES_NAME)
CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
MODEL_STEM = "model"
MEMORY_STEM = "engram-memory"
WEIGHT_FILE = re.compile(rf"{SINGLE_NAME}|({MODEL_STEM}|{MEMORY_STEM})-\d{{5}}-of-\d{{5}}\.safetensors")
DELTA_NAME = "memory_delta.safetensors"
OLD_DELTA_NAME = "memory_pack.safetensors"  # before 0.1; still read
# Key in `config.json`, or in an adapter's settings, that names the folder's delta.
DELTA_KEY = "engram_memory_delta"
OLD_DELTA_KEY = "engram_memory_pack"
# PEFT's files. Transformers applies an adapter in a checkpoint's folder to the checkpoint.
ADAPTER_NAME = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_NAME, "adapter_model.safetensors", "adapter_model.bin")

SAVING_PREFIX = ".saving-"
# Lists the files of a draft; written when all of them are on disk.
COMPLETE_NAME = ".complete.json"

# How often a folder is read before an error is raised, and how long to wait for moves of files.
TRIES = 4
SECONDS_TO_WAIT = 10.0


def checkpoint_in(folder: Path) -> str | None:
    """Returns what a folder's own weights are, as its `config.json` says; an adapter does not count.

    "delta" is another checkpoint's weights and a memory delta; "whole" is a whole checkpoint; None is not an Engram
    checkpoint.

    Raises:
        `FileNotFoundError`: if the delta is missing.
        [`EngramFormatError`]: if a delta or an index contradicts `config.json`.
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
    # Older deltas are not named in `config.json`.
    return "delta" if said or (has_delta and (folder / CONFIG_NAME).is_file()) else None


def named_delta(settings: Path) -> bool:
    """Whether a `config.json`, or an adapter's settings, names a memory delta."""
    try:
        said = json.loads(settings.read_text(encoding="utf-8"))
        return any(said.get(key) is not None for key in (DELTA_KEY, OLD_DELTA_KEY))
    except (OSError, ValueError, AttributeError):  # missing or not ours: other readers of the file report it
        return False


def delta_file(folder: Path) -> Path | None:
    """Returns a folder's delta, under its present or its old name; None if there is none."""
    return next((folder / name for name in (DELTA_NAME, OLD_DELTA_NAME) if (folder / name).is_file()), None)


def _has_own_delta(folder: Path) -> bool:
    """Whether a folder has a delta that does not belong to an adapter."""
    return delta_file(folder) is not None and not named_delta(folder / ADAPTER_NAME)


def is_own(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder is read as part of it."""
    return name in (DELTA_NAME, OLD_DELTA_NAME, *ADAPTER_FILES) or WEIGHT_FILE.fullmatch(name) is not None


def remove_checkpoint(folder: Path) -> None:
    """Removes the configuration, indexes, weights, delta and adapter of a checkpoint; other files stay."""
    with locked(folder):
        for name in (CONFIG_NAME, *INDEX_NAMES):
            (folder / name).unlink(missing_ok=True)
        for path in folder.iterdir():
            if is_own(path.name):
                path.unlink()


# Errors of systems that cannot flush folders.
NOT_FLUSHED = (errno.EACCES, errno.EBADF, errno.EINVAL)


@contextmanager
def whole_save(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder whose files replace a checkpoint's if the block succeeds, and are removed if it fails.

    It is on the file system of `folder`, which is created if needed. A save that fails while files are moved is
    finished by the next save or read of the folder.
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
    """Finishes saves that died while files were moved, before the folder is read.

    Does nothing if the old checkpoint is still whole, a save is running, or the folder is not writable.
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
    """Returns what `read()` returns, calling it again if a save moved files of the folder meanwhile.

    Raises:
        `BlockingIOError`: if that happened several times.
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
    """Waits, up to a limit, until no save is moving files; returns the folder's `identity` then."""
    end = time.monotonic() + SECONDS_TO_WAIT
    while True:
        finish_saves(folder)
        seen = identity(folder)
        moving = any(_is_begun(marker, folder) for marker in folder.glob(f"{SAVING_PREFIX}*/{COMPLETE_NAME}"))
        if not moving or time.monotonic() > end:
            return seen
        time.sleep(0.01)


def identity(folder: Path) -> tuple | None:
    """Returns a value that differs after each save: its configuration is a new file, and is moved first."""
    try:
        status = (folder / CONFIG_NAME).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Locks a folder for saving; the system releases the lock of a dead process.

    Raises:
        `BlockingIOError`: if another process or thread holds the lock and `wait` is False.
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
    """Moves the remaining files of a complete draft into place, and removes the draft."""
    if (draft / COMPLETE_NAME).is_file():
        publish(draft, folder)
    discard(draft)


def discard(draft: Path) -> None:
    """Removes a draft, its mark first, so that half of it is never taken for the whole."""
    with suppress(OSError):
        (draft / COMPLETE_NAME).unlink(missing_ok=True)
        shutil.rmtree(draft, ignore_errors=True)


def mark_complete(draft: Path) -> None:
    """Flushes a draft to disk, then marks it complete."""
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
    """Moves the remaining files of a complete draft into place.

    The configuration goes first (see the module); the old indexes are removed next, and the new ones come last.
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
        if is_own(path.name) and path.name not in fresh:
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
    """Returns the files of a draft by their names in the checkpoint's folder."""
    files = (path for path in draft.rglob("*") if path.is_file() and path.parent.joinpath(COMPLETE_NAME) != path)
    return {path.relative_to(draft).as_posix(): path for path in files}


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    is_folder = path.is_dir()
    try:
        # Windows flushes only writable files, and cannot open folders.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (is_folder and error.errno in NOT_FLUSHED):
            raise
