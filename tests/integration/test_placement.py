"""A memory computes and saves the same wherever its tables are: with the other weights, in host memory or on
disk; and where it is nowhere, the model is its donor and no file of the tables is touched.

On the CPU everything is compared bit for bit, with the placement "device" as control.
Run: pytest tests/integration/test_placement.py
"""

import copy
import gc
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging

from engram_transformers import EngramForCausalLM, EngramFormatError, EngramModel

from ..tiny import GOLDEN, engram_on
from .backbones import HEADS


pytestmark = pytest.mark.core

PLACES = ("device", "cpu", "disk")
AWAY = ("cpu", "disk")
SHARD = "engram-memory-00001-of-00001.safetensors"
every_place = pytest.mark.parametrize("place", PLACES)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 4104, (3, 11), generator=torch.Generator().manual_seed(3))


def load(folder, place: str = "device", **kwargs) -> EngramForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, engram_placement=place, **kwargs)


@pytest.fixture(scope="module")
def control(saved) -> EngramForCausalLM:
    """The memory among the model's parameters, as before there were placements."""
    return load(saved)


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(input_ids=ids).logits


def table_names(named) -> set[str]:
    return {name for name, *_ in named if "memory.tables." in name}


def rows_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "memory.tables." in name}


def add_to_rows(model) -> None:
    """Stands for a step of training."""
    with torch.no_grad():
        for table in model.memory.tables.values():
            for order in table.orders():
                for part in order.tensors():
                    part.add_(0.5)


@every_place
def test_fields_of_the_configuration_can_be_given_as_arguments(saved, place):
    model = EngramForCausalLM.from_pretrained(saved, engram_placement=place, output_hidden_states=True)
    assert model.config.output_hidden_states
    assert not load(saved, place).config.output_hidden_states, "control"
    assert "transformers_weights" not in model.config.to_dict()


@every_place
def test_logits_are_the_same_and_tables_are_where_they_should_be(place, saved, control, ids):
    model = load(saved, place)
    assert model.memory.placement == place
    assert table_names(model.named_parameters()) == table_names(control.named_parameters()), "parameters everywhere"
    for part, own in zip(model.memory.named_parts().values(), control.memory.named_parts().values(), strict=True):
        assert part.table_shape == own.shape and len(part) == (len(own) if place == "device" else 0)
    assert torch.equal(logits(model, ids), logits(control, ids))
    with model.disable_memory():
        assert not torch.allclose(logits(model, ids), logits(control, ids), atol=1e-2), "control: the memory speaks"


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("place", AWAY)
def test_generation_is_the_same(place, way, saved, control, ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # pads on the left
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **way}
    expected = control.generate(ids, **settings)
    with control.disable_memory():
        assert not torch.equal(control.generate(ids, **settings), expected), "control: the memory decides"
    assert torch.equal(load(saved, place).generate(ids, **settings), expected)


@every_place
def test_state_dict_and_saved_files_are_the_same_byte_for_byte(place, saved, control, ids, tmp_path):
    model = load(saved, place)
    state, expected = model.state_dict(), control.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    model.save_pretrained(tmp_path / place)
    control.save_pretrained(tmp_path / "control")
    files = {path.name: path.read_bytes() for path in (tmp_path / place).iterdir() if path.is_file()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "control").iterdir() if path.is_file()}
    assert files[SHARD] == (saved / SHARD).read_bytes()
    assert torch.equal(logits(load(tmp_path / place, place), ids), logits(control, ids))


@every_place
def test_a_checkpoint_is_saved_over_itself_and_read_on(place, saved, control, ids, tmp_path):
    shutil.copytree(saved, tmp_path / "own")
    model = load(tmp_path / "own", place)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(model, ids), logits(control, ids))
    assert (tmp_path / "own" / SHARD).read_bytes() == (saved / SHARD).read_bytes()
    shutil.rmtree(tmp_path / "own")  # what is open stays readable
    assert torch.equal(logits(model, ids), logits(control, ids))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@every_place
def test_a_copy_has_rows_of_its_own(place, copied, saved, control, ids):
    model = load(saved, place)
    twin = copied(model)
    assert twin.memory.placement == place
    assert torch.equal(logits(twin, ids), logits(control, ids))
    if place != "disk":
        add_to_rows(twin)
        assert not torch.allclose(logits(twin, ids), logits(control, ids), atol=1e-2)
    del twin
    assert torch.equal(logits(model, ids), logits(control, ids))
    twin = copied(model)
    model.place_memory("none")
    del model
    gc.collect()
    assert torch.equal(logits(twin, ids), logits(control, ids)), "it needs no original"


@given(moves=st.lists(st.sampled_from([*PLACES, "none", "auto", "copy", "load"]), min_size=1, max_size=6))
def test_every_order_of_moves_leaves_the_memory_as_it_was(moves, saved, control, ids):
    model = load(saved, "none" if len(moves) % 2 else "device")
    for move in moves:
        if move == "copy":
            model = copy.deepcopy(model)
        elif move == "load":
            if model.memory.placement in ("device", "cpu"):
                model.load_state_dict(control.state_dict())
        else:
            model.place_memory(move)
            assert model.memory.placement == ("device" if move == "auto" else move)
        nowhere = model.memory.placement == "none"
        with control.disable_memory() if nowhere else torch.no_grad():
            assert torch.equal(logits(model, ids), logits(control, ids))
    model.place_memory("device")
    assert all(torch.equal(part, rows_of(control)[name]) for name, part in rows_of(model).items())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in control.named_parameters()]


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_rows_that_were_trained_are_not_lost_by_a_move(place, saved, ids, tmp_path):
    model = load(saved, place)
    add_to_rows(model)
    expected = logits(model, ids)
    for move in ("disk", "none"):
        with pytest.raises(ValueError, match=r"trained since: save_pretrained\(folder\) first"):
            model.place_memory(move)
        assert model.memory.placement == place
        assert torch.equal(logits(model, ids), expected)
    model.place_memory("cpu" if place == "device" else "device")
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model.place_memory("disk", folder=tmp_path), ids), expected)
    assert torch.equal(logits(load(tmp_path, "disk"), ids), expected)


def test_a_memory_that_was_never_saved_has_no_file_to_be_read_from(tiny_engram, ids, tmp_path):
    model = tiny_engram(trained=True)
    expected = logits(model, ids)
    with pytest.raises(ValueError, match=r"no files yet: save_pretrained\(folder\) first"):
        model.place_memory("disk")
    assert torch.equal(logits(model.place_memory("cpu"), ids), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model.place_memory("disk"), ids), expected)


@every_place
def test_auto_classes_types_and_subfolders_come_to_the_same(place, saved, control, ids, tmp_path):
    shutil.copytree(saved, tmp_path / "inner")
    model = AutoModel.from_pretrained(tmp_path, subfolder="inner", engram_placement=place, dtype=torch.bfloat16)
    assert isinstance(model, EngramModel)
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in rows_of(model).values()} == {torch.float32}, "a table keeps its type"
    expected = AutoModel.from_pretrained(saved, dtype=torch.bfloat16, engram_placement="device")
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, expected(ids).last_hidden_state)
    assert all(torch.equal(part, rows_of(control)[name]) for name, part in rows_of(model).items())


@pytest.mark.parametrize("place", AWAY)
def test_a_quantised_backbone_has_its_memory_elsewhere_too(place, saved, ids):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    models = [
        load(saved, where, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))
        for where in ("device", place)
    ]
    assert torch.equal(logits(models[1], ids), logits(models[0], ids))
    assert not torch.equal(logits(models[0], ids), logits(load(saved), ids)), "control: it is quantised"


def test_without_a_memory_the_model_is_its_donor_and_reads_no_shard(saved, control, ids, tmp_path):
    shutil.copytree(saved, tmp_path / "own")
    (tmp_path / "own" / SHARD).rename(tmp_path / SHARD)
    with pytest.raises(FileNotFoundError, match=SHARD):
        load(tmp_path / "own", "disk")
    model = load(tmp_path / "own", "none")
    assert rows_of(model) == {}
    with control.disable_memory():
        assert torch.equal(logits(model, ids), logits(control, ids))
        assert torch.equal(model.generate(ids, max_new_tokens=4), control.generate(ids, max_new_tokens=4))
    with pytest.raises(ValueError, match="a save would lose it"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(FileNotFoundError, match=SHARD):
        model.place_memory("cpu")
    assert model.memory.placement == "none"
    (tmp_path / SHARD).rename(tmp_path / "own" / SHARD)
    assert torch.equal(logits(model.place_memory("cpu"), ids), logits(control, ids))


def test_a_move_that_cannot_be_made_changes_nothing(saved, control, ids, tmp_path):
    model = load(saved)
    engram_on(LlamaConfig(**HEADS), (0, 2)).save_pretrained(tmp_path / "layers")
    impossible = [
        (ValueError, ("gpu",), {}),
        (TypeError, ("cpu",), {"pin": True}),
        (RuntimeError, ("cpu",), {"execution_device": "nonsense"}),
        (FileNotFoundError, ("disk",), {"folder": tmp_path / "nowhere"}),
        (EngramFormatError, ("disk",), {"folder": tmp_path / "layers"}),
    ]
    for error, words, settings in impossible:
        with pytest.raises(error):
            model.place_memory(*words, **settings)
        assert model.memory.placement == "device"
        assert torch.equal(logits(model, ids), logits(control, ids))
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in control.named_parameters()]
    assert torch.equal(logits(model.place_memory("disk"), ids), logits(control, ids))


def test_files_of_another_memory_are_refused(saved, tmp_path):
    """The same sizes, other multipliers: every row would be read, and mean nothing."""
    donor = AutoModelForCausalLM.from_config(LlamaConfig(**HEADS))
    sizes = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    EngramForCausalLM.from_backbone(donor, tokenizer, [1, 2], engram_seed=7, **sizes).save_pretrained(tmp_path)
    for place in PLACES:
        model = load(saved, "none")
        with pytest.raises(EngramFormatError, match="another memory"):
            model.place_memory(place, folder=tmp_path)
        assert model.memory.placement == "none"


@every_place
def test_a_folder_with_other_rows_is_refused(place, saved, control, ids, tmp_path):
    """The same memory after more training: reading its rows would be another model."""
    trained = load(saved)
    add_to_rows(trained)
    trained.save_pretrained(tmp_path)
    model = load(saved, place)
    with pytest.raises(ValueError, match="differs from its file"):
        model.place_memory("disk", folder=tmp_path)
    assert model.memory.placement == place
    assert torch.equal(logits(model, ids), logits(control, ids))
    assert torch.equal(logits(model.place_memory("disk", folder=saved), ids), logits(control, ids))


@pytest.fixture
def said():
    """The lines that the package logged at warning level."""
    lines, logger = [], logging.get_logger("engram_transformers.files_checkpoint_engram")
    handler = logging.logging.Handler(logging.logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_auto_says_where_the_tables_are_and_how_large(saved, control, ids, said):
    table_bytes = sum(tensor.nbytes for tensor in rows_of(control).values())
    for room, place in ({"cpu": 1 << 30}, "device"), ({"cpu": table_bytes}, "disk"):
        model = AutoModelForCausalLM.from_pretrained(saved, max_memory=room)
        assert model.memory.placement == place
        assert torch.equal(logits(model, ids), logits(control, ids))
        (line,) = said
        assert f"{table_bytes:,} bytes, engram_placement={place!r}" in line
        assert "\n" not in line
        said.clear()
    load(saved, "disk")
    assert said == [], "who names a place needs not be told"


def test_a_word_that_is_no_placement_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="engram_placement='gpu' must be one of"):
        EngramForCausalLM.from_pretrained(tmp_path / "nowhere", engram_placement="gpu")
