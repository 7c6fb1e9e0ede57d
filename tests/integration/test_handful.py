"""A handful of tokens on a CPU: as Python integers and bytes the same rows, logits and histories as with tensors.

Proves it bit for bit, wherever the table is, through any chunks of several texts; that decoding does take this way; and
that whatever is not plainly such a step (a dead token, a hook that looks on, a table that learns, a row on a cold disk)
is left to the tensors. The control is the same model with `read_handful` taken away.

Run: pytest tests/integration/test_handful.py
"""

import contextlib
import copy
import os

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache, LlamaConfig

from engram_transformers import EngramFormatError, attach_memory_offload, memory_engram
from engram_transformers.compat_engram import CACHE
from engram_transformers.handful_engram import HandfulReads, read_handful
from engram_transformers.hashing_engram import HANDFUL
from engram_transformers.offload_engram import rows_hook
from engram_transformers.overlay_engram import write_part

from ..conftest import examples
from ..faults import absent, disk, shard_of
from ..tiny import engram_on
from .backbones import HEADS
from .placed import loaded


PLACES = ("device", "cpu", "disk")
OTHER = {"engram_max_ngram_size": 4, "engram_table_parts": 3, "engram_table_dtype": "bfloat16", "engram_head_dim": 5}
STEP = torch.tensor([[7], [4000]])


@pytest.fixture(scope="module")
def models(tmp_path_factory, saved):
    """Two memories in every place: the usual one, and one up to 4-grams in three parts of bfloat16."""
    other = tmp_path_factory.mktemp("other")
    engram_on(LlamaConfig(**HEADS), (1, 2), **OTHER).save_pretrained(other)
    folders = {"usual": saved, "other": other}
    return {(name, place): loaded(folder, place) for name, folder in folders.items() for place in PLACES}


@contextlib.contextmanager
def watched(way=read_handful):
    """What `read_handful`, or what stands in for it, gave to each pass."""
    given = []
    memory_engram.read_handful = lambda *asked: given.append(way(*asked)) or given[-1]
    try:
        yield given
    finally:
        memory_engram.read_handful = read_handful


def by_tensors(*asked) -> None:
    """What stands in for `read_handful` in the control."""


@torch.no_grad()
def read_in_chunks(model, texts: torch.Tensor, cuts: list[int]) -> tuple[list[torch.Tensor], DynamicCache]:
    """Logits of every chunk of texts `(batch, length)`, and the cache behind the last."""
    cache = DynamicCache(config=model.config.get_text_config())
    bounds = zip([0, *cuts], [*cuts, texts.shape[1]], strict=True)
    return [model(texts[:, i:j], **{CACHE: cache}).logits for i, j in bounds], cache


def histories(cache: DynamicCache) -> tuple[int, list]:
    """Tokens that a cache's Engram layer has counted, and its states."""
    layer = cache.layers[-1]
    return layer.seen, [state.tolist() for state in layer.conv_states.values()]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["usual", "other"])
@given(batch=st.integers(1, 3), cuts=st.sets(st.integers(1, 19)), seed=st.integers(0, 99))
@examples(15)
def test_logits_and_histories_are_those_of_tensors_through_any_chunks(place, name, batch, cuts, seed, models):
    texts = torch.randint(0, 4104, (batch, 20), generator=torch.Generator().manual_seed(seed))
    model, cuts = models[name, place], sorted(cuts)
    with watched() as ways:
        found, cache = read_in_chunks(model, texts, cuts)
    with watched(by_tensors):
        expected, other = read_in_chunks(model, texts, cuts)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert histories(cache) == histories(other)
    lengths = [j - i for i, j in zip([0, *cuts], [*cuts, 20], strict=True)]
    dead = (model.memory.hashing.token_map[texts] < 0).any(0).split(lengths)
    assert [way is not None for way in ways] == [
        batch * length <= HANDFUL and not bool(some.any()) for length, some in zip(lengths, dead, strict=True)
    ]


@pytest.mark.parametrize("place", PLACES)
def test_every_step_of_generate_takes_this_way_and_calls_no_table(place, models):
    model, prompt = models["usual", place], torch.arange(20, 40)[None]
    with watched() as ways:
        model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert [type(way) for way in ways] == [type(None)] + [HandfulReads] * 7


def test_a_crop_a_reset_and_a_record_of_the_past_are_followed(models):
    model, texts = models["usual", "device"], torch.randint(0, 4104, (1, 12))

    @torch.no_grad()
    def through() -> tuple:
        cache = DynamicCache(config=model.config.get_text_config())
        model(texts[:, :4], **{CACHE: cache})
        cache.layers[-1].activate_past_recording()
        for place in range(4, 9):
            model(texts[:, place : place + 1], **{CACHE: cache})
        cache.crop(-3)
        said = [model(texts[:, 6:7], **{CACHE: cache}).logits]
        seen = histories(cache)
        cache.reset()
        said.append(model(texts[:, :2], **{CACHE: cache}).logits)
        return said, seen, histories(cache)

    with watched() as ways:
        (found, *ours) = through()
    with watched(by_tensors):
        (expected, *theirs) = through()
    assert all(way is not None for way in ways)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and ours == theirs


def vectors(model, **given) -> tuple[bool, list[torch.Tensor]]:
    """Whether a step takes this way, and the memory vectors that it reads."""
    memory = model.memory
    asked = {"cache": None, "ids": STEP, **given}
    with watched() as ways:
        reads = memory.read(None, **asked)
        found = [reads.vectors(layer) for layer in memory.layer_ids]
        reads.drop()
    return bool(ways) and ways[-1] is not None, found


class LookOn(ModelHook):
    """A hook of somebody else's."""


def hooked(place: str, change):
    """A case: where the table is, and what is done to the model."""
    return pytest.param(place, change, id=f"{place}-{change.__name__}")


def table(model):
    return model.memory.tables["2"]


def a_hook_on_a_table(model):
    table(model).register_forward_hook(lambda *seen: None)


def a_hook_before_a_table(model):
    table(model).register_forward_pre_hook(lambda *seen: None)


def a_hook_on_an_order(model):
    table(model).order3.register_forward_hook(lambda *seen: None)


def a_hook_before_an_order(model):
    table(model).order3.register_forward_pre_hook(lambda *seen: None)


def accelerates_hook_on_an_order(model):
    add_hook_to_module(table(model).order3, LookOn(), append=True)


def accelerates_hook_on_a_table(model):
    add_hook_to_module(table(model), LookOn())


def a_hook_on_the_hashing(model):
    model.memory.hashing.register_forward_hook(lambda *seen: None)


def verifying(model):
    rows_hook(table(model).order3).verify = True


def no_prefetch(model):
    rows_hook(table(model).order3).prefetch = False


@pytest.mark.parametrize(
    ("place", "change"),
    [
        *(hooked(place, change) for place in PLACES for change in (a_hook_on_a_table, a_hook_before_a_table)),
        *(hooked(place, change) for place in PLACES for change in (a_hook_on_an_order, a_hook_before_an_order)),
        *(hooked(place, accelerates_hook_on_an_order) for place in PLACES),
        *(hooked(place, accelerates_hook_on_a_table) for place in PLACES),
        *(hooked(place, a_hook_on_the_hashing) for place in PLACES),
        *(hooked(place, change) for place in PLACES[1:] for change in (verifying, no_prefetch)),
    ],
)
@torch.no_grad()
def test_what_something_looks_at_is_left_to_tensors(place, change, saved):
    model = loaded(saved, place)
    taken, expected = vectors(model)
    assert taken
    change(model)
    taken, found = vectors(model)
    assert not taken
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_hook_on_all_modules_sees_the_tables(place, saved):
    model, seen = loaded(saved, place), []
    handle = register_module_forward_hook(lambda module, *rest: seen.append(module))
    try:
        taken, _ = vectors(model)
    finally:
        handle.remove()
    assert not taken and table(model) in seen
    assert vectors(model)[0]


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_learn_are_left_to_tensors(place, saved):
    model = loaded(saved, place)
    taken, found = vectors(model)
    assert not taken and found[0].requires_grad
    model.memory.tables.requires_grad_(False)
    taken, found = vectors(model)
    assert taken and not found[0].requires_grad
    with torch.no_grad():
        model.memory.tables.requires_grad_(True)
        assert vectors(model)[0]


@torch.no_grad()
def test_rows_with_a_tangent_are_left_to_tensors(models):
    with forward_ad.dual_level():
        assert not vectors(models["usual", "device"])[0]
    assert vectors(models["usual", "device"])[0]


@torch.no_grad()
def test_rows_that_are_sent_to_a_device_are_left_to_tensors(device, saved):
    model = attach_memory_offload(loaded(saved), "cpu", execution_device="counting")
    taken, found = vectors(model)
    assert not taken and all(vector.device.type == "counting" for vector in found)


@pytest.mark.parametrize(
    "asked",
    [
        {"ids": torch.tensor([[7], [-1]])},
        {"ids": torch.full((3, 3), 7)},
        {"alive": torch.tensor([[True], [False]])},
        {"ends": torch.tensor([[True], [False]])},
    ],
    ids=["a dead token", "more than a handful", "a pad", "documents"],
)
@torch.no_grad()
def test_what_is_not_plainly_text_is_left_to_tensors(asked, models):
    model = models["usual", "device"]
    assert vectors(model)[0] and not vectors(model, **asked)[0]
    assert vectors(model, alive=torch.ones(2, 1, dtype=torch.bool))[0]


@torch.no_grad()
def test_an_id_without_a_class_is_left_to_tensors(saved):
    model = loaded(saved)
    assert vectors(model)[0]
    model.memory.hashing.token_map[STEP[1]] = -1
    assert not vectors(model)[0]


@torch.no_grad()
def test_rows_that_were_written_over_a_file_are_read_as_they_are(saved):
    model = loaded(saved, "disk")
    before = vectors(model)[1]
    part = next(part for name, part in model.memory.named_host_parts() if ".1.order2" in name)
    write_part(part, model.memory.hashing.rows(STEP[:1], 1)[0, 0, :1], torch.full((1, 4), 7.0))
    taken, found = vectors(model)
    assert taken and (found[0][0, 0, :4] == 7).all()
    found[0][0, 0, :4] = before[0][0, 0, :4]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, before, strict=True))


@torch.no_grad()
def test_a_cold_row_is_fetched_behind(models):
    model = models["usual", "disk"]
    taken, expected = vectors(model)
    with disk(absent):
        late, found = vectors(model)
    assert (taken, late) == (True, False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@torch.no_grad()
def test_a_file_that_was_cut_is_noticed_in_a_step(place, folder):
    model = loaded(folder, place)
    assert vectors(model)[0]
    os.truncate(shard_of(folder), 5000)
    with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
        vectors(model)


@torch.no_grad()
def test_a_row_beside_the_table_is_refused_and_not_read(models):
    for place in PLACES:
        order = table(models["other", place]).order2
        held, height = bytearray(10), sum(order.heights)
        assert order.read_few([height - 1], memoryview(held), [0])
        for row in (-1, height):
            with pytest.raises(IndexError, match=rf"row {row} is outside the {height} rows"):
                order.read_few([0, row], memoryview(held), [0, 0])


@torch.no_grad()
def test_a_dispatched_model_is_read_as_before(saved):
    model, control = loaded(saved), loaded(saved)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    (_, found), (taken, expected) = vectors(model), vectors(control)
    assert taken and all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_vectors_are_a_copy_that_a_later_step_leaves_alone(place, models):
    model = models["usual", place]
    _, first = vectors(model)
    kept = copy.deepcopy(first)
    vectors(model, ids=STEP + 1)
    first[0].fill_(9)
    assert all(torch.equal(now, then) for now, then in zip(first[1:], kept[1:], strict=True))
    assert torch.equal(vectors(model)[1][0], kept[0])
