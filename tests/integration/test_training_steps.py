"""The benchmark of a training step: every way trains what it says on the same tokens, a process ends with its run, and
what is counted (touched values, bytes of optimizer state) is exact.

Nothing is asserted of a time. Not run here: engram-peft's side, which pip has to install.
Run: pytest tests/integration/test_training_steps.py
"""

import json

import pytest
import torch

from benchmarks import grafts, publish, training, training_side
from benchmarks.command import CannotMeasure
from benchmarks.training_side import Peak, Trainee, anonymous, tensors_of


BATCH, LENGTH = 2, 16


@pytest.fixture
def job(tmp_path, donor) -> dict:
    """What a process is told."""
    graft = grafts.filled_graft(donor, tmp_path / "graft", [1, 2], 50, 4, "float32")
    ids = torch.randint(3, 4104, (1, 3 * BATCH * LENGTH), generator=torch.Generator().manual_seed(0))
    sizes = {"threads": 1, "batch": BATCH, "length": LENGTH, "lora_rank": 2, "placement": "device", "bf16": False}
    return {**sizes, "donor": str(donor), "graft": str(graft), "ids": ids.tolist()}


LEARNS = {
    "full": {"donor"},
    "lora": {"lora"},
    "memory": {"tables", "layers"},
    "both": {"tables", "layers", "lora"},
}


def kind_of(name: str) -> str:
    """Which of four kinds a weight is, by its name."""
    for kind, mark in (("lora", "lora_"), ("tables", "memory.tables."), ("layers", "memory.layers.")):
        if mark in name:
            return kind
    return "donor"


@pytest.mark.parametrize("way", LEARNS)
def test_a_way_trains_what_it_says(way, job):
    trainee = Trainee(way, job)
    before = {name: tensor.clone() for name, tensor in trainee.model.state_dict().items()}
    losses = [trainee.step()["loss"] for _ in range(2)]
    after = trainee.model.state_dict()
    changed = {kind_of(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == LEARNS[way]
    assert losses[0] != losses[1], "the second step has other tokens"
    assert trainee.about()["steps"] == 2 and trainee.about()["peak_anonymous"] > 0


def test_ways_without_a_memory_begin_with_one_loss(job):
    first = {way: Trainee(way, job).step()["loss"] for way in ("full", "lora")}
    assert first["full"] == pytest.approx(first["lora"], abs=1e-5)  # a fresh LoRA adds nothing; float32


def test_the_state_of_the_optimizer_is_counted_to_the_byte(job):
    whole = Trainee("full", job)
    whole.step()
    parameters = {id(p): p for p in whole.model.parameters()}.values()
    moments = 2 * sum(p.nbytes for p in parameters)
    assert whole.about()["state_bytes"] == moments + 4 * len(parameters)  # and one step count of 4 bytes each
    rows = Trainee("memory", job)
    rows.step()
    tables = sum(p.nbytes for p in rows.model.memory.tables.parameters())
    assert 0 < rows.about()["state_bytes"] < moments, "control: of rows that were touched alone"
    assert tables > 0
    nest = {"a": [torch.zeros(3), {"b": torch.zeros(2, dtype=torch.float64)}], "c": 7}
    assert sum(tensor.nbytes for tensor in tensors_of(nest)) == 3 * 4 + 2 * 8


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_the_values_that_a_first_update_touches_are_those_of_the_rows_that_were_read(placement, job):
    trainee = Trainee("memory", {**job, "placement": placement})
    assert trainee.model.memory.placement == placement
    found = trainee.first_step()
    memory = trainee.model.memory
    ids = trainee.batches[0]
    rows = memory.hashing.rows_of_classes(
        memory.hashing.compress(ids, None), None
    )  # (layers, batch, length, orders, heads)
    heads = rows.permute(0, 3, 4, 1, 2).flatten(0, 2)  # (layers * orders * heads, batch, length)
    expected = 4 * sum(len(torch.unique(read)) for read in heads)
    assert found["touched_values"] == expected
    assert set(found) == {"more", "most", "touched_values"}


def test_private_memory_is_seen_where_it_is_taken():
    before = anonymous()
    with Peak() as peak:
        taken = torch.ones(16 << 20)  # 64 MiB
    assert peak.bytes - before > 60 << 20
    assert taken.nbytes == 64 << 20


class Inside:
    """A `Side` that trains in the test's own process: another one takes seconds to start."""

    def __init__(self, way, job, place, python=None, allocator=None):
        self.job, self.way = json.loads(json.dumps(job)), way

    def ask(self, what: str) -> dict:
        return getattr(self.trainee, what)()

    def answer(self) -> None:
        self.trainee = Trainee(self.way, self.job)

    def end(self) -> None:
        del self.trainee


def test_all_ways_places_and_sizes_are_measured_and_shown(donor, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "Side", Inside)
    places = {"donor": donor, "work": tmp_path / "work", "results": tmp_path / "results"}
    given = [text for name, path in places.items() for text in (f"--{name}", str(path))]
    given += ["--threads", "1", "--rounds", "2", "--layers", "1,2", "--rows", "50", "--head-dim", "4", "--width", "4"]
    given += ["--sizes", "1000,3000", "--batch", str(BATCH), "--length", str(LENGTH), "--lora-rank", "2"]
    line = training.main([*given, "--float32", "--without-peer"])
    assert [json.loads(text) for text in capsys.readouterr().out.splitlines()] == [line]
    assert list((tmp_path / "work").iterdir()) == []
    measured = line["measured"]
    assert set(measured["ways"]) == set(training.WAYS)
    assert measured["ways"]["full"]["times_full"]["median"] == 1 == measured["ways"]["lora"]["times_lora"]["median"]
    assert measured["ways"]["full"]["state_bytes"] > measured["ways"]["memory"]["state_bytes"] > 0
    assert all(entry["seconds"]["rounds"] == 2 and entry["steps"] == 3 for entry in measured["ways"].values())
    assert all(measured["sizes"][str(size)]["rows"] >= size // 32 * 32 for size in (1000, 3000))
    assert measured["sizes"]["1000"]["times_the_smallest"]["median"] == 1
    assert set(measured["first_step"]) == {"device", "cpu", "disk"}
    for entry in measured["first_step"].values():
        assert entry["allowed"] == (64 << 20) + 16 * entry["touched_values"] > 64 << 20
    page = "".join(f"{publish.FIRST.format(name=n)}{publish.LAST.format(name=n)}" for n in publish.FIGURES)
    text, missing = publish.with_figures(page, tmp_path / "results")
    assert missing == ["domain"]
    assert "all weights, AdamW" in text and "engram-peft was not measured: it was left out" in text


def test_a_side_takes_steps_in_a_process_of_its_own_and_ends(job, tmp_path):
    side = training.Side("memory", job, tmp_path)
    try:
        assert side.answer() == {"ready": "memory"}
        assert side.ask("step")["loss"] == pytest.approx(Trainee("memory", job).step()["loss"], abs=1e-5)
    finally:
        side.end()
    assert side.process.poll() is not None


def test_a_side_that_fails_says_why_and_ends(job, tmp_path):
    refuses = tmp_path / "python"
    refuses.write_text("#!/bin/sh\necho no such module: $2 >&2\n")
    refuses.chmod(0o755)
    side = training.Side("memory", job, tmp_path, refuses)
    with pytest.raises(CannotMeasure, match=r"training memory failed:\nno such module: benchmarks.training_side"):
        side.ask("step")
    side.end()
    assert side.process.poll() is not None


def test_their_side_imports_nothing_of_ours_at_the_top():
    text = (training.ROOT / "benchmarks" / "training_side.py").read_text(encoding="utf-8")
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert imports and not [line for line in imports if "engram_transformers" in line]
    assert "    from engram_transformers.training import" in text, "control: where ours is made"
    assert set(training_side.WAYS) == {*(kind for kind, _ in training.WAYS.values()), "theirs"}
