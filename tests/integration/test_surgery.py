"""Surgery on checkpoints: what is made loads strictly and is whole, and what it is made from does not change.

Run: pytest tests/integration/test_surgery.py
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from engram_transformers import EngramForCausalLM, verify_checkpoint
from engram_transformers.conversion import (
    extract_memory,
    extract_pack,
    graft,
    merge_memories,
    prune_memory,
    resize_memory,
    strip_memory,
)
from engram_transformers.conversion.new_checkpoint import HOLE, write_but_zeros
from engram_transformers.conversion.reference_copy import copy_by_reference
from engram_transformers.conversion.source_checkpoint import SourceCheckpoint

from ..packs import pack_of


TEXT = "The old harbour of Lisbon lies on the river Tagus, and ships of many nations came there to trade in spices."
FIELDS = {"engram_vocab_size": 211, "engram_n_heads": 2, "engram_head_dim": 4}


@pytest.fixture
def trained(donor, tiny_tokenizer, fill_memory, tmp_path):
    """A checkpoint with a filled memory, in several files and parts."""
    graft(donor, tmp_path / "trained", [1, 2], engram_table_parts=2, engram_pad_token_id=7, **FIELDS)
    model = fill_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "trained"))
    model.save_pretrained(tmp_path / "trained", max_memory_shard_size=8000)
    return tmp_path / "trained"


@pytest.fixture
def logits(tiny_tokenizer):
    """Logits of a checkpoint on the text, or of the backbone without its memory."""

    @torch.no_grad()
    def run(folder, memory=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        memory = memory or not hasattr(model, "memory")
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
    (trained / "additional_chat_templates").mkdir()
    (trained / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
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
    assert content(trained) == before and "outputs" in receipt(trained) and "outputs" not in receipt(out)
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
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
    index = json.loads((trained / "model.safetensors.index.json").read_text())
    shard = next(trained.glob("engram-memory-00002*"))
    tensors = load_file(shard)
    save_file(tensors | {"more": torch.zeros(1)}, shard)
    index["weight_map"]["more"] = shard.name
    (trained / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="engram-memory-00002.* holds tables and 'more'"):
        SourceCheckpoint(trained)
    shard.unlink()
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


def test_small_rows_become_zero_and_others_keep_their_bits(trained, tmp_path):
    before = content(trained)
    report = prune_memory(trained, tmp_path / "out", min_norm=1.5)
    old, new = rows(trained, 2, 3), rows(tmp_path / "out", 2, 3)
    kept = old.norm(dim=-1) >= 1.5
    assert torch.equal(new, old * kept[:, None]) and 0 < int(kept.sum()) < len(old)
    gone = [(rows(trained, layer, order).norm(dim=-1) < 1.5).sum() for layer in (1, 2) for order in (2, 3)]
    assert report.zeroed == sum(map(int, gone)) and report.were_zero == 0 and report.rows > report.zeroed
    assert content(trained) == before and receipt(tmp_path / "out")["surgery"][0]["zeroed"] == report.zeroed


def test_all_rows_can_go_and_the_backbone_is_left(trained, logits, tmp_path):
    report = prune_memory(trained, tmp_path / "out", min_norm=float("inf"))
    assert report.zeroed == report.rows and torch.equal(logits(tmp_path / "out"), logits(trained, memory=False))


def test_untouched_rows_become_holes_and_no_value_changes(donor, logits, tmp_path):
    graft(donor, tmp_path / "graft", [1], engram_vocab_size=20_000, engram_n_heads=2, engram_head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "graft")
    with torch.no_grad():
        model.memory.tables["1"].order2[0][::1000] = 1.0  # one row in each block that a save leaves out as a hole
        model.memory.tables["1"].order3[0][:] = 1.0
    model.save_pretrained(tmp_path / "saved")
    report = prune_memory(tmp_path / "saved", tmp_path / "out", untouched=True)
    assert report.zeroed == 0 and report.were_zero > 30_000
    assert report.disk_after < 0.6 * report.disk_before
    assert torch.equal(rows(tmp_path / "out"), rows(tmp_path / "saved"))
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give min_norm"),
        ({"min_norm": 1.0, "untouched": True}, "give min_norm"),
        ({"min_norm": 0.0}, "min_norm=0.0 must be larger than 0"),
        ({"min_norm": float("nan")}, "min_norm=nan must be"),
        ({"min_norm": 1.0, "max_memory_shard_size": 10}, "more than max_memory_shard_size"),
    ],
)
def test_pruning_that_cannot_be_leaves_nothing(trained, tmp_path, arguments, said):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=said):
        prune_memory(trained, tmp_path / "out", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_memory_is_taken_out_and_put_back(trained, donor, logits, tmp_path):
    out = extract_memory(trained, tmp_path / "memory")
    for path in trained.glob("engram-memory-*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="lacks .* backbone weights"):
        EngramForCausalLM.from_pretrained(out)
    again = graft(donor, tmp_path / "again", init_from=out, init_reader=True)
    assert torch.equal(logits(again), logits(trained))
    assert sum(f.stat().st_size for f in out.iterdir()) < 0.5 * sum(f.stat().st_size for f in trained.iterdir())
    assert content(extract_memory(out, tmp_path / "twice")).keys() == content(out).keys()
    with pytest.raises(ValueError, match="a memory without a backbone"):
        strip_memory(out, tmp_path / "no")


def test_a_pack_of_a_text_gives_over_an_empty_table_what_the_table_gave(trained, tiny_tokenizer, logits, tmp_path):
    ids = tiny_tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    model = AutoModelForCausalLM.from_pretrained(trained)
    _, read = model.memory.hashing(ids)  # (layers, 1, L, orders, heads)
    with torch.no_grad():  # n-grams that reach before the text are in no pack
        for layer, table in enumerate(model.memory.tables.values()):
            for order, parts in enumerate(table.orders()):
                reaching = read[layer, 0, : order + 1, order].flatten()
                for row in reaching.tolist():
                    part = min(row // parts.part_height, len(parts) - 1)
                    parts[part][row - part * parts.part_height] = 0
    model.save_pretrained(tmp_path / "whole")
    tiny_tokenizer.save_pretrained(tmp_path / "whole")
    pack = extract_pack(tmp_path / "whole", tmp_path / "x.engram-pack.safetensors", [TEXT, TEXT])
    assert len(pack) == len({tuple(w) for n in (2, 3) for w in ids[0].unfold(0, n, 1).tolist()})
    prune_memory(tmp_path / "whole", tmp_path / "empty", min_norm=float("inf"))
    empty = AutoModelForCausalLM.from_pretrained(tmp_path / "empty")
    with torch.no_grad():
        before = empty(ids).logits
        empty.load_memory(tmp_path / "x.engram-pack.safetensors")
        assert torch.equal(empty(ids).logits, logits(tmp_path / "whole"))
        assert not torch.allclose(empty(ids).logits, before, atol=1e-2)


def test_a_pack_that_cannot_be_extracted_is_refused(trained, donor, tmp_path):
    with pytest.raises(ValueError, match="must end with .engram-pack.safetensors"):
        extract_pack(trained, tmp_path / "x.safetensors", [TEXT])
    (tmp_path / "x.engram-pack.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        extract_pack(trained, tmp_path / "x.engram-pack.safetensors", [TEXT])
    fresh = graft(donor, tmp_path / "fresh", [1, 2], **FIELDS)
    with pytest.raises(ValueError, match="gives zeros for every n-gram"):
        extract_pack(fresh, tmp_path / "y.engram-pack.safetensors", [TEXT])


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": 200_000}], ids=["one file", "several files"])
def test_stripping_a_graft_gives_the_donors_bytes(tiny_donor, tiny_tokenizer, tmp_path, shards):
    model = tiny_donor()
    model.save_pretrained(tmp_path / "donor", **shards)
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    out = strip_memory(graft(tmp_path / "donor", tmp_path / "graft", [1, 2], **FIELDS), tmp_path / "out")
    theirs = {name: data for name, data in content(tmp_path / "donor").items() if name.endswith(".safetensors")}
    assert {name: data for name, data in content(out).items() if name.endswith(".safetensors")} == theirs
    assert not [name for name in content(out) if "engram" in name]
    ids = torch.randint(3, 4000, (2, 9))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, model(ids).logits)


def test_a_saved_checkpoint_is_stripped_to_what_loads_without_this_package(trained, logits, tmp_path):
    out = strip_memory(trained, tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(out)) is LlamaForCausalLM
    assert torch.equal(logits(out), logits(trained, memory=False))
    assert "engram" not in (out / "config.json").read_text() and not list(out.glob("*.py"))


@pytest.fixture
def family(donor, fill_memory, tmp_path):
    """A graft with a trained reader, and two of it whose rows were trained on."""
    base = fill_memory(AutoModelForCausalLM.from_pretrained(graft(donor, tmp_path / "graft", [1, 2], **FIELDS)))
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("first", "second"), start=1):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in model.memory.tables.parameters():
                changed = torch.randperm(len(part), generator=generator)[: len(part) // 2]
                part[changed] += torch.randn(len(changed), 4, generator=generator)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "base", tmp_path / "first", tmp_path / "second"


@pytest.mark.parametrize(
    ("how", "weights", "expected"),
    [
        ("average", None, lambda base, a, b: (a + b) / 2),
        ("average", [1, 3], lambda base, a, b: 0.25 * a + 0.75 * b),
        ("sum", [1, -0.5], lambda base, a, b: a - 0.5 * b),
        ("task", None, lambda base, a, b: base + (a - base) + (b - base)),
        ("task", [1, 0], lambda base, a, b: a),
    ],
)
def test_rows_are_merged_by_the_rule(family, tmp_path, how, weights, expected):
    base, *two = family
    before = [content(folder) for folder in family]
    given = {"base": base} if how == "task" else {}
    report = merge_memories(two, tmp_path / "out", how=how, weights=weights, **given)
    for layer in (1, 2):
        for order in (2, 3):
            held = [rows(folder, layer, order) for folder in family]
            torch.testing.assert_close(rows(tmp_path / "out", layer, order), expected(*held))
    starting = rows(base) if how == "task" else torch.zeros(1)
    moved = [rows(folder) - starting for folder in two]
    both = moved[0].any(-1) & moved[1].any(-1)
    own = report.conflicts[0]
    assert own.table == "memory.tables.1.order2.0" and own.shared == int(both.sum())
    cosine = torch.cosine_similarity(moved[0][both], moved[1][both]).mean()
    assert own.cosine == pytest.approx(float(cosine), abs=1e-4)
    assert [content(folder) for folder in family] == before
    assert receipt(tmp_path / "out")["surgery"][-1]["how"] == how
    assert "by several memories, with a mean cosine of" in report.lines()[0]


def test_memories_that_do_not_belong_together_are_refused(family, donor, tiny_donor, tmp_path):
    base, first, second = family
    other_layout = graft(donor, tmp_path / "layout", [1, 2], **{**FIELDS, "engram_seed": 1})
    tiny_donor(seed=5).save_pretrained(tmp_path / "donor2")
    for path in donor.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "donor2")
    other_backbone = graft(tmp_path / "donor2", tmp_path / "backbone", init_from=first, init_reader=True)
    fresh = graft(donor, tmp_path / "fresh", init_from=second)
    before = sorted(path.name for path in tmp_path.iterdir())
    for folders, arguments, said in (
        ([first, other_layout], {"how": "sum"}, "have other layouts"),
        ([first, other_backbone], {"how": "sum"}, "the backbones of .* differ"),
        ([first, fresh], {"how": "sum"}, "a sum of readers reads every row twice"),
        ([first, fresh], {"how": "average"}, "the readers differ.*merge_readers"),
        ([first], {"how": "sum"}, "1 memories are given"),
        ([first, second], {"how": "mean"}, "how='mean' must be one of"),
        ([first, second], {"how": "task"}, "needs the base"),
        ([first, second], {"how": "sum", "base": base}, "a base is for how='task'"),
        ([first, second], {"how": "sum", "weights": [1]}, "must be 2 numbers"),
        ([first, second], {"how": "average", "weights": [1, -1]}, "a positive sum"),
        ([first, second], {"how": "sum", "weights": [1, float("inf")]}, "must be 2 numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_memories(folders, tmp_path / "out", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    report = merge_memories([first, fresh], tmp_path / "out", how="average", merge_readers=True)
    name = "memory.layers.1.key_value.weight"
    expected = (SourceCheckpoint(first).tensor(name) + SourceCheckpoint(fresh).tensor(name)) / 2
    torch.testing.assert_close(SourceCheckpoint(tmp_path / "out").tensor(name), expected)
    assert report.merged_readers and "measure the loss" in report.lines()[-1]


@pytest.mark.parametrize("data", [{}, {0: 1}, {5 << 20: 7, (8 << 20) - 1: 9}], ids=["a hole", "begins", "ends"])
def test_a_copy_keeps_holes(tmp_path, data):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(8 << 20)
        for place, byte in data.items():
            file.seek(place)
            file.write(bytes([byte]))
    copy_by_reference(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 <= len(data) * (1 << 16)


def test_a_failure_on_the_way_leaves_nothing(trained, tmp_path, monkeypatch):
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engram_transformers.conversion.new_checkpoint.write_but_zeros", fail)
    with pytest.raises(OSError, match="No space left"):
        prune_memory(trained, tmp_path / "out", min_norm=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
