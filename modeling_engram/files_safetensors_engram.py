"""Memory shards: safetensors files, written sparsely and checked before they are mapped.

Promises: a written file is an ordinary safetensors file; zeros in it take no disk space (a sparse file); a truncated,
missing or misshapen shard is named with what to do; an index entry can only name a plain file of the folder. Never
unpickles.
Source: docs/format.md; the safetensors format (8 bytes of length, JSON header, data).
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .configuration_engram import EngramFormatError
from .files_atomic_engram import (
    INDEX_NAME,
    INDEX_NAMES,
    SINGLE_NAME,
    finish_saves,
)


# safetensors maps privately and cannot map a file larger than RAM and swap, so large tables are split.
MAX_MEMORY_SHARD_SIZE = "8GB"

# Blocks of this many bytes become holes in the file if they are zero.
ZERO_BLOCK = 1 << 20

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class ZeroTensor:
    """A tensor of zeros that exists only as a hole in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made block by block while it is written; `blocks()` yields its rows in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[torch.Tensor]]


# What can be written.
Written = torch.Tensor | ZeroTensor | StreamedTensor


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in a safetensors header: type name, shape, and first and last byte of its data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_bytes(tensor: Written) -> int:
    """Returns the bytes of a tensor's data."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def parse_size(size: int | str) -> int:
    """Returns the bytes of a size such as 5000000 or "8GB" (decimal units, as in Transformers)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B\s*", str(size), re.IGNORECASE)
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else size
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"size {size!r} must be a positive number of bytes or a text such as '8GB' or '500MB'.")
    return count


def group_tensors(tensors: Mapping[str, Written], max_bytes: int) -> list[list[str]]:
    """Groups tensors into files of at most `max_bytes`, keeping their order.

    Raises:
        `ValueError`: for a single tensor that is larger; the number of parts is fixed at the graft.
    """
    groups: list[list[str]] = [[]]
    room = max_bytes
    for name, tensor in tensors.items():
        size = tensor_bytes(tensor)
        if size > max_bytes:
            raise ValueError(
                f"'{name}' has {size:,} bytes, more than max_memory_shard_size={max_bytes:,}: allow larger files, or "
                f"graft again with at least {-(-size // max_bytes)} times as many engram_table_parts."
            )
        if size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    return groups


def shard_name(stem: str, number: int, count: int) -> str:
    """Returns the file name of shard `number` (from 1) of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Written]) -> None:
    """Writes a new safetensors file, with blocks of zeros as holes."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # widest first keeps alignment
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in ordered:
        tensor, begin = tensors[name], offset
        offset += tensor_bytes(tensor)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, offset],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in ordered:
            write_data(file, tensors[name])
        file.truncate(8 + len(encoded) + offset)


def write_data(file, tensor: Written) -> None:
    """Appends a tensor's bytes; blocks of zeros only move the file position."""
    if isinstance(tensor, ZeroTensor):
        file.seek(tensor_bytes(tensor), os.SEEK_CUR)
        return
    if isinstance(tensor, StreamedTensor):
        for block in tensor.blocks():
            write_data(file, block)
        return
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()  # (bytes,)
    for first in range(0, len(data), ZERO_BLOCK):
        block = data[first : first + ZERO_BLOCK]
        if block.any():
            file.write(memoryview(block))
        else:
            file.seek(len(block), os.SEEK_CUR)


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Written], max_bytes: int) -> dict[str, str]:
    """Writes tensors into as many files as needed, unless they are there; returns the file name of every tensor."""
    groups = group_tensors(tensors, max_bytes)
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        file_name = shard_name(stem, number, len(groups))
        if not (folder / file_name).exists():
            write_shard(folder / file_name, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file_name))
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int, tables: Collection[str] = ()) -> None:
    """Writes the ordinary Transformers index over all files, and one that leaves out `tables`."""
    rest = {name: file_name for name, file_name in weight_map.items() if name not in tables}
    for file_name, held in zip(INDEX_NAMES, (weight_map, rest), strict=True):
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(held.items()))}
        (folder / file_name).parent.mkdir(exist_ok=True)
        (folder / file_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Reads the header of a safetensors file and checks the file's length against it.

    Raises:
        `FileNotFoundError`: if the file is missing.
        [`EngramFormatError`]: if it is not a safetensors file, or shorter or longer than its header says.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder '{path.parent}' that could hold '{path.name}': give its path.")
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path.name}' is missing from '{path.parent}': the checkpoint is incomplete. "
            "Copy or download the file again."
        )
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= size - 8:
                raise ValueError(f"header length {length}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _tensor_entry(entry) for name, entry in header.items()}
        _check_layout(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise EngramFormatError(
            f"'{path}' is not a complete safetensors file ({error}): it is truncated or damaged. "
            "Copy or download it again."
        ) from error
    expected = 8 + length + max((entry.end for entry in entries.values()), default=0)
    if size != expected:
        raise EngramFormatError(
            f"'{path}' has {size:,} bytes, its header says {expected:,}: it is "
            f"{'truncated' if size < expected else 'damaged'}. Copy or download it again."
        )
    return entries


def _check_layout(entries: Mapping[str, TensorEntry]) -> None:
    """Raises ValueError unless tensors are contiguous and each is as long as its shape says."""
    sizes = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
    begin = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        length = entry.end - entry.begin
        if entry.dtype in sizes and length != math.prod(entry.shape) * sizes[entry.dtype]:
            raise ValueError(f"'{name}' has {length} bytes for the shape {list(entry.shape)}")
        if entry.begin != begin:
            raise ValueError(f"'{name}' begins at {entry.begin}, its neighbour ends at {begin}")
        begin = entry.end


def start_of_data(path: Path) -> int:
    """Returns the first byte of a safetensors file's data, from which its header counts."""
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


def torch_dtype(name: str) -> torch.dtype:
    """Returns the dtype that a header names.

    Raises:
        [`EngramFormatError`]: for a type that no table has.
    """
    for dtype, known in DTYPE_NAMES.items():
        if known == name:
            return dtype
    raise EngramFormatError(f"a memory shard holds rows of type {name}: known are {', '.join(DTYPE_NAMES.values())}.")


def _tensor_entry(entry: dict) -> TensorEntry:
    """Checks one tensor's entry of a header."""
    begin, end = entry["data_offsets"]
    if not (type(begin) is int and type(end) is int and 0 <= begin <= end):
        raise ValueError(f"data_offsets {entry['data_offsets']}")
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), begin, end)


def read_index(folder: Path, name: str = INDEX_NAME) -> dict[str, str]:
    """Reads an index of a folder: file name of every tensor.

    Raises:
        `FileNotFoundError`: if there is no index.
        [`EngramFormatError`]: if it is not an index, names anything but a plain safetensors file of the folder, or a
            `model.safetensors` would be read instead of it.
    """
    finish_saves(folder)
    path = folder / name
    if (folder / SINGLE_NAME).exists():
        raise EngramFormatError(
            f"'{folder / SINGLE_NAME}' would be read instead of the index and its memory shards: it is left over from "
            "another model. Delete it."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no {name}: it is not an Engram checkpoint, or a save was interrupted. Save it again, or "
            "graft a donor with `engram graft DONOR OUT`."
        )
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngramFormatError(f"'{path}' is not a checkpoint index ({error}): restore it.") from error
    for name, file_name in entries:
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", file_name, re.ASCII):
            raise EngramFormatError(
                f"'{path}' maps '{name}' to {file_name!r}: only plain .safetensors file names of the same folder are "
                "read. Do not load this checkpoint unless you know who wrote it."
            )
    return weight_map


def total_size(folder: Path) -> int:
    """Returns the bytes of all tensors, as the index says; 0 if it does not."""
    read_index(folder)
    return json.loads((folder / INDEX_NAME).read_text(encoding="utf-8")).get("metadata", {}).get("total_size", 0)


def check_folder(
    folder: Path, expected: Mapping[str, tuple[tuple[int, ...], str]], index_name: str = INDEX_NAME
) -> None:
    """Checks every file of a checkpoint by its header, and that the memory is complete and has the right shapes.

    `expected` has shape and safetensors type name of the memory's tensors.

    Raises:
        `FileNotFoundError` or [`EngramFormatError`]: naming the file and what to do.
    """
    weight_map = read_index(folder, index_name)
    headers = {file_name: read_header(folder / file_name) for file_name in sorted(set(weight_map.values()))}
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise EngramFormatError(
                f"the index says that '{file_name}' holds '{name}', but it does not: restore the file."
            )
    for name, (shape, dtype) in expected.items():
        if name not in weight_map:
            raise EngramFormatError(
                f"'{folder / index_name}' does not name '{name}': the memory is incomplete, and it is never filled "
                "with random rows. Restore the index and the files that it names, or graft again."
            )
        entry = headers[weight_map[name]][name]
        if entry.shape != shape or entry.dtype != dtype:
            raise EngramFormatError(
                f"'{weight_map[name]}' holds '{name}' as {entry.dtype} {list(entry.shape)}, config.json needs {dtype} "
                f"{list(shape)}: the shard was made with other sizes or another seed. Load the config.json that was "
                "saved beside it, or graft again."
            )
