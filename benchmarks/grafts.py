"""Checkpoints for measuring: tables full of real bytes, at known sizes, and the page cache over their files.

Promises: every byte of a table is written (no holes), random, finite, not zero, and fresh for every block, so that
neither a disk nor a cache can answer from what it has seen. Files are filled in place at the offsets of the safetensors
header, so a table may be larger than RAM.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from engram_transformers.conversion import graft

from .command import refuse_without_room, say


# Of checkpoint format 1 (docs/format.md).
TABLES, TABLE_FILES = "memory.tables.", "engram-memory-*.safetensors"
BLOCK = 1 << 26

# Written out and dropped from the page cache after this many bytes: a table must not push everything else out of RAM.
SYNC_EVERY = 1 << 30

# Bits that stay random, and bits that are set, in eight bytes: sign, mantissa and the exponent's last two bits vary,
# so values lie between 2**-7 and 2**-3, of the size of trained rows, and none is zero, infinite or NaN.
RANDOM_BITS = {"BF16": 0x81FF_81FF_81FF_81FF, "F32": 0x81FF_FFFF_81FF_FFFF}
SET_BITS = {"BF16": 0x3C00_3C00_3C00_3C00, "F32": 0x3C00_0000_3C00_0000}
WIDTHS = {"bfloat16": 2, "float32": 4}

# 8 heads for each of the orders 2 and 3, as in the paper.
HEADS, HEADS_A_LAYER = 8, 16


def rows_for(size: int, layers: list[int], head_dim: int, dtype: str = "bfloat16") -> int:
    """Rows of one head with which all tables together have about `size` bytes."""
    return max(2, size // (len(layers) * HEADS_A_LAYER * head_dim * WIDTHS[dtype]))


def filled_graft(
    donor: Path, out: Path, layers: list[int], rows: int, head_dim: int, dtype: str = "bfloat16", **more
) -> Path:
    """A graft in the paper's shape whose tables are full of random rows; refused before it is made if it cannot fit."""
    size = rows * len(layers) * HEADS_A_LAYER * head_dim * WIDTHS[dtype]
    copy = sum(path.stat().st_size for path in donor.glob("*.safetensors"))
    refuse_without_room(out.parent, {"table": size, "copy of the backbone": copy})
    say(f"filling {size / 1e9:.2f} GB")
    more |= {"engram_head_dim": head_dim, "engram_n_heads": HEADS, "engram_table_dtype": dtype}
    graft(donor, out, layers, engram_vocab_size=rows, **more)
    for path in table_files(out):
        fill(path)
    return out


def table_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold its tables."""
    return sorted(Path(folder).glob(TABLE_FILES))


def tables_of(path: Path) -> list[tuple[str, int, int]]:
    """Type, first byte in the file and byte after the last of every table in a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = {name: entry for name, entry in json.loads(file.read(length)).items() if name.startswith(TABLES)}
    return [(e["dtype"], *(8 + length + offset for offset in e["data_offsets"])) for e in header.values()]


def fill(path: Path) -> None:
    """Fills the tables of one file with random rows; raises OSError if the file still has holes after that."""
    random = np.random.Generator(np.random.SFC64())
    waiting = 0
    with open(path, "r+b", buffering=0) as file:
        for dtype, begin, end in tables_of(path):
            for place in range(begin, end, BLOCK):
                size = min(BLOCK, end - place)
                write_all(file.fileno(), random_block(random, size, dtype), place)
                waiting += size
                if waiting >= SYNC_EVERY:
                    drop([path])
                    waiting = 0
    drop([path])
    status = path.stat()
    if status.st_blocks * 512 < status.st_size:
        raise OSError(f"'{path}' has {status.st_size:,} bytes, but only {status.st_blocks * 512:,} are on disk.")


def random_block(random: np.random.Generator, size: int, dtype: str) -> np.ndarray:
    """`size` bytes of random values of a safetensors type, as `uint8`."""
    words = random.integers(0, 2**64, size=-(-size // 8), dtype=np.uint64)
    words &= np.uint64(RANDOM_BITS[dtype])
    words |= np.uint64(SET_BITS[dtype])
    return words.view(np.uint8)[:size]


def write_all(file: int, block: np.ndarray, offset: int) -> None:
    """Writes a whole block; the kernel may take less at a time."""
    view = memoryview(block)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def drop(paths: Iterable[Path]) -> None:
    """Writes files to disk and drops them from the page cache: reads are cold after it."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def warm(paths: Iterable[Path]) -> None:
    """Reads files once from end to end."""
    block = bytearray(BLOCK)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def describe(folder: Path) -> dict:
    """The sizes of a graft that a result names."""
    config, files = AutoConfig.from_pretrained(folder), table_files(folder)
    width = config.engram_head_dim * WIDTHS[config.engram_table_dtype]
    total = sum(end - begin for path in files for _, begin, end in tables_of(path))
    names = {"layers": "layer_ids", "orders": "orders", "heads": "n_heads", "head_dim": "head_dim"}
    names |= {"table_dtype": "table_dtype", "kernel_size": "kernel_size"}
    sizes = {"row_bytes": width, "rows": total // width, "table_bytes": total, "files": len(files)}
    return {name: getattr(config, f"engram_{own}") for name, own in names.items()} | sizes
