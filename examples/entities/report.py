"""What the example writes down: report.json, report.md, and the checkpoint's model card.

Promises: every number comes from the run's measurements; what was not measured is said to be so. Never rounds in JSON.
"""

import json
from pathlib import Path

from benchmarks.record import commit, machine, versions
from engram_transformers.model_cards import write_model_card


KINDS = {
    "recall": "training entries (recall)",
    "held_out": "held-out entries",
    "other_domain": "World Factbook (other domain)",
}
COLUMNS = {"before": "donor", "after": "with memory", "memory_off": "memory off", "control": "control: 1 row a head"}


def write_report(out: Path, report: dict) -> None:
    """Completes the report with versions and machine and writes all files.

    Args:
        out (`Path`): the run's folder.
        report (`dict`): measurements, as `examples.entities` makes them.
    """
    report |= {"versions": versions(), "commit": commit(), "machine": machine(out)}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(as_markdown(report), encoding="utf-8")
    write_model_card(out / "checkpoint", base_model=report["donor"], results=loss_table(report), text=how_made(report))


def loss_table(report: dict) -> str:
    """Losses as a Markdown table."""
    lines = ["| nats a token | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for kind, label in KINDS.items():
        values = report["losses"][kind]
        cells = ["not measured" if values[name] is None else f"{values[name]:.4f}" for name in COLUMNS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def how_made(report: dict) -> str:
    """One paragraph on how the memory was taught."""
    tokens, table = report["tokens"], report["table"]
    return (
        f"The memory has {table['rows']:,} rows ({table['bytes']:,} bytes). It was taught {tokens['train']:,} tokens "
        f"of WordNet named entities in {tokens['passes']} pass(es); the backbone's own weights were not trained. "
        f"Losses are over {tokens['sample']:,} tokens of each text, seed {report['settings']['seed']}."
    )


def as_markdown(report: dict) -> str:
    """The report for a reader."""
    answers = ["| prompt | the entry says | before | after, reloaded |", "| --- | --- | --- | --- |"]
    for row in report["completions"]:
        answers.append(
            "| " + " | ".join(row[key].replace("|", "/") for key in ("prompt", "entry", "before", "after")) + " |"
        )
    seconds = ", ".join(f"{step} {value:.0f}" for step, value in report["seconds"].items())
    machine = report["machine"]
    return "\n\n".join(
        [
            f"# {report['donor']} with an Engram memory",
            how_made(report),
            loss_table(report),
            "## Ten prompts",
            "\n".join(answers),
            "## How",
            f"`python -m examples.entities` at {report['commit']} on {machine['cores']} cores "
            f"({machine['cpu']}). Seconds: {seconds}.",
            "Memory: `" + json.dumps(report["memory"]) + "`. Training: `" + json.dumps(report["settings"]) + "`.",
            "Versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".\n",
        ]
    )
