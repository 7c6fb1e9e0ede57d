"""Hash constants: prime head sizes, odd multipliers, offsets, their digest, and which stored ones are refused.

Run with `pytest tests/unit/test_constants.py`.
"""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from engram_transformers import EngramConfig, EngramFormatError
from engram_transformers.hash_constants_engram import (
    INT64_MAX,
    HashConstants,
    check_constants,
    derive_constants,
    derive_multipliers,
    derive_primes,
    head_offsets,
    is_prime,
    multiplier_bound,
)


SIEVE_END = 30_000
# Pass Fermat's test for every base, or Miller-Rabin's for the bases up to 7, 17, 23 and 37.
PRETENDERS = [561, 41041, 825265, 3215031751, 341550071728321, 3825123056546413051]


def sieve(end: int) -> list[int]:
    """Primes below `end`, by Eratosthenes."""
    is_composite = bytearray(end)
    for n in range(2, int(end**0.5) + 1):
        if not is_composite[n]:
            is_composite[n * n :: n] = b"\1" * len(range(n * n, end, n))
    return [n for n in range(2, end) if not is_composite[n]]


PRIMES = sieve(SIEVE_END)


def config(**changes) -> EngramConfig:
    fields = {"engram_layer_ids": [1, 3], "engram_vocab_size": [50, 60], "engram_n_heads": 3, "engram_head_dim": 2}
    text_config = LlamaConfig(vocab_size=100, num_hidden_layers=4, pad_token_id=2)
    return EngramConfig(text_config=text_config, **{**fields, **changes})


def test_primality_agrees_with_a_sieve():
    assert [n for n in range(-5, SIEVE_END) if is_prime(n)] == PRIMES


@pytest.mark.parametrize("n", [*PRETENDERS, INT64_MAX, (2**31 - 1) ** 2, 3037000493 * 3037000453])
def test_composites_that_fool_weaker_tests_are_not_prime(n):
    assert not is_prime(n)


@pytest.mark.parametrize("n", [2**31 - 1, 2**61 - 1, 9223372036854775783, 16000057])
def test_large_primes_are_prime(n):
    assert is_prime(n)


@given(
    layers=st.integers(1, 3), sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=3), heads=st.integers(1, 6)
)
def test_head_sizes_are_the_next_unused_primes(layers, sizes, heads):
    unused, expected = list(PRIMES), []
    for size in sizes * layers:
        least = size
        for _ in range(heads):
            prime = next(p for p in unused if p >= least)
            unused.remove(prime)
            expected.append(prime)
            least = prime + 1
    primes = derive_primes(layers, sizes, heads)
    assert primes.flatten().tolist() == expected
    assert (primes.shape, primes.dtype) == ((layers, len(sizes), heads), np.int64)


def test_head_sizes_of_16_million_rows_are_found():
    primes = derive_primes(2, [16_000_000] * 3, 8)
    assert primes.sum(axis=(1, 2)).tolist() == [384_006_168, 384_016_682]  # the released V4.1 tables


@given(
    layer_ids=st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True),
    orders=st.integers(2, 5),
    classes=st.integers(1, 300_000),
    seed=st.integers(0, 2**32),
)
def test_multipliers_are_odd_and_no_product_leaves_int64(layer_ids, orders, classes, seed):
    multipliers = derive_multipliers(layer_ids, orders, classes, seed)
    assert multipliers.shape == (len(layer_ids), orders)
    for multiplier in multipliers.flatten().tolist():
        assert multiplier % 2 == 1
        assert 1 <= multiplier < 2 * multiplier_bound(classes)
        assert (classes - 1) * multiplier <= INT64_MAX


@given(seed=st.integers(0, 50), layer=st.integers(0, 50), other=st.integers(0, 50))
def test_multipliers_depend_on_the_layer_id_and_not_on_its_place(seed, layer, other):
    alone = derive_multipliers([layer], 3, 1000, seed)[0].tolist()
    assert derive_multipliers([other, layer], 3, 1000, seed)[1].tolist() == alone
    assert (derive_multipliers([other], 3, 1000, seed)[0].tolist() == alone) == (layer == other)
    assert derive_multipliers([layer], 3, 1000, seed + 1)[0].tolist() != alone


def test_multipliers_are_the_demos_stream():
    draws = np.random.default_rng(7 + 10007 * 3).integers(0, (2**63 - 1) // 500 // 2, size=4, dtype=np.int64)
    assert derive_multipliers([3], 4, 500, 7)[0].tolist() == (2 * draws + 1).tolist()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_offsets_are_the_rows_of_all_heads_before(layers, orders, heads, seed):
    sizes = np.random.default_rng(seed).integers(1, 10**6, (layers, orders, heads))
    offsets = head_offsets(torch.from_numpy(sizes))
    for layer in range(layers):
        flat = sizes[layer].flatten().tolist()
        assert offsets[layer].flatten().tolist() == [sum(flat[:i]) for i in range(len(flat))]


# Remainders without a division: integers, so exact.


def test_the_pad_class_is_the_class_of_the_pad_id():
    token_map = torch.arange(100) // 2
    assert derive_constants(config(engram_pad_token_id=9), None).pad_class.tolist() == [9]
    assert derive_constants(config(engram_pad_token_id=9), token_map).pad_class.tolist() == [4]


def test_a_pad_id_without_tokenizer_entry_is_refused():
    token_map = torch.arange(100)
    token_map[9] = -1
    with pytest.raises(ValueError, match="engram_pad_token_id=9 has no entry in the tokenizer"):
        derive_constants(config(engram_pad_token_id=9), token_map)


def test_order_rows_are_the_sums_of_head_sizes():
    constants = derive_constants(config(), None)
    assert constants.order_rows() == [[53 + 59 + 61, 67 + 71 + 73], [79 + 83 + 89, 97 + 101 + 103]]


def test_the_digest_covers_names_shapes_and_entries():
    constants = derive_constants(config(), None)
    digest = hashlib.sha256()
    for name, shape, tensor in (
        ("multipliers", "2,3", constants.multipliers),
        ("primes", "2,2,3", constants.primes),
        ("offsets", "2,2,3", constants.offsets),
        ("pad_class", "1", constants.pad_class),
    ):
        entries = tensor.flatten().tolist()
        digest.update(f"{name}:{shape};".encode() + struct.pack(f"<{len(entries)}q", *entries))
    assert constants.sha256() == digest.hexdigest()


@pytest.mark.parametrize("name", ["multipliers", "primes", "offsets", "pad_class"])
def test_the_digest_changes_with_every_constant(name):
    constants = derive_constants(config(), None)
    assert replace(constants, **{name: getattr(constants, name) + 2}).sha256() != constants.sha256()


def damaged(constants: HashConstants, name: str, value: int, follow: bool = False) -> HashConstants:
    """`constants` with the first entry of one of them replaced; offsets follow the primes if asked to."""
    tensor = getattr(constants, name).clone()
    tensor.view(-1)[0] = value
    constants = replace(constants, **{name: tensor})
    return replace(constants, offsets=head_offsets(constants.primes)) if follow else constants


DAMAGE = {
    "even multiplier": ("multipliers", 4, False, ["multiplier 4", "odd", "100 classes", "restore"]),
    "negative multiplier": ("multipliers", -3, False, ["multiplier -3", "positive", "restore"]),
    "multiplier out of int64": ("multipliers", INT64_MAX, False, [str(INT64_MAX), "below", "restore"]),
    "head size no prime": ("primes", 55, True, ["head size 55", "not prime", "restore"]),
    "head size 1": ("primes", 1, True, ["head size 1", "not prime", "restore"]),
    "head size twice": ("primes", 61, True, ["two heads have the same number of rows", "restore"]),
    "head size too small": ("primes", 47, True, ["order 2", "47 rows", "at least 50", "different checkpoints"]),
    "offsets of other primes": ("offsets", 1, False, ["offsets", "sums of the head sizes", "restore"]),
    "pad class dead": ("pad_class", -1, False, ["pad class -1", "100 classes", "restore"]),
    "pad class too large": ("pad_class", 100, False, ["pad class 100", "100 classes", "restore"]),
}


@pytest.mark.parametrize(("name", "value", "follow", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_constants_are_refused_by_name(name, value, follow, said):
    settings = config()
    constants = derive_constants(settings, None)
    check_constants(constants, settings)  # the control
    with pytest.raises(EngramFormatError) as refusal:
        check_constants(damaged(constants, name, value, follow), settings)
    assert [part for part in said if part not in str(refusal.value)] == []


@pytest.mark.parametrize("name", ["multipliers", "primes", "offsets", "pad_class"])
def test_any_change_is_refused_where_the_digest_is_known(name):
    settings = config()
    constants = derive_constants(settings, None)
    settings.engram_hash_sha256 = constants.sha256()
    check_constants(constants, settings)  # the control
    with pytest.raises(EngramFormatError, match=r"SHA-256.*another checkpoint.*model-"):
        check_constants(damaged(constants, name, int(getattr(constants, name).view(-1)[0]) + 2), settings)


def test_constants_of_another_seed_or_order_of_layers_are_refused_by_digest():
    settings = config()
    settings.engram_hash_sha256 = derive_constants(settings, None).sha256()
    for other in (config(engram_seed=1), config(engram_layer_ids=[3, 1]), config(engram_layer_ids=[1, 2])):
        with pytest.raises(EngramFormatError, match="SHA-256"):
            check_constants(derive_constants(other, None), settings)


def test_more_than_one_row_is_refused_in_the_one_row_control():
    settings = config(engram_hash_scheme="one_row")
    constants = derive_constants(settings, None)
    check_constants(constants, settings)  # the control
    with pytest.raises(EngramFormatError, match="one_row"):
        check_constants(damaged(constants, "primes", 2, follow=True), settings)
    with pytest.raises(EngramFormatError, match="head size 1 is not prime"):
        check_constants(constants, config())


@given(layers=st.permutations([0, 1, 2, 3]), heads=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_derived_constants_are_accepted(layers, heads, seed):
    settings = config(engram_layer_ids=layers[:2], engram_n_heads=heads, engram_seed=seed)
    constants = derive_constants(settings, None)
    check_constants(constants, settings)
    assert constants.sha256() == derive_constants(settings, None).sha256()
