"""What README and docs/ say about the code is what the code is: names, links, and numbers that are on several pages.

Run with `pytest tests/house/test_documentation.py`.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import engram_transformers
from engram_transformers import EngramForCausalLM
from tests.integration import matrix


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "model_cards" / "template.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
GENERATION = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")

# Names before 0.1. Only CHANGELOG.md, which says what replaces each, has them.
GONE = [
    "from_donor",
    "without_memory",
    "train_mode",
    "engram_train_mode",
    "engram_optimizer",
    "save_memory_pack",
    "load_memory_pack",
    "memory_pack",
    "attach_memory_offload",
    "detach_memory_offload",
    "exchange_row_gradients",
    "clip_gradients",
    "hashing_engram",
    "constants_engram",
    "compression_engram",
    "gradient_engram",
    "rows_engram",
    "reading_engram",
    "donor_engram",
    "offload_engram",
    "dispatch_engram",
    "quantised_engram",
    "checkpoint_engram",
    "saves_engram",
    "shards_engram",
    "placement_engram",
    "sizes_engram",
]

# Methods of a PeftModel that pages call on `model`.
OF_PEFT = ("disable_adapter", "merge_and_unload")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """What links to a page's headings may end in."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_page_uses_no_name_that_is_gone(path):
    words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    still_read = {"engram_train_mode", "memory_pack"} if path.name == "format.md" else set()
    assert sorted(words & set(GONE) - still_read) == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_what_a_page_imports_and_calls_is_there(path):
    code = blocks(path)
    for module, names in re.findall(r"^ *from (engram_transformers[\w.]*) import ([\w, ]+)$", code, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
    for name in re.findall(r"\b(?:model|graft)\.(\w+)\(", code) + re.findall(
        r"`model\.(\w+)\(", path.read_text("utf-8")
    ):
        assert hasattr(EngramForCausalLM, name) or name in OF_PEFT, f"a model has no {name}"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"\w+:|\{\{", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_first_screen_counts_ways_and_backbones_as_the_page_does():
    rows = re.findall(r"^\| (\w[^|]+) \|", GENERATION.split("| | llama", 1)[1], re.MULTILINE)
    backbones = GENERATION.split("| | llama", 1)[1].partition("\n")[0].count("|")
    counts = re.findall(r"(\d+) of\s+them, on\s+(\d+) kinds\s+of\s+backbone", README)
    assert counts == [(str(len(rows)), str(backbones))]
    assert re.findall(r"results on (\d+)\s+backbones", README) == [str(backbones)]


def test_the_readme_compares_what_the_page_of_training_holds():
    memory, lora = re.search(r"is (\d\.\d+) with a memory and (\d\.\d+) with LoRA at its\s+best rate", README).groups()
    rows = re.findall(
        r"^\| (donor|memory|LoRA at 0.002) \| \d \| ([\d.]+)[^|]*\| ([\d.]+)[^|]*\| ([\d.]+)",
        (ROOT / "docs" / "training.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    of = {name: losses for name, *losses in rows}
    assert (memory, lora) == (of["memory"][0], of["LoRA at 0.002"][0]) and memory < lora
    assert of["memory"][2] == of["donor"][2], "no change on a text from another domain"
    assert of["LoRA at 0.002"][1] < of["memory"][1], "LoRA is better on entries that were not read"


def test_the_first_screen_says_of_facts_what_was_measured():
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/facts.jsonl").read_text("utf-8").splitlines()]
    of = {arm: [line for line in lines if line["sizes"]["arm"] == arm] for arm in ("pack", "lora")}
    packs = [line["measured"] for line in of["pack"] if (line["sizes"]["people"], line["sizes"]["passes"]) == (100, 6)]
    lora = max((line["measured"] for line in of["lora"]), key=lambda found: found["unseen"]["right"])
    assert f"At least {min(found['unseen']['right'] for found in packs):.1%}".replace("%", " %") in README
    assert all(found["unseen"]["before"]["right"] <= 1 / 400 for found in packs) and "at most one in 400" in README
    general = [found["other_texts"]["general"] for found in packs]
    assert {(one["texts"], one["texts_identical"], one["kl"]) for one in general} == {(24, 1.0, 0.0)}
    assert lora["unseen"]["right"] >= max(found["unseen"]["right"] for found in packs), "it answers as many questions"
    harmed = lora["other_texts"]["general"]
    said = f"rises from {harmed['loss_before']:.2f} to {harmed['loss']:.2f} nats a token"
    assert said in " ".join(README.split()) and harmed["texts_identical"] == 0
    assert f"{max(found['bytes'] for found in packs) / 1e6:.0f} MB, taught in minutes" in README


def test_the_table_of_the_demo_is_the_reports():
    pytest.importorskip("matplotlib")  # of the demo's extra
    demo = importlib.import_module("examples.demo.publish")
    report = json.loads((ROOT / "docs" / "demo" / "report.json").read_text(encoding="utf-8"))
    assert demo.summary(report) == README.split(demo.FIRST, 1)[1].partition("\n")[2].split(f"\n{demo.LAST}")[0]


def test_every_public_name_is_in_the_changelog():
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in engram_transformers.__all__ if f"`{name}`" not in log] == []
    assert [name for name in GONE if not name.endswith("_engram") and name not in log] == []


def test_the_modules_that_the_changelog_names_are_there():
    table = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("Modules of `engram_transformers`:", 1)[1]
    rows = re.findall(r"^\| `(.+) \| (.+) \|$", table.split("\n\nCheckpoints", 1)[0], re.MULTILINE)
    new = [name for _, cell in rows for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(new) > 20
    for name in new:
        assert importlib.util.find_spec(f"engram_transformers.{name}"), name
    for old in re.findall(r"\b\w+_engram\b", " ".join(before for before, _ in rows)):
        assert not importlib.util.find_spec(f"engram_transformers.{old}"), old


def test_the_page_names_the_methods_of_peft_that_are_wrapped():
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8").split("## How PEFT is patched", 1)[1]
    wrapped = re.findall(
        r'^ +wrap\(.+, "(\w+)", \w+\)$', (ROOT / "adapters" / "peft_patches.py").read_text(), re.MULTILINE
    )
    rows = re.findall(r"^\| (`.+`) \|", page, re.MULTILINE)
    assert set(re.findall(r"\.(\w+)`", " ".join(rows))) == set(wrapped)


def test_the_page_of_generation_is_what_make_docs_writes_around_its_table():
    table = re.search(r"^\| \| llama.+\n(?:\|.+\n)+", GENERATION, re.MULTILINE)[0].strip()
    differing = "\n".join(f"- {row}, {way}: {why}." for (row, way), why in matrix.BACKBONES_OWN.items())
    refused = "\n".join(f"- {name}: {said}." for name, (_, said) in matrix.REFUSED.items())
    assert matrix.PAGE.format(table=table, differing=differing, refused=refused) == GENERATION
