"""Packaging: the map of folders, what `engram_transformers` exports, and what importing it costs.

Run with `pytest tests/house/test_packages.py`.
"""

import ast
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import engram_transformers


ROOT = Path(__file__).parents[2]
SETUP = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
NOT_INSTALLED = {"tests", "examples", "benchmarks"}
EXPORTS = [
    "PRESETS",
    "EngramConfig",
    "EngramForCausalLM",
    "EngramFormatError",
    "EngramLayer",
    "EngramModel",
    "EngramRowsHook",
    "EngramTrainer",
    "EngramTrainingArguments",
    "NgramHasher",
    "TokenCompressor",
    "attach_memory_offload",
    "detach_memory_offload",
    "load_memory_pack",
    "save_memory_pack",
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


def test_the_version_stands_in_one_place():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", engram_transformers.__version__)
    assert engram_transformers.__version__ not in setup
    assert "version" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace("target-version", "")


def test_oldest_versions_are_no_newer_than_tested_ones():
    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    tested = assigned("TESTED")
    for requirement in assigned("REQUIRED"):
        name, oldest = re.match(r"([\w_]+)>=([\d.]+)", requirement).groups()
        if name in tested:
            assert number(oldest) <= number(tested[name]), name


def test_the_command_leads_to_a_function():
    (target,) = re.findall(r'"engram = ([\w.]+:\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    module, function = target.split(":")
    package, _, stem = module.rpartition(".")
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
