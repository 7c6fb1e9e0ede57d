"""Fetches the tests of Transformers and accelerate and lays them out so that they run.

PyPI's archive of Transformers holds the mixins that its models are tested with, but not everything that they import;
what is missing is laid beside them as stubs. Nothing of this is committed.

Run: python -m tests.foreign.layout runs/foreign
"""

import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).parent

# Files that lie beside the foreign tests: contents that the archive lacks, and files of ours (a `Path` is copied).
# A pytest.ini of their own keeps this repository's settings away from them.
INI = "[pytest]\naddopts = -p no:cacheprovider\ntimeout = 600\n"
LAID_BESIDE: dict[str, dict[str, str | Path]] = {
    "transformers": {
        "pytest.ini": INI,
        "tests/__init__.py": "",
        "tests/exporters/__init__.py": "",
        "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
        "tests/generation/__init__.py": "",
        "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
        "tests/utils/__init__.py": "",
        "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
        "tests/test_engram.py": HERE / "mixin_cases.py",
    },
    "accelerate": {
        "pytest.ini": INI,
        "hooked_models.py": HERE / "hooked_models.py",
    },
}


def download(package: str, folder: Path) -> Path:
    """Fetches the source archive of the installed version, once.

    Args:
        package (`str`): name on the package index.
        folder (`Path`): where archives are kept.

    Returns:
        `Path` of the archive.
    """
    wanted = version(package)
    archive = folder / f"{package}-{wanted}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", package, "--dest", str(folder), f"{package}=={wanted}"]
        subprocess.run(command, check=True)
    return archive


def unpack_tests(archive: Path, folder: Path) -> None:
    """Unpacks an archive's `tests/` into `folder`, whose former contents go."""
    shutil.rmtree(folder, ignore_errors=True)
    root = archive.name.removesuffix(".tar.gz") + "/"
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(f"{root}tests/")]
        for member in members:
            member.name = member.name.removeprefix(root)
        tar.extractall(folder, members, filter="data")
    if not members:
        raise FileNotFoundError(f"{archive} has no tests/: the package no longer ships them.")


def lay_out(folder: Path) -> None:
    """Makes `folder/transformers` and `folder/accelerate`, each a place to run pytest in."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, files in LAID_BESIDE.items():
        unpack_tests(download(package, folder), folder / package)
        for name, contents in files.items():
            path = folder / package / name
            if path.exists():
                raise FileExistsError(
                    f"{package} {version(package)} ships {name} itself: take its stub out of layout.py."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents.read_text(encoding="utf-8") if isinstance(contents, Path) else contents)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
