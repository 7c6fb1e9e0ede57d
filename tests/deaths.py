"""Processes that are killed at a chosen operation on a file, as by a power cut or an out-of-memory killer."""

import os
from collections.abc import Callable
from functools import partial

from .faults import Child


# Operations that are counted, by their names in `os`; pathlib and shutil go through them.
OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


def with_operations(before: Callable[[], None], action: Callable[[], None]) -> None:
    """Runs an action in this process, for good with something to be done before each operation."""

    def counted(real, *given, **more):
        before()
        return real(*given, **more)

    for name in OPERATIONS:
        setattr(os, name, partial(counted, getattr(os, name)))
    action()


def operations(action: Callable[[], None]) -> int:
    """How many operations an action takes, in a process of its own."""
    seen = []

    def run() -> int:
        with_operations(lambda: seen.append(1), action)
        return len(seen)

    return Child(run).result()


def dies_at(place: int, action: Callable[[], None]) -> bool:
    """Runs an action in a process of its own that is killed before operation number `place`; whether it was.

    Raises:
        `AssertionError`: if the action raised.
    """
    left = iter(range(place))
    pid = os.fork()
    if pid == 0:
        try:
            with_operations(lambda: None if next(left, None) is not None else os._exit(7), action)
            os._exit(0)
        finally:
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended in (0, 7), f"the action failed before operation {place}"
    return ended == 7
