"""The sweep over all causal types of Transformers: its page, and that its checks find what is wrong.

Run: pytest tests/integration/test_sweep.py (all types: make sweep)
"""

import copy
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engram_transformers import EngramForCausalLM
from engram_transformers.cache_engram import EngramCacheLayer
from engram_transformers.layer_engram import EngramLayer
from tests.sweep import __main__ as sweep
from tests.sweep import check
from tests.sweep.check import MODES, OUTCOMES, checked
from tests.sweep.page import PAGE, page, read_rows, sentence


ROOT = Path(__file__).parents[2]
ROWS = {row.type: row for row in read_rows()}
VERSION = next(iter(ROWS.values())).transformers


def test_the_page_is_made_of_the_results():
    assert PAGE.read_text(encoding="utf-8") == page(list(ROWS.values()))


def test_every_type_of_the_locked_version_has_a_row():
    locked = re.findall(r"^transformers==(\S+)", (ROOT / "requirements" / "lock.txt").read_text(), re.MULTILINE)
    assert {row.transformers for row in ROWS.values()} == {VERSION} and VERSION in locked, "run `make sweep`"
    if transformers.__version__ == VERSION:
        assert list(ROWS) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_no_row_fails_and_each_says_why_it_is_not_exact():
    for row in ROWS.values():
        assert row.outcome in set(OUTCOMES) - {"fails"}, row
        assert set(row.modes) == (set(MODES) if row.outcome in ("exact", "backbone's") else set()), row
        assert row.said or {"exact", "rounding", "backbone's"} >= set(row.modes.values()) != set(), row


@pytest.mark.parametrize("path", ["README.md", "docs/generation.md"])
def test_the_counts_on_other_pages_are_those_of_the_results(path):
    text = " ".join((ROOT / path).read_text(encoding="utf-8").split())
    assert sentence(list(ROWS.values())) in text


@pytest.mark.parametrize("model_type", ["opt", "blt"])
def test_a_type_gives_its_row_again(model_type):
    found, row = checked(model_type), ROWS[model_type]
    assert row.outcome == {"opt": "exact", "blt": "refused"}[model_type]
    assert (found.outcome, found.modes, found.said) == (row.outcome, row.modes, row.said)


def memory_that_adds_nothing(patch):
    patch.setattr(EngramLayer, "forward", lambda self, stream, *given, **named: torch.zeros_like(stream))


def memory_that_is_not_disabled(patch):
    patch.setattr(EngramForCausalLM, "disable_memory", lambda self: nullcontext())


def classes_forgotten(patch):
    patch.setattr(EngramCacheLayer, "recent_classes", lambda self, classes: None)


def other_weights_loaded(patch):
    def loaded(model):
        model = copy.deepcopy(model)
        model.memory.layers["0"].key_value.weight.zero_()
        return model

    patch.setattr(check, "_saved_and_loaded", loaded)


def error_from_elsewhere(patch):
    def fails(*given, **named):
        raise ValueError("not Engram's own")

    patch.setattr(EngramForCausalLM, "from_backbone", fails)


BREAKS = {
    memory_that_adds_nothing: "the memory changes nothing",
    memory_that_is_not_disabled: "with its memory disabled, it differs from the plain backbone",
    classes_forgotten: "greedy: ",
    other_weights_loaded: "saved and loaded, it gives other logits",
    error_from_elsewhere: "ValueError: not Engram's own",
}


@pytest.mark.parametrize("plant", BREAKS, ids=lambda plant: plant.__name__)
def test_a_planted_break_fails(plant, monkeypatch):
    monkeypatch.setattr(check, "MODES", ("greedy",))
    plant(monkeypatch)
    row = checked("llama")
    assert row.outcome == "fails" and BREAKS[plant] in row.said


@pytest.mark.slow  # starts processes, which import everything
def test_a_type_that_hangs_or_takes_too_much_memory_does_not_end_the_sweep(monkeypatch):
    assert sweep.row_of("blt").outcome == "refused", "control"
    monkeypatch.setattr(sweep, "BYTES", 1 << 20)
    assert sweep.row_of("blt").outcome in ("fails", "not built")
    monkeypatch.setattr(sweep, "SECONDS", 0)
    assert sweep.row_of("blt").said == "it takes more than 0 seconds"
