"""Decoding with a memory against the plain donor: greedy, one token a forward over a cache.

A table of about 1 GB in the paper's shape (orders 2 and 3, 8 heads, memory vector of 1280 values, two layers), resident
and on disk with a warm page cache; backbone in the donor's dtype and in bfloat16. Models take turns every eight tokens,
and share the donor's weights in RAM, so that nothing but the memory differs.

Run: python -m benchmarks.decode
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import grafts, models, page_cache, passes
from .command import integers, limit_seconds, parser, run, say, start, whole_donor
from .compare import Measured, interleave, speeds
from .room import refuse_without_room, workplace
from .text import real_ids


PROMPT = 64


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of decode and prefill."""
    made = memory_options(parser(__doc__, rounds=16))
    made.add_argument("--tokens", type=int, default=64, help="forward passes of one token in a round")
    return made.parse_args(argv)


def memory_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the sizes of a graft."""
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--rows", type=int, default=None, help="rows of a head; as many as make 1 GB by default")
    made.add_argument("--table-dtype", default="bfloat16", choices=sorted(grafts.WIDTHS), help="type of the rows")
    made.add_argument("--dtypes", default="donor,bfloat16", help="dtypes of the backbone")
    return made


def measure_models(asked: argparse.Namespace, work: Callable[[torch.nn.Module], Measured], tokens: int) -> dict:
    """Compares donor and grafts, dtype by dtype.

    Args:
        asked (`argparse.Namespace`): the options.
        work (`Callable`): runs one model once and returns seconds, or their parts.
        tokens (`int`): tokens that `work` reads.

    Returns:
        `dict` with sizes and, for each dtype, speeds of every way.
    """
    donor = whole_donor(asked.donor)
    rows = asked.rows or grafts.rows_for(10**9, len(asked.layers), asked.head_dim, asked.table_dtype)
    row_bytes = asked.head_dim * grafts.WIDTHS[asked.table_dtype]
    table = rows * len(asked.layers) * 16 * row_bytes
    refuse_without_room(asked.work, {"table": table, "copy of the donor": grafts.donor_bytes(donor)})
    measured = {}
    with workplace(asked.work, "graft") as place:
        say(f"filling a table of {table / 1e9:.2f} GB")
        graft = grafts.filled_graft(donor, place / "graft", asked.layers, rows, asked.head_dim, asked.table_dtype)
        sizes = {"donor": str(donor.name), "donor_bytes": grafts.donor_bytes(donor), **grafts.describe(graft)}
        page_cache.warm(grafts.memory_files(graft))
        for dtype in asked.dtypes.split(","):
            loaded = sides(donor, graft, dtype)
            ways = {name: partial(work, model) for name, model in loaded.items()}
            say(f"{dtype}: {', '.join(ways)}")
            seconds = interleave(ways, asked.rounds, limit_s=limit_seconds(asked) / len(asked.dtypes.split(",")))
            name = models.dtype_of(loaded["donor"])
            measured[name] = speeds(seconds, "donor", tokens)
            del loaded, ways
    return {"sizes": sizes, "measured": {"by_backbone_dtype": measured}}


def sides(donor: Path, graft: Path, dtype: str) -> dict[str, torch.nn.Module]:
    """The models that take turns: the donor, itself once more, and the graft by places of its table."""
    plain = models.load(donor, dtype)
    others = {
        "donor, once more": models.load(donor, dtype),
        "table resident": models.load(graft, dtype, "device"),
        "table on disk, warm": models.load(graft, dtype, "disk"),
    }
    return {"donor": plain} | {name: models.with_weights_of(model, plain) for name, model in others.items()}


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    prompt = real_ids(models.tokenizer_of(whole_donor(asked.donor)), PROMPT)
    outcome = measure_models(asked, lambda model: passes.decode(model, prompt, asked.tokens), asked.tokens)
    outcome["sizes"] |= {"prompt_tokens": PROMPT, "tokens_a_round": asked.tokens, "batch": 1}
    return outcome


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("decode", measure, options(argv))


if __name__ == "__main__":
    start("decode", measure, options())
