"""The counting device is compiled once for all, whoever asks and however many at once, and a process can load it late.

Run: pytest tests/integration/test_counting_build.py
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..counting_device import BuildFailed, NoCompiler, build


def test_a_process_that_has_trained_before_can_load_the_device_and_train_on_it(counting_device):
    code = (
        "import torch; torch.ones(2, requires_grad=True).sum().backward()\n"
        "from tests.counting_device import load; load()\n"
        "x = torch.ones(2, device='counting', requires_grad=True); x.square().sum().backward(); print(x.grad.tolist())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[2.0, 2.0]\n", done.stderr


@pytest.fixture
def unbuilt(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a source that compiles in no time; the folder where the library will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCE", tmp_path / "small.cpp")
    build.SOURCE.write_text("int answer() { return 42; }")
    return tmp_path / "cache" / "engram-counting-device"


def test_the_device_is_compiled_once_however_many_ask(counting_device, unbuilt, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\necho once >> "{tmp_path}/calls"\nsleep 0.3\nexec c++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    with ThreadPoolExecutor(4) as pool:
        paths = {call.result() for call in [pool.submit(build.built) for _ in range(4)]}
    assert (tmp_path / "calls").read_text() == "once\n"
    (library,) = paths
    assert sorted(path.suffix for path in unbuilt.iterdir()) == [".lock", ".so"]
    build.SOURCE.write_text("int answer() { return 43; }")
    assert build.built() != library


def test_a_machine_without_a_compiler_says_so(unbuilt, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompiler, match="needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        build.built()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompiler, match="no c\\+\\+ or g\\+\\+ or clang\\+\\+"):
        build.built()


def test_a_source_that_does_not_compile_leaves_nothing_behind(counting_device, unbuilt):
    build.SOURCE.write_text("int answer( {")
    with pytest.raises(BuildFailed, match="small.cpp"):
        build.built()
    assert [path.suffix for path in unbuilt.iterdir()] == [".lock"]
