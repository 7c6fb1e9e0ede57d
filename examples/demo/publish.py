"""Takes a run of the demo into the documentation: docs/demo/ and the table on the README's first screen.

Usage: make docs, or python -m examples.demo.publish [RUN]

Promises: every number in the table is the report's. Never touches anything but docs/demo/ and the text between the
README's two result marks.
"""

import json
import shutil
import sys
from pathlib import Path

from .report import counted, identical_texts, ten_table


ROOT = Path(__file__).parents[2]
FIRST, LAST = "<!-- results:", "<!-- end of results -->"


def publish(run: Path) -> None:
    """Copies report and picture, and writes the README's table."""
    target = ROOT / "docs" / "demo"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.md", "answers.png"):
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
    facts, first, same = report["facts"], report["first"], report["identical"]
    others = report["factbook"]["naming none"]
    return (
        f"{ten_table(report)}\n\n"
        f"SmolLM2-135M was taught {facts['first']} facts of WordNet that it did not know, in "
        f"{report['seconds']['teach'] / 60:.1f} minutes on {report['machine']['cores']} cores. Right answers in the "
        f"phrasings that were taught: {counted(first['with its pack']['taught'])}; in phrasings that were not: "
        f"{counted(first['with its pack']['unseen'])}; before: "
        f"{first['before']['unseen']['right']}. "
        f"{identical_texts(others)} texts of the World Factbook that name no subject "
        f"keep their logits bit for bit. After another pack was swapped in and out, "
        f"{same['after_the_second_pack']} of {same['texts']} questions have the same logits as before "
        "(`make demo`, [full report](docs/demo/report.md))."
    )


if __name__ == "__main__":
    publish(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
