"""Surgery on quantised tables: records are read as values, and values are written as records.

Values that were read from a record are stored exactly, so what stays has the same values, bit for bit.
Run: pytest tests/integration/test_surgery_quantised.py
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engram_transformers.conversion import (
    cast,
    extract_pack,
    graft,
    merge_memories,
    prune_memory,
    resize_memory,
)
from engram_transformers.conversion.source_checkpoint import SourceCheckpoint


TEXT = "The old harbour of Lisbon lies on the river Tagus, and ships of many nations came there to trade in spices."
FIELDS = {"engram_vocab_size": 211, "engram_n_heads": 2, "engram_head_dim": 32}


@pytest.fixture
def donor(tiny_donor, tiny_tokenizer, tmp_path):
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


@pytest.fixture
def floats(donor, fill_memory, tmp_path):
    graft(donor, tmp_path / "floats", [1, 2], engram_table_parts=2, **FIELDS)
    fill_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "floats")).save_pretrained(tmp_path / "floats")
    return tmp_path / "floats"


@pytest.fixture(params=["int8", "float8_e4m3fn"])
def quantised(request, floats, tmp_path):
    cast(floats, tmp_path / "quantised", request.param)
    return tmp_path / "quantised"


def stored(folder, layer=1, order=2):
    return torch.cat(SourceCheckpoint(folder).order_parts(layer, order))


def values(folder, layer=1, order=2):
    return SourceCheckpoint(folder).values(stored(folder, layer, order))


@torch.no_grad()
def logits(folder, tokenizer, pack=None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if pack is not None:
        model.load_memory(pack, "pack")
    return model(tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids).logits


def test_a_resized_memory_reads_what_it_read_before(quantised, tiny_tokenizer, tmp_path):
    """The text is short, so that no two of its n-grams share a row of the larger table."""
    resize_memory(quantised, tmp_path / "out", vocab_size=20_000, texts=[TEXT])
    assert stored(tmp_path / "out").dtype == torch.uint8
    assert torch.equal(logits(tmp_path / "out", tiny_tokenizer), logits(quantised, tiny_tokenizer))


def test_small_rows_become_zero_and_others_keep_their_bits(quantised, tmp_path):
    norms = values(quantised).norm(dim=-1)
    limit = float(norms.median())
    prune_memory(quantised, tmp_path / "out", min_norm=limit)
    before, after = stored(quantised), stored(tmp_path / "out")
    assert torch.equal(after[norms >= limit], before[norms >= limit]) and not after[norms < limit].any()
    assert bool((norms < limit).any())


def test_memories_are_merged_by_their_values(floats, quantised, tmp_path):
    merge_memories([quantised, quantised], tmp_path / "same", how="average")
    assert torch.equal(values(tmp_path / "same"), values(quantised))
    merge_memories([floats, quantised], tmp_path / "sum", how="sum")  # written as floats, the first one's type
    torch.testing.assert_close(values(tmp_path / "sum"), values(floats) + values(quantised), rtol=0, atol=0)


def test_a_pack_of_a_text_holds_the_values(donor, quantised, tiny_tokenizer, tmp_path):
    pack = extract_pack(quantised, tmp_path / "text.engram-pack.safetensors", [TEXT])
    read = {
        tuple(gram): row for gram, row in zip(pack.records[2].ngrams.tolist(), pack.records[2].vectors[1], strict=True)
    }
    model = AutoModelForCausalLM.from_pretrained(quantised)
    ids = tiny_tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    classes = model.memory.hashing.compress(ids)[0].tolist()
    _, rows = model.memory.hashing(ids)
    vectors = model.memory.tables["1"](rows[0])[0, :, : 2 * 32]  # (length, heads * width of bigrams)
    for place in range(1, len(classes)):
        assert torch.equal(read[tuple(classes[place - 1 : place + 1])], vectors[place])


def test_a_transplant_may_change_the_type(donor, floats, quantised, tmp_path):
    graft(donor, tmp_path / "as it is", init_from=quantised, init_reader=True)
    assert torch.equal(stored(tmp_path / "as it is"), stored(quantised))
    graft(donor, tmp_path / "as floats", init_from=quantised, engram_table_dtype="float32")
    assert torch.equal(stored(tmp_path / "as floats"), values(quantised))
    dtype = SourceCheckpoint(quantised).config.engram_table_dtype
    graft(donor, tmp_path / "quantised now", init_from=floats, engram_table_dtype=dtype)
    assert torch.equal(stored(tmp_path / "quantised now"), stored(quantised))


def test_other_starts_than_zeros_need_a_table_that_is_not_quantised(donor, tmp_path):
    with pytest.raises(ValueError, match="init='normal' writes values, and engram_table_dtype='int8' is quantised"):
        graft(donor, tmp_path / "out", init="normal", engram_table_dtype="int8", **FIELDS)
    with pytest.raises(ValueError, match="two starts of the same rows"):
        graft(donor, tmp_path / "out", init="normal", init_from=tmp_path / "donor", **FIELDS)
    assert not (tmp_path / "out").exists()


def test_the_reader_learns_over_a_quantised_table(quantised):
    model = AutoModelForCausalLM.from_pretrained(quantised).set_trainable("reader")
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert float(model.memory.layers["1"].key_value.weight.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="engram cast"):
        model.set_trainable("memory")
