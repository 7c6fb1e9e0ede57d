"""Devices other than the one that a model was made on: a default device that the user sets, layers of one model on
several devices, and donors that are spread out.

Two devices stand for many: the CPU and the device of tests/counting_device. Logits on it differ from the CPU's by at
most 1e-5 (float32). That no tensor is made on a default device by accident is in tests/house/test_devices.py.
Run: pytest tests/integration/test_devices.py
"""

from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from engram_transformers import EngramForCausalLM
from engram_transformers.training import engram_optimizer

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
        model.train_mode("memory")
        optimizer = engram_optimizer(model, lr=1e-3) if place != "device" else None  # the device draws no numbers
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
def test_a_donor_on_the_default_device_takes_a_memory(default, device, tiny_tokenizer, tiny_llama_config, ids):
    with default():
        donor = AutoModelForCausalLM.from_config(tiny_llama_config).eval()
        expected = donor(ids.to("counting")).logits.detach().cpu()
        model = EngramForCausalLM.from_donor(donor, tiny_tokenizer, [1], engram_vocab_size=200, engram_head_dim=4)
        assert {parameter.device.type for parameter in model.parameters()} == {"counting"}
        assert torch.equal(logits(model, ids.to("counting")), expected)
