"""The README's blocks run as printed, one after another in one namespace, and give the numbers that the page shows.

Only the model's name is replaced by the donor's folder. Needs that folder, as test_smollm2.py does.
Run: ENGRAM_DONOR=runs/donor pytest tests/real/test_readme.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_smollm2 import DONOR
from .test_smollm2 import pytestmark as real


pytestmark = [*real, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# What the page promises of the block that trains.
LEAST_LEARNED = 3.0  # nats a token
MOST_MEMORY = 2 * 10**9  # bytes more than the donor

# Peak of the donor alone, then every block; what each printed, and the peak behind the one that trains, go to
# report.json.
RUN = """
import contextlib, gc, io, json, resource, shlex, sys
import torch
from transformers import AutoModelForCausalLM
from engram_transformers.conversion.cli import app

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

donor, blocks = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(donor)
model(torch.arange(100)[None])
alone = peak()
del model
gc.collect()
space, report = {"__name__": "__main__"}, {"alone": alone, "printed": []}
for kind, block in blocks:
    if kind == "bash":
        for line in block.splitlines():
            app(shlex.split(line, comments=True)[1:], standalone_mode=False)
        continue
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, block, "exec"), space)
    report["printed"].append(printed.getvalue())
    report.setdefault("active", space["model"].active_memories)
    if "trainer.train()" in block and "peak" not in report:
        report["peak"] = peak()
        report["parameters"] = sum(p.nbytes for p in space["model"].backbone.parameters())
        report["tables"] = sum(p.nbytes for p in space["model"].memory.tables.parameters())
json.dump(report, open("report.json", "w"))
"""


def blocks() -> list[tuple[str, str]]:
    """Kind and text of the blocks that a reader runs in Python or with our command."""
    found = re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(kind, text) for kind, text in found if kind == "python" or text.startswith("engram ")]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What a process that ran the page found."""
    folder = tmp_path_factory.mktemp("page")
    given = json.dumps([str(DONOR.absolute()), blocks()]).replace(MODEL, str(DONOR.absolute()))
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=given, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


def test_the_first_block_comes_first_and_every_kind_of_use_is_there():
    kinds = [kind for kind, _ in blocks()]
    assert kinds[0] == "python" and kinds.count("python") >= 6 and "bash" in kinds
    assert MODEL in blocks()[0][1]


def test_the_first_block_answers_what_it_taught_and_the_pack_is_gone_afterwards(report):
    first = blocks()[0][1]
    said = re.search(r"# \.\.\. (.+)$", first, re.MULTILINE)[1]
    assert report["printed"][0].strip().endswith(said) and said.endswith("Lisbon")
    assert said.split("in ")[0] not in "".join(re.findall(r'"(.+)\[\[', first)), "its words were not taught"
    assert report["active"] == []


def test_the_block_that_trains_learns_and_its_memory_switched_off_is_the_donor(report):
    (block,) = (text for _, text in blocks() if "trainer.train()" in text)
    printed = next(text for text in report["printed"] if "memory off" in text)
    losses = dict(re.findall(r"^(backbone|with memory|memory off) (\d+\.\d+)$", printed, re.MULTILINE))
    assert losses["memory off"] == losses["backbone"]
    assert float(losses["with memory"]) < float(losses["backbone"]) - LEAST_LEARNED
    donor, trained, off = (float(n) for n in re.findall(r"_loss\"\]\)  # (\d+\.\d+)", block))
    assert (donor, off) == pytest.approx((float(losses["backbone"]), float(losses["memory off"])), abs=0.01)
    # The page sets a seed; other processors round otherwise.
    assert trained == pytest.approx(float(losses["with memory"]), abs=0.1)


def test_the_block_that_trains_takes_less_than_two_gigabytes_more_than_the_donor(report):
    assert report["peak"] - report["alone"] < MOST_MEMORY
    assert report["tables"] <= report["parameters"], "control: the default table is at most the backbone's size"
