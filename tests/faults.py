"""What the tests of faults share: tables in files, disks that misbehave, children that cannot hang, what is held open.

| name | what it gives |
|---|---|
| `random_table`, `cut`, `stored`, `mapped`, `same` | rows, their parts, in files, mapped from them, compared as bytes |
| `forget(rows)` | takes the pages of rows in files out of the page cache, as far as the file system lets go of them |
| `disk(stand_in)` | a block in which `os.preadv` is `stand_in(real, descriptor, buffers, offset, flags=0)` |
| `absent`, `short`, `failing(code)` | stand-ins: nothing is in the page cache, reads come in pieces, reads fail |
| `placed_at(placement, folder)`, `logits`, `plain`, `shard_of` | a loaded model, what it says with and without memory |
| `Child(action)` | a forked process that runs `action()`; `.result()` waits a bounded time and is what it returned |
| `open_files(folder)` | how many descriptors and mappings of this process lead to files of a folder |
| `ctrl_c_heard()` | a block in which SIGINT is a KeyboardInterrupt |
| `fetch_threads()`, `soon(condition)` | our threads that are alive; whether something becomes true in a few seconds |
"""

import errno
import itertools
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engram_transformers.files_atomic_engram import MEMORY_STEM
from engram_transformers.files_safetensors_engram import ZeroTensor, write_index, write_shards
from engram_transformers.rows_storage_engram import CheckpointTables, FileRows, HostRows


def random_table(rows: int, width: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """Rows of random bytes: infinities and NaN of many kinds are among them."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return data.view(dtype)


def cut(table: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Parts of the same height; the last also has what is left over."""
    height = len(table) // parts
    ends = [height * number for number in range(parts)] + [len(table)]
    return [table[first:last] for first, last in itertools.pairwise(ends)]


def stored(folder: Path, parts: list[torch.Tensor | ZeroTensor], max_bytes: int = 1 << 50) -> FileRows:
    """Parts in the files of a checkpoint."""
    named = {f"memory.tables.1.order2.{number}": part for number, part in enumerate(parts)}
    write_index(folder, write_shards(folder, MEMORY_STEM, named, max_bytes), 0)
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(0, 0))  # whatever is written from now on changes it, however coarse the clock
    checkpoint = CheckpointTables(folder)
    return FileRows([checkpoint.part(name) for name in named])


def mapped(rows: FileRows) -> HostRows:
    return HostRows(rows.tensors(), [part.file for part in rows.parts])


def forget(rows: FileRows) -> None:
    """Takes a file's pages out of the page cache, as far as the file system lets go of them."""
    for part in rows.parts:
        os.fsync(part.file.descriptor)
        os.posix_fadvise(part.file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def same(given: torch.Tensor, expected: torch.Tensor) -> bool:
    return given.shape == expected.shape and torch.equal(given.view(torch.uint8), expected.view(torch.uint8))


@contextmanager
def disk(stand_in: Callable) -> Iterator[None]:
    """Lets `os.preadv` be something else."""
    real = os.preadv
    os.preadv = partial(stand_in, real)
    try:
        yield
    finally:
        os.preadv = real


def absent(real, descriptor, buffers, offset, flags=0):
    """Nothing is in the page cache."""
    if flags:
        raise BlockingIOError(errno.EAGAIN, "not in the page cache")
    return real(descriptor, buffers, offset)


def short(real, descriptor, buffers, offset, flags=0):
    """A third of what was asked for comes, but at least one byte."""
    (buffer,) = buffers
    return real(descriptor, [buffer[: max(1, len(buffer) // 3)]], offset, flags)


def failing(code: int) -> Callable:
    """Every read fails."""

    def fail(real, descriptor, buffers, offset, flags=0):
        raise OSError(code, os.strerror(code))

    return fail


def shard_of(folder: Path) -> Path:
    """The one memory shard of a checkpoint."""
    (path,) = folder.glob("engram-memory-*.safetensors")
    return path


def placed_at(placement: str, folder: Path):
    """A loaded model whose tables are somewhere."""
    return AutoModelForCausalLM.from_pretrained(folder, engram_placement=placement)


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """What it says."""
    return model(ids, use_cache=False).logits


def plain(model, ids: torch.Tensor) -> torch.Tensor:
    """What it says without its memory."""
    with model.disable_memory():
        return logits(model, ids)


class Child:
    """A forked process, which has everything that this one has and nothing to give back but an answer.

    Args:
        action (callable): what it does; its answer is pickled.
    """

    def __init__(self, action: Callable):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            answer = (False, "no answer")
            try:
                answer = (True, action())
            except BaseException as error:  # the parent asserts
                answer = (False, f"{type(error).__name__}: {error}")
            finally:
                with suppress(BaseException):
                    os.write(writer, pickle.dumps(answer))
                os._exit(0)  # pytest is not to end twice
        os.close(writer)

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self.pid, signal.SIGINT)

    def result(self, seconds: float = 30.0):
        """What the action returned; an AssertionError if it raised, died, or did not end in time."""
        ended = bool(select.select([self.reader], [], [], seconds)[0])
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
        with open(self.reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert ended, f"the child was not done within {seconds} seconds"
        assert status == 0 and answer, f"the child died (signal {status & 0x7F})"
        fine, value = pickle.loads(answer)
        assert fine, value
        return value


def open_files(folder: Path) -> int:
    """Descriptors and mappings of this process that lead to files of a folder, deleted ones included."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are counted in /proc, which this system has not")
    targets = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one of the listing itself
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sum(f"{folder}/" in line for line in [*targets, *maps])


@contextmanager
def ctrl_c_heard() -> Iterator[None]:
    """Lets SIGINT raise KeyboardInterrupt, which it does not in a process that a shell began in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def fetch_threads() -> list[threading.Thread]:
    """Threads of ours that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("engram")]


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether something becomes true within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
