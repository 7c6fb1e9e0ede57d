"""Files that travel: Transformers copies a model's code beside its weights, flat, following imports by a regular
expression over the text. These tests hold what that needs.

Run with `pytest tests/house/test_flat_copy.py`.
"""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from engram_transformers.files_checkpoint_engram import AUTO_MAP, COMPOSITE


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "modeling_engram"
DOOR = FOLDER / "configuration_engram.py"
REAL_CONFIGURATION = ROOT / "configuration" / "configuration_engram.py"  # takes the door's place in a checkpoint
FILES = sorted(FOLDER.glob("*_engram.py"))
FLAT = {**{path.name: path for path in FILES}, DOOR.name: REAL_CONFIGURATION}

# What everybody who can load a Transformers model has, and accelerate, whose hooks keep tables off the device.
BRINGS_ALONG = {
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "accelerate", "psutil"),
    "packaging",
}


def relative_imports(path: Path) -> list[ast.ImportFrom]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("path", FLAT.values(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_travelling_file_imports_names_from_siblings_only(path):
    for node in relative_imports(path):
        assert node.level == 1, f"line {node.lineno}: a checkpoint has no folder above"
        assert node.module, f"line {node.lineno}: `from . import name` is silently not copied"
        assert f"{node.module}.py" in FLAT, f"line {node.lineno}: no such sibling"


@pytest.mark.parametrize("path", FLAT.values(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_other_line_looks_like_a_relative_import(path):
    """A docstring line that begins with `from` and a dot would be followed, and the save would fail."""
    assert sorted(get_relative_imports(path)) == sorted({node.module for node in relative_imports(path)})


def test_a_line_in_a_docstring_would_be_found(tmp_path):
    path = tmp_path / "x_engram.py"
    path.write_text('"""Example:\n\n    from .missing import name\n"""\n')
    assert get_relative_imports(path) == ["missing"]
    assert relative_imports(path) == []


@pytest.mark.parametrize("start", ["modeling_engram.py"])
def test_following_imports_finds_every_travelling_file(start):
    found = {Path(name).name for name in get_relative_import_files(FOLDER / start)}
    assert found == {path.name for path in FILES} - {start}
    assert all((FOLDER / name).is_file() for name in found)


def test_the_real_configuration_stands_alone():
    assert get_relative_import_files(REAL_CONFIGURATION) == []
    assert DOOR.name == REAL_CONFIGURATION.name  # so that the one overwrites the other at a save


@pytest.mark.parametrize("path", FLAT.values(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_travelling_file_needs_nothing_but_transformers(path):
    """An import of peft or of our own package would refuse users who have only Transformers and accelerate."""
    assert {name for name in get_imports(path) if name not in sys.stdlib_module_names} <= BRINGS_ALONG


HOOKS = {"meta_path", "path_hooks", "import_module", "__import__", "modules"}  # the last as in `sys.modules`


def reaches_for_modules(source: str) -> set[str]:
    """Names by which code hooks into imports, or takes modules that it does not import in plain sight."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)} & (HOOKS - {"modules"})
    attributes = {node for node in nodes if isinstance(node, ast.Attribute) and node.attr in HOOKS}
    of_sys = {node.attr for node in attributes if getattr(node.value, "id", None) in ("sys", "importlib")}
    return names | of_sys


@pytest.mark.parametrize("path", FLAT.values(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_travelling_file_hooks_into_no_import(path):
    assert reaches_for_modules(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "line",
    ["sys.meta_path.insert(0, x)", "importlib.import_module('peft')", "sys.modules['peft']", "__import__('peft')"],
)
def test_a_hook_would_be_found(line):
    assert reaches_for_modules(line)


def test_the_door_is_a_door():
    names = {"REMEDY", "EngramConfig", "EngramFormatError", "saying_what_to_install"}
    names |= {"holds_other_models", "placeholder_ids"}
    body = ast.parse(DOOR.read_text(encoding="utf-8")).body
    (door,) = [node for node in body if isinstance(node, ast.ImportFrom)]
    assert door.module == "engram_transformers.configuration.configuration_engram"
    assert {alias.name for alias in door.names} == names
    assert len(body) == 3  # docstring, import, __all__
    wanted = {
        alias.name
        for path in FILES
        for node in relative_imports(path)
        if node.module == DOOR.stem
        for alias in node.names
    }
    assert wanted <= names


def test_the_auto_map_names_files_and_classes_that_travel():
    for target in (*AUTO_MAP.values(), COMPOSITE):
        module, class_name = target.split(".")
        tree = ast.parse(FLAT[f"{module}.py"].read_text(encoding="utf-8"))
        assert class_name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(AUTO_MAP) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
