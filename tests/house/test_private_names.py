"""Private names of other packages: each that is used is listed with its reason, and each that is listed is there.

A release that drops one fails here, by its name. The scan reads the sources of the shipped folders; nothing is run.
Run with `pytest tests/house/test_private_names.py`.
"""

import ast
import functools
import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from packaging.version import Version
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from engram_transformers.compat_engram import check_parent
from engram_transformers.private_names_engram import PRIVATE_NAMES

from .test_floors import FOLDERS


ROOT = Path(__file__).parents[2]
ROOM = "modeling_engram/compat_engram.py"

# Attributes that another package sets on objects: the listed path is the function or class that does it.
ON_OBJECTS = {
    "_hf_hook": "accelerate.hooks.add_hook_to_module",
    "_old_forward": "accelerate.hooks.add_hook_to_module",
    "_is_hf_initialized": "transformers.initialization",
    "_gradient_checkpointing_func": "transformers.modeling_layers.GradientCheckpointingLayer",
    "_ddp_params_and_buffers_to_ignore": (
        "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"
    ),
    "_is_replica": "torch.nn.Module._replicate_for_data_parallel",
}
SET_BY_INSTANCES = {
    "torch.nn.Module._parameters": lambda: torch.nn.Module(),
    "torch.nn.Module._modules": lambda: torch.nn.Module(),
    "torch.nn.Module._buffers": lambda: torch.nn.Module(),
    "torch.nn.Module._forward_hooks": lambda: torch.nn.Module(),
    "torch.nn.Module._forward_pre_hooks": lambda: torch.nn.Module(),
    "transformers.PreTrainedConfig._attn_implementation": lambda: LlamaConfig(),
    "transformers.PreTrainedConfig._attn_implementation_internal": lambda: LlamaConfig(),
}
# Python's own, documented in spite of its underscore.
PYTHONS = {"_getframe"}


def resolved(name: str):
    """The object at a dotted path."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def in_this_version(entry) -> bool:
    package = entry.name.split(".")[0]
    installed = Version(version(package))
    return (not entry.since or installed >= Version(entry.since)) and (
        not entry.until or installed < Version(entry.until)
    )


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_every_listed_name_is_there_and_has_its_reasons(entry):
    assert entry.used_for and entry.public and entry.how in ("called", "overridden", "in place")
    if not in_this_version(entry):
        pytest.skip(f"since {entry.since or 'ever'}, until {entry.until or 'now'}: not in this version")
    if entry.name in SET_BY_INSTANCES:
        assert hasattr(SET_BY_INSTANCES[entry.name](), entry.name.rpartition(".")[2])
    else:
        resolved(entry.name)


def test_every_listed_name_is_still_used():
    files = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if "private_names" not in path.name]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    # What is touched is the name, or what its purpose names in `backticks`.
    touched = {
        entry.name: [entry.name.rpartition(".")[2], *re.findall(r"`(\w+)`", entry.used_for)] for entry in PRIVATE_NAMES
    }
    unused = [name for name, words in touched.items() if not any(re.search(rf"\b{w}\b", sources) for w in words)]
    assert unused == []


def test_names_that_others_set_on_objects_are_still_set():
    module = torch.nn.Linear(1, 1)
    add_hook_to_module(module, AlignDevicesHook())
    assert module._hf_hook and module._old_forward
    assert module._replicate_for_data_parallel()._is_replica
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["weight"])
    assert module._ddp_params_and_buffers_to_ignore == ["weight"]
    tensor = torch.ones(2)
    tensor._is_hf_initialized = True
    assert initialization.zeros_(tensor).sum() == 2, "Transformers no longer looks at the flag"
    layers = Path(importlib.import_module(GradientCheckpointingLayer.__module__).__file__)
    assert "self._gradient_checkpointing_func(" in layers.read_text(encoding="utf-8")
    compiled = torch.nn.Linear(1, 1)
    compiled.compile(backend="eager")
    assert compiled._compiled_call_impl is not None


def uses(path: Path) -> list[tuple[int, str]]:
    """Private names in a source, with their lines: attributes, imports, and names as strings for getattr."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] + (node.module or "").split(".")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        else:
            continue
        found += [(node.lineno, name) for name in names if name.startswith("_") and not name.startswith("__")]
    return found


@functools.cache
def own_names() -> set[str]:
    """Private names that our own sources define."""
    names = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    names.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return {name for name in names if name.startswith("_")} - {entry.name.rpartition(".")[2] for entry in PRIVATE_NAMES}


SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_other_name_is_used_and_those_that_are_called_go_through_one_room(path):
    own, room = own_names(), path == ROOT / ROOM
    by_name = {part: entry for entry in PRIVATE_NAMES for part in entry.name.split(".") if part.startswith("_")}
    by_name |= {name: next(e for e in PRIVATE_NAMES if e.name == where) for name, where in ON_OBJECTS.items()}
    wrong = []
    for line, name in uses(path):
        entry = by_name.get(name)
        if name in own or name in PYTHONS:
            continue
        if entry is None:
            wrong.append(f"line {line}: {name} is not in private_names_engram.py")
        elif entry.how == "called" and not room:
            wrong.append(f"line {line}: {name} is to be called through {ROOM}")
    assert wrong == []


def test_the_name_of_the_cache_and_versions_are_asked_in_one_room():
    asked = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in SOURCES
        if path != ROOT / ROOM
        for word in ('"past_key_values"', "transformers.__version__", "import __version__")
        if word in path.read_text(encoding="utf-8") and path.name != "configuration_engram.py"
    ]
    assert asked == []


def test_a_trainer_that_lost_a_hook_is_refused_by_name():
    class Renamed:
        pass

    with pytest.raises(ImportError, match="_save_checkpoint.*which this package builds on"):
        check_parent(Renamed, "transformers.Trainer")
