"""EngramTrainer in two processes: the same training wherever tables are, one writer, bit-equal resuming, evaluation.

The control is EngramTrainer in one process with the doubled batch.
Run: pytest tests/integration/test_processes_trainer.py
"""

import pytest
import torch
import torch.distributed as dist

from engram_transformers import EngramForCausalLM
from engram_transformers.training import shard_tables
from engram_transformers.training import trainer as training_trainer

from .launched import PIECES, STEPS, dataset, trainer
from .process_models import assert_close, assert_same, small_model, texts, weights


CLOSE = 1e-6  # weights after three steps, whose gradients differ by 1e-8


def run(folder: str, graft: str, placement: str, batch: int, word: str = "all"):
    """Weights and log of a run."""
    model = EngramForCausalLM.from_pretrained(graft, engram_placement=placement)
    held = trainer(batch, folder, model=model, trainable=word)
    held.train()
    return weights(model), held.state.log_history


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_two_processes_train_as_one_wherever_tables_are(pair, graft, tmp_path, placement):
    alone, log = run(str(tmp_path / "alone"), graft, placement, 4)
    (first, first_log), (second, _) = pair.run(run, str(tmp_path / "two"), graft, placement, 2)
    assert_same(first, second)
    assert_close(first, alone, CLOSE)
    losses, norms = ([entry[name] for entry in log if name in entry] for name in ("loss", "grad_norm"))
    assert [entry["loss"] for entry in first_log if "loss" in entry] == pytest.approx(losses, abs=1e-4)
    assert [entry["grad_norm"] for entry in first_log if "grad_norm" in entry] == pytest.approx(norms, rel=1e-4)
    start = weights(small_model())
    assert all(not torch.equal(alone[name], start[name]) for name in start if ".tables." in name), "control"


@pytest.mark.parametrize("placement", ["device", "disk"])
def test_tables_alone_are_trained_as_well(pair, graft, tmp_path, placement):
    alone, _ = run(str(tmp_path / "alone"), graft, placement, 4, "tables")
    (first, _), (second, _) = pair.run(run, str(tmp_path / "two"), graft, placement, 2, "tables")
    assert_same(first, second)
    assert_close(first, alone, CLOSE)
    start = weights(small_model())
    moved = {name for name in start if not torch.equal(alone[name], start[name])}
    assert moved == {name for name in start if ".tables." in name}


def run_memory(folder: str, graft: str, placement: str, resume: str | None, steps: int):
    """A run of the memory alone that saves, evaluates, and takes the best at the end."""
    model = EngramForCausalLM.from_pretrained(graft, engram_placement=placement)
    held = trainer(
        2,
        folder,
        model=model,
        trainable="memory",
        max_steps=steps,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
        evaluated=dataset(6),
        data=dataset(48),
    )
    held.train(resume_from_checkpoint=resume)
    return weights(model), [entry["eval_loss"] for entry in held.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("placement", ["device", "disk"])
def test_resuming_in_two_processes_is_bit_equal(pair, graft, tmp_path, placement):
    folder = tmp_path / "run"
    (whole, losses), (same, same_losses) = pair.run(run_memory, str(folder), graft, placement, None, 4)
    assert_same(whole, same)
    assert losses == same_losses, "every process is told the mean over all of them"
    checkpoint = folder / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} >= {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"}
    again = pair.run(run_memory, str(tmp_path / "again"), graft, placement, str(checkpoint), 4)
    for resumed, _ in again:
        assert_same(resumed, whole)
    halfway, _ = pair.run(run_memory, str(tmp_path / "half"), graft, placement, None, 2)[0]
    assert any(not torch.equal(halfway[name], whole[name]) for name in whole), (
        "control: the steps after it changed something"
    )


def evaluate(graft: str) -> float:
    # Two whole batches of 8: over several processes Trainer counts the loss of a shorter one as much.
    held = trainer(2, "unused", model=EngramForCausalLM.from_pretrained(graft), evaluated=dataset(16))
    return held.evaluate()["eval_loss"]


def test_an_evaluation_over_two_processes_is_that_of_one(pair, graft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pair.run(evaluate_in, str(tmp_path), graft) == [pytest.approx(evaluate(graft), abs=1e-5)] * 2


def evaluate_in(folder: str, graft: str) -> float:
    import os

    before = os.getcwd()
    os.chdir(folder)
    try:
        return evaluate(graft)
    finally:
        os.chdir(before)


def run_apart(folder: str, graft: str) -> None:
    """A run whose ranks are told other folders, so that it is seen who writes what."""
    run_memory(f"{folder}/rank{dist.get_rank()}", graft, "device", None, 2)


def test_one_process_writes_checkpoints(pair, graft, tmp_path):
    pair.run(run_apart, str(tmp_path), graft)
    written = {path.name for path in (tmp_path / "rank0" / "checkpoint-2").iterdir()}
    assert written > {"trainer_state.json", "optimizer.pt", "rng_state_0.pth"}
    others = {path.name for path in (tmp_path / "rank1").rglob("*") if path.is_file()}
    assert others <= {"rng_state_1.pth"}


def train_sharded(folder: str, graft: str) -> str:
    model = shard_tables(EngramForCausalLM.from_pretrained(graft, engram_placement="disk"))
    with pytest.raises(ValueError) as error:
        trainer(2, folder, model=model)
    return str(error.value)


def test_tables_sharded_by_row_are_refused(pair, graft, tmp_path):
    assert all("save_sharded" in said for said in pair.run(train_sharded, str(tmp_path), graft))


def exchanges(graft: str) -> list[list[int]]:
    """At each exchange, how many rows part by part have a gradient, and those of all batches since the last step."""
    model = EngramForCausalLM.from_pretrained(graft, engram_placement="disk")
    held = trainer(2, "unused", model=model)
    parts = list(model.memory.named_parts().values())
    before, after, plain = [], [], training_trainer.sync_row_gradients

    def counting(trained):
        before.append([len(part.grad.rows) for part in parts])
        plain(trained)
        after.append([len(part.grad.rows) for part in parts])

    training_trainer.sync_row_gradients = counting
    try:
        held.train()
    finally:
        training_trainer.sync_row_gradients = plain
    return before, after


def test_rows_are_exchanged_once_a_step_and_dropped_after_it(pair, graft):
    (before, after), (other, same) = pair.run(exchanges, graft)
    assert len(before) == len(other) == STEPS, f"{STEPS} steps of {PIECES} batches"
    assert after == same
    most = 2 * PIECES * texts().shape[1] * 2  # rows that two texts of each batch can read with two heads
    for own, theirs, both in zip(before, other, after, strict=True):
        for a, b, union in zip(own, theirs, both, strict=True):
            assert max(a, b) < union <= a + b
            assert max(a, b) <= most, "none is left of the step before: DDP's zero_grad does not reach these parts"
