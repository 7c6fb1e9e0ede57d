"""The comparison that `make test-foreign` ends with finds what is worse on an Engram model, and entries out of date.

The foreign tests themselves need the archives of Transformers and accelerate; these do not.
Run: pytest tests/foreign/test_outcomes.py
"""

import io
import tarfile

import pytest

from .__main__ import hook_complaints
from .layout import unpack_tests
from .outcomes import CASES, Outcome, Reason, complaints, count_words, executed, read_outcomes


PASSED, SKIPPED = Outcome("passed"), Outcome("skipped", ("no GPU",))
FAILED = Outcome("failed", ("ValueError: cannot shrink", "ValueError: cannot shrink either"))
BROKEN = Outcome("broken", ("failed on setup",))
LLAMA, V4 = CASES[0], CASES[2]
SHRINKS = {"test_x": Reason("failed", "cannot shrink", "because", (LLAMA.engram,))}


def run_of(engram: Outcome = PASSED, stock: Outcome = PASSED, case=LLAMA) -> dict:
    """Outcomes of two tests on all models: both passed, but for `test_x` of one case."""
    names = {name for case in CASES for name in case}
    outcomes = {name: {"test_x": PASSED, "test_y": PASSED} for name in names}
    outcomes[case.engram]["test_x"] = engram
    outcomes[case.stock]["test_x"] = stock
    return outcomes


NO_WORSE = {
    "both pass": run_of(),
    "Llama itself skips it": run_of(SKIPPED, SKIPPED),
    "only the stock model fails": run_of(PASSED, FAILED),
    "only the stock model skips it": run_of(PASSED, SKIPPED),
}
WORSE = {
    "fails": run_of(FAILED),
    "fails like the stock model": run_of(FAILED, FAILED),
    "does not begin": run_of(BROKEN, BROKEN),
    "skipped": run_of(SKIPPED),
    "skipped where the stock model fails": run_of(SKIPPED, FAILED),
    "skipped like its backbone, but Llama is not": run_of(SKIPPED, SKIPPED, V4),
}


@pytest.mark.parametrize("name", [*NO_WORSE, *WORSE])
def test_what_is_worse_than_on_the_stock_model_needs_an_explanation_and_nothing_else(name):
    found = complaints({**NO_WORSE, **WORSE}[name], {})
    assert len(found) == (name in WORSE)
    assert all("test_x" in line and "no entry explains it" in line for line in found)


EVERYWHERE = {"test_x": Reason("failed", "cannot shrink", "because")}
EXPLANATIONS = {
    "as it says": (run_of(FAILED), SHRINKS, []),
    "another model": (run_of(FAILED, case=V4), SHRINKS, [f"{V4.engram}::test_x failed, and no entry explains it"]),
    "another outcome": (run_of(SKIPPED), SHRINKS, ["test_x skipped, 'test_x' says failed"]),
    "another message in one subtest": (
        run_of(FAILED),
        {"test_x": Reason("failed", "shrink either", "because", (LLAMA.engram,))},
        ["for another reason than 'test_x'"],
    ),
    "passes again": (run_of(), SHRINKS, [f"{LLAMA.engram}::test_x needs no explanation any more"]),
    "no such test": (run_of(FAILED), {**SHRINKS, "test_z": SHRINKS["test_x"]}, ["No test is explained by 'test_z'"]),
    "passes on others": (run_of(FAILED), EVERYWHERE, [f"{case.engram}::test_x" for case in CASES[1:]]),
}


@pytest.mark.parametrize(("outcomes", "explained", "lines"), EXPLANATIONS.values(), ids=EXPLANATIONS)
def test_an_entry_explains_only_what_it_says(outcomes, explained, lines):
    found = complaints(outcomes, explained)
    assert bool(found) == bool(lines)
    assert all(any(line in complaint for complaint in found) for line in lines)


def test_runs_that_cannot_be_compared_are_refused():
    outcomes = run_of()
    del outcomes[LLAMA.stock]["test_y"]
    assert "did not run the same tests" in complaints(outcomes, {})[0]
    assert complaints({}, {}) == [f"{CASES[0].engram} was not run."]


def test_outcomes_are_read_from_what_pytest_writes_and_counted(tmp_path):
    path = tmp_path / "run.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.x.A" name="test_1"/>
        <testcase classname="tests.x.A" name="test_2"><skipped message="no GPU"/></testcase>
        <testcase classname="tests.x.A" name="test_3"><failure message="one"/><failure message="two"/></testcase>
        <testcase classname="tests.x.A" name="test_4"><error message="setup"/></testcase>
        </testsuite></testsuites>"""
    )
    outcomes = read_outcomes(path)["A"]
    assert outcomes == {
        "test_1": Outcome("passed"),
        "test_2": Outcome("skipped", ("no GPU",)),
        "test_3": Outcome("failed", ("one", "two")),
        "test_4": Outcome("broken", ("setup",)),
    }
    assert executed(outcomes) == 2, "skipped and broken ones are not"
    assert count_words(outcomes) == {"passed": 1, "failed": 1, "skipped": 1, "broken": 1}


def test_accelerates_tests_must_come_out_alike_and_not_fail():
    for plain, hooked, count in (
        (PASSED, PASSED, 0),
        (SKIPPED, SKIPPED, 0),
        (PASSED, FAILED, 1),
        (PASSED, SKIPPED, 1),
        (FAILED, FAILED, 1),
        (BROKEN, BROKEN, 1),
    ):
        assert len(hook_complaints({"A": {"test_1": plain}}, {"A": {"test_1": hooked}})) == count
    assert len(hook_complaints({"A": {"test_1": PASSED}}, {"A": {}})) == 1, "a test vanishes with the hook"


def archive_of(tmp_path, *names: str):
    path = tmp_path / "some_package-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"text"))
    return path


def test_an_archives_tests_take_the_place_of_older_ones_and_stay_in_their_folder(tmp_path):
    folder = tmp_path / "laid"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_old.py").write_text("")
    unpack_tests(archive_of(tmp_path, "some_package-1.0/tests/test_a.py", "some_package-1.0/src/b.py"), folder)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.*")] == ["tests/test_a.py"]
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack_tests(archive_of(tmp_path, "some_package-1.0/tests/../../escaped.py"), folder)
    assert not (tmp_path / "escaped.py").exists()
    with pytest.raises(FileNotFoundError, match="no longer ships them"):
        unpack_tests(archive_of(tmp_path, "some_package-1.0/src/b.py"), folder)
