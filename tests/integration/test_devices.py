"""Devices other than the one that a model was made on: a default device that the user sets, layers of one model on
several devices, and donors that are spread out.

Two devices stand for many: the CPU and the device of tests/counting_device. Logits on it differ from the CPU's by at
most 1e-5 (float32). That no tensor is made on a default device by accident is in tests/house/test_devices.py.
Run: pytest tests/integration/test_devices.py
"""

from contextlib import contextmanager

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from engram_transformers import EngramConfig, EngramForCausalLM
from engram_transformers.files_checkpoint_engram import CheckpointFiles
from engram_transformers.training import create_optimizer

from .placed import loaded, logits, repeating_texts, same


@contextmanager
def default_device():
    """What a script's first line does, for as long as the block runs."""
    torch.set_default_device("counting")
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {"torch.set_default_device": default_device, "with torch.device": lambda: torch.device("counting")}
every_default = pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return repeating_texts()


@every_default
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_default_device_changes_nothing_but_where_the_model_is(default, place, device, saved, control, ids, tmp_path):
    there = ids.to("counting")
    with default():
        model = loaded(saved, place)
        assert model.device.type == "counting"
        assert same(logits(model, there), logits(control, ids))
        written = model.generate(there[:, :5], max_new_tokens=4, do_sample=False)
        model.set_trainable("memory")
        optimizer = create_optimizer(model, lr=1e-3) if place != "device" else None  # the device draws no numbers
        model(there, labels=there, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(tmp_path)
        again = loaded(tmp_path, place)
        assert same(logits(again, there), logits(model, there))
    assert torch.equal(written.cpu(), control.generate(ids[:, :5], max_new_tokens=4, do_sample=False))
    trained = loaded(tmp_path)
    assert same(logits(trained, ids), logits(control, ids)) == (place == "device")


@every_default
def test_auto_counts_the_memory_of_the_default_device(default, device, counting_device, saved):
    files = CheckpointFiles(EngramConfig, saved, {})
    assert files.placement("auto") == "device", "the control: there is room on the CPU"
    with counting_device.total_memory(1 << 10), default():
        assert files.placement("auto") == "cpu"


@every_default
def test_a_donor_on_the_default_device_takes_a_memory(default, device, tiny_tokenizer, tiny_llama_config, ids):
    with default():
        donor = AutoModelForCausalLM.from_config(tiny_llama_config).eval()
        expected = donor(ids.to("counting")).logits.detach().cpu()
        model = EngramForCausalLM.from_backbone(donor, tiny_tokenizer, [1], engram_vocab_size=200, engram_head_dim=4)
        assert {parameter.device.type for parameter in model.parameters()} == {"counting"}
        assert torch.equal(logits(model, ids.to("counting")), expected)


def spread(model: nn.Module, places: dict[str, str]) -> nn.Module:
    """A model over several devices, as accelerate's `dispatch_model` puts it there."""
    for name, place in places.items():
        model.get_submodule(name).to(place)
    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": torch.device("cpu"), **{name: torch.device(place) for name, place in places.items()}},
        offload=dict.fromkeys(places, False),
        skip_keys=["cache", "past_key_values"],
    )
    return model


SPREADS = {
    "the memory on another device, as accelerate's maps have it": {"backbone": "cpu", "memory": "counting"},
    "the memory alone on the CPU": {"backbone": "counting", "memory": "cpu"},
    "tables alone on another device": {"backbone": "cpu", "memory.hashing": "cpu", "memory.tables": "counting"}
    | {"memory.layers": "cpu"},
    "hashing alone on another device": {"backbone": "cpu", "memory.hashing": "counting", "memory.tables": "cpu"}
    | {"memory.layers": "cpu"},
}


@pytest.mark.parametrize("places", SPREADS.values(), ids=SPREADS)
def test_a_model_over_two_devices_says_what_it_says_on_one(places, device, saved, control, ids):
    model = spread(loaded(saved), places)
    assert same(logits(model, ids), logits(control, ids))
    cache = DynamicCache()
    pieces = [model(piece, cache=cache).logits.detach().cpu() for piece in ids.split([12, 1, 7], dim=1)]
    assert same(torch.cat(pieces, dim=1), logits(control, ids))


def test_a_layer_that_was_moved_by_hand_gets_the_stream_and_gives_it_back(device, saved, control, ids):
    model = loaded(saved)
    model.memory.layers["1"].to("counting")  # no hook of accelerate brings it anything
    assert same(logits(model, ids), logits(control, ids))


def test_gradients_find_their_rows_over_two_devices(device, saved, ids):
    losses = []
    for model in (loaded(saved), spread(loaded(saved), {"backbone": "cpu", "memory": "counting"})):
        model.set_trainable("memory")
        model(ids, labels=ids, use_cache=False).loss.backward()
        part = model.memory.tables["1"].order2[0]
        losses.append((part.grad.rows.cpu(), part.grad.row_values.cpu()))
        assert model.memory.layers["1"].key_value.weight.grad.device == part.device
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-6)


TWO_DEVICES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"} | dict.fromkeys(
    ["model.layers.1", "model.layers.2", "model.layers.3", "model.norm", "lm_head"], "counting"
)
DONORS = {
    "on two devices": lambda donor: spread(donor, TWO_DEVICES),
    "offloaded to the host": lambda donor: cpu_offload(donor, execution_device=torch.device("counting")),
}


@pytest.mark.parametrize("kind", DONORS)
def test_a_layer_of_the_memory_goes_with_its_decoder_layer(kind, device, tiny_donor, tiny_tokenizer, fill_memory, ids):
    sizes = {"engram_layer_ids": [0, 2], "engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
    expected = logits(fill_memory(EngramForCausalLM.from_backbone(tiny_donor(), tiny_tokenizer, **sizes)), ids)
    model = EngramForCausalLM.from_backbone(DONORS[kind](tiny_donor()), tiny_tokenizer, **sizes)
    found = {name: layer.key_value.weight.device.type for name, layer in model.memory.layers.items()}
    assert found == {"0": "cpu" if kind == "on two devices" else "counting", "2": "counting"}
    assert {name: table.order2[0].device.type for name, table in model.memory.tables.items()} == found
    assert same(logits(fill_memory(model), ids), expected)


def test_a_model_without_storage_has_no_token_map_that_could_be_taken_for_a_checkpoint_s(saved):
    config = AutoConfig.from_pretrained(saved)
    with torch.device("meta"):
        assert EngramForCausalLM(config).memory.hashing.token_map.is_meta
