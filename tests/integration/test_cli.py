"""The `engram` command, in process: results on stdout, errors without traceback, exit codes that scripts can use.

Run: pytest tests/integration/test_cli.py
"""

import os
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engram_transformers.configuration import PRESETS
from engram_transformers.conversion.cli import app

from .composites import composite_donor, needs_whole_composites


SIZES = ["--vocab-size", "200", "--n-heads", "2", "--head-dim", "4"]


@pytest.fixture
def donor(tiny_donor, tiny_tokenizer, tmp_path):
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    return str(tmp_path / "donor")


def engram(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_graft_then_verify(donor, tmp_path):
    done = engram(
        "graft", donor, tmp_path / "out", "--layer-ids", "1,2", *SIZES, "--max-ngram-size", "4", "--kernel-size", "0"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.engram_layer_ids == [1, 2]
    assert config.engram_max_ngram_size == 4
    assert config.engram_kernel_size == 0
    done = engram("verify", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("│ ok") == 4


def test_rows_for_each_order(donor, tmp_path):
    assert (
        engram(
            "graft", donor, tmp_path / "out", "--vocab-size", "100,300", "--n-heads", "1", "--head-dim", "4"
        ).exit_code
        == 0
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.engram_vocab_size == [100, 300]
    assert len(model.memory.tables["1"].order2[0]) < 200 <= 300 <= len(model.memory.tables["1"].order3[0])


def test_a_preset_gives_the_papers_sizes_and_options_go_before_it(donor, tmp_path):
    done = engram("graft", donor, tmp_path / "out", "--preset", "engram-27b", "--vocab-size", "200", "--n-heads", "2")
    assert done.exit_code == 0, done.output
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    sizes = {name: getattr(config, name) for name in PRESETS["engram-27b"]}
    assert sizes == {**PRESETS["engram-27b"], "engram_vocab_size": 200, "engram_n_heads": 2}


@needs_whole_composites
def test_a_composite_model_is_grafted_whole_or_its_text_model_alone(tmp_path, tiny_tokenizer):
    composite_donor("mistral3").save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    for option, whole in (("--whole", True), ("--text-only", False)):
        done = engram("graft", tmp_path / "donor", tmp_path / option, "--layer-ids", "1", *SIZES, option)
        assert done.exit_code == 0, done.output
        config = AutoModelForCausalLM.from_pretrained(tmp_path / option).config
        assert (config.composite_config is not None) == whole
        done = engram("verify", "--no-generation", tmp_path / option)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layer-ids", "1,two"], "--layer-ids '1,two' must be integers"),
        (["--layer-ids", "1,7"], "layers 0..3"),
        (["--vocab-size", "100,200,300"], "has 3 entries"),
        (["--preset", "engram-7b"], "no preset 'engram-7b': choose from engram-27b, engram-40b"),
        (["--head-dim", "0"], "engram_head_dim=0 is too small"),
        (["--max-memory-shard-size", "much"], "'much' must be a positive number of bytes"),
        (["--table-dtype", "float8"], "float8"),
    ],
)
def test_users_mistakes_exit_with_2_and_leave_nothing(donor, tmp_path, options, says):
    done = engram("graft", donor, tmp_path / "out", *options)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert sorted(os.listdir(tmp_path)) == ["donor"]


def test_verify_exits_with_1_and_names_what_is_wrong(donor, tmp_path, tiny_tokenizer):
    assert engram("graft", donor, tmp_path / "out", *SIZES).exit_code == 0
    other = type(tiny_tokenizer).from_pretrained(donor)
    other.add_tokens(["<brand new>"])
    other.save_pretrained(tmp_path / "longer")
    done = engram("verify", tmp_path / "out", "--tokenizer", tmp_path / "longer")
    assert done.exit_code == 1
    assert "4104 ('<brand new>')" in " ".join(done.output.replace("│", " ").split())
    shard = tmp_path / "out" / "engram-memory-00001-of-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    done = engram("verify", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stdout.count("│ wrong") == 2, "the files, and the model that is made from them"


def test_verify_tells_lawful_constants_from_derived_ones(donor, tmp_path):
    assert engram("graft", donor, tmp_path / "out", *SIZES).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.memory.hashing.multipliers += 2
    model.config.engram_hash_sha256 = model.memory.hashing.constants.sha256()
    model.save_pretrained(tmp_path / "changed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")  # the stored ones are used
    assert torch.equal(loaded.memory.hashing.multipliers, model.memory.hashing.multipliers)
    done = engram("verify", tmp_path / "changed")
    assert done.exit_code == 1
    assert "stored multipliers are lawful but not the ones" in " ".join(done.output.replace("│", " ").split())


def test_verify_of_no_checkpoint_exits_with_2(donor, tmp_path):
    assert "engram graft DONOR OUT" in " ".join(engram("verify", donor).output.split())
    done = engram("verify", tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "has no config.json" in " ".join(done.output.split())


def test_serving_without_its_packages_says_what_to_install(monkeypatch, tmp_path):
    server = "engram_transformers.serving.openai_server"
    monkeypatch.delitem(sys.modules, server, raising=False)
    monkeypatch.delattr(server, raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)  # as if it were not installed
    done = engram("serve", tmp_path)
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert 'pip install "engram-transformers[serve]"' in " ".join(done.output.split())
