"""Quantised tables in a model: it computes what a float32 table of the same values gives, wherever the rows are.

Run: pytest tests/integration/test_quantised_tables.py
"""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from engram_transformers import EngramConfig, EngramTrainer
from engram_transformers.conversion import graft
from engram_transformers.conversion.sizes import table_bytes
from engram_transformers.rows_quantised_engram import dequantise, quantise, row_bytes
from engram_transformers.training import create_optimizer

from ..counting_device import counted
from ..faults import shard_of
from ..packs import classes_of, ngrams_in, pack_of
from .test_dtypes import step_by_step


KINDS = ("int8", "float8_e4m3fn")
PLACES = ("device", "cpu", "disk")
every_kind = pytest.mark.parametrize("kind", KINDS)
TEXTS = torch.randint(3, 4000, (3, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def quantised(tiny_engram):
    """Factory of filled memories with quantised tables."""

    def make(kind: str, **fields):
        return tiny_engram(trained=True, engram_table_dtype=kind, engram_head_dim=32, **fields).eval()

    return make


@pytest.fixture
def in_float32(tiny_engram):
    """Factory of memories with the same values in float32 tables."""

    def make(model):
        twin = tiny_engram(trained=True, engram_head_dim=32).eval()
        state = model.state_dict()
        for name in [name for name in state if ".tables." in name]:
            state[name] = dequantise(state[name], getattr(torch, model.config.engram_table_dtype))
        twin.load_state_dict(state)
        return twin

    return make


@torch.no_grad()
def logits(model, ids=TEXTS) -> torch.Tensor:
    return model(ids).logits


def records_of(model) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in model.state_dict().items() if ".tables." in name}


def same_records(model, before) -> bool:
    after = records_of(model)
    return all(after[name].dtype == torch.uint8 and torch.equal(after[name], rows) for name, rows in before.items())


@every_kind
def test_a_model_computes_what_float32_rows_of_the_same_values_give(kind, quantised, in_float32):
    model = quantised(kind)
    twin = in_float32(model)
    assert torch.equal(logits(model), logits(twin))
    with model.disable_memory():
        assert not torch.equal(logits(model), logits(twin)), "control: the memory says nothing"


@every_kind
def test_results_files_and_sizes_are_the_same_wherever_the_rows_are(kind, quantised, tmp_path):
    model = quantised(kind, engram_table_parts=3)
    expected, before = logits(model), records_of(model)
    model.save_pretrained(tmp_path / "saved")
    size = sum(rows.nbytes for rows in before.values())
    width = model.config.engram_head_dim
    assert size == table_bytes(model.config)
    assert size == sum(map(len, before.values())) * row_bytes(getattr(torch, kind), width)
    for place in PLACES:
        placed = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", engram_placement=place)
        assert torch.equal(logits(placed), expected), place
        assert f"{size:,} bytes" in placed.memory_summary().splitlines()[0]
        placed.save_pretrained(tmp_path / place)
        assert shard_of(tmp_path / place).read_bytes() == shard_of(tmp_path / "saved").read_bytes(), place
        for other in PLACES:
            assert torch.equal(logits(placed.place_memory(other)), expected), (place, other)
        assert same_records(placed, before)


@every_kind
@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_without(kind, quantised, in_float32, tmp_path):
    model = quantised(kind)
    torch.testing.assert_close(step_by_step(model, TEXTS), logits(model), rtol=0, atol=1e-4)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TEXTS)}
    expected = in_float32(model).generate(TEXTS, use_cache=False, **settings)
    model.save_pretrained(tmp_path)
    for place in PLACES:
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=place)
        assert torch.equal(placed.generate(TEXTS, **settings), expected), place
    with model.disable_memory():
        assert not torch.equal(model.generate(TEXTS, **settings), expected), "control: the memory says nothing"


@every_kind
def test_a_fresh_graft_is_its_donor(kind, tiny_donor, tiny_tokenizer, tmp_path):
    donor = tiny_donor()
    donor.save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    fields = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 32, "engram_table_dtype": kind}
    out = graft(tmp_path / "donor", tmp_path / "out", [1, 2], **fields)
    for place in PLACES:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out, engram_placement=place)), logits(donor))


@every_kind
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_single_rows_are_written_as_records(kind, place, quantised, tmp_path):
    model = quantised(kind)
    model.save_pretrained(tmp_path)
    file = shard_of(tmp_path).read_bytes()
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=place)
    rows = torch.arange(0, len(model.memory.tables["1"].order2[0]), 2)
    records = quantise(torch.randn(len(rows), 32), getattr(torch, kind))
    for each in (model, placed):
        each.memory.tables["1"].order2.mend_parts()
        each.memory.tables["1"].order2.parts[0].write(rows, records)
    part = placed.memory.tables["1"].order2.parts[0]
    assert torch.equal(part.read(rows), records)
    assert torch.equal(logits(placed), logits(model))
    untouched = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logits(placed), logits(untouched)) and shard_of(tmp_path).read_bytes() == file
    with pytest.raises(TypeError, match=r"is written records \(uint8\), given are torch.float32.*quantise"):
        part.write(rows, torch.randn(len(rows), 32))


@every_kind
def test_packs_are_added_to_quantised_rows(kind, quantised, in_float32):
    model = quantised(kind)
    twin, before = in_float32(model), logits(model)
    pack = pack_of(model, ngrams_in(classes_of(model, TEXTS[0])[3:6]))
    for each in (model, twin):
        each.load_memory(pack, "first")
    assert torch.equal(logits(model), logits(twin))
    assert torch.equal(logits(model)[1:], before[1:]) and torch.equal(logits(model)[0, :4], before[0, :4])
    assert not torch.equal(logits(model)[0], before[0]), "control: the pack says nothing"
    model.unload_memory("first")
    assert torch.equal(logits(model), before)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changes_of_type_and_copies_leave_records_alone(kind, dtype, quantised, in_float32, tmp_path):
    model = quantised(kind)
    before, expected = records_of(model), logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_records(other, before) and torch.equal(logits(other), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert same_records(loaded, before) and loaded.dtype == dtype
    twin, model = in_float32(model).to(dtype), model.to(dtype)
    assert same_records(model, before)
    assert torch.equal(logits(model), logits(twin))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(twin))


@every_kind
def test_training_of_quantised_rows_is_refused_before_anything_changes(kind, quantised, tmp_path):
    model = quantised(kind)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    refused = pytest.raises(ValueError, match="engram cast IN OUT --dtype bfloat16.*cast it back")
    for begin in (
        lambda: model.set_trainable("memory"),
        lambda: model.set_trainable("tables"),
        lambda: model.set_trainable("all"),
        lambda: create_optimizer(model, lr=1e-3),
        lambda: EngramTrainer(model, arguments, trainable="memory"),
        lambda: EngramTrainer(model, arguments),
        lambda: model.memory.requires_grad_(True),
    ):
        with refused:
            begin()
        assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert model.config.engram_trainable is None


@every_kind
@pytest.mark.parametrize("place", PLACES)
def test_the_layers_are_trained_over_quantised_rows(kind, place, quantised, tmp_path):
    quantised(kind).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=place).train()
    before = records_of(model)
    model.requires_grad_(False).memory.layers.requires_grad_(True)
    optimizer = create_optimizer(model, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(TEXTS, labels=TEXTS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05 and same_records(model, before)


def test_a_configuration_says_which_widths_fp8_needs(tiny_llama_config):
    fields = {"text_config": tiny_llama_config, "engram_layer_ids": [1]}
    with pytest.raises(ValueError, match="engram_head_dim=48 is not divisible by 32.*engram_table_dtype='int8'"):
        EngramConfig(**fields, engram_head_dim=48, engram_table_dtype="float8_e4m3fn")
    for kind, width in (("int8", 48), ("float8_e4m3fn", 64)):
        assert EngramConfig(**fields, engram_head_dim=width, engram_table_dtype=kind).engram_table_dtype == kind


@every_kind
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_delta_holds_changed_records_and_layers(kind, place, quantised, tmp_path):
    quantised(kind).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", engram_placement=place)
    before = logits(base)
    part = base.memory.named_parts()["memory.tables.1.order2.0"]
    rows = torch.arange(0, len(quantised(kind).memory.tables["1"].order2[0]), 2)
    part.write(rows, quantise(torch.randn(len(rows), 32), getattr(torch, kind)))
    base.memory.layers["1"].key_norm.mul_(1.5)
    base.save_memory_delta(tmp_path / "delta", base=tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", engram_placement=place)
    again.load_memory_delta(tmp_path / "delta", base=tmp_path / "base")
    assert torch.equal(logits(again), logits(base)) and not torch.equal(logits(again), before)
    assert torch.equal(again.memory.named_parts()["memory.tables.1.order2.0"].read(rows), part.read(rows))


@every_kind
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("counting_device")
def test_records_travel_to_a_device_and_become_values_there(kind, place, quantised, tmp_path):
    model = quantised(kind)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement="cpu").to("counting").place_memory(place)
    texts = TEXTS.to("counting")
    torch.testing.assert_close(logits(placed, texts).cpu(), expected, rtol=0, atol=1e-5)
    with counted() as block:
        logits(placed, texts)
    reads = TEXTS.numel() * 2 * 2 * 2  # layers, orders, heads
    most = 0 if place == "device" else reads * row_bytes(getattr(torch, kind), 32)
    values = 4 * 32 * reads
    assert block.h2d < most + values / 4
