"""Takes a run of the demo into the documentation: docs/demo/ and the table on the README's first screen.

Usage: make docs, or python -m examples.demo.publish [RUN]

Promises: every number in the table is the report's. Never touches anything but docs/demo/ and the text between the
README's two result marks.
"""

import json
import shutil
import sys
from pathlib import Path

from .report import loss_table


ROOT = Path(__file__).parents[2]
FIRST, LAST = "<!-- results:", "<!-- end of results -->"


def publish(run: Path) -> None:
    """Copies report and picture, and writes the README's table."""
    target = ROOT / "docs" / "demo"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.md", "losses.png"):
        shutil.copyfile(run / name, target / name)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(FIRST)
    mark, _, rest = rest.partition("\n")
    _, _, after = rest.partition(LAST)
    readme.write_text(f"{before}{FIRST}{mark}\n{summary(report)}\n{LAST}{after}", encoding="utf-8")


def summary(report: dict) -> str:
    """The README's table with what made it."""
    return (
        f"{loss_table(report)}\n\n"
        f"SmolLM2-135M, {report['tokens']['train']:,} tokens of WordNet named entities in {report['tokens']['passes']} "
        f"passes, memory of {report['table']['rows']:,} rows, backbone frozen, seed {report['settings']['seed']} "
        "(`make demo`, [full report](docs/demo/report.md)). The control has one row for each head and was trained on "
        "the same tokens: it can learn style but no n-gram content."
    )


if __name__ == "__main__":
    publish(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
