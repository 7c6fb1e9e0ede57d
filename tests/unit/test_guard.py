"""The guard of a checkpoint's own copy of the code: what it looks for in an adapter's folder.

Run: pytest tests/unit/test_guard.py
"""

import json

import pytest

from engram_transformers import adapters, guard_engram
from engram_transformers.files_atomic_engram import ADAPTER_NAME, DELTA_KEY, DELTA_NAME


@pytest.fixture
def without_package(monkeypatch):
    """The guard as it is in a checkpoint's folder."""
    monkeypatch.setattr(guard_engram, "_parts", {})


def adapter(folder, named: bool, has_delta: bool):
    """An adapter's folder, as far as the guard looks at it."""
    folder.mkdir()
    (folder / ADAPTER_NAME).write_text(json.dumps({DELTA_KEY: DELTA_NAME} if named else {}))
    if has_delta:
        (folder / DELTA_NAME).write_bytes(b"")
    return folder


@pytest.mark.parametrize(("named", "has_delta"), [(True, True), (True, False), (False, True)])
def test_an_adapter_that_names_a_memory_or_lies_beside_one_is_refused(named, has_delta, without_package, tmp_path):
    folder = adapter(tmp_path / "one", named, has_delta)
    for source, where in ((folder, {}), (str(tmp_path), {"subfolder": "one"})):
        with pytest.raises(ImportError, match="pip install engram-transformers"):
            guard_engram.refuse_adapter(source, **where)


def test_any_other_adapter_is_not_refused(without_package, tmp_path):
    guard_engram.refuse_adapter(adapter(tmp_path / "one", named=False, has_delta=False))
    (tmp_path / "none").mkdir()
    guard_engram.refuse_adapter(tmp_path / "none")  # PEFT says what is missing
    with pytest.raises(ImportError, match="this model runs the copy of its code"):
        guard_engram.full_package("control: a delta")


def test_the_package_is_registered_when_it_is_imported(tmp_path):
    assert guard_engram.registered() is adapters
    assert guard_engram.full_package("anything") is adapters
