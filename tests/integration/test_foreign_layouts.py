"""Memories of other projects: imported and exported byte for byte, and refused before anything is written.

Run: pytest tests/integration/test_foreign_layouts.py
"""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen4ExpConfig
from typer.testing import CliRunner

from engram_transformers import EngramForCausalLM
from engram_transformers.configuration import EngramFormatError
from engram_transformers.conversion import export_memory, foreign_rows, graft, import_memory
from engram_transformers.conversion.cli import app

from ..tiny import engram_on, fill_memory
from .backbones import HEADS, deepseek_v4
from .foreign_memories import demo_backbone, demo_folder, qwen_model, raw, save_backbone, v41_folder


DEMO, QWEN, V41 = "B_bigram_1head", "qwen-ple", "deepseek-v4.1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources and backbones by layout; tests only read them."""
    folder = tmp_path_factory.mktemp("foreign")
    qwen_model().save_pretrained(folder / "qwen")
    return {
        "january-demo": (demo_folder(DEMO, folder / "demo"), save_backbone(demo_backbone(DEMO), folder / "llama")),
        QWEN: (folder / "qwen", save_backbone(deepseek_v4(), folder / "deepseek")),
        V41: (v41_folder(folder / "v41"), folder / "deepseek"),
    }


@pytest.fixture(scope="module")
def grafts(folders, tmp_path_factory):
    """The imported memories by layout; tests only read them."""
    out = tmp_path_factory.mktemp("grafts")
    return {layout: import_memory(layout, *pair, out / layout) for layout, pair in folders.items()}


@pytest.fixture
def source(request, folders, tmp_path):
    """Layout, a copy of the source to do harm to, and the backbone."""
    layout = getattr(request, "param", "january-demo")
    shutil.copytree(folders[layout][0], tmp_path / "source")
    return layout, tmp_path / "source", folders[layout][1]


def changed(folder, change):
    """Saves the tensors of a folder's file again, with a change."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(source, tmp_path, error, match):
    layout, folder, backbone = source
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        import_memory(layout, folder, backbone, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("layout", ["january-demo", QWEN, V41])
def test_an_export_has_the_bytes_that_were_imported(layout, folders, grafts, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_rows, "BLOCK_BYTES", 1000)  # many blocks, cut elsewhere than parts and shards
    exported = export_memory(layout, grafts[layout], tmp_path / "exported")
    expected = raw(folders[layout][0], ".ple.", ".engram.")
    assert raw(exported, "") == expected
    again = import_memory(layout, exported, folders[layout][1], tmp_path / "again", max_memory_shard_size="3KB")
    assert len(list(again.glob("engram-memory-*"))) > 2
    assert raw(export_memory(layout, again, tmp_path / "twice"), "") == expected
    assert (tmp_path / "twice" / "config.json").read_text() == (exported / "config.json").read_text()


def test_rows_that_no_head_reads_are_kept_for_an_export(folders, grafts, tmp_path):
    shutil.copytree(grafts[QWEN], tmp_path / "graft")
    (tmp_path / "graft" / "engram_foreign.safetensors").unlink()
    exported, expected = raw(export_memory(QWEN, tmp_path / "graft", tmp_path / "out"), ""), raw(folders[QWEN][0], "")
    different = {name for name, tensor in exported.items() if tensor != expected[name]}
    last = "ple.ple_embedding.ngram_embedding.shard_3.weight"
    assert different == {f"model.layers.0.{last}", f"model.layers.2.{last}"}
    read = (420 - 3 * 112) * 8 * 4  # bytes of the rows that heads read: 420 of 448, in 4 shards, of 8 float32
    exported, expected = exported[f"model.layers.0.{last}"][2], expected[f"model.layers.0.{last}"][2]
    assert exported[:read] == expected[:read]
    assert not any(exported[read:]) and any(expected[read:])


def test_a_memory_that_was_trained_here_is_exported_and_comes_back(folders, grafts, tmp_path):
    model = fill_memory(EngramForCausalLM.from_pretrained(grafts[QWEN], engram_placement="device"))
    model.save_pretrained(tmp_path / "trained")
    exported = export_memory(QWEN, tmp_path / "trained", tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["split_ngram_parts"] == 1
    again = import_memory(QWEN, exported, folders[QWEN][1], tmp_path / "again")
    ids = torch.tensor([[20, 30, 40, 1, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(EngramForCausalLM.from_pretrained(again)(ids).logits, model(ids).logits)


def test_half_precision_stays_as_it_is(source, tmp_path):
    def halve(tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.bfloat16() if "embedding" in name else tensor.half()

    layout, folder, backbone = source
    changed(folder, halve)
    made = import_memory(layout, folder, backbone, tmp_path / "graft")
    assert EngramForCausalLM.from_pretrained(made).config.engram_table_dtype == "bfloat16"
    assert raw(export_memory(layout, made, tmp_path / "out"), "") == raw(folder, "")


def test_the_configuration_of_a_whole_qwen4_is_read(folders, tmp_path):
    folder, backbone = folders[QWEN]
    shutil.copytree(folder, tmp_path / "whole")
    text = json.loads((folder / "config.json").read_text())
    whole = Qwen4ExpConfig(text_config=text, image_token_id=5, vision_start_token_id=6, vision_end_token_id=7)
    whole.save_pretrained(tmp_path / "whole")
    made = import_memory(QWEN, tmp_path / "whole", backbone, tmp_path / "out")
    assert EngramForCausalLM.from_pretrained(made).config.engram_seed == text["seed"]


VALUE, OFFSETS = "layers.0.engram.value_proj.weight", "layers.0.engram.multi_head_embedding.offsets"
MULTIPLIERS = "model.layers.2.ple.ple_embedding.layer_multipliers"
HARM = {
    "a missing tensor": (lambda t: t.pop(VALUE), "'layers.0.engram.value_proj.weight' is missing"),
    "an unknown name": (lambda t: t.update({"layers.0.engram.gate": torch.ones(1)}), "engram.gate' is unknown"),
    "another shape": (lambda t: t.update({VALUE: t[VALUE][:, :4].clone()}), r"shape \[16, 4\].*\[16, 8\]"),
    "another type": (lambda t: t.update({VALUE: t[VALUE].double()}), "is of type F64"),
    "several types": (lambda t: t.update({VALUE: t[VALUE].half()}), "several types"),
    "a further layer": (lambda t: t.update({"layers.3.engram.gate": torch.ones(1)}), r"layers \[0, 3\].*names \[0\]"),
    "other offsets": (lambda t: t[OFFSETS].add_(1), r"offsets' begins with \[1\].*\[0\]: rows would be read at wrong"),
    "no memory": (lambda t: [t.pop(name) for name in list(t)] and t.update(a=torch.ones(1)), "no tensor of a memory"),
    "two prefixes": (lambda t: t.update({f"model.{VALUE}": t.pop(VALUE)}), r"tensors below \['', 'model.'\]"),
}


@pytest.mark.parametrize("harm", HARM)
def test_wrong_tensors_are_refused(harm, source, tmp_path):
    change, match = HARM[harm]
    changed(source[1], change)
    refused(source, tmp_path, EngramFormatError, match)


@pytest.mark.parametrize("source", [QWEN], indirect=True)
def test_a_missing_layer_and_other_multipliers_are_refused(source, tmp_path):
    changed(source[1], lambda t: t[MULTIPLIERS].add_(2))
    refused(source, tmp_path, EngramFormatError, "layers.2.ple.ple_embedding.layer_multipliers' begins with")
    changed(source[1], lambda t: [t.pop(name) for name in list(t) if "layers.2.ple" in name])
    refused(source, tmp_path, EngramFormatError, r"memory in the layers \[0\], config.json names \[0, 2\]")


def test_a_truncated_file_and_one_that_is_there_twice_are_refused(source, tmp_path):
    (path,) = source[1].glob("*.safetensors")
    shutil.copy(path, source[1] / "more.safetensors")
    refused(source, tmp_path, EngramFormatError, "both hold")
    (source[1] / "more.safetensors").write_bytes(path.read_bytes()[:-1])
    refused(source, tmp_path, EngramFormatError, "truncated")


CONFIGURATIONS = {
    "seed": (7.5, "engram_seed"),
    "n_head_per_ngram": (0, "engram_n_heads=0"),
    "kernel_size": (None, "config.json lacks kernel_size"),
    "hidden_size": (24, "needs a backbone with hidden_size=24"),
    "hc_mult": (4, "engram_hc_mult=4"),
    "engram_vocab_size": ([263], r"shape \[257, 8\].*\[263, 8\]"),
    "layer_ids": ([5], "engram_layer_ids"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_wrong_configurations_are_refused(name, source, tmp_path):
    value, match = CONFIGURATIONS[name]
    path = source[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(source, tmp_path, (ValueError, StrictDataclassError), match)


def test_folders_without_configuration_or_weights_are_refused(source, tmp_path):
    (source[1] / "config.json").rename(tmp_path / "config.json")
    refused(source, tmp_path, FileNotFoundError, "config.json")
    (source[1] / "config.json").write_text("{")
    refused(source, tmp_path, EngramFormatError, "not JSON")
    shutil.copy(tmp_path / "config.json", source[1] / "config.json")
    (source[1] / "model.safetensors").unlink()
    refused(source, tmp_path, FileNotFoundError, "pickle")


@pytest.mark.parametrize("source", [QWEN], indirect=True)
def test_a_backbone_of_another_vocabulary_is_refused(source, tmp_path):
    layout, folder, _ = source
    other = save_backbone(LlamaConfig(**HEADS | {"vocab_size": 4105}), tmp_path / "other")
    refused((layout, folder, other), tmp_path, ValueError, "engram_hc_mult=4")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 4103}
    (folder / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path, ValueError, "vocab_size=4103, and .* has 4104")


def test_engram_peft_is_recognised_and_refused(source, tmp_path):
    layout, folder, backbone = source
    refused(("engram-peft", folder, backbone), tmp_path, ValueError, "hashes other tokens.*engram graft")
    (folder / "config.json").write_text(json.dumps({"model_type": "engram", "engram_version": "1.2"}))
    refused(source, tmp_path, ValueError, "folder of engram-peft.*another address")


@pytest.mark.parametrize("layout", ["january-demo", QWEN, V41])
def test_a_memory_with_settings_that_a_layout_lacks_is_not_exported(layout, tmp_path):
    engram_on(LlamaConfig(**HEADS), engram_gate="sigmoid").save_pretrained(tmp_path / "graft")
    with pytest.raises(ValueError, match=r"layout .* has engram_\w+="):
        export_memory(layout, tmp_path / "graft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_graft_is_not_exported(grafts, tmp_path):
    shutil.copytree(grafts[QWEN], tmp_path / "graft")
    index = tmp_path / "graft" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    for name in ("memory.layers.2.conv", "memory.tables.2.order3.0"):
        left = {own: file for own, file in told["weight_map"].items() if own != name}
        index.write_text(json.dumps(told | {"weight_map": left}))
        with pytest.raises(EngramFormatError, match=name):
            export_memory(QWEN, tmp_path / "graft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_in_use_is_kept(folders, grafts, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for action in (
        lambda: import_memory(QWEN, *folders[QWEN], tmp_path),
        lambda: export_memory(QWEN, grafts[QWEN], tmp_path),
    ):
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            action()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_commands(folders, grafts, tmp_path):
    def engram(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    done = engram("import", "january-demo", *folders["january-demo"], tmp_path / "graft")
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == str(tmp_path / "graft")
    done = engram("export", "january-demo", tmp_path / "graft", tmp_path / "out")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "out")
    assert raw(tmp_path / "out", "") == raw(folders["january-demo"][0], "")
    for wrong in (("import", "demo", *folders[QWEN], tmp_path / "new"), ("export", "demo", tmp_path, tmp_path / "new")):
        done = engram(*wrong)
        assert done.exit_code == 2 and "'demo' is unknown: known are january-demo" in " ".join(done.output.split())
    for verb in ("import", "export"):
        assert f"For example: engram {verb}" in " ".join(engram(verb, "--help").output.split())


def test_a_graft_of_ours_is_not_taken_for_a_foreign_one(folders, grafts, tmp_path):
    graft(folders[QWEN][1], tmp_path / "fresh", [0], engram_vocab_size=100, engram_n_heads=1, engram_head_dim=4)
    refused(
        ("january-demo", tmp_path / "fresh", folders[QWEN][1]), tmp_path, EngramFormatError, "no tensor of a memory"
    )
