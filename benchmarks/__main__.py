"""All quick benchmarks one after the other, each in a process of its own, then the pages of their figures.

What cannot run here (no compiler, no package index, no room) is named at the end, and the others run all the same.

Run: python -m benchmarks, or `make bench`; python -m benchmarks decode hash for some of them
"""

import argparse
import subprocess
import sys
import time

from .publish import publish
from .record import ROOT


# Minutes of measuring after which no further round begins; with making and filling tables, under half an hour in all.
QUICK = {"decode": 4, "prefill": 4, "hash": 2, "placements": 2, "scale": 3, "hooks": 2, "peer": 2, "training": 6}


def run_all(names: list[str], further: list[str]) -> list[str]:
    """Runs benchmarks by name; the names of those that failed."""
    failed = []
    for name in names:
        begun = time.monotonic()
        print(f"== {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--minutes", str(QUICK[name]), *further]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
        print(f"== {name}: {(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr, flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit status is the number of benchmarks that could not run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(QUICK)}; all of them by default")
    asked, further = parser.parse_known_args(argv)
    unknown = [name for name in asked.names if name not in QUICK]
    if unknown:
        parser.error(f"no quick benchmark is called {', '.join(unknown)}: choose from {', '.join(QUICK)}.")
    failed = run_all(asked.names or list(QUICK), further)
    missing = publish()
    for what, found in (("failed", failed), ("no result yet of", missing)):
        if found:
            print(f"{what}: {', '.join(found)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
