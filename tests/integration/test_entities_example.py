"""The example of entities runs from graft to report on a tiny model, with little text and its control.

Run: pytest tests/integration/test_entities_example.py
"""

import json

import pytest
from rich.progress import Progress

from examples.entities import __main__ as entities
from examples.entities.report import write_report
from examples.entities.settings import Settings


@pytest.fixture
def report(donor, tmp_path, monkeypatch) -> dict:
    """What a run of all steps found."""
    sizes = {"engram_layer_ids": [1, 2], "engram_vocab_size": 300, "engram_n_heads": 2, "engram_head_dim": 4}
    monkeypatch.setattr(entities, "MEMORY", {**entities.MEMORY, **sizes})
    settings = Settings(train_tokens=12_288, sample_tokens=512, passes=1, bf16=False)
    found = entities.run(donor, tmp_path / "out", settings, True, Progress(disable=True))
    return {**found, "donor": "a tiny model"}


def test_every_step_runs_and_the_memory_alone_changes_what_is_said(report, tmp_path):
    losses = report["losses"]
    for kind in ("recall", "held_out", "other_domain"):
        assert losses[kind]["memory_off"] == losses[kind]["before"], "the donor stays as it was, to the bit"
    assert losses["recall"]["after"] < losses["recall"]["before"]
    assert losses["recall"]["control"] not in (losses["recall"]["after"], losses["recall"]["before"])
    assert len(report["completions"]) == 10 and len(report["train_loss"]) == 1, "12 steps, each tenth is logged"
    assert {"graft", "train", "save", "reload_and_generate", "control"} <= report["seconds"].keys()
    write_report(tmp_path / "out", report)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["losses"] == losses
    assert "a tiny model" in (tmp_path / "out" / "report.md").read_text()
