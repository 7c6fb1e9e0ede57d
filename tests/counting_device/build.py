"""Compiles `device.cpp` once for each source and PyTorch, into the user's cache."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch


SOURCE = Path(__file__).with_name("device.cpp")
TORCH = Path(torch.__file__).parent
# Unoptimised: what takes time on this device is PyTorch's own code, which is compiled already.
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
PLACES = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include", f"-L{TORCH}/lib"]


class NoCompiler(RuntimeError):
    """There is nothing to compile with, so the device cannot be had here."""


class BuildFailed(RuntimeError):
    """The compiler refuses it: a mistake of ours, or a PyTorch that we do not know."""


def built() -> Path:
    """The compiled library; compiled now if it never was."""
    key = hashlib.sha256(SOURCE.read_bytes() + repr((torch.__version__, FLAGS, PLACES)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engram-counting-device"
    library = folder / f"{key}.so"
    if library.exists():
        return library
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise NoCompiler(f"the counting device needs a C++ compiler, and there is no {' or '.join(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it: one builds, the others wait
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, *PLACES, str(SOURCE), "-ltorch_cpu", "-lc10", "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildFailed(f"{' '.join(command)}\n{done.stderr}")
            os.replace(unfinished, library)  # whole or not at all
    return library
