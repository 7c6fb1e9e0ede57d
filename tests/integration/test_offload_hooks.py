"""Hooks of accelerate's kind that leave a table where it is: removing one undoes attaching it, hooks of others stay, a
wrong row is found, and what cannot work is refused.

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

from engram_transformers import EngramConfig, EngramForCausalLM
from engram_transformers.rows_accelerate_engram import EngramRowsHook, rows_hook
from engram_transformers.rows_table_engram import OrderRows

from ..counting_device import counted
from .placed import loaded, logits, repeating_texts, same


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return repeating_texts()


class PassOn(ModelHook):
    """A hook of somebody else's."""


@pytest.mark.parametrize("where", ["cpu", "counting"])
@pytest.mark.parametrize("hooked", ["never", "before", "after"])
def test_placing_a_table_on_the_device_again_undoes_its_offload(hooked, where, device, saved, control, ids):
    model, there = loaded(saved).to(where), ids.to(where)
    order, other = model.memory.tables["1"].order2, PassOn()
    if hooked == "before":
        add_hook_to_module(order, other)
    before = [(name, p.shape, p.device, p.requires_grad) for name, p in model.named_parameters()]
    assert model.place_memory("cpu") is model
    assert order.parts[0].shape == (0, order.width) and order.parts[0].is_cpu
    if hooked == "after":
        with counted() as block:
            for hook in (other, PassOn(), PassOn()):  # accelerate puts sequences into sequences
                add_hook_to_module(order, hook, append=True)
        assert (block.h2d, block.d2h) == (0, 0), "appending a hook carries no table"
    assert isinstance(rows_hook(order), EngramRowsHook)
    assert same(logits(model, there), logits(control, ids))
    model.place_memory("device")
    assert [(name, p.shape, p.device, p.requires_grad) for name, p in model.named_parameters()] == before
    assert (getattr(order, "_hf_hook", None) is not None) == (hooked != "never"), "the hooks of others stay"
    assert rows_hook(order) is None and order.store is None
    assert same(logits(model, there), logits(control, ids))
    model.place_memory("cpu")  # and again


def test_a_hook_says_every_setting(saved):
    hook = EngramRowsHook(execution_device="cpu", prefetch=False, verify=True)
    assert repr(hook) == "EngramRowsHook(placement=None, execution_device=cpu, prefetch=False, verify=True)"
    model = loaded(saved).place_memory("disk", verify=True)
    expected = "EngramRowsHook(placement='disk', execution_device=None, prefetch=True, verify=True)"
    assert repr(rows_hook(model.memory.tables["2"].order3)) == expected


def wrong(store):
    """A store that gives one wrong value when rows are fetched, and right ones when they are read again."""
    spoiled, right = copy.copy(store), store.read_resident

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
        order = model.memory.tables["2"].order3
        order.store = wrong(order.store)
        if verify:
            with pytest.raises(RuntimeError, match=r"row \d+ of OrderRows was fetched as .* reads differ\)"):
                logits(model, ids.to(where))
        else:
            assert not same(logits(model, ids.to(where)), logits(control, ids)), "control: without it, no word"
    quiet = loaded(saved, "none").place_memory(place, prefetch=False, verify=True)
    assert torch.equal(logits(quiet, ids), logits(control, ids))


def meta_model(saved):
    config = EngramConfig.from_pretrained(saved)
    with torch.device("meta"):
        return EngramForCausalLM(config)


REFUSED = {
    "a linear layer": (TypeError, "got Linear", lambda s: add_hook_to_module(nn.Linear(2, 2), EngramRowsHook())),
    "an embedding": (TypeError, "got Embedding", lambda s: add_hook_to_module(nn.Embedding(5, 2), EngramRowsHook())),
    "rows on meta": (
        ValueError,
        "no storage",
        lambda s: add_hook_to_module(OrderRows([5], 2, torch.float32).to("meta"), EngramRowsHook()),
    ),
    "a memory on meta": (ValueError, "meta|load", lambda s: meta_model(s).place_memory("cpu")),
    "another word": (ValueError, "must be one of", lambda s: loaded(s).place_memory("gpu")),
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
        assert torch.equal(logits(model.place_memory("cpu"), ids), logits(control, ids))
    nowhere = loaded(saved, "none")
    remove_hook_from_module(nowhere, recurse=True)
    with control.disable_memory():
        assert torch.equal(logits(nowhere, ids), logits(control, ids))


def test_tables_that_accelerate_has_put_away_can_be_placed(device, saved, control, ids):
    for place in ("cpu", "disk", "device"):
        model, there = loaded(saved), ids.to("counting")
        cpu_offload(model, "counting:0")
        with contextlib.suppress(ValueError):  # or says so
            model.place_memory(place)
        assert same(logits(model, there), logits(control, ids))
