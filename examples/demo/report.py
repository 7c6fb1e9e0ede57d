"""What the demo writes down: report.json, report.md with one picture, and the checkpoint's model card.

Promises: every number comes from the run's measurements; what was not measured is said to be so. Never rounds in JSON.
"""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

from engram_transformers.model_cards import write_model_card


KINDS = {
    "recall": "training entries (recall)",
    "held_out": "held-out entries",
    "other_domain": "World Factbook (other domain)",
}
COLUMNS = {"before": "donor", "after": "with memory", "memory_off": "memory off", "control": "control: 1 row a head"}
PACKAGES = ("engram-transformers", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


def write_report(out: Path, report: dict) -> None:
    """Completes the report with versions and machine and writes all files.

    Args:
        out (`Path`): the run's folder.
        report (`dict`): measurements, as `examples.demo` makes them.
    """
    report["versions"] = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    report["commit"] = commit()
    report["machine"] = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, out / "losses.png")
    (out / "report.md").write_text(as_markdown(report), encoding="utf-8")
    write_model_card(out / "checkpoint", base_model=report["donor"], results=loss_table(report), text=how_made(report))


def commit() -> str:
    """Commit of the checkout that was run, marked if it had been changed; "unknown" outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def draw(report: dict, path: Path) -> None:
    """One bar for every text and every model."""
    columns = [name for name in COLUMNS if report["losses"]["recall"][name] is not None]
    figure, axis = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(columns)
    for place, name in enumerate(columns):
        heights = [report["losses"][kind][name] for kind in KINDS]
        bars = axis.bar([k + place * width for k in range(len(KINDS))], heights, width, label=COLUMNS[name])
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set_xticks([k + 0.4 - width / 2 for k in range(len(KINDS))], KINDS.values())
    axis.set_ylabel("loss, nats a token (lower is better)")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(columns), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
            "![losses](losses.png)",
            "## Ten prompts",
            "\n".join(answers),
            "## How",
            f"`python -m examples.demo` at {report['commit']} on {machine['cores']} cores "
            f"({machine['processor']}). Seconds: {seconds}.",
            "Memory: `" + json.dumps(report["memory"]) + "`. Training: `" + json.dumps(report["settings"]) + "`.",
            "Versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".\n",
        ]
    )
