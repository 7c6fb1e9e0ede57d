"""`make test-foreign`: lays out, runs, compares, and writes what came of it.

Run: python -m tests.foreign
"""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version

from .explained import EXPLAINED
from .layout import lay_out
from .outcomes import CASES, Outcomes, complaints, count_words, differences, executed, explanation, read_outcomes
from .report import FOLDER, SUMMARY, row, write_page


LEAST_EXECUTED = 150  # of Transformers' tests, on Engram models
MOST_LINES = 30  # of complaints on the screen
ACCELERATE_TESTS = ["tests/test_hooks.py", "tests/test_offload.py", "tests/test_big_modeling.py"]

# The Hub is not asked for anything; the list of what is explained is one of a CPU; with one thread models so small run
# faster, and their sums come out the same.
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_TEST_DEVICE": "cpu"}


def run_tests(package: str, name: str, *arguments: str) -> Outcomes:
    """Runs foreign tests in their own folder.

    Args:
        package (`str`): whose tests.
        name (`str`): of the files that the run leaves: `name.xml` and `name.log`.
        arguments (`str`): for pytest.

    Returns:
        Outcomes by test case and test.
    """
    results, log = FOLDER.resolve() / f"{name}.xml", FOLDER / f"{name}.log"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", f"--junitxml={results}", *arguments]
    began = time.monotonic()
    print(f"{name}: running, see {log}", flush=True)
    with log.open("w") as file:
        subprocess.run(command, cwd=FOLDER / package, env={**os.environ, **SETTINGS}, stdout=file, stderr=file)
    print(
        f"{name}: {log.read_text().strip().splitlines()[-1].strip('= ')} ({time.monotonic() - began:.0f} s)", flush=True
    )
    if not results.exists():
        raise SystemExit(f"pytest ended before it ran a test: see {log}.")
    return read_outcomes(results)


def outcome_table(outcomes: Outcomes) -> str:
    """Every test with its outcome on the stock and on the Engram models."""
    lines = [row("model", "test", "stock", "Engram"), row(*["---"] * 4)]
    for case in CASES:
        for test, outcome in sorted(outcomes[case.engram].items()):
            lines.append(row(case.engram, test, outcomes[case.stock][test].word, outcome.word))
    return "\n".join(lines) + "\n"


def met(outcomes: Outcomes) -> dict[str, dict[str, list[str]]]:
    """For every entry of the list, the cases that it was met on and the outcomes of their stock models."""
    stock = {case.engram: case.stock for case in CASES}
    found = {key: {"cases": [], "stock": []} for key in EXPLAINED}
    for case, test, _ in differences(outcomes):
        if key := explanation(case, test, EXPLAINED):
            for name, value in (("cases", case), ("stock", outcomes[stock[case]][test].word)):
                if value not in found[key][name]:
                    found[key][name].append(value)
    return found


def hook_complaints(plain: Outcomes, hooked: Outcomes) -> list[str]:
    """What came out differently on models that carry Engram's hook, and every failure."""
    names = {(case, test) for outcomes in (plain, hooked) for case in outcomes for test in outcomes[case]}
    found = []
    for case, test in sorted(names):
        words = [outcomes.get(case, {}).get(test, ("missing",))[0] for outcomes in (plain, hooked)]
        if words[0] != words[1] or words[0] not in ("passed", "skipped"):
            found.append(f"accelerate {case}::{test}: {words[0]} as it is, {words[1]} with Engram's hook.")
    return found


def main() -> int:
    lay_out(FOLDER)
    plain = run_tests("accelerate", "accelerate", *ACCELERATE_TESTS)
    hooked = run_tests("accelerate", "accelerate-hooked", "-p", "hooked_models", *ACCELERATE_TESTS)
    calls = re.search(r"Engram hooks called: (\d+)", (FOLDER / "accelerate-hooked.log").read_text())
    outcomes = run_tests("transformers", "transformers", "--tb=short", "tests/test_engram.py")
    found = complaints(outcomes, EXPLAINED) + hook_complaints(plain, hooked)
    ran = sum(executed(outcomes.get(case.engram, {})) for case in CASES)
    if ran < LEAST_EXECUTED:
        found.append(f"only {ran} of Transformers' tests were executed on Engram models, {LEAST_EXECUTED} are wanted.")
    if calls is None or calls[1] == "0":
        found.append("no hook was called in accelerate's tests.")
    print(f"{ran} of Transformers' tests executed on Engram models", flush=True)
    if found:
        (FOLDER / "complaints.txt").write_text("\n".join(found) + "\n", encoding="utf-8")
        print("\n".join(found[:MOST_LINES]))
        print(f"{len(found)} complaints, all of them in {FOLDER / 'complaints.txt'}")
        return 1
    (FOLDER / "outcomes.md").write_text(outcome_table(outcomes), encoding="utf-8")
    summary = {
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
        "executed": ran,
        "least": LEAST_EXECUTED,
        "counts": {case: dict(count_words(tests)) for case, tests in outcomes.items()},
        "explained": met(outcomes),
        "plain": dict(count_words({(case, test): o for case in plain for test, o in plain[case].items()})),
        "hooked": dict(count_words({(case, test): o for case in hooked for test, o in hooked[case].items()})),
        "calls": int(calls[1]),
    }
    (FOLDER / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    write_page()
    print("every difference from the stock models is explained: docs/foreign-tests.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
