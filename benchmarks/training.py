"""A step of training: the whole backbone, LoRA, a memory, both, and tables of 100,000 to 100,000,000 rows.

Every way trains in its own process, on the same tokens of real text in the same precision, and the processes take
turns step by step. Measured are seconds a step (forward, backward, clipping, update), the most private memory that the
process held, and the bytes of the optimizer's state. Tables are full of random bytes; those of many sizes stay on disk,
in rows of 32 values. The first update of a table of 1.4 GB is looked at alone: how much private memory it takes.

Run: python -m benchmarks.training
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from . import grafts, models
from .command import integers, parser, say, start, target, whole_donor, workplace
from .compare import ratios, spread
from .side import GIVE_BACK, Side, take_turns


# Way: a way of `side.Side`, and what its job has different from the others'.
WAYS: dict[str, tuple[str, dict]] = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "memory": ("memory", {}),
    "memory on disk": ("memory", {"placement": "disk"}),
    "both": ("both", {}),
}
LORA_RANK = 16


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = training_options(parser(__doc__, rounds=7))
    made.add_argument("--sizes", type=integers, default=[10**n for n in range(5, 9)], help="rows of all tables")
    made.add_argument("--width", type=int, default=32, help="values in a row of those")
    made.add_argument("--places", default="device,cpu,disk", help="of the table in the first update")
    return made.parse_args(argv)


def training_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what `peer` has as well."""
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--rows", type=int, default=141_400, help="rows of a head; engram-peft's default, 1.4 GB")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--batch", type=int, default=4, help="sequences in a step")
    made.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    return made


def job_of(asked: argparse.Namespace, donor: Path, graft: Path) -> dict:
    """What every process gets."""
    names = ("threads", "batch", "length", "layers", "rows", "head_dim")
    ids = models.real_ids(donor, (asked.rounds + 2) * asked.batch * asked.length)  # one to warm up, and one to spare
    paths = {"donor": str(donor), "graft": str(graft), "placement": "device"}
    return {name: getattr(asked, name) for name in names} | paths | {"lora_rank": LORA_RANK, "ids": ids.tolist()}


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark."""
    donor = whole_donor(asked.donor).resolve()
    with workplace(asked.work, "training") as place:
        graft = grafts.filled_graft(donor, place / "graft", asked.layers, asked.rows, asked.head_dim, "float32")
        job = job_of(asked, donor, graft)
        measured = {
            "ways": compare_ways(asked, job, place),
            "first_step": {name: first_step({**job, "placement": name}, place) for name in asked.places.split(",")},
            "sizes": compare_sizes(asked, job, place),
        }
        sizes = {"batch": asked.batch, "length": asked.length, "lora_rank": LORA_RANK, **grafts.describe(graft)}
        sizes |= {"precision": "bfloat16 by autocast", "width_of_sizes": asked.width}
    yield "training", sizes, measured
    for way in ("memory", "memory on disk"):
        for times, most in (("times_full", 0.8), ("times_lora", 1.0)):
            target(f"a step, {way}, {times}", measured["ways"][way][times]["median"], at_most=most)
    for name, entry in measured["first_step"].items():
        target(f'first update, "{name}", bytes of those allowed', entry["more"] / entry["allowed"], at_most=1.0)
    largest = measured["sizes"][str(max(asked.sizes))]
    target("a step with the largest table, times the smallest", largest["times_the_smallest"]["median"], at_most=1.1)


def seconds_of_steps(asked: argparse.Namespace, sides: dict) -> tuple[dict, dict]:
    """Seconds of a step of every side, round by round, and what each holds at the end."""
    say(f"steps: {', '.join(map(str, sides))}")
    return take_turns(sides, "step", lambda answer: answer["seconds"], asked.rounds, 60 * asked.minutes / 3)


def compare_ways(asked: argparse.Namespace, job: dict, place: Path) -> dict:
    """The whole backbone, LoRA, memory with its table resident and on disk, and memory and LoRA."""
    sides = {way: Side(kind, {**job, **changes}, place) for way, (kind, changes) in WAYS.items()}
    seconds, held = seconds_of_steps(asked, sides)
    return {
        way: {
            "seconds": spread(seconds[way]),
            "times_full": spread(ratios(seconds[way], seconds["full"])),
            "times_lora": spread(ratios(seconds[way], seconds["lora"])),
            **held[way],
        }
        for way in WAYS
    }


def first_step(job: dict, place: Path) -> dict:
    """Private memory of the first update, in a fresh process."""
    say(f"first update: table on {job['placement']!r}")
    side = Side("memory", job, place, allocator=GIVE_BACK)
    try:
        found = side.ask("first_step")
    finally:
        side.end()
    return {**found, "allowed": (64 << 20) + 16 * found["touched_values"]}


def compare_sizes(asked: argparse.Namespace, job: dict, place: Path) -> dict:
    """Tables of many sizes on disk."""
    donor, made = Path(job["donor"]), {}
    for size in sorted(asked.sizes):
        rows = max(2, size // (grafts.HEADS_A_LAYER * len(asked.layers)))
        made[size] = grafts.filled_graft(donor, place / str(size), asked.layers, rows, asked.width, "float32")
    jobs = {size: {**job, "graft": str(folder), "placement": "disk"} for size, folder in made.items()}
    seconds, held = seconds_of_steps(asked, {size: Side("memory", jobs[size], place) for size in made})
    return {
        str(size): {
            **{name: grafts.describe(folder)[name] for name in ("rows", "table_bytes")},
            "seconds": spread(seconds[size]),
            "times_the_smallest": spread(ratios(seconds[size], seconds[min(made)])),
            **held[size],
        }
        for size, folder in made.items()
    }


if __name__ == "__main__":
    start(measure, options())
