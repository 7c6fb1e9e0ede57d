"""Names and words: files that say what they are, and nothing of any machine outside the repository.

Run with `pytest tests/house/test_words.py`.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from .test_floors import FOLDERS


ROOT = Path(__file__).parents[2]
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MOST_LINES = 650
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler", "tools", "base", "core"}
TEXT = {".py", ".md", ".toml", ".cfg", ".ini", ".txt", ".yml", ".yaml", ".sh", ""}

# Taken apart, so that this file does not hold what it looks for.
OUTSIDE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + r"(work|root|mnt|scratch)/",
            r"(?<![\w.])/" + r"(home|Users)/\w",
            r"\b[A-Z]:\\" + r"Users",
            r"(?<![\w-])" + "shared" + "/",
        ]
    )
)


def repository_files() -> list[Path]:
    """Files that are in the repository or would be with the next commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is not a git checkout, so which files belong to the repository is unknown")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring[0].isupper()
    assert "laceholder" not in docstring


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_is_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES


def test_no_file_has_a_name_that_says_nothing():
    vague = [named(p) for p in repository_files() if set(re.split(r"[_\W]", p.stem.lower())) & VAGUE]
    assert vague == []


def test_a_thing_is_not_another_thing_rather_than_no_other_thing():
    """Plain English: "there is no file" stays, and what was called "no file" is "not a file"."""
    idiom = re.compile(r"(?<!there )\b(?:is|are|was) no (?!longer\b|more\b)[a-z]", re.IGNORECASE)
    listed = [path for path in repository_files() if path.suffix in (".py", ".md") and path.name != "CHANGELOG.md"]
    found = [
        named(path) for path in listed if idiom.search(path.read_text(encoding="utf-8")) and path != Path(__file__)
    ]
    assert found == []


def test_travelling_files_say_whose_they_are():
    names = {path.name for path in (ROOT / "modeling_engram").glob("*.py")}
    staying = {"__init__.py", "embedding_offload.py"}  # tests/house/test_flat_copy.py proves that nothing else stays
    assert {name for name in names if not name.endswith("_engram.py")} == staying


def test_no_text_names_a_place_outside_the_repository():
    found = []
    for path in repository_files():
        if path.suffix in TEXT and not path.name.startswith("LICENSE"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if OUTSIDE.search(line):
                    found.append(f"{named(path)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_outside"),
    [
        ("see /" + "work/notes.md", True),
        ("cp /" + "home/me/x .", True),
        ("read " + "shared" + "/spec.md", True),
        ("file:///" + "root/x", True),
        ("tests/parity/golden", False),
        ("https://huggingface.co/home", False),
        ("a shared table", False),
        ("/dev/shm", False),
    ],
)
def test_places_outside_would_be_found(line, is_outside):
    assert bool(OUTSIDE.search(line)) == is_outside


def asserts(function: ast.FunctionDef, asserting: set[str]) -> bool:
    """Whether a function asserts by itself, through pytest or torch, or through a function that does."""
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    return (
        any(isinstance(node, ast.Assert) for node in ast.walk(function))
        or bool(names & ({"raises", "warns"} | asserting))
        or any(name.startswith("assert") for name in names)
    )


def test_every_test_has_an_assertion():
    silent = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        asserting = {f.name for f in functions if not f.name.startswith("test_") and asserts(f, set())}
        tests = [f for f in functions if f.name.startswith("test_")]
        silent += [f"{named(path)}::{f.name}" for f in tests if not asserts(f, asserting)]
    assert silent == []


def test_every_test_file_says_what_it_tests_and_how_to_run_it():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert re.search(r"\b[Rr]un\b.*pytest", docstring, re.DOTALL), named(path)
