"""Surgery on checkpoints: resizing, transplants. What is made loads strictly, is whole, and old files do not change.

Run: pytest tests/integration/test_surgery.py
"""

import json

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engram_transformers import verify_checkpoint
from engram_transformers.conversion import graft, resize_memory
from engram_transformers.conversion.new_checkpoint import HOLE, write_but_zeros
from engram_transformers.conversion.source_checkpoint import SourceCheckpoint

from ..packs import pack_of


TEXT = "The old harbour of Lisbon lies on the river Tagus, and ships of many nations came there to trade in spices."
FIELDS = {"engram_vocab_size": 211, "engram_n_heads": 2, "engram_head_dim": 4}


@pytest.fixture
def donor(tiny_donor, tiny_tokenizer, tmp_path):
    """A donor's folder."""
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


@pytest.fixture
def trained(donor, tiny_tokenizer, fill_memory, tmp_path):
    """A checkpoint with a filled memory, in several files and parts."""
    graft(donor, tmp_path / "trained", [1, 2], engram_table_parts=2, **FIELDS)
    model = fill_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "trained"))
    model.save_pretrained(tmp_path / "trained", max_memory_shard_size=8000)
    return tmp_path / "trained"


@pytest.fixture
def logits(tiny_tokenizer):
    """Logits of a checkpoint on the text, or of the backbone without its memory."""

    @torch.no_grad()
    def run(folder, memory=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = tiny_tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
        if memory:
            return model(ids).logits
        with model.disable_memory():
            return model(ids).logits

    return run


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder, layer=1, order=2):
    return torch.cat(SourceCheckpoint(folder).order_parts(layer, order))


def receipt(folder):
    return json.loads((folder / "engram_graft.json").read_text())


@pytest.mark.parametrize("heads", [2, 4])
def test_a_resized_memory_reads_on_its_text_what_it_read_before(trained, logits, tmp_path, heads):
    before = content(trained)
    report = resize_memory(trained, tmp_path / "out", vocab_size=20_000, n_heads=heads, texts=[TEXT])
    out = tmp_path / "out"
    # The text is short, so that no two of its n-grams share a row of the larger table.
    assert report.filled == report.tokens * 2 * 2 * heads and report.aligned == report.tokens
    torch.testing.assert_close(logits(out), logits(trained), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(out), logits(out, memory=False), atol=1e-2), "the memory does something"
    assert int(rows(out).any(-1).sum()) == report.tokens * heads, "other rows are zero"
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert (config.engram_vocab_size, config.engram_n_heads) == (20_000, heads)
    assert all(finding.ok for finding in verify_checkpoint(out, generation=False))
    assert receipt(out)["surgery"][0]["verb"] == "resize" and receipt(out)["hash_sha256"] == config.engram_hash_sha256
    assert content(trained) == before
    assert sum(f.stat().st_blocks * 512 for f in out.glob("engram-memory*")) < out.stat().st_size + 3_000_000


def test_a_smaller_memory_holds_means_and_fewer_heads(trained, tmp_path):
    report = resize_memory(trained, tmp_path / "out", vocab_size=[2, 5], n_heads=1, texts=[TEXT])
    assert report.filled > 0.8 * report.rows
    assert report.rows == int(SourceCheckpoint(tmp_path / "out").hasher.primes.sum())
    assert rows(tmp_path / "out").abs().max() < rows(trained).abs().max()


def test_a_pack_says_which_ngrams_keep_their_rows(trained, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained)
    pack = pack_of(model, [(5, 6), (7, 8), (5, 6, 7)])
    report = resize_memory(trained, tmp_path / "out", vocab_size=20_000, pack=pack)
    assert report.filled == 2 * 2 * (2 + 1)
    other = pack_of(model, [(5, 6)])
    other.fits["token_map"] = "0" * 64
    with pytest.raises(ValueError, match="another token map"):
        resize_memory(trained, tmp_path / "other", vocab_size=20_000, pack=other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"vocab_size": 20_000}, "texts or from a pack"),
        ({"texts": [TEXT]}, "change nothing: the memory has engram_vocab_size=211"),
        ({"vocab_size": 211, "n_heads": 2, "texts": [TEXT]}, "change nothing"),
        ({"vocab_size": 0, "texts": [TEXT]}, "at least 1 row"),
        ({"n_heads": 0, "texts": [TEXT]}, "engram_n_heads=0 is too small"),
        ({"vocab_size": [1, 2, 3], "texts": [TEXT]}, "has 3 entries"),
        ({"vocab_size": 20_000, "texts": []}, "not one n-gram"),
    ],
)
def test_a_resize_that_cannot_be_leaves_nothing(trained, tmp_path, arguments, said):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=said):
        resize_memory(trained, tmp_path / "out", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_not_a_whole_checkpoint_is_refused(trained, donor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        SourceCheckpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="without an Engram memory"):
        SourceCheckpoint(donor)
    model = AutoModelForCausalLM.from_pretrained(trained)
    model.save_memory_delta(tmp_path / "delta")
    model.config.engram_memory_delta = "memory_delta.safetensors"
    model.config.save_pretrained(tmp_path / "delta")
    with pytest.raises(ValueError, match="only what training changed"):
        SourceCheckpoint(tmp_path / "delta")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        resize_memory(trained, tmp_path / "used", vocab_size=500, texts=[TEXT])
    next(trained.glob("engram-memory-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="engram-memory-00002"):
        resize_memory(trained, tmp_path / "out", vocab_size=500, texts=[TEXT])


def test_a_tokenizer_that_is_not_the_memorys_is_refused(trained, donor, tmp_path):
    other_tokenizer().save_pretrained(trained)
    with pytest.raises(ValueError, match="another token map"):
        resize_memory(trained, tmp_path / "out", vocab_size=500, texts=[TEXT])


def other_tokenizer():
    """A tokenizer that cuts the text elsewhere."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT] * 3, vocab_size=300, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")


def test_a_transplant_with_the_same_layout_takes_the_rows_as_they_are(trained, donor, logits, tmp_path):
    out = graft(donor, tmp_path / "out", init_from=trained)
    for layer in (1, 2):
        for order in (2, 3):
            assert torch.equal(rows(out, layer, order), rows(trained, layer, order))
    whole = graft(donor, tmp_path / "whole", init_from=trained, init_reader=True)
    assert torch.equal(logits(whole), logits(trained))
    assert not torch.allclose(logits(out), logits(trained), atol=1e-2), "its reader is fresh"
    fresh = graft(donor, tmp_path / "fresh", [1, 2], **FIELDS)
    assert torch.equal(logits(fresh), logits(trained, memory=False))
    assert receipt(out)["init_from"] == {"memory": "trained", "rows": "its rows as they are", "reader": False}


def test_a_transplant_into_other_layers_and_sizes_is_readdressed(trained, donor, logits, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    sizes = {"engram_vocab_size": 20_000, "engram_seed": 3}
    given = {"init_from": trained, "init_text": tmp_path / "text", "init_reader": True}
    out = graft(donor, tmp_path / "out", **given, **sizes)
    torch.testing.assert_close(logits(out), logits(trained), rtol=1e-4, atol=1e-4)
    moved = graft(donor, tmp_path / "moved", [2, 3], **given, **sizes)
    values = {tuple(row) for row in rows(trained).tolist()}
    held = rows(moved, layer=2)
    assert {tuple(row) for row in held[held.any(-1)].tolist()} <= values, "rows of the first layer of both"
    assert "rows have a value" in receipt(out)["init_from"]["rows"]


def test_a_transplant_to_another_tokenizer_reads_at_the_same_character(trained, tiny_llama_config, tmp_path):
    tokenizer = other_tokenizer()
    tiny_llama_config.vocab_size = len(tokenizer)
    tiny_llama_config.hidden_size = 16
    AutoModelForCausalLM.from_config(tiny_llama_config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(ValueError, match=r"token map of this graft differ.*init_text"):
        graft(tmp_path / "other", tmp_path / "out", init_from=trained)
    sizes = {"engram_vocab_size": 20_000, "engram_pad_token_id": 0}
    out = graft(tmp_path / "other", tmp_path / "out", init_from=trained, init_text=tmp_path / "text", **sizes)
    source, made = SourceCheckpoint(trained), SourceCheckpoint(out)
    last = []
    for checkpoint in (source, made):  # the n-grams that end with the text
        ids = torch.tensor([checkpoint.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]])
        _, read = checkpoint.hasher(ids)  # (layers, 1, L, orders, heads)
        last.append(torch.cat(checkpoint.order_parts(2, 3))[read[1, 0, -1, 1]])
    assert torch.equal(*last) and bool(last[0].all())


@pytest.mark.parametrize(
    ("layers", "fields", "said"),
    [
        (None, {"engram_vocab_size": 500}, "the sizes or the seed of this graft differ"),
        (None, {"engram_head_dim": 8}, "engram_head_dim=8, and the rows of"),
        (None, {"engram_max_ngram_size": 4}, "engram_max_ngram_size=4"),
        ([1], {}, r"engram_layer_ids=\[1\] are 1 layers"),
        (None, {"engram_kernel_size": 0, "init_reader": True}, "has other shapes than this graft's"),
        (None, {"init_from": None, "init_reader": True}, "memory that init_from names"),
        (None, {"init_from": "nothing"}, r"'nothing' has no config.json"),
    ],
)
def test_a_transplant_that_cannot_be_leaves_nothing(trained, donor, tmp_path, layers, fields, said):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        graft(donor, tmp_path / "out", layers, **{"init_from": trained, **fields})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_zeros_between_written_rows_are_holes(tmp_path):
    path, data = tmp_path / "file", torch.zeros(6 * HOLE, dtype=torch.uint8)
    data[0], data[3 * HOLE + 5], data[-1] = 1, 2, 3
    path.touch()
    for at in (0, 100):
        with open(path, "r+b") as file:
            file.truncate(0)
            file.truncate(7 * HOLE)
            write_but_zeros(file, data.numpy(), at)
        assert path.read_bytes()[at : at + len(data)] == bytes(data.tolist())
        assert path.stat().st_blocks * 512 <= 4 * HOLE < path.stat().st_size
