"""A table of 40 GB on disk, in a process that may have 6 GB: load time, memory, prefill and decoding.

Every byte of the table is written and random. Loading is compared with the donor's own, in fresh processes that take
turns; reading with the same model over a resident table of 1 GB and with the donor. "Cold" is after the table's files
were dropped from the page cache, "warm" is the same text once more.

The run can be stopped and started again: what is finished is kept in `<work>/big` until the run is through.

Run: python -m benchmarks.big, or `make bench-long`
"""

import argparse
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import grafts, page_cache, record
from .command import CannotMeasure, integers, parser, run, say, start, whole_donor
from .compare import interleave, ratios, spread
from .memory_cap import MemoryCap, memory_cap, run_child
from .room import refuse_without_room


LAYERS = [1, 14]


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=6)
    made.add_argument("--bytes", type=int, default=40_100_000_000, help="size of the table on disk")
    made.add_argument("--resident-bytes", type=int, default=10**9, help="size of the resident table")
    made.add_argument("--cap", type=int, default=6 * 10**9, help="memory that the measuring processes may have")
    made.add_argument("--shard", default="8GB", help="largest memory file")
    made.add_argument("--layers", type=integers, default=LAYERS, help="Engram layers, from 0")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--tokens", type=int, default=2048, help="tokens of the text that is read at once")
    made.add_argument("--decoded", type=int, default=256, help="tokens that are decoded")
    made.add_argument("--discard", action="store_true", help="delete an unfinished run and measure nothing")
    return made.parse_args(argv)


class Stages:
    """What an unfinished run has done so far, in a file beside its grafts.

    Args:
        folder (`Path`): kept until the run is through.
        wanted (`dict`): what the grafts depend on.
    """

    def __init__(self, folder: Path, wanted: dict):
        self.folder, self.file = folder, folder / "stages.json"
        self.done: dict = {"wanted": wanted, "filled": []}
        if self.file.is_file():
            self.done = json.loads(self.file.read_text(encoding="utf-8"))
            if self.done["wanted"] != wanted:
                raise ValueError(
                    f"an unfinished run with other settings ({self.done['wanted']}) lies in '{folder}': finish it with "
                    "those, or delete it with --discard."
                )
            say(f"going on after: {', '.join(name for name in self.done if name != 'wanted')}")
        if self.done.get("commit") != record.commit():
            # Tables are the same for every commit, measurements are not.
            self.done = {name: self.done[name] for name in ("wanted", "filled", "made") if name in self.done}
            self.done["commit"] = record.commit()

    def once(self, name: str, work: Callable[[], object]):
        """The result of a stage, from the file if it has run before."""
        if name not in self.done:
            say(f"stage: {name}")
            self.done[name] = work()
            self.keep()
        return self.done[name]

    def keep(self) -> None:
        """Writes the file whole."""
        draft = self.file.with_suffix(".new")
        draft.write_text(json.dumps(self.done), encoding="utf-8")
        draft.replace(self.file)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keeps a second run out of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CannotMeasure(f"another run is using '{folder}': wait for it.") from None
    finally:
        os.close(lock)


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    donor = whole_donor(asked.donor).resolve()
    folder = (asked.work / "big").resolve()
    with only_run(folder), memory_cap(asked.cap) as cap:
        outcome = run_stages(asked, donor, folder, cap)
        say(f"finished: deleting '{folder}'")
        shutil.rmtree(folder)
    return outcome


def run_stages(asked: argparse.Namespace, donor: Path, folder: Path, cap: MemoryCap) -> dict:
    """Everything that is not yet done, stage by stage."""
    wanted = {
        "donor_bytes": grafts.donor_bytes(donor),
        "table_bytes": [asked.bytes, asked.resident_bytes],
        "layers": asked.layers,
        "head_dim": asked.head_dim,
        "shard": asked.shard,
    }
    if not (folder / "stages.json").is_file():
        for left in folder.iterdir():  # by a run that was killed while it made its grafts
            shutil.rmtree(left)
        parts = {"table": asked.bytes, "resident table": asked.resident_bytes}
        refuse_without_room(folder, {**parts, "two copies of the donor": 2 * wanted["donor_bytes"]})
    stages = Stages(folder, wanted)
    big, small = folder / "on-disk", folder / "resident"
    stages.once("made", lambda: make(asked, donor, {big: asked.bytes, small: asked.resident_bytes}))
    fill(stages, [*grafts.memory_files(big), *grafts.memory_files(small)])
    folders = {"donor": str(donor), "small": str(small), "big": str(big)}
    load = stages.once("load", lambda: compare_loading(asked, folders, cap))
    given = ["--tokens", str(asked.tokens), "--decoded", str(asked.decoded), "--rounds", str(asked.rounds)]
    given += [
        "--threads",
        str(asked.threads),
        *(text for pair in folders.items() for text in (f"--{pair[0]}", pair[1])),
    ]
    prefill = stages.once("prefill", lambda: capped("prefill", given, folders, cap))
    decode = stages.once("decode", lambda: capped("decode", given, folders, cap))
    sizes = {
        "donor": donor.name,
        "donor_bytes": wanted["donor_bytes"],
        "on_disk": grafts.describe(big),
        "resident": grafts.describe(small),
        "cap_bytes": asked.cap,
        "control_group_version": cap.version,
        "prefill_tokens": asked.tokens,
        "decoded_tokens": asked.decoded,
    }
    return {"sizes": sizes, "measured": {"load": load, "prefill": prefill, "decode": decode}}


def make(asked: argparse.Namespace, donor: Path, wanted: dict[Path, int]) -> bool:
    """Makes the grafts, their tables still holes."""
    for folder, size in wanted.items():
        shutil.rmtree(folder, ignore_errors=True)
        rows = grafts.rows_for(size, len(asked.layers), asked.head_dim, "bfloat16")
        grafts.make_graft(
            donor, folder, asked.layers, rows, asked.head_dim, "bfloat16", max_memory_shard_size=asked.shard
        )
    return True


def fill(stages: Stages, paths: list[Path]) -> None:
    """Fills the files that are not filled yet, one stage each."""
    for path in paths:
        name = f"{path.parent.name}/{path.name}"
        if name not in stages.done["filled"]:
            say(f"filling {name}, {path.stat().st_size / 1e9:.2f} GB")
            grafts.fill(path)
            stages.done["filled"].append(name)
            stages.keep()


def compare_loading(asked: argparse.Namespace, folders: dict[str, str], cap: MemoryCap) -> dict:
    """Load time and memory of donor and graft, each in fresh processes that take turns."""
    seen: dict[str, list[dict]] = {"donor": [], "big": []}

    def way(name: str) -> Callable[[], float]:
        def once() -> float:
            placement = [] if name == "donor" else ["--placement", "disk"]
            loaded = run_child("benchmarks.big_child", ["load", "--folder", folders[name], *placement], cap)
            seen[name].append(loaded)
            return loaded["load_seconds"]

        return once

    charge_to_group(folders, cap)
    seconds = interleave({name: way(name) for name in seen}, max(5, asked.rounds))
    counted = {name: entries[-len(seconds[name]) :] for name, entries in seen.items()}
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_the_donor": spread(ratios(seconds["big"], seconds["donor"])),
        "anonymous_bytes": {name: spread([e["anonymous"] for e in entries], 12) for name, entries in counted.items()},
        "file_bytes": {name: spread([e["file"] for e in entries], 12) for name, entries in counted.items()},
        "group_peak_bytes": cap.peak(),
    }


def capped(what: str, given: list[str], folders: dict[str, str], cap: MemoryCap) -> dict:
    """One measuring process under the cap, and the most that it held."""
    charge_to_group(folders, cap)
    return {**run_child("benchmarks.big_child", [what, *given], cap), "group_peak_bytes": cap.peak()}


def charge_to_group(folders: dict[str, str], cap: MemoryCap) -> None:
    """Drops all weights from the page cache: a page counts for the group that reads it first, which is to be ours."""
    page_cache.drop(path for folder in folders.values() for path in Path(folder).glob("*.safetensors"))
    cap.forget_peak()


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("big", measure, options(argv))


if __name__ == "__main__":
    chosen = options()
    if chosen.discard:
        shutil.rmtree(chosen.work / "big", ignore_errors=True)
    else:
        start("big", measure, chosen, "what is finished is kept: start it again to go on, or delete it with --discard")
