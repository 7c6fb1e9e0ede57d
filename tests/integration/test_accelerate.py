"""accelerate's hooks, offloading and big-model loading on a model whose decoder layers carry Engram's own hooks: the
logits are those of the plain run, bit for bit, wherever weights lie between the passes.

There is no accelerator here: everything runs on the CPU, and what is offloaded comes from memory or disk when it is
needed. Run: pytest tests/integration/test_accelerate.py
"""

import copy

import pytest
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import ModelHook, add_hook_to_module, attach_align_device_hook, remove_hook_from_module
from transformers import AutoModelForCausalLM

from engram_transformers import EngramConfig, EngramForCausalLM
from engram_transformers.hash_tokens_engram import TokenCompressor
from engram_transformers.memory_engram import InsertMemory

from .backbones import BACKBONES


# Where the parts of a model lie. Everything has a place, so one map fits all backbones.
MEMORY_ON_DISK = {"backbone": "cpu", "memory": "disk"}
TABLES_ON_DISK = {"backbone": "cpu", "memory.hashing": "cpu", "memory.layers": "cpu", "memory.tables": "disk"}
LAYERS_ON_DISK = {"backbone": "cpu", "memory.hashing": "cpu", "memory.layers": "disk", "memory.tables": "cpu"}
BACKBONE_ON_DISK = {"backbone": "disk", "memory": "cpu"}
ALL_ON_DISK = {"backbone": "disk", "memory": "disk"}
MAPS = {
    "memory on disk": MEMORY_ON_DISK,
    "tables on disk": TABLES_ON_DISK,
    "projections on disk": LAYERS_ON_DISK,
    "backbone on disk": BACKBONE_ON_DISK,
    "all on disk": ALL_ON_DISK,
}


@pytest.fixture(params=["llama", "deepseek_v4"])
def model(request, tiny_donor, tiny_engram) -> EngramForCausalLM:
    """A filled memory on the second and third layer."""
    return tiny_engram(trained=True, donor=tiny_donor(BACKBONES[request.param]()))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two texts of 9 and 6 tokens, pads on the left."""
    ids = torch.randint(3, 4104, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: EngramForCausalLM, batch: dict) -> torch.Tensor:
    return model(**batch).logits


@pytest.fixture
def plain(model, batch) -> torch.Tensor:
    """Logits before accelerate has touched the model; the memory has a part in them."""
    expected = logits(model, batch)
    with model.disable_memory():
        assert not torch.allclose(logits(model, batch), expected, atol=1e-3)
    return expected


@pytest.fixture
def saved(model, tmp_path):
    """The model's checkpoint."""
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def empty(saved, tiny_tokenizer) -> EngramForCausalLM:
    """The saved model without its weights. accelerate makes buffers as they are given, so it needs the token map."""
    config = EngramConfig.from_pretrained(saved)
    token_map = TokenCompressor.from_tokenizer(tiny_tokenizer).token_map(config.text_config.vocab_size)
    with init_empty_weights():
        model = EngramForCausalLM(config, token_map=token_map).eval()
    assert places(model, "") == {"meta"}
    return model


def places(model: EngramForCausalLM, prefix: str) -> set[str]:
    """Devices of the parameters under a name: "meta" for those that are elsewhere between passes."""
    found = {name: p.device.type for name, p in model.named_parameters() if name.startswith(prefix) and p.numel()}
    return set(found.values())


def check_places(model: EngramForCausalLM, device_map: dict[str, str]) -> None:
    """Without this, a map that nobody follows would pass."""
    for prefix, place in device_map.items():
        found = places(model, prefix)
        assert found <= {"meta" if place == "disk" else "cpu"}, prefix


def engram_hooks(model: EngramForCausalLM) -> int:
    return sum(isinstance(hook, InsertMemory) for m in model.modules() for hook in m._forward_pre_hooks.values())


def test_weights_that_wait_in_memory_give_the_same_logits(model, batch, plain):
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert places(model, "") == {"meta"}
    assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)  # they have gone back and come again


def no_buffer_is_here(model: EngramForCausalLM) -> bool:
    """Whether accelerate has taken hash constants and token map away too."""
    return {buffer.device.type for buffer in model.memory.hashing.buffers()} == {"meta"}


def test_buffers_that_wait_in_memory_give_the_same_logits(model, batch, plain):
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    for _ in range(2):
        assert no_buffer_is_here(model)
        assert torch.equal(logits(model, batch), plain)


def test_buffers_that_wait_give_the_same_text(model, batch, plain):
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **settings)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert no_buffer_is_here(model)
    assert torch.equal(model.generate(**batch, **settings), expected)


def test_buffers_of_a_dispatched_model_that_wait_on_disk_give_the_same_logits(model, batch, plain, tmp_path):
    offload = {"offload_dir": str(tmp_path / "waiting"), "offload_buffers": True}
    dispatch_model(model, ALL_ON_DISK, main_device="cpu", **offload)
    assert no_buffer_is_here(model)
    assert torch.equal(logits(model, batch), plain)


def test_weights_that_wait_on_disk_give_the_same_logits(model, batch, plain, tmp_path):
    disk_offload(model, str(tmp_path / "waiting"), execution_device=torch.device("cpu"))
    assert places(model, "") == {"meta"}
    assert torch.equal(logits(model, batch), plain)


def test_a_whole_model_that_is_brought_in_by_a_hook_gives_the_same_logits(model, batch, plain):
    model, hook = cpu_offload_with_hook(model, execution_device="cpu")
    assert torch.equal(logits(model, batch), plain)
    hook.offload()
    assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_a_dispatched_model_gives_the_same_logits(model, batch, plain, device_map, tmp_path):
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path / "waiting"))
    check_places(model, device_map)
    assert torch.equal(logits(model, batch), plain)


# accelerate 1.15 cannot load a checkpoint of which nothing stays: "device disk is invalid", for any model.
@pytest.mark.parametrize("name", [name for name in MAPS if name != "all on disk"])
def test_a_checkpoint_that_is_loaded_and_dispatched_gives_the_same_logits(empty, saved, batch, plain, name, tmp_path):
    loaded = load_checkpoint_and_dispatch(empty, saved, MAPS[name], offload_folder=str(tmp_path / "waiting"))
    check_places(loaded, MAPS[name])
    assert torch.equal(logits(loaded, batch), plain)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", None], ids=str)
def test_a_checkpoint_that_is_loaded_whole_gives_the_same_logits(empty, saved, batch, plain, device_map):
    loaded = load_checkpoint_and_dispatch(empty, saved, device_map=device_map)
    assert places(loaded, "") == {"cpu"}
    assert torch.equal(logits(loaded, batch), plain)


def test_an_empty_model_is_not_made_without_its_token_map(saved):
    """accelerate does not fill buffers of what is mapped to disk: a made-up map would stay, and read wrong rows."""
    with init_empty_weights(), pytest.raises(ValueError, match="pass token_map="):
        EngramForCausalLM(EngramConfig.from_pretrained(saved))


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_from_pretrained_with_a_device_map_gives_the_same_logits(saved, batch, plain, device_map, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(
        saved, device_map=device_map, offload_folder=str(tmp_path / "waiting")
    )
    check_places(loaded, device_map)
    assert torch.equal(logits(loaded, batch), plain)


def test_generation_with_offloaded_weights_is_the_same(model, batch, plain):
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **settings)
    with model.disable_memory():
        assert not torch.equal(model.generate(**batch, **settings), expected)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(**batch, **settings), expected)


class PassOn(ModelHook):
    """An accelerate hook that counts its calls and changes nothing."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_hooks_of_accelerate_and_of_engram_leave_each_other_alone(model, batch, plain):
    hooks = {name: PassOn() for name, _ in model.named_modules() if name}
    ours = engram_hooks(model)
    for name, module in model.named_modules():
        if name:
            add_hook_to_module(module, hooks[name])
    assert torch.equal(logits(model, batch), plain)
    for layer in model.memory.layer_ids:
        assert hooks[f"backbone.model.layers.{layer}"].calls == 1
        assert hooks[f"memory.layers.{layer}"].calls == 1
    remove_hook_from_module(model, recurse=True)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert engram_hooks(model) == ours == 2
    assert torch.equal(logits(model, batch), plain)


def test_weights_are_back_when_offloading_hooks_are_removed(model, batch, plain):
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True)
    assert places(model, "") == {"meta"}
    assert torch.equal(logits(model, batch), plain)
    remove_hook_from_module(model, recurse=True)
    assert places(model, "") == {"cpu"}
    assert torch.equal(logits(model, batch), plain)


def test_a_copy_of_a_hooked_model_reads_its_own_memory(model, batch, plain):
    add_hook_to_module(model.backbone.model.layers[1], PassOn())
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, batch), plain)
    with torch.no_grad():
        for parameter in other.memory.tables.parameters():
            parameter.mul_(2)
    assert torch.equal(logits(model, batch), plain)
    assert not torch.equal(logits(other, batch), plain)
