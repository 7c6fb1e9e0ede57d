"""Every example runs through its command line on a tiny model, and what it prints is what it left behind.

Folders that are loaded again are compared bit by bit; losses only by direction, with the donor as the control.
Run: pytest tests/integration/test_examples.py
"""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramForCausalLM


EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("__init__", "texts"))
MOST_LINES = 90

WORDS = ["sea", "ship", "town", "siege", "river", "king", "stone", "road"]
NEW = [f"{one} of {two}: the {one} that the {two} has taken from the {three}" for one, two, three in zip(
    WORDS, WORDS[3:] + WORDS[:3], WORDS[5:] + WORDS[:5], strict=True
)]  # fmt: skip
GENERAL = [f"In {number} people live near {number + 7} lakes and under {number + 9} roofs" for number in range(10, 90)]


@pytest.fixture
def donor(tiny_donor, tiny_tokenizer, tmp_path) -> Path:
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


@pytest.fixture
def new(tmp_path) -> Path:
    path = tmp_path / "new.txt"
    path.write_text("\n".join(NEW * 20) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`run(name, *arguments)`: what the example prints."""

    def run(name: str, *arguments) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    return run


def numbers(pattern: str, printed: str) -> list[float]:
    """The groups of the first match."""
    found = re.search(pattern, printed)
    assert found, printed
    return [float(group.replace(",", "")) for group in found.groups()]


def test_finetune_trainer_teaches_saves_and_answers(run, donor, new, tmp_path):
    out = tmp_path / "out"
    settings = ("--text", new, "--rows", 200, "--length", 16, "--max-steps", 12, "--lr", 0.02)
    printed = run("finetune_trainer", "--model", donor, "--out", out, *settings)
    first, last = numbers(r"loss of the first steps ([\d.]+), of the last ([\d.]+)", printed)
    assert last < first - 0.5
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert isinstance(model, EngramForCausalLM)
    plain = AutoModelForCausalLM.from_pretrained(donor).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.backbone.state_dict().items())
    inputs = tokenizer(" ".join(NEW[0].split()[:3]), return_tensors="pt")
    completed = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    before, after = re.search(r"before: (.*)\nafter: +(.*)", printed, re.DOTALL).groups()
    assert tokenizer.decode(completed, skip_special_tokens=True).strip() in after
    assert before != after.split("\nsaved in")[0]


def test_finetune_trainer_goes_on_with_a_model_that_has_a_memory(run, donor, new, tmp_path):
    settings = ("--text", new, "--rows", 200, "--length", 16, "--max-steps", 2)
    run("finetune_trainer", "--model", donor, "--out", tmp_path / "once", *settings)
    run("finetune_trainer", "--model", tmp_path / "once", "--out", tmp_path / "twice", *settings)
    once, twice = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("once", "twice"))
    tables = [name for name in once if name.startswith("memory.tables.")]
    assert tables and once.keys() == twice.keys()
    assert all(not torch.equal(once[name], twice[name]) for name in tables)


def test_pretrain_from_scratch_trains_both_models_and_saves_the_one_with_a_memory(run, donor, new, tmp_path):
    out = tmp_path / "out"
    settings = ("--tokenizer", donor, "--text", new, "--rows", 200, "--hidden", 16, "--length", 8, "--max-steps", 4)
    printed = run("pretrain_from_scratch", "--out", out, *settings)
    (plain,), (memory,) = (numbers(rf"{kind} memory: ([\d.]+) nats", printed) for kind in ("without", "with"))
    assert plain != memory and max(plain, memory) < 9  # log(4104) is 8.32
    written, rows = numbers(r"([\d,]+) of ([\d,]+) rows written", printed)
    model = AutoModelForCausalLM.from_pretrained(out)
    tables = list(model.memory.tables.parameters())
    assert (written, rows) == (sum(int(t.any(dim=1).sum()) for t in tables), sum(map(len, tables)))
    assert 0 < written < rows
    assert model.config.engram_trainable == "all"
    assert all(bool(layer.conv.any()) for layer in model.memory.layers.values()), "the convolution learns"


def test_continual_learns_new_text_and_keeps_the_general_one_bit_for_bit(run, donor, new, tmp_path):
    general = tmp_path / "general.txt"
    general.write_text("\n".join(GENERAL) + "\n", encoding="utf-8")
    settings = ("--general", general, "--new", new, "--rows", 2000, "--length", 16, "--max-steps", 8)
    printed = run("continual", "--model", donor, *settings)
    ways = ("at first", "knows the general text", "free", "tables alone", "selected rows", "rows and l2_sp")
    found = {way: numbers(rf"\n{way} +([\d.]+) +([\d.]+) +([\d.]+)", printed) for way in ways}
    known = found["knows the general text"]
    assert known[0] < found["at first"][0] - 0.5
    for way in ("selected rows", "rows and l2_sp"):
        assert found[way][0] == known[0], "no row that it reads has changed"
        assert found[way][2] < known[2] - 0.1
    assert found["free"][0] != known[0] and found["free"][2] < known[2] - 0.1, "the control"
    assert found["rows and l2_sp"][2] > found["selected rows"][2], "the l2_sp costs something"
    chosen, read = numbers(r"([\d,]+) of the ([\d,]+) rows that the new texts read may change", printed)
    assert 0 < chosen < read


def test_finetune_trl_trains_adapter_and_memory_and_loads_both(run, donor, new, tmp_path):
    pytest.importorskip("trl", reason="TRL is an extra: pip install engram-transformers[trl]")
    settings = ("--model", donor, "--text", new, "--rows", 200, "--max-steps", 2)
    printed = run("finetune_trl", "--out", tmp_path / "out", *settings)
    assert "the same when loaded again: True" in printed
    assert {path.name for path in (tmp_path / "out" / "adapter").glob("*.safetensors")} == {
        "adapter_model.safetensors",
        "memory_delta.safetensors",
    }
    assert all(
        f"{path.name} ({path.stat().st_size:,} bytes)" in printed for path in tmp_path.glob("out/adapter/*.saf*")
    )
    run("finetune_trl", "--out", tmp_path / "out", *settings)  # the graft is there already


def test_packs_per_user_reads_a_pack_for_each_row(run, donor, tmp_path):
    """Answers are for the real model: random weights learn none."""
    printed = run(
        "packs_per_user", "--model", donor, "--out", tmp_path / "o", "--users", 5, "--adapters", 3, "--passes", 1
    )
    found = json.loads(printed.splitlines()[-1])
    assert len(list((tmp_path / "o").glob("user*.engram-pack.safetensors"))) == 5
    assert found["bytes a pack"] > 0 and found["with packs"] > 0 and found["with adapters"] > 0


# What a reader may expect of each.


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_what_it_shows_and_how_to_run_it(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) < MOST_LINES
    assert "\nShows" in docstring and re.search(rf"\nRun: .*python -m examples\.{name}\b", docstring)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_uses_public_names_alone(name):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    ours = [(node.module, alias.name) for node in imports for alias in node.names if "engram" in node.module]
    assert ours
    for module, imported in ours:
        public = __import__(module, fromlist=["__all__"]).__all__
        assert imported in public, f"{module}.{imported}"
    assert not re.search(r"\._[a-z]", (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))


def test_texts_are_read_from_lines_and_from_zipped_json(run, tmp_path):
    texts = runpy.run_path(str(EXAMPLES / "texts.py"))
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert texts["read_texts"](tmp_path / "a.txt") == ["one", "two"]
    assert len(texts["read_texts"](texts["WORDNET"])) == 7730 and len(texts["read_texts"](texts["FACTBOOK"])) == 260


def test_windows_are_whole_and_too_little_text_is_refused(tiny_tokenizer):
    windows = runpy.run_path(str(EXAMPLES / "texts.py"))["windows"]
    cut = windows(tiny_tokenizer, ["the sea", "a ship"], 3)
    ids = [token for text in ("the sea\n\n", "a ship\n\n") for token in tiny_tokenizer(text)["input_ids"]]
    assert cut == [{"input_ids": ids[i : i + 3], "labels": ids[i : i + 3]} for i in range(0, len(ids) - 2, 3)]
    with pytest.raises(ValueError, match=f"the texts have {len(ids)} tokens, fewer than one window of 500"):
        windows(tiny_tokenizer, ["the sea", "a ship"], 500)
