"""N-gram hashing: tensors against the naive twin, and the laws that serving depends on. Integers, so exact.

The naive twin hashes each text alone. Batches, pads and pieces of a text are in tests/integration/test_determinism.py.

Run: pytest tests/unit/test_hashing.py
"""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from engram_transformers import hash_ngrams_engram
from engram_transformers.hash_ngrams_engram import naive_hash_ids
from engram_transformers.hash_tokens_engram import DEAD

from .hashers import VOCABULARY, all_inside, cases, make_hasher, naive


@given(case=cases())
def test_hashes_equal_the_naive_twins(case):
    hasher, rows = case.hasher, case.hasher.rows_of_classes(case.classes)
    assert torch.equal(hasher.hash_lookback(hasher.lookback(case.classes)), naive(hasher, case.classes))
    assert rows.shape == (2, *case.ids.shape, case.n - 1, hasher.primes.shape[2]) and rows.dtype == torch.int64
    assert all_inside(hasher, rows)


@given(case=cases(), pads=st.booleans(), history=st.booleans(), documents=st.booleans(), added=st.integers(0, 300))
def test_rows_equal_those_of_the_look_back(case, pads, history, documents, added):
    hasher, ids = case.hasher, case.ids
    if added:  # products of new classes leave int64
        hasher.resize(VOCABULARY + added, compressed_vocab_size=40)
        ids = ids + added
    classes = hasher.compress(ids, case.alive if pads else None)
    past = torch.randint(-1 if pads else 0, 40, (len(ids), case.n - 1)) if history else None
    segments = torch.randint(0, 2, (len(ids), case.n - 1 + ids.shape[1])).cumsum(1) if documents else None
    found, rows = hasher(ids, case.alive if pads else None, past, segments)
    assert torch.equal(found, classes)
    first = hasher.offsets - hasher.offsets[:, :, :1]  # (layers, orders, heads)
    assert torch.equal(rows, hasher.hash_lookback(hasher.lookback(classes, past, segments)) + first[:, None, None])
    assert past is not None or documents or torch.equal(rows, naive(hasher, classes) + first[:, None, None])


@given(case=cases(max_length=20), data=st.data())
def test_documents_in_one_text_hash_as_by_themselves(case, data):
    hasher, classes = case.hasher, case.classes
    length, before = classes.shape[1], case.n - 1
    cut = data.draw(st.integers(1, length))
    segments = (torch.arange(before + length) >= before + cut).long().expand(len(classes), -1)
    found = hasher.hash_lookback(hasher.lookback(classes, segments=segments))
    alone = [naive(hasher, piece) for piece in classes.split([cut, length - cut], dim=1) if piece.shape[1]]
    assert torch.equal(found, torch.cat(alone, dim=2))


def test_the_naive_twin_is_the_formula_by_hand():
    # mix of (x, y) with x before y is y * 3 ^ x * 5; nothing stands before the first token but the pad class 7.
    assert naive_hash_ids([1, 4, -1, 6], [3, 5], [[11, 13]], pad_class=7) == [
        [(3 ^ 35) % 11, (3 ^ 35) % 13],
        [(12 ^ 5) % 11, (12 ^ 5) % 13],
        [(21 ^ 35) % 11, (21 ^ 35) % 13],
        [(18 ^ 35) % 11, (18 ^ 35) % 13],
    ]


@given(case=cases(max_length=20))
def test_rows_of_a_layer_and_rows_of_all_layers_are_the_same_rows(case):
    hasher, ids = case.hasher, torch.where(case.alive, case.ids, -1)
    all_rows = hasher.rows_of_classes(case.classes)  # counted within the order
    for index, layer in enumerate(hasher.layer_ids):
        order_starts = hasher.offsets[index, :, :1]  # (orders, 1)
        assert torch.equal(hasher.rows(ids, layer), (all_rows[index] + order_starts).flatten(-2))
        hashes = hasher.rows(ids, layer) - hasher.offsets[index].flatten()
        assert torch.equal(hasher.hash_ids(ids, layer), hashes)


def test_a_chunk_without_its_history_reads_other_rows():
    hasher, classes = make_hasher(3, 2), torch.tensor([[5, 6, 7, 8]])
    whole = hasher.rows_of_classes(classes)[:, 0, 2:]
    assert torch.equal(hasher.rows_of_classes(classes[:, 2:], classes[:, :2])[:, 0], whole)
    assert not torch.equal(hasher.rows_of_classes(classes[:, 2:])[:, 0], whole)
    assert not torch.equal(hasher.rows_of_classes(classes[:, 2:], classes[:, :2].flip(1))[:, 0], whole)


def test_left_pads_that_are_not_masked_do_change_rows():
    hasher, ids = make_hasher(3, 2), torch.tensor([[5, 6, 7]])
    padded = torch.cat([torch.tensor([[9, 9]]), ids], dim=1)
    assert not torch.equal(hasher(padded)[1][:, :, 2:], hasher(ids)[1])


@given(case=cases(), data=st.data())
def test_rows_depend_only_on_the_last_n_tokens(case, data):
    place = data.draw(st.integers(0, case.ids.shape[1] - 1))
    changed = case.ids.clone()
    changed[:, : max(0, place - case.n + 1)] = data.draw(st.integers(0, VOCABULARY - 1))
    changed[:, place + 1 :] = data.draw(st.integers(0, VOCABULARY - 1))
    other = case.hasher.compress(changed, case.alive)
    assert torch.equal(
        case.hasher.rows_of_classes(other)[:, :, place], case.hasher.rows_of_classes(case.classes)[:, :, place]
    )


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rows_depend_on_each_of_the_last_n_tokens(n):
    hasher, ids = make_hasher(n, heads=4), torch.arange(10, 10 + n)[None]
    rows = hasher(ids)[1][:, 0, -1]  # (layers, orders, heads)
    for back in range(n):
        changed = ids.clone()
        changed[0, n - 1 - back] = 30
        other = hasher(changed)[1][:, 0, -1]
        reached = [bool((rows[:, order] != other[:, order]).any()) for order in range(n - 1)]
        assert reached == [order + 2 > back for order in range(n - 1)]


@given(case=cases(), data=st.data())
def test_a_dead_position_hides_itself_and_everything_older(case, data):
    place = data.draw(st.integers(0, case.ids.shape[1] - 1))
    dead = case.classes.clone()
    dead[:, place] = DEAD
    hidden = dead.clone()
    hidden[:, :place] = DEAD
    after = slice(place, None)
    assert torch.equal(case.hasher.rows_of_classes(dead)[:, :, after], case.hasher.rows_of_classes(hidden)[:, :, after])
    assert torch.equal(
        case.hasher.rows_of_classes(dead)[:, :, :place], case.hasher.rows_of_classes(case.classes)[:, :, :place]
    )
    fresh = case.hasher.rows_of_classes(dead[:, place + 1 :]) if place + 1 < dead.shape[1] else None
    assert fresh is None or torch.equal(case.hasher.rows_of_classes(dead)[:, :, place + 1 :], fresh)


@given(case=cases(max_length=12))
def test_ways_to_be_dead_are_one(case):
    hasher, without_entry = case.hasher, VOCABULARY - 1
    by_mask = hasher.compress(case.ids, case.alive)
    by_minus_one = hasher.compress(torch.where(case.alive, case.ids, -1))
    by_label = hasher.compress(torch.where(case.alive, case.ids, -100))
    by_entry = hasher.compress(torch.where(case.alive, case.ids, without_entry))
    assert torch.equal(by_mask, by_minus_one)
    assert torch.equal(by_mask, by_label)
    assert torch.equal(by_mask, by_entry)
    assert torch.equal(by_mask < 0, ~case.alive | (case.ids >= VOCABULARY - 3))


def test_a_dead_position_is_not_the_pad_token():
    hasher = make_hasher(3, 2)
    before_dead = hasher(torch.tensor([[8, -1, 5]]))[1][:, 0, -1]
    before_pad = hasher(torch.tensor([[8, 2, 5]]))[1][:, 0, -1]
    assert torch.equal(before_dead[:, 0], before_pad[:, 0])  # bigrams: the pad class stands there in both
    assert not torch.equal(before_dead[:, 1], before_pad[:, 1])  # trigrams: only a pad that is text lets 8 through


def test_layers_hash_by_themselves():
    classes = torch.randint(0, 40, (2, 30))
    both = make_hasher(3, 4, layers=(1, 4))
    alone = make_hasher(3, 4, layers=(1,))
    # Equal in value: the first layer's constants do not depend on how many follow.
    assert torch.equal(both(classes)[0], alone(classes)[0])
    assert not torch.equal(both.multipliers[0], both.multipliers[1])
    assert set(both.primes[0].flatten().tolist()).isdisjoint(both.primes[1].flatten().tolist())
    rows = both(classes)
    assert not torch.equal(rows[0], rows[1])


def test_an_unknown_layer_is_refused():
    hasher = make_hasher(2, 1)
    assert hasher.layer_index(4) == 1
    with pytest.raises(ValueError, match=r"layer 2 has no memory; the Engram layers are \[1, 4\]"):
        hasher.hash_ids(torch.tensor([[1]]), 2)


def test_inputs_are_left_as_they_were():
    hasher, ids = make_hasher(3, 2), torch.tensor([[5, -1, 58, 7]])
    alive, history = torch.tensor([[True, True, True, False]]), torch.tensor([[3, DEAD]])
    copies = ids.clone(), alive.clone(), history.clone()
    hasher(ids, alive, history)
    assert all(torch.equal(one, other) for one, other in zip((ids, alive, history), copies, strict=True))


def test_no_number_of_the_first_ids_is_left_in_a_graph():
    hasher, ids = make_hasher(3, 2), torch.tensor([[5, 6]])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert hasher(mode.from_tensor(ids))[1].shape == (2, 1, 2, 2, 2)
    traced = torch.jit.trace(lambda ids: hasher(ids)[1], (ids,))
    other = torch.tensor([[9, 7]])
    assert torch.equal(traced(other), hasher(other)[1])
    assert not torch.equal(traced(other), traced(ids))


class Rounded(TorchFunctionMode):
    """Remainders as MPS had them before PyTorch 2.8."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.remainder:
            return func(*(number.float() for number in args)).long()
        return func(*args, **kwargs or {})


def test_a_device_that_rounds_remainders_is_refused(monkeypatch, counting_device):
    ids = torch.arange(16)[None] % VOCABULARY
    hasher = make_hasher(3, 2)
    expected = hasher(ids)[1]
    there = hasher.to("counting")
    monkeypatch.setattr(hash_ngrams_engram, "IN_DOUBT", {"counting"})
    for mode in (contextlib.nullcontext, Rounded):
        hash_ngrams_engram.has_exact_remainders.cache_clear()
        with mode(), contextlib.ExitStack() as stack:
            if mode is Rounded:
                stack.enter_context(pytest.raises(RuntimeError, match="'counting'.* install torch 2.8"))
            assert torch.equal(there(ids.to("counting"))[1].cpu(), expected), "the control"
    hash_ngrams_engram.has_exact_remainders.cache_clear()


def test_the_question_whether_remainders_are_exact_does_not_break_a_graph(monkeypatch):
    hasher = make_hasher(3, 2)
    monkeypatch.setattr(hash_ngrams_engram, "IN_DOUBT", {"cpu"})
    compiled = torch.compile(lambda mixed: hasher.divided(mixed), backend="eager", fullgraph=True)
    mixed = torch.randint(0, 2**62, (2, 2, 1, 5))
    assert torch.equal(compiled(mixed), hasher.divided(mixed))
