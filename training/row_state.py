"""RowState: an optimizer's state for the rows of one part of a table that were ever touched.

Promises: memory and time grow with the touched rows, not with the table: exactly what is needed at the first step, then
half as much again. Never allocates a table-sized tensor, and checks a state before it restores any of it.
Source: Engram (arXiv 2601.07372), section 4.1 (a separate optimizer for tables).
"""

from collections.abc import Iterator

import torch

from ..rows_overlay_engram import RowIndex
from .stochastic_rounding import rounded


# Values that are processed at once, so that temporaries stay in the cache.
PIECE_VALUES = 1 << 18


class RowState:
    """Named columns of numbers with one entry for each touched row of a part.

    Args:
        shape (`tuple[int, int]`): rows and width of the part.
        columns (`dict[str, tuple[tuple[int, ...], torch.dtype]]`): shape and type of one entry of each column.
        device (`torch.device`): device of the part.
    """

    def __init__(self, shape: tuple[int, int], columns: dict, device: torch.device):
        self.height, self.width = shape
        self.index = RowIndex(device)
        # Each of shape (capacity, *entry).
        self.columns = {n: torch.empty(0, *entry, dtype=dtype, device=device) for n, (entry, dtype) in columns.items()}

    def __len__(self) -> int:
        return len(self.index)

    def slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the slots `(rows,)` of rows `(rows,)`, ascending and unique; new slots are zeroed.

        Slots of new rows are at or above the former `len(self)`.
        """
        before = len(self)
        slots = self.index.slots(rows)
        for name, column in self.columns.items():
            if len(self) > len(column):
                room = max(len(self), len(column) + len(column) // 2)
                # Pages after the last entry are not written to and take no memory yet.
                self.columns[name] = column.new_empty(room, *column.shape[1:])
                self.columns[name][:before] = column[:before]
            self.columns[name][before : len(self)].zero_()
        return slots

    def read(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """Returns a copy of a column's entries, as float32 where they are floating point."""
        values = self.columns[name].index_select(0, slots)
        return values.float() if values.is_floating_point() else values

    def write(self, name: str, slots: torch.Tensor, values: torch.Tensor, generator: torch.Generator) -> None:
        """Stores entries in a column, with stochastic rounding to its dtype."""
        column = self.columns[name]
        if column.is_floating_point():
            values = rounded(values, column.dtype, generator)
        column.index_copy_(0, slots, values)

    def state_dict(self) -> dict:
        """Returns the state as plain tensors, rows ascending, and the height of the part."""
        places = self.index.places
        columns = {name: column.index_select(0, places) for name, column in self.columns.items()}
        return {"height": self.height, "rows": self.index.rows.clone(), **columns}

    def load_state_dict(self, state: dict, owner: str) -> None:
        """Restores a `state_dict` into a new state.

        Args:
            state (`dict`): from `state_dict`.
            owner (`str`): name of the parameter, for errors.

        Raises:
            `ValueError`: if it is not of this part and these columns; nothing is restored then.
        """
        self.check(state, owner)
        rows = state["rows"].to(self.index.older.device)
        self.index.slots(rows)
        self.columns = {n: state[n].to(column.device, copy=True) for n, column in self.columns.items()}

    def check(self, state: dict, owner: str) -> None:
        """Raises ValueError if a state is not of this part and these columns."""
        needed = {"height", "rows", *self.columns}
        if set(state) != needed:
            raise ValueError(
                f"optimizer state of {owner} has {', '.join(sorted(state))}; needed is {', '.join(sorted(needed))}. It "
                "was made by another version or by another table_optimizer or l2_sp: make the optimizer as it was "
                "made then, or go on without its state."
            )
        rows = state["rows"]
        if state["height"] != self.height:
            raise ValueError(
                f"optimizer state of {owner} is for a table part of {state['height']} rows, this one has "
                f"{self.height}: it belongs to another model. Load the model that it was saved with."
            )
        for name, column in self.columns.items():
            wanted = (len(rows), *column.shape[1:])
            if tuple(state[name].shape) != wanted or state[name].dtype != column.dtype:
                raise ValueError(
                    f"optimizer state of {owner}: {name} has shape {tuple(state[name].shape)} and {state[name].dtype}, "
                    f"needed is {wanted} and {column.dtype}: it belongs to another model or was made with another "
                    "table_state_dtype."
                )
        fits = rows.ndim == 1 and rows.dtype == torch.int64
        ascending = fits and bool((rows[1:] > rows[:-1]).all())
        if not ascending or (len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < self.height):
            raise ValueError(
                f"optimizer state of {owner}: its rows must be int64, ascending, each once, from 0 to "
                f"{self.height - 1}, and are not: the file is damaged. Take an older checkpoint, or go on without "
                "optimizer state."
            )


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Cuts a step into pieces of about `PIECE_VALUES` values."""
    size = max(1, PIECE_VALUES // width)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))
