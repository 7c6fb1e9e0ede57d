"""`make test-versions`: the core tests on other versions than the locked ones, and checkpoints between them.

Run: python -m tests.versions [NAME ...], with names of VERSIONS; all by default. `latest` is run only when it is named.
"""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .environments import FOLDER, layered, whole


# uv takes the lowest version of what setup.py and the tests name, and the newest of what only these ask for.
VERSIONS = {
    "5.20.2": lambda: layered("5.20.2"),
    "5.22.2": lambda: layered("5.22.2"),
    "5.24.0": lambda: layered("5.24.0"),
    "3.12": lambda: whole("3.12", "3.12", "--constraint", "requirements/lock.txt"),
    "oldest": lambda: whole("oldest", "3.10", "--resolution", "lowest-direct"),
    "newest": lambda: whole("newest", "3.13", "transformers==5.24.*"),
    "latest": lambda: whole("latest", "3.13", "--upgrade", "--override", "requirements/latest.txt"),
}
ASKED = ("torch", "transformers", "accelerate", "peft", "numpy")
QUESTION = f"""
import importlib.metadata, json, platform
print(json.dumps({{"python": platform.python_version(), **{{n: importlib.metadata.version(n) for n in {ASKED}}}}}))
"""
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ENGRAM_LOCK": ""}


def core_tests(python: Path, results: Path) -> dict[str, int]:
    """Runs the core tests and counts what came of them.

    Args:
        python (`Path`): of the environment.
        results (`Path`): the file that pytest writes.

    Returns:
        `dict[str, int]`: "passed", "failed" and "skipped".
    """
    results.unlink(missing_ok=True)
    workers = os.environ.get("WORKERS", "2")
    # Files without one are not even imported: they need packages that not every environment has.
    files = [path for path in sorted(Path("tests").rglob("test_*.py")) if "pytest.mark.core" in path.read_text()]
    command = [python, "-m", "pytest", "-m", "core", "-n", workers, "--dist", "worksteal", f"--junitxml={results}"]
    code = subprocess.run([*command, *files], env=OFFLINE).returncode
    if not results.exists():
        raise SystemExit(f"pytest ended with {code} and left no {results}")
    suite = ElementTree.parse(results).getroot().find("testsuite").attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    if code and not failed:
        raise SystemExit(f"pytest ended with {code} and no test failed")
    return {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}


def exchanged(python: Path, name: str) -> int:
    """Checkpoints that one of two environments saved and the other one could not load: 0, 1 or 2."""
    failed = 0
    for saver, loader, way in ((sys.executable, python, "to"), (python, sys.executable, "from")):
        folder = FOLDER / f"checkpoint-{way}-{name}"
        for by, does in ((saver, "save"), (loader, "load")):
            if subprocess.run([by, "-m", "tests.versions.checkpoint", does, folder], env=OFFLINE).returncode:
                print(f"checkpoint {way} {name}: {by} cannot {does} it", flush=True)
                failed += 1
                break
    return failed


def main(names: list[str]) -> int:
    """Returns 1 if anything failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names or [name for name in VERSIONS if name != "latest"]:
        began = time.monotonic()
        python = VERSIONS[name]()
        row = {"name": name, **json.loads(subprocess.check_output([python, "-c", QUESTION]))}
        print(row, flush=True)
        row |= core_tests(python, FOLDER / f"{name}.xml")
        row["checkpoints_failed"] = exchanged(python, name)
        row["minutes"] = round((time.monotonic() - began) / 60, 1)
        rows.append(row)
        Path("runs/versions.json").write_text(json.dumps(rows, indent=1) + "\n")
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))
    return int(any(row["failed"] or row["checkpoints_failed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
