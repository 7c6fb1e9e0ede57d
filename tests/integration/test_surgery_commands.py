"""`engram resize`, `prune`, `merge`, `extract`, `strip`, and a transplant: results, reports, and errors of users.

Run: pytest tests/integration/test_surgery_commands.py
"""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engram_transformers.conversion import graft
from engram_transformers.conversion.cli import app
from engram_transformers.conversion.surgery_commands import VERBS
from engram_transformers.knowledge_pack_engram import KnowledgePack


FIELDS = {"engram_vocab_size": 211, "engram_n_heads": 2, "engram_head_dim": 4}


@pytest.fixture
def places(donor, fill_memory, tmp_path, monkeypatch):
    """Moves into a folder with a donor, two memories of one graft ("a", "b") and a text."""
    base = fill_memory(AutoModelForCausalLM.from_pretrained(graft(donor, tmp_path / "a", [1, 2], **FIELDS)))
    base.save_pretrained(tmp_path / "a")
    graft(donor, tmp_path / "b", init_from=tmp_path / "a", init_reader=True)
    (tmp_path / "text").write_text("ships of many nations")
    monkeypatch.chdir(tmp_path)


def engram(line: str):
    return CliRunner().invoke(app, line.split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("resize a out --vocab-size 300,500 --text text", r"of [\d,]+ rows have a value"),
        ("resize a out --n-heads 1 --text text", "n-grams were found"),
        ("prune a out --min-norm inf", "rows became zero, 0 were"),
        ("prune a out --untouched", "0 of .* rows became zero"),
        ("merge a b out --how average --weights 1,3", "rows are used, .* mean cosine of 1.00"),
        ("merge a b out --how task --base a", "0 by several memories"),
        ("extract a out", ""),
        ("extract a out.engram-pack.safetensors --text text", r"\d+ records, [\d,]+ bytes"),
        ("strip a out", ""),
        ("graft donor out --init-from a --init-reader", "weight files"),
        ("graft donor out --init-from a --vocab-size 500 --init-text text", "weight files"),
    ],
)
def test_a_verb_prints_the_new_place_and_says_what_was_done_on_stderr(places, line, said):
    done = engram(line)
    assert done.exit_code == 0, done.output
    out = re.search(r"out\S*", line)[0]
    assert done.stdout == f"{out}\n" and re.search(said, done.stderr)
    if out.endswith("safetensors"):
        assert len(KnowledgePack.load(out)) > 0
    elif not line.startswith("extract"):
        model = AutoModelForCausalLM.from_pretrained(out)
        assert bool(torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("resize a out --vocab-size 500", "from texts or from a pack"),
        ("resize a out --vocab-size many --text text", "--vocab-size 'many' must be numbers"),
        ("resize a out --vocab-size 500 --text nothing", "'nothing' is not a file"),
        ("resize a out --vocab-size 500 --pack text", "not a complete safetensors file"),
        ("resize donor out --vocab-size 500 --text text", "without an Engram memory"),
        ("prune a out", "--min-norm"),
        ("prune a b --min-norm 1", "'b' exists and is not empty"),
        ("prune nothing out --min-norm 1", "'nothing' has no config.json"),
        ("merge a out --how sum", "1 memories are given"),
        ("merge a b out --how both", "must be one of"),
        ("merge a b out --how sum --weights x,y", "--weights 'x,y' must be numbers"),
        ("extract a out.engram-pack.safetensors", "--text says of which n-grams"),
        ("extract a out --text text", "must end with .engram-pack.safetensors"),
        ("extract donor out", "without an Engram memory"),
        ("strip donor out", "without an Engram memory"),
        ("graft donor out --init-from a --vocab-size 500", "--init-text"),
        ("graft donor out --init-text text", "name with init_from the memory"),
        ("plan donor --init-from a --head-dim 8", "engram_head_dim=8, and the rows of"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(places, tmp_path, line, said):
    before = sorted(path.name for path in tmp_path.iterdir())
    done = engram(line)
    assert done.exit_code == 2 and not done.stdout
    assert said in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_help_has_an_example(verb):
    done = engram(f"{verb.__name__} --help")
    assert done.exit_code == 0 and f"Example: engram {verb.__name__} " in " ".join(done.output.split())


def test_a_plan_of_a_transplant_has_the_sizes_of_the_other_memory(places):
    assert "2 heads of 211 rows" in engram("plan donor --init-from a").stdout
