"""The comparison that `make test-foreign` ends with finds what is worse on an Engram model, and entries out of date.

The foreign tests themselves need the archives of Transformers and accelerate; these do not.
Run: pytest tests/foreign/test_outcomes.py
"""

import io
import tarfile

import pytest

from .__main__ import hook_complaints, met
from .explained import EXPLAINED
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


@pytest.mark.parametrize(
    "outcomes",
    [
        run_of(),
        run_of(SKIPPED, SKIPPED),
        run_of(PASSED, FAILED),
        run_of(PASSED, SKIPPED),
    ],
    ids=["both pass", "Llama itself skips it", "only the stock model fails", "only the stock model skips it"],
)
def test_a_model_that_is_no_worse_needs_no_explanation(outcomes):
    assert complaints(outcomes, {}) == []


@pytest.mark.parametrize(
    "outcomes",
    [
        run_of(FAILED),
        run_of(FAILED, FAILED),
        run_of(FAILED, SKIPPED),
        run_of(BROKEN, BROKEN),
        run_of(SKIPPED),
        run_of(SKIPPED, FAILED),
        run_of(SKIPPED, SKIPPED, V4),
    ],
    ids=[
        "fails",
        "fails like the stock model",
        "fails where the stock model is skipped",
        "does not begin",
        "skipped",
        "skipped where the stock model fails",
        "skipped like its backbone, but Llama is not",
    ],
)
def test_a_failure_or_a_skip_of_its_own_needs_an_explanation(outcomes):
    (line,) = complaints(outcomes, {})
    assert "test_x" in line
    assert "no entry explains it" in line


def test_an_explained_failure_is_no_complaint():
    assert complaints(run_of(FAILED), SHRINKS) == []


@pytest.mark.parametrize(
    ("outcomes", "explained", "line"),
    [
        (run_of(FAILED, case=V4), SHRINKS, f"{V4.engram}::test_x failed, and no entry explains it"),
        (run_of(SKIPPED), SHRINKS, "test_x skipped, 'test_x' says failed"),
        (run_of(FAILED), {"test_x": Reason("failed", "shrink either", "because")}, "for another reason than 'test_x'"),
        (run_of(), SHRINKS, f"{LLAMA.engram}::test_x needs no explanation any more"),
        (run_of(FAILED), {**SHRINKS, "test_z": Reason("failed", "", "because")}, "No test is explained by 'test_z'"),
    ],
    ids=["another model", "another outcome", "another message in one subtest", "passes again", "no such test"],
)
def test_an_entry_explains_only_what_it_says(outcomes, explained, line):
    assert any(line in complaint for complaint in complaints(outcomes, explained))


def test_an_entry_for_several_models_holds_for_each_of_them():
    everywhere = {"test_x": Reason("failed", "cannot shrink", "because")}
    complained = complaints(run_of(FAILED), everywhere)
    assert [line.split("::")[0] for line in complained] == [case.engram for case in CASES[1:]]


def test_runs_that_cannot_be_compared_are_refused():
    outcomes = run_of()
    del outcomes[LLAMA.stock]["test_y"]
    assert "did not run the same tests" in complaints(outcomes, {})[0]
    assert complaints({}, {}) == [f"{CASES[0].engram} was not run."]


def test_the_page_says_on_which_models_and_against_what_an_entry_was_met():
    outcomes = run_of()
    name = "test_resize_tokens_embeddings"
    for case in CASES:
        outcomes[case.engram][name] = FAILED
        outcomes[case.stock][name] = PASSED
    assert met(outcomes)[name] == {"cases": [case.engram for case in CASES], "stock": ["passed"]}


def test_skipped_and_broken_tests_do_not_count_as_executed():
    outcomes = {"a": PASSED, "b": FAILED, "c": SKIPPED, "d": BROKEN}
    assert executed(outcomes) == 2
    assert count_words(outcomes) == {"passed": 1, "failed": 1, "skipped": 1, "broken": 1}


def test_outcomes_are_read_from_what_pytest_writes(tmp_path):
    path = tmp_path / "run.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.x.A" name="test_1"/>
        <testcase classname="tests.x.A" name="test_2"><skipped message="no GPU"/></testcase>
        <testcase classname="tests.x.A" name="test_3"><failure message="one"/><failure message="two"/></testcase>
        <testcase classname="tests.x.A" name="test_4"><error message="setup"/></testcase>
        </testsuite></testsuites>"""
    )
    assert read_outcomes(path)["A"] == {
        "test_1": Outcome("passed"),
        "test_2": Outcome("skipped", ("no GPU",)),
        "test_3": Outcome("failed", ("one", "two")),
        "test_4": Outcome("broken", ("setup",)),
    }


@pytest.mark.parametrize(
    ("plain", "hooked", "count"),
    [
        (PASSED, PASSED, 0),
        (SKIPPED, SKIPPED, 0),
        (PASSED, FAILED, 1),
        (PASSED, SKIPPED, 1),
        (FAILED, FAILED, 1),
        (BROKEN, BROKEN, 1),
    ],
)
def test_accelerates_tests_must_come_out_alike_and_not_fail(plain, hooked, count):
    assert len(hook_complaints({"A": {"test_1": plain}}, {"A": {"test_1": hooked}})) == count


def test_a_test_that_vanishes_with_the_hook_is_a_complaint():
    assert len(hook_complaints({"A": {"test_1": PASSED}}, {"A": {}})) == 1


def test_every_entry_says_what_kind_it_is_and_why():
    for key, reason in EXPLAINED.items():
        assert key.startswith("test_")
        assert reason.word in ("failed", "skipped")
        assert reason.says
        assert reason.why.endswith(".")


def archive_of(tmp_path, *names: str):
    path = tmp_path / "some_package-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"text"))
    return path


def test_an_archives_tests_take_the_place_of_older_ones(tmp_path):
    folder = tmp_path / "laid"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_old.py").write_text("")
    unpack_tests(archive_of(tmp_path, "some_package-1.0/tests/test_a.py", "some_package-1.0/src/b.py"), folder)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.*")] == ["tests/test_a.py"]


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    archive = archive_of(tmp_path, "some_package-1.0/tests/../../escaped.py")
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack_tests(archive, tmp_path / "laid")
    assert not (tmp_path / "escaped.py").exists()


def test_an_archive_without_tests_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no longer ships them"):
        unpack_tests(archive_of(tmp_path, "some_package-1.0/src/b.py"), tmp_path / "laid")
