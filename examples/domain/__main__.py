"""What SmolLM2 learns of a computing dictionary by a memory, by LoRA, and by both, with two controls of the memory.

Every way reads the same 131,072 tokens of FOLDOC in the same order. Measured before and after: loss on a fixed sample
of what was read (recall), on entries that were held out, and on two other kinds of text (harm). The controls are the
same memory with one row a head, trained in the same way (what it gains is not the table's), and the trained memory with
its rows shuffled (what it keeps is not the rows'). LoRA has the best of five learning rates, by its held-out loss.

A run takes 5 to 15 minutes and there are about twenty. Each adds a line when it is done, and a run whose settings and
seed have a line is not made again: start it as often as you like, or name some with --runs and --seeds. A line says the
commit that it was made with; --again measures those of other commits anew.

Run: python -m examples.domain, or `make bench-long`; then python -m examples.domain.publish
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks import record

from . import text, train
from .train import Recipe


RESULTS = Path(__file__).parent / "results.jsonl"

# The memory and its rates: the best of a few runs over 24,576 tokens with one seed, so a beginning and no optimum.
MEMORY = {
    "engram_layer_ids": [10, 20],
    "engram_vocab_size": 200_000,
    "engram_max_ngram_size": 3,
    "engram_n_heads": 8,
    "engram_head_dim": 48,
    "engram_kernel_size": 0,
    "engram_initializer_range": 0.02,
    "engram_value_initializer_range": 0.1,
}
RECIPE = Recipe(memory=MEMORY, table_lr=0.1, dense_lr=2e-3, passes=1)
LORA_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
DOSES = (5e-3, 2e-2, 5e-2, 1e-1, 2e-1)

# Fields of a recipe that say how long and how often; all ways have the same.
PLAN = ("passes", "batch", "length", "warmup", "clip", "bf16", "beta2")

# What makes a run the same as one that has a line. Names do not count: LoRA at its best rate is also one of the rates,
# and one of the doses is the memory's own.
KNOWN_BY = ("donor", "tokens", "sample_tokens", "seed", "recipe")

# Names on the command line that stand for several runs.
FAMILIES = ("lora", "dose")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    donor = Path(os.environ.get("ENGRAM_DONOR", "runs/donor"))
    made.add_argument("--donor", type=Path, default=donor, help="folder of the backbone; `make donor` makes one")
    made.add_argument("--results", type=Path, default=RESULTS, help="file of the lines")
    made.add_argument("--threads", type=int, default=record.cores(), help="threads of torch; all cores by default")
    made.add_argument("--runs", type=names, default=None, help="such as donor,memory,one_row,lora,both,dose: all")
    made.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    made.add_argument("--tokens", type=int, default=131_072, help="tokens that are read, in all passes together")
    made.add_argument("--sample", type=int, default=16_384, help="tokens of each measured sample")
    made.add_argument("--again", action="store_true", help="also measure what was measured with another commit")
    made.add_argument("--texts", type=Path, default=Path("runs/domain-texts"), help="where the texts are kept")
    made.add_argument("--memory", type=json.loads, default={}, help="fields of EngramConfig to change, as JSON")
    made.add_argument("--recipe", type=json.loads, default={}, help="fields of Recipe to change, as JSON")
    return made.parse_args(argv)


def names(given: str) -> list[str]:
    """A list such as "memory,lora"."""
    return [part.strip() for part in given.split(",") if part.strip()]


def plans(asked: argparse.Namespace) -> list[tuple[str, int, Recipe | None]]:
    """Name, seed and recipe of every run that is asked for, in order; None trains nothing.

    LoRA's other rates and the dose curve have one seed; which rate is LoRA's best is known when they are through, so
    `both` and further seeds of LoRA take it from `best_rate`.
    """
    learned = memory_recipe(asked)
    plan = {name: getattr(learned, name) for name in PLAN}
    first = asked.seeds[0]
    made: list[tuple[str, int, Recipe | None]] = [("donor", first, None)]
    for seed in asked.seeds:
        made += [("memory", seed, learned), ("one_row", seed, learned.with_one_row())]
    made += [(rate_name(rate), first, Recipe(lora_lr=rate, **plan)) for rate in LORA_RATES]
    for seed in asked.seeds:
        made += [("lora", seed, Recipe(lora_lr=0.0, **plan)), ("both", seed, dataclasses.replace(learned, lora_lr=0.0))]
    made += [(f"dose {rate:g}", first, dataclasses.replace(learned, table_lr=rate)) for rate in DOSES]
    known = {name for name, _, _ in made} | set(FAMILIES)
    unknown = set(asked.runs or ()) - known
    if unknown:
        raise ValueError(f"no run is called {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}.")
    return [plan for plan in made if asked.runs is None or {plan[0], plan[0].split()[0]} & set(asked.runs)]


def memory_recipe(asked: argparse.Namespace) -> Recipe:
    """How the memory is trained."""
    return dataclasses.replace(RECIPE, memory={**MEMORY, **asked.memory}, **asked.recipe)


def rate_name(rate: float) -> str:
    """Name of a run of LoRA at one of the rates."""
    return f"lora {rate:g}"


class Runs:
    """The lines that are there, and the runs that add to them.

    Args:
        asked (`argparse.Namespace`): from `options`.
    """

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.donor, self.commit = asked, asked.donor, record.commit()
        self.unpacked = text.fetch(asked.texts.resolve())
        self.texts: dict[int, text.DomainText] = {}

    def text(self, recipe: Recipe | None) -> text.DomainText:
        """The text of a run: more passes read fewer tokens."""
        passes = 1 if recipe is None else recipe.passes
        if passes not in self.texts:
            tokenizer = AutoTokenizer.from_pretrained(self.donor)
            self.texts[passes] = text.load(tokenizer, self.unpacked, self.asked.tokens // passes, self.asked.sample)
        return self.texts[passes]

    def sizes(self, name: str, seed: int, recipe: Recipe | None) -> dict:
        """What a line says of its run."""
        return {
            "threads": self.asked.threads,
            "run": name,
            "donor": self.donor.name,
            "tokens": self.asked.tokens,
            "sample_tokens": self.asked.sample,
            "seed": seed,
            "recipe": None if recipe is None else dataclasses.asdict(recipe),
        }

    def line(self, name: str, seed: int, recipe: Recipe | None) -> dict:
        """The line of a run, which is made if it is not there."""
        sizes = self.sizes(name, seed, recipe)
        for line in record.lines_of(self.asked.results):
            of_this = not self.asked.again or line["commit"] == self.commit
            if of_this and all(line["sizes"][key] == sizes[key] for key in KNOWN_BY):
                print(f"{name}, seed {seed}: there")
                return line
        print(f"{name}, seed {seed}")
        begun = time.monotonic()
        # The control is of the memory's own runs, one of which is a dose as well.
        measured = self.measure(recipe, seed, shuffled=recipe == memory_recipe(self.asked))
        line = record.line("domain", sizes, measured, self.donor, time.monotonic() - begun)
        record.append(line, self.asked.results)
        return line

    def measure(self, recipe: Recipe | None, seed: int, shuffled: bool) -> dict:
        """Trains and measures; `shuffled` measures once more with the trained rows shuffled."""
        read = self.text(recipe)
        model = train.build(self.donor, recipe or Recipe(), seed)
        measured: dict = {}
        if recipe is not None:
            measured["trained"] = train.train(model, read.train, recipe, seed, show)
        measured["loss"] = train.losses_of(model, read)
        if shuffled:
            measured["rows_shuffled"] = train.shuffle_rows(model)
            measured["loss_shuffled"] = train.losses_of(model, read)
        return measured

    def best_rate(self, recipe: Recipe, first: int) -> float:
        """LoRA's learning rate with the lowest held-out loss."""
        plan = {name: getattr(recipe, name) for name in PLAN}
        lines = {rate: self.line(rate_name(rate), first, Recipe(lora_lr=rate, **plan)) for rate in LORA_RATES}
        return min(lines, key=lambda rate: lines[rate]["measured"]["loss"]["held_out"])


def show(step: int, steps: int, loss: float) -> None:
    """Progress of a training run, now and then."""
    if step == 1 or step % 16 == 0 or step == steps:
        print(f"  step {step} of {steps}: loss {loss:.3f}", flush=True)


def main(argv: list[str] | None = None) -> list[dict]:
    """Measures what is not measured yet and returns the lines of all runs that are asked for."""
    asked = options(argv)
    wanted = plans(asked)
    torch.set_num_threads(asked.threads)
    logging.disable_progress_bar()
    runs, lines = Runs(asked), []
    for name, seed, recipe in wanted:
        if recipe is not None and recipe.lora_lr == 0.0:
            recipe = dataclasses.replace(recipe, lora_lr=runs.best_rate(recipe, asked.seeds[0]))
        lines.append(runs.line(name, seed, recipe))
    return lines


if __name__ == "__main__":
    main()
