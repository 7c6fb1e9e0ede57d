"""Types of numbers: models in float16, bfloat16 or float32 with tables in any of the three.

Logits may differ from float32's by twice what the plain backbone's differ in the same type, and decoding with a cache
from decoding without by twice the plain backbone's difference. Rounding a table adds what TABLE_ROUNDING says
(measured: 0.009 for bfloat16, 0.001 for float16, with logits up to 4.7). Tables themselves never change: bit for bit.

Run: pytest tests/integration/test_dtypes.py
"""

import pytest
import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from engram_transformers import EngramForCausalLM
from engram_transformers.compat_engram import CACHE
from engram_transformers.training import create_optimizer


TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLE_ROUNDING = {"float32": 0.0, "bfloat16": 3e-2, "float16": 3e-3}
FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
every_pair = pytest.mark.parametrize(("dtype", "table"), [(dtype, table) for dtype in TYPES for table in TYPES])

# What a user may call, and the type of dense weights after it.
CHANGES = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "float": (lambda model: model.float(), torch.float32),
    "double": (lambda model: model.double(), torch.float64),
    "to a type": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to a device and type": (lambda model: model.to("cpu", torch.float16), torch.float16),
    "to like a tensor": (lambda model: model.to(torch.zeros(1, dtype=torch.float16)), torch.float16),
    "there and back": (lambda model: model.half().bfloat16().float(), torch.float32),
}


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


def step_by_step(model, ids):
    """Logits of a text that is read token by token into one cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    logits = [model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(ids.shape[1])]
    return torch.cat(logits, dim=1)  # (batch, length, vocabulary)


def farthest(one, other):
    return (one.float() - other.float()).abs().max().item()


def table_bits(model):
    return {name: tensor.clone() for name, tensor in model.memory.tables.state_dict().items()}


def same_tables(model, before, table):
    after = model.memory.tables.state_dict()
    return all(after[name].dtype == TYPES[table] and torch.equal(after[name], before[name]) for name in before)


def dense_types(model):
    """Types of every floating-point parameter that is not in a table."""
    return {p.dtype for name, p in model.named_parameters() if not name.startswith("memory.tables.")}


@torch.no_grad()
@every_pair
def test_logits_are_float32s_to_the_backbones_own_rounding(dtype, table, ids, tiny_donor, tiny_engram):
    rounding = farthest(tiny_donor().to(TYPES[dtype])(ids).logits, tiny_donor()(ids).logits)
    expected = tiny_engram(trained=True)(ids).logits
    model = tiny_engram(trained=True, engram_table_dtype=table).to(TYPES[dtype])
    outputs = model(ids, labels=ids)
    assert outputs.logits.dtype == TYPES[dtype]
    assert torch.isfinite(outputs.loss)
    tolerance = max(2 * rounding, 1e-5) + TABLE_ROUNDING[table]
    assert farthest(outputs.logits, expected) <= tolerance
    with model.disable_memory():
        assert farthest(model(ids).logits, expected) > 2 * tolerance, "control: the memory must be seen"


@torch.no_grad()
@every_pair
def test_decoding_with_a_cache_equals_decoding_without(dtype, table, ids, tiny_donor, tiny_engram):
    donor = tiny_donor().to(TYPES[dtype])
    whole = donor(ids).logits
    spacing = (
        torch.finfo(TYPES[dtype]).eps * whole.abs().max().item()
    )  # two roundings of a logit may lie this far apart
    tolerance = 2 * max(farthest(step_by_step(donor, ids), whole), spacing)
    model = tiny_engram(trained=True, engram_table_dtype=table).to(TYPES[dtype])
    assert farthest(step_by_step(model, ids), model(ids).logits) <= tolerance
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "attention_mask": torch.ones_like(ids)}
    if dtype == "float32":  # in half precision the two best tokens may tie
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("table", TYPES)
@pytest.mark.parametrize(("change", "dtype"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_type_leaves_tables_and_the_token_map_alone(change, dtype, table, tiny_engram):
    model = tiny_engram(trained=True, engram_table_dtype=table)
    before, token_map = table_bits(model), model.memory.hashing.token_map.clone()
    assert change(model) is model
    assert same_tables(model, before, table)
    assert dense_types(model) == {dtype}
    assert model.memory.hashing.token_map.dtype == torch.int64
    assert torch.equal(model.memory.hashing.token_map, token_map)
    assert model.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("table", ["bfloat16", "float16"])
def test_a_cast_that_asks_no_module_does_not_last(table, ids, tiny_engram, tmp_path):
    """PEFT's own, before training over a quantised backbone: `parameter.data = parameter.data.to(torch.float32)`."""
    model = tiny_engram(trained=True, engram_table_dtype=table)
    before, expected = table_bits(model), step_by_step(model, ids)
    for use in (lambda: step_by_step(model, ids), lambda: model.save_pretrained(tmp_path / "saved")):
        prepare_model_for_kbit_training(model)
        assert {part.dtype for part in model.memory.tables.parameters()} == {torch.float32}, "control: it was cast"
        use()
        assert {part.dtype for part in model.memory.tables.parameters()} == {TYPES[table]}
    assert same_tables(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), before, table)
    prepare_model_for_kbit_training(model)
    assert torch.equal(step_by_step(model, ids), expected), "a step of decoding reads bytes"


@torch.no_grad()
@every_pair
def test_a_loaded_model_has_the_type_asked_for_and_tables_their_own(dtype, table, ids, tiny_engram, tmp_path):
    model = tiny_engram(trained=True, engram_table_dtype=table)
    model.save_pretrained(tmp_path / "saved")
    for loader in (AutoModelForCausalLM, AutoModel):
        loaded = loader.from_pretrained(tmp_path / "saved", dtype=TYPES[dtype])
        assert dense_types(loaded) == {TYPES[dtype]}
        assert same_tables(loaded, table_bits(model), table)
        assert torch.isfinite(loaded(ids)[0]).all()
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert dense_types(automatic) == {torch.float32}, "the type of the weights that were saved"
    assert same_tables(automatic, table_bits(model), table)


@torch.no_grad()
@every_pair
def test_a_model_saved_in_any_type_comes_back_bit_for_bit(dtype, table, ids, tiny_engram, tmp_path):
    model = tiny_engram(trained=True, engram_table_dtype=table).to(TYPES[dtype])
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    # `to` also rounds the backbone's rotary frequencies, which are never saved: compared is what is.
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.state_dict()[name], tensor), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES)
def test_a_donor_folder_is_grafted_in_the_type_asked_for(dtype, ids, tiny_donor, tiny_tokenizer, tmp_path):
    tiny_donor().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_backbone(str(tmp_path), engram_layer_ids=[1, 2], dtype=TYPES[dtype], **FIELDS)
    assert dense_types(model) == {TYPES[dtype]}
    assert {p.dtype for p in model.memory.tables.parameters()} == {torch.float32}
    donor = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=TYPES[dtype])
    assert torch.equal(model(ids).logits, donor(ids).logits)


@every_pair
def test_rows_are_trained_in_every_pair_of_types(dtype, table, ids, tiny_engram):
    model = tiny_engram(engram_table_dtype=table).to(TYPES[dtype]).train()
    model.backbone.requires_grad_(False)
    # Adam's epsilon is 0 in float16, whatever model it trains: dense weights in that type are not trained here.
    model.memory.layers.requires_grad_(dtype != "float16")
    optimizer = create_optimizer(model, lr=1e-3)
    losses = []
    for _ in range(4):
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        tables = list(model.memory.tables.parameters())
        assert all(p.grad.row_values.dtype == torch.float32 for p in tables)
        assert all(torch.isfinite(p.grad.row_values).all() for p in tables)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert {p.dtype for p in tables} == {TYPES[table]}
    assert all(torch.isfinite(p).all() and bool((p != 0).any()) for p in tables)
    assert dense_types(model) == {TYPES[dtype]}


@pytest.mark.parametrize("table", TYPES)
def test_autocast_reads_and_trains_a_float32_model(table, ids, tiny_donor, tiny_engram):
    donor, model = tiny_donor(), tiny_engram(trained=True, engram_table_dtype=table)
    expected, plain = tiny_engram(trained=True)(ids).logits, donor(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounding = farthest(donor(ids).logits, plain)
        outputs = model(ids, labels=ids)
        with torch.no_grad():
            chunked = step_by_step(model, ids)
    assert rounding > 1e-3, "control: autocast must round"
    assert farthest(outputs.logits, expected) <= 2 * rounding + TABLE_ROUNDING[table]
    assert farthest(chunked, outputs.logits) <= 2 * rounding
    outputs.loss.backward()
    for parameter in model.memory.tables.parameters():
        assert parameter.grad.row_values.dtype == torch.float32
        assert torch.isfinite(parameter.grad.row_values).all()
    assert model.memory.layers["1"].key_value.weight.grad.dtype == torch.float32
