"""Every backbone in every way of generating: exact to 1e-5 in float32, or refused with an error.

A cell compares with the same texts read at once, alone, without a cache and without pads. Where that differs, the plain
backbone runs the same way as the control, and twice its own difference is allowed, in cells that matrix.py lists only.
A cell may also be off by rounding, which is measured for its texts, up to 1e-4: the gate is steep near 0. The memory is
random and its convolution not zero.
Run: pytest tests/integration/test_matrix.py
"""

import pytest
import torch

from engram_transformers.inspection import check_generation
from engram_transformers.inspection.generation import TOLERANCE
from engram_transformers.inspection.modes import MODES

from .matrix import BACKBONES_OWN, REFUSALS, ROWS, engram_on, page


# One of each kind: full attention, windows, latent attention, learned positions, convolutions. The others are slow.
CORE = {"llama", "gemma3", "deepseek_v3", "gpt2", "lfm2"}
assert set(ROWS) >= CORE


@pytest.mark.parametrize(
    "backbone", [pytest.param(row, marks=pytest.mark.core if row in CORE else pytest.mark.slow) for row in ROWS]
)
def test_every_way_is_exact_or_refused(backbone):
    report = check_generation(engram_on(ROWS[backbone]()))
    assert not report.stood_in, "the memory must change what is generated"
    assert [result.mode for result in report.results] == [mode.name for mode in MODES]
    assert report.ok, str(report)
    for result in report.results:
        cell = backbone, result.mode
        if result.status == "exact":
            assert result.difference <= TOLERANCE and cell not in REFUSALS, result
        elif result.status == "rounding":
            assert result.difference <= 10 * TOLERANCE, result
        elif result.status == "backbone's":
            assert cell in BACKBONES_OWN, result
        elif result.status == "refused":
            assert REFUSALS.get(cell, "not listed") in result.detail, result
        else:
            assert result.status == "not run" and not torch.cuda.is_available(), result
    assert "WRONG" not in page({backbone: report})
