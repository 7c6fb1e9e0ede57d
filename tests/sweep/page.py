"""docs/backbones.md: what came of a sweep. The same results give the same page.

Source: results.jsonl, which `make sweep` writes.
"""

import json
from pathlib import Path

from tests.integration.matrix import SYMBOLS

from .check import MODES, OUTCOMES, Row


RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
TEXT = """# Backbones

<!-- made by `make sweep` from tests/sweep/results.jsonl; tests/integration/test_sweep.py compares them -->

Every model type that `AutoModelForCausalLM` knows in transformers {version}. A tiny model is made with random weights,
`EngramForCausalLM.from_backbone` puts a memory into it, and the memory is filled with random values. Then:

- {ways} ways of generating are compared with reading each text at once, as in
  [ways of generating](generation.md).
- With the memory disabled, logits must be the plain backbone's bit for bit; with it, they must be others.
- The model is saved and loaded, and must give the same logits bit for bit.

This shows that the code is right on a type, and nothing of what a memory learns on it.

| outcome | types | |
| --- | ---: | --- |
{counts}

Cells: `=` is exact and `~` is rounding. `b`: the plain backbone differs from itself, and with a memory the difference
is at most twice as large. `r`: refused; the plain backbone does not support it either (errors below).

{table}

Causes of `b`: relatives of RoBERTa count positions from the pad's id on, but `generate` gives them from 0. Decoders of
encoder-decoder models take no positions, so pads count. bamba and jamba differ from themselves by 0.1 and more where
they read on by several tokens, gemma4_text by rounding. moshi differs with every cache.

What was refused in these cells:

{refusals}
{others}"""


def read_rows() -> list[Row]:
    """Returns the rows of the last sweep, in the order of Transformers' mapping."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def count(rows: list[Row], *outcomes: str) -> int:
    """Returns the number of types with one of the outcomes."""
    return sum(row.outcome in outcomes for row in rows)


def sentence(rows: list[Row]) -> str:
    """Returns what README and docs/generation.md say of the sweep."""
    works, refused = count(rows, "exact", "backbone's"), count(rows, "refused")
    return (
        f"Of the {len(rows)} causal model types of transformers {rows[0].transformers}, {works} work with a memory, "
        f"{refused} are refused when it is put in, and {len(rows) - works - refused} could not be built"
    )


def page(rows: list[Row]) -> str:
    """Returns the text of the page."""
    works = [row for row in rows if row.outcome in ("exact", "backbone's")]
    table = [f"| | {' | '.join(MODES)} |", "| --- |" + " :-: |" * len(MODES)]
    table += [f"| {row.type} | {' | '.join(SYMBOLS[row.modes[mode]] for mode in MODES)} |" for row in works]
    sections = [(outcome, [row for row in rows if row.outcome == outcome and row not in works]) for outcome in OUTCOMES]
    return TEXT.format(
        version=rows[0].transformers,
        ways=len(MODES),
        counts="\n".join(f"| {outcome} | {count(rows, outcome)} | {said} |" for outcome, said in OUTCOMES.items()),
        table="\n".join(table),
        refusals=_listed([row for row in works if row.said]),
        others="".join(f"\n## {name[0].upper()}{name[1:]}\n\n{_listed(found)}\n" for name, found in sections if found),
    )


def _listed(rows: list[Row]) -> str:
    """Returns types with what was said of them, as a list in Markdown."""
    return "\n".join(f"- {row.type}: {row.said.replace('<', '&lt;')}" for row in rows)
