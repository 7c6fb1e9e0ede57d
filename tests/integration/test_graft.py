"""Grafting folders: the donor's files are reused where they fit and rewritten where not; nothing half-made is left.

Run: pytest tests/integration/test_graft.py
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BltConfig, GPT2Config

from engram_transformers import EngramForCausalLM
from engram_transformers.conversion import graft
from engram_transformers.conversion.backbone import fresh_memory
from engram_transformers.conversion.reference_copy import copy_by_reference

from .backbones import BACKBONES


FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}


@pytest.fixture
def donor_folder(tiny_donor, tiny_tokenizer, tmp_path):
    """Factory of donor folders."""

    def make(config=None, **save):
        donor = tiny_donor(config)
        donor.save_pretrained(tmp_path / "donor", **save)
        tiny_tokenizer.save_pretrained(tmp_path / "donor")
        return tmp_path / "donor", donor

    return make


def receipt(folder):
    return json.loads((folder / "engram_graft.json").read_text())


@torch.no_grad()
def same_logits(folder, donor):
    ids = torch.randint(3, 4000, (2, 9))
    return torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, donor(ids).logits)


@pytest.mark.parametrize("save", [{}, {"max_shard_size": 200_000}], ids=["one file", "several files"])
def test_llama_files_are_reused_as_they_are(donor_folder, save, tmp_path):
    folder, donor = donor_folder(**save)
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    out = graft(folder, tmp_path / "out", [1, 2], **FIELDS)
    assert receipt(out)["donor_files"] == "reused"
    again = graft(tmp_path, tmp_path / "again", [1, 2], subfolder="donor", **FIELDS)
    assert receipt(again)["subfolder"] == "donor" and "revision" not in receipt(again)
    assert {path.read_bytes() for path in out.glob("model-*.safetensors")} >= set(before.values())
    assert same_logits(out, donor)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    loaded.save_pretrained(out)
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before, "the donor was written"


def test_a_memory_whose_size_nobody_gave_is_small_the_same_by_both_ways_and_said_first(donor_folder, tmp_path, caplog):
    folder, _ = donor_folder()
    out = graft(folder, tmp_path / "out")
    said = caplog.messages[0]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    caplog.clear()
    model = EngramForCausalLM.from_backbone(str(folder), dtype=torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["engram_vocab_size"] == 1000
    assert receipt(out)["recipe"]["engram_vocab_size"] == 1000
    assert model.config.engram_hash_sha256 == loaded.config.engram_hash_sha256, "other addresses for another type"
    size = sum(part.nbytes for part in model.memory.tables.parameters())
    for line, place in ((said, "disk"), (caplog.messages[0], "memory")):
        assert f"{size:,} bytes of {place}" in line and "engram_vocab_size=1000, derived from the backbone's" in line


def test_a_table_that_nobody_asked_for_and_that_does_not_fit_is_refused(donor_folder, tmp_path, caplog):
    folder, _ = donor_folder()
    wide = {"engram_head_dim": 200_000_000}  # 13 terabytes with the least rows of a default
    refused = pytest.raises(
        ValueError, match=r"would take \d\d(,\d{3}){4} bytes.*are free.*Give engram_vocab_size=1000"
    )
    with refused:
        EngramForCausalLM.from_backbone(str(folder), **wide)
    with refused:
        graft(folder, tmp_path / "out", **wide)
    assert not caplog.messages and not (tmp_path / "out").exists()
    out = graft(folder, tmp_path / "out", engram_vocab_size=2_262_400)  # asked for: 12 GB of zeros
    assert "11,58" in caplog.messages[0] and "as given" in caplog.messages[0]
    weights = list(out.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) > 11e9 > 100 * sum(f.stat().st_blocks * 512 for f in weights)


def test_gpt2_without_its_prefix_is_rewritten(donor_folder, tmp_path):
    # As the published GPT-2 is: stock Transformers below a wrapper would silently load nothing of it.
    folder, donor = donor_folder(BACKBONES["gpt2"]())
    path = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    out = graft(folder, tmp_path / "out", [0, 1], **FIELDS)
    assert receipt(out)["donor_files"].startswith("rewritten")
    assert same_logits(out, donor)


def test_pickled_weights_are_rewritten_as_safetensors(donor_folder, tmp_path):
    folder, donor = donor_folder()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    out = graft(folder, tmp_path / "out", [1], **FIELDS)
    assert same_logits(out, donor)
    assert not list(out.glob("*.bin"))


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_donor_that_does_not_load_cleanly_is_refused(donor_folder, change, tmp_path):
    folder, _ = donor_folder()
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    else:
        tensors["model.layers.2.mlp.sideways_proj.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not load cleanly: 1 {change}.*model.layers.2.mlp"):
        graft(folder, tmp_path / "out", [1], **FIELDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donor"], "something half-made is left"


def test_a_twenty_gigabyte_table_takes_neither_disk_nor_memory(donor_folder, tmp_path):
    folder, donor = donor_folder()
    before = peak_memory()
    out = graft(folder, tmp_path / "out", [1], engram_vocab_size=20_000_000, engram_head_dim=64, engram_n_heads=2)
    shards = sorted(out.glob("engram-memory-*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    assert size > 20e9
    assert max(path.stat().st_size for path in shards) <= 8_000_010_000  # 8 GB and a header
    assert sum(path.stat().st_blocks * 512 for path in out.iterdir()) < 50e6
    assert peak_memory() - before < 500e6
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.engram_table_parts == 2
    ids = torch.randint(3, 4000, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, donor(ids).logits)


def peak_memory() -> int:
    """Anonymous memory of this process, bytes."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_half_precision_donors_stay_in_half_precision(donor_folder, tiny_donor, tmp_path):
    folder, donor = donor_folder()
    donor.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]  # as in many old configurations: it must not be taken from the float32 table
    (folder / "config.json").write_text(json.dumps(config))
    out = graft(folder, tmp_path / "out", [1], **FIELDS)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert loaded.memory.tables["1"].order2[0].dtype == torch.float32
    # `donor.to` also halved its rotary frequencies, which loading does not: the control is the donor through its files.
    assert same_logits(out, AutoModelForCausalLM.from_pretrained(folder))


def test_a_grafted_memory_is_the_same_every_time(donor_folder, tmp_path):
    folder, _ = donor_folder()
    files = [
        sorted(graft(folder, tmp_path / name, [2, 1], **FIELDS).glob("*.safetensors")) for name in ("first", "second")
    ]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_what_is_in_use_or_no_donor_is_refused(donor_folder, tmp_path):
    folder, _ = donor_folder()
    out = graft(folder, tmp_path / "out", [1], **FIELDS)
    with pytest.raises(FileExistsError, match="never overwrites"):
        graft(folder, out, [1], **FIELDS)
    with pytest.raises(ValueError, match="already has an Engram memory"):
        graft(out, tmp_path / "again", [1], **FIELDS)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        graft(tmp_path / "nowhere" / "at all", tmp_path / "again", [1], **FIELDS)
    with pytest.raises(ValueError, match=r"engram_layer_ids=\[1, 9\].*layers 0..3"):
        graft(folder, tmp_path / "again", [1, 9], **FIELDS)
    with pytest.raises(ValueError, match="revision='v2' is for donors on the Hub"):
        graft(folder, tmp_path / "again", [1], revision="v2", **FIELDS)
    with pytest.raises(FileNotFoundError, match=r"donor/inner' has no config.json"):
        graft(folder, tmp_path / "again", [1], subfolder="inner", **FIELDS)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text('{"model_type": "engram", "engram_version": "1.2.7"}')
    with pytest.raises(ValueError, match="engram-peft's adapter format"):
        graft(tmp_path / "adapter", tmp_path / "again", [1], **FIELDS)
    assert not (tmp_path / "again").exists()


def test_a_tokenizer_with_added_tokens_needs_a_resized_donor(donor_folder, tiny_tokenizer, tmp_path):
    folder, _ = donor_folder()
    tokenizer = type(tiny_tokenizer).from_pretrained(folder)
    tokenizer.add_tokens(["<brand new>"])
    tokenizer.save_pretrained(tmp_path / "longer")
    with pytest.raises(ValueError, match=r"ids up to 4104.*those up to 4103.*resize_token_embeddings\(4105\)"):
        graft(folder, tmp_path / "out", [1], tokenizer=tmp_path / "longer", **FIELDS)


def test_padded_vocabulary_rows_are_dead(tiny_donor, tiny_tokenizer, tmp_path):
    donor = tiny_donor(GPT2Config(vocab_size=4200, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    donor.save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    model = AutoModelForCausalLM.from_pretrained(graft(tmp_path / "donor", tmp_path / "out", [0], **FIELDS))
    assert (model.memory.hashing.token_map[4104:] == -1).all()
    model.check_tokenizer(tiny_tokenizer)


def test_copies_never_share_later_writes(tmp_path):
    (tmp_path / "source").write_bytes(os.urandom(100_000))
    copy_by_reference(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    with open(tmp_path / "copy", "r+b") as file:
        file.write(b"changed")
    assert not (tmp_path / "source").read_bytes().startswith(b"changed")
    assert (tmp_path / "copy").stat().st_ino != (tmp_path / "source").stat().st_ino


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
raise SystemExit("a donor's code was run")
"""


def test_a_donor_with_code_of_its_own_is_refused_before_its_code_runs(donor_folder, tiny_tokenizer, tmp_path):
    folder, donor = donor_folder()
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_llama", "auto_map": classes}))
    for trust in (True, False):
        with pytest.raises(ValueError, match="'own_llama'.*brings code of its own.*could not be loaded"):
            EngramForCausalLM.from_backbone(folder, trust_remote_code=trust, **FIELDS)
        with pytest.raises(ValueError, match="'own_llama'.*brings code of its own.*could not be loaded"):
            graft(folder, tmp_path / "graft", trust_remote_code=trust, **FIELDS)
    assert not (tmp_path / "graft").exists()
    donor.config.model_type = "own_llama"
    with pytest.raises(ValueError, match="brings code of its own"):
        EngramForCausalLM.from_backbone(donor, tiny_tokenizer, **FIELDS)
    # Control: a type that Transformers knows is loaded by its class, whatever code lies there.
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    model = EngramForCausalLM.from_backbone(folder, **FIELDS)
    assert type(model.backbone).__name__ == "LlamaForCausalLM"


def test_a_type_without_one_stack_of_layers_is_refused_with_default_layers_too(tiny_tokenizer):
    with pytest.raises(ValueError, match="the backbone blt has no hidden_size and no num_hidden_layers"):
        fresh_memory(BltConfig(vocab_size=4104), tiny_tokenizer, make=None)
