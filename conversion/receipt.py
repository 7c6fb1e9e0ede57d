"""Receipts: how a graft was made, so that it can be made again, checked, and continued after a kill.

Promises: SHA-256 of every file that was read and written, versions and recipe, and no path, token or user name. While a
graft is made, its draft's receipt lists the tables that are finished. Of a file whose data are zeros, which may be a
hole of many gigabytes, the digest is that of the header. Never says that a file is finished before it is on the disk.
Source: docs/grafting.md.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from transformers.utils.logging import tqdm

from ..files_atomic_engram import MEMORY_STEM, flush
from ..files_safetensors_engram import start_of_data
from .donor import RECEIPT_NAME


VERSIONS = ("engram-transformers", "transformers", "torch", "numpy", "tokenizers")

_BLOCK = 1 << 22


class Receipt:
    """The receipt of a graft that is being made in a folder.

    Args:
        draft (`Path`): the folder.
        digests (`bool`): whether to compute digests; without, only sizes are written down and compared.

    Example:

    ```python
    >>> receipt = Receipt(draft, digests=True)
    >>> receipt.finish("engram-memory-00001-of-00002.safetensors")
    >>> receipt.write({"donor": "SmolLM2-135M-Instruct"})
    ```"""

    def __init__(self, draft: Path, digests: bool):
        self.draft, self.digests = draft, digests
        self.inputs: dict[str, dict] = {}
        self.outputs: dict[str, dict] = {}

    def keep_finished(self) -> None:
        """Keeps tables that an earlier run has finished, if they have their size and digest still; removes all else."""
        path = self.draft / RECEIPT_NAME
        listed = json.loads(path.read_text(encoding="utf-8"))["outputs"] if path.is_file() else {}
        finished = {name: said for name, said in listed.items() if name.startswith(MEMORY_STEM)}
        for found in self.draft.iterdir():
            said = finished.get(found.name)
            if said is not None and self.entry(found, zeros="data" in said) == said:
                self.outputs[found.name] = said
            elif found.is_dir():
                shutil.rmtree(found)
            elif found != path:
                found.unlink()

    def finish(self, name: str, sha256: str | None = None) -> None:
        """Writes down that a table's file is finished, after it is on the disk; `sha256` if it is known."""
        path = self.draft / name
        flush(path)
        self.outputs[name] = self.entry(path, sha256)
        self._replace({"outputs": self.outputs})

    def read(self, paths: Iterable[Path], prefix: str = "") -> None:
        """Adds files that the graft reads."""
        for path in paths:
            self.inputs[prefix + path.name] = self.entry(path)

    def copied(self, names: Mapping[str, str]) -> None:
        """Adds files of the draft that are copies of files that the graft reads, by the names of these."""
        for source, copy in names.items():
            self.outputs[copy] = self.inputs[source]

    def write(self, told: dict, zeros: Iterable[str] = ()) -> None:
        """Adds the draft's other files and writes the whole receipt.

        Args:
            told (`dict`): what stands before versions and files.
            zeros (`Iterable[str]`): names of files whose data are zeros.
        """
        for path in sorted(self.draft.rglob("*")):
            name = path.relative_to(self.draft).as_posix()
            if path.is_file() and name != RECEIPT_NAME and name not in self.outputs:
                self.outputs[name] = self.entry(path, zeros=name in zeros)
        versions = {"versions": {name: version(name) for name in VERSIONS}}
        self._replace(told | versions | {"inputs": self.inputs, "outputs": dict(sorted(self.outputs.items()))})

    def entry(self, path: Path, sha256: str | None = None, zeros: bool = False) -> dict:
        """Returns what is written down of a file: its size and its digest, which is computed unless it is given."""
        size = {"bytes": path.stat().st_size}
        if not self.digests:
            return size
        if zeros:
            return size | {"header_sha256": _sha256(path, start_of_data(path)), "data": "zeros"}
        return size | {"sha256": sha256 or _sha256(path, size["bytes"])}

    def _replace(self, content: dict) -> None:
        unfinished = self.draft / f"{RECEIPT_NAME}.unfinished"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        flush(unfinished)
        os.replace(unfinished, self.draft / RECEIPT_NAME)


def _sha256(path: Path, size: int) -> str:
    """SHA-256 of the first `size` bytes of a file."""
    digest, left = hashlib.sha256(), size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"SHA-256 of {path.name}", leave=False, delay=1)
    with open(path, "rb") as file, bar:
        while block := file.read(min(_BLOCK, left)):
            digest.update(block)
            bar.update(len(block))
            left -= len(block)
    return digest.hexdigest()
