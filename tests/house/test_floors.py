"""The floors of the house: a module imports from below and from its own room, never from above or beside.

Imports are read from the source (also those inside functions), nothing is run.
Run with `pytest tests/house/test_floors.py`.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PACKAGE = "engram_transformers"
FOLDERS = {
    "modeling_engram": PACKAGE,
    "configuration": f"{PACKAGE}.configuration",
    "adapters": f"{PACKAGE}.adapters",
    "training": f"{PACKAGE}.training",
    "conversion": f"{PACKAGE}.conversion",
    "serving": f"{PACKAGE}.serving",
    "inspection": f"{PACKAGE}.inspection",
    "model_cards": f"{PACKAGE}.model_cards",
    "engram_vllm": "engram_vllm",  # a package of its own
}

# Floor of every wing: a folder, the files of a prefix ("rows_*"), or a file that is a wing by itself. Within a wing
# imports may go anywhere, as long as they make no circle. The longest name counts.
FLOORS = {
    "configuration": 0,
    "configuration_engram": 1,  # the door: the one absolute import of our own below training
    "private_names_engram": 1,
    "compat_engram": 2,
    "hash_*": 3,
    "files_*": 4,
    "guard_engram": 5,
    "backbone_engram": 5,
    "rows_*": 6,
    "embedding_offload": 7,  # does not travel, and no memory needs it
    "cache_*": 7,
    "knowledge_pack_engram": 7,
    "layer_engram": 8,
    "inputs_engram": 8,
    "memory_engram": 9,
    "files_checkpoint_engram": 10,
    "pretrained_engram": 11,
    "modeling_engram": 12,
    "adapters": 13,  # above all that travels: a model reaches it through `guard_engram` alone
    "": 14,  # `engram_transformers` itself, what users import
    "training": 15,
    "serving": 15,
    "inspection": 15,
    "model_cards": 15,
    "engram_vllm": 15,  # imports the files that travel as its siblings
    "conversion.terminal": 14,  # for the verbs of every wing
    "conversion": 16,
    "conversion.cli": 17,
}

# Upward imports that are wanted: (module, imported module).
ALLOWED = {("", "training")}  # `EngramTrainer` is looked up when it is first asked for


def module_name(path: Path) -> str:
    """`hash_ngrams_engram`, `training.rows`, or "" for the package itself."""
    name = FOLDERS[path.parent.name] + ("" if path.stem == "__init__" else f".{path.stem}")
    return name.removeprefix(PACKAGE).removeprefix(".")


MODULES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))}


def imported(module: str, source: str, is_package: bool) -> Iterator[str]:
    """Our own modules that a module imports, by the names of `MODULES`."""
    package = f"{PACKAGE}.{module}".rstrip(".").split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            kept = len(package) - node.level + (1 if is_package else 0) if node.level else 0
            base = ".".join([*package[:kept], *([node.module] if node.module else [])])
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            ours = [name for name in submodules if name.removeprefix(f"{PACKAGE}.") in MODULES]
            names = ours if len(ours) == len(submodules) else [base, *ours]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield name.removeprefix(PACKAGE).removeprefix(".")


def room(module: str) -> str:
    """The longest entry of `FLOORS` that a module belongs to."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)] + [f"{module.split('_')[0]}_*"]
    return next(name for name in names if name in FLOORS)


def upward(module: str, source: str, is_package: bool = False) -> list[tuple[str, str]]:
    """Imports of a module that do not lead down or stay in its room."""
    pairs = [(room(module), room(target)) for target in imported(module, source, is_package)]
    return [pair for pair in pairs if pair[0] != pair[1] and FLOORS[pair[1]] >= FLOORS[pair[0]] and pair not in ALLOWED]


def test_every_module_has_a_floor_and_every_floor_a_module():
    assert {room(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_down(module):
    path = MODULES[module]
    assert upward(module, path.read_text(encoding="utf-8"), path.stem == "__init__") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hash_ngrams_engram", "from .modeling_engram import EngramModel"),
        ("hash_ngrams_engram", "def later():\n    from .rows_table_engram import EngramTable"),
        ("hash_tokens_engram", "import engram_transformers.training"),
        ("files_safetensors_engram", "from .rows_table_engram import EngramTable"),
        ("configuration.configuration_engram", "from ..configuration_engram import EngramConfig"),
        ("training.rows", "from ..conversion import graft"),
        ("training.rows", "from ..conversion.cli import main"),
        ("inspection.verify", "from .. import training"),
        ("layer_engram", "from engram_transformers import EngramConfig"),
        ("files_checkpoint_engram", "def load():\n    from engram_transformers.adapters import from_delta"),
        ("adapters.memory_delta", "from ..training import EngramTrainer"),
    ],
)
def test_an_upward_import_would_be_found(module, source):
    assert len(upward(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("modeling_engram", "from .hash_ngrams_engram import NgramHasher"),
        ("training.trainer", "from .row_state import RowMoments\nfrom ..rows_table_engram import EngramTable"),
        ("conversion.cli", "from ..inspection import verify_checkpoint\nfrom .graft import graft"),
        ("training.rows", "import torch\nfrom transformers import Trainer"),
    ],
)
def test_a_downward_import_would_not_be_found(module, source):
    assert upward(module, source) == []


def test_imports_make_no_circle():
    graph = {}
    for module, path in MODULES.items():
        targets = set(imported(module, path.read_text(encoding="utf-8"), path.stem == "__init__"))
        graph[module] = {t for t in targets if t in MODULES and (module, t) not in ALLOWED and t != module}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("hash_ngrams_engram") < order.index("modeling_engram") < order.index("")


def test_only_the_door_imports_the_package_by_its_name_below_training():
    absolute = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            if FLOORS[room(module)] < FLOORS["training"] and any(n.split(".")[0] == PACKAGE for n in names):
                absolute.append(module)
    assert absolute == ["configuration_engram"]


def test_nothing_imports_tests_examples_or_benchmarks():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            outside = {"tests", "examples", "benchmarks", *FOLDERS}
            assert {name.split(".")[0] for name in names}.isdisjoint(outside), module


def test_the_configuration_floor_needs_no_tensors():
    for module in ("configuration", "configuration.configuration_engram"):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {a.name.split(".")[0] for node in imports if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module.split(".")[0] for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
        assert names.isdisjoint({"torch", "numpy", "safetensors", "tokenizers"}), module
