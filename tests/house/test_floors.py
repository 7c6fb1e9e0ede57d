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
    "inspection": f"{PACKAGE}.inspection",
    "model_cards": f"{PACKAGE}.model_cards",
}

# Floor of every module, or of every room whose modules share one. The longest name counts.
FLOORS = {
    "configuration": 0,
    "configuration_engram": 1,  # the door: the one absolute import of our own below training
    "compression_engram": 2,
    "constants_engram": 3,
    "hashing_engram": 5,
    "gradient_engram": 4,
    "index_engram": 4,
    "saves_engram": 4,
    "guard_engram": 5,
    "table_engram": 5,
    "shards_engram": 5,
    "rows_engram": 6,
    "overlay_engram": 7,
    "private_names_engram": 1,
    "compat_engram": 2,
    "cache_engram": 6,
    "fetch_engram": 7,
    "layer_engram": 7,
    "offload_engram": 8,
    "placement_engram": 9,
    "dispatch_engram": 9,
    "memory_engram": 10,
    "reading_engram": 10,
    "quantised_engram": 10,
    "checkpoint_engram": 11,
    "donor_engram": 12,
    "sizes_engram": 11,
    "pretrained_engram": 13,
    "modeling_engram": 14,
    "adapters": 15,  # above all that travels: a model reaches it through `guard_engram` alone
    "": 16,  # `engram_transformers` itself, what users import
    "training": 17,
    "conversion": 17,
    "inspection": 17,
    "model_cards": 17,
    "conversion.cli": 18,
    "embedding_offload": 19,  # for other models: it uses what reads rows, and nothing uses it
}

# Upward imports that are wanted: (module, imported module).
ALLOWED = {("", "training")}  # `EngramTrainer` is looked up when it is first asked for


def module_name(path: Path) -> str:
    """`hashing_engram`, `training.rows`, or "" for the package itself."""
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
    return next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in FLOORS)


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
        ("hashing_engram", "from .modeling_engram import EngramModel"),
        ("hashing_engram", "def later():\n    from .table_engram import EngramTable"),
        ("compression_engram", "import engram_transformers.training"),
        ("table_engram", "from .shards_engram import write_shard"),
        ("configuration.configuration_engram", "from ..configuration_engram import EngramConfig"),
        ("training.rows", "from ..conversion import graft"),
        ("training.rows", "from ..conversion.cli import main"),
        ("inspection.verify", "from .. import training"),
        ("layer_engram", "from engram_transformers import EngramConfig"),
        ("checkpoint_engram", "def load():\n    from engram_transformers.adapters import from_pack"),
        ("adapters.memory_delta", "from ..training import EngramTrainer"),
        ("memory_engram", "from .embedding_offload import offload_embedding"),
    ],
)
def test_an_upward_import_would_be_found(module, source):
    assert len(upward(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("modeling_engram", "from .hashing_engram import NgramHasher"),
        ("training.trainer", "from .rows import RowMoments\nfrom ..table_engram import EngramTable"),
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
    assert order.index("hashing_engram") < order.index("modeling_engram") < order.index("")


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
