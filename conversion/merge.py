"""Merging: memories of one layout become one, as an average, a sum, or by task arithmetic.

What it chooses: a row means something only with the reader and the backbone that it was trained with. So memories are
merged whose readers (projections, norms, convolution) and backbones are equal, bit for bit, as after
`set_trainable("tables")` on one graft. Readers that differ are merged by the same rule on request alone: a sum of them
would double what both share, and is refused.
Promises: every row is combined in float32 by the rule that is named; rows that several memories changed are counted,
with the cosine of the changes. Never changes a checkpoint, or loads its tables.
Source: docs/surgery.md; task arithmetic: Ilharco and others (arXiv 2212.04089); averages of weights: Wortsman and
others (arXiv 2203.05482).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from transformers.utils import logging

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
from .source_checkpoint import LAYERS_PREFIX, SourceCheckpoint


logger = logging.get_logger(__name__)

HOW = ("average", "sum", "task")

# Fields that may differ between memories that are merged: they change no row and nothing that is read.
_FREE = (
    "engram_trainable",
    "engram_memory_delta",
    "engram_table_dtype",
    "engram_initializer_range",
    "engram_value_initializer_range",
)


@dataclass
class TableConflicts:
    """Rows of one table that several memories hold.

    Args:
        table (`str`): state-dict name of the part.
        rows (`int`): of the part.
        used (`int`): rows that at least one memory holds, or has changed from the base.
        shared (`int`): rows that several do.
        cosine (`float`, *optional*): mean cosine of the vectors of these; below 0 they work against each other.
    """

    table: str
    rows: int
    used: int = 0
    shared: int = 0
    cosine: float | None = None


@dataclass
class Merged:
    """What merging did.

    Args:
        conflicts (`list[TableConflicts]`): of each part of a table.
        merged_readers (`bool`): whether readers differed and were merged.
    """

    conflicts: list[TableConflicts] = field(default_factory=list)
    merged_readers: bool = False

    def lines(self) -> list[str]:
        """Returns the report as lines for people."""
        told = [
            f"{own.table}: {own.used:,} of {own.rows:,} rows are used, {own.shared:,} by several memories"
            + ("" if own.cosine is None else f", with a mean cosine of {own.cosine:.2f}")
            for own in self.conflicts
        ]
        return told + ["readers differed and were merged: measure the loss"] * self.merged_readers


def merge_memories(
    folders: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    how: str,
    weights: Sequence[float] | None = None,
    base: str | os.PathLike | None = None,
    merge_readers: bool = False,
    max_memory_shard_size: int | str = MAX_MEMORY_SHARD_SIZE,
) -> Merged:
    """Writes a checkpoint whose memory is made of several; the backbone and all other files are the first one's.

    Args:
        folders (`list` of `str` or `os.PathLike`): two or more Engram checkpoints with one layout.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        how (`"average"`, `"sum"` or `"task"`):
            The weighted mean of rows; their weighted sum; or the base plus the weighted sum of differences from it.
        weights (`list[float]`, *optional*): of each memory; 1 for each if None. An average divides by their sum.
        base (`str` or `os.PathLike`, *optional*): for "task", the checkpoint that all were trained from.
        merge_readers (`bool`, *optional*, defaults to `False`): merge readers that differ, by the same rule.
        max_memory_shard_size (`int` or `str`, *optional*, defaults to `"8GB"`): largest memory file.

    Returns:
        [`Merged`]: rows that several memories hold.

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: if layouts, backbones or readers differ, or weights or base do not belong to the rule.

    Example:

    ```python
    >>> from engram_transformers.conversion import merge_memories

    >>> print(*merge_memories(["runs/law", "runs/medicine"], "runs/both", how="sum").lines(), sep="\\n")
    ```"""
    weights = _checked_weights(folders, how, weights, base)
    sources = [SourceCheckpoint(folder) for folder in folders]
    start = None if base is None else SourceCheckpoint(base)
    others = sources[1:] + ([] if start is None else [start])
    for other in others:
        _check_layout(sources[0], other)
        _check_backbone(sources[0], other)
    names = sources[0].names(LAYERS_PREFIX)
    readers = [name for name in names if not all(_same(sources[0], other, name, name) for other in others)]
    _check_readers(readers, how, merge_readers)
    changed = {}
    for name in readers:
        held = torch.stack([source.tensor(name).float() for source in sources])  # (memories, ...)
        first = None if start is None else start.tensor(name).float()
        changed[name] = _combined(held, weights, how, first).to(sources[0].tensor(name).dtype)
    report, config = Merged(merged_readers=bool(readers)), sources[0].config
    with new_folder(out) as draft:
        copy_other_files(sources[0].folder, draft)
        config.save_pretrained(draft)
        weight_map = copy_weights(sources[0], draft, changed)
        write_zero_tables(draft, config, weight_map, parse_size(max_memory_shard_size))
        new = NewTensors(draft)
        for name in sources[0].names(TABLES_PREFIX):
            report.conflicts.append(_merge_table(name, sources, start, weights, how, new))
        names = [source.folder.resolve().name for source in sources]
        said = {"memories": names, "how": how, "weights": weights, "merged_readers": bool(readers)}
        said |= {} if start is None else {"base": start.folder.resolve().name}
        found = [asdict(own) for own in report.conflicts]
        write_receipt(draft, sources[0].folder, config, "merge", **said, conflicts=found)
        check_loads(draft)
    return report


def _checked_weights(folders: Sequence, how: str, weights: Sequence[float] | None, base) -> list[float]:
    """Returns the weights of memories; raises ValueError for arguments that do not belong together."""
    if how not in HOW:
        raise ValueError(f"how={how!r} must be one of {', '.join(map(repr, HOW))}.")
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} memories are given, and a merge needs two or more.")
    weights = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(folders) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights={weights} must be {len(folders)} numbers, one for each memory.")
    if how == "average":
        if not sum(weights) > 0:
            raise ValueError(f"weights={weights} of an average must have a positive sum.")
        weights = [weight / sum(weights) for weight in weights]
    if (how == "task") != (base is not None):
        raise ValueError(
            "task arithmetic needs the base that all memories were trained from (base, --base)."
            if base is None
            else f"a base is for how='task', and how is {how!r}: leave it out, or choose 'task'."
        )
    return weights


def _check_layout(first: SourceCheckpoint, other: SourceCheckpoint) -> None:
    """Raises ValueError if rows of two memories do not mean the same n-grams, or are not read in the same way."""
    fields, theirs = (
        {name: value for name, value in vars(source.config).items() if name.startswith("engram_") and name not in _FREE}
        for source in (first, other)
    )
    if different := sorted(name for name in fields if fields[name] != theirs.get(name)):
        shown = "; ".join(f"{name}: {fields[name]} and {theirs.get(name)}" for name in different[:3])
        raise ValueError(
            f"'{first.folder}' and '{other.folder}' have other layouts ({shown}), so a row of one stands for other "
            "n-grams than the same row of the other: resize_memory (engram resize) re-addresses one of them first."
        )


def _check_backbone(first: SourceCheckpoint, other: SourceCheckpoint) -> None:
    """Raises ValueError if two backbones are not equal."""
    ours, theirs = first.backbone(), other.backbone()
    different = sorted(set(ours) ^ set(theirs)) or [
        name for name in ours if not _same(first, other, ours[name], theirs[name])
    ]
    if different:
        raise ValueError(
            f"the backbones of '{first.folder}' and '{other.folder}' differ, first in '{different[0]}': a memory "
            "belongs to the backbone that it was trained over. Merge memories that were trained over a frozen one."
        )


def _check_readers(different: list[str], how: str, merge_readers: bool) -> None:
    """Raises ValueError if readers differ and must not be merged."""
    if different and how == "sum":
        raise ValueError(
            f"the readers differ, first in '{different[0]}', and a sum of readers reads every row twice: choose "
            "how='average' or 'task' with merge_readers, or merge memories that were trained with "
            'set_trainable("tables") from one graft.'
        )
    if different and not merge_readers:
        raise ValueError(
            f"the readers differ, first in '{different[0]}': rows of one mean something else to the other. Merge "
            'memories that were trained with set_trainable("tables") from one graft; or, for memories of one graft, '
            "merge their readers as well (merge_readers, --merge-readers), and measure the loss."
        )
    if different:
        logger.warning(f"{len(different)} weights of the readers differ and are merged too: measure the loss.")


def _same(first: SourceCheckpoint, other: SourceCheckpoint, ours: str, theirs: str) -> bool:
    """Whether a tensor of two checkpoints has the same type, shape and bits."""
    one, two = first.tensor(ours), other.tensor(theirs)
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for (_, a), (_, b) in zip(pieces(one.reshape(-1)), pieces(two.reshape(-1)), strict=True)
    )


def _combined(held: torch.Tensor, weights: list[float], how: str, base: torch.Tensor | None) -> torch.Tensor:
    """Returns tensors of memories `(memories, ...)`, in float32, as one."""
    factors = torch.tensor(weights, device="cpu").view(-1, *[1] * (held.ndim - 1))
    if how == "task":
        return base + (factors * (held - base)).sum(0)
    return (factors * held).sum(0)


def _merge_table(
    name: str,
    sources: list[SourceCheckpoint],
    start: SourceCheckpoint | None,
    weights: list[float],
    how: str,
    new: NewTensors,
) -> TableConflicts:
    """Writes a part of a table, piece by piece, and counts its conflicts."""
    tables, first_table = [source.tensor(name) for source in sources], None if start is None else start.tensor(name)
    found, cosines = TableConflicts(name, len(tables[0])), 0.0
    for first, rows in pieces(tables[0]):
        part = slice(first, first + len(rows))
        read = [source.values(table[part]).float() for source, table in zip(sources, tables, strict=True)]
        held = torch.stack(read)  # (memories, rows, width)
        base = None if start is None else start.values(first_table[part]).float()  # (rows, width)
        new.write(name, _combined(held, weights, how, base), first)
        moved = held if base is None else held - base
        used = moved.any(-1).sum(0)  # (rows,), how many memories hold each
        found.used += int((used > 0).sum())
        found.shared += int((used > 1).sum())
        cosines += float(_cosines(moved[:, used > 1]).sum())
    found.cosine = cosines / found.shared if found.shared else None
    return found


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Returns the mean cosine `(rows,)` of vectors `(memories, rows, width)`, pairs weighted by their lengths."""
    lengths = vectors.norm(dim=-1)  # (memories, rows)
    products = vectors.sum(0).square().sum(-1) - lengths.square().sum(0)  # (rows,), of all pairs
    return products / (lengths.sum(0).square() - lengths.square().sum(0))
