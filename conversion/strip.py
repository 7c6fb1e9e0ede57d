"""Stripping: the backbone of a checkpoint, as it would be without a memory.

Promises: every weight has the bytes that the checkpoint holds; files that a graft took from its donor are copied as
they are; the result loads with Transformers alone, and did before it appeared. Never changes the checkpoint.
Source: docs/surgery.md.
"""

import copy
import json
import os
from pathlib import Path

from ..configuration import EngramFormatError
from ..files_atomic_engram import ADAPTER_FILES, INDEX_NAME, MODEL_STEM, SINGLE_NAME
from ..files_safetensors_engram import read_header, shard_name, write_shard
from .backbone import auto_class
from .donor import RECEIPT_NAME
from .new_checkpoint import copy_other_files, new_folder
from .reference_copy import copy_by_reference
from .source_checkpoint import SourceCheckpoint


def strip_memory(folder: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes the backbone of a checkpoint without its memory.

    Args:
        folder (`str` or `os.PathLike`): an Engram checkpoint.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.

    Returns:
        `Path` of the new folder.

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: if the folder holds a memory alone, or no whole checkpoint.
        [`EngramFormatError`]: if the backbone would not load cleanly.

    Example:

    ```python
    >>> from engram_transformers.conversion import strip_memory
    >>> from transformers import AutoModelForCausalLM

    >>> AutoModelForCausalLM.from_pretrained(strip_memory("runs/graft", "runs/backbone"))
    ```"""
    source, out = SourceCheckpoint(folder), Path(out)
    by_file: dict[str, dict[str, str]] = {}
    for name, stored in source.backbone().items():
        by_file.setdefault(source.weight_map[stored], {})[name] = stored
    if not by_file:
        raise ValueError(f"'{folder}' holds a memory without a backbone: name a whole checkpoint.")
    config = copy.deepcopy(source.config.whole_config)
    config.dtype = source.config.dtype
    with new_folder(out) as draft:
        copy_other_files(source.folder, draft, _is_of_backbone)
        config.save_pretrained(draft)
        weight_map = {}
        for number, (file_name, names) in enumerate(sorted(by_file.items()), start=1):
            new_name = SINGLE_NAME if len(by_file) == 1 else shard_name(MODEL_STEM, number, len(by_file))
            _copy_file(source, file_name, names, draft / new_name)
            weight_map |= dict.fromkeys(names, new_name)
        if len(by_file) > 1:
            total = sum(e.end - e.begin for f in set(weight_map.values()) for e in read_header(draft / f).values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (draft / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _check_loads(draft, config)
    return out


def _is_of_backbone(name: str) -> bool:
    """Whether a file of a checkpoint's folder belongs to the backbone too."""
    return not name.endswith("_engram.py") and name not in (RECEIPT_NAME, "README.md", *ADAPTER_FILES)


def _copy_file(source: SourceCheckpoint, file_name: str, names: dict[str, str], target: Path) -> None:
    """Copies the backbone's tensors of a file, by their names in the backbone."""
    if set(names) == set(read_header(source.folder / file_name)):
        copy_by_reference(source.folder / file_name, target)
    else:
        write_shard(target, {name: source.tensor(stored) for name, stored in names.items()})


def _check_loads(draft: Path, config) -> None:
    """Raises EngramFormatError unless Transformers loads every weight of a backbone, and no other."""
    _, info = auto_class(config).from_pretrained(draft, output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if problems := [f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}" for kind in kinds if info[kind]]:
        raise EngramFormatError(f"the backbone does not load cleanly, so it was removed: {'; '.join(problems)}.")
