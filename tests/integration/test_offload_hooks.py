"""Hooks of accelerate's kind that leave a table where it is: attaching and detaching are exact inverses, the hooks of
others stay, a wrong row is found, other models' big embeddings work the same, and what cannot work is refused.

Bytes are counted on the device of tests/counting_device; logits on it differ from the CPU's by at most 1e-5 (float32).
Run: pytest tests/integration/test_offload_hooks.py
"""

import contextlib
import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import AutoModelForCausalLM, Qwen4ExpTextConfig

from engram_transformers import (
    EngramConfig,
    EngramForCausalLM,
    EngramRowsHook,
    attach_memory_offload,
    detach_memory_offload,
)
from engram_transformers.offload_engram import rows_hook

from ..counting_device import counted
from .backbones import gemma3n, qwen4_exp
from .placed import loaded, logits, repeating_texts, same


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return repeating_texts()


def crossing(action) -> tuple[int, int]:
    with counted() as block:
        action()
    return block.h2d, block.d2h


class PassOn(ModelHook):
    """A hook of somebody else's."""


def snapshot(model) -> list:
    """Everything that attaching might change, by identity."""
    found = [(name, id(tensor), tensor.device, tensor.requires_grad) for name, tensor in model.named_parameters()]
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._state_dict_hooks)
        found.append((name, id(module.__dict__.get("_hf_hook")), *(list(hook) for hook in hooks)))
        own = sorted(key for key in module.__dict__ if key != "forward" and not key.startswith("known_"))
        found.append((name, list(module._load_state_dict_pre_hooks), own))
    return found


@pytest.mark.parametrize("where", ["cpu", "counting"])
@pytest.mark.parametrize("hooked", ["never", "before", "after"])
def test_detaching_undoes_attaching(hooked, where, device, saved, control, ids):
    model, there = loaded(saved).to(where), ids.to(where)
    order, other = model.memory.tables["1"].order2, PassOn()
    if hooked == "before":
        add_hook_to_module(order, other)
    before = snapshot(model)
    assert attach_memory_offload(model, "cpu") is model
    assert "memory.tables.1.order2.0" not in dict(model.named_parameters())
    if hooked == "after":
        with counted() as block:
            for hook in (other, PassOn(), PassOn()):  # accelerate puts sequences into sequences
                add_hook_to_module(order, hook, append=True)
        assert (block.h2d, block.d2h) == (0, 0), "appending a hook carries no table"
    assert isinstance(rows_hook(order), EngramRowsHook)
    assert same(logits(model, there), logits(control, ids))
    assert detach_memory_offload(model) is model
    after = snapshot(model)
    if where == "cpu" and hooked != "after":
        assert after == before
    found = [entry[0::2] for entry in after if len(entry) == 4 and "tables" in entry[0]]
    assert found == [entry[0::2] for entry in before if len(entry) == 4 and "tables" in entry[0]]
    assert (getattr(order, "_hf_hook", None) is not None) == (hooked != "never")
    assert same(logits(model, there), logits(control, ids))
    assert model.memory.placement == "device"
    attach_memory_offload(model, "cpu")  # and again


def test_a_hook_says_every_setting(saved):
    hook = EngramRowsHook(execution_device="cpu", prefetch=False, verify=True)
    assert repr(hook) == "EngramRowsHook(placement=None, execution_device=cpu, prefetch=False, verify=True)"
    model = attach_memory_offload(loaded(saved), "disk", verify=True)
    expected = "EngramRowsHook(placement='disk', execution_device=None, prefetch=True, verify=True)"
    assert repr(rows_hook(model.memory.tables["2"].order3)) == expected


def wrong(source):
    """A source that gives one wrong value when rows are fetched, and right ones when they are read again."""
    spoiled, right = copy.copy(source), source.read_resident

    def read_resident(rows):
        values = right(rows).clone()
        values[len(values) // 2, -1] += 1
        return values

    spoiled.read_resident = read_resident
    return spoiled


@pytest.mark.parametrize("where", ["cpu", "counting"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_verify_finds_one_wrong_value_and_no_other(place, where, device, saved, control, ids):
    for verify in (True, False):
        model = loaded(saved, "none").place_memory(place, verify=verify).to(where)
        assert same(logits(model, ids.to(where)), logits(control, ids))
        hook = rows_hook(model.memory.tables["2"].order3)
        hook.source = wrong(hook.source)
        if verify:
            with pytest.raises(RuntimeError, match=r"row \d+ of OrderRows was fetched as .* reads differ\)"):
                logits(model, ids.to(where))
        else:
            assert not same(logits(model, ids.to(where)), logits(control, ids)), "control: without it, no word"
    quiet = loaded(saved, "none").place_memory(place, prefetch=False, verify=True)
    assert torch.equal(logits(quiet, ids), logits(control, ids))


def ngrams() -> nn.Module:
    """transformers' own n-gram table, in the first layer."""
    config = qwen4_exp().to_dict()
    sizes = {"heads_per_ngram": 2, "ple_embed_dim": 32, "ngram_vocab_size_base": 500}
    config |= {"ple_layer_ids": [1], "make_ngram_vocab_size_divisible_by": 1, **sizes}
    del config["number_of_conv_states"]  # follows from the rest
    config = Qwen4ExpTextConfig.from_dict(config)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


OTHERS = {
    "gemma3n": (lambda: AutoModelForCausalLM.from_config(gemma3n()), "embed_tokens_per_layer"),
    "qwen4_exp": (ngrams, "ngram_embedding"),
}


@pytest.mark.parametrize(("make", "ending"), OTHERS.values(), ids=OTHERS)
def test_another_model_s_big_table_stays_and_its_rows_travel(make, ending, device, ids, tmp_path):
    torch.manual_seed(0)
    plain = make().eval()
    with torch.no_grad():
        for parameter in plain.parameters():  # a new model leaves what it reads there unused
            if not parameter.any():
                parameter.normal_(0, 0.3)
    (name,) = [name for name, _ in plain.named_modules() if name.endswith(ending)]
    table, expected = plain.get_submodule(name).weight.detach(), logits(plain, ids)
    model = attach_memory_offload(copy.deepcopy(plain), "cpu", modules=[name])
    assert torch.equal(logits(model, ids), expected)
    assert {n for n, _ in plain.named_parameters()} - {n for n, _ in model.named_parameters()} == {f"{name}.weight"}
    assert list(model.state_dict()) == list(plain.state_dict())
    for folder, each in (("plain", plain), ("hooked", model)):
        each.save_pretrained(tmp_path / folder)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "hooked")]
    assert files[0] == files[1]
    read = []
    look = plain.get_submodule(name).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    logits(plain, ids)
    look.remove()
    model.to("counting")
    there = ids.to("counting")
    other = copy.deepcopy(plain).to("counting")
    up_alone, down_alone = crossing(lambda: logits(other, there))
    up, down = crossing(lambda: logits(model, there))
    unique = read[0].unique().numel()
    assert up - up_alone == unique * table.shape[1] * 4 + read[0].numel() * (1 if unique <= 256 else 2)
    assert down - down_alone == read[0].numel() * 8
    assert same(logits(model, there), expected)
    with torch.no_grad():
        rows_hook(model.get_submodule(name)).source.parts[0].mul_(3)
    assert not same(logits(model, there), expected), "control: the table is heard"
    detach_memory_offload(model)
    assert torch.equal(model.get_submodule(name).weight, 3 * table)
    assert "weight" not in model.get_submodule(name).__dict__
    cpu_offload(theirs := make().eval(), "counting:0")
    assert crossing(lambda: logits(theirs, there))[0] >= table.nbytes, "control: accelerate's own brings it whole"


def meta_model(saved):
    config = EngramConfig.from_pretrained(saved)
    with torch.device("meta"):
        return EngramForCausalLM(config)


REFUSED = {
    "a model without memory": (TypeError, "no Engram memory", lambda s: attach_memory_offload(nn.Linear(2, 2))),
    "a linear layer": (
        TypeError,
        "Linear has the parameters",
        lambda s: attach_memory_offload(nn.Sequential(nn.Linear(2, 2)), modules=["0"]),
    ),
    "a bag": (
        TypeError,
        "EmbeddingBag",
        lambda s: add_hook_to_module(nn.EmbeddingBag(5, 2, padding_idx=0), EngramRowsHook()),
    ),
    "no parameters": (TypeError, "parameters none", lambda s: add_hook_to_module(nn.ReLU(), EngramRowsHook())),
    "an embedding on meta": (
        ValueError,
        "no storage",
        lambda s: add_hook_to_module(nn.Embedding(5, 2, device="meta"), EngramRowsHook()),
    ),
    "a memory on meta": (ValueError, "meta|load", lambda s: attach_memory_offload(meta_model(s))),
    "a name that is not there": (
        AttributeError,
        "nothing",
        lambda s: attach_memory_offload(loaded(s), modules=["nothing"]),
    ),
    "an embedding on disk": (
        ValueError,
        "'cpu' alone",
        lambda s: attach_memory_offload(nn.Sequential(nn.Embedding(5, 2)), "disk", modules=["0"]),
    ),
    "another word": (ValueError, "must be one of", lambda s: attach_memory_offload(loaded(s), "gpu")),
    "twice": (ValueError, "already", lambda s: attach_memory_offload(attach_memory_offload(loaded(s)))),
    "after a placement": (ValueError, "'disk' already", lambda s: attach_memory_offload(loaded(s, "disk"))),
    "an embedding twice": (
        ValueError,
        "offloaded already",
        lambda s: attach_memory_offload(
            attach_memory_offload(nn.Sequential(nn.Embedding(5, 2)), modules=["0"]), modules=["0"]
        ),
    ),
}


@pytest.mark.parametrize(("error", "words", "action"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_attached_is_refused(error, words, action, saved):
    with pytest.raises(error, match=words):
        action(saved)


def test_removing_all_hooks_gives_the_memory_back(saved, control, ids):
    for place in ("cpu", "disk"):
        model = loaded(saved, place)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model, ids), logits(control, ids))
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in control.named_parameters()]
        assert torch.equal(logits(attach_memory_offload(model), ids), logits(control, ids))
    nowhere = detach_memory_offload(loaded(saved, "none"))
    with control.without_memory():
        assert torch.equal(logits(nowhere, ids), logits(control, ids))


def test_tables_that_accelerate_has_put_away_can_be_placed(device, saved, control, ids):
    for way in (lambda m: m.place_memory("cpu"), attach_memory_offload, lambda m: m.place_memory("device")):
        model, there = loaded(saved), ids.to("counting")
        cpu_offload(model, "counting:0")
        with contextlib.suppress(ValueError):  # or says so
            way(model)
        assert same(logits(model, there), logits(control, ids))
