"""Hashing against the public demo's outputs: multipliers, primes, and every hash of 15 texts, exactly.

One thing is not followed on purpose: the demo passes negative ids (ignored labels, image positions) through unmapped
and hashes them; here they are dead. Run with `pytest tests/parity/test_hash_golden.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from engram_transformers import EngramConfig
from engram_transformers.hash_constants_engram import INT64_MAX, derive_multipliers, derive_primes
from engram_transformers.hash_ngrams_engram import NgramHasher, naive_hash_ids


FOLDER = Path(__file__).parent / "golden"
CASES = {
    name: json.loads((FOLDER / f"hash_{name}.json").read_text())
    for name in ("A_default_like", "B_bigram_1head", "D_default_tables")
}
TOKEN_MAP = torch.tensor(json.loads((FOLDER / "compressed_tokenizer.json").read_text(encoding="utf-8"))["lookup_table"])
PRIMES = json.loads((FOLDER / "primes_big.json").read_text())
V41_MULTIPLIERS = {
    1: [76632096046245, 4839876093313, 35959672319349, 73987337458391],
    14: [67716810739261, 51510806800915, 30921347202721, 82619226485591],
}


def hasher_of(case: dict) -> NgramHasher:
    demo = case["config"]
    config = EngramConfig(
        text_config=LlamaConfig(vocab_size=len(TOKEN_MAP), num_hidden_layers=30),
        engram_layer_ids=demo["layer_ids"],
        engram_vocab_size=demo["engram_vocab_size"],
        engram_max_ngram_size=demo["max_ngram_size"],
        engram_n_heads=demo["n_head_per_ngram"],
        engram_head_dim=4,
        engram_pad_token_id=demo["pad_id"],
        engram_seed=demo["seed"],
        engram_compressed_vocab_size=case["compressed_vocab"],
    )
    return NgramHasher.from_config(config, TOKEN_MAP)


@pytest.fixture(params=CASES)
def case(request) -> dict:
    return CASES[request.param]


@pytest.fixture
def hasher(case) -> NgramHasher:
    return hasher_of(case)


def test_constants_are_the_demos(case, hasher):
    layers = [str(layer) for layer in hasher.layer_ids]
    assert hasher.multipliers.tolist() == [case["multipliers"][layer] for layer in layers]
    assert hasher.primes.tolist() == [case["primes"][layer] for layer in layers]
    assert hasher.pad_class.tolist() == [case["compressed_pad_id"]]


def test_every_hash_is_the_demos(case, hasher):
    assert len(case["sequences"]) == 15
    for sequence in case["sequences"]:
        ids = torch.tensor([sequence["input_ids"]])
        assert hasher.compress(ids).tolist() == [sequence["compressed_ids"]]
        for layer, hashes in sequence["hash_ids"].items():
            assert hasher.hash_ids(ids, int(layer)).tolist() == [hashes]


def test_every_hash_of_the_naive_twin_is_the_demos(case, hasher):
    for sequence in case["sequences"]:
        for layer, hashes in sequence["hash_ids"].items():
            multipliers, primes = case["multipliers"][layer], case["primes"][layer]
            assert naive_hash_ids(sequence["compressed_ids"], multipliers, primes, case["compressed_pad_id"]) == hashes


def test_left_pads_of_pad_tokens_hash_as_in_the_demo(case, hasher):
    assert case["left_pad_with_pad_id_invariant"]
    pads = [case["config"]["pad_id"]] * 5
    for sequence in case["sequences"]:
        for layer, hashes in sequence["hash_ids"].items():
            padded = torch.tensor([pads + sequence["input_ids"]])
            assert hasher.hash_ids(padded, int(layer))[0, 5:].tolist() == hashes


def test_negative_ids_are_dead_and_not_hashed_as_in_the_demo(case, hasher):
    negative = case["negative_ids_case"]
    ids = negative["input_ids"]
    assert ids == [5, -100, 9, -1, 0]
    for layer, hashes in negative["hash_ids"].items():
        found = hasher.hash_ids(torch.tensor([ids]), int(layer))[0].tolist()
        # 9 and 0 stand behind a dead position: they hash as if a text began with them.
        for place, token in ((2, 9), (4, 0)):
            assert found[place] == hasher.hash_ids(torch.tensor([[token]]), int(layer))[0, 0].tolist()
            assert found[place] != hashes[place]
        assert found[0] == hashes[0]  # the control: before the first negative id nothing differs
        assert found[1] == found[3]  # both read the pad class alone, whatever the negative number is


@pytest.mark.parametrize("name", PRIMES)
def test_head_sizes_are_the_papers_the_demos_and_the_released_ones(name):
    golden = PRIMES[name]
    primes = derive_primes(len(golden["layer_ids"]), golden["engram_vocab_size"], golden["n_head"])
    for index, layer in enumerate(golden["layer_ids"]):
        assert primes[index].tolist() == golden["primes"][str(layer)]
        assert int(primes[index].sum()) == golden["rows_per_layer"][str(layer)]
    assert golden["all_distinct"]
    assert len(set(primes.flatten().tolist())) == primes.size


def test_tables_of_v41_have_the_released_heights():
    golden = PRIMES["deepseek_v41_flash"]
    assert golden["layer_ids"] == [1, 14]
    assert derive_primes(2, [16_000_000] * 3, 8).sum(axis=(1, 2)).tolist() == [384_006_168, 384_016_682]


def test_multipliers_of_v41_are_the_released_ones():
    golden = PRIMES["deepseek_v41_flash"]
    found = dict(zip([1, 14], derive_multipliers([1, 14], 4, golden["compressed_vocab"], 0).tolist(), strict=True))
    assert found == V41_MULTIPLIERS == {int(layer): m for layer, m in golden["multipliers_seed0"].items()}
    assert golden["compressed_vocab"] == 99_092
    assert all(99_091 * m <= INT64_MAX for multipliers in found.values() for m in multipliers)


def test_defaults_make_the_papers_tables():
    hasher = NgramHasher.from_config(EngramConfig())
    golden = PRIMES["paper_engram27b_layers1_14"]
    assert hasher.primes.sum((1, 2)).tolist() == [golden["rows_per_layer"][layer] for layer in ("1", "14")]
