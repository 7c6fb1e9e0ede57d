"""The benchmarks of `make bench`, each in its own process, then the pages of their figures.

Run: python -m benchmarks; python -m benchmarks speed offload for some of them
"""

import subprocess
import sys

from .publish import publish
from .record import ROOT


# Minutes of measuring after which no further round starts; with making and filling tables, under half an hour in all.
QUICK = {"speed": 6, "offload": 5, "training": 6}


def main(names: list[str]) -> int:
    """Runs benchmarks by name; the number of those that failed."""
    failed = []
    for name in names or list(QUICK):
        if name not in QUICK:
            sys.exit(f"'{name}' is not one of {', '.join(QUICK)}: run it as python -m benchmarks.{name}.")
        print(f"== {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--minutes", str(QUICK[name])]
        failed += [name] if subprocess.run(command, cwd=ROOT).returncode else []
    for what, found in (("failed", failed), ("no result yet of", publish())):
        print(f"{what}: {', '.join(found) or 'nothing'}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
