"""What a forward pass may be given: ids for the memory, masks, and which of them are refused.

Run: pytest tests/unit/test_reading.py
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import DynamicCache

from engram_transformers.inputs_engram import alive_positions, check_ids, checked_text_ids, document_ends


IDS = torch.tensor([[5, 6, 7], [8, 9, 1]])
MAP = torch.arange(10)


def test_the_memorys_own_ids_go_before_the_models():
    own = IDS + 1
    assert torch.equal(checked_text_ids(IDS, None, None), IDS)
    assert torch.equal(checked_text_ids(IDS, None, own), own)
    assert torch.equal(checked_text_ids(None, torch.zeros(2, 3, 4), own), own)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_type_become_int64(dtype):
    found = checked_text_ids(IDS.to(dtype), None, None)
    assert found.dtype == torch.int64
    assert torch.equal(found, IDS)


REFUSED_IDS = {
    "embeddings alone": ((None, torch.zeros(2, 3, 4), None), ValueError, "pass engram_input_ids .* -1 where"),
    "nothing": ((None, None, None), ValueError, "pass engram_input_ids"),
    "a list": (([[5]], None, None), TypeError, "input_ids must be a tensor of integers, got list"),
    "floats": ((IDS.float(), None, None), TypeError, r"input_ids must be .* got torch\.float32"),
    "booleans": ((IDS > 5, None, None), TypeError, r"got torch\.bool"),
    "float ids for the memory": ((IDS, None, IDS.float()), TypeError, "engram_input_ids must be"),
    "no batch": ((IDS[0], None, None), ValueError, r"shape \(3,\): it must be \(batch, length\)"),
    "too many dimensions": ((IDS[None], None, None), ValueError, r"shape \(1, 2, 3\)"),
    "no tokens": ((IDS[:, :0], None, None), ValueError, "at least one token"),
    "no texts": ((IDS[:0], None, None), ValueError, "at least one token"),
    "another length": ((IDS, None, IDS[:, :2]), ValueError, r"engram_input_ids has shape \(2, 2\).*has \(2, 3\)"),
    "another batch": ((None, torch.zeros(1, 3, 4), IDS), ValueError, r"has shape \(2, 3\).*has \(1, 3\)"),
}


@pytest.mark.parametrize(("given_ids", "error", "said"), REFUSED_IDS.values(), ids=REFUSED_IDS.keys())
def test_ids_that_cannot_address_the_memory_are_refused(given_ids, error, said):
    with pytest.raises(error, match=said):
        checked_text_ids(*given_ids)


@example(ids=[3, -1], may_be_absent=False)
@example(ids=[3, -1], may_be_absent=True)
@example(ids=[9, 10], may_be_absent=False)
@given(ids=st.lists(st.integers(-3, 12), min_size=1, max_size=6), may_be_absent=st.booleans())
def test_ids_outside_the_vocabulary_are_refused(ids, may_be_absent):
    allowed = range(-1 if may_be_absent else 0, 10)
    wrong = [i for i in ids if i not in allowed]
    if not wrong:
        check_ids(torch.tensor([ids]), MAP, may_be_absent)
        return
    with pytest.raises(IndexError) as refusal:
        check_ids(torch.tensor([ids]), MAP, may_be_absent)
    named = min(wrong) if min(wrong) < 0 else max(wrong)
    assert f"token id {named} is outside the vocabulary of 10 ids" in str(refusal.value)
    assert ("attention mask" if named < 0 else "wrong tokenizer?") in str(refusal.value)


def test_ids_on_an_accelerator_are_not_looked_at():
    ids = torch.tensor([[99]])
    check_ids(ids.to("meta"), MAP, may_be_absent=False)
    with pytest.raises(IndexError, match="99"):
        check_ids(ids, MAP, may_be_absent=False)


@given(past=st.integers(0, 5), data=st.data())
def test_the_end_of_a_mask_belongs_to_this_pass(past, data):
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 1), min_size=past + 3, max_size=past + 3), min_size=2, max_size=2))
    )
    cache = DynamicCache()
    if past:
        cache.update(torch.zeros(2, 1, past, 2), torch.zeros(2, 1, past, 2), 0)
    expected = mask[:, past:].bool()
    for given_mask in (mask, mask.bool(), mask.float()):
        found = alive_positions(IDS, given_mask, None, cache)
        assert found.dtype == torch.bool
        assert torch.equal(found, expected)


def test_without_a_mask_nothing_is_said():
    assert alive_positions(IDS, None, None, None) is None
    assert alive_positions(IDS, None, None, DynamicCache()) is None


def test_the_memorys_own_mask_goes_before_the_models():
    own = torch.tensor([[0, 1, 1], [1, 1, 0]])
    four_dimensional = torch.zeros(2, 1, 3, 3)
    assert torch.equal(alive_positions(IDS, four_dimensional, own, None), own.bool())
    assert torch.equal(alive_positions(IDS, torch.ones(2, 3), own, None), own.bool())


REFUSED_MASKS = {
    "four dimensions": (torch.zeros(2, 1, 3, 3), None, r"\(2, 1, 3, 3\).*Pass engram_attention_mask"),
    "one dimension": (torch.ones(3), None, r"\(3,\).*Pass engram_attention_mask"),
    "a dict of masks": ({"full_attention": torch.ones(2, 3)}, None, "dict.*Pass engram_attention_mask"),
    "another batch": (torch.ones(1, 3), None, r"\(1, 3\), 3 new tokens after 0 .*need \(2, 3\)"),
    "too short": (torch.ones(2, 2), DynamicCache(), r"\(2, 2\), 3 new tokens after 0 .*need \(2, 3\)"),
    "too long without a cache": (torch.ones(2, 4), None, r"\(2, 4\), 3 new tokens after 0 .*need \(2, 3\)"),
    "too long for an empty cache": (
        torch.ones(2, 4),
        DynamicCache(),
        r"\(2, 4\), 3 new tokens after 0 .*need \(2, 3\)",
    ),
}


@pytest.mark.parametrize(("mask", "cache", "said"), REFUSED_MASKS.values(), ids=REFUSED_MASKS.keys())
def test_masks_that_do_not_say_which_positions_are_pads_are_refused(mask, cache, said):
    with pytest.raises(ValueError, match=said):
        alive_positions(IDS, mask, None, cache)
    assert alive_positions(IDS, torch.ones(2, 3), None, cache).all()  # the control


def test_without_a_cache_a_return_to_position_0_begins_a_document_and_a_leap_is_refused():
    ids, back, leap = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 4]])
    assert document_ends(ids, None, None, back, None, None).tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="position_ids have 4 at token 2 of row 0"):
        document_ends(ids, None, None, leap, None, None)
    assert document_ends(ids, None, None, leap, None, DynamicCache()) is None  # the control


def test_inputs_are_left_as_they_were():
    ids, mask = IDS.clone(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    checked_text_ids(ids, None, None)
    check_ids(ids, MAP, may_be_absent=False)
    alive_positions(ids, mask, None, None).logical_not_()
    assert torch.equal(ids, IDS)
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
