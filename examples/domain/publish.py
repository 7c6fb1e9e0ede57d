"""Takes the results of the experiment into docs/training.md.

Promises: every number is a result's; runs are put together only where they were trained and measured alike. Never
measures anything.

Run: python -m examples.domain.publish
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.publish import measured_by, number, put, table
from benchmarks.record import ROOT, lines_of

from .__main__ import RESULTS


SAMPLES = {"recall": "recall", "held_out": "held-out", "faq": "Anarchist FAQ", "factbook": "World Factbook"}

# Fields of a recipe that runs must share to stand in one table, with the sizes of the text.
ALIKE = ("passes", "batch", "length", "warmup", "beta2", "clip", "bf16")


def kind_of(line: dict) -> str:
    """What a run trained."""
    recipe = line["sizes"]["recipe"]
    if recipe is None:
        return "donor"
    if recipe["memory"] is None:
        return "lora"
    if recipe["memory"].get("engram_hash_scheme") == "one_row":
        return "one_row"
    return "memory" if recipe["lora_lr"] is None else "both"


def shape_of(recipe: dict) -> dict:
    """Fields of a memory, without what makes it the control."""
    return {name: value for name, value in recipe["memory"].items() if name != "engram_hash_scheme"}


def comparable(lines: list[dict]) -> list[dict]:
    """The last line of every recipe and seed among those that share text, plan and memory with the last control."""
    controls = [line for line in lines if kind_of(line) == "one_row"]
    if not controls:
        return []
    last = controls[-1]["sizes"]
    kept: dict[str, dict] = {}
    for line in lines:
        sizes, recipe = line["sizes"], line["sizes"]["recipe"]
        if any(sizes[name] != last[name] for name in ("donor", "tokens", "sample_tokens")):
            continue
        if recipe is not None and any(recipe[name] != last["recipe"][name] for name in ALIKE):
            continue
        if recipe is not None and recipe["memory"] is not None and shape_of(recipe) != shape_of(last["recipe"]):
            continue
        key = f"{recipe} {sizes['seed']}"
        kept.pop(key, None)  # so that the order is that of the lines that stay
        kept[key] = line
    return list(kept.values())


def losses(lines: Iterable[dict], of: str = "loss") -> dict[str, list[float]]:
    """Losses of some runs, sample by sample, by rising seed."""
    ordered = sorted(lines, key=lambda line: line["sizes"]["seed"])
    return {name: [line["measured"][of][name] for line in ordered] for name in SAMPLES}


def range_text(values: list[float]) -> str:
    """Mean, and the least and greatest of several seeds in brackets."""
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


class Runs:
    """The runs that are compared.

    Args:
        lines (`list[dict]`): all lines of the experiment, a control among them.
    """

    def __init__(self, lines: list[dict]):
        found = comparable(lines)
        kinds: dict[str, list[dict]] = {"donor": [], "memory": [], "one_row": [], "lora": [], "both": []}
        for line in found:
            kinds[kind_of(line)].append(line)
        self.lines, self.donor, self.one_row = found, kinds["donor"], kinds["one_row"]
        self.recipe = self.one_row[-1]["sizes"]["recipe"]
        self.memory = [one for one in kinds["memory"] if one["sizes"]["recipe"]["table_lr"] == self.recipe["table_lr"]]
        self.doses = [line for line in kinds["memory"] if self.differs_by_rate(line["sizes"]["recipe"])]
        self.rates: dict[float, list[dict]] = {}
        for line in kinds["lora"]:
            self.rates.setdefault(line["sizes"]["recipe"]["lora_lr"], []).append(line)
        # Of the rates at the seed that all have.
        self.best = min(self.rates, key=lambda rate: losses(self.rates[rate])["held_out"][0])
        self.lora = self.rates[self.best]
        self.both = [line for line in kinds["both"] if line["sizes"]["recipe"]["lora_lr"] == self.best]

    def differs_by_rate(self, recipe: dict) -> bool:
        """Whether a memory's recipe differs from the control's by the table's rate alone."""
        return all(recipe[name] == self.recipe[name] for name in recipe if name not in ("table_lr", "memory"))


def whole(runs: Runs) -> str:
    """Every way with its seeds, what the differences are, and the dose curve."""
    rows = [way_row("donor", runs.donor), way_row("memory", runs.memory)]
    rows.append(way_row("control: its rows shuffled", runs.memory, "loss_shuffled"))
    rows.append(way_row("control: one row a head", runs.one_row))
    rows += [way_row(f"LoRA at {rate:g}", runs.rates[rate]) for rate in sorted(runs.rates)]
    rows.append(way_row(f"memory + LoRA at {runs.best:g}", runs.both))
    minutes = sum(line["took_seconds"] for line in runs.lines) / 60
    return "\n\n".join(
        [
            about(runs),
            table(["nats a token", "seeds", *SAMPLES.values(), "minutes"], rows),
            differences(runs),
            "The dose: the learning rate of the table, all else the same. Shown is the change of the loss.",
            dose_table(runs.doses, runs.donor),
            f"{measured_by(runs.lines[-1])[:-1]}; {minutes:.0f} minutes in all.",
        ]
    )


def way_row(name: str, lines: list[dict], of: str = "loss") -> list[str]:
    """A row of the table of ways."""
    measured = losses(lines, of)
    # A run with fewer threads had only a part of the machine.
    full = [line for line in lines if line["sizes"]["threads"] == line["machine"]["cores"]]
    minutes = [line["measured"]["trained"]["minutes"] for line in full if "trained" in line["measured"]]
    time = "" if of != "loss" or not minutes else number(mean(minutes), 2)
    return [name, str(len(lines)), *(range_text(measured[sample]) for sample in SAMPLES), time]


def dose_table(lines: list[dict], donor: list[dict]) -> str:
    """Change of the losses for each learning rate of the table, at the seed that all have."""
    seed, before = min(line["sizes"]["seed"] for line in lines), losses(donor[:1])
    rows = []
    for line in sorted(lines, key=lambda line: line["sizes"]["recipe"]["table_lr"]):
        if line["sizes"]["seed"] == seed:
            after, recipe = line["measured"]["loss"], line["sizes"]["recipe"]
            change = [f"{after[name] - before[name][0]:+.3f}" for name in SAMPLES]
            rows.append([f"{recipe['table_lr']:g}", number(recipe["table_lr"] / recipe["dense_lr"]), *change])
    return table(["table lr", "times the other weights'", *SAMPLES.values()], rows)


def about(runs: Runs) -> str:
    """What was trained, in words."""
    line, recipe = runs.memory[0], runs.recipe
    sizes, memory = line["sizes"], recipe["memory"]
    return (
        f"{sizes['donor']} on FOLDOC: {line['measured']['trained']['tokens']:,} tokens, passes: {recipe['passes']}, "
        f"{recipe['batch']} x {recipe['length']} a step, samples of {sizes['sample_tokens']:,} tokens, backbone "
        f"frozen. Memory in layers {memory['engram_layer_ids']}, {memory['engram_n_heads']} heads of about "
        f"{memory['engram_vocab_size']:,} rows x {memory['engram_head_dim']} for each order up to "
        f"{memory['engram_max_ngram_size']}; table lr {recipe['table_lr']:g}, other weights {recipe['dense_lr']:g}. "
        "Shown is the mean of the seeds, in brackets the least and the greatest; minutes are of training alone, in "
        "runs that had all cores."
    )


def differences(runs: Runs) -> str:
    """The four differences that the experiment asks for."""
    donor, memory, control = (losses(lines) for lines in (runs.donor, runs.memory, runs.one_row))
    shuffled, alone, joined = losses(runs.memory, "loss_shuffled"), losses(runs.lora), losses(runs.both)
    share = {name: mean(control[name]) - mean(memory[name]) for name in ("held_out", "recall")}
    more = {name: mean(joined[name]) - mean(alone[name]) for name in ("held_out", "recall")}
    harm = max(mean(memory[name]) - mean(donor[name]) for name in ("faq", "factbook"))
    return "\n".join(
        [
            f"- The table's own share (control with one row minus memory): {share['held_out']:+.3f} on held-out "
            f"entries, {share['recall']:+.3f} in recall.",
            f"- With its rows shuffled the memory recalls {mean(shuffled['recall']) - mean(memory['recall']):.3f} nats "
            "worse.",
            f"- Change by the memory on the worse of the two other domains: {harm:+.3f}.",
            f"- Memory + LoRA against LoRA alone at its best rate: {more['held_out']:+.3f} on held-out entries, "
            f"{more['recall']:+.3f} in recall.",
        ]
    )


def pages(root: Path = ROOT, results: Path = RESULTS) -> dict[Path, str]:
    """The page with its figures, nothing written."""
    path = root / "docs" / "training.md"
    return {path: put(path.read_text(encoding="utf-8"), "domain", whole(Runs(lines_of(results))))}


if __name__ == "__main__":
    for page, made in pages().items():
        page.write_text(made, encoding="utf-8")
