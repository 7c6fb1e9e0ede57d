"""CONTRIBUTING.md: what it says of files, commands and names is so.

Run with `pytest tests/house/test_pages.py`.
"""

import re
import subprocess
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
HOOKS = {
    hook["id"]: hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repo["hooks"]
}


def test_the_hooks_are_the_commands_of_make_quality():
    (recipe,) = re.findall(r"^quality:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    on_commit = [hook for hook in HOOKS.values() if "stages" not in hook]
    assert [hook["entry"] for hook in on_commit] == commands


@pytest.mark.parametrize(("length", "code"), [(71, 0), (72, 1)])
def test_a_long_subject_is_refused(tmp_path, length, code):
    (tmp_path / "message").write_text("x" * length + "\n\n" + "a body may be wider than its subject " * 3)
    command = f"{HOOKS['commit-subject']['entry']} {tmp_path / 'message'}"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == code


def test_contributing_names_files_that_are_there():
    patterns = (r"`([\w./]+/[\w.]*)`", r"\]\(([\w./]+)\)", r"\b(?:docs|tests)/[\w/]+\.\w+")
    named = [name for pattern in patterns for name in re.findall(pattern, CONTRIBUTING)]
    assert {"tests/house/test_floors.py", "tests/fixtures/format1/", "docs/design.md"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_contributing_names_commands_and_code_that_are_there():
    targets = set(re.findall(r"`?make ([a-z][\w-]*)", CONTRIBUTING))
    assert "test-foreign" in targets
    assert targets - set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)) == set()
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("tests", "modeling_engram", "configuration")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
    )
    names = set(re.findall(r"`([A-Z][A-Z_]+|[a-z]+(?:_[a-z]+)+|Engram\w+)`", CONTRIBUTING))
    assert {"ENGINES", "refuse_engine", "find_decoder_layers"} <= names
    assert [name for name in names if not re.search(rf"^ *(?:def |class )?{name}\b", code, re.MULTILINE)] == []
