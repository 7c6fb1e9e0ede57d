"""Makes docs/performance.md, and figures of docs/training.md and the README, from the last results of every benchmark.

Promises: the same results give the same page, byte for byte; what has not been measured is named with the command that
measures it. Never runs a benchmark and never invents a number.

Run: python -m benchmarks.publish
"""

import argparse
import sys
from pathlib import Path

from .record import RESULTS, ROOT, results_of
from .sections import SECTIONS
from .training_sections import comparable, domain, domain_in_short, training


DOCS = ROOT / "docs"
PAGE = DOCS / "performance.md"

# Pages that people write, with figures of these benchmarks between a pair of marks for each.
TRAINING_PAGE, README = DOCS / "training.md", ROOT / "README.md"
FIGURES, IN_SHORT = ("training", "domain"), ("domain in short",)
FIRST, LAST = "<!-- results of {name}: made by `python -m benchmarks.publish` -->", "<!-- end of results of {name} -->"

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


def figures(name: str, results: Path) -> str | None:
    """What stands between the marks of a benchmark; None without a result."""
    found = results_of(name.removesuffix(" in short"), results)
    if name == "domain in short":
        return domain_in_short(found) if comparable(found) else None
    if name == "domain":
        used = comparable(found)
        return f"{domain(found)}\n\n{measured_by(used[-1], used)}" if used else None
    return f"{training(found[-1])}\n\n{measured_by(found[-1])}" if found else None


def with_figures(text: str, results: Path, names: tuple[str, ...] = FIGURES) -> tuple[str, list[str]]:
    """A page with its figures put between their marks, and those that have no result.

    Raises:
        `ValueError`: if a mark is missing.
    """
    missing = []
    for name in names:
        first, last = FIRST.format(name=name), LAST.format(name=name)
        before, begun, rest = text.partition(first)
        _, ended, after = rest.partition(last)
        if not (begun and ended):
            raise ValueError(f"the page has no pair of marks '{first}' and '{last}' to put the figures between.")
        inside = figures(name, results)
        if inside is None:
            missing.append(name)
            inside = f"Not measured yet: `python -m benchmarks.{name.removesuffix(' in short')}`."
        text = f"{before}{first}\n{inside}\n{last}{after}"
    return text, missing


def measured_by(result: dict, lines: list[dict] | None = None) -> str:
    """Where and with what a result was measured, alone or as the last of several lines."""
    machine, versions = result["machine"], result["versions"]
    minutes = sum(line["took_seconds"] for line in lines or [result]) / 60
    commit, _, dirty = result["commit"].partition("+")
    hardware = (
        f"{machine['cpu']}, {machine['cores']} cores (torch's threads: {result['sizes']['threads']}), "
        f"{machine['ram_bytes'] / 1e9:.0f} GB RAM, {machine['kernel']}"
    )
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "accelerate", "safetensors"))
    return (
        f"`python -m benchmarks.{result['benchmark']}`, {result['time'][:10]}, commit {commit[:12]}"
        f"{' with changes' if dirty else ''}; {hardware}; Python {versions['python']}, {named}; "
        f"{minutes:.1f} minutes{'' if lines is None else ' in all'}."
    )


def publish(results: Path = RESULTS, docs: Path = DOCS) -> list[str]:
    """Writes the page, and the figures of those that are there; the names of benchmarks without a result."""
    text, missing = page(results)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / PAGE.name).write_text(text, encoding="utf-8")
    for written, names in ((docs / TRAINING_PAGE.name, FIGURES), (docs.parent / README.name, IN_SHORT)):
        if written.is_file():
            text, also = with_figures(written.read_text(encoding="utf-8"), results, names)
            written.write_text(text, encoding="utf-8")
            missing += [name for name in also if name in FIGURES]
    return missing


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    asked = parser.parse_args(argv)
    missing = publish(asked.results, asked.docs)
    print(asked.docs)
    if missing:
        print(f"no result yet of: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
