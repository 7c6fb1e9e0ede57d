"""`torch.counting`: what `torch.cuda` is to CUDA, as far as models and hooks ask, and what tests may put it through."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .counters import numbers


def always(answer) -> Callable:
    return lambda *args, **fields: answer


is_available = is_initialized = always(True)
_is_in_bad_fork = always(False)
_lazy_init = always(None)  # without one, torch 2.6 synchronizes nothing
device_count, current_device, device = always(1), always(0), always(nullcontext())  # there is one
set_device = empty_cache = manual_seed_all = always(None)  # random numbers are the CPU's
get_amp_supported_dtype = always([])  # autocast warns and does nothing
set_stream, synchronize = torch.accelerator.set_stream, torch.accelerator.synchronize


class Stream(torch.Stream):
    """What is issued on it is done at once, unless copies are late, but its steps are told apart."""

    def __new__(cls, device=None, priority: int = 0):
        return super().__new__(cls, device="counting", priority=priority)


class Event(torch.Event):
    """An event of this device; it times nothing."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        return super().__new__(cls, device="counting")


def current_stream(device=None) -> torch.Stream:
    return torch.accelerator.current_stream()


@contextmanager
def stream(chosen: torch.Stream | None) -> Iterator[None]:
    before = current_stream()  # a stream is a context by itself from torch 2.7 on
    set_stream(before if chosen is None else chosen)
    try:
        yield
    finally:
        set_stream(before)


def mem_get_info(device=None) -> tuple[int, int]:
    """Bytes that are free, and in all."""
    return numbers().total - numbers().allocated, numbers().total


def memory_allocated(device=None) -> int:
    return numbers().allocated


def max_memory_allocated(device=None) -> int:
    return numbers().peak


def get_rng_state(device=None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device=None) -> None:
    torch.set_rng_state(state)


@contextmanager
def changed(name: str, value: int) -> Iterator[None]:
    before = getattr(numbers(), name)
    setattr(numbers(), name, value)
    try:
        yield
    finally:
        setattr(numbers(), name, before)


def total_memory(size: int) -> AbstractContextManager:
    """A device of so many bytes instead of 8 GiB; to want more is `torch.OutOfMemoryError`."""
    return changed("total", size)


def pinning_fails() -> AbstractContextManager:
    """A machine with no pinned memory to give; to want some is a RuntimeError."""
    return changed("pinning_fails", 1)


@contextmanager
def late_copies() -> Iterator[None]:
    """Non-blocking copies from or to pinned memory happen as late as they may: when somebody waits for them, or their
    stream goes on. Who reads before waiting reads nan or -1; who overwrites a source too early sends what he wrote."""
    with changed("late", 1):
        try:
            yield
        finally:
            synchronize()  # none is later than the block
