"""What docs/foreign-tests.md says: it holds every entry of the list, and its claims about stock models are true.

Run: pytest tests/foreign/test_reasons.py
"""

from pathlib import Path

import pytest
import torch

from ..integration.backbones import BACKBONES
from .__main__ import met
from .explained import EXPLAINED
from .outcomes import CASES, Outcome
from .report import page


PAGE = Path(__file__).parents[2] / "docs" / "foreign-tests.md"


def test_the_page_holds_every_entry_and_no_other():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `test_")]
    assert [line.split("`")[1] for line in lines] == list(EXPLAINED)
    for line, reason in zip(lines, EXPLAINED.values(), strict=True):
        assert line.endswith(f"{reason.word} | {reason.why} |")


def test_a_stock_deepseek_v4_cannot_be_called_in_float16(tiny_donor, tmp_path):
    """Why its tests in float16 fail with a memory, where they are run, and are skipped without one."""
    donor, ids = tiny_donor(BACKBONES["deepseek_v4"]()), torch.tensor([[3, 4, 5]])
    donor.save_pretrained(tmp_path)
    half = type(donor).from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="same dtype, but got: c10::Half != float"):
        half(ids)
    wide = type(donor).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert wide(ids).logits.isfinite().all()  # the control


def test_a_page_is_written_from_a_run():
    counts, cases = {"passed": 1, "skipped": 2}, [name for case in CASES for name in case]
    outcomes = {name: dict.fromkeys(["test_resize_tokens_embeddings"], Outcome("passed")) for name in cases}
    outcomes[CASES[0].engram]["test_resize_tokens_embeddings"] = Outcome("failed", ("shrink",))
    found = met(outcomes)
    assert found["test_resize_tokens_embeddings"] == {"cases": [CASES[0].engram], "stock": ["passed"]}
    summary = {"transformers": "1.2", "accelerate": "3.4", "executed": 555, "least": 150, "calls": 186}
    tables = {"counts": dict.fromkeys(cases, counts), "explained": found, "plain": counts, "hooked": counts}
    text = page({**summary, **tables})
    assert "555 of its tests were executed" in text
    assert text.count("| LlamaModel | 1 | 0 | 2 | 1 | 0 | 2 |") == 1
    assert "| `test_resize_tokens_embeddings` | LlamaModel | passed, failed |" in text
