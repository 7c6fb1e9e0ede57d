"""Writes docs/foreign-tests.md from the last run of `make test-foreign` and the list of what is explained.

Run: python -m tests.foreign.report
"""

import json
from pathlib import Path

from .explained import EXPLAINED
from .outcomes import BACKBONES, CASES, Reason


ROOT = Path(__file__).parents[2]
FOLDER = Path("runs/foreign")
SUMMARY = "summary.json"
PAGE = ROOT / "docs" / "foreign-tests.md"

TEXT = """# Foreign tests

`make test-foreign` runs tests of Transformers and Accelerate on Engram models, and on the same models without a memory
as a control. It downloads the source archives of the installed versions from PyPI, unpacks their tests under
`runs/foreign`, and compares the outcomes test by test. The whole table is `runs/foreign/outcomes.md`. This repository
contains none of these tests. The run writes this page, and `python -m tests.foreign.report` writes it again after a
change of [explained.py](../tests/foreign/explained.py).

The run fails if a test of an Engram model fails, or is skipped where the same backbone without a memory or the stock
Llama is not, and the list below does not say why; if it fails with another message than the list says; and if the list
names a test that no longer needs it. Fewer than {least} executed tests are a failure too.

## Transformers {transformers}: ModelTesterMixin

{executed} of its tests were executed on Engram models, that is, not skipped.

| model | passed | failed, explained | skipped | control: passed | failed | skipped |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{counts}

Our cases ([mixin_cases.py](../tests/foreign/mixin_cases.py)) differ from those of a stock model in four points. They
fill tables and convolutions with random numbers, so that the memory adds something. They put our names into
Transformers' lists of classes with and without a head. If a test passes embeddings in place of ids, they pass the ids
for the memory. If a test opens `model.safetensors`, they open our first file. PyPI's archive does not contain the tests
of generation, export and single models, which the mixin only names; they are stubs. It does not contain what the mixins
for several processes need either.

All other skipped tests are skipped on the stock models too: they need a GPU, DeepSpeed, images, audio, or an option
that the configuration does not have.

### Explained

| test | models | stock, Engram | why |
| --- | --- | --- | --- |
{explained}

## accelerate {accelerate}: hooks, offload, big modelling

| run | passed | failed | skipped |
| --- | ---: | ---: | ---: |
| as they are | {plain} |
| with Engram's hook on every module of their models | {hooked} |

With the hook (called {calls} times) every test must have the same outcome as without. Those models read no text, so the
hook adds nothing. tests/integration/test_accelerate.py tests what Accelerate's hooks do to a model with a memory. The
skipped tests need a GPU.
"""


def row(*cells: object) -> str:
    """One line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def words(counts: dict[str, int]) -> list[int]:
    """Passed, failed and skipped."""
    return [counts.get(word, 0) for word in ("passed", "failed", "skipped")]


def short(case: str) -> str:
    """The model of a test case."""
    return case.removeprefix("Engram").removesuffix("Test")


def models(cases: list[str]) -> str:
    """The models of several cases, in few words."""
    if len(cases) == len(CASES):
        return "all"
    for backbone in BACKBONES:
        if cases == [case.engram for case in CASES if backbone in case.engram]:
            return f"both {backbone}"
    return ", ".join(map(short, cases))


def explained_row(key: str, reason: Reason, found: dict[str, list[str]]) -> str:
    """An entry of the list: the models that it was met on, and what became of the stock ones."""
    return row(f"`{key}`", models(found["cases"]), f"{'/'.join(found['stock'])}, {reason.word}", reason.why)


def page(summary: dict) -> str:
    """The text of docs/foreign-tests.md."""
    counts, met = summary["counts"], summary["explained"]
    return TEXT.format(
        **{name: summary[name] for name in ("transformers", "accelerate", "executed", "least", "calls")},
        counts="\n".join(
            row(short(case.engram), *words(counts[case.engram]), *words(counts[case.stock])) for case in CASES
        ),
        explained="\n".join(explained_row(key, reason, met[key]) for key, reason in EXPLAINED.items()),
        plain=" | ".join(map(str, words(summary["plain"]))),
        hooked=" | ".join(map(str, words(summary["hooked"]))),
    )


def write_page(folder: Path = FOLDER) -> None:
    """Writes the page from the summary that a run left in `folder`."""
    PAGE.write_text(page(json.loads((folder / SUMMARY).read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    write_page()
