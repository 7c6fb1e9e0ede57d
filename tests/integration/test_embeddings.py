"""Added tokens and resized embeddings: new ids get classes after the old ones, and every old address stays.

Golden integers were computed once by plain Python that has nothing of this package: products of classes and multipliers
wrapped to 64 bits, XOR, floored remainder. Integers are compared exactly, logits to 1e-5 in float32.
Sizes that are refused are in tests/unit/test_memory.py and test_hashing.py.

Run: pytest tests/integration/test_embeddings.py
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from engram_transformers import EngramFormatError
from engram_transformers.hash_constants_engram import HashConstants, head_offsets
from engram_transformers.hash_ngrams_engram import NgramHasher, naive_hash_ids
from engram_transformers.hash_tokens_engram import token_map_sha256
from engram_transformers.inspection import verify_checkpoint
from engram_transformers.training import create_optimizer

from .backbones import BACKBONES


WORDS = ["<first>", "<second>", "<third>"]
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@pytest.fixture
def longer_tokenizer(tiny_tokenizer, tmp_path):
    """Factory of the golden tokenizer with tokens added behind its 4104 ids."""

    def make(words=WORDS):
        tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
        tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path / "tokenizer")
        assert tokenizer.add_tokens(list(words)) == len(words)
        return tokenizer

    return make


# Golden integers.


MULTIPLIERS = [2305843009213693949, 1234567890123456789, 1999999999999999999]  # below the bound for 4 classes, 2**61
PRIMES = [[7, 11], [13, 17]]
GOLDEN_HASHES = [
    [1, 8, 4, 13],
    [3, 7, 11, 13],
    [4, 10, 1, 9],
    [1, 4, 2, 1],
    [0, 5, 0, 14],
    [6, 8, 1, 14],
    [3, 1, 3, 14],
    [0, 2, 2, 16],
    [6, 10, 10, 15],
    [5, 10, 8, 15],
]


def test_products_that_leave_int64_wrap_and_the_remainder_is_floored():
    primes = torch.tensor([PRIMES])
    constants = HashConstants(torch.tensor([MULTIPLIERS]), primes, head_offsets(primes), torch.tensor([3]))
    hasher = NgramHasher([0], torch.tensor([0, 1, 2, 1, 3]), constants)
    text = torch.tensor([[0, 1, 2, 3, 4, 4, 2]])
    before = hasher.hash_ids(text, 0)
    hasher.resize(9, compressed_vocab_size=4)
    assert hasher.token_map.tolist() == [0, 1, 2, 1, 3, 4, 5, 6, 7]
    assert torch.equal(hasher.hash_ids(text, 0), before)
    # In this text 8 products leave int64, and 8 of the 20 mixes are negative.
    assert hasher.hash_ids(torch.tensor([[0, 5, 8, 2, 6, 6, 3, 7, 1, 0]]), 0)[0].tolist() == GOLDEN_HASHES
    assert naive_hash_ids([0, 4, 7, 2, 5, 5, 1, 6, 1, 0], MULTIPLIERS, PRIMES, pad_class=3) == GOLDEN_HASHES
    # The digest is that of the five entries at the start: SHA-256 of them as little-endian int64.
    digest = token_map_sha256(hasher.original_token_map(4))
    assert digest == "0d22a508cdf8a7f60792986e278a6c30dc7d289e18b0748801a11bc26678e7bb"


def test_a_models_rows_for_added_tokens_are_pinned(tiny_engram):
    model = tiny_engram(layers=(1, 2))
    model.resize_token_embeddings(5200)
    text = torch.tensor([[5, 5199, 5000, 7, 5199, 100, 4104]])  # 3 products leave int64, 6 mixes are negative
    assert model.memory.hashing.token_map[text[0]].tolist() == [5, 3858, 3659, 7, 3858, 74, 2763]
    assert model.memory.hashing.rows(text, 1)[0].tolist() == [
        [204, 243, 648, 672],
        [10, 310, 647, 710],
        [1, 377, 512, 747],
        [188, 328, 573, 687],
        [81, 274, 613, 837],
        [44, 287, 478, 723],
        [27, 269, 513, 714],
    ]


# From the tokenizer to the checkpoint.


def digests(model):
    """Digests that the configuration holds, and the same computed from the tensors."""
    config, hashing = model.config, model.memory.hashing
    original = hashing.original_token_map(config.engram_compressed_vocab_size)
    held = config.engram_token_map_sha256, config.engram_hash_sha256
    assert held == (token_map_sha256(original), hashing.constants.sha256())
    return held


@torch.no_grad()
@pytest.mark.parametrize("rounding", [None, 64])
@pytest.mark.parametrize("backbone", ["llama", "gpt2"])  # gpt2's head is tied to its embeddings
def test_added_tokens_end_to_end(backbone, rounding, ids, longer_tokenizer, tiny_donor, tiny_engram, tmp_path):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES[backbone]()), layers=(0, 1))
    tokenizer, before, known = longer_tokenizer(), digests(model), model(ids).logits
    rows = [model.memory.hashing.rows(ids, layer) for layer in (0, 1)]
    tables = {name: tensor.clone() for name, tensor in model.memory.tables.state_dict().items()}
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=rounding)
    size = 4107 if rounding is None else 4160
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size
    assert model.config.text_config.vocab_size == model.backbone.config.vocab_size == size
    assert model.memory.hashing.token_map[4104:].tolist() == list(range(2763, 2763 + size - 4104))
    # Old texts read the same rows of the same tables and are answered the same.
    assert all(torch.equal(model.memory.hashing.rows(ids, layer), rows[layer]) for layer in (0, 1))
    assert all(torch.equal(tensor, tables[name]) for name, tensor in model.memory.tables.state_dict().items())
    torch.testing.assert_close(model(ids).logits[..., :4104], known, rtol=0, atol=1e-5)
    assert digests(model) == before
    model.check_tokenizer(tokenizer)

    inputs = tokenizer("the <first> cat <second><third> and <first>", return_tensors="pt")
    assert {4104, 4105, 4106} <= set(inputs["input_ids"][0].tolist())
    cached = model.generate(**inputs, **SETTINGS)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **SETTINGS))

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    findings = verify_checkpoint(tmp_path / "saved", generation=False)
    assert [finding.detail for finding in findings if not finding.ok] == []
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["text_config"]["vocab_size"] == size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert digests(loaded) == before
    assert torch.equal(loaded.memory.hashing.token_map, model.memory.hashing.token_map)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(loaded.generate(**inputs, **SETTINGS), cached)


@torch.no_grad()
def test_an_added_token_opens_the_gate_and_makes_ngrams_of_its_own(tiny_engram):
    model = tiny_engram(trained=True)
    model.resize_token_embeddings(4107)
    texts = torch.tensor([[5, 6, new, 7, 8, 9] for new in (4104, 4105, 4106)])
    reads = model.memory.read(texts, None)
    assert reads.alive.all()
    rows = model.memory.hashing.rows(texts, 1)  # (3, 6, orders * heads)
    for place, differs in enumerate([False, False, True, True, True, False]):
        distinct = {tuple(row) for row in rows[:, place].tolist()}
        assert len(distinct) == (3 if differs else 1), place
    logits = model(texts).logits
    with model.disable_memory():
        assert not torch.allclose(model(texts).logits[:, 2], logits[:, 2], atol=1e-2)


def test_a_step_of_training_reaches_the_rows_of_added_tokens(tiny_engram, longer_tokenizer):
    model, tokenizer = tiny_engram(), longer_tokenizer()
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    model.backbone.requires_grad_(False)
    optimizer = create_optimizer(model, lr=1e-2)
    batch = tokenizer("the <first> cat <second><third> and <first>", return_tensors="pt")
    before = model(**batch, labels=batch["input_ids"]).loss
    before.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        assert model(**batch, labels=batch["input_ids"]).loss < before - 0.01
    read = model.memory.hashing.rows(batch["input_ids"], 1)
    table = torch.cat([model.memory.tables["1"].order2[0], model.memory.tables["1"].order3[0]])
    moved = {int(row) for row in torch.nonzero((table != 0).any(-1)).flatten()}
    # All but the last position's, from which nothing is predicted.
    assert moved == set(read[:, :-1].flatten().tolist())
    place = batch["input_ids"][0].tolist().index(4104)
    assert set(read[0, place].tolist()) <= moved


def test_the_digest_guards_the_original_map_after_a_resize(tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    model.resize_token_embeddings(4110)
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("model-*.safetensors")
    tensors = load_file(path)
    AutoModelForCausalLM.from_pretrained(tmp_path)  # control: whole, it loads
    for place in (3, 4103):
        damaged = tensors["memory.hashing.token_map"].clone()
        damaged[place] += 1
        save_file({**tensors, "memory.hashing.token_map": damaged}, path, {"format": "pt"})
        with pytest.raises(EngramFormatError, match="token map has SHA-256"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_tokens_added_one_after_another_are_tokens_added_at_once(tiny_engram, tmp_path):
    at_once, in_turns = tiny_engram(trained=True), tiny_engram(trained=True)
    at_once.resize_token_embeddings(4120)
    in_turns.resize_token_embeddings(4107)
    in_turns.save_pretrained(tmp_path / "first")
    in_turns = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    in_turns.resize_token_embeddings(4112)
    in_turns.resize_token_embeddings(4120)
    assert torch.equal(in_turns.memory.hashing.token_map, at_once.memory.hashing.token_map)
    assert digests(in_turns) == digests(at_once)
    in_turns.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    text = torch.tensor([[5, 4106, 4111, 4119, 7]])
    assert torch.equal(again(text).logits, in_turns(text).logits)


def test_rounding_alone_grows_the_vocabulary(tiny_engram):
    model = tiny_engram()
    model.resize_token_embeddings(pad_to_multiple_of=100)
    assert model.config.text_config.vocab_size == len(model.memory.hashing.token_map) == 4200
    unchanged = model.resize_token_embeddings()
    assert unchanged is model.get_input_embeddings()
    assert len(model.memory.hashing.token_map) == 4200


@torch.no_grad()
def test_the_model_without_its_head_is_resized_too(ids, tiny_engram, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "saved")
    model = AutoModel.from_pretrained(tmp_path / "saved")
    expected = model(ids).last_hidden_state
    model.resize_token_embeddings(4110)
    assert len(model.memory.hashing.token_map) == model.get_input_embeddings().weight.shape[0] == 4110
    assert torch.equal(model(ids).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "resized")
    loaded = AutoModel.from_pretrained(tmp_path / "resized")
    text = torch.tensor([[5, 4109, 7]])
    assert torch.equal(loaded(text).last_hidden_state, model(text).last_hidden_state)


# Tokens and tokenizers of other kinds.


@pytest.mark.parametrize("words", [["<first>"], [" the ", " The"], ["<first>", " cat ", "<second>"]])
@pytest.mark.parametrize("rounding", [None, 64])
def test_a_tokenizer_with_added_tokens_is_known_after_the_resize(words, rounding, longer_tokenizer, tiny_engram):
    model, tokenizer = tiny_engram(), longer_tokenizer(words)
    with pytest.raises(ValueError, match=f"{len(tokenizer)} ids.*{len(words)} place.*4104"):
        model.check_tokenizer(tokenizer)  # control: before it, ids are outside the map
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=rounding)
    model.check_tokenizer(tokenizer)
    assert model.memory.hashing.token_map[4104 : 4104 + len(words)].tolist() == list(range(2763, 2763 + len(words)))
    with pytest.raises(ValueError, match="another token map"):
        model.check_tokenizer(longer_tokenizer([f"<{index}>" for index in range(100)]))


@torch.no_grad()
@pytest.mark.parametrize("added", [1, 3, 60])
def test_tokens_added_into_a_donors_padding_get_classes_too(added, ids, longer_tokenizer, tiny_donor, tiny_engram):
    padded = LlamaConfig(**{**BACKBONES["llama"]().to_dict(), "vocab_size": 4160})
    model = tiny_engram(trained=True, donor=tiny_donor(padded), layers=(0, 1))
    assert (model.memory.hashing.token_map[4104:] == -1).all()
    before, rows = digests(model), model.memory.hashing.rows(ids, 0)
    tokenizer = longer_tokenizer([f"<new {index}>" for index in range(added)])
    model.resize_token_embeddings(len(tokenizer))
    assert model.memory.hashing.token_map[4104:].tolist() == list(range(2763, 2763 + added))
    assert torch.equal(model.memory.hashing.rows(ids, 0), rows)
    assert digests(model) == before
    model.check_tokenizer(tokenizer)
