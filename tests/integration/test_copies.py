"""Copies of models and caches: each computes with its own memory and its own history, and never with the first one's.

Copies are compared bit for bit; reading in pieces with reading at once to 1e-5 in float32.
That a changed copy leaves its original as it was, and that nothing is in flight in a copy, is also in
tests/unit/test_memory.py.

Run: pytest tests/integration/test_copies.py
"""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, DynamicCache

from engram_transformers.compat_engram import CACHE
from engram_transformers.memory_engram import InsertMemory
from engram_transformers.training import create_optimizer

from .backbones import BACKBONES


def through_a_file(model):
    """What `torch.save(model)` and `torch.load` make of it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
    "a copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}
every_way = pytest.mark.parametrize("copied", WAYS.values(), ids=WAYS.keys())


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@torch.no_grad()
@every_way
@pytest.mark.parametrize("part", ["tables", "layers"])
def test_neither_copy_nor_original_sees_what_is_done_to_the_other(copied, part, ids, tiny_engram):
    model = tiny_engram(trained=True)
    expected, state = model(ids).logits, copy.deepcopy(model.state_dict())
    with model.disable_memory():
        donors = model(ids).logits
    twin = copied(model)
    assert torch.equal(twin(ids).logits, expected)
    for parameter in getattr(twin.memory, part).parameters():
        parameter.zero_()
    assert torch.equal(twin(ids).logits, donors), "the copy reads another memory than its own"
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    other = copied(model)
    for parameter in getattr(model.memory, part).parameters():
        parameter.zero_()
    assert torch.equal(model(ids).logits, donors)
    assert torch.equal(other(ids).logits, expected), "the copy reads the original's memory"


@torch.no_grad()
@every_way
def test_a_copy_made_in_the_middle_of_a_pass_is_whole(copied, ids, tiny_engram):
    model = tiny_engram(trained=True, layers=(1, 2))
    expected, made = model(ids).logits, []

    def copy_now(*args):
        handle.remove()
        assert model.reads_in_flight.current is not None
        twin = copied(model)
        # The copy's backbone by itself, then another text in the copy, before the original goes on.
        made.extend([twin, twin.backbone(ids).logits, twin(ids.flip(1)).logits])

    # Behind the first Engram layer and in front of the second.
    handle = model.backbone.model.layers[1].register_forward_hook(copy_now)
    assert torch.equal(model(ids).logits, expected)
    twin, alone, flipped = made
    assert torch.equal(alone, model.backbone(ids).logits), "the original's pass goes on in the copy"
    assert torch.equal(flipped, model(ids.flip(1)).logits)
    assert torch.equal(twin(ids).logits, expected)


@torch.no_grad()
@every_way
def test_a_copy_made_with_the_memory_off_has_it_on(copied, ids, tiny_engram):
    model = tiny_engram(trained=True)
    expected = model(ids).logits
    with model.disable_memory():
        twin = copied(model)
        assert not torch.equal(model(ids).logits, expected)
        assert torch.equal(twin(ids).logits, expected)


def one_step(model, ids):
    """One training step of the memory, with the gradient left in place."""
    optimizer = create_optimizer(model.set_trainable("memory").train(), lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model(ids, labels=ids).loss.backward()
    model.eval()


USES = {
    "a pass": lambda model, ids: model(ids),
    "generate": lambda model, ids: model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2),
    "beams": lambda model, ids: model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=2),
    "a step of training": one_step,
    "a move": lambda model, ids: model.place_memory("cpu").place_memory("disk"),
}


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_a_model_can_be_copied_whatever_it_was_used_for(placement, use, copied, ids, saved):
    model = AutoModelForCausalLM.from_pretrained(saved, engram_placement=placement)
    use(model, ids)
    twin = copied(model)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
        assert torch.equal(twin.generate(ids, **settings), model.generate(ids, **settings))


@every_way
def test_a_copy_has_one_hook_on_every_engram_layer(copied, tiny_engram):
    twin = copied(tiny_engram(trained=True, layers=(0, 2)))
    found = {}
    for index, layer in enumerate(twin.backbone.model.layers):
        for hook in layer._forward_pre_hooks.values():
            assert isinstance(hook, InsertMemory)
            found.setdefault(index, []).append(hook.layer)
    assert found == {index: [twin.memory.layers[str(index)]] for index in (0, 2)}


@torch.no_grad()
@every_way
def test_a_copy_of_a_loaded_model_writes_into_no_file(copied, ids, tiny_engram, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*.safetensors")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = loaded(ids).logits
    twin = copied(loaded)
    for parameter in twin.memory.parameters():
        parameter.add_(1.0)
    assert not torch.equal(twin(ids).logits, expected)
    assert torch.equal(loaded(ids).logits, expected)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "twin")(ids).logits, twin(ids).logits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*.safetensors")} == files


@every_way
def test_training_a_copy_leaves_the_original_as_it_was(copied, ids, tiny_engram):
    model = tiny_engram(trained=True)
    state = copy.deepcopy(model.state_dict())
    twin = copied(model)
    optimizer = create_optimizer(twin, lr=1e-2)
    twin(ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.step()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    moved = {name for name, tensor in twin.state_dict().items() if not torch.equal(tensor, state[name])}
    assert {"memory.tables.1.order2.0", "memory.layers.2.key_value.weight"} <= moved, "control: the copy was trained"


@torch.no_grad()
def test_a_moving_average_averages_tables_too(ids, tiny_engram):
    model = tiny_engram(trained=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first update copies
    expected = model(ids).logits
    for parameter in model.memory.tables.parameters():
        parameter.zero_()
    assert torch.equal(average(ids).logits, expected)
    before = copy.deepcopy(average.module.memory.tables.state_dict())
    average.update_parameters(model)
    for name, tensor in average.module.memory.tables.state_dict().items():
        torch.testing.assert_close(tensor, before[name] / 2, rtol=0, atol=1e-6)
    assert not torch.equal(average(ids).logits, expected)


@torch.no_grad()
def test_a_state_dict_carries_the_whole_memory(ids, tiny_engram):
    model, fresh = tiny_engram(trained=True), tiny_engram(seed=1)
    assert not torch.equal(fresh(ids).logits, model(ids).logits)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not any(fresh.load_state_dict(torch.load(file, weights_only=True)))  # no key is missing or unknown
    assert torch.equal(fresh(ids).logits, model(ids).logits)


# Caches.


CACHE_WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}


@torch.no_grad()
@pytest.mark.parametrize("copied", CACHE_WAYS.values(), ids=CACHE_WAYS.keys())
@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2", "deepseek_v4", "lfm2", "falcon_h1"])
@pytest.mark.parametrize("read", [1, 2, 9])
def test_a_copied_cache_goes_on_by_itself(copied, backbone, read, ids, tiny_donor, tiny_engram):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES[backbone]()), layers=(0, 1))
    cache = DynamicCache(config=model.config.get_text_config())
    begun = model(ids[:, :read], **{CACHE: cache}, use_cache=True).logits
    twin = copied(cache)
    texts = [ids[:, read:], torch.randint(3, 4000, (2, 15 - read))]
    pieces = [[begun], [begun]]
    for step in range(15 - read):  # in turns, so that what one writes would be read by the other
        for own, text, found in zip((cache, twin), texts, pieces, strict=True):
            found.append(model(text[:, step : step + 1], **{CACHE: own}, use_cache=True).logits)
    for text, found in zip(texts, pieces, strict=True):
        whole = model(torch.cat([ids[:, :read], text], dim=1)).logits
        torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_prompt_serves_many_answers(ids, tiny_engram):
    model = tiny_engram(trained=True)
    prompt = model(ids, use_cache=True)[CACHE]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    for _ in range(3):
        longer = torch.cat([ids, torch.randint(3, 4000, (2, 4))], dim=1)
        settings["attention_mask"] = torch.ones_like(longer)
        found = model.generate(longer, **{CACHE: copy.deepcopy(prompt)}, **settings)
        assert torch.equal(found, model.generate(longer, **settings))
    assert prompt.get_seq_length() == 15
