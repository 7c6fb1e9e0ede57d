"""EngramMemory in a backbone: finding the layers, inserting, copying, and one pass not disturbing another.

Run with `pytest tests/unit/test_memory.py`.
"""

import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer

from engram_transformers.backbone_engram import find_decoder_layers
from engram_transformers.compat_engram import CACHE
from engram_transformers.memory_engram import EngramMemory, InsertMemory, MemoryReads, ReadsInFlight, insert_memory


IDS = torch.arange(20, 32)[None]


def logits(model, ids=IDS, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def hooks(model) -> dict[int, InsertMemory]:
    """The hooks of a model's Llama layers, by layer."""
    found = {
        place: [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, InsertMemory)]
        for place, layer in enumerate(model.backbone.model.layers)
    }
    assert all(len(inserted) <= 1 for inserted in found.values())
    return {place: inserted[0] for place, inserted in found.items() if inserted}


# Finding the decoder layers.


class Stack(nn.Module):
    """A module with lists of the given lengths, of checkpointable layers or of others."""

    def __init__(self, *lengths: int, kind: type = GradientCheckpointingLayer):
        super().__init__()
        for place, length in enumerate(lengths):
            self.add_module(f"list{place}", nn.ModuleList(kind() for _ in range(length)))


def test_the_one_list_of_as_many_checkpointable_layers_is_found():
    stack = Stack(3, 4, 5)
    assert find_decoder_layers(stack, 4) is stack.list1


@pytest.mark.parametrize(
    ("backbone", "found"),
    [
        (Stack(3, 5), "none"),
        (Stack(), "none"),
        (Stack(4, kind=nn.Identity), "none"),
        (Stack(4, 4), "list0, list1"),
    ],
    ids=["other lengths", "no list", "other layers", "two lists"],
)
def test_a_backbone_without_exactly_one_such_list_is_refused(backbone, found):
    with pytest.raises(ValueError, match=rf"exactly one ModuleList of 4 Gradient.*found: {found}\. Engram cannot"):
        find_decoder_layers(backbone, 4)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPT2Config(vocab_size=4104, n_layer=4, n_embd=32, n_head=4), "transformer.h"),
        (
            Qwen3Config(
                vocab_size=4104,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
            ),
            "model.layers",
        ),
    ],
    ids=["gpt2", "qwen3"],
)
def test_layers_are_found_whatever_they_are_called(config, name, tiny_donor):
    donor = tiny_donor(config)
    assert find_decoder_layers(donor, 4) is donor.get_submodule(name)


# Inserting.


@pytest.mark.parametrize("layers", [(1, 2), (3, 0)])
def test_every_engram_layer_gets_one_hook_with_its_own_layer(layers, tiny_engram):
    model = tiny_engram(layers=layers)
    assert set(hooks(model)) == set(layers)
    for layer_id, hook in hooks(model).items():
        assert hook.layer_id == layer_id
        assert hook.layer is model.memory.layers[str(layer_id)]
        assert hook.in_flight is model.reads_in_flight


@pytest.mark.parametrize("layers", [(1, 2), (3, 0)])
def test_every_layer_reads_its_own_rows_of_its_own_table(layers, tiny_engram):
    memory = tiny_engram(trained=True, layers=layers, engram_table_parts=3).memory
    reads = memory.read(IDS, None)
    assert list(reads.rows) == list(layers)
    for layer_id, heights in zip(layers, memory.hashing.constants.order_rows(), strict=True):
        orders = memory.tables[str(layer_id)].orders()
        assert [sum(len(part) for part in parts) for parts in orders] == heights
        table = torch.cat([part for parts in orders for part in parts])  # one physical table, as in the paper
        assert torch.equal(reads.vectors(layer_id), table[memory.hashing.rows(IDS, layer_id)].flatten(-2))
    assert not torch.equal(reads.vectors(layers[0]), reads.vectors(layers[1]))


def test_a_backbone_takes_one_memory_only(tiny_engram):
    model = tiny_engram()
    with pytest.raises(ValueError, match="already carries an Engram memory: load the donor again"):
        insert_memory(model.backbone, 4, EngramMemory(model.config, model.memory.hashing.token_map))
    assert set(hooks(model)) == {1, 2}


def test_a_fresh_memory_adds_exactly_nothing(tiny_engram, tiny_donor):
    assert torch.equal(logits(tiny_engram()), logits(tiny_donor()))


def stream_into(model, place: int, **kwargs) -> torch.Tensor:
    """The residual stream that a decoder layer gets, after everything that was inserted in front of it."""
    streams = []

    def keep(module, args, kwargs):
        streams.append(args[0] if args else kwargs["hidden_states"])

    handle = model.backbone.model.layers[place].register_forward_pre_hook(keep, with_kwargs=True)
    logits(model, **kwargs)
    handle.remove()
    return streams[0]


def test_a_trained_memory_adds_what_its_layer_computes(tiny_engram):
    model = tiny_engram(trained=True, layers=(1,))
    with model.disable_memory():
        without = stream_into(model, 1)
    rows = model.memory.hashing(IDS)[1]
    with torch.no_grad():
        added = model.memory.layers["1"](without, model.memory.tables["1"](rows[0]))
    assert torch.equal(stream_into(model, 1), without + added)
    assert added.abs().max() > 0.1


@pytest.mark.parametrize("as_keyword", [False, True])
def test_the_stream_is_not_changed_in_place_and_may_be_a_keyword(as_keyword, tiny_engram):
    model, stream = tiny_engram(trained=True), torch.randn(1, 12, 32)
    hook, before = hooks(model)[1], stream.clone()
    reads = model.memory.read(IDS, None)
    args, kwargs = ((), {"hidden_states": stream, "x": 1}) if as_keyword else ((stream, "x"), {"y": 1})
    with torch.no_grad(), model.reads_in_flight.hold(reads):
        new_args, new_kwargs = hook(model.backbone.model.layers[1], args, kwargs)
    changed = new_kwargs.pop("hidden_states") if as_keyword else new_args[0]
    assert torch.equal(stream, before)
    assert not torch.equal(changed, stream)
    assert (new_args, new_kwargs) == (((), {"x": 1}) if as_keyword else ((changed, "x"), {"y": 1}))


@pytest.mark.parametrize("shape", [(1, 12, 4, 32), (1, 12, 33), (12, 1, 32), (1, 11, 32)])
def test_a_stream_of_another_shape_is_refused(shape, tiny_engram):
    model = tiny_engram()
    reads = model.memory.read(IDS, None)
    said = rf"LlamaDecoderLayer 1 gets .* shape {re.escape(str(shape))}, Engram needs \(1, 12, (1, )?32\)"
    with model.reads_in_flight.hold(reads), pytest.raises(ValueError, match=said):
        hooks(model)[1](model.backbone.model.layers[1], (torch.zeros(shape),), {})


def test_rows_are_read_once_for_all_layers(tiny_engram, monkeypatch):
    model, calls = tiny_engram(trained=True), []
    forward = type(model.memory.hashing).forward
    monkeypatch.setattr(
        type(model.memory.hashing), "forward", lambda self, *args: (calls.append(1), forward(self, *args))[1]
    )
    logits(model)
    assert len(calls) == 1


@pytest.mark.parametrize(("kernel", "convolutions"), [(4, 2), (1, 0), (0, 0)])
def test_convolution_histories_are_counted_where_there_are_any(kernel, convolutions, tiny_engram):
    model = tiny_engram(engram_kernel_size=kernel)
    assert model.memory.convolutions == convolutions
    cache = DynamicCache()
    logits(model, **{CACHE: cache}, use_cache=True)
    assert cache.layers[-1].number_of_states == 1 + convolutions


def test_pads_get_nothing_from_the_memory(tiny_engram):
    model, alive = tiny_engram(trained=True, layers=(1,)), torch.ones_like(IDS)
    alive[:, :3] = alive[:, 7] = 0
    with model.disable_memory():
        without = stream_into(model, 1, attention_mask=alive)
    changed = (stream_into(model, 1, attention_mask=alive) != without).any(-1)
    assert torch.equal(changed, alive.bool())


@pytest.mark.parametrize("cuts", [[1], [5, 6], list(range(1, 12))], ids=str)
def test_a_cache_carries_the_memorys_histories(cuts, tiny_engram):
    model, cache, chunks = tiny_engram(trained=True, engram_max_ngram_size=4), DynamicCache(), []
    for first, last in zip([0, *cuts], [*cuts, IDS.shape[1]], strict=True):
        chunks.append(logits(model, IDS[:, first:last], **{CACHE: cache}, use_cache=True))
    whole = logits(model)
    # Float32 rounding, for logits around 5, through four layers and two gates.
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=0, atol=1e-3)
    cut_off = logits(model, IDS[:, cuts[0] :])
    assert not torch.allclose(cut_off, whole[:, cuts[0] :], atol=1e-2)  # the control: a text without its beginning


def test_a_cache_cannot_change_between_with_and_without_memory(tiny_engram):
    model = tiny_engram(trained=True)
    begun_with, begun_without = DynamicCache(), DynamicCache()
    logits(model, **{CACHE: begun_with}, use_cache=True)
    with model.disable_memory():
        logits(model, **{CACHE: begun_without}, use_cache=True)
        logits(model, **{CACHE: begun_without}, use_cache=True)  # the control: going on is fine
        with pytest.raises(ValueError, match="begun with the memory on"):
            logits(model, **{CACHE: begun_with}, use_cache=True)
    logits(model, **{CACHE: begun_with}, use_cache=True)
    with pytest.raises(ValueError, match="24 tokens that were read without the memory"):
        logits(model, **{CACHE: begun_without}, use_cache=True)


# The donor inside, and the memory switched off.


def test_the_backbone_by_itself_is_the_donor(tiny_engram, tiny_donor):
    model, donor = tiny_engram(trained=True), tiny_donor()
    expected = logits(donor)
    assert torch.equal(logits(model.backbone), expected)
    assert not torch.allclose(logits(model), expected, atol=1e-2)  # the control: the memory does something
    assert torch.equal(logits(model.backbone), expected)  # and leaves nothing behind


def test_a_pass_that_fails_leaves_nothing_behind(tiny_engram, tiny_donor):
    model = tiny_engram(trained=True)
    whole = logits(model)
    handle = model.backbone.model.layers[3].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert model.reads_in_flight.current is None
    assert torch.equal(logits(model.backbone), logits(tiny_donor()))
    assert torch.equal(logits(model), whole)


def test_without_memory_the_model_is_its_donor(tiny_engram, tiny_donor):
    model, donor = tiny_engram(trained=True), tiny_donor()
    whole = logits(model)
    with model.disable_memory():
        with model.disable_memory():
            assert torch.equal(logits(model), logits(donor))
        assert torch.equal(logits(model), logits(donor))  # the inner block does not switch it on again
    assert torch.equal(logits(model), whole)
    with pytest.raises(ZeroDivisionError), model.disable_memory():
        raise ZeroDivisionError
    assert torch.equal(logits(model), whole)


# Copies.


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copied, pickled])
def test_the_memory_of_a_copy_is_its_own(copy_of, tiny_engram):
    model = tiny_engram(trained=True)
    whole = logits(model)
    with model.reads_in_flight.hold(MemoryReads(model.memory.tables, torch.ones(1, 1), {}, None)):
        other = copy_of(model)  # while the first is in the middle of a pass
    assert other.reads_in_flight is not model.reads_in_flight
    assert other.reads_in_flight.current is None
    assert torch.equal(logits(other), whole)
    for layer_id, hook in hooks(other).items():
        assert hook.layer is other.memory.layers[str(layer_id)]
        assert hook.in_flight is other.reads_in_flight
    with torch.no_grad():
        other.memory.layers["1"].key_value.weight.zero_()
        other.memory.layers["2"].key_value.weight.zero_()
    assert torch.equal(logits(model), whole)
    assert torch.equal(logits(other), logits(other.backbone))
    assert not torch.allclose(logits(other), whole, atol=1e-2)


# Threads.


def run_in_threads(*jobs) -> list:
    """Results of jobs that run at the same time; an error in one is raised here."""
    results = [None] * len(jobs)

    def run(place, job):
        try:
            results[place] = job()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture
def meet():
    """Registers a hook that lets two passes wait for each other between hashing and the first Engram layer."""

    def register(model):
        barrier = threading.Barrier(2, timeout=60)

        def wait(*args):
            barrier.wait()

        return model.backbone.model.layers[0].register_forward_pre_hook(wait)

    return register


def test_two_threads_on_one_model_get_their_own_results(tiny_engram, meet):
    model = tiny_engram(trained=True)
    texts = [IDS, IDS.flip(1)]
    alone = [logits(model, ids) for ids in texts]
    handle = meet(model)
    together = run_in_threads(*(lambda ids=ids: logits(model, ids) for ids in texts))
    handle.remove()
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # threads may add in another order
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    assert model.reads_in_flight.current is None


def test_one_thread_without_memory_does_not_switch_off_another(tiny_engram, meet):
    model = tiny_engram(trained=True)
    whole, donors = logits(model), logits(model.backbone)

    def off():
        with model.disable_memory():
            return logits(model)

    handle = meet(model)
    together = run_in_threads(off, lambda: logits(model))
    handle.remove()
    torch.testing.assert_close(together[0], donors, rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1], whole, rtol=0, atol=1e-5)


def test_reads_are_current_only_while_they_are_held():
    in_flight, reads = ReadsInFlight(), MemoryReads(nn.ModuleDict(), torch.ones(1, 1), {}, None)
    assert in_flight.current is None
    with in_flight.hold(reads):
        assert in_flight.current is reads
        assert run_in_threads(lambda: in_flight.current) == [None]
    assert in_flight.current is None


# A vocabulary that changes.


def test_resizing_the_vocabulary_leaves_old_texts_as_they_were(tiny_engram):
    model = tiny_engram(trained=True)
    whole, known = logits(model), len(model.memory.hashing.token_map)
    model.resize_token_embeddings(known + 8)
    assert len(model.memory.hashing.token_map) == model.config.text_config.vocab_size == known + 8
    torch.testing.assert_close(logits(model)[..., :known], whole, rtol=0, atol=1e-5)
    assert torch.isfinite(logits(model, torch.tensor([[5, known, known + 7]]))).all()


def test_a_vocabulary_that_cannot_shrink_leaves_the_model_as_it_was(tiny_engram):
    model = tiny_engram(trained=True)
    whole, known = logits(model), len(model.memory.hashing.token_map)
    with pytest.raises(ValueError, match="cannot shrink"):
        model.resize_token_embeddings(known - 8)
    assert model.config.text_config.vocab_size == known
    assert model.get_input_embeddings().weight.shape[0] == known
    assert torch.equal(logits(model), whole)


def test_a_size_is_rounded_up_before_it_is_refused(tiny_engram):
    model = tiny_engram()
    known = len(model.memory.hashing.token_map)
    assert known % 8 == 0
    model.resize_token_embeddings(known - 3, pad_to_multiple_of=8)
    assert model.config.text_config.vocab_size == len(model.memory.hashing.token_map) == known
