"""Every tensor that the installed code makes says on which device: otherwise `torch.set_default_device("cuda")`, or
`with torch.device("cuda")`, moves it away from those that it is used with.

The sources are read, nothing is run. Run with `pytest tests/house/test_devices.py`.
"""

import ast
from pathlib import Path

import pytest

from .test_floors import FOLDERS, ROOT


# What torch's default device decides about, as far as it is used or likely: `torch.from_numpy` and `frombuffer` do not.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "tensor", "zeros"),
}

# Parameters of a fresh model are made where all of its parameters are, and `on_meta` asks where that is.
FOLLOW_THE_DEFAULT = {
    "modeling_engram/layer_engram.py": {"Projection.__init__", "EngramLayer.__init__"},
    "modeling_engram/rows_table_engram.py": {"OrderRows.__init__"},
    "modeling_engram/hash_ngrams_engram.py": {"on_meta"},
}

SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def without_device(source: str) -> list[tuple[str, str]]:
    """Calls of torch's factories that name no device: the function that makes each, and the call."""
    found = []

    def visit(node: ast.AST, within: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            within = f"{within}.{node.name}".lstrip(".")
        function = getattr(node, "func", None)
        is_factory = (
            isinstance(function, ast.Attribute)
            and function.attr in FACTORIES
            and ast.unparse(function.value) == "torch"
        )
        if is_factory and not any(keyword.arg == "device" for keyword in node.keywords):
            found.append((within, ast.unparse(node)))
        for child in ast.iter_child_nodes(node):
            visit(child, within)

    visit(ast.parse(source), "")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_new_tensor_names_its_device(path):
    allowed = FOLLOW_THE_DEFAULT.get(path.relative_to(ROOT).as_posix(), set())
    wrong = [call for within, call in without_device(path.read_text(encoding="utf-8")) if within not in allowed]
    assert not wrong, "device= is missing"


@pytest.mark.parametrize(("file", "functions"), FOLLOW_THE_DEFAULT.items(), ids=FOLLOW_THE_DEFAULT)
def test_every_exception_is_one(file, functions):
    assert {within for within, _ in without_device(Path(ROOT, file).read_text(encoding="utf-8"))} == functions


@pytest.mark.parametrize(
    ("call", "names_one"),
    [
        ("torch.zeros(3)", False),
        ("torch.arange(3, dtype=torch.int64)", False),
        ("torch.zeros(3, device=x.device)", True),
        ("x.new_zeros(3)", True),
        ("torch.zeros_like(x)", True),
        ("np.zeros(3)", True),
    ],
)
def test_a_missing_device_would_be_found(call, names_one):
    assert without_device(f"def f(x):\n    return [{call}]") == ([] if names_one else [("f", call)])
