"""A cap on the memory of child processes, by a control group of the kernel (version 1 or 2).

Promises: a capped child and everything it reads into the page cache is counted and limited from its first instruction;
where no control group can be made, that is said with the reasons and nothing runs uncapped. Leaves no group behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .command import CannotMeasure
from .record import ROOT


class MemoryCap:
    """A control group with a limit.

    Args:
        folder (`Path`): its folder.
        version (`int`): 1 or 2, which name their files differently.
    """

    FILES = {
        1: {
            "limit": "memory.limit_in_bytes",
            "peak": "memory.max_usage_in_bytes",
            "swap": "memory.memsw.limit_in_bytes",
        },
        2: {"limit": "memory.max", "peak": "memory.peak", "swap": "memory.swap.max"},
    }

    def __init__(self, folder: Path, version: int):
        self.folder, self.version = folder, version

    def limit(self, size: int) -> None:
        """Sets the limit, and keeps the group from swapping instead where the kernel can."""
        (self.folder / self.FILES[self.version]["limit"]).write_text(str(size))
        with suppress(OSError):  # a kernel that does not count swap
            (self.folder / self.FILES[self.version]["swap"]).write_text(str(size if self.version == 1 else 0))

    def forget_peak(self) -> None:
        """Lets the peak begin anew, where the kernel can."""
        with suppress(OSError):
            (self.folder / self.FILES[self.version]["peak"]).write_text("0")

    def peak(self) -> int | None:
        """Most bytes the group has held, page cache included; None where the kernel does not say."""
        try:
            return int((self.folder / self.FILES[self.version]["peak"]).read_text())
        except OSError:
            return None

    def command(self, arguments: list[str]) -> list[str]:
        """A command that joins the group before it does anything else."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", join, str(self.folder / "cgroup.procs"), *arguments]

    def remove(self) -> None:
        """Deletes the group; a process that has just ended may still be leaving it."""
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)


@contextmanager
def memory_cap(size: int, groups: Iterable[tuple[int, Path]] | None = None) -> Iterator[MemoryCap]:
    """A group that is limited to `size` bytes and lasts as long as the block.

    Args:
        size (`int`): bytes.
        groups (*optional*): version and folder of groups below which to make it; from `candidates` if None.

    Raises:
        [`CannotMeasure`]: if no group can be made, with what was tried.
    """
    tried = []
    for version, parent in candidates() if groups is None else groups:
        cap = MemoryCap(parent / f"engram-benchmark-{os.getpid()}", version)
        try:
            if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                (parent / "cgroup.subtree_control").write_text("+memory")
            cap.folder.mkdir()
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            continue
        try:
            cap.limit(size)
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            cap.remove()
            continue
        try:
            yield cap
        finally:
            cap.remove()
        return
    raise CannotMeasure(
        f"a cap of {size / 1e9:.0f} GB on memory needs a control group that may be written to (version 1 or 2), "
        f"usually as root; tried: {'; '.join(tried) or 'none is mounted'}. Without the cap the figures say nothing."
    )


def candidates() -> Iterator[tuple[int, Path]]:
    """Version and folder of the groups below which one might be made: this process's own, then those above it."""
    own = {}
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            own[names] = path
        mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    for before, after in (mount for mount in mounts if len(mount) == 2):
        kind, _, options = after.split(" ", 2)
        root, point = before.split()[3:5]
        if kind == "cgroup" and "memory" in options.split(","):
            version = 1
            path = next((path for names, path in own.items() if "memory" in names.split(",")), "/")
        elif kind == "cgroup2" and "memory" in read_words(Path(point) / "cgroup.controllers"):
            version, path = 2, own.get("", "/")
        else:
            continue
        inside = path.removeprefix(root.rstrip("/")).strip("/")
        folder = Path(point) / inside
        while folder != Path(point):
            yield version, folder
            folder = folder.parent
        yield version, Path(point)


def read_words(path: Path) -> list[str]:
    """Words of a small file, none if it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def run_child(module: str, arguments: list[str], cap: MemoryCap | None = None) -> dict:
    """Runs `python -m <module> ...` in a fresh process; its last line of output is its result.

    Raises:
        [`CannotMeasure`]: if it fails, or is killed for memory.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command if cap is None else cap.command(command),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        output, errors = process.communicate()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode == -signal.SIGKILL:
        raise CannotMeasure(f"{' '.join(arguments[:2])}: killed, most likely by the cap on its memory.")
    if process.returncode:
        raise CannotMeasure(f"{' '.join(arguments[:2])} failed:\n{errors[-2000:]}")
    return json.loads(output.splitlines()[-1])
