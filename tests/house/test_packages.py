"""Packaging: the map of folders, what `engram_transformers` exports, and what importing it costs.

Run with `pytest tests/house/test_packages.py`.
"""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import engram_transformers
from engram_transformers.configuration.configuration_engram import NOT_TESTED_FROM, REMEDY, TESTED_FROM


ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "lock.txt"
SETUP = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
NOT_INSTALLED = {"tests", "examples", "benchmarks"}
EXPORTS = [
    "EngramConfig",
    "EngramForCausalLM",
    "EngramForConditionalGeneration",
    "EngramFormatError",
    "EngramModel",
    "EngramTrainer",
    "EngramTrainingArguments",
    "create_optimizer",
    "graft",
    "check_generation",
    "verify_checkpoint",
]
# Big, and needed by training, conversion or reports only.
NOT_FOR_INFERENCE = {"matplotlib", "typer", "rich", "gguf", "peft", "accelerate", "datasets", "pandas", "hypothesis"}


def assigned(name: str):
    """A literal that setup.py assigns, without running it."""
    return next(
        ast.literal_eval(node.value)
        for node in SETUP.body
        if isinstance(node, ast.Assign) and node.targets[0].id == name
    )


PACKAGES = assigned("PACKAGES")


def test_every_folder_with_code_is_a_package_and_every_package_a_folder():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_INSTALLED
    assert set(PACKAGES.values()) == folders
    assert len(set(PACKAGES.values())) == len(PACKAGES)


@pytest.mark.parametrize(("name", "folder"), PACKAGES.items())
def test_a_package_is_found_under_its_import_name(name, folder):
    assert (ROOT / folder / "__init__.py").is_file()
    assert find_spec(name).origin == str(ROOT / folder / "__init__.py")


def test_no_folder_is_importable_under_its_own_name():
    assert engram_transformers.EngramModel  # everything has been imported once
    assert {"configuration", "modeling_engram", "training", "conversion"}.isdisjoint(sys.modules)


def test_no_folder_hides_an_installed_module():
    """`import inspection` from the repository's root must not mean something else elsewhere."""
    assert set(PACKAGES.values()).isdisjoint(sys.stdlib_module_names)


def test_the_public_names_are_pinned():
    assert engram_transformers.__all__ == EXPORTS


@pytest.mark.parametrize("name", EXPORTS)
def test_a_public_name_can_be_imported_and_is_documented(name):
    assert getattr(engram_transformers, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'EngramTrainerr'"):
        engram_transformers.EngramTrainerr  # noqa: B018 (the look-up is what is tested)


def test_a_checkpoints_code_knows_the_transformers_that_setup_allows():
    asked = next(text for text in assigned("REQUIRED") if text.startswith("transformers"))
    assert asked == f"transformers>={TESTED_FROM},<{NOT_TESTED_FROM}" and asked in REMEDY


def test_the_version_stands_in_one_place():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", engram_transformers.__version__)
    assert engram_transformers.__version__ not in setup
    assert "version" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace("target-version", "")


def locked(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Name -> version in requirements/lock.txt, for this Python and system or for another one."""
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    wanted = [Requirement(line) for line in lines]
    held = [one for one in wanted if one.marker is None or one.marker.evaluate(environment)]
    assert len({canonicalize_name(one.name) for one in held}) == len(held)
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in held}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_holds_a_version_of_everything_that_the_package_asks_for(python):
    versions = locked({"python_version": python, "python_full_version": f"{python}.1"})
    for requirement in map(Requirement, assigned("REQUIRED")):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize(("name", "of"), [("typer", "transformers"), ("rich", "typer"), ("psutil", "accelerate")])
def test_what_seems_to_need_an_extra_is_there_anyway(name, of):
    """The reason that setup.py gives: where this fails, `typer` and `rich` belong into an extra for the command."""
    needed = map(Requirement, requires(of))
    assert name in {one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}


def test_what_make_installed_is_what_the_lock_says():
    """`make test` says which lock it installed from; an environment that somebody made differently has none."""
    if not os.environ.get("ENGRAM_LOCK"):
        pytest.skip("not run by `make test`, or with LOCK= for the newest versions")
    versions = locked()
    here = {canonicalize_name(one.metadata["Name"]): Version(one.version) for one in distributions()}
    for own in ("engram-transformers", "pip"):
        here.pop(own, None)
    here.pop("setuptools", None)  # of Python's own venv, where torch does not ask for it
    assert {"torch", "transformers", "peft", "pytest"} <= set(here)
    assert {name: version.public for name, version in here.items()} == {name: versions.get(name) for name in here}


def test_the_command_and_the_plugin_lead_to_functions():
    targets = re.findall(r'"engram = ([\w.]+:\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert targets == ["engram_transformers.conversion.cli:main", "engram_vllm:register"]
    for target in targets:
        module, function = target.split(":")
        package, _, stem = (module if module not in PACKAGES else f"{module}.__init__").rpartition(".")
        tree = ast.parse((ROOT / PACKAGES[package] / f"{stem}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_data_files_of_packages_are_there():
    (call,) = [n for n in ast.walk(SETUP) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"]
    data = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "package_data")
    for package, patterns in data.items():
        for pattern in patterns:
            assert list((ROOT / PACKAGES[package]).glob(pattern)), f"{package}: {pattern}"


# One process for all questions, because importing Transformers takes seconds.
PROBE = """
import json, sys
def seen():
    return sorted(sys.modules)
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationMixin
from transformers import PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
stages = {"control": seen()}
import engram_transformers
stages["imported"] = seen()
engram_transformers.EngramTrainer
stages["trainer"] = seen()
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, set[str]]:
    """Modules loaded by Transformers alone, after importing this package, and after asking for its trainer."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=tmp_path_factory.mktemp("elsewhere")
    )
    assert run.returncode == 0, run.stderr
    return {stage: set(modules) for stage, modules in json.loads(run.stdout.splitlines()[-1]).items()}


def test_importing_the_package_imports_nothing_big(stages):
    new = {name.split(".")[0] for name in stages["imported"] - stages["control"]}
    assert "engram_transformers" in new
    assert new & NOT_FOR_INFERENCE == set()


def test_the_trainer_is_imported_when_it_is_asked_for(stages):
    assert "transformers.trainer" not in stages["imported"]
    assert "engram_transformers.training" not in stages["imported"]
    assert {"transformers.trainer", "engram_transformers.training"} <= stages["trainer"]  # the control
    assert "engram_transformers.conversion" not in stages["trainer"]
