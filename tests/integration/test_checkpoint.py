"""Saving and loading: files of their own for the memory, whole or not there, and never a silently random memory.

Run: pytest tests/integration/test_checkpoint.py
"""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache, pipeline

from engram_transformers import EngramConfig, EngramForCausalLM, EngramFormatError
from engram_transformers.compat_engram import CACHE
from engram_transformers.files_atomic_engram import INDEX_NAME, MEMORY_STEM, WITHOUT_TABLES_NAME
from engram_transformers.files_safetensors_engram import read_header, total_size


pytestmark = pytest.mark.core


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@pytest.fixture
def saved(tiny_engram, tmp_path):
    """A trained model and its folder."""
    model = tiny_engram(trained=True)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def memory_files(folder):
    return sorted(path for path in folder.glob(f"{MEMORY_STEM}-*.safetensors"))


@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(saved, ids):
    model, folder = saved
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tied", [False, True])
def test_the_index_counts_the_bytes_of_the_files(tied, tiny_llama_config, tiny_donor, tiny_engram, tmp_path):
    tiny_llama_config.tie_word_embeddings = tied
    tiny_engram(donor=tiny_donor(tiny_llama_config)).save_pretrained(tmp_path)
    entries = [entry for path in tmp_path.glob("*.safetensors") for entry in read_header(path).values()]
    assert total_size(tmp_path) == sum(entry.end - entry.begin for entry in entries)


def test_memory_shards_hold_tables_and_nothing_else(saved):
    _, folder = saved
    index = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    in_shards = {name for name, file in index.items() if file.startswith(MEMORY_STEM)}
    assert in_shards == {name for name in index if name.startswith("memory.tables.")}
    assert "memory.tables.1.order2.0" in in_shards
    rest = json.loads((folder / WITHOUT_TABLES_NAME).read_text())["weight_map"]
    assert rest == {name: file for name, file in index.items() if name not in in_shards}
    assert not (folder / "model.safetensors").exists(), "it would be read instead of the index"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_keep_their_own_type_whatever_dtype_says(saved, dtype):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.memory.layers["1"].key_value.weight.dtype == dtype
    assert loaded.backbone.lm_head.weight.dtype == dtype
    table = loaded.memory.tables["1"].order2[0]
    assert table.dtype == torch.float32
    assert torch.equal(table, model.memory.tables["1"].order2[0])


def test_tables_are_mapped_and_not_copied(saved):
    _, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    address = loaded.memory.tables["1"].order3[0].data_ptr()
    with open(f"/proc/{os.getpid()}/maps", encoding="utf-8") as maps:
        mapped = [line.split() for line in maps if MEMORY_STEM in line]
    assert mapped, "the memory shard is not mapped at all"
    ranges = [tuple(int(part, 16) for part in fields[0].split("-")) for fields in mapped]
    assert any(first <= address < last for first, last in ranges)


@torch.no_grad()
def test_training_a_mapped_table_leaves_the_file_alone(saved):
    model, folder = saved
    before = memory_files(folder)[0].read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.memory.tables["1"].order2[0].add_(1.0)
    assert memory_files(folder)[0].read_bytes() == before
    loaded.save_pretrained(folder)  # over the files that it is mapped from
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.memory.tables["1"].order2[0], model.memory.tables["1"].order2[0] + 1.0)


@torch.no_grad()
def test_small_shards_hold_the_same_and_stale_ones_go(saved, ids):
    model, folder = saved
    model.save_pretrained(folder, max_memory_shard_size=10_000, max_shard_size=100_000)
    many = memory_files(folder)
    assert len(many) > 1
    assert all(path.stat().st_size < 12_000 for path in many)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)
    (folder / "model.safetensors").write_bytes(b"left over by another tool")
    model.save_pretrained(folder)
    assert len(memory_files(folder)) == 1
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "engram-memory-00001-of-00001.safetensors",
        "model-00001-of-00001.safetensors",
    ]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)


def test_a_table_larger_than_a_file_may_be_is_refused(saved):
    model, folder = saved
    with pytest.raises(ValueError, match="max_memory_shard_size=1,000"):
        model.save_pretrained(folder, max_memory_shard_size=1000)
    assert AutoModelForCausalLM.from_pretrained(folder) is not None, "the older checkpoint must stay whole"


@torch.no_grad()
def test_an_interrupted_save_leaves_the_old_checkpoint(saved, ids, monkeypatch, tiny_engram):
    model, folder = saved
    import engram_transformers.files_checkpoint_engram as checkpoint

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_shards", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_engram(trained=True, seed=1).save_pretrained(folder)
    assert not list(folder.glob(".saving-*"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)


def damage_missing(folder):
    memory_files(folder)[0].unlink()


def damage_truncated(folder):
    path = memory_files(folder)[0]
    os.truncate(path, path.stat().st_size - 100)


def damage_truncated_model(folder):
    path = next(folder.glob("model-*.safetensors"))
    os.truncate(path, path.stat().st_size // 2)


def damage_seed(folder):
    config = json.loads((folder / "config.json").read_text())
    config["engram_vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))


def damage_index(folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["weight_map"]["memory.tables.1.order2.0"]
    (folder / INDEX_NAME).write_text(json.dumps(index))


def damage_path(folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["memory.tables.1.order2.0"] = "../elsewhere.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))


def damage_digest(folder):
    config = json.loads((folder / "config.json").read_text())
    config["engram_hash_sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


def damage_map_digest(folder):
    config = json.loads((folder / "config.json").read_text())
    config["engram_token_map_sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


def damage_dense(folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["weight_map"]["memory.layers.1.key_norm"]
    path = next(folder.glob("model-*.safetensors"))
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if name != "memory.layers.1.key_norm"}  # noqa: SIM118
    from safetensors.torch import save_file

    save_file(kept, path, metadata={"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (damage_missing, FileNotFoundError, "engram-memory-00001-of-00001.safetensors' is missing.*again"),
        (damage_truncated, EngramFormatError, "engram-memory-00001-of-00001.safetensors.*truncated.*again"),
        (damage_truncated_model, EngramFormatError, "model-00001-of-00001.safetensors.*truncated"),
        (damage_seed, EngramFormatError, "engram-memory-00001.*order2.0.*config.json needs.*other sizes"),
        (damage_index, EngramFormatError, "does not name 'memory.tables.1.order2.0'.*never filled"),
        (damage_path, EngramFormatError, r"'\.\./elsewhere.safetensors'.*plain .safetensors file names"),
        (damage_digest, EngramFormatError, "hash constants have SHA-256.*belong to another checkpoint"),
        (damage_map_digest, EngramFormatError, "token map has SHA-256.*belongs to another checkpoint"),
        (damage_dense, EngramFormatError, "has no or not the whole memory.*key_norm.*never filled"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_what_to_do(saved, damage, error, says):
    _, folder = saved
    damage(folder)
    with pytest.raises(error, match=says):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_donors_folder_is_not_read_as_a_graft(tiny_donor, tmp_path):
    from engram_transformers import EngramConfig, EngramForCausalLM

    donor = tiny_donor()
    donor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="engram graft DONOR OUT"):
        EngramForCausalLM.from_pretrained(tmp_path)
    with pytest.raises((EngramFormatError, FileNotFoundError), match="engram graft DONOR OUT|left over"):
        EngramForCausalLM.from_pretrained(
            tmp_path, config=EngramConfig(text_config=donor.config, engram_layer_ids=[1], engram_vocab_size=100)
        )


def test_saving_from_a_worker_process_writes_nothing(tiny_engram, tmp_path):
    tiny_engram().save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()


def test_pipeline_reads_a_saved_folder(saved, tiny_tokenizer):
    model, folder = saved
    tiny_tokenizer.save_pretrained(folder)
    text = pipeline("text-generation", str(folder))("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    inputs = tiny_tokenizer("the cat", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert text == tiny_tokenizer.decode(expected[0], skip_special_tokens=True)


def test_check_tokenizer_names_the_first_ids_that_differ(tiny_engram, tiny_tokenizer, tmp_path):
    model = tiny_engram()
    model.check_tokenizer(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path)
    other = type(tiny_tokenizer).from_pretrained(tmp_path)
    other.add_tokens(["<brand new>"])
    with pytest.raises(ValueError, match="4105 ids.*1 place.*4104 .'<brand new>'"):
        model.check_tokenizer(other)


@torch.no_grad()
def test_resized_vocabulary_keeps_old_addresses_and_survives_a_save(tiny_engram, ids, tmp_path):
    model = tiny_engram(trained=True)
    before = model.memory.hashing.rows(ids, 1)
    model.resize_token_embeddings(4110)
    assert torch.equal(model.memory.hashing.rows(ids, 1), before)
    added = model.memory.hashing.token_map[4104:]
    assert len(set(added.tolist())) == 6
    assert int(added.min()) >= model.config.engram_compressed_vocab_size
    model.save_pretrained(tmp_path / "resized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    text = torch.tensor([[5, 4109, 4105, 7]])
    assert torch.equal(loaded(text).logits, model(text).logits)
    assert torch.equal(loaded(text, labels=text).loss, model(text, labels=text).loss)
    with pytest.raises(ValueError, match="cannot shrink"):
        model.resize_token_embeddings(4000)


@torch.no_grad()
def test_state_dict_argument_is_what_is_saved(saved, ids, tmp_path):
    model, _ = saved
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if name.startswith("memory.tables."):
            state[name].zero_()
    model.save_pretrained(tmp_path / "zeroed", state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "zeroed")
    with model.disable_memory():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    sparse = memory_files(tmp_path / "zeroed")[0].stat()
    assert sparse.st_blocks * 512 <= sparse.st_size


def test_a_cache_of_the_backbone_alone_is_refused(tiny_engram, ids):
    model = tiny_engram(trained=True)
    cache = DynamicCache(config=model.config.text_config)
    model.backbone(ids, **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match="15 tokens that were read without the memory"):
        model(ids, **{CACHE: cache})


def test_copying_the_folder_copies_the_model(saved, ids, tmp_path):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_made_without_storage_gets_its_hash_constants_or_an_error(tiny_llama_config, tiny_engram):
    config = EngramConfig(text_config=tiny_llama_config, engram_layer_ids=[1], engram_vocab_size=200)
    wanted, graft = EngramForCausalLM(config), tiny_engram().config
    with torch.device("meta"):
        made, grafted = EngramForCausalLM(config), EngramForCausalLM(graft)
    made.to_empty(device="cpu").init_weights()
    for name, tensor in wanted.memory.hashing.state_dict().items():
        assert torch.equal(made.memory.hashing.state_dict()[name], tensor), name
    with pytest.raises(EngramFormatError):  # its token map is in the checkpoint only
        grafted.to_empty(device="cpu").init_weights()
