"""What a result says about itself: machine, versions, commit; and the file that it is added to.

Promises: one result is one line of JSON, after all earlier lines. Never changes a line that is there.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "engram-transformers")

# What a run itself writes; it does not make the commit that was measured another one.
WRITTEN_BY_RUNS = ("benchmarks/results", "examples/domain/results.jsonl", "docs", "README.md")


def machine(folder: Path) -> dict:
    """Processor, cores, RAM, kernel, and the free disk where `folder` is."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }


def processor() -> str:
    """The processor's name, with family and model where the name alone is a generic one."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in lines}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a measurement depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(root: Path = ROOT) -> str:
    """The commit that is measured, "+dirty" if files differ from it; results and what is made of them do not count."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ".", *[f":(exclude){path}" for path in WRITTEN_BY_RUNS])
        return git("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"


def line(name: str, sizes: dict, measured: dict, folder: Path, seconds: float) -> dict:
    """A result as it is printed and kept."""
    return {
        "benchmark": name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine(folder),
        "versions": versions(),
        "sizes": sizes,
        "measured": measured,
        "took_seconds": round(seconds, 1),
    }


def append(result: dict, path: Path) -> Path:
    """Adds a line to a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def lines_of(path: Path) -> list[dict]:
    """All lines of a file of results, oldest first."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
