"""Makes docs/performance.md from the last result of every benchmark.

Promises: the same results give the same page, byte for byte; what has not been measured is named with the command that
measures it. Never runs a benchmark and never invents a number.

Run: python -m benchmarks.publish
"""

import argparse
import sys
from pathlib import Path

from .record import RESULTS, ROOT, results_of
from .sections import SECTIONS


PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

<!-- made by `python -m benchmarks.publish` from benchmarks/results: change those, not this -->

What a memory costs, measured. `make bench` measures all but the large table in less than half an hour, `make
bench-long` that one too, and each part alone is `python -m benchmarks.<name>`; every run adds one line to
[benchmarks/results](../benchmarks/results), and this page shows the last of each.

How to read it: the ways of a comparison take turns, round by round or after a few tokens, and a ratio is taken inside a
round. Shown is the median of the rounds, in brackets the quartiles. One backbone (SmolLM2-135M) on one small machine:
the larger a backbone, the smaller the share of a memory of the same size. Where a target was set it stands beside what
was measured, reached or not. "Resident" tables are parameters of the model (`engram_placement="device"`), "on disk"
ones stay in their files and are read row by row (`"disk"`); "warm" and "cold" say whether the system's page cache had
the rows.
"""


def page(results: Path) -> tuple[str, list[str]]:
    """The page, and the names of benchmarks without a result."""
    missing, parts = [], [HEAD]
    for name, (title, section) in SECTIONS.items():
        found = results_of(name, results)
        parts.append(f"## {title}\n")
        if found:
            parts += [section(found[-1]) + "\n", measured_by(found[-1]) + "\n"]
        else:
            missing.append(name)
            parts.append(f"Not measured yet: `python -m benchmarks.{name}`.\n")
    return "\n".join(parts), missing


def measured_by(result: dict) -> str:
    """Where and with what a result was measured."""
    machine, versions = result["machine"], result["versions"]
    commit, _, dirty = result["commit"].partition("+")
    hardware = (
        f"{machine['cpu']}, {machine['cores']} cores (torch's threads: {result['sizes']['threads']}), "
        f"{machine['ram_bytes'] / 1e9:.0f} GB RAM, {machine['kernel']}"
    )
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "accelerate", "safetensors"))
    return (
        f"`python -m benchmarks.{result['benchmark']}`, {result['time'][:10]}, commit {commit[:12]}"
        f"{' with changes' if dirty else ''}; {hardware}; Python {versions['python']}, {named}; "
        f"{result['took_seconds'] / 60:.1f} minutes."
    )


def publish(results: Path = RESULTS, target: Path = PAGE) -> list[str]:
    """Writes the page; the names of benchmarks without a result."""
    text, missing = page(results)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return missing


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(argv)
    missing = publish(asked.results, asked.page)
    print(asked.page)
    if missing:
        print(f"no result yet of: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
