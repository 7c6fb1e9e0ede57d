"""Adapters that were made for the donor, without a memory in mind, load under their own names or are refused.

A fresh memory must leave the donor with its adapter bit for bit; PEFT alone leaves an adapter of other names at zero
without a word, which is the control.

Run: pytest tests/integration/test_peft_donors.py
"""

import pytest
import torch
from peft import IA3Config, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from engram_transformers import EngramForCausalLM

from .adapted import adapted, logits, lora, near, stir
from .backbones import BACKBONES


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

CONFIGS = {
    "LoRA": lambda: lora(),
    "LoRA, a pattern": lambda: lora(target_modules=r"model\.layers\.[02]\..*\.(q|o)_proj"),
    "LoRA, full names": lambda: lora(target_modules=["model.layers.1.mlp.up_proj", "model.layers.3.self_attn.k_proj"]),
    "LoRA, some layers": lambda: lora(layers_to_transform=[1, 2], layers_pattern="layers"),
    "LoRA, all but a pattern": lambda: lora(target_modules="all-linear", exclude_modules=r"model\.layers\.0\..*"),
    "LoRA, scaled by name": lambda: lora(alpha_pattern={"layers.1.self_attn.q_proj": 32}),
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "VeRA": lambda: VeraConfig(task_type="CAUSAL_LM", r=4),
}


def by_peft(model, folder):
    return PeftModel.from_pretrained(model, folder)


def by_peft_as_second(model, folder):
    model = PeftModel.from_pretrained(model, folder)
    stir(model, 7)
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model.eval()


def by_load_adapter(model, folder):
    model.load_adapter(str(folder))
    return model


# Transformers 5.23 leaves DoRA's magnitudes at their start with a warning, in the donor too; VeRA it does not take.
UNKNOWN_TO_TRANSFORMERS = {"DoRA": r"PeftModel\.from_pretrained", "VeRA": "does not support"}

ROUTES = [by_peft, by_peft_as_second, by_load_adapter]


@pytest.mark.native_peft
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_the_donor_says_what_it_says_there(name, route, tiny_donor, tiny_engram, tmp_path):
    there = adapted(tiny_donor(), config=CONFIGS[name]())
    there.save_pretrained(tmp_path)
    expected = logits(there)
    if route is by_load_adapter and name in UNKNOWN_TO_TRANSFORMERS:
        with pytest.raises(ValueError, match=UNKNOWN_TO_TRANSFORMERS[name]):
            route(tiny_engram(), tmp_path)
        return
    assert torch.equal(logits(route(tiny_engram(), tmp_path)), expected)
    trained = route(tiny_engram(trained=True), tmp_path)
    with trained.disable_memory():
        assert torch.equal(logits(trained), expected)
    assert not near(logits(trained), expected), "control: the memory is there"
    assert not near(expected, logits(tiny_donor())), "control: the adapter is seen"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_names_of_gpt2_find_their_place_too(route, tiny_donor, tiny_engram, tmp_path):
    there = adapted(tiny_donor(BACKBONES["gpt2"]()))
    there.save_pretrained(tmp_path)
    model = route(tiny_engram(donor=tiny_donor(BACKBONES["gpt2"]())), tmp_path)
    assert torch.equal(logits(model), logits(there))


def rename(folder, old, new):
    """Gives an adapter's weights other names, as one for another model has them."""
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(old, new): tensor for key, tensor in weights.items()}, folder / "adapter_model.safetensors")


@pytest.mark.native_peft
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_weights_that_have_no_place_are_an_error(route, tiny_donor, tiny_engram, tmp_path):
    adapted(tiny_donor()).save_pretrained(tmp_path)
    rename(tmp_path, "model.layers.", "model.blocks.")
    with pytest.raises(ValueError, match="is for other layers.*made for another model"):
        route(tiny_engram(), tmp_path)


def test_peft_alone_leaves_them_at_zero_in_silence(tiny_donor, tmp_path):
    adapted(tiny_donor()).save_pretrained(tmp_path)
    rename(tmp_path, "model.layers.", "model.blocks.")
    model = get_peft_model(tiny_donor(), lora())
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model.eval()), logits(tiny_donor())), "this is what the error above is for"


@pytest.mark.native_peft
def test_a_refused_adapter_leaves_those_that_are_there(tiny_donor, tiny_engram, tmp_path):
    adapted(tiny_donor(), 1).save_pretrained(tmp_path)
    rename(tmp_path, "model.layers.", "model.blocks.")
    model = adapted(tiny_engram(trained=True))
    before = logits(model)
    with pytest.raises(ValueError, match="is for other layers"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model.eval()), before)
    native = tiny_engram(trained=True)
    before = logits(native)
    with pytest.raises(ValueError, match="is for other layers"):
        native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), before)


def test_an_adapter_of_a_model_with_memory_is_not_the_donors_and_peft_says_so(tiny_donor, tiny_engram, tmp_path):
    adapted(tiny_engram()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        model = PeftModel.from_pretrained(tiny_donor(), tmp_path)
    assert torch.equal(logits(model), logits(tiny_donor())), "docs/peft.md says how to rename it"
    rename(tmp_path, "base_model.model.backbone.", "base_model.model.")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_donor(), tmp_path)), logits(adapted(tiny_engram())))


@pytest.mark.native_peft
def test_a_donor_that_carries_an_adapter_itself_can_be_grafted(tiny_donor, tiny_engram, tmp_path):
    adapted(tiny_donor()).save_pretrained(tmp_path)
    donor = tiny_donor()
    donor.load_adapter(str(tmp_path))
    expected = logits(donor)
    model = tiny_engram(donor=donor)
    assert torch.equal(logits(model), expected)
    assert isinstance(model, EngramForCausalLM)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(by_peft(tiny_engram(), tmp_path / "again")), expected)


def test_a_folder_of_a_donor_with_its_adapter_is_loaded_by_transformers_alone_as_before(tiny_donor, tmp_path):
    donor = tiny_donor()
    donor.save_pretrained(tmp_path / "donor")
    there = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "donor"))
    there.save_pretrained(tmp_path / "adapter")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(found, PreTrainedModel)
    assert torch.equal(logits(found), logits(there))
