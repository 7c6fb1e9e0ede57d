"""Reading 2048 tokens of real text at once with a memory against the plain donor.

The same models as in `decode`: table of about 1 GB, resident and on disk with a warm page cache, two dtypes. Logits of
the last position only, as `generate` asks for: those of all positions are the donor's own work and would hide ours.

Run: python -m benchmarks.prefill
"""

import argparse

from . import models, passes
from .command import parser, run, start, whole_donor
from .decode import measure_models, memory_options
from .text import real_ids


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = memory_options(parser(__doc__, rounds=8))
    made.add_argument("--tokens", type=int, default=2048, help="tokens of the text")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    ids = real_ids(models.tokenizer_of(whole_donor(asked.donor)), asked.tokens)
    outcome = measure_models(asked, lambda model: passes.prefill_seconds(model, ids), asked.tokens)
    outcome["sizes"] |= {"tokens": asked.tokens, "batch": 1}
    return outcome


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("prefill", measure, options(argv))


if __name__ == "__main__":
    start("prefill", measure, options())
