"""Every method of PEFT works around a model with a memory, or is refused when it is asked for.

"Works" is: with the memory off, what the donor says with the same adapter, bit for bit; with it on, the loss falls
while the adapter alone is trained, and the memory stays as it was.

Run: pytest tests/integration/test_peft_methods.py
"""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .adapted import adapted, ids, logits, lora, near, stir


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated"),  # PEFT's own use, in prompt learning
]

# What the donor's sizes (32 wide) need of each method.
WORKING = {
    "LORA": {},
    "ADALORA": {"total_step": 100},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 10},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {"r": 4},
    "IA3": {},
    "LILY": {},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": ids()[0, :5].tolist()},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 12},
}
REFUSED = {
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_tokens_type_mask": [1, 1]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "P_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "SHADOW": {},
    "XLORA": {},
}
# Not tried: one needs scikit-learn, the other a task's number with every call.
UNTRIED = {"ADAMSS", "POLY"}


def configuration(kind: str, **settings):
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings)


def nudged(model, config):
    """A PeftModel whose adapter is a little off its start; the same numbers whatever is around its layers."""
    torch.manual_seed(0)
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    learning = {name.replace("backbone.", ""): p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in sorted(learning):
            learning[name].add_(0.05 * torch.randn(learning[name].shape, generator=generator))
    return model


def losses(model, steps: int = 5) -> list[float]:
    """Losses on two texts while what requires a gradient is trained."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def memory_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.memory.state_dict().items()}


def same_memory(model, before) -> bool:
    after = model.memory.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_every_method_of_peft_is_accounted_for():
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known - {*WORKING, *REFUSED, *UNTRIED} == set(), "a new one: does it work with a memory?"
    assert WORKING.keys().isdisjoint(REFUSED)


@pytest.mark.parametrize("kind", WORKING)
def test_a_method_does_with_the_memory_off_what_it_does_to_the_donor_and_learns_with_it_on(
    kind, tiny_donor, tiny_engram
):
    if kind not in [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]:
        pytest.skip(f"this PEFT has no {kind}")
    expected = logits(nudged(tiny_donor(), configuration(kind, **WORKING[kind])))
    plain = tiny_engram(trained=True)
    before = memory_of(plain)
    model = nudged(plain, configuration(kind, **WORKING[kind]))
    with model.disable_memory():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(tiny_donor())), "control: the adapter is seen"
    found = losses(model)
    assert found[-1] < found[0]
    assert torch.isfinite(torch.tensor(found)).all()
    assert same_memory(model, before)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_method_that_cannot_work_is_refused_and_leaves_the_model_usable(kind, tiny_engram):
    if kind not in [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]:
        pytest.skip(f"this PEFT has no {kind}")
    model = tiny_engram(trained=True)
    before = logits(model)
    with pytest.raises(
        (NotImplementedError, ValueError), match="virtual tokens|does not work with a memory|Unsupported"
    ):
        get_peft_model(model, configuration(kind, **REFUSED[kind]))
    assert torch.equal(logits(model), before)


VARIANTS = {
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "all linear layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "a head that is trained whole": {"modules_to_save": ["lm_head"]},
    "new tokens": {"trainable_token_indices": ids()[0, :5].tolist()},
    "biases": {"bias": "all"},
    "a parameter": {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_lora_does_the_same(name, tied, tiny_llama_config, tiny_donor, tiny_engram, tmp_path):
    tiny_llama_config.tie_word_embeddings = tied
    expected = logits(nudged(tiny_donor(), lora(**VARIANTS[name])))
    plain = tiny_engram(trained=True)
    before = memory_of(plain)
    model = nudged(plain, lora(**VARIANTS[name]))
    with model.disable_memory():
        assert torch.equal(logits(model), expected)
    found = losses(model)
    assert found[-1] < found[0]
    assert same_memory(model, before)


FORBIDDEN = {
    "modules_to_save, a table": {"modules_to_save": ["tables.1"]},
    "modules_to_save, a layer": {"modules_to_save": ["lm_head", "memory.layers.1"]},
    "modules_to_save, all": {"modules_to_save": ["memory"]},
    "rows as tokens": {"trainable_token_indices": {"memory.tables.1.order2": [1, 2]}},
    "a table as parameter": {"target_parameters": ["order2.0"]},
    "tables as layers": {"target_modules": ["q_proj", "order2"]},
    "everything": {"target_modules": ".*"},
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_would_copy_or_wrap_tables_is_refused_and_names_train_mode(name, tiny_engram):
    model = tiny_engram(trained=True)
    before = logits(model)
    with pytest.raises(ValueError, match=r"reaches the memory \(memory.*set_trainable\('memory\+lora'\)"):
        get_peft_model(model, lora(**FORBIDDEN[name]))
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(adapted(model).unload()), before), "control: a plain LoRA is welcome"


def test_other_methods_than_lora_leave_the_projections_alone(tiny_engram):
    with pytest.raises(ValueError, match="only its projections"):
        get_peft_model(tiny_engram(), IA3Config(target_modules=["key_value"], feedforward_modules=[]))
    assert adapted(tiny_engram(), config=lora(target_modules=["key_value"])).targeted_module_names


def test_layers_are_not_replicated_under_a_memory(tiny_engram):
    with pytest.raises(NotImplementedError, match="layer_replication"):
        get_peft_model(tiny_engram(), lora(layer_replication=[[0, 3], [2, 4]]))


@pytest.mark.native_peft
def test_refusals_hold_for_a_second_adapter_and_for_models_that_carry_adapters_themselves(tiny_engram):
    model = adapted(tiny_engram(trained=True))
    with pytest.raises(ValueError, match="reaches the memory"):
        model.add_adapter("second", lora(modules_to_save=["memory.layers.1"]))
    native = tiny_engram(trained=True)
    with pytest.raises(ValueError, match="reaches the memory"):
        native.add_adapter(LoraConfig(modules_to_save=["memory.layers.1"]))
    assert list(model.peft_config) == ["default"]


def test_adapters_of_several_methods_mix(tiny_donor, tiny_engram):
    def mixed(model):
        model = get_peft_model(model, lora(), mixed=True)
        model.add_adapter("second", LoHaConfig(r=4))
        model.set_adapter(["default", "second"])
        return stir(stir(model.eval()), 1, "second")

    model = mixed(tiny_engram(trained=True))
    assert isinstance(model, PeftMixedModel)
    with model.disable_memory():
        assert torch.equal(logits(model), logits(mixed(tiny_donor())))
    assert not near(logits(model), logits(mixed(tiny_donor()))), "control"


def test_weights_made_on_the_meta_device_load(tiny_engram, tmp_path):
    model = adapted(tiny_engram())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_engram(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients(reentrant, tiny_engram):
    def gradients(checkpointed: bool):
        model = adapted(tiny_engram(trained=True))
        model.set_trainable("memory+lora")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        dense = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "tables" not in name}
        rows = {name: p.grad.row_values for name, p in model.named_parameters() if "tables" in name}
        return {**dense, **rows}

    plain, found = gradients(False), gradients(True)
    assert plain.keys() == found.keys()
    assert any("lora_A" in name for name in plain) and any("tables" in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-6), name  # of gradients about 1e-2
