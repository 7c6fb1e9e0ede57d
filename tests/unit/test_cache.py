"""EngramCacheLayer: what decoding remembers follows its text through everything that happens to a cache.

Run: pytest tests/unit/test_cache.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, LinearAttentionLayer

from engram_transformers.cache_engram import (
    CLASS_STATE,
    EngramCacheLayer,
    engram_cache_layer,
    refuse_engram_history,
    seen_tokens,
)


DEAD = -1


def remembered(layer: EngramCacheLayer) -> list[list[int]]:
    return layer.recent_classes().tolist()


def last(text: list[int], context: int) -> list[int]:
    """The last classes of a text, filled up in front with dead ones."""
    return ([DEAD] * context + text)[-context:]


TEXTS = st.lists(st.integers(-1, 50), min_size=1, max_size=12)


@given(text=TEXTS, context=st.integers(1, 4), data=st.data(), recording=st.booleans())
def test_the_last_classes_are_remembered_through_any_chunks(text, context, data, recording):
    layer = EngramCacheLayer(convolutions=0, context_length=context)
    if recording:
        layer.activate_past_recording()
    assert layer.recent_classes() is None
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=5)) - {len(text)})
    for first, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        layer.remember_classes(torch.tensor([text[first:end]]))
        assert remembered(layer) == [last(text[:end], context)]


@given(length=st.integers(1, 12), reach=st.integers(1, 9), data=st.data())
def test_convolution_inputs_come_back_with_their_history_in_front(length, reach, data):
    inputs = torch.randn(2, length, 3)
    layer = EngramCacheLayer(convolutions=1, context_length=2)
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=5)) - {length})
    for first, end in zip([0, *cuts], [*cuts, length], strict=True):
        window = layer.extend_convolution(inputs[:, first:end], 1, reach)
        wanted = torch.cat([torch.zeros(2, reach, 3), inputs[:, :end]], dim=1)[:, -(reach + end - first) :]
        filled = torch.cat([torch.zeros(2, reach, 3), window], dim=1)[:, -(reach + end - first) :]
        assert torch.equal(filled, wanted)


def two_texts() -> EngramCacheLayer:
    """A layer that has read [5, 6, 7] and [8, 9, 10], with convolution inputs 0..2 and 10..12."""
    layer = EngramCacheLayer(convolutions=1, context_length=2)
    layer.remember_classes(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    layer.extend_convolution(torch.tensor([[[0.0], [1], [2]], [[10.0], [11], [12]]]), 1, 2)
    return layer


def convolution_history(layer: EngramCacheLayer) -> list[list[float]]:
    return layer.conv_states[1][:, :, 0].tolist()


@pytest.mark.parametrize("verb", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("indices", [[0, 1], [1, 0], [1, 1], [0], [1, 0, 0]])
def test_histories_follow_a_choice_of_texts(verb, indices):
    layer = two_texts()
    getattr(layer, verb)(torch.tensor(indices))
    assert remembered(layer) == [[[6, 7], [9, 10]][i] for i in indices]
    assert convolution_history(layer) == [[[1, 2], [11, 12]][i] for i in indices]


def test_histories_follow_a_repeat():
    layer = two_texts()
    layer.batch_repeat_interleave(3)
    assert remembered(layer) == [[6, 7]] * 3 + [[9, 10]] * 3
    assert convolution_history(layer) == [[1, 2]] * 3 + [[11, 12]] * 3


def test_a_layer_that_has_seen_nothing_follows_everything():
    layer = EngramCacheLayer(convolutions=1, context_length=2)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_select_indices(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.reset()
    assert layer.recent_classes() is None


def test_a_reset_forgets():
    layer = two_texts()
    layer.reset()
    assert layer.recent_classes() is None
    layer.remember_classes(torch.tensor([[3], [4]]))
    window = layer.extend_convolution(torch.tensor([[[7.0]], [[8.0]]]), 1, 2)
    assert remembered(layer) == [[DEAD, 3], [DEAD, 4]]
    assert window[:, :, 0].tolist() == [[0, 7], [0, 8]]  # none of 1, 2, 11, 12 is left


@given(text=TEXTS, more=TEXTS, context=st.integers(1, 4), data=st.data())
def test_cropped_tokens_leave_no_trace(text, more, context, data):
    removed = data.draw(st.integers(0, len(more)))
    layer, reach = EngramCacheLayer(convolutions=1, context_length=context), 3
    layer.activate_past_recording()
    for part in (text, more):
        layer.remember_classes(torch.tensor([part]))
        layer.extend_convolution(torch.tensor([part])[:, :, None].float(), 1, reach)
    layer.crop(-removed)
    kept = text + more[: len(more) - removed]
    assert remembered(layer) == [last(kept, context)]
    window = layer.extend_convolution(torch.tensor([[[99.0]]]), 1, reach)
    assert ([0.0] * reach + window[0, :, 0].tolist())[-reach - 1 :] == ([0.0] * reach + kept + [99.0])[-reach - 1 :]


def test_a_layer_that_does_not_record_cannot_be_cropped():
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        two_texts().crop(-1)


# Where the layer sits in a cache.


def config() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2, num_key_value_heads=2)


def caches() -> dict:
    return {
        "dynamic": DynamicCache(),
        "dynamic with layers": DynamicCache(config=config()),
        "static": StaticCache(config=config(), max_cache_len=8),
        "encoder and decoder": EncoderDecoderCache(DynamicCache(), DynamicCache()),
    }


@pytest.mark.parametrize("kind", caches())
def test_the_layer_is_appended_once_behind_the_backbones(kind):
    cache = caches()[kind]
    layer = engram_cache_layer(cache, backbone_layers=3, convolutions=2, context_length=2)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    assert own.layers.index(layer) == 3
    assert layer.number_of_states == 3
    assert engram_cache_layer(cache, 3, 2, 2) is layer
    layer.remember_classes(torch.tensor([[4, 5]]))
    own.update(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4), 0)
    assert engram_cache_layer(cache, 3, 2, 2) is layer  # still found when it has seen tokens
    assert len(own.layers) == 4
    assert not any(isinstance(other, EngramCacheLayer) for other in own.layers[:3])


def test_a_cache_that_has_read_tokens_without_the_memory_is_refused():
    cache = DynamicCache(config=config())
    engram_cache_layer(DynamicCache(config=config()), 3, 1, 2)  # the control: an empty one is taken
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    with pytest.raises(ValueError, match=r"holds 5 tokens that were read without the memory.*Start from an empty"):
        engram_cache_layer(cache, 3, 1, 2)
    assert len(cache.layers) == 3


def test_a_cache_of_linear_layers_that_has_read_tokens_is_refused():
    linear = LinearAttentionLayer()
    cache = Cache(layers=[linear])
    assert seen_tokens(cache) == 0
    linear.update_conv_state(torch.zeros(1, 2, 4))
    assert seen_tokens(cache) == 1
    with pytest.raises(ValueError, match="read without the memory"):
        engram_cache_layer(cache, 1, 1, 2)


def test_a_cache_begun_with_memory_cannot_go_on_without():
    cache = DynamicCache(config=config())
    refuse_engram_history(None)
    refuse_engram_history(cache)  # the control: it has no memory's history yet
    engram_cache_layer(cache, 3, 1, 2)
    with pytest.raises(ValueError, match=r"begun with the memory on.*empty cache inside disable_memory\(\)"):
        refuse_engram_history(cache)


def test_what_is_no_cache_is_refused():
    with pytest.raises(TypeError, match=r"must be a transformers Cache, got tuple: use DynamicCache\(\)"):
        engram_cache_layer(((torch.zeros(1), torch.zeros(1)),), 3, 1, 2)


@pytest.mark.parametrize("recording", [False, True])
def test_the_layer_records_where_its_neighbours_do(recording):
    neighbour = LinearAttentionLayer()
    if recording:
        neighbour.activate_past_recording()
    layer = engram_cache_layer(Cache(layers=[DynamicLayer(), neighbour]), 2, 1, 2)
    assert layer.record_past == recording


def test_classes_and_convolutions_have_states_of_their_own():
    layer = two_texts()
    assert CLASS_STATE == 0
    assert layer.conv_states[CLASS_STATE].tolist() == [[7, 8], [10, 11]]  # plus one: zero means nothing
    assert layer.conv_states[CLASS_STATE].dtype == torch.int64
    assert layer.conv_states[1].dtype == torch.float32
