"""Environments with other versions than the locked one: layers over it, and whole ones at the ends of the range.

A layer holds one transformers and nothing else; the rest comes from the environment that runs this. All are made with
uv and kept under runs/versions; one that is there is used again.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path


FOLDER = Path("runs/versions")
UV = str(Path(sys.executable).with_name("uv"))
BASE = "import site; site.addsitedir({!r})\n"  # addsitedir, so that the editable install of this package is read too

# What the core tests need; the other extras of development ask for a newer torch than the oldest.
TOOLS = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]


def interpreter(folder: Path) -> Path:
    """The Python of an environment."""
    return folder.absolute() / "bin" / "python"


def layered(transformers: str) -> Path:
    """The environment that runs this, with another transformers.

    Args:
        transformers (`str`): a version.

    Returns:
        `Path`: its Python.
    """
    folder = FOLDER / f"transformers-{transformers}"
    python = interpreter(folder)
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "base.pth").write_text(BASE.format(sysconfig.get_path("purelib")))
        install(python, "--no-deps", f"transformers=={transformers}")
        (folder / "done").touch()
    return python


def whole(name: str, python: str, *arguments: str) -> Path:
    """An environment of its own for another Python, with this package in it.

    Args:
        name (`str`): of its folder.
        python (`str`): for instance "3.10"; uv looks for it, and does not download one.
        arguments (`str`): for `uv pip install`, beside the package and the tools of the tests.

    Returns:
        `Path`: its Python.

    Raises:
        subprocess.CalledProcessError: this machine has no such Python, or something cannot be installed.
    """
    folder = FOLDER / name
    if not (folder / "done").exists():
        found = ["--no-python-downloads", "--python", python]
        subprocess.run([UV, "venv", "--quiet", "--clear", *found, folder], check=True)
        install(interpreter(folder), *arguments, *TOOLS, "--editable", ".")
        (folder / "done").touch()
    return interpreter(folder)


def install(python: Path, *arguments: str):
    """`uv pip install` into the environment of a Python."""
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, *arguments], check=True)
