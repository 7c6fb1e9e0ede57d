"""PEFT around a model with a memory: in either order, at the donor's layers, and with every way of switching adapters.

What a model says is compared with the same memory on a donor whose weights have the same LoRA merged into them (to 1e-5
in float32), and bit for bit with the donor and the model without adapters, which are the controls.

Run: pytest tests/integration/test_peft.py
"""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoModelForCausalLM

from engram_transformers import EngramForCausalLM
from engram_transformers.adapters.peft_patches import support_peft
from engram_transformers.layer_engram import Projection

from ..tiny import engram_on
from .adapted import TOLERANCE, adapted, ids, logits, lora, near, stir
from .backbones import BACKBONES


pytestmark = pytest.mark.core

# PEFT 0.21 loses a bare configuration's layers of Mixtral when it renames its experts, in the plain donor too.
KNOWN = [
    name
    for name, make in BACKBONES.items()
    if make().model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING and make().model_type != "mixtral"
]


def memory_first(tiny_donor, tiny_engram, seed=0):
    """Grafted, then adapted."""
    return adapted(tiny_engram(trained=True), seed)


def lora_first(tiny_donor, tiny_engram, seed=0):
    """Adapted, then grafted."""
    return tiny_engram(trained=True, donor=adapted(tiny_donor(), seed))


@pytest.fixture
def reference(tiny_donor, tiny_engram):
    """Factory: the same memory on a donor with the LoRA of a seed in its weights; the plain donor if None."""

    def make(seed=0):
        donor = tiny_donor()
        return tiny_engram(trained=True, donor=donor if seed is None else adapted(donor, seed).merge_and_unload())

    return make


def adapters_off(model):
    """A block without adapters: PEFT's for its own models, Transformers' for those that carry adapters themselves."""
    if isinstance(model, PeftModel):
        return model.disable_adapter()

    class Off:
        def __enter__(self):
            model.disable_adapters()

        def __exit__(self, *error):
            model.enable_adapters()

    return Off()


@pytest.mark.native_peft
@pytest.mark.parametrize("order", [memory_first, lora_first], ids=lambda order: order.__name__)
def test_lora_and_memory_add_up_in_either_order(order, tiny_donor, tiny_engram, reference):
    model = order(tiny_donor, tiny_engram)
    both = logits(model)
    assert near(both, logits(reference()))
    with model.disable_memory():
        assert torch.equal(logits(model), logits(adapted(tiny_donor())))
    with adapters_off(model):
        assert torch.equal(logits(model), logits(reference(None)))
        with model.disable_memory():
            assert torch.equal(logits(model), logits(tiny_donor()))
    assert torch.equal(logits(model), both)
    for other in (reference(None), adapted(tiny_donor()), tiny_donor()):
        assert not near(both, logits(other)), "control: both change what the model says"


@pytest.mark.native_peft
def test_a_donor_of_peft_gives_a_model_with_its_adapter(tiny_donor, tiny_engram):
    model = lora_first(tiny_donor, tiny_engram)
    assert type(model) is EngramForCausalLM
    assert model.active_adapters() == ["default"]
    assert not hasattr(model.backbone, "peft_config")
    assert type(tiny_engram(donor=adapted(tiny_donor()).merge_and_unload())) is EngramForCausalLM, "control"


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("make", [LoraConfig, IA3Config], ids=["LoRA", "IA3"])
def test_a_bare_configuration_finds_the_layers_that_it_finds_in_the_donor(make, name):
    config = BACKBONES[name]()
    if (
        make is IA3Config
        and config.model_type not in peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    ):
        with pytest.raises(ValueError, match="target_modules"):
            get_peft_model(engram_on(config), make())
        return
    donors = get_peft_model(AutoModelForCausalLM.from_config(config), make()).targeted_module_names
    ours = get_peft_model(engram_on(config), make()).targeted_module_names
    assert donors
    assert ours == [f"backbone.{name}" for name in donors]


def test_the_known_backbones_have_names_of_several_kinds():
    names = {tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[BACKBONES[name]().model_type]) for name in KNOWN}
    assert len(names) > 2, "control: one list of names for all would not do"


def test_a_backbone_that_peft_does_not_know_is_asked_about_as_the_donor_is():
    name = next(name for name in BACKBONES if name not in KNOWN and name != "mixtral")
    for model in (AutoModelForCausalLM.from_config(BACKBONES[name]()), engram_on(BACKBONES[name]())):
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            get_peft_model(model, LoraConfig())


def test_all_linear_leaves_the_memory_out(tiny_donor, tiny_engram):
    donors = get_peft_model(tiny_donor(), lora(target_modules="all-linear")).targeted_module_names
    ours = get_peft_model(tiny_engram(), lora(target_modules="all-linear")).targeted_module_names
    assert sorted(ours) == sorted(f"backbone.{name}" for name in donors)
    assert len(ours) == 4 * 7, "control: all seven linear maps of all four layers"


@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_projections_of_the_memory_are_adapted_when_asked_for(tiny_engram):
    model = adapted(tiny_engram(trained=True), config=lora(target_modules=["key_value", "q_proj"]))
    names = model.targeted_module_names
    assert [name for name in names if "memory" in name] == ["memory.layers.1.key_value", "memory.layers.2.key_value"]
    alone = adapted(tiny_engram(trained=True), config=lora(target_modules=["q_proj"]))
    with model.disable_memory():
        off = logits(model)
    with alone.disable_memory():
        assert not near(off, logits(tiny_engram(trained=True))), "control: q_proj is adapted"
    both = logits(model)
    assert not near(both, logits(alone))
    merged = model.merge_and_unload()
    # Merged keys are rounded, and the gate is steep near 0: up to 2e-5 on some CPUs, 1e-5 elsewhere.
    assert torch.allclose(logits(merged), both, rtol=0, atol=1e-4)
    assert not torch.allclose(logits(alone), both, rtol=0, atol=1e-2), "control: the memory's adapter is merged too"
    assert all(type(layer.key_value) is Projection for layer in merged.memory.layers.values())
    with torch.no_grad():
        short = merged.generate(ids()[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert short.shape == (1, 19)


def switched(way, model):
    """A model after a way of switching, and the seed of the LoRA that it must have then; None for none."""
    if way == "merge_and_unload":
        return model.merge_and_unload(), 0
    if way == "unload":
        return model.unload(), None
    if way == "deepcopy":
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return twin, 0
    if way == "merge_adapter":
        model.merge_adapter()
        return model, 0
    if way == "unmerge_adapter":
        model.merge_adapter()
        model.unmerge_adapter()
        return model, 0
    model.add_adapter("second", lora())
    stir(model, 1, "second")
    if way == "add_adapter":
        return model, 0
    model.set_adapter("second")
    if way == "set_adapter":
        return model, 1
    if way == "and back":
        model.set_adapter("default")
        return model, 0
    assert way == "delete_adapter"
    model.delete_adapter("default")
    return model, 1


WAYS = ["merge_and_unload", "unload", "deepcopy", "merge_adapter", "unmerge_adapter"]
WAYS += ["add_adapter", "set_adapter", "and back", "delete_adapter"]


@pytest.mark.parametrize("way", WAYS)
def test_the_memory_survives(way, tiny_donor, tiny_engram, reference):
    before = logits(adapted(tiny_engram(trained=True)))
    model, seed = switched(way, adapted(tiny_engram(trained=True)))
    model.eval()
    assert near(logits(model), logits(reference(seed)))
    assert near(logits(model), before) == (seed == 0), "control: another adapter says other things"
    with model.disable_memory():
        donor = tiny_donor()
        donor = donor if seed is None else adapted(donor, seed)
        assert near(logits(model), logits(donor))


def test_text_goes_on_as_in_the_reference(tiny_engram, reference):
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = reference().generate(ids(), num_beams=2, **settings)
    model = adapted(tiny_engram(trained=True))
    assert torch.equal(model.generate(input_ids=ids(), num_beams=2, **settings), expected)
    assert torch.equal(model.merge_and_unload().generate(ids(), num_beams=2, **settings), expected)
    assert not torch.equal(reference(None).generate(ids(), num_beams=2, **settings), expected), "control"


def test_peft_freezes_tables_wherever_they_are(tiny_engram):
    for placement in ("device", "cpu"):
        model = tiny_engram(trained=True).place_memory(placement)
        tables = list(model.memory.tables.parameters())
        assert len(tables) == 4
        assert all(table.requires_grad for table in tables), "control"
        get_peft_model(model, lora())
        assert not any(table.requires_grad for table in tables)


@pytest.mark.parametrize("placement", ["device", "cpu"])
def test_train_mode_reaches_through_peft_and_names_memory_and_adapter(placement, tiny_engram):
    model = get_peft_model(tiny_engram(trained=True).place_memory(placement), lora())
    model.set_trainable("memory+lora")
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if "lora_" not in name and ".memory." not in name} == set()
    assert sum("lora_" in name for name in learning) == 4 * 2 * 2
    assert all(parameter.requires_grad for parameter in model.memory.named_parts().values())
    assert all(parameter.requires_grad for parameter in model.memory.parameters())
    model.set_trainable("memory")
    assert not any("lora_" in name and p.requires_grad for name, p in model.named_parameters())


def test_a_mode_that_was_chosen_before_holds_for_an_adapter_that_comes_after(tiny_engram):
    model = tiny_engram()
    model.config.engram_trainable = "memory+lora"
    model = get_peft_model(model, lora())
    assert all(parameter.requires_grad for parameter in model.memory.parameters())
    assert any("lora_" in name and parameter.requires_grad for name, parameter in model.named_parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "backbone" in n and "lora_" not in n)


@pytest.mark.parametrize("placement", ["device", "cpu"])
def test_zero_grad_of_a_peft_model_reaches_tables_that_are_away(placement, tiny_engram):
    model = get_peft_model(tiny_engram(trained=True).place_memory(placement), lora())
    engram = model.set_trainable("memory+lora")
    model(input_ids=ids(), labels=ids()).loss.backward()
    parts = list(engram.memory.tables.parameters())
    assert all(part.grad is not None for part in parts), "control"
    model.zero_grad()
    assert all(part.grad is None for part in parts)


def test_wrapping_twice_changes_nothing_and_signatures_stay():
    methods = ("save_pretrained", "from_pretrained", "load_adapter", "add_adapter")
    before = [getattr(PeftModel, name) for name in methods]
    support_peft()
    assert [getattr(PeftModel, name) for name in methods] == before
    for method in before:
        assert method.patched_by
        assert not hasattr(method.__wrapped__, "patched_by"), "one wrapper"
        assert method.__doc__ == method.__wrapped__.__doc__


def test_a_model_without_memory_is_left_alone(tiny_donor, tmp_path):
    model = adapted(tiny_donor())
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "engram" not in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_donor(), tmp_path)), logits(model))


LATE = """
import importlib.util, sys
import engram_transformers
from engram_transformers.adapters.peft_patches import PeftFinder
from tests import tiny
from transformers import LlamaConfig
assert "peft" not in sys.modules, "the package alone needs no PEFT"
tiny.engram_on(LlamaConfig(vocab_size=4104, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, pad_token_id=2))
assert "peft" not in sys.modules, "nor does a model"
importlib.util.find_spec("peft")
import peft
assert not any(isinstance(finder, PeftFinder) for finder in sys.meta_path), "it waits no more"
print([getattr(peft.PeftModel, name).patched_by for name in ("save_pretrained", "from_pretrained", "load_adapter")])
"""


EARLY = """
import sys
import peft
import engram_transformers
assert [finder for finder in sys.meta_path if "engram" in type(finder).__module__] == []
print([getattr(peft.PeftModel, name).patched_by for name in ("save_pretrained", "from_pretrained", "load_adapter")])
"""


@pytest.mark.parametrize("script", [LATE, EARLY], ids=["after", "before"])
def test_peft_is_patched_whenever_it_is_imported(script):
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.splitlines()[-1] == str(["engram_transformers.adapters.peft_patches"] * 3)


def test_the_tolerance_is_small_beside_what_adapters_change(tiny_donor):
    assert (logits(adapted(tiny_donor())) - logits(tiny_donor())).abs().max() > 1000 * TOLERANCE
