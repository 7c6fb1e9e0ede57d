"""What the device has counted, read from its memory, and `counted()` around a piece of a test."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch


# By position: the order is that of `enum Number` in device.cpp.
COPIES = ["h2d", "h2d_copies", "d2h", "d2h_copies", "d2d", "d2d_copies"]
MEMORY = ["allocated", "peak", "pinned", "pinned_peak"]
NUMBERS = [*COPIES, *MEMORY, "total", "listening", "late", "pinning_fails", "steps"]


class Numbers(ctypes.Structure):
    """The numbers as attributes: the device's own, where writing one changes it, or a copy of them."""

    _fields_ = [(name, ctypes.c_int64) for name in NUMBERS]  # noqa: RUF012 (ctypes wants a list)


class Step(NamedTuple):
    """One thing that happened.

    `what` is "h2d", "d2h", "d2d" (`name` is "item" or "index" where nobody asked for a copy), "op" (`name` is the
    operator), "record" or "wait" (a stream and an event), "record_stream", or "synchronize" (the host waits for the
    "stream", "event" or "device" that `name` says). Stream 0 is the default one.
    """

    what: str
    name: str
    stream: int
    event: int
    bytes: int
    non_blocking: bool
    pinned: bool


_library: ctypes.CDLL | None = None


def attach(path: Path) -> None:
    """Loads the library, which registers its memory, operators and streams with PyTorch."""
    global _library
    torch.ops.load_library(path)
    _library = ctypes.CDLL(str(path))
    _library.counting_steps.restype = ctypes.c_char_p
    numbers().total = 8 << 30


def numbers() -> Numbers:
    """The device's own."""
    if _library is None:
        raise RuntimeError("there is no counting device yet: call `load()`")
    return Numbers.in_dll(_library, "counting_numbers")


class Counted:
    """What has happened since the block began, until it ends; see the package for the numbers."""

    def __init__(self):
        self._before = Numbers.from_buffer_copy(numbers())
        self._after = None
        self._steps = []

    def __getattr__(self, name: str) -> int:
        if name not in COPIES + MEMORY:
            raise AttributeError(name)
        return getattr(self._after or numbers(), name) - getattr(self._before, name)

    @property
    def steps(self) -> list[Step]:
        if not self._after:
            unread = ctypes.c_int64(self._before.steps + len(self._steps))
            for line in _library.counting_steps(unread).decode().splitlines():
                what, name, *integers = line.split("\t")
                stream, event, size, non_blocking, pinned = map(int, integers)
                self._steps.append(Step(what, name, stream, event, size, bool(non_blocking), bool(pinned)))
        return self._steps

    def comes_after(self, later: Step, earlier: Step) -> bool:
        """Whether one of `steps` had to wait for an earlier one, however fast the device: they are on the same stream,
        an event leads from one to the other, or the host waited in between."""
        first, last = (next(at for at, step in enumerate(self.steps) if step is one) for one in (earlier, later))
        streams, events = {earlier.stream}, set()  # those that come after it
        for step in self.steps[first:last]:
            reached = step.stream in streams
            if step.what == "record":
                (events.add if reached else events.discard)(step.event)  # it stands for its last record only
            elif step.what == "wait" and step.event in events:
                streams.add(step.stream)
            host_waits = step.what in ("h2d", "d2h") and reached and not step.non_blocking
            if step.what == "synchronize":
                host_waits = {"stream": reached, "event": step.event in events, "device": True}[step.name]
            if host_waits:
                return True
        return later.stream in streams

    def __repr__(self) -> str:
        return f"Counted({', '.join(f'{name}={getattr(self, name)}' for name in COPIES + MEMORY)})"


@contextmanager
def counted() -> Iterator[Counted]:
    """Counts a block, in all threads. Blocks may lie in each other."""
    now = numbers()
    peaks = now.peak, now.pinned_peak
    now.peak, now.pinned_peak = now.allocated, now.pinned  # so that they count from here
    now.listening += 1
    block = Counted()
    try:
        yield block
    finally:
        block._steps, block._after = block.steps, Numbers.from_buffer_copy(now)
        now.listening -= 1
        now.steps = now.steps if now.listening else 0  # without listeners they are forgotten
        now.peak, now.pinned_peak = max(now.peak, peaks[0]), max(now.pinned_peak, peaks[1])
