"""Checkpoints of EngramTrainer: a run that trains the memory alone saves what changed, goes on bit for bit wherever the
tables are, also after it was killed in the middle of a save; the best one comes back; another memory's is refused; what
a folder held before is not taken for what was saved into it.

Run: pytest tests/integration/test_trainer_checkpoints.py
"""

import errno
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from engram_transformers import EngramFormatError, EngramTrainer
from engram_transformers.adapters.memory_delta import DELTA_NAME, read_delta_header
from engram_transformers.training import EngramTrainingArguments
from engram_transformers.training.trainer import bring_unknown_files, last_whole_checkpoint

from ..tiny import engram_on
from .placed import loaded


PLACES = ("device", "cpu", "disk")
STEPS = 6


def texts() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 300, (24, 20), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": text, "labels": text} for text in ids]


@pytest.fixture(scope="module")
def dataset():
    return texts()


def arguments(folder, **changes) -> EngramTrainingArguments:
    settings = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return EngramTrainingArguments(str(folder), **{**settings, **changes})


def train(model, dataset, folder, resume=None, callbacks=(), **changes) -> EngramTrainer:
    trainer = EngramTrainer(
        model, arguments(folder, **changes), train_dataset=dataset, eval_dataset=dataset[:4], callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def run(saved, dataset, tmp_path_factory) -> tuple[Path, dict]:
    """Folder of a whole run with the tables among the parameters, and the state that it ended with."""
    folder = tmp_path_factory.mktemp("run")
    model = loaded(saved)
    train(model, dataset, folder)
    return folder, state(model)


def test_a_checkpoint_holds_what_changed_and_names_its_graft(run, saved):
    folder, ended = run
    checkpoint = folder / f"checkpoint-{STEPS}"
    names = {path.name for path in checkpoint.iterdir()}
    assert DELTA_NAME in names and "config.json" in names
    assert not [name for name in names if name.endswith(".safetensors") and name != DELTA_NAME]
    header = read_delta_header(checkpoint)
    assert header.base == str(saved.resolve())
    changed = {name for name, tensor in loaded(saved).state_dict().items() if not torch.equal(tensor, ended[name])}
    assert set(header.rows) == {name for name in changed if ".tables." in name}
    for name, count in header.rows.items():
        assert count == int((loaded(saved).state_dict()[name] != ended[name]).any(1).sum())
    assert same(state(AutoModelForCausalLM.from_pretrained(checkpoint)), ended)
    assert not [name for name in changed if name.startswith("backbone.")]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_bit_for_bit(place, run, saved, dataset, tmp_path):
    folder, ended = run
    whole = loaded(saved, place)
    train(whole, dataset, tmp_path / "whole", save_strategy="no")
    assert same(state(whole), ended), "control: training does the same wherever the tables are"
    model = loaded(saved, place)
    trainer = train(model, dataset, tmp_path / "again", resume=str(folder / "checkpoint-2"))
    assert model.memory.placement == place
    assert trainer.state.log_history[-1]["step"] == STEPS
    assert same(state(model), ended)


@pytest.mark.parametrize("place", ["device", "disk"])
def test_a_run_that_trains_everything_goes_on_bit_for_bit(place, saved, dataset, tmp_path):
    model = loaded(saved).set_trainable("all")
    train(model, dataset, tmp_path / "run")
    ended = state(model)
    before = loaded(saved).state_dict()
    assert not torch.equal(ended["backbone.lm_head.weight"], before["backbone.lm_head.weight"]), "control"
    again = loaded(saved, place).set_trainable("all")
    train(again, dataset, tmp_path / "again", resume=str(tmp_path / "run" / "checkpoint-4"))
    assert same(state(again), ended)
    assert same(state(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{STEPS}")), ended)


@pytest.mark.parametrize("mode", ["memory", "all"])
@pytest.mark.parametrize("place", PLACES)
def test_the_best_checkpoint_comes_back(place, mode, saved, dataset, tmp_path):
    kept = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state_, control, metrics, **kwargs):
            kept[metrics["eval_loss"]] = state(model)

    model = loaded(saved, place).set_trainable(mode)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # A rate that makes it worse from some step on; whichever is best must come back.
    settings |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    train(model, dataset, tmp_path, callbacks=[Keep()], **settings)
    assert len(kept) == 3
    assert same(state(model), kept[max(kept)])
    assert not same(kept[max(kept)], kept[min(kept)]), "control: the last one would be another"


def test_arguments_reach_the_optimizer(saved, dataset, tmp_path):
    model = loaded(saved)
    settings = {"table_lr_multiplier": 7.0, "table_optimizer": "adagrad", "l2_sp": 0.01, "weight_decay": 0.1}
    trainer = train(model, dataset, tmp_path, save_strategy="no", lr_scheduler_type="constant", **settings)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert groups["tables"]["lr"] == pytest.approx(7e-2) and groups["projections"]["lr"] == 1e-2
    assert (groups["tables"]["l2_sp"], groups["tables"]["weight_decay"]) == (0.01, 0.0)
    assert groups["projections"]["weight_decay"] == 0.1
    assert groups["tables"]["table_optimizer"] == "adagrad"


def test_the_memory_alone_is_trained_unless_told_otherwise(saved, dataset, tmp_path, caplog):
    model = loaded(saved)
    train(model, dataset, tmp_path, save_strategy="no", max_steps=1)
    assert "training the memory alone" in caplog.text
    assert model.config.engram_trainable == "memory"
    caplog.clear()
    train(model.set_trainable("tables"), dataset, tmp_path, save_strategy="no", max_steps=1)
    assert "training the memory alone" not in caplog.text and model.config.engram_trainable == "tables"


# Interrupted saves.


# A process of its own, which forks for each run: imports are paid for once.
CHILD = """
import os, sys, torch
from tests.integration.test_trainer_checkpoints import KILLED_IN, EngramTrainer, loaded, texts, train
from engram_transformers.adapters import memory_delta

saved, *runs = sys.argv[1:]
torch.set_num_threads(1)
for folder, killed_in in zip(runs[::2], runs[1::2]):
    if os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7, killed_in
        continue
    place, name = KILLED_IN[killed_in]
    holder = memory_delta if place == "module" else EngramTrainer
    real, seen = getattr(holder, name), []

    def die(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            os._exit(7)
        return real(*args, **kwargs)

    setattr(holder, name, die)
    train(loaded(saved), texts(), folder)
    os._exit(0)
"""
KILLED_IN = {
    "delta": ("module", "save_memory_delta"),
    "optimizer": ("class", "_save_optimizer_and_scheduler"),
    "random states": ("class", "_save_rng_state"),
}


@pytest.fixture(scope="module")
def killed(run, saved, tmp_path_factory) -> dict[str, Path]:
    """Folders of runs that died in the middle of their second checkpoint; "again" held those of a whole run."""
    folders = {name: tmp_path_factory.mktemp("killed") / "run" for name in (*KILLED_IN, "again")}
    shutil.copytree(run[0], folders["again"])
    asked = [(str(folder), "random states" if name == "again" else name) for name, folder in folders.items()]
    command = [sys.executable, "-c", CHILD, str(saved), *itertools.chain(*asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", KILLED_IN)
def test_a_run_killed_in_a_save_goes_on_from_the_last_whole_checkpoint(
    killed_in, killed, run, saved, dataset, tmp_path, caplog
):
    shutil.copytree(killed[killed_in], tmp_path, dirs_exist_ok=True)
    there = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert there == ["checkpoint-2", "checkpoint-4"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4' was not written to its end" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-4' is not a whole checkpoint.*last whole one"):
        train(loaded(saved), dataset, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    model = loaded(saved)
    train(model, dataset, tmp_path, resume=True)
    assert same(state(model), run[1])
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")


def test_a_full_disk_leaves_the_older_checkpoints_whole(run, saved, dataset, tmp_path, monkeypatch):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EngramTrainer, "_save_rng_state", full)
        with pytest.raises(OSError, match="No space left"):
            train(loaded(saved), dataset, tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    model = loaded(saved)
    train(model, dataset, tmp_path, resume=True)
    assert same(state(model), run[1])


@pytest.mark.slow
def test_a_checkpoint_that_is_saved_again_counts_as_half_written_until_it_is_whole(killed, tmp_path):
    shutil.copytree(killed["again"], tmp_path, dirs_exist_ok=True)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2"), (
        "checkpoint-4 was written anew, and not to its end"
    )


def test_no_whole_checkpoint_is_an_error(saved, dataset, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        train(loaded(saved), dataset, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="checkpoint-4' is not a folder"):
        train(loaded(saved), dataset, tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_another_memory_is_refused(run, tiny_engram, dataset, tmp_path):
    tiny_engram(trained=True, engram_seed=9).save_pretrained(tmp_path / "other")
    model = loaded(tmp_path / "other")
    before = state(model)
    with pytest.raises(EngramFormatError, match="another memory"):
        train(model, dataset, tmp_path, resume=str(run[0] / "checkpoint-2"))
    assert same(state(model), before)


def test_a_memory_without_a_file_is_saved_whole(tiny_engram, dataset, tmp_path):
    model = tiny_engram(trained=True)
    train(model, dataset, tmp_path)
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert not (checkpoint / DELTA_NAME).exists()
    assert same(state(loaded(checkpoint)), state(model))
    assert json.loads((checkpoint / "config.json").read_text())["engram_trainable"] == "memory"


# Folders that hold something already.


@pytest.mark.parametrize("place", ["device", "disk"])
def test_a_memory_that_is_saved_over_its_graft_comes_back(place, saved, dataset, tmp_path):
    graft = tmp_path / "graft"
    shutil.copytree(saved, graft)
    (graft / "notes.txt").write_text("not ours")
    untrained = state(loaded(graft))
    model = loaded(graft, place)
    train(model, dataset, tmp_path / "run", save_strategy="no").save_model(graft)
    assert not same(state(model), untrained), "control"
    assert same(state(loaded(graft)), state(model))
    assert (graft / "notes.txt").read_text() == "not ours"
    model = loaded(graft, place)
    train(model, dataset, graft, save_steps=STEPS)  # the run's folder is the graft's
    assert not (graft / f"checkpoint-{STEPS}" / DELTA_NAME).exists(), "a later save_model() replaces its graft"


@pytest.mark.parametrize("modes", [("memory", "all"), ("all", "memory")])
def test_a_run_in_the_folder_of_an_earlier_one_loads_and_resumes_its_own_checkpoints(modes, saved, dataset, tmp_path):
    ended = []
    for number, mode in enumerate(modes):
        model = loaded(saved).set_trainable(mode)
        train(model, dataset, tmp_path, learning_rate=1e-2 / (number + 1), max_steps=2).save_model()
        ended.append(state(model))
    assert not same(*ended), "control"
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert same(state(loaded(folder)), ended[1])
    model = loaded(saved).set_trainable(modes[1])
    train(model, dataset, tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=2)
    assert same(state(model), ended[1])


def test_a_save_that_fails_gives_an_earlier_runs_checkpoint_back(run, saved, dataset, tmp_path, monkeypatch):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EngramTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        train(loaded(saved), dataset, tmp_path, learning_rate=1e-3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == earlier
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]


def test_a_save_into_the_folder_that_the_model_reads_from_counts_as_half_written_until_it_ends(
    saved, dataset, tmp_path, monkeypatch
):
    folder = tmp_path / "checkpoint-2"
    loaded(saved).save_pretrained(folder)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    assert last_whole_checkpoint(tmp_path) == str(folder)  # the control

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(EngramTrainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(AutoModelForCausalLM.from_pretrained(folder), dataset, tmp_path)
    assert last_whole_checkpoint(tmp_path) is None


def test_adapters_in_subfolders_leave_the_folder_of_their_base_as_it_is(saved, tmp_path):
    base, checkpoint = tmp_path / "base", tmp_path / "base" / "checkpoint-2"
    shutil.copytree(saved, base)
    (checkpoint / "other").mkdir(parents=True)
    (checkpoint / "other" / "adapter_config.json").write_text("{}")
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    bring_unknown_files(checkpoint, base)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["device", "disk"])
def test_a_run_from_a_checkpoint_in_its_own_folder_needs_none_that_trainer_deletes(place, saved, dataset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoint-1")  # whole, as a run that trains everything leaves it
    model = loaded(run / "checkpoint-1", place).set_trainable("memory")
    train(model, dataset, run, save_total_limit=1)
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"], "the control"
    assert same(state(loaded(run / f"checkpoint-{STEPS}")), state(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_come_back_around_tables_on_disk(tied, dataset, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    engram_on(LlamaConfig(vocab_size=4104, tie_word_embeddings=tied, **sizes)).save_pretrained(tmp_path / "graft")
    model = loaded(tmp_path / "graft", "disk").set_trainable("all")
    best = {"eval_strategy": "steps", "eval_steps": STEPS, "save_steps": STEPS, "load_best_model_at_end": True}
    train(model, dataset, tmp_path / "run", **best)
    ended = state(model)
    weights = model.backbone.get_input_embeddings().weight, model.backbone.get_output_embeddings().weight
    assert (weights[0] is weights[1]) == tied
    again = loaded(tmp_path / "graft", "disk").set_trainable("all")
    train(again, dataset, tmp_path / "run", resume=str(tmp_path / "run" / f"checkpoint-{STEPS}"))
    assert same(state(again), ended)
