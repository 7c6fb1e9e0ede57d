"""A hasher that follows a resized vocabulary keeps every old row, and one that was read from a checkpoint is accepted
only with the token map and constants of that checkpoint.

Run: pytest tests/unit/test_hasher_changes.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from engram_transformers import EngramConfig, EngramFormatError
from engram_transformers.hash_ngrams_engram import NgramHasher
from engram_transformers.hash_tokens_engram import DEAD, token_map_sha256

from .hashers import VOCABULARY, all_inside, cases, make_hasher


# A hasher that follows the vocabulary.


@given(case=cases(max_length=20), added=st.integers(1, 200))
def test_a_resized_vocabulary_keeps_old_rows_and_gives_new_ids_classes_of_their_own(case, added):
    hasher, classes, before = case.hasher, case.classes, case.hasher.rows_of_classes(case.classes)
    hasher.resize(VOCABULARY + added, compressed_vocab_size=40)
    assert torch.equal(hasher.rows_of_classes(classes), before)
    known = VOCABULARY - 3  # three ids behind the tokenizer's last one count as new
    old = case.ids < known
    assert torch.equal(classes[old], hasher.compress(case.ids, case.alive)[old])
    assert hasher.token_map[known:].tolist() == list(range(40, 40 + 3 + added))
    # Products of the new classes may leave int64, and what is left of them may be negative.
    assert all_inside(hasher, hasher(torch.arange(VOCABULARY + added)[None])[1])
    hasher.resize(VOCABULARY + added + 5, compressed_vocab_size=40)
    assert hasher.token_map[known:].tolist() == list(range(40, 40 + 3 + added + 5))


def test_a_token_added_inside_a_padded_vocabulary_gets_a_class():
    hasher = make_hasher(3, 2)
    assert hasher.token_map[VOCABULARY - 3 :].tolist() == [-1, -1, -1]  # the control
    original = hasher.original_token_map(40)
    hasher.resize(VOCABULARY - 2, compressed_vocab_size=40)
    assert hasher.token_map[VOCABULARY - 3 :].tolist() == [40]
    assert token_map_sha256(hasher.original_token_map(40)) == token_map_sha256(original)


def test_a_vocabulary_shrinks_over_dead_ids_only():
    hasher = make_hasher(3, 2)
    hasher.resize(VOCABULARY - 3, compressed_vocab_size=40)
    assert len(hasher.token_map) == VOCABULARY - 3
    with pytest.raises(ValueError, match=r"cannot shrink from 57 to 56 ids.*Graft"):
        hasher.resize(VOCABULARY - 4, compressed_vocab_size=40)
    assert len(hasher.token_map) == VOCABULARY - 3


# A hasher that has been read from a checkpoint.


def config(**changes) -> EngramConfig:
    fields = {"engram_layer_ids": [1, 3], "engram_vocab_size": 50, "engram_n_heads": 2, "engram_head_dim": 2}
    text_config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, pad_token_id=2)
    return EngramConfig(text_config=text_config, **{**fields, **changes})


def compressed(token_map: torch.Tensor) -> EngramConfig:
    return config(engram_compressed_vocab_size=40, engram_token_map_sha256=token_map_sha256(token_map))


def test_a_token_map_of_another_checkpoint_is_refused():
    token_map = torch.arange(VOCABULARY) % 40
    settings = compressed(token_map)
    NgramHasher.from_config(settings, token_map).check(settings)  # the control
    with pytest.raises(EngramFormatError, match=r"token map has SHA-256.*another checkpoint.*model-"):
        NgramHasher.from_config(settings, token_map.flip(0)).check(settings)
    with pytest.raises(EngramFormatError, match="token map has SHA-256"):
        NgramHasher.from_config(settings, token_map).check(compressed(token_map.flip(0)))
    with pytest.raises(EngramFormatError, match="token map has SHA-256"):
        NgramHasher.from_config(settings, token_map).check(config(engram_compressed_vocab_size=40))


def test_a_memory_without_compression_is_accepted():
    settings = config()
    hasher = NgramHasher.from_config(settings)
    assert torch.equal(hasher.token_map, torch.arange(VOCABULARY))
    hasher.check(settings)


@given(added=st.integers(1, 50), dead=st.integers(0, 5), with_map=st.booleans())
def test_a_resized_memory_is_accepted(added, dead, with_map):
    token_map = torch.arange(VOCABULARY) % 40 if with_map else None
    if with_map:
        token_map[VOCABULARY - dead :] = DEAD
    settings = compressed(token_map) if with_map else config()
    hasher = NgramHasher.from_config(settings, token_map)
    hasher.resize(VOCABULARY + added, settings.engram_compressed_vocab_size)
    hasher.check(settings)
    hasher.multipliers[0, 0] += 1
    with pytest.raises(EngramFormatError, match="must be odd"):
        hasher.check(settings)
