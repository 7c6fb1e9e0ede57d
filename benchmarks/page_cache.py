"""The page cache, so that "cold" and "warm" are states that were made and looked at, and no hopes.

Promises: says how much of a file is cached instead of guessing, or that it cannot say. Drops only what no process has
mapped and touched, as the kernel does, which is why the share that stayed is measured after every drop.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path


# Linux 6.5 and newer, the same number on every architecture.
SYS_CACHESTAT = 451

BLOCK = 1 << 24


class Range(ctypes.Structure):
    """The kernel's struct cachestat_range; length 0 is up to the end."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class Counts(ctypes.Structure):
    """The kernel's struct cachestat, in pages."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


def drop(paths: Iterable[Path]) -> None:
    """Writes files out and drops them from the page cache."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def warm(paths: Iterable[Path]) -> None:
    """Reads files once from end to end."""
    block = bytearray(BLOCK)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def cached_share(paths: Iterable[Path]) -> float | None:
    """Share of the files' bytes that the page cache holds; None where the kernel cannot say (before Linux 6.5)."""
    libc = ctypes.CDLL(None, use_errno=True)
    page, cached, total = os.sysconf("SC_PAGE_SIZE"), 0, 0
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            whole, counts = Range(0, 0), Counts()
            if libc.syscall(SYS_CACHESTAT, file, ctypes.byref(whole), ctypes.byref(counts), 0) != 0:
                return None
            cached += counts.cached * page
            total += -(-os.fstat(file).st_size // page) * page
        finally:
            os.close(file)
    return cached / total if total else 0.0


def read_ahead(folder: Path) -> int | None:
    """Bytes that the kernel reads around a page fault on the disk of a folder; None where it does not say."""
    device = os.stat(folder).st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (disk / "queue", disk.resolve().parent / "queue"):  # a partition has its disk's
        try:
            return 1024 * int((queue / "read_ahead_kb").read_text())
        except OSError:
            continue
    return None
