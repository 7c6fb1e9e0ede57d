"""The figures of docs/training.md: which runs are put together, what is called reached, and where the figures stand.

Run: pytest tests/house/test_training_sections.py
"""

import copy
import json

import pytest

from benchmarks import publish, record, training_sections
from benchmarks.compare import spread
from benchmarks.training_sections import SAMPLES, comparable, domain, kind_of


MEMORY = {"engram_layer_ids": [1], "engram_vocab_size": 100, "engram_n_heads": 8, "engram_head_dim": 4}
MEMORY |= {"engram_max_ngram_size": 3}
PLAN = {"passes": 1, "batch": 4, "length": 256, "warmup": 0.05, "beta2": 0.99, "clip": 1.0, "bf16": True}
RECIPE = {"memory": MEMORY, "table_lr": 0.1, "dense_lr": 2e-3, "lora_lr": None, "lora_rank": 16, "table_eps": 1e-8}
RECIPE |= {"table_optimizer": "adam"}
MACHINE = {"cpu": "a processor", "cores": 2, "ram_bytes": 10**9, "kernel": "Linux"}
VERSIONS = dict.fromkeys(("python", "torch", "transformers", "accelerate", "safetensors"), "1")


def run(seed: int = 0, losses=(3.0, 3.0, 3.0, 3.0), shuffled=None, **changes) -> dict:
    """A line of the domain; `recipe=None` is the donor."""
    recipe = changes.pop("recipe", {**RECIPE, **PLAN, **changes})
    measured = {"loss": dict(zip(SAMPLES, losses, strict=True))}
    if recipe is not None:
        measured["trained"] = {"minutes": 6.0, "tokens": 131_072}
    if shuffled is not None:
        measured["loss_shuffled"] = dict(zip(SAMPLES, shuffled, strict=True))
    sizes = {"threads": 2, "donor": "donor", "tokens": 131_072, "sample_tokens": 16_384, "seed": seed, "recipe": recipe}
    about = {"benchmark": "domain", "commit": "0" * 40, "time": "2026-01-01", "machine": MACHINE, "versions": VERSIONS}
    return {**about, "sizes": sizes, "measured": measured, "took_seconds": 60.0}


def one_row(**more) -> dict:
    return run(memory={**MEMORY, "engram_hash_scheme": "one_row"}, **more)


def all_runs(recall: float = 2.6, other: float = 3.0, both: float = 2.5) -> list[dict]:
    """Donor, memory, control, LoRA at two rates, and both, two seeds where there are seeds."""
    lines = [run(recipe=None, losses=(3.4, 3.5, 3.0, 2.9))]
    for seed in (0, 1):
        lines += [
            run(seed, (recall + 0.01 * seed, 3.3, other, 2.9), shuffled=(3.5, 3.5, 3.0, 2.9)),
            one_row(seed=seed, losses=(3.0, 3.35, 3.0, 2.9)),
            run(seed, (2.8, 3.2, 3.0, 2.9), memory=None, lora_lr=5e-4),
            run(seed, (both, 3.1, 3.0, 2.9), lora_lr=5e-4),
        ]
    return [*lines, run(0, (2.7, 3.25, 3.0, 2.9), memory=None, lora_lr=1e-3)]


def test_runs_of_another_plan_text_or_memory_are_left_out_and_the_last_of_each_is_kept():
    lines = all_runs()
    other = [
        run(losses=(1, 1, 1, 1), shuffled=(1, 1, 1, 1), passes=3),
        run(losses=(1, 1, 1, 1), shuffled=(1, 1, 1, 1), memory={**MEMORY, "engram_vocab_size": 200}),
        run(losses=(1, 1, 1, 1), memory=None, lora_lr=5e-4, batch=8),
    ]
    longer = copy.deepcopy(lines[1])
    longer["sizes"]["tokens"] = 7
    older = copy.deepcopy(lines[1])
    older["measured"]["loss"]["recall"] = 9.0
    assert comparable([older, *other, longer, *lines]) == lines
    assert comparable([line for line in lines if kind_of(line) != "one_row"]) == []


def test_the_table_shows_every_way_with_the_spread_of_its_seeds():
    text = domain(all_runs())
    assert "| memory | 2 | 2.605 (2.600 to 2.610) | 3.300 (3.300 to 3.300) |" in text
    assert "| control: its rows shuffled | 2 | 3.500 (3.500 to 3.500) |" in text
    assert "| LoRA at 0.0005 | 2 |" in text and "| LoRA at 0.001 | 1 | 2.700 | 3.250 |" in text
    assert "| memory + LoRA at 0.0005 | 2 |" in text, "the best rate is that of the lowest held-out loss"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "+0.395 in recall; at least 0.1 on held-out or 0.3 on recall: **reached**"),
        ({"recall": 2.75}, "+0.245 in recall; at least 0.1 on held-out or 0.3 on recall: **missed**"),
        ({}, "+0.000; within 0.01: **reached**"),
        ({"other": 3.02}, "+0.020; within 0.01: **missed**"),
        ({}, "-0.100 on held-out entries, -0.300 in recall; below LoRA alone: **reached**"),
        ({"both": 2.9}, "-0.100 on held-out entries, +0.100 in recall; below LoRA alone: **missed**"),
    ],
)
def test_what_was_to_be_shown_is_called_reached_or_missed(changes, says):
    assert says in domain(all_runs(**changes))


def test_the_dose_curve_has_one_row_for_each_rate_of_the_table():
    doses = [run(0, (3.0, 3.4, 3.0, 2.9), table_lr=rate, shuffled=(3, 3, 3, 3)) for rate in (0.01, 0.05)]
    text = domain([*all_runs(), *doses])
    assert "| 0.01 | 5.00 | -0.400 | -0.100 | +0.000 | +0.000 |" in text
    assert "| 0.1 | 50.0 | -0.800 |" in text
    assert "The dose" not in domain(all_runs()), "control: one rate is no curve"


# What a step costs.


def step(median: float) -> dict:
    return spread([median] * 3)


def steps(memory: float, size: float, over: float, more: int) -> dict:
    """A line of `training`: seconds of a memory's step where LoRA and the whole donor take 1."""
    held = {"peak_anonymous": 10**9, "state_bytes": 10**8, "steps": 4}
    ways = {
        way: {"seconds": step(t), "times_full": step(t), "times_lora": step(t), **held}
        for way, t in (("full", 1.0), ("lora", 1.0), ("memory", memory), ("memory on disk", memory), ("both", 1.2))
    }
    sides = {"ours": {"seconds": step(1.0), **held}, "theirs": {"seconds": step(over), **held}}
    one = {"table_bytes": 10**6, "seconds": step(1.0), **held}
    sizes = {
        "100": {"rows": 100, "times_the_smallest": step(1.0), **one},
        "9000": {"rows": 9000, "times_the_smallest": step(size), **one},
    }
    about = {"batch": 4, "length": 256, "precision": "float32", "donor": "donor", "lora_rank": 16, "rows": 10}
    about |= {"row_bytes": 4, "table_bytes": 40, "layers": [1], "width_of_sizes": 32, "threads": 2}
    first = {"disk": {"more": more << 20, "most": more << 20, "touched_values": 65_536, "allowed": 65 << 20}}
    ratios = {"theirs_over_ours": step(over), "theirs_over_ours_on_disk": step(2 * over)}
    peer = {"sides": sides, **ratios, "first_step": {"more": 2775 << 20}}
    measured = {"ways": ways, "peer": peer, "first_step": first}
    line = {"benchmark": "training", "sizes": about, "measured": {**measured, "sizes": sizes}, "took_seconds": 60.0}
    return {**line, "commit": "0" * 40, "time": "2026-01-01", "machine": MACHINE, "versions": VERSIONS}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((0.8, 1.1, 1.01, 65), ["reached"] * 8),
        ((0.801, 1.1, 1.01, 65), ["missed", "reached"] * 2 + ["reached"] * 4),
        ((1.001, 1.11, 1.0, 66), ["missed"] * 5 + ["reached"] + ["missed"] * 2),
    ],
    ids=["reached", "just missed", "missed"],
)
def test_what_a_step_was_to_cost_is_called_reached_or_missed(given, words):
    text = training_sections.training(steps(*given))
    found = [part.split("**")[0] for part in text.split(": **")[1:]]
    assert found == words
    assert "its first update takes 2,780 MiB" in text  # three digits


def test_a_peer_that_could_not_be_installed_is_named_with_the_reason():
    line = steps(0.8, 1.0, 1.0, 1)
    line["measured"]["peer"] = {"missing": "pip could not install it:\nno network"}
    text = training_sections.training(line)
    assert "engram-peft was not measured: pip could not install it:" in text and "no network" not in text


# The page.


def marks() -> str:
    return "\n".join(f"{publish.FIRST.format(name=n)}\nold\n{publish.LAST.format(name=n)}" for n in publish.FIGURES)


def test_figures_are_put_between_their_marks_and_nowhere_else(tmp_path):
    for line in [*all_runs(), steps(0.8, 1.0, 1.0, 1)]:
        with open(tmp_path / f"{line['benchmark']}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    page = f"# Training\n\nwritten by people\n\n{marks()}\n\nand more\n"
    text, missing = publish.with_figures(page, tmp_path)
    assert missing == []
    assert text.startswith("# Training\n\nwritten by people\n") and text.endswith("and more\n")
    assert "\nold\n" not in text
    assert "10.0 minutes in all." in text and text.count("`python -m benchmarks.domain`") == 1
    assert publish.with_figures(text, tmp_path) == (text, [])


def test_what_is_not_measured_is_said_and_a_page_without_marks_is_refused(tmp_path):
    text, missing = publish.with_figures(marks(), tmp_path)
    assert missing == list(publish.FIGURES)
    assert all(f"Not measured yet: `python -m benchmarks.{name}`." in text for name in publish.FIGURES)
    with pytest.raises(ValueError, match="no pair of marks"):
        publish.with_figures(text.replace(publish.LAST.format(name="domain"), ""), tmp_path)


@pytest.mark.parametrize("page", ["TRAINING_PAGE", "README"])
def test_the_pages_in_the_repository_have_the_figures_of_their_results(page):
    text = getattr(publish, page).read_text(encoding="utf-8")
    names = publish.FIGURES if page == "TRAINING_PAGE" else publish.IN_SHORT
    assert publish.with_figures(text, record.RESULTS, names)[0] == text, "run `python -m benchmarks.publish`"


def test_the_readme_has_one_column_for_each_way():
    text = training_sections.domain_in_short(all_runs())
    assert "| nats a token | donor | memory | control: 1 row a head | LoRA, rank 16 | memory + LoRA |" in text
    assert "| recall | 3.400 | 2.605 | 3.000 | 2.800 | 2.500 |" in text
    assert "mean of 2 seeds" in text
    assert "mean of 1 to 2 seeds" in training_sections.domain_in_short(all_runs()[:-2])
    assert training_sections.domain_in_short([]) == domain([]) == training_sections.NOT_MEASURED
