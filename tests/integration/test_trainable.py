"""What is trained is a word: it names what learns and freezes the rest, wherever the tables are, with adapters and
without; it is saved with the model and restored with it.

Run: pytest tests/integration/test_train_mode.py
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from engram_transformers import create_optimizer
from engram_transformers.adapters.memory_delta import named_parts

from .placed import loaded


def learning(model) -> set[str]:
    """Names of everything that learns, parts of tables in host memory and in files included."""
    held = {**dict(model.named_parameters()), **named_parts(model)}
    return {name for name, parameter in held.items() if parameter.requires_grad}


def tables(model) -> set[str]:
    return set(named_parts(model))


def layers(model) -> set[str]:
    return {f"memory.layers.{name}" for name, _ in model.memory.layers.named_parameters()}


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_word_names_what_learns(place, saved):
    model = loaded(saved, place)
    backbone = {f"backbone.{name}" for name, _ in model.backbone.named_parameters()}
    for word, expected in (
        ("memory", tables(model) | layers(model)),
        ("all", tables(model) | layers(model) | backbone),
        ("tables", tables(model)),
        ("reader", layers(model)),
        ("memory", tables(model) | layers(model)),
    ):
        assert model.set_trainable(word) is model
        assert learning(model) == expected
        assert model.config.engram_trainable == word


@pytest.mark.native_peft
@pytest.mark.parametrize("native", [False, True], ids=["peft", "transformers"])
def test_memory_and_lora_learn_together(native, saved):
    model = loaded(saved)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if native:
        model.add_adapter(config)
    else:
        get_peft_model(model, config)
    model.set_trainable("memory+lora")
    adapters = {name for name in learning(model) if "lora_" in name}
    assert len(adapters) == 2 * 2 * model.config.text_config.num_hidden_layers
    assert learning(model) == tables(model) | layers(model) | adapters
    model.set_trainable("memory")
    assert learning(model) == tables(model) | layers(model)


def test_what_cannot_be_is_refused(saved):
    model = loaded(saved)
    before = learning(model)
    with pytest.raises(ValueError, match=r"'lora' must be one of 'memory', 'tables', 'reader', 'memory\+lora', 'all'"):
        model.set_trainable("lora")
    with pytest.raises(ValueError, match=r"found no adapter.*get_peft_model"):
        model.set_trainable("memory+lora")
    assert learning(model) == before and model.config.engram_trainable is None


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("word", ["memory", "tables", "reader", "all", "memory+lora"])
def test_the_word_is_saved_and_restored(word, place, saved, tmp_path):
    model = loaded(saved)
    if word == "memory+lora":  # the adapter is in a folder of its own, and comes later
        model.config.engram_trainable = word
    else:
        model.set_trainable(word)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).engram_trainable == word
    again = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=place)
    expected = (set() if word == "reader" else tables(again)) | (set() if word == "tables" else layers(again))
    expected |= {f"backbone.{name}" for name, _ in again.backbone.named_parameters()} if word == "all" else set()
    assert learning(again) == expected
    again.place_memory("cpu")
    assert learning(again) == expected, "a move changes nothing of it"
    control = loaded(saved, place)
    assert learning(control) == {*dict(control.named_parameters()), *tables(control)}


def test_a_word_that_is_none_is_no_configuration(saved):
    with pytest.raises(Exception, match="engram_trainable"):
        AutoConfig.from_pretrained(saved, engram_trainable="everything")


def test_the_word_changes_no_result(saved):
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        expected = loaded(saved)(ids).logits
        for word in ("memory", "tables", "reader", "all"):
            assert torch.equal(loaded(saved).set_trainable(word)(ids).logits, expected)


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_reader_learns_over_frozen_rows_and_its_delta_brings_it_back(place, saved, tmp_path):
    ids = torch.randint(3, 300, (2, 9))
    model = loaded(saved, place).set_trainable("reader")
    before = {name: weight.clone() for name, weight in model.memory.layers.named_parameters()}
    optimizer = create_optimizer(model, lr=0.1)
    assert {group["name"] for group in optimizer.param_groups} == {"projections", "vectors"}
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, weight in model.memory.layers.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(before)
    rows = [tensor for order in model.memory.tables["1"].orders() for tensor in order.tensors()]
    stored = [tensor for order in loaded(saved).memory.tables["1"].orders() for tensor in order.tensors()]
    assert all(torch.equal(now, then) for now, then in zip(rows, stored, strict=True))
    delta = model.save_memory_delta(tmp_path / "reader")
    assert load_file(delta).keys() == {f"memory.layers.{name}" for name in before}, "not a row is in it"
    again = loaded(saved, place)
    again.load_memory_delta(delta)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert not torch.equal(again(ids).logits, loaded(saved)(ids).logits)
