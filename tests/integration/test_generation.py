"""What a forward pass is given for the memory: masks, positions that are not text, any split into chunks, odd caches.

Every way of generating on every backbone is in test_matrix.py. Logits are compared to 1e-5 in float32.
Run: pytest tests/integration/test_generation.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from engram_transformers.compat_engram import CACHE

from .backbones import BACKBONES


pytestmark = pytest.mark.core

TOLERANCE = 1e-5


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


def in_chunks(model, ids, sizes, mask=None):
    """Logits of a text that is read piece by piece into one cache."""
    cache, logits, first = DynamicCache(config=model.config.get_text_config()), [], 0
    for size in sizes:
        last = first + size
        seen = None if mask is None else mask[:, :last]
        out = model(ids[:, first:last], attention_mask=seen, **{CACHE: cache}, use_cache=True)
        logits.append(out.logits)
        first = last
    return torch.cat(logits, dim=1)  # (batch, length, vocabulary)


@torch.no_grad()
def test_embeddings_without_ids_are_refused(ids, tiny_engram):
    model = tiny_engram()
    embeds = model.get_input_embeddings()(ids)
    assert model(inputs_embeds=embeds, engram_input_ids=ids).logits.shape[:2] == ids.shape  # the control
    with pytest.raises(ValueError, match="engram_input_ids"):
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_a_cache_that_went_on_without_the_memory_is_refused(ids, tiny_engram):
    model = tiny_engram(trained=True)
    cache = model(ids[:, :9], use_cache=True)[CACHE]
    model(ids[:, 9:10], **{CACHE: cache})  # the control
    model.backbone(ids[:, 10:11], **{CACHE: cache})
    with pytest.raises(ValueError, match="holds 11 tokens, its memory 10"):
        model(ids[:, 11:12], **{CACHE: cache})


@torch.no_grad()
def test_a_crop_without_recording_is_refused_and_leaves_no_usable_cache(ids, tiny_engram):
    model = tiny_engram(trained=True)
    cache = model(ids[:, :9], use_cache=True)[CACHE]
    with pytest.raises(RuntimeError, match=r"crop\(-2\): the memory's history cannot go back.*activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="holds 7 tokens, its memory 9"):
        model(ids[:, 7:], **{CACHE: cache})


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_mask_that_does_not_cover_the_tokens_is_refused(use_cache, ids, tiny_engram):
    model = tiny_engram()
    for columns in (14, 16, 30):
        with pytest.raises(ValueError, match=rf"shape \(2, {columns}\), 15 new tokens after 0 .*need \(2, 15\)"):
            model(ids, attention_mask=torch.ones(2, columns), use_cache=use_cache)
    cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=r"1 new tokens after 15 .*need \(2, 16\)"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), **{CACHE: cache})


@torch.no_grad()
def test_positions_that_are_no_text_break_ngrams_and_get_nothing(ids, tiny_engram):
    model = tiny_engram(trained=True)
    absent = ids.clone()
    absent[:, 5:8] = -1
    reads = []
    original = model.memory.read
    model.memory.read = lambda *given: reads.append(original(*given)) or reads[-1]
    model(ids, engram_input_ids=absent)
    model(ids)
    dead, whole = reads
    assert not dead.alive[:, 5:8].any()
    assert dead.alive[:, :5].all() and dead.alive[:, 8:].all()
    for layer in (1, 2):
        assert torch.equal(dead.vectors(layer)[:, :5], whole.vectors(layer)[:, :5])
        assert not torch.equal(dead.vectors(layer)[:, 8:10], whole.vectors(layer)[:, 8:10])
        assert torch.equal(dead.vectors(layer)[:, 10:], whole.vectors(layer)[:, 10:])  # trigrams are whole again


@torch.no_grad()
@given(data=st.data())
def test_any_split_of_any_padded_batch_reads_the_same(data, tiny_donor, tiny_engram):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES["llama"]()))
    length = data.draw(st.integers(1, 24), label="length")
    pads = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3), label="left pads")
    ids = torch.randint(3, 4000, (len(pads), length))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    sizes, left = [], length
    while left:
        sizes.append(data.draw(st.integers(1, left), label="chunk"))
        left -= sizes[-1]
    logits = in_chunks(model, ids, sizes, mask)
    for row, count in enumerate(pads):
        alone = model(ids[row : row + 1, count:]).logits
        torch.testing.assert_close(logits[row : row + 1, count:], alone, rtol=0, atol=TOLERANCE)
