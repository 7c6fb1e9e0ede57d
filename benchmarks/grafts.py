"""Grafts for measuring: tables full of real bytes, at known sizes.

Promises: every byte of a table is written (no holes), random, finite and not zero, fresh for every block, so that
neither a disk nor a cache can answer from what it has seen; a file that was filled is checked to be whole on disk.
Fills in place at the offsets of the safetensors header, so a table may be larger than RAM.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from engram_transformers.conversion import graft
from engram_transformers.files_atomic_engram import MEMORY_STEM
from engram_transformers.files_safetensors_engram import read_header
from engram_transformers.memory_engram import MEMORY_PREFIX


TABLES = f"{MEMORY_PREFIX}tables."
BLOCK = 1 << 26

# Written out and dropped from the page cache after so many bytes: a table must not push everything else out of RAM.
SYNC_EVERY = 1 << 30

# Bits that stay random, and bits that are set, in eight bytes: sign, mantissa and the exponent's last two bits vary,
# so values lie between 2**-7 and 2**-3, of the size of trained rows, and none is zero, infinite or no number.
RANDOM_BITS = {"BF16": 0x81FF_81FF_81FF_81FF, "F16": 0x8FFF_8FFF_8FFF_8FFF, "F32": 0x81FF_FFFF_81FF_FFFF}
SET_BITS = {"BF16": 0x3C00_3C00_3C00_3C00, "F16": 0x2000_2000_2000_2000, "F32": 0x3C00_0000_3C00_0000}
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}


def rows_for(size: int, layers: int, head_dim: int, dtype: str) -> int:
    """Rows of one head (of 8 for each of two orders) with which all tables together have about `size` bytes."""
    return max(2, size // (layers * 16 * head_dim * WIDTHS[dtype]))


def donor_bytes(donor: Path) -> int:
    """Bytes of a donor's weight files, which every graft has once more."""
    return sum(path.stat().st_size for path in Path(donor).glob("*.safetensors"))


def make_graft(donor: Path, out: Path, layers: list[int], rows: int, head_dim: int, dtype: str, **more) -> Path:
    """A graft of the paper's shape (8 heads), its tables still holes; `engram graft` does the same."""
    fields = {"engram_vocab_size": rows, "engram_head_dim": head_dim, "engram_table_dtype": dtype, "engram_n_heads": 8}
    return graft(donor, out, layers, **fields, **more)


def filled_graft(donor: Path, out: Path, layers: list[int], rows: int, head_dim: int, dtype: str) -> Path:
    """`make_graft` with every table filled."""
    folder = make_graft(donor, out, layers, rows, head_dim, dtype)
    for path in memory_files(folder):
        fill(path)
    return folder


def memory_files(folder: Path) -> list[Path]:
    """The memory's files of a checkpoint."""
    return sorted(Path(folder).glob(f"{MEMORY_STEM}-*.safetensors"))


def table_bytes(paths: Iterable[Path]) -> int:
    """Bytes of all tables in some memory files."""
    headers = (read_header(path) for path in paths)
    return sum(e.end - e.begin for header in headers for name, e in header.items() if name.startswith(TABLES))


def fill(path: Path, seed: int | None = None) -> int:
    """Fills the tables of one memory file with random rows, and makes sure that the file has no hole.

    Args:
        path (`Path`): a memory file; the rest of it stays as it is.
        seed (`int`, *optional*): None takes fresh randomness from the system.

    Returns:
        `int`: bytes written.

    Raises:
        `OSError`: if the file still has holes.
    """
    random = np.random.Generator(np.random.SFC64(seed))
    entries = {name: entry for name, entry in read_header(path).items() if name.startswith(TABLES)}
    with open(path, "r+b", buffering=0) as file:
        data_begins = 8 + int.from_bytes(file.read(8), "little")
        written, waiting = 0, 0
        for entry in entries.values():
            for begin in range(entry.begin, entry.end, BLOCK):
                size = min(BLOCK, entry.end - begin)
                write_all(file.fileno(), random_block(random, size, entry.dtype), data_begins + begin)
                written, waiting = written + size, waiting + size
                if waiting >= SYNC_EVERY:
                    write_out(file.fileno())
                    waiting = 0
        write_out(file.fileno())
    refuse_holes(path)
    return written


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


def write_out(file: int) -> None:
    """Waits until a file's bytes are on disk, then gives their RAM back."""
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def refuse_holes(path: Path) -> None:
    """Raises OSError if a file takes fewer bytes on disk than it is long."""
    status = path.stat()
    taken = status.st_blocks * 512
    if taken < status.st_size:
        raise OSError(f"'{path}' has {status.st_size:,} bytes, but only {taken:,} are on disk: it has holes.")


def describe(folder: Path) -> dict:
    """The sizes of a graft that a result names."""
    config = AutoConfig.from_pretrained(folder)
    files = memory_files(folder)
    width = config.engram_head_dim * WIDTHS[config.engram_table_dtype]
    total = table_bytes(files)
    return {
        "layers": config.engram_layer_ids,
        "orders": config.engram_orders,
        "heads": config.engram_n_heads,
        "head_dim": config.engram_head_dim,
        "table_dtype": config.engram_table_dtype,
        "row_bytes": width,
        "rows": total // width,
        "table_bytes": total,
        "files": len(files),
        "kernel_size": config.engram_kernel_size,
    }
