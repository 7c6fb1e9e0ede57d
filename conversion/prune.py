"""Pruning: rows that say little become zeros, and zeros become holes of the file.

What it chooses: the hash says where a row lies, so no row can be taken out. A row of zeros adds nothing, and blocks of
4 KiB of zeros take no disk on file systems with sparse files. Shape, layout and everything else stay. What has to
travel is smaller as a knowledge pack (`extract_pack`), which holds the rows of its n-grams alone.
Promises: a row that stays keeps its bits. Never changes the checkpoint, or loads its tables.
Source: docs/surgery.md.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files_atomic_engram import MEMORY_STEM
from ..files_safetensors_engram import MAX_MEMORY_SHARD_SIZE, parse_size
from ..rows_placement_engram import TABLES_PREFIX
from .new_checkpoint import (
    NewTensors,
    check_loads,
    copy_other_files,
    copy_weights,
    new_folder,
    pieces,
    write_receipt,
    write_zero_tables,
)
from .source_checkpoint import SourceCheckpoint


@dataclass
class Pruned:
    """What pruning did.

    Args:
        rows (`int`): of all tables.
        were_zero (`int`): rows that were zero before.
        zeroed (`int`): rows that became zero.
        disk_before (`int`): bytes of disk that the memory's files take in the old checkpoint.
        disk_after (`int`): the same in the new one.
    """

    rows: int = 0
    were_zero: int = 0
    zeroed: int = 0
    disk_before: int = 0
    disk_after: int = 0

    def __str__(self) -> str:
        return (
            f"{self.zeroed:,} of {self.rows:,} rows became zero, {self.were_zero:,} were; the memory's files take "
            f"{self.disk_after:,} bytes of disk, {self.disk_before:,} before"
        )


def prune_memory(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    min_norm: float | None = None,
    untouched: bool = False,
    max_memory_shard_size: int | str = MAX_MEMORY_SHARD_SIZE,
) -> Pruned:
    """Writes a checkpoint in which small rows are zero, and zeros take no disk.

    Args:
        folder (`str` or `os.PathLike`): an Engram checkpoint.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        min_norm (`float`, *optional*): rows with a smaller Euclidean norm become zero; infinity empties the table.
        untouched (`bool`, *optional*, defaults to `False`):
            In place of `min_norm`: change no row; those that no training touched are zero, and become holes.
        max_memory_shard_size (`int` or `str`, *optional*, defaults to `"8GB"`): largest memory file.

    Returns:
        [`Pruned`].

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: if neither or both of `min_norm` and `untouched` are given, or `min_norm` is not positive.

    Example:

    ```python
    >>> from engram_transformers.conversion import prune_memory

    >>> print(prune_memory("runs/graft", "runs/pruned", min_norm=0.05))
    ```"""
    if (min_norm is None) != untouched:
        raise ValueError("give min_norm (--min-norm), or untouched (--untouched) for rows that are zero, and not both.")
    if min_norm is not None and not min_norm > 0:
        raise ValueError(f"min_norm={min_norm} must be larger than 0; rows with a smaller norm become zero.")
    source = SourceCheckpoint(folder)
    report = Pruned(disk_before=_disk(source.folder))
    with new_folder(out) as draft:
        copy_other_files(source.folder, draft)
        source.config.save_pretrained(draft)
        write_zero_tables(draft, source.config, copy_weights(source, draft), parse_size(max_memory_shard_size))
        new = NewTensors(draft)
        for name in source.names(TABLES_PREFIX):
            for first, rows in pieces(source.tensor(name)):
                new.write(name, _kept(source, rows, min_norm, report), first)
        report.disk_after = _disk(draft)
        said = {"min_norm": str(min_norm)} if min_norm is not None else {"untouched": True}
        write_receipt(draft, source.folder, source.config, "prune", **said, rows=report.rows, zeroed=report.zeroed)
        check_loads(draft)
    return report


def _kept(source: SourceCheckpoint, rows: torch.Tensor, min_norm: float | None, report: Pruned) -> torch.Tensor:
    """Returns rows `(rows, width)`, those below a norm as zeros, and counts them."""
    live = (rows != 0).any(-1)  # (rows,); of uint8, `any` gives uint8
    report.rows += len(rows)
    report.were_zero += int((~live).sum())
    if min_norm is None:
        return rows
    gone = live & (source.values(rows).float().norm(dim=-1) < min_norm)  # (rows,)
    report.zeroed += int(gone.sum())
    return rows.masked_fill(gone[:, None], 0)


def _disk(folder: Path) -> int:
    """Returns the bytes of disk that a folder's memory files take."""
    # Windows does not count blocks.
    return sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in folder.glob(f"{MEMORY_STEM}-*.safetensors"))
