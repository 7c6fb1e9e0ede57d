"""A step of training: the whole donor, LoRA, a memory, both, engram-peft's memory, and tables of 1e5 to 1e8 rows.

Every way trains in a process of its own, on the same tokens of real text in the same precision, and the processes take
turns step by step. Reported are seconds a step (forward, backward, clipping, update), the most private memory that the
process held, and the bytes of the optimizer's state. Tables are full of random bytes; those of many sizes stay on disk,
in rows of 32 values, and their rows are read once before a step is timed ("warm"). The first update of a table of
1.4 GB is looked at alone: how much private memory it takes.

Run: python -m benchmarks.training
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import grafts, models, page_cache
from .command import CannotMeasure, integers, limit_seconds, parser, run, say, start, whole_donor
from .compare import interleave, ratios, spread
from .peer import ENVIRONMENT_BYTES, environment
from .record import ROOT
from .room import refuse_without_room, workplace
from .text import real_ids


# Way: a key of `training_side.WAYS`, and what its job has else than the others'.
WAYS: dict[str, tuple[str, dict]] = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "memory": ("memory", {}),
    "memory on disk": ("memory", {"placement": "disk"}),
    "both": ("both", {}),
}
HEADS_A_LAYER = 16
PLACEMENTS = ("device", "cpu", "disk")

# As the Makefile sets them for the demo: glibc keeps large blocks, which is worth a third of the speed on a CPU.
KEEP_BLOCKS = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}

# Threads that wait give their core away: the processes that do not have their turn must not disturb the one that has.
# On a machine with other work a step took 25 s without it and 4 s with it.
QUIET = {"OMP_WAIT_POLICY": "passive"}

# Where memory is counted, blocks go back to the system when they are free: what was kept would hide what is taken.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16), "MALLOC_TOP_PAD_": "0"}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=7)
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--rows", type=int, default=141_400, help="rows of a head; engram-peft's default, 1.4 GB")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--sizes", type=integers, default=[10**n for n in range(5, 9)], help="rows of all tables")
    made.add_argument("--width", type=int, default=32, help="values in a row of those")
    made.add_argument("--batch", type=int, default=4, help="sequences in a step")
    made.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    made.add_argument("--lora-rank", type=int, default=16)
    made.add_argument("--float32", action="store_true", help="no autocast to bfloat16")
    made.add_argument("--places", type=lambda text: text.split(","), default=list(PLACEMENTS), help="of the first step")
    made.add_argument("--environment", type=Path, help="one in which engram-peft is installed, to use in place of ours")
    made.add_argument("--without-peer", action="store_true", help="leave engram-peft out")
    return made.parse_args(argv)


class Side:
    """A process that trains in one way.

    Args:
        way (`str`): a key of `training_side.WAYS`.
        job (`dict`): its job.
        place (`Path`): for its job and its errors.
        python (*optional*): its interpreter.
        allocator (`dict`, *optional*): settings of glibc's allocator.
    """

    def __init__(self, way: str, job: dict, place: Path, python=sys.executable, allocator: dict | None = None):
        name = f"{way}-{len(list(place.glob('*.job')))}"
        path, self.errors = place / f"{name}.job", place / f"{name}.log"
        path.write_text(json.dumps(job), encoding="utf-8")
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", "benchmarks.training_side", way, str(path)],
                cwd=ROOT,
                env={**os.environ, **QUIET, **(KEEP_BLOCKS if allocator is None else allocator)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.way = way

    def ask(self, what: str) -> dict:
        """The answer to one question."""
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the log says why, below
        return self.answer()

    def answer(self) -> dict:
        """The next line."""
        line = self.process.stdout.readline()
        if not line:
            raise CannotMeasure(f"training {self.way} failed:\n{self.errors.read_text()[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # of a question that was never read
            self.process.stdin.close()
        self.process.stdout.close()


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    donor = whole_donor(asked.donor).resolve()
    row_bytes = asked.width * grafts.WIDTHS["float32"]
    table = asked.rows * HEADS_A_LAYER * len(asked.layers) * asked.head_dim * grafts.WIDTHS["float32"]
    parts = {"tables": sum(asked.sizes) * row_bytes + table}
    if not asked.without_peer and asked.environment is None:
        parts["environment"] = ENVIRONMENT_BYTES
    refuse_without_room(asked.work, {**parts, "donors": (1 + len(asked.sizes)) * grafts.donor_bytes(donor)})
    with workplace(asked.work.resolve(), "training") as place:
        say(f"filling {table / 1e9:.2f} GB")
        graft = grafts.filled_graft(donor, place / "graft", asked.layers, asked.rows, asked.head_dim, "float32")
        job = job_of(asked, donor, graft)
        measured = {"ways": compare_ways(asked, job, place), "peer": peer(asked, job, place)}
        measured["first_step"] = {name: first_step({**job, "placement": name}, place) for name in asked.places}
        measured["sizes"] = compare_sizes(asked, job, place)
        sizes = {
            **grafts.describe(graft),
            "donor": donor.name,
            "batch": asked.batch,
            "length": asked.length,
            "lora_rank": asked.lora_rank,
            "precision": "float32" if asked.float32 else "bfloat16 by autocast",
            "width_of_sizes": asked.width,
        }
    return {"sizes": sizes, "measured": measured}


def job_of(asked: argparse.Namespace, donor: Path, graft: Path) -> dict:
    """What every process is told."""
    steps = asked.rounds + 2  # one to warm up, and one to spare
    ids = real_ids(models.tokenizer_of(donor), steps * asked.batch * asked.length)
    return {
        **{name: getattr(asked, name) for name in ("threads", "batch", "length", "lora_rank", "layers", "rows")},
        "head_dim": asked.head_dim,
        "donor": str(donor),
        "graft": str(graft),
        "placement": "device",
        "bf16": not asked.float32,
        "ids": ids.tolist(),
    }


def take_turns(asked: argparse.Namespace, sides: dict[str, Side], parts: int = 4) -> tuple[dict, dict]:
    """Seconds of a step of every side, round by round, and what each holds at the end."""

    def way(side: Side) -> Callable[[], float]:
        return lambda: side.ask("step")["seconds"]

    limit = limit_seconds(asked) / parts
    try:
        for side in sides.values():
            side.answer()  # it has loaded
        seconds = interleave({name: way(side) for name, side in sides.items()}, asked.rounds, limit_s=limit)
        return seconds, {name: side.ask("about") for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.end()


def compare_ways(asked: argparse.Namespace, job: dict, place: Path) -> dict:
    """The whole donor, LoRA, memory with its table resident and on disk, and memory and LoRA."""
    say(f"steps: {', '.join(WAYS)}")
    sides = {way: Side(kind, {**job, **changes}, place) for way, (kind, changes) in WAYS.items()}
    seconds, held = take_turns(asked, sides)
    return {
        way: {
            "seconds": spread(seconds[way]),
            "times_full": spread(ratios(seconds[way], seconds["full"])),
            "times_lora": spread(ratios(seconds[way], seconds["lora"])),
            **{name: held[way][name] for name in ("peak_anonymous", "state_bytes", "steps")},
        }
        for way in WAYS
    }


def peer(asked: argparse.Namespace, job: dict, place: Path) -> dict:
    """A memory of ours beside engram-peft's, over tables of the same size; why not, where it cannot be installed."""
    if asked.without_peer:
        return {"missing": "it was left out (--without-peer)"}
    try:
        python = asked.environment or environment(place / "environment")
    except CannotMeasure as error:
        return {"missing": str(error)}
    say("steps: ours, engram-peft")
    sides = {
        "ours": Side("memory", job, place),
        "ours on disk": Side("memory", {**job, "placement": "disk"}, place),
        "theirs": Side("theirs", job, place, python),
    }
    seconds, held = take_turns(asked, sides)
    return {
        "first_step": first_step(job, place, "theirs", python),
        "theirs_over_ours": spread(ratios(seconds["theirs"], seconds["ours"])),
        "theirs_over_ours_on_disk": spread(ratios(seconds["theirs"], seconds["ours on disk"])),
        "sides": {
            name: {
                "seconds": spread(seconds[name]),
                **{what: held[name][what] for what in ("peak_anonymous", "state_bytes")},
            }
            for name in sides
        },
    }


def first_step(job: dict, place: Path, way: str = "memory", python=sys.executable) -> dict:
    """Private memory of the first update, in a fresh process."""
    say(f"first update: {way}, table on {job['placement']!r}")
    side = Side(way, job, place, python, GIVE_BACK)
    try:
        side.answer()
        found = side.ask("first_step")
    finally:
        side.end()
    return {**found, "allowed": (64 << 20) + 16 * found["touched_values"]}


def compare_sizes(asked: argparse.Namespace, job: dict, place: Path) -> dict:
    """Tables of many sizes on disk."""
    made = {}
    for size in sorted(asked.sizes):
        say(f"filling {size:,} rows")
        rows = max(2, size // (HEADS_A_LAYER * len(asked.layers)))
        donor = Path(job["donor"])
        made[size] = grafts.filled_graft(donor, place / str(size), asked.layers, rows, asked.width, "float32")
        # What was written fills the page cache, and the rows of a step would not stay in it; they are read before it.
        page_cache.drop(grafts.memory_files(made[size]))
    say(f"steps: {', '.join(f'{size:,} rows' for size in made)}")
    jobs = {size: {**job, "graft": str(folder), "placement": "disk"} for size, folder in made.items()}
    seconds, held = take_turns(asked, {size: Side("memory", jobs[size], place) for size in made})
    smallest = min(made)
    return {
        str(size): {
            "rows": grafts.describe(folder)["rows"],
            "table_bytes": grafts.describe(folder)["table_bytes"],
            "seconds": spread(seconds[size]),
            "times_the_smallest": spread(ratios(seconds[size], seconds[smallest])),
            **{name: held[size][name] for name in ("peak_anonymous", "state_bytes")},
        }
        for size, folder in made.items()
    }


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("training", measure, options(argv))


if __name__ == "__main__":
    start("training", measure, options())
