"""Ways to read rows out of a file, warm and cold: the reason why rows on disk are read by position.

32 rows are one token of a memory (two layers, two orders, 8 heads), 65,536 are 2048 tokens; rows of 160 bytes, drawn
anew for every round, ascending. Also what each way does when the file has become shorter than it was.

Run: python -m benchmarks.placements
"""

import argparse
import mmap
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from engram_transformers.rows_storage_engram import FilePart, FileRows, ShardFile

from . import grafts, page_cache
from .command import limit_seconds, parser, run, say, start
from .compare import interleave, ratios, spread, timed
from .room import refuse_without_room, workplace


THREADS = 16

# Calls in a round where the file is warm: 32 rows take tens of microseconds.
WARM_CALLS = {32: 100, 65_536: 1}

NO_WAIT = getattr(os, "RWF_NOWAIT", None)


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=12)
    made.add_argument("--bytes", type=int, default=4 * 10**9, help="size of the file")
    made.add_argument("--row-bytes", type=int, default=160)
    made.add_argument("--reads", default="32,65536", help="rows of one gather")
    return made.parse_args(argv)


class Reader:
    """One open file of rows, and the ways to copy some of them.

    Args:
        path (`Path`): rows of `row_bytes`, one after the other.
        row_bytes (`int`): size of a row.
        threads (`ThreadPoolExecutor`): for the ways that use several.
    """

    def __init__(self, path: Path, row_bytes: int, threads: ThreadPoolExecutor):
        self.path, self.row_bytes, self.threads = path, row_bytes, threads
        self.rows = path.stat().st_size // row_bytes
        self.file = os.open(path, os.O_RDONLY)
        self.stored = FileRows([FilePart(ShardFile(path), 0, (self.rows, row_bytes), torch.uint8)])
        self.ways: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
            "mapped gather": self.mapped,
            f"mapped gather, {THREADS} threads": self.mapped_by_threads,
            "preadv": self.positioned,
            "preadv RWF_NOWAIT": self.without_waiting,
            "posix_fadvise WILLNEED, then preadv": self.told_before,
            f"preadv, {THREADS} threads": self.positioned_by_threads,
            "as a memory reads them": self.as_memory,
        }

    def close(self) -> None:
        """Closes the file."""
        os.close(self.file)

    def map(self) -> torch.Tensor:
        """All rows as a tensor over a fresh mapping, as safetensors makes it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of memory that it may not write to, and nobody does
            flat = torch.frombuffer(mmap.mmap(self.file, 0, prot=mmap.PROT_READ), dtype=torch.uint8)
        return flat[: self.rows * self.row_bytes].view(self.rows, self.row_bytes)

    def mapped(self, rows: np.ndarray, out: np.ndarray) -> None:
        """`index_select` on a mapping: the kernel faults page by page."""
        torch.index_select(self.mapping, 0, torch.from_numpy(rows), out=torch.from_numpy(out))

    def mapped_by_threads(self, rows: np.ndarray, out: np.ndarray) -> None:
        """The same in pieces, so that faults wait beside each other."""
        self.in_pieces(self.mapped, rows, out)

    def positioned(self, rows: np.ndarray, out: np.ndarray) -> None:
        """One `preadv` a row."""
        view, width, file = memoryview(out).cast("B"), self.row_bytes, self.file
        for number, row in enumerate(rows.tolist()):
            if os.preadv(file, [view[number * width : (number + 1) * width]], row * width) != width:
                raise OSError(f"'{self.path}' ends before row {row}.")

    def without_waiting(self, rows: np.ndarray, out: np.ndarray) -> None:
        """What is in the page cache first, then the others one by one."""
        view, width, file, left = memoryview(out).cast("B"), self.row_bytes, self.file, []
        for number, row in enumerate(rows.tolist()):
            place = view[number * width : (number + 1) * width]
            try:
                done = os.preadv(file, [place], row * width, NO_WAIT)
            except BlockingIOError:
                done = 0
            if done != width:
                left.append((place, row))
        for place, row in left:
            if os.preadv(file, [place], row * width) != width:
                raise OSError(f"'{self.path}' ends before row {row}.")

    def told_before(self, rows: np.ndarray, out: np.ndarray) -> None:
        """The kernel hears of all places before the first is waited for."""
        for row in rows.tolist():
            os.posix_fadvise(self.file, row * self.row_bytes, self.row_bytes, os.POSIX_FADV_WILLNEED)
        self.positioned(rows, out)

    def positioned_by_threads(self, rows: np.ndarray, out: np.ndarray) -> None:
        """`preadv` in pieces, so that reads wait beside each other."""
        self.in_pieces(self.positioned, rows, out)

    def as_memory(self, rows: np.ndarray, out: np.ndarray) -> None:
        """This package's own: at once if all rows are in the page cache, else neighbours by one call, told before."""
        wanted = torch.from_numpy(rows)
        found = self.stored.read_resident(wanted)
        out[:] = (self.stored.read(wanted) if found is None else found).numpy()

    def in_pieces(self, way: Callable, rows: np.ndarray, out: np.ndarray) -> None:
        """Runs a way in all threads, each over a run of the rows."""
        pieces = min(THREADS, len(rows))
        list(self.threads.map(way, np.array_split(rows, pieces), np.array_split(out, pieces)))

    def cold_seconds(self, name: str, reads: int, random: np.random.Generator) -> float:
        """Seconds of one gather after the file was dropped from the page cache."""
        rows, out = self.draw(reads, random)
        self.mapping = None  # mapped pages are not dropped
        page_cache.drop([self.path])
        self.mapping = self.map()
        seconds = timed(lambda: self.ways[name](rows, out))()
        self.mapping = None
        return seconds

    def warm_seconds(self, name: str, reads: int, random: np.random.Generator) -> float:
        """Seconds of one gather of rows that were read before."""
        rows, out = self.draw(reads, random)
        self.mapping = self.map()
        self.ways[name](rows, out)
        calls = WARM_CALLS.get(reads, 1)

        def again() -> None:
            for _ in range(calls):
                self.ways[name](rows, out)

        return timed(again)() / calls

    def draw(self, reads: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random rows in ascending order, and room for them."""
        return np.sort(random.integers(0, self.rows, reads)), np.zeros((reads, self.row_bytes), np.uint8)


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    refuse_without_room(asked.work, {"file of rows": asked.bytes})
    random = np.random.default_rng(0)
    with workplace(asked.work, "rows") as place, ThreadPoolExecutor(THREADS) as threads:
        path = place / "rows"
        write_rows(path, asked.bytes)
        reader = Reader(path, asked.row_bytes, threads)
        try:
            refuse_other_bytes(reader, random)
            page_cache.drop([path])
            cold_share = page_cache.cached_share([path])
            measured = {
                f"{reads} rows": {state: compare(reader, reads, state, random, asked) for state in ("warm", "cold")}
                for reads in (int(text) for text in asked.reads.split(","))
            }
        finally:
            reader.close()
        shortened = shortened_file(place / "short")
    sizes = {
        "file_bytes": asked.bytes,
        "row_bytes": asked.row_bytes,
        "threads_of_ways": THREADS,
        "read_ahead_bytes": page_cache.read_ahead(asked.work),
    }
    measured = {"by_reads": measured, "cached_share_when_cold": cold_share, "shortened_file": shortened}
    return {"sizes": sizes, "measured": measured}


def write_rows(path: Path, size: int) -> None:
    """A file of random bytes."""
    say(f"writing {size / 1e9:.2f} GB")
    random = np.random.Generator(np.random.SFC64())
    with open(path, "xb", buffering=0) as file:
        for begin in range(0, size, grafts.BLOCK):
            grafts.write_all(file.fileno(), grafts.random_block(random, min(grafts.BLOCK, size - begin), "BF16"), begin)
        grafts.write_out(file.fileno())
    grafts.refuse_holes(path)


def refuse_other_bytes(reader: Reader, random: np.random.Generator) -> None:
    """Raises OSError if two ways do not read the same bytes: then their times say nothing."""
    reader.mapping = reader.map()
    rows, right = reader.draw(256, random)
    reader.positioned(rows, right)
    for name, way in reader.ways.items():
        out = np.zeros_like(right)
        way(rows, out)
        if not np.array_equal(out, right):
            raise OSError(f"'{name}' does not read what a plain read does.")


def compare(reader: Reader, reads: int, state: str, random, asked: argparse.Namespace) -> dict:
    """Microseconds a row of every way, and how they compare with a mapped gather."""
    say(f"{reads} rows, {state}")
    seconds_of = reader.warm_seconds if state == "warm" else reader.cold_seconds
    ways = {name: (lambda name=name: seconds_of(name, reads, random)) for name in reader.ways}
    # Cold, 65,536 rows take ten seconds a way: a quarter of the rounds, and no warming up.
    slow = state == "cold" and reads > 1000
    rounds = max(3, asked.rounds // 4) if slow else asked.rounds
    seconds = interleave(ways, rounds, warm_up=0 if slow else 1, limit_s=limit_seconds(asked) / 4)
    return {
        name: {
            "microseconds_a_row": spread([1e6 * value / reads for value in values]),
            "times_a_mapped_gather": spread(ratios(values, seconds["mapped gather"])),
        }
        for name, values in seconds.items()
    }


SHORTENED = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
mapping = mmap.mmap(file, 0, prot=mmap.PROT_READ)
os.truncate(sys.argv[1], 4096)
if sys.argv[2] == "mapped":
    mapping[1 << 16]
else:
    print(len(os.pread(file, 160, 1 << 16)), "bytes of 160")
"""


def shortened_file(path: Path) -> dict[str, str]:
    """What happens to a process that reads where a file has been cut off meanwhile."""
    seen = {}
    for way in ("mapped", "positioned"):
        path.write_bytes(bytes(1 << 17))
        done = subprocess.run([sys.executable, "-c", SHORTENED, str(path), way], capture_output=True, text=True)
        killed = -done.returncode
        seen[way] = f"killed by {signal.Signals(killed).name}" if killed > 0 else done.stdout.strip()
        path.unlink()
    return seen


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("placements", measure, options(argv))


if __name__ == "__main__":
    start("placements", measure, options())
