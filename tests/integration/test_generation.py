"""Decoding with a cache equals decoding without, with a trained memory and a non-zero convolution.

Logits are compared to 1e-5 in float32, tokens exactly. Run: pytest tests/integration/test_generation.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from .backbones import BACKBONES


TOLERANCE = 1e-5
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


def in_chunks(model, ids, sizes, mask=None):
    """Logits of a text that is read piece by piece into one cache."""
    cache, logits, first = DynamicCache(config=model.config.get_text_config()), [], 0
    for size in sizes:
        last = first + size
        seen = None if mask is None else mask[:, :last]
        out = model(ids[:, first:last], attention_mask=seen, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        first = last
    return torch.cat(logits, dim=1)  # (batch, length, vocabulary)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_reading_in_chunks_equals_reading_at_once(backbone, chunk, ids, tiny_donor, tiny_engram):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES[backbone]()), layers=(0, 1))
    sizes = [chunk] * (15 // chunk) + ([15 % chunk] if 15 % chunk else [])
    torch.testing.assert_close(in_chunks(model, ids, sizes), model(ids).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("beams", [1, 4])
def test_generating_with_a_cache_equals_generating_without(backbone, beams, ids, tiny_donor, tiny_engram):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES[backbone]()), layers=(0, 1))
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, num_beams=beams, use_cache=False, **GREEDY))
    with model.without_memory():
        plain = model.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY)
    assert not torch.equal(cached, plain), "control: the memory must change what is generated"


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_left_pads_change_nothing(backbone, ids, tiny_donor, tiny_engram):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES[backbone]()), layers=(0, 1))
    short, long = ids[:1, 6:], ids[1:]
    expected = [model.generate(text, attention_mask=torch.ones_like(text), **GREEDY)[0, -8:] for text in (short, long)]
    padded = torch.cat([torch.cat([torch.full((1, 6), 2), short], dim=1), long])  # (2, 15)
    mask = torch.ones_like(padded)
    mask[0, :6] = 0
    generated = model.generate(padded, attention_mask=mask, **GREEDY)
    for row, tokens in enumerate(expected):
        assert torch.equal(generated[row, -8:], tokens)


@torch.no_grad()
def test_right_pads_change_no_logit_before_them(ids, tiny_engram):
    model = tiny_engram(trained=True)
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    padded = model(torch.where(mask.bool(), ids, 2), attention_mask=mask).logits[:, :10]
    torch.testing.assert_close(padded, model(ids[:, :10]).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_mask_that_does_not_cover_the_tokens_is_refused(use_cache, ids, tiny_engram):
    model = tiny_engram()
    for columns in (14, 16, 30):
        with pytest.raises(ValueError, match=rf"shape \(2, {columns}\), 15 new tokens after 0 .*need \(2, 15\)"):
            model(ids, attention_mask=torch.ones(2, columns), use_cache=use_cache)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"1 new tokens after 15 .*need \(2, 16\)"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


@torch.no_grad()
def test_interleaved_requests_do_not_see_each_other(ids, tiny_engram):
    model = tiny_engram(trained=True)
    texts = ids[:1], ids[1:]
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in texts]
    logits = [[], []]
    for t in range(15):
        for text, cache, out in zip(texts, caches, logits, strict=True):
            out.append(model(text[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    for text, out in zip(texts, logits, strict=True):
        torch.testing.assert_close(torch.cat(out, dim=1), model(text).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_prefill_chunks_of_generate_change_nothing(ids, tiny_engram):
    model = tiny_engram(trained=True)
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, **GREEDY)
    for size in (1, 2, 3, 7):
        assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **GREEDY), whole)


@torch.no_grad()
def test_a_returned_cache_can_be_continued(ids, tiny_engram):
    model = tiny_engram(trained=True)
    mask = torch.ones_like(ids)
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, torch.randint(3, 4000, (2, 4))], dim=1)
    ones = torch.ones_like(longer)
    continued = model.generate(longer, attention_mask=ones, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(continued, model.generate(longer, attention_mask=ones, **GREEDY))


@torch.no_grad()
def test_embeddings_with_their_ids_generate_the_same(ids, tiny_engram):
    model = tiny_engram(trained=True)
    mask = torch.ones_like(ids)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, 15:]
    assert torch.equal(
        model.generate(inputs_embeds=embeds, engram_input_ids=ids, attention_mask=mask, **GREEDY), expected
    )
    with pytest.raises(ValueError, match="engram_input_ids"):
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_positions_that_are_no_text_break_ngrams_and_get_nothing(ids, tiny_engram):
    model = tiny_engram(trained=True)
    absent = ids.clone()
    absent[:, 5:8] = -1
    reads = []
    original = model.memory.read
    model.memory.read = lambda classes, cache: reads.append(original(classes, cache)) or reads[-1]
    model(ids, engram_input_ids=absent)
    model(ids)
    dead, whole = reads
    assert not dead.alive[:, 5:8].any()
    assert dead.alive[:, :5].all() and dead.alive[:, 8:].all()
    for layer in (1, 2):
        assert torch.equal(dead.vectors[layer][:, :5], whole.vectors[layer][:, :5])
        assert not torch.equal(dead.vectors[layer][:, 8:10], whole.vectors[layer][:, 8:10])
        assert torch.equal(dead.vectors[layer][:, 10:], whole.vectors[layer][:, 10:])  # trigrams are whole again


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
