"""Hashing on a CPU: remainders without a division for every int64 from 0, and mixed products, against Python's.

Run: pytest tests/unit/test_quick_hashing.py
"""

from functools import reduce
from itertools import product
from operator import xor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.constants_engram import INT64_MAX
from engram_transformers.quick_hashing_engram import MOST_QUICK_ROWS, QuickHash, QuickRemainders

from ..conftest import examples


FROM_0 = st.integers(0, INT64_MAX)


@st.composite
def divisors_and_numbers(draw) -> tuple[list[int], list[int]]:
    """Any divisors that are allowed, and numbers of which many lie at or beside a multiple of one."""
    sizes = st.one_of(st.integers(1, MOST_QUICK_ROWS - 1), st.sampled_from([1, 2, 3, MOST_QUICK_ROWS - 1]))
    divisors = draw(st.lists(sizes, min_size=4, max_size=4))
    numbers = draw(st.lists(FROM_0, min_size=1, max_size=20)) + [0, 1, 2**46 - 1, 2**46, 2**62, INT64_MAX]
    for number, p in product(draw(st.lists(FROM_0, min_size=1, max_size=20)), divisors):
        numbers += [number - number % p + beside for beside in (-1, 0, 1)]
    return divisors, [min(max(number, 0), INT64_MAX) for number in numbers]


@examples(200)
@given(drawn=divisors_and_numbers(), first=st.integers(0, 2**40))
def test_quick_remainders_are_the_remainders_of_any_int64_from_0(drawn, first):
    divisors, numbers = drawn
    primes = torch.tensor(divisors).view(2, 1, 2)  # two layers, one order, two heads
    starts = first + torch.arange(4).view(2, 1, 2)
    found = QuickRemainders(primes, starts)(torch.tensor([[[numbers]], [[numbers[::-1]]]]).numpy())
    expected = [
        [[[[n % p for n in numbers]] for p in divisors[:2]]],
        [[[[n % p for n in numbers[::-1]]] for p in divisors[2:]]],
    ]
    assert found.dtype == torch.int64
    assert torch.equal(found - starts[..., None, None], torch.tensor(expected))


@pytest.mark.parametrize("p", [2, 3, 65537, 2262413, 16000057, 2**29 + 11, MOST_QUICK_ROWS - 35, MOST_QUICK_ROWS - 1])
def test_quick_remainders_are_right_next_to_multiples_where_rounding_is_worst(p):
    primes, starts = torch.tensor([[[p]]]), torch.zeros(1, 1, 1, dtype=torch.int64)
    # Both halves as large as they get, and 100,000 multiples over the whole of int64.
    highest = torch.tensor([INT64_MAX // p * p - 1])
    multiples = torch.cat([torch.arange(1, 100_000) * (2**63 // p // 100_001) * p, highest])
    for beside in (-1, 0, 1):
        numbers = (multiples + beside)[None, None, None]
        assert torch.equal(QuickRemainders(primes, starts)(numbers.numpy())[0, 0], torch.remainder(numbers[0], p))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(QuickRemainders(primes, starts)(numbers.numpy())[0, 0], torch.remainder(numbers[0], p))


def constants(multipliers: list[list[int]]) -> list[torch.Tensor]:
    """Constants of one head for each order, as `QuickHash` takes them."""
    layers, orders = len(multipliers), len(multipliers[0]) - 1
    primes = torch.full((layers, orders, 1), 11)
    return [torch.tensor(multipliers), primes, torch.zeros_like(primes), torch.tensor([3])]


@given(
    largest=st.integers(1, 2**61).map(lambda half: 2 * half + 1),
    others=st.lists(st.integers(0, 2**61), min_size=1, max_size=3),
)
def test_plain_are_texts_whose_products_int64_holds(largest, others):
    multipliers = [min(2 * other + 1, largest) for other in others] + [largest]
    quick = QuickHash(*constants([multipliers]))
    for text, plain in (
        ([quick.most, 0], True),
        ([0, quick.most + 1], False),
        ([-1, 0], False),
        ([0, -(2**63)], False),
    ):
        assert quick.is_plain(np.array([text])) == plain
    assert quick.most * largest <= INT64_MAX < (quick.most + 1) * largest
    text, n = [quick.most] * len(multipliers) + [1], len(multipliers)
    for order, mixed in enumerate(quick.mix(np.array([text]))[0], start=2):  # (1, 2), of the last two places
        for place, found in enumerate(mixed[0].tolist(), start=n - 1):
            products = [text[place - back] * multipliers[back] for back in range(order)]
            assert found == reduce(xor, products) >= 0


def test_a_text_starts_behind_its_history_or_behind_pad_classes():
    quick = QuickHash(*constants([[1, 3, 5]]))
    classes, history = torch.tensor([[7, 8]]), torch.tensor([[1, -1]])
    assert quick.text(classes, None).tolist() == [[3, 3, 7, 8]]
    assert quick.text(classes, history).tolist() == [[1, -1, 7, 8]]
    assert quick.mix(quick.text(classes[:, :0], None)).shape == (1, 2, 1, 0)
    assert quick.is_plain(quick.text(classes[:0], None))
