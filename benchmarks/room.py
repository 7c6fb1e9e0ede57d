"""Disk room: refused before anything is written, and given back whatever happens.

Promises: a benchmark that would not fit says how much it needs and how much there is; what it made is gone when it
ends, fails or is interrupted; what a killed one left goes with the next run. Never deletes a folder that another
living process made.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


# Most that a benchmark may hold on a disk, whatever is free.
MOST_BYTES = 50 * 10**9

# Left free for everybody else who writes to the disk.
SPARE_BYTES = 2 * 10**9

PREFIX = "made-by-"


class NoRoomError(OSError):
    """The disk, or the limit of 50 GB, is too small for a benchmark."""


def gigabytes(count: float) -> str:
    """Bytes for a reader, in units of 10**9."""
    return f"{count / 1e9:.2f} GB"


def refuse_without_room(folder: Path, parts: Mapping[str, int], free: int | None = None) -> int:
    """Refuses what does not fit, with the sum.

    Args:
        folder (`Path`): where files will be made.
        parts (mapping of `str` to `int`): bytes of everything that will lie there at the same time.
        free (`int`, *optional*): free bytes; asked of the disk if None.

    Returns:
        `int`: the sum.

    Raises:
        [`NoRoomError`]: naming parts, sum, what is free and what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free if free is None else free
    need = sum(parts.values())
    listed = " + ".join(f"{gigabytes(size)} {name}" for name, size in parts.items())
    if need > MOST_BYTES:
        raise NoRoomError(
            f"{listed} = {gigabytes(need)}, more than the {gigabytes(MOST_BYTES)} that a benchmark may hold: ask for "
            "fewer rows."
        )
    if need + SPARE_BYTES > free:
        raise NoRoomError(
            f"{listed} = {gigabytes(need)} are needed in '{folder}', and {gigabytes(SPARE_BYTES)} stay free for "
            f"others: {gigabytes(need + SPARE_BYTES)} in all, but only {gigabytes(free)} are free. Make room, or name "
            "a folder on a larger disk with --work."
        )
    return need


@contextmanager
def workplace(work: Path, name: str) -> Iterator[Path]:
    """A folder that lasts as long as the block.

    Args:
        work (`Path`): its parent, made if needed.
        name (`str`): what it is for.

    Yields:
        `Path`: an empty folder.
    """
    work.mkdir(parents=True, exist_ok=True)
    delete_leftovers(work)
    folder = work / f"{PREFIX}{os.getpid()}-{name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def delete_leftovers(work: Path) -> list[str]:
    """Deletes what killed runs left; returns the folders' names."""
    gone = []
    for folder in sorted(work.glob(f"{PREFIX}*")):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not is_alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder.name)
    return gone


def is_alive(process: int) -> bool:
    """Whether a process of that number runs, anybody's."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
