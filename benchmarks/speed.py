"""Decoding and prefill with a memory against the plain backbone, in float32 and bfloat16.

A table of about 1 GB in the paper's shape (orders 2 and 3, 8 heads, memory vector of 1280 values, two layers), in all
three placements. Decoding is greedy, one token a forward pass over a cache; prefill reads 2,048 tokens of real text at
once, logits of the last position only. All models share the backbone's weights in memory and take turns, and the
backbone is compared with itself: a difference as small as its own is the machine's.

Run: python -m benchmarks.speed (under 10 minutes on 2 cores)
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch

from . import grafts, models
from .command import CannotMeasure, integers, parser, say, start, target, whole_donor, workplace
from .compare import interleave, speeds


PLACEMENTS = ("device", "cpu", "disk")

# Least share of the backbone's speed on a CPU, for the table on "device"; the others are shown and have no target.
TARGETS = {"decode": {"float32": 0.95, "bfloat16": 0.93}, "prefill": {"float32": 0.95, "bfloat16": 0.95}}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=16)
    made.set_defaults(minutes=6)
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--rows", type=int, help="rows of a head; as many as make 1 GB by default")
    made.add_argument("--dtypes", default="float32,bfloat16", help="dtypes of the backbone")
    made.add_argument("--tokens", type=int, default=32, help="forward passes of one token in a round")
    made.add_argument("--text", type=int, default=2048, help="tokens that are read at once")
    made.add_argument("--batch", type=int, default=1, help="sequences")
    made.add_argument("--device", default="cpu", help='where the backbone is, such as "cuda"')
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark: one result for decoding and one for prefill."""
    donor = whole_donor(asked.donor)
    rows = asked.rows or grafts.rows_for(10**9, asked.layers, asked.head_dim)
    prompts = models.real_ids(donor, asked.batch * models.PROMPT).view(asked.batch, -1).to(asked.device)
    texts = models.real_ids(donor, asked.batch * asked.text).view(asked.batch, -1).to(asked.device)
    dtypes = asked.dtypes.split(",")
    found: dict[str, dict] = {"decode": {}, "prefill": {}}
    with workplace(asked.work, "speed") as place:
        graft = grafts.filled_graft(donor, place / "graft", asked.layers, rows, asked.head_dim)
        sizes = {**grafts.describe(graft), "batch": asked.batch, "device": asked.device}
        grafts.warm(grafts.table_files(graft))
        for dtype in dtypes:
            loaded = sides(donor, graft, dtype, asked.device)
            limit = 60 * asked.minutes / (2 * len(dtypes))
            say(f"{dtype}: {', '.join(loaded)}")
            works = {
                "decode": (asked.tokens, lambda model: models.decode(model, prompts, asked.tokens)),
                "prefill": (asked.text, lambda model: models.prefill(model, texts)),
            }
            for what, (tokens, work) in works.items():
                ways = {name: partial(work, model) for name, model in loaded.items()}
                seconds = interleave(ways, asked.rounds, limit_s=limit)
                found[what][dtype] = speeds(seconds, "donor", tokens * asked.batch)
                say(f"{what}: {len(seconds['donor'])} rounds")
            del loaded, ways
    yield "decode", {**sizes, "tokens_a_round": asked.tokens}, {"by_backbone_dtype": found["decode"]}
    yield "prefill", {**sizes, "tokens": asked.text}, {"by_backbone_dtype": found["prefill"]}
    for what, dtype in product(found, dtypes) if asked.device == "cpu" else ():
        share = found[what][dtype]["table resident"]["speed_ratio"]["median"]
        target(f"{what}, {dtype}, share of the donor's speed", share, at_least=TARGETS[what][dtype])


def sides(donor: Path, graft: Path, dtype: str, device: str) -> dict[str, torch.nn.Module]:
    """The models that take turns: the backbone, itself once more, and the graft by placements of its table."""
    plain = models.load(donor, dtype).to(device)
    others = {"donor, once more": models.load(donor, dtype).to(device)}
    for placement, name in zip(PLACEMENTS, ("table resident", "table on the CPU", "table on disk, warm"), strict=True):
        # To the device first: "cpu" and "disk" are places relative to it.
        others[name] = models.load(graft, dtype, "device").to(device).place_memory(placement)
        if others[name].memory.placement != placement:
            raise CannotMeasure(f"the tables are on '{others[name].memory.placement}', not on '{placement}'.")
    return {"donor": plain} | {name: models.with_weights_of(model, plain) for name, model in others.items()}


if __name__ == "__main__":
    start(measure, options())
