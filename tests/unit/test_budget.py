"""Budgets: the paper's own give back its own splits, and what a split needs follows from its numbers.

Run: pytest tests/unit/test_budget.py
"""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engram_transformers.conversion import Budget
from engram_transformers.conversion.budget import parse_parameters
from engram_transformers.conversion.cli import app


ROOT = Path(__file__).parents[2]


def engram(command: str):
    return CliRunner().invoke(app, command.split())


# Totals and what is used are rounded to 0.1 billion in the paper, so the tables come out to 2 %.
@pytest.mark.parametrize(
    ("total", "share", "rows", "values"), [(26.7e9, 0.743, 2_262_400, 5.79e9), (39.5e9, 0.477, 7_239_680, 18.53e9)]
)
def test_the_papers_budgets_give_its_memories(total, share, rows, values):
    budget = Budget(int(total), int(3.8e9), share)
    assert budget.memory == pytest.approx(values, rel=0.02)
    assert budget.rows_of_a_head == pytest.approx(rows, rel=0.02)


@pytest.mark.parametrize(("experts", "share", "left"), [(72, 0.743, 55), (106, 0.40, 46), (99, 0.40, 43), (106, 0, 6)])
def test_the_papers_shares_leave_its_numbers_of_experts(experts, share, left):
    assert Budget(10**10, 10**9, share).experts_left(experts, 6) == left


def test_what_a_split_needs_follows_from_its_numbers():
    budget = Budget(8 * 10**9, 10**9, 0.75, layers=3, n_heads=4, head_dim=33, max_ngram_size=4)
    assert (budget.spare, budget.memory, budget.reads) == (7 * 10**9, 1_750_000_000, 36)
    assert budget.rows_of_a_head == 1_750_000_000 // (36 * 33)
    assert budget.row_bytes == {"float32": 132, "bfloat16": 66, "float8_e4m3fn": 35}
    released = Budget(10**12, 10**10, 0.75, head_dim=256, max_ngram_size=4)
    assert released.row_bytes["float8_e4m3fn"] * released.reads == 12_672, "bytes that V4.1 reads for a token"


def test_the_command_prints_what_the_page_shows():
    page = (ROOT / "docs" / "grafting.md").read_text(encoding="utf-8")
    command, shown = re.search(r"```bash\nengram (budget .*)\n```\n\n```\n(.*?)```", page, re.DOTALL).groups()
    done = engram(command)
    assert done.exit_code == 0 and done.stdout == shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--total 8B --active 8B", "has none to spare"),
        ("--total much --active 1B", "'much' is not a number of parameters"),
        ("--total 8B --active 1B --rho 1", "rho 1.0 must be at least 0 and less than 1"),
        ("--total 8B --active 1B --layers 0", "layers=0 is too small"),
        ("--total 8B --active 1B --experts 8", "belong together"),
        ("--total 8B --active 1B --experts 8 --active-experts 8", "leave none to spare"),
        ("--total 8B --active 1B --tokens-per-second 0", "must be larger than 0"),
        ("--total 8K --active 7K", "are fewer than the 2,560 of a row in every head"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(options, says):
    done = engram(f"budget {options}")
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output


def test_numbers_of_parameters_are_read_as_people_write_them():
    texts = {"8B": 8 * 10**9, "568m": 568 * 10**6, "0.5T": 5 * 10**11, "1e9": 10**9, "12": 12}
    assert {text: parse_parameters(text) for text in texts} == texts


def test_other_sparsities_than_the_papers_are_named():
    assert "one parameter in 40 is used" in engram("budget --total 40B --active 1B").stdout
    assert "which the paper did not measure" not in engram("budget --total 10B --active 1B").stdout
