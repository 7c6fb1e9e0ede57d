"""A model holds open files and mappings by the number of its checkpoint's files, not of its tensors: a table of many
parts must not run into the limits on descriptors (1024 by default) and mappings.

Run: pytest tests/integration/test_descriptors.py
"""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlamaConfig

from engram_transformers.adapters import load_memory_delta, save_memory_delta
from engram_transformers.files_safetensors_engram import read_index
from engram_transformers.rows_storage_engram import ShardFile
from engram_transformers.training.trainer import load_around_tables

from ..tiny import engram_on
from .placed import loaded, logits, repeating_texts
from .test_trainer_checkpoints import dataset, train  # noqa: F401


pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="descriptors are counted in /proc")

PARTS = 16  # of each of 2 layers and 2 orders: 64 tensors
FILES = 2  # of the checkpoint: the tables', and the others'


def held(folder: Path) -> int:
    """Files below a folder that this process has open, or its mappings of them, whichever are more."""
    gc.collect()
    names = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(link))
        except FileNotFoundError:  # that of the listing itself
            continue
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split(maxsplit=5)[-1] for line in lines]
    return max(sum(name.startswith(str(folder)) for name in kind) for kind in (names, mapped))


@pytest.fixture(scope="module")
def graft(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("descriptors") / "graft"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    engram_on(LlamaConfig(vocab_size=4104, **sizes), engram_table_parts=PARTS).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == FILES
    return folder


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_model_that_is_read_copied_and_moved_holds_files_and_not_tensors(place, graft):
    model = loaded(graft, place)
    logits(model, repeating_texts())
    assert held(graft.parent) <= FILES + 1, "the tables' file is opened, and then mapped"
    if place == "disk":
        state = model.state_dict()
        assert held(graft.parent) <= FILES + 1 + len(model.memory.tables) * 2, "mapped once for each layer and order"
        del state
        assert held(graft.parent) <= FILES + 1
    other = copy.deepcopy(model)
    for after in ("cpu", "device", "disk"):
        other.place_memory(after)
        assert held(graft.parent) <= 2 * (FILES + 1), after
    del model, other
    assert held(graft.parent) == 0, "the control: nothing stays open"


@pytest.mark.parametrize(
    ("place", "mode"), [("device", "memory"), ("cpu", "memory"), ("disk", "memory"), ("disk", "all")]
)
def test_a_run_with_checkpoints_that_come_back_holds_files_and_not_tensors(
    place,
    mode,
    graft,
    dataset,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    mapped, real = [], ShardFile.map
    monkeypatch.setattr(ShardFile, "map", lambda file: mapped.append(file) or real(file))
    model = loaded(graft, place).set_trainable(mode)
    best = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    train(model, dataset, tmp_path / "run", **best)
    assert held(graft.parent) + held(tmp_path) <= 2 * (FILES + 1)
    if mode == "memory":
        load_memory_delta(model, save_memory_delta(model, tmp_path / "delta", base=graft), base=graft)
        assert held(graft.parent) + held(tmp_path) <= 2 * (FILES + 1)
    else:
        mapped.clear()
        load_around_tables(model, tmp_path / "run" / "checkpoint-2")
        assert len(mapped) <= FILES, "while it was loaded"


def test_tables_that_accelerate_reads_from_the_checkpoint_hold_files_and_not_tensors(graft):
    places = {"backbone": "cpu", "memory.hashing": "cpu", "memory.layers": "cpu", "memory.tables": "disk"}
    model, names = loaded(graft), read_index(graft)
    index = {
        name: {"safetensors_file": str(graft / file), "weight_name": name, "dtype": "float32"}
        for name, file in names.items()
        if name.startswith("memory.tables.")
    }
    assert len(index) == 4 * PARTS
    dispatch_model(model, places, main_device="cpu", offload_index=index)
    found = logits(model, repeating_texts())
    assert held(graft.parent) <= FILES + 1 + 4, "opened once for each layer and order"
    assert torch.allclose(found, logits(loaded(graft), repeating_texts()), atol=1e-5)
