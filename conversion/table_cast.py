"""Casts: a checkpoint whose tables have another type, quantised or not.

What it chooses: rows are read, cast and written block by block, and what that changes is measured on the way. Types of
which neither is float32 are cast by way of it. Files without tables are copied by reference where the file system can.
Promises: the new folder appears whole and flushed, or not at all; it holds the same bytes each time; memory does not
grow with the tables; rows that the new type cannot hold are refused. Never changes the checkpoint that is read, and
never overwrites.
Source: docs/format.md, docs/grafting.md.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save

from ..configuration import EngramConfig
from ..configuration.configuration_engram import TableDtype
from ..files_atomic_engram import CONFIG_NAME, INDEX_NAMES, MEMORY_STEM, checkpoint_in
from ..files_checkpoint_engram import auto_map, expected_shards
from ..files_safetensors_engram import (
    MAX_MEMORY_SHARD_SIZE,
    StreamedTensor,
    check_folder,
    parse_size,
    read_header,
    read_index,
    write_index,
    write_shards,
)
from ..modeling_engram import EngramForCausalLM
from ..rows_placement_engram import TABLES_PREFIX
from ..rows_quantised_engram import QUANTISED, dequantise, quantise, stored_as
from ..rows_storage_engram import CheckpointTables, FilePart
from .new_checkpoint import new_folder, refuse_used, write_receipt
from .reference_copy import copy_by_reference


# Values that are cast at once: few enough to stay in a processor's cache.
BLOCK_VALUES = 1 << 17

# Tokens that are read at once where a loss is measured.
TEXT_WINDOW = 512


@dataclass
class CastReport:
    """What a cast changed.

    Args:
        folder (`Path`): the new checkpoint.
        before (`str`): type of the tables that were read.
        after (`str`): type of the new ones.
        bytes_before (`int`): of the tables that were read.
        bytes_after (`int`): of the new ones.
        largest (`float`): largest absolute value that was read.
        rms (`float`): root mean square of the values that were read.
        max_error (`float`): largest difference of a value.
        rms_error (`float`): root mean square of the differences.
        loss_before (`float`, *optional*): mean loss on a text, nats a token.
        loss_after (`float`, *optional*): the same of the new checkpoint.
    """

    folder: Path
    before: str
    after: str
    bytes_before: int = 0
    bytes_after: int = 0
    largest: float = 0.0
    rms: float = 0.0
    max_error: float = 0.0
    rms_error: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None

    def lines(self) -> list[str]:
        """Returns the report as lines for people."""
        lines = [
            f"rows in {self.after}, {self.bytes_after:,} bytes; before in {self.before}, {self.bytes_before:,}",
            f"largest error {self.max_error:.3g}, {self.max_error / (self.largest or 1):.3%} of the largest value",
            f"RMS error {self.rms_error:.3g}, {self.rms_error / (self.rms or 1):.3%} of the values' RMS",
        ]
        if self.loss_after is not None:
            change = self.loss_after - self.loss_before
            lines.append(f"loss on the text {self.loss_after:.5f} nats a token, {change:+.5f} by the cast")
        return lines


def cast(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    dtype: str,
    *,
    text: str | None = None,
    max_memory_shard_size: int | str = MAX_MEMORY_SHARD_SIZE,
    advance: Callable[[int, int], None] | None = None,
) -> CastReport:
    """Writes a copy of a checkpoint whose tables have another type.

    Args:
        checkpoint (`str` or `os.PathLike`): folder of a whole Engram checkpoint.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        dtype (`str`): "int8", "float8_e4m3fn", "bfloat16", "float16" or "float32".
        text (`str`, *optional*): a text on which the loss is measured before and after, with the rows on disk.
        max_memory_shard_size (`int` or `str`, *optional*, defaults to `"8GB"`): largest memory file.
        advance (callable, *optional*): told the bytes of all tables, and how many of them were read.

    Returns:
        [`CastReport`] with the error that the cast introduced. `engram_graft.json` has it too.

    Raises:
        `FileNotFoundError`: if there is no checkpoint, or a file of it is missing.
        `FileExistsError`: if `out` is in use.
        `ValueError`: for an unknown type or the one that the tables have, a memory delta, or rows that the type cannot
            hold.
        [`EngramFormatError`]: if the checkpoint is damaged.

    Example:

    ```python
    >>> from engram_transformers.conversion import cast

    >>> report = cast("runs/graft", "runs/graft-int8", "int8")
    >>> print(*report.lines(), sep="\\n")
    ```"""
    folder, out, most = Path(checkpoint), Path(out), parse_size(max_memory_shard_size)
    config = _checked(folder, out, dtype)
    fresh = copy.deepcopy(config)
    fresh.engram_table_dtype = dtype
    fresh.check_engram()
    if getattr(torch, dtype) in QUANTISED and fresh.engram_trainable != "reader":
        fresh.engram_trainable = None  # its rows are not trained
    ids = None if text is None else _tokens(folder, text)
    report = CastReport(out, config.engram_table_dtype, dtype)
    if ids is not None:
        report.loss_before = text_loss(folder, ids)
    with new_folder(out) as draft:
        weight_map = _write_tables(draft, folder, fresh, most, report, advance)
        _write_rest(draft, folder, fresh, weight_map)
        check_folder(draft, expected_shards(fresh))
        if ids is not None:
            report.loss_after = text_loss(draft, ids)
        told = {name: value for name, value in asdict(report).items() if name != "folder" and value is not None}
        write_receipt(draft, folder, fresh, "cast", **told)
    return report


def _checked(folder: Path, out: Path, dtype: str) -> EngramConfig:
    """Checks the arguments of a cast and the checkpoint's files; returns its configuration."""
    known = get_args(TableDtype)
    if dtype not in known:
        raise ValueError(f"dtype {dtype!r} of a table must be one of {', '.join(map(repr, known))}.")
    refuse_used(out)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"'{folder}' has no {CONFIG_NAME}: name the folder of an Engram checkpoint.")
    config = EngramConfig.from_pretrained(folder)
    if checkpoint_in(folder) == "delta":
        raise ValueError(
            f"'{folder}' holds a memory delta of another checkpoint, and no tables: load it, save_pretrained(folder), "
            "and cast that folder."
        )
    if config.engram_table_dtype == dtype:
        raise ValueError(f"the tables of '{folder}' are {dtype!r} already: name another type.")
    check_folder(folder, expected_shards(config))
    return config


def _write_tables(
    draft: Path, folder: Path, fresh: EngramConfig, max_bytes: int, report: CastReport, advance: Callable | None
) -> dict[str, str]:
    """Writes the tables in their new type; returns the file of each part."""
    tables = CheckpointTables(folder)
    parts = {name: tables.part(name) for name in tables.weight_map if name.startswith(TABLES_PREFIX)}
    kept = {file for name, file in tables.weight_map.items() if name not in parts}
    mixed = sorted(kept & {tables.weight_map[name] for name in parts})
    if mixed:
        raise ValueError(
            f"'{folder / mixed[0]}' holds tables and other weights: save the checkpoint with save_pretrained."
        )
    run = _Cast(getattr(torch, report.before), getattr(torch, report.after), fresh.engram_head_dim)
    total = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts.values())
    told = partial(advance, total) if advance else None
    stored, length = stored_as(run.after, run.width)
    streamed = {
        name: StreamedTensor((part.shape[0], length), stored, partial(run.blocks, name, part, told))
        for name, part in parts.items()
    }
    written = write_shards(draft, MEMORY_STEM, streamed, max_bytes)
    values = max(1, sum(part.shape[0] for part in parts.values()) * run.width)
    report.bytes_before = total
    report.bytes_after = sum(math.prod(tensor.shape) * stored.itemsize for tensor in streamed.values())
    report.largest, report.max_error = run.largest, run.max_error
    report.rms, report.rms_error = math.sqrt(run.squares / values), math.sqrt(run.squared_errors / values)
    return written


@dataclass
class _Cast:
    """Casts blocks of rows and sums up what that changes."""

    before: torch.dtype
    after: torch.dtype
    width: int
    largest: float = 0.0
    max_error: float = 0.0
    squares: float = 0.0
    squared_errors: float = 0.0
    done: int = 0

    def blocks(self, name: str, part: FilePart, told: Callable | None) -> Iterator[torch.Tensor]:
        """Yields the rows of a part in their new type, `(rows, stored width)`."""
        size, height = part.shape[1] * part.dtype.itemsize, max(1, BLOCK_VALUES // self.width)
        for first in range(0, part.shape[0], height):
            count = min(height, part.shape[0] - first)
            data = torch.empty(count * size, dtype=torch.uint8, device="cpu")  # (bytes,)
            part.file.read(memoryview(data.numpy()), part.offset + first * size)
            try:
                yield self.cast(data.view(part.dtype).view(count, part.shape[1]))
            except ValueError as error:
                raise ValueError(f"'{name}' cannot be cast, in rows {first}..{first + count - 1}: {error}") from error
            self.done += len(data)
            if told is not None:
                told(self.done)

    def cast(self, rows: torch.Tensor) -> torch.Tensor:
        """Casts rows `(rows, stored width)`."""
        if not rows.view(torch.uint8).numpy().any():  # a block of a fresh table
            stored, length = stored_as(self.after, self.width)
            return torch.zeros(len(rows), length, dtype=stored, device="cpu")
        values = dequantise(rows, self.before) if self.before in QUANTISED else rows.float()  # (rows, width)
        cast = quantise(values, self.after) if self.after in QUANTISED else values.to(self.after)
        again = dequantise(cast, self.after) if self.after in QUANTISED else cast.float()  # (rows, width)
        error = (again - values).flatten()  # (rows * width,)
        flat = values.flatten()
        largest, max_error = (max(map(abs, map(float, torch.aminmax(each)))) for each in (flat, error))
        if not math.isfinite(max_error):
            raise ValueError(f"values up to {largest:.4g} do not fit {self.after}: name a type that holds them.")
        self.largest, self.max_error = max(self.largest, largest), max(self.max_error, max_error)
        self.squares += float(flat.dot(flat))
        self.squared_errors += float(error.dot(error))
        return cast


def _write_rest(draft: Path, folder: Path, fresh: EngramConfig, weight_map: dict[str, str]) -> None:
    """Writes configuration, code and indexes, and copies all other files."""
    with torch.device("meta"):
        empty = EngramForCausalLM.class_for(fresh)(fresh, hold_tables=False)
    before = read_index(folder)
    replaced = {file for name, file in before.items() if name in weight_map}
    custom_object_save(empty, draft, config=fresh)  # an older copy of the code may not know the type
    fresh.auto_map = auto_map(fresh)
    fresh.save_pretrained(draft)
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        target = draft / path.relative_to(folder)
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and not target.exists() and path.name not in {*replaced, *INDEX_NAMES}:
            target.parent.mkdir(exist_ok=True)
            copy_by_reference(path, target)
    total = sum(entry.end - entry.begin for path in draft.glob("*.safetensors") for entry in read_header(path).values())
    write_index(draft, before | weight_map, total, weight_map)


def _tokens(folder: Path, text: str) -> torch.Tensor:
    """Returns the tokens of a text, `(tokens,)`."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids, device="cpu")  # (tokens,)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, and a loss needs two: give a longer text.")
    return ids


@torch.no_grad()
def text_loss(folder: str | os.PathLike, ids: torch.Tensor) -> float:
    """Returns the mean loss of a checkpoint on tokens `(tokens,)`, in nats, read in windows; its rows stay on disk."""
    model = EngramForCausalLM.from_pretrained(folder, engram_placement="disk").eval()
    total, count = 0.0, 0
    for window in ids.split(TEXT_WINDOW):
        if len(window) > 1:
            total += float(model(window[None], labels=window[None], use_cache=False).loss) * (len(window) - 1)
            count += len(window) - 1
    return total / count
