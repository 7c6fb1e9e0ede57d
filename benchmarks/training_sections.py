"""The two sections that the benchmarks give docs/training.md: what training costs, and what it teaches.

Promises: every number is a result's; a target that was missed is called missed, by its median or mean and nothing
kinder; runs of the domain are put together only where they were trained and measured alike. Never reads a clock, a file
or a machine.
"""

from collections.abc import Callable, Iterable
from statistics import mean

from .sections import number, spread_text, table


SAMPLES = {"recall": "recall", "held_out": "held-out", "faq": "Anarchist FAQ", "factbook": "World Factbook"}
WAYS = {
    "full": "all weights, AdamW",
    "lora": "LoRA",
    "memory": "memory",
    "memory on disk": "memory, its table on disk",
    "both": "memory + LoRA",
}

# Fields of a recipe that runs must share to stand in one table, beside the sizes of the text.
ALIKE = ("passes", "batch", "length", "warmup", "beta2", "clip", "bf16")

# What is aimed at: name -> (text, whether a number is good enough).
TARGETS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "memory, of full": ("at most 0.8 times", lambda times: times <= 0.8),
    "memory, of lora": ("at most 1.0 times", lambda times: times <= 1.0),
    "peer": ("faster than engram-peft", lambda times: times > 1.0),
    "sizes": ("within 10 %", lambda times: times <= 1.1),
    "first step": ("at most 64 MiB and 16 bytes a value", lambda share: share <= 1.0),
    "both": ("below LoRA alone", lambda less: less > 0),
    "harm": ("within 0.01", lambda more: more <= 0.01),
    "share": ("at least 0.1 on held-out or 0.3 on recall", lambda reached: reached >= 1),
}


def verdict(target: str, value: float) -> str:
    """The target beside what was measured."""
    text, good = TARGETS[target]
    return f"{text}: **{'reached' if good(value) else 'missed'}**"


def training(result: dict) -> str:
    """Section of `training`."""
    sizes, measured = result["sizes"], result["measured"]
    parts = [
        f"A step is forward, backward, clipping and update of {sizes['batch']} sequences of {sizes['length']} tokens "
        f"of real text, {sizes['precision']}, backbone {sizes['donor']}; every way in a process of its own, by turns. "
        f"LoRA has rank {sizes['lora_rank']} on every matrix of a layer. The memory has {sizes['rows']:,} rows of "
        f"{sizes['row_bytes']} bytes ({sizes['table_bytes'] / 1e9:.2f} GB), layers {sizes['layers']}.",
        ways_table(measured["ways"]),
        peer_text(measured["peer"]),
    ]
    if measured["first_step"]:
        parts += [
            "Private memory of the first update, in a fresh process whose allocator keeps nothing back (a table on "
            '"device" and "cpu" is copied out of its file before, when the optimizer is made):',
            first_step_table(measured["first_step"]),
        ]
    parts += [
        f"Tables of many sizes, on disk, rows of {sizes['width_of_sizes']} values that were read once before the step:",
        sizes_table(measured["sizes"]),
    ]
    return "\n\n".join(part for part in parts if part)


def ways_table(ways: dict[str, dict]) -> str:
    """Seconds and bytes of each way."""
    rows = []
    for way, entry in ways.items():
        times = [spread_text(entry["times_full"]), spread_text(entry["times_lora"])]
        if way.startswith("memory"):
            times[0] += f"; {verdict('memory, of full', entry['times_full']['median'])}"
            times[1] += f"; {verdict('memory, of lora', entry['times_lora']['median'])}"
        held = [gigabyte(entry["peak_anonymous"]), gigabyte(entry["state_bytes"])]
        rows.append([WAYS[way], spread_text(entry["seconds"]), *times, *held])
    head = ["what learns", "seconds a step", "times all weights", "times LoRA", "most private memory, GB"]
    return table([*head, "optimizer's state, GB"], rows)


def gigabyte(size: int) -> str:
    """Bytes in GB."""
    return number(size / 1e9)


def peer_text(found: dict) -> str:
    """Beside engram-peft."""
    if "missing" in found:
        return f"engram-peft was not measured: {found['missing'].splitlines()[0]}"
    ours, theirs = found["sides"]["ours"], found["sides"]["theirs"]
    over, on_disk = found["theirs_over_ours"], found["theirs_over_ours_on_disk"]
    return (
        f"engram-peft 1.2.7 (its defaults, hc_mult 1, a table of the same size, its own optimizer, no clipping) takes "
        f"{spread_text(theirs['seconds'])} seconds a step, {spread_text(over)} times ours in the same rounds "
        f"({spread_text(ours['seconds'])}); {verdict('peer', over['median'])}. With our table on disk it is "
        f"{spread_text(on_disk)} times ours; {verdict('peer', on_disk['median'])}. It holds "
        f"{gigabyte(theirs['peak_anonymous'])} GB of private memory at most and {gigabyte(theirs['state_bytes'])} GB "
        f"of optimizer state, where ours are {gigabyte(ours['peak_anonymous'])} and {gigabyte(ours['state_bytes'])} "
        f"GB; its first update takes {number(found['first_step']['more'] / 2**20)} MiB."
    )


def first_step_table(places: dict[str, dict]) -> str:
    """Memory of the first update for each place of the table."""
    rows = [
        [
            f'"{place}"',
            number(entry["more"] / 2**20),
            number(entry["most"] / 2**20),
            f"{entry['touched_values']:,}",
            f"{number(entry['allowed'] / 2**20)}; {verdict('first step', entry['more'] / entry['allowed'])}",
        ]
        for place, entry in places.items()
    ]
    return table(["table on", "MiB more after it", "most meanwhile, MiB", "values in touched rows", "allowed"], rows)


def sizes_table(sizes: dict[str, dict]) -> str:
    """Seconds a step for each size."""
    rows = []
    for size, entry in sizes.items():
        times = spread_text(entry["times_the_smallest"])
        if size == max(sizes, key=int):
            times += f"; {verdict('sizes', entry['times_the_smallest']['median'])}"
        held = [gigabyte(entry["peak_anonymous"]), gigabyte(entry["state_bytes"])]
        rows.append([f"{entry['rows']:,}", gigabyte(entry["table_bytes"]), spread_text(entry["seconds"]), times, *held])
    head = ["rows", "table, GB", "seconds a step", "times the smallest", "most private memory, GB"]
    return table([*head, "optimizer's state, GB"], rows)


# What the domain teaches: from one line a run.


def kind_of(line: dict) -> str:
    """What a run of the domain trained."""
    recipe = line["sizes"]["recipe"]
    if recipe is None:
        return "donor"
    if recipe["memory"] is None:
        return "lora"
    if recipe["memory"].get("engram_hash_scheme") == "one_row":
        return "one_row"
    return "memory" if recipe["lora_lr"] is None else "both"


def comparable(lines: list[dict]) -> list[dict]:
    """The last line of every recipe and seed among those that share text, plan and memory with the last control."""
    controls = [line for line in lines if kind_of(line) == "one_row"]
    if not controls:
        return []
    last = controls[-1]["sizes"]
    shape = {name: value for name, value in last["recipe"]["memory"].items() if name != "engram_hash_scheme"}
    kept: dict[str, dict] = {}
    for line in lines:
        sizes, recipe = line["sizes"], line["sizes"]["recipe"]
        if any(sizes[name] != last[name] for name in ("donor", "tokens", "sample_tokens")):
            continue
        if recipe is not None:
            memory = recipe["memory"]
            same_shape = memory is None or {k: v for k, v in memory.items() if k != "engram_hash_scheme"} == shape
            if not same_shape or any(recipe[name] != last["recipe"][name] for name in ALIKE):
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


NOT_MEASURED = "Not measured yet: `python -m benchmarks.domain`."


class DomainRuns:
    """The runs of the domain that are put side by side.

    Args:
        lines (`list[dict]`): all lines of the domain.
    """

    def __init__(self, lines: list[dict]):
        found = comparable(lines)
        self.donor, memories, self.one_row, joined = (
            [line for line in found if kind_of(line) == kind] for kind in ("donor", "memory", "one_row", "both")
        )
        self.recipe = self.one_row[-1]["sizes"]["recipe"] if self.one_row else None
        self.memory = [line for line in memories if line["sizes"]["recipe"]["table_lr"] == self.recipe["table_lr"]]
        self.doses = [line for line in memories if same_but_rate(line, self.recipe)]
        self.rates = lora_rates(found)
        # Of the rates at the seed that all have.
        self.best = min(self.rates, key=lambda rate: losses(self.rates[rate])["held_out"][0]) if self.rates else None
        self.lora = self.rates.get(self.best, [])
        self.both = [line for line in joined if line["sizes"]["recipe"]["lora_lr"] == self.best]

    def are_enough(self) -> bool:
        """Whether there is a table to be made of them."""
        return bool(self.donor and self.memory and self.one_row)


def domain(lines: list[dict]) -> str:
    """Section of `domain`, from all its lines."""
    runs = DomainRuns(lines)
    if not runs.are_enough():
        return NOT_MEASURED
    rows = [way_row("donor", runs.donor), way_row("memory", runs.memory)]
    rows.append(way_row("control: its rows shuffled", runs.memory, "loss_shuffled"))
    rows.append(way_row("control: one row a head", runs.one_row))
    rows += [way_row(f"LoRA at {rate:g}", runs.rates[rate]) for rate in sorted(runs.rates)]
    if runs.both:
        rows.append(way_row(f"memory + LoRA at {runs.best:g}", runs.both))
    head = ["nats a token", "seeds", *SAMPLES.values(), "minutes"]
    parts = [about(runs.recipe, runs.memory[0]), table(head, rows), says(runs)]
    if len({line["sizes"]["recipe"]["table_lr"] for line in runs.doses}) > 1:
        parts += ["The dose: the learning rate of the table, all else the same.", dose_table(runs.doses, runs.donor)]
    return "\n\n".join(parts)


def domain_in_short(lines: list[dict]) -> str:
    """What the README says of `domain`, from all its lines."""
    runs = DomainRuns(lines)
    if not runs.are_enough():
        return NOT_MEASURED
    ways = {
        "donor": runs.donor,
        "memory": runs.memory,
        "control: 1 row a head": runs.one_row,
        "LoRA, rank 16": runs.lora,
        "memory + LoRA": runs.both,
    }
    shown = {name: losses(found) for name, found in ways.items() if found}
    rows = [[text, *(f"{mean(of[sample]):.3f}" for of in shown.values())] for sample, text in SAMPLES.items()]
    seeds = [len(found) for name, found in ways.items() if found and name != "donor"]
    of_seeds = f"{seeds[0]}" if len(set(seeds)) == 1 else f"{min(seeds)} to {max(seeds)}"
    tokens = runs.memory[0]["measured"]["trained"]["tokens"]
    return (
        f"{table(['nats a token', *shown], rows)}\n\n"
        f"SmolLM2-135M, {tokens:,} tokens of a computing dictionary (FOLDOC) read once, backbone frozen, mean of "
        f"{of_seeds} {'seed' if of_seeds == '1' else 'seeds'}; the FAQ and the Factbook were not read. "
        "With every control, rate and spread: [docs/training.md](docs/training.md#what-a-memory-learns-of-a-domain)."
    )


def way_row(name: str, lines: list[dict], of: str = "loss") -> list[str]:
    """A row of the table of ways."""
    measured = losses(lines, of)
    # A run with fewer threads had but a part of the machine.
    whole = [line for line in lines if line["sizes"]["threads"] == line["machine"]["cores"]]
    minutes = [line["measured"]["trained"]["minutes"] for line in whole if "trained" in line["measured"]]
    time = "" if of != "loss" or not minutes else number(mean(minutes), 2)
    return [name, str(len(lines)), *(range_text(measured[sample]) for sample in SAMPLES), time]


def lora_rates(lines: list[dict]) -> dict[float, list[dict]]:
    """Runs of LoRA alone by learning rate."""
    rates: dict[float, list[dict]] = {}
    for line in lines:
        if kind_of(line) == "lora":
            rates.setdefault(line["sizes"]["recipe"]["lora_lr"], []).append(line)
    return rates


def same_but_rate(line: dict, recipe: dict) -> bool:
    """Whether a run of the memory differs from the control's recipe by the table's rate alone."""
    mine = line["sizes"]["recipe"]
    return all(mine[name] == recipe[name] for name in mine if name not in ("table_lr", "memory"))


def dose_table(lines: list[dict], donor: list[dict]) -> str:
    """Change of the losses for each learning rate of the table, at the seed that all have."""
    seed = min(line["sizes"]["seed"] for line in lines)
    before = losses(donor[:1])
    rows = []
    for line in sorted(lines, key=lambda line: line["sizes"]["recipe"]["table_lr"]):
        if line["sizes"]["seed"] == seed:
            after, recipe = line["measured"]["loss"], line["sizes"]["recipe"]
            change = [f"{after[name] - before[name][0]:+.3f}" for name in SAMPLES]
            times = number(recipe["table_lr"] / recipe["dense_lr"])
            rows.append([f"{recipe['table_lr']:g}", times, *change])
    return table(["table lr", "times the other weights'", *SAMPLES.values()], rows)


def about(recipe: dict, line: dict) -> str:
    """What was trained, in words."""
    sizes, memory = line["sizes"], recipe["memory"]
    passes = "one pass" if recipe["passes"] == 1 else f"{recipe['passes']} passes"
    return (
        f"{sizes['donor']} on FOLDOC: {line['measured']['trained']['tokens']:,} tokens in {passes}, "
        f"{recipe['batch']} x {recipe['length']} a step, samples of {sizes['sample_tokens']:,} tokens, backbone "
        f"frozen. Memory in layers {memory['engram_layer_ids']}, {memory['engram_n_heads']} heads of about "
        f"{memory['engram_vocab_size']:,} rows x {memory['engram_head_dim']} for each order up to "
        f"{memory['engram_max_ngram_size']}; table lr {recipe['table_lr']:g}, other weights {recipe['dense_lr']:g}. "
        "Shown is the mean of the seeds, in brackets the least and the greatest; minutes are of training alone, in "
        "runs that had all cores."
    )


def says(runs: DomainRuns) -> str:
    """The four things that were to be shown."""
    donor, memory, control = (losses(lines) for lines in (runs.donor, runs.memory, runs.one_row))
    shuffled = losses(runs.memory, "loss_shuffled")
    share = {name: mean(control[name]) - mean(memory[name]) for name in ("held_out", "recall")}
    harm = max(mean(memory[name]) - mean(donor[name]) for name in ("faq", "factbook"))
    reached = max(share["held_out"] / 0.1, share["recall"] / 0.3)
    lines = [
        f"- The table's own share (control with one row minus memory): {share['held_out']:+.3f} on held-out entries, "
        f"{share['recall']:+.3f} in recall; {verdict('share', reached)}.",
        f"- With its rows shuffled the memory recalls {mean(shuffled['recall']) - mean(memory['recall']):.3f} nats "
        "worse.",
        f"- Harm of the memory on the worse of the two other domains: {harm:+.3f}; {verdict('harm', harm)}.",
    ]
    if runs.lora and runs.both:
        alone, joined = losses(runs.lora), losses(runs.both)
        less = {name: mean(alone[name]) - mean(joined[name]) for name in ("held_out", "recall")}
        lines.append(
            f"- Memory + LoRA against LoRA alone at its best rate: {-less['held_out']:+.3f} on held-out entries, "
            f"{-less['recall']:+.3f} in recall; {verdict('both', min(less.values()))}."
        )
    return "\n".join(lines)
