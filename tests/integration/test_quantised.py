"""Quantised backbones: torchao and bitsandbytes change the backbone's linear layers, and nothing of the memory.

Quantised logits may differ from unquantised ones by twice what the plain backbone's differ; what is loaded again is
compared bit for bit. Everything runs on a CPU. A quantiser that is not installed is skipped.

Run: pytest tests/integration/test_quantised.py
"""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
    TorchAoConfig,
    TrainingArguments,
)

from engram_transformers import EngramForCausalLM, EngramTrainer
from engram_transformers.compat_engram import CACHE
from engram_transformers.conversion import graft
from engram_transformers.inspection import verify_checkpoint
from engram_transformers.rows_table_engram import TablePart

from .backbones import HEADS


FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def torchao_int8(skip=None):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skip)


def bitsandbytes(skip, **bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes cannot be imported", exc_type=ImportError)
    return BitsAndBytesConfig(llm_int8_skip_modules=skip, **bits)


QUANTISERS = {
    "torchao int8": torchao_int8,
    "bitsandbytes 8 bit": lambda skip=None: bitsandbytes(skip, load_in_8bit=True),
    "bitsandbytes 4 bit": lambda skip=None: bitsandbytes(skip, load_in_4bit=True),
}
PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PARTS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.fixture(params=QUANTISERS)
def quantiser(request):
    """Factory of a quantization_config, with a list of modules to leave out if one is given."""
    QUANTISERS[request.param]()  # skips before anything is made
    return QUANTISERS[request.param]


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@pytest.fixture
def donor(tiny_donor):
    """Twice as wide as the other tests' donors: 4 bits come in blocks of 64 values."""
    return tiny_donor(LlamaConfig(**{**HEADS, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}))


@pytest.fixture
def folders(donor, tiny_engram, tiny_tokenizer, tmp_path):
    """A donor's folder and a trained Engram checkpoint's, and the models that are in them."""
    donor.save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    model = tiny_engram(trained=True, donor=donor, layers=(0, 1))
    model.save_pretrained(tmp_path / "engram")
    tiny_tokenizer.save_pretrained(tmp_path / "engram")
    return tmp_path / "donor", plain, tmp_path / "engram", model


def from_backbone(folder, **kwargs):
    return EngramForCausalLM.from_backbone(str(folder), engram_layer_ids=[0, 1], **FIELDS, **kwargs)


def quantised(model):
    """Names of parameters that are more than plain floating-point tensors."""
    return {
        name
        for name, parameter in model.named_parameters()
        if type(parameter) not in (nn.Parameter, TablePart)
        or type(parameter.data) is not torch.Tensor
        or not parameter.is_floating_point()
    }


def linear_weights(layers=range(3)):
    return {f"backbone.model.layers.{layer}.{part}.weight" for layer in layers for part in PARTS}


def same_memory(model, other):
    """Whether two memories are the same, tensor by tensor and bit by bit."""
    one, two = model.memory.state_dict(), other.memory.state_dict()
    return one.keys() == two.keys() and all(
        type(one[name]) is type(two[name]) and one[name].dtype == two[name].dtype and torch.equal(one[name], two[name])
        for name in one
    )


def farthest(one, other):
    return (one - other).abs().max().item()


def step_by_step(model, ids):
    """Logits of a text that is read token by token into one cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    logits = [model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(ids.shape[1])]
    return torch.cat(logits, dim=1)  # (batch, length, vocabulary)


@torch.no_grad()
def test_a_graft_of_a_quantised_donor_is_that_donor(quantiser, ids, folders, fill_memory):
    folder, plain, _, trained = folders
    donor = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantiser())
    model = from_backbone(folder, quantization_config=quantiser())
    assert quantised(model) == linear_weights()
    assert {p.dtype for p in model.memory.parameters()} == {torch.float32}
    assert torch.equal(model(ids).logits, donor(ids).logits)
    lost = farthest(donor(ids).logits, plain(ids).logits)
    assert lost > 1e-2, "control: quantising must be seen"
    fill_memory(model)
    assert same_memory(model, trained)
    assert farthest(model(ids).logits, trained(ids).logits) <= 2 * lost


@torch.no_grad()
@pytest.mark.parametrize("skip", [None, "lm_head"])
def test_a_quantised_checkpoint_keeps_its_memory_bit_for_bit(quantiser, skip, ids, folders):
    folder, plain, saved, trained = folders
    donor = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantiser(skip and [skip]))
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantiser(skip and [f"backbone.{skip}"]))
    assert quantised(model) == linear_weights()
    assert same_memory(model, trained)
    lost = farthest(donor(ids).logits, plain(ids).logits)
    assert 0 < farthest(model(ids).logits, trained(ids).logits) <= 2 * lost
    with model.disable_memory():
        assert torch.equal(model(ids).logits, donor(ids).logits)
        assert farthest(donor(ids).logits, trained(ids).logits) > 1e-2, "control: the memory must be seen"


@pytest.mark.parametrize("left_out", ["lm_head", "model.layers.0"])
def test_modules_may_be_left_out_by_the_names_that_they_have_in_the_donor(left_out, folders):
    config = torchao_int8([left_out, "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folders[2], quantization_config=config)
    assert quantised(model) == (linear_weights() if left_out == "lm_head" else linear_weights([1, 2]))


@torch.no_grad()
def test_quantised_decoding_with_a_cache_equals_decoding_without(quantiser, ids, folders):
    folder, _, saved, _ = folders
    donor = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantiser())
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantiser())
    own = farthest(step_by_step(donor, ids), donor(ids).logits)
    assert farthest(step_by_step(model, ids), model(ids).logits) <= 2 * max(own, 1e-5)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    with model.disable_memory():
        assert not torch.equal(cached, model.generate(ids, **settings)), "control: the memory must be seen"


@torch.no_grad()
@pytest.mark.parametrize("way", ["loaded", "grafted"])
def test_a_quantised_model_is_saved_and_comes_back_bit_for_bit(quantiser, way, ids, folders, fill_memory, tmp_path):
    folder, _, saved, trained = folders
    if way == "loaded":
        model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantiser())
    else:
        model = fill_memory(from_backbone(folder, quantization_config=quantiser()))
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["quant_method"]
    names = []
    for path in sorted((tmp_path / "again").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held = list(file.keys())
        in_shards = {name.startswith("memory.tables.") for name in held}
        assert in_shards == {path.name.startswith("engram-memory-")}, path.name
        names += held
    assert len(names) == len(set(names)), "a tensor is stored twice"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert quantised(loaded) == linear_weights()
    assert same_memory(loaded, trained)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_verify_accepts_a_quantised_checkpoint(quantiser, folders, tiny_tokenizer, tmp_path):
    _, _, saved, _ = folders
    AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantiser()).save_pretrained(tmp_path / "again")
    tiny_tokenizer.save_pretrained(tmp_path / "again")
    findings = verify_checkpoint(tmp_path / "again", generation=False)
    assert [finding for finding in findings if not finding.ok] == []


@torch.no_grad()
def test_modules_that_were_left_out_are_left_out_after_a_save(quantiser, ids, folders, tmp_path):
    folder, _, _, _ = folders
    model = from_backbone(folder, quantization_config=quantiser(["model.layers.0", "lm_head"]))
    assert quantised(model) == linear_weights([1, 2])
    model.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert quantised(loaded) == linear_weights([1, 2])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("way", ["loaded", "grafted"])
def test_the_memory_of_a_quantised_backbone_is_trained(quantiser, way, ids, folders, tmp_path):
    folder, _, saved, _ = folders
    if way == "loaded":
        model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantiser())
    else:
        model = from_backbone(folder, quantization_config=quantiser())
    with torch.no_grad(), model.disable_memory():
        before = model(ids).logits
    tables = {name: tensor.clone() for name, tensor in model.memory.tables.state_dict().items()}
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    trainer = EngramTrainer(
        model,
        TrainingArguments(str(tmp_path / "run"), **settings),
        train_dataset=[{"input_ids": text, "labels": text} for text in ids],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert all(bool((tensor != tables[name]).any()) for name, tensor in model.memory.tables.state_dict().items())
    assert quantised(model) == linear_weights()
    model.eval()
    with torch.no_grad(), model.disable_memory():
        assert torch.equal(model(ids).logits, before), "the backbone was trained"


@torch.no_grad()
def test_torchaos_own_call_leaves_the_memory_alone(folders):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    _, _, saved, trained = folders
    model = AutoModelForCausalLM.from_pretrained(saved)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert quantised(model) == linear_weights() | {"backbone.lm_head.weight"}
    assert same_memory(model, trained)


@torch.no_grad()
def test_a_quantised_model_in_half_precision_keeps_tables_in_their_own_type(ids, folders):
    config = torchao_int8()
    _, _, saved, trained = folders
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, quantization_config=config)
    assert quantised(model) == linear_weights()
    for name, tensor in model.memory.tables.state_dict().items():
        assert torch.equal(tensor, trained.memory.tables.state_dict()[name])
    assert model.memory.layers["0"].key_value.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(ids).logits).all()


@torch.no_grad()
def test_a_folder_that_was_quantised_is_grafted_or_refused(quantiser, ids, folders, tiny_tokenizer, tmp_path):
    folder, _, _, _ = folders
    donor = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantiser())
    donor.save_pretrained(tmp_path / "quantised")
    tiny_tokenizer.save_pretrained(tmp_path / "quantised")
    if isinstance(quantiser(), TorchAoConfig):
        with pytest.raises(ValueError, match="is quantised by torchao.*graft the donor that it was made from"):
            graft(tmp_path / "quantised", tmp_path / "graft", [0, 1], **FIELDS)
        assert not (tmp_path / "graft").exists()
    else:
        model = AutoModelForCausalLM.from_pretrained(
            graft(tmp_path / "quantised", tmp_path / "graft", [0, 1], **FIELDS)
        )
        assert quantised(model) == linear_weights()
        assert torch.equal(model(ids).logits, donor(ids).logits)
