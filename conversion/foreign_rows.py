"""Rows of tables, moved between files as bytes.

A table is in pieces: parts in our files, shards or separate scales in others. Blocks of whole rows are put together
from the pieces of one side and cut into those of the other.
Promises: memory for one block, whatever the size of the table; bytes stay as they are. Never decodes a value.
Source: docs/foreign.md; docs/format.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class RowPiece:
    """Consecutive rows in a file, or the same bytes of each.

    Args:
        path (`Path`): the file.
        begin (`int`): its byte where the rows begin.
        first (`int`): number of the first row within the layer.
        rows (`int`): how many.
        width (`int`): bytes of a row that are here.
        column (`int`, *optional*, defaults to 0): the row's byte where they begin.
    """

    path: Path
    begin: int
    first: int
    rows: int
    width: int
    column: int = 0


def read_rows(pieces: Sequence[RowPiece], first: int, count: int, row_bytes: int) -> np.ndarray:
    """Returns rows `(count, row_bytes)` as uint8, from row `first` on; zeros where no piece holds them."""
    rows = np.zeros((count, row_bytes), dtype=np.uint8)
    for piece in pieces:
        start, end = max(first, piece.first), min(first + count, piece.first + piece.rows)
        if start >= end:
            continue
        with open(piece.path, "rb") as file:
            file.seek(piece.begin + (start - piece.first) * piece.width)
            data = np.fromfile(file, dtype=np.uint8, count=(end - start) * piece.width)
        columns = slice(piece.column, piece.column + piece.width)
        rows[start - first : end - first, columns] = data.reshape(end - start, piece.width)
    return rows


def row_blocks(pieces: Sequence[RowPiece], first: int, count: int, row_bytes: int) -> Iterator[np.ndarray]:
    """Yields rows `first` to `first + count` in blocks `(rows, row_bytes)` of at most `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(first, first + count, step):
        yield read_rows(pieces, start, min(step, first + count - start), row_bytes)


def fill_pieces(targets: Sequence[RowPiece], sources: Sequence[RowPiece]) -> Iterator[int]:
    """Writes the rows of `sources` to `targets`, whole rows in files that are there; yields the bytes of each block."""
    for target in targets:
        with open(target.path, "r+b") as file:
            file.seek(target.begin)
            for block in row_blocks(sources, target.first, target.rows, target.width):
                file.write(memoryview(block))
                yield block.nbytes
