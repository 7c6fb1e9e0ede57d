"""Puts figures into pages of docs/ (performance, training, packs): one renderer, and as data what it shows.

Promises: the last result of a benchmark gives the same text every time; what has not been measured is named with the
command that measures it; a block whose values a result does not have is left out. Never measures anything, and changes
nothing but the text between a pair of marks.

Run: python -m benchmarks.publish
"""

import string
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .record import RESULTS, ROOT, lines_of


PAGES = ("performance.md", "training.md", "packs.md", "surgery.md")
FIRST, LAST = "<!-- results of {} -->", "<!-- end of results of {} -->"
SCALES = {"n": 1.0, "%": 100.0, "GB": 1e-9, "MiB": 2.0**-20, "ms": 1e3}


class Figures(string.Formatter):
    """`str.format` with units: `{seconds:n}`, `{speed_ratio:%}`, `{table_bytes:GB}`; a spread shows its quartiles."""

    def format_field(self, value, spec: str) -> str:
        """One value in a template."""
        if spec not in SCALES:
            return super().format_field(value, spec)
        shown = (lambda x: f"{100 * x:.1f}") if spec == "%" else (lambda x: number(SCALES[spec] * x))
        if isinstance(value, dict):
            return f"{shown(value['median'])} ({shown(value['q1'])} to {shown(value['q3'])})"
        return shown(value)


FIGURES = Figures()


def number(value: float, digits: int = 3) -> str:
    """A number for a reader: this many significant digits, thousands apart, no exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{value:#.{digits}g}".rstrip(".") if rounded else "0"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


@dataclass(frozen=True)
class Table:
    """A table of a result.

    Args:
        rows (`str`): path of the entry whose items are the rows; every match of a "*" in it gives a table.
        first (`str`): head of the first column; `{0}` is what the first "*" stands for.
        columns (`str`): names of the others, from `COLUMNS`.
    """

    rows: str
    first: str
    columns: str

    def show(self, line: dict) -> str:
        """All tables; KeyError if there is none."""
        columns = [COLUMNS[name] for name in self.columns.split()]
        tables = []
        for labels, entry in matches(line, self.rows.split("/")):
            rows = [[NAMES.get(name, name), *(cell(text, row) for _, text in columns)] for name, row in entry.items()]
            head = [self.first.format(*labels), *(head for head, _ in columns)]
            tables.append(table(head, [row for row in rows if any(row[1:])]))
        if not tables:
            raise KeyError(self.rows)
        return "\n\n".join(tables)


def cell(template: str, entry: dict) -> str:
    """A template with the values of a row; empty where the row has none."""
    try:
        return FIGURES.format(template, **entry)
    except KeyError:
        return ""


def matches(entry, path: list[str]) -> Iterator[tuple[list[str], dict]]:
    """Entries at a path, with what its "*" stand for."""
    if not path:
        yield [], entry
    elif isinstance(entry, dict):
        for name in entry if path[0] == "*" else [path[0]]:
            for labels, found in matches(entry.get(name), path[1:]) if name in entry else ():
                yield [name, *labels] if path[0] == "*" else labels, found


# Columns of tables: head, and a template that sees the row's entry.
COLUMNS = {
    "per_second": ("tokens/s", "{per_second:n}"),
    "share": ("% of the donor's speed", "{speed_ratio:%}"),
    "smallest": ("times the smallest", "{times_the_smallest:n}"),
    "bytes": ("bytes to the device", "{bytes:,}"),
    "copies": ("copies", "{copies}"),
    "of_rows": ("bytes a byte of rows", "{of_rows_read:n}"),
    "warm": ("warm", "{warm:n}"),
    "cold": ("cold", "{cold:n}"),
    "ours": ("ours", "{times_the_donor[ours]:n}"),
    "theirs": ("engram-peft", "{times_the_donor[theirs]:n}"),
    "theirs_over_ours": ("theirs / ours", "{theirs_over_ours:n}"),
    "seconds": ("seconds a step", "{seconds:n}"),
    "held": ("most private memory, GB", "{peak_anonymous:GB}"),
    "state": ("optimizer's state, GB", "{state_bytes:GB}"),
    "full": ("times all weights", "{times_full:n}"),
    "lora": ("times LoRA", "{times_lora:n}"),
    "more": ("MiB more after it", "{more:MiB}"),
    "most": ("most meanwhile, MiB", "{most:MiB}"),
    "touched": ("values in touched rows", "{touched_values:,}"),
    "table": ("table, GB", "{table_bytes:GB}"),
}
NAMES = {
    "full": "all weights, AdamW",
    "lora": "LoRA",
    "memory on disk": "memory, table on disk",
    "both": "memory + LoRA",
}
MEMORY = (
    "Memory: {sizes[rows]:,} rows of {sizes[row_bytes]} bytes ({sizes[table_bytes]:GB} GB, {sizes[table_dtype]}), "
    "layers {sizes[layers]}, orders {sizes[orders]}, {sizes[heads]} heads."
)
SPEED = Table("measured/by_backbone_dtype/*", "backbone {0}", "per_second share")

WAYS_OF_FACTS = {
    "pack": "knowledge pack",
    "permuted": "control: its vectors dealt to other n-grams",
    "random": "control: random vectors of their size",
    "rows": "hashed rows alone",
    "memory": "hashed rows and projections",
    "solve": "knowledge pack, solved",
    "lora": "LoRA, rank 16",
    "prompt": "the facts in the prompt",
}


HARDER = {
    "two_facts": "two facts in one question",
    "after_a_paragraph": "after a paragraph",
    "name_far_back": "name a paragraph before",
    "in_german": "in German",
}


def facts(results: list[dict]) -> str:
    """A table with a row for each way of teaching, from all results."""
    head = (
        "way, people, seed|taught phrasings|unseen phrasings|unseen, among candidates|loss of general text|"
        "general texts identical|KL of text about a subject|seconds"
    )
    rows = {}
    for line in results:
        found = line["measured"]
        other = found.get("other_texts", {})
        general, about = other.get("general"), other.get("about_a_subject")
        rows[taught_as(line["sizes"])] = [
            f"{found['taught']['right']:.3f}",
            f"{found['unseen']['right']:.3f}",
            f"{found['unseen']['right_among_candidates']:.3f}",
            f"{general['loss_before']:.3f} to {general['loss']:.3f}" if general else "",
            f"{general['texts_identical'] * general['texts']:.0f} of {general['texts']}" if general else "",
            f"{about['kl']:.2f}" if about else "",
            f"{found['seconds']:.0f}" if "seconds" in found else "",
        ]
    return table(head.split("|"), [[way, *row] for way, row in rows.items()])


def harder_facts(results: list[dict]) -> str:
    """The same rows with the right answers to harder questions; KeyError if no result has them."""
    rows = {
        taught_as(line["sizes"]): [
            f"{line['measured']['harder'][kind]['right']:.3f}" if kind in line["measured"]["harder"] else ""
            for kind in HARDER
        ]
        for line in results
        if "harder" in line["measured"]
    }
    if not rows:
        raise KeyError("harder")
    return table(["harder questions", *HARDER.values()], [[way, *row] for way, row in rows.items()])


def transplants(results: list[dict]) -> str:
    """A table with a row for each seed and table under the reader, from all results."""
    rows = []
    for line in results:
        for name, losses in line["measured"].items():
            who = name if name in ("donor", "its own reader") else f"{name}, seed {line['sizes']['seed']}"
            row = [who, *(f"{loss:.3f}" for loss in losses.values())]
            rows += [row] if row not in rows else []
    return table(["table", *results[0]["measured"]["donor"]], rows)


def taught_as(sizes: dict) -> str:
    """A way of teaching, how much it taught, and what is not the benchmark's default."""
    way = WAYS_OF_FACTS[sizes["arm"]] + (f" at {sizes['rate']:g}" if sizes["rate"] else "")
    kind = " real facts" if sizes.get("facts") == "real" else ""
    passes = "" if sizes["passes"] == 6 else f", {sizes['passes']} passes"
    layers = "" if sizes.get("layers", [4, 10]) == [4, 10] else f", layers {' and '.join(map(str, sizes['layers']))}"
    return f"{way}, {sizes['people']}{kind}, {sizes['seed']}{passes}{layers}"


# Name between marks: benchmark, path that its result must have, and blocks of text.
SECTIONS: dict[str, tuple[str, str, list[str | Table | Callable[[list[dict]], str]]]] = {
    "facts": ("facts", "measured", [facts, harder_facts]),
    "transplant": (
        "transplant",
        "measured",
        [
            "SmolLM2-135M, layers {sizes[layers]}, {sizes[rows]:,} rows a head of {sizes[head_dim]} values. The memory "
            "learned the World Factbook in {sizes[steps]} steps of {sizes[batch]} x {sizes[length]} tokens; fresh "
            "readers learned one half of it in {sizes[reader_steps]} steps at a rate of {sizes[reader_rate]}, over "
            "frozen rows. Losses in nats a token:",
            transplants,
        ],
    ),
    "decode": (
        "decode",
        "measured",
        ["{sizes[tokens_a_round]} tokens a round, batch {sizes[batch]}. " + MEMORY, SPEED],
    ),
    "prefill": ("prefill", "measured", ["{sizes[tokens]:,} tokens, batch {sizes[batch]}. " + MEMORY, SPEED]),
    "big": (
        "big",
        "measured",
        [
            "On disk: {sizes[on_disk][rows]:,} rows of {sizes[on_disk][row_bytes]} bytes "
            "({sizes[on_disk][table_bytes]:GB} GB); resident: {sizes[resident][table_bytes]:GB} GB. The processes had "
            "a limit of {sizes[cap_bytes]:GB} GB, page cache included, and used at most "
            "{measured[load][group_peak_bytes]:GB} GB (load), {measured[prefill][group_peak_bytes]:GB} GB (prefill) "
            "and {measured[decode][group_peak_bytes]:GB} GB (decode).",
            "Loading takes {measured[load][seconds][big]:n} s, {measured[load][times_the_donor]:n} times the donor's. "
            "The process then holds {measured[load][anonymous_bytes][big]:GB} GB of private memory, the donor's "
            "{measured[load][anonymous_bytes][donor]:GB} GB.",
            Table("measured/*/speeds", "{0}", "per_second share"),
            Table(
                "measured/*/cold/speeds", "{0}, after the files were dropped from the page cache", "per_second share"
            ),
        ],
    ),
    "offload sizes": (
        "offload",
        "measured/sizes",
        [
            Table("measured/sizes/decode", "rows, place", "per_second share smallest"),
            "After the files were dropped from the page cache:",
            Table("measured/sizes/decode_cold", "rows, place", "per_second share"),
        ],
    ),
    "offload bytes": (
        "offload",
        "measured/bytes",
        [MEMORY, Table("measured/bytes/*/ways", "{0}", "bytes copies of_rows")],
    ),
    "offload reading": (
        "offload",
        "measured/reading",
        [
            "Rows of {sizes[row_bytes]} bytes out of a file of {sizes[file_bytes]:GB} GB, microseconds a row.",
            Table("measured/reading/*", "{0}", "warm cold"),
        ],
    ),
    "peer": ("peer", "measured/forward", [Table("measured", "times the donor", "ours theirs theirs_over_ours")]),
    "peer step": (
        "peer",
        "measured/step",
        [
            Table("measured/step/sides", "a training step", "seconds held state"),
            "engram-peft takes {measured[step][theirs_over_ours]:n} times as long as our step, and "
            "{measured[step][theirs_over_ours_on_disk]:n} times as long as ours with the table on disk.",
        ],
    ),
    "training": (
        "training",
        "measured",
        [
            "{sizes[batch]} sequences of {sizes[length]} tokens a step, {sizes[precision]}; LoRA has rank "
            "{sizes[lora_rank]}. " + MEMORY,
            Table("measured/ways", "what learns", "seconds full lora held state"),
            "Private memory of the first update, in a fresh process whose allocator keeps nothing back:",
            Table("measured/first_step", "table on", "more most touched"),
            "Tables of many sizes, on disk, rows of {sizes[width_of_sizes]} values:",
            Table("measured/sizes", "rows", "table seconds smallest held state"),
        ],
    ),
}


def figures(name: str, results: Path = RESULTS) -> str | None:
    """What stands between the marks of a section; None without a result."""
    benchmark, needed, blocks = SECTIONS[name]
    found = [line for line in lines_of(results / f"{benchmark}.jsonl") if list(matches(line, needed.split("/")))]
    if not found:
        return None
    shown = []
    for block in blocks:
        try:
            if isinstance(block, str):
                shown.append(FIGURES.format(block, **found[-1]))
            else:
                shown.append(block.show(found[-1]) if isinstance(block, Table) else block(found))
        except KeyError:
            continue
    return "\n\n".join([*shown, measured_by(found[-1])])


def measured_by(result: dict) -> str:
    """Where and with what a result was measured."""
    machine, versions = result["machine"], result["versions"]
    commit, _, dirty = result["commit"].partition("+")
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "accelerate", "safetensors"))
    return (
        f"{result['benchmark']}, {result['time'][:10]}, commit {commit[:12]}"
        f"{' with changes' if dirty else ''}; {machine['cpu']}, {machine['cores']} cores (torch's threads: "
        f"{result['sizes']['threads']}), {machine['ram_bytes'] / 1e9:.0f} GB RAM, {machine['kernel']}; Python "
        f"{versions['python']}, {named}."
    )


def put(text: str, name: str, inside: str) -> str:
    """A page with the text between one pair of marks replaced; ValueError if a mark is missing."""
    first, last = FIRST.format(name), LAST.format(name)
    before, begun, rest = text.partition(first)
    _, ended, after = rest.partition(last)
    if not (begun and ended):
        raise ValueError(f"the page has no pair of marks '{first}' and '{last}'.")
    return f"{before}{first}\n{inside}\n{last}{after}"


def publish(results: Path = RESULTS, pages: Iterable[Path] | None = None) -> list[str]:
    """Fills in the sections of the pages; names of sections without a result."""
    missing = []
    for page in pages or [ROOT / "docs" / name for name in PAGES]:
        text = page.read_text(encoding="utf-8")
        for name, (benchmark, _, _) in SECTIONS.items():
            if FIRST.format(name) in text:
                inside = figures(name, results)
                if inside is None:
                    missing.append(name)
                    inside = f"Not measured yet ({benchmark})."
                text = put(text, name, inside)
        page.write_text(text, encoding="utf-8")
    return missing


if __name__ == "__main__":
    for name in publish():
        print(f"no result yet of: {name}", file=sys.stderr)
