"""docs/design.md shows the house as it is: files, floors, walks and names.

The walks are traced: every file of ours that runs in one is named on the page, and no other.
Run with `pytest tests/house/test_design.py`.
"""

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engram_transformers import create_optimizer

from .test_floors import FLOORS, FOLDERS


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
PRESENT = {f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
INNER = {f"{folder}/__init__.py" for folder in FOLDERS if folder != "modeling_engram"}  # exports and no more

# The walks' headings, and the most files that their steps may take a reader through.
DECODING, GRADIENT, LOADING = (
    "From token ids to the residual stream",
    "From the gradient to a row",
    "From `from_pretrained` to a placement",
)
MOST_STEPS = {DECODING: 6, GRADIENT: 7, LOADING: 7}


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    return re.split(r"^#{2,3} ", PAGE.split(f" {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def files_in(text: str) -> list[str]:
    return re.findall(r"`(\w+\.py)`", text)


def paragraph(heading: str, beginning: str) -> str:
    """The paragraph of a section that begins so."""
    return next(part for part in section(heading).split("\n\n") if part.strip().startswith(beginning))


def tree() -> set[str]:
    """Files of the page's tree."""
    found, folder = set(), ""
    for line in section("The house").split("```")[1].splitlines():
        name = line.split(" ")[0] or line.strip().split(" ")[0]
        if name.endswith("/"):
            folder = name
        elif name:
            found.add(folder + name)
    return found


def test_the_tree_names_every_file_and_no_other():
    assert tree() == PRESENT - INNER


def test_every_file_of_the_tree_says_what_it_is():
    block = section("The house").split("```")[1]
    assert [line for line in block.splitlines() if line.startswith("  ") and not re.match(r"  \w+\.py +\S", line)] == []


def test_the_floors_are_those_that_imports_are_tested_by():
    told = {}
    for floor, wings in re.findall(r"^\| (\d+) \| (.+) \|$", section("Floors"), re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`([^`]+)`", wings), int(floor))
    assert told == {wing or "engram_transformers": floor for wing, floor in FLOORS.items()}


def test_every_name_is_in_the_file_that_it_is_said_to_be_in():
    named = re.findall(r"`(\w+\.py)` \(((?:`\w+`(?:, )?)+)", PAGE)
    assert len(named) > 20
    for file, names in named:
        source = "".join((ROOT / path).read_text(encoding="utf-8") for path in PRESENT if path.endswith(f"/{file}"))
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(?:def {name}\b|class {name}\b|{name} = )", source, re.MULTILINE), (file, name)


@pytest.mark.parametrize("heading", MOST_STEPS)
def test_a_walk_takes_few_files(heading):
    steps = re.findall(r"^\d+\. `(\w+\.py)`", section(heading), re.MULTILINE)
    assert 0 < len(set(steps)) <= MOST_STEPS[heading]
    assert len(steps) == len(set(steps)), "a step for each file"


def run_and_name(act: Callable) -> tuple[set[str], object]:
    """Files of ours whose functions an action calls, in all threads, and what it returns."""
    folders, seen = {str(ROOT / folder) for folder in FOLDERS}, set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and str(path.parent) in folders:
            seen.add(path.name)

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        found = act()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return seen, found


def told(heading: str, *further: str) -> set[str]:
    """Files of a walk's steps, and of the paragraphs that begin with `further`."""
    steps = re.findall(r"^\d+\. `(\w+\.py)`", section(heading), re.MULTILINE)
    return set(steps).union(*(files_in(paragraph(heading, beginning)) for beginning in further))


@torch.no_grad()
def decode(model) -> set[str]:
    """Files that run in one step of decoding."""
    ids = torch.tensor([[20, 30, 40, 50]])
    cache = model(ids[:, :3], use_cache=True).past_key_values
    return run_and_name(lambda: model(ids[:, 3:], past_key_values=cache, use_cache=True))[0]


def test_a_step_of_decoding_runs_through_the_files_of_its_walk(tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    assert decode(model) == told(DECODING, "Checks and histories")
    model.save_pretrained(tmp_path)
    elsewhere = paragraph(DECODING, "With tables on")
    on_disk = files_in(elsewhere.split('on "disk" also')[1])
    ran = decode(model.place_memory("disk"))
    everything = told(DECODING, "Checks and histories", "With tables on")
    assert everything - ran <= set(on_disk) and ran <= everything


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_a_gradient_runs_through_the_files_of_its_walk(tiny_engram, tmp_path, placement):
    tiny_engram(trained=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=placement).set_trainable("memory")
    optimizer = create_optimizer(model)
    ids = torch.tensor([[20, 30, 40, 50]])
    loss = model(ids, labels=ids).loss
    backward, _ = run_and_name(loss.backward)
    step, _ = run_and_name(optimizer.step)
    walk, stores = told(GRADIENT, "Checks on this walk"), set(files_in(paragraph(GRADIENT, "`part.write` ends")))
    assert (backward | step) - (stores - walk) == walk


def test_loading_runs_through_the_files_of_its_walk(tiny_engram, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path)

    def load(placement: str) -> set[str]:
        return run_and_name(lambda: AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=placement))[0]

    expected = told(LOADING, "What makes the model")
    assert load("cpu") == expected
    assert load("disk") == expected | set(files_in(paragraph(LOADING, 'This is "cpu"')))
