"""Changed rows over a table that stays as it is: what lets a table in a file be trained.

What it chooses: rows that were written are kept beside the table, in the order in which they were first written, and
read in its stead. So training takes memory for the rows that it touches, where writing into a mapping of the file takes
a page for each (4096 bytes for a row of 320), and what has changed is known without looking at the table.
Promises: a row is the last that was written, or the file's; the files are never written to. Never holds a table.
Source: docs/training.md.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from .index_engram import RowIndex
from .rows_engram import FilePart, FileRows, as_bytes
from .table_engram import check_range, part_of


class ChangedRows:
    """Rows of one part that differ from its file, or once did.

    Args:
        part ([`FilePart`]): where the others are.
    """

    def __init__(self, part: FilePart):
        self.part, self.stored = part, FileRows([part])
        self.index = RowIndex()
        self.values = torch.empty(0, part.shape[1], dtype=part.dtype, device="cpu")  # (capacity, width)
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None  # rows that a pass has read, ascending, and values

    def __len__(self) -> int:
        return len(self.index)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `(reads,)` as they are now: `(reads, width)`."""
        places, known = self.index.find(rows)
        if not bool(known.any()):
            return self.unchanged(rows)
        values = self.values.new_empty(len(rows), self.values.shape[1])  # (reads, width)
        values[known] = self.values.index_select(0, places[known])
        values[~known] = self.unchanged(rows[~known])
        return values

    def unchanged(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `(reads,)` that were never written, `(reads, width)`: a step's own rows are not read a second time."""
        if self.seen is not None and len(self.seen[0]):
            near = torch.searchsorted(self.seen[0], rows).clamp_(max=len(self.seen[0]) - 1)  # (reads,)
            if torch.equal(self.seen[0][near], rows):
                return self.seen[1][near]  # (reads, width)
        return self.stored.read(rows)

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Changes rows `(rows,)`, ascending and unique, to `values`."""
        check_range(rows, self.part.shape[0])
        places = self.index.slots(rows)
        self.reserve(len(self.index))
        self.values.index_copy_(0, places, values.to(self.values.dtype))

    def expect(self, rows: torch.Tensor) -> None:
        """Makes room for rows `(rows,)` that will be written, piece by piece."""
        _, known = self.index.find(rows)
        self.reserve(len(self.index) + int((~known).sum()))

    def reserve(self, count: int) -> None:
        """Makes room for so many changed rows: exactly so many at first, then by halves, which costs little in all."""
        if count > len(self.values):
            room = max(count, len(self.values) * 3 // 2)
            grown = self.values.new_empty(room, self.values.shape[1])  # (capacity, width)
            grown[: len(self.values)] = self.values
            self.values = grown

    def clear(self) -> None:
        """Forgets all changes."""
        self.index, self.values, self.seen = RowIndex(), self.values[:0].clone(), None

    def named(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `(changed,)`, ascending, and their values `(changed, width)`."""
        return self.index.rows, self.values[self.index.places]


class RowOverlay(FileRows):
    """Rows of one order in a checkpoint's files, with those that were changed in memory.

    Args:
        parts (`list[FilePart]`): where the parts lie, each but the last of the same height.
        requires_grad (`bool`, *optional*, defaults to `True`): whether they learn.

    `learning` holds a parameter for each part, with no row of its own: what an optimizer is given in the part's place.
    """

    def __init__(self, parts: list[FilePart], requires_grad: bool = True):
        super().__init__(parts)
        self.changes = [ChangedRows(part) for part in parts]
        self.learning = [stand_in(changes, requires_grad) for changes in self.changes]

    @property
    def changed(self) -> int:
        """How many rows were written."""
        return sum(len(changes) for changes in self.changes)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `(reads,)` in any order, as they are now: `(reads, width)`."""
        if not self.changed:
            return super().read(rows)
        values = torch.empty(len(rows), self.width, dtype=self.dtype, device="cpu")
        stored = ~self.lay_over(rows, values)
        values[stored] = super().read(rows[stored])
        return values

    def read_few(self, rows: list[int], buffer: memoryview, slots: Iterable[int]) -> bool:
        """Reads a few rows as they are now into a buffer, each to its slot, if that needs no disk; whether it did."""
        slots = list(slots)
        if not super().read_few(rows, buffer, slots):
            return False
        if self.changed:
            size, values = self.row_bytes, torch.empty(len(rows), self.width, dtype=self.dtype, device="cpu")
            changed, held = self.lay_over(torch.tensor(rows, device="cpu"), values), as_bytes(values)
            for number in changed.nonzero().flatten().tolist():
                buffer[slots[number] : slots[number] + size] = held[number * size : (number + 1) * size]
        return True

    def see(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Takes note of what a pass that learns has read, until the next one: its optimizer will ask for it.

        Args:
            rows (`torch.LongTensor` of shape `(rows,)`): ascending and unique.
            values (`torch.Tensor` of shape `(rows, width)`): what they are.
        """
        height = self.parts[0].shape[0]
        starts = torch.tensor([number * height for number in range(1, len(self.parts))], device="cpu")  # (parts - 1,)
        bounds = [0, *torch.searchsorted(rows, starts).tolist(), len(rows)]
        for number, changes in enumerate(self.changes):
            own = slice(bounds[number], bounds[number + 1])
            changes.seen = rows[own] - number * height, values[own]

    def lay_over(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Writes changed rows over `values` `(reads, width)`; which of them were, `(reads,)`."""
        over = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        height = self.parts[0].shape[0]
        place = part_of(rows, height, len(self.parts))
        for number, changes in enumerate(self.changes):
            if len(changes):
                places, known = changes.index.find(rows - number * height)
                known &= place == number
                values[known] = changes.values.index_select(0, places[known])
                over |= known
        return over

    def tensors(self, mappings: dict | None = None) -> list[torch.Tensor]:
        """The parts as tensors that are mapped from the files, changed rows written into private pages."""
        tensors = super().tensors(mappings)
        for tensor, changes in zip(tensors, self.changes, strict=True):
            if len(changes):
                rows, values = changes.named()
                tensor[rows] = values
        return tensors

    def stand_on(self, parts: list[FilePart]) -> None:
        """Forgets all changes, and reads from other files of the same shapes; what learns stays the same object."""
        self.parts = parts
        self.changes = [ChangedRows(part) for part in parts]
        for handle, changes in zip(self.learning, self.changes, strict=True):
            handle.changes = changes

    def __deepcopy__(self, memo) -> "RowOverlay":
        twin = RowOverlay(self.parts, self.learning[0].requires_grad)
        for mine, theirs in zip(self.changes, twin.changes, strict=True):
            theirs.index, theirs.values = copy.deepcopy(mine.index, memo), mine.values.clone()
        return twin

    def __reduce__(self):
        state = [(changes.index, changes.values) for changes in self.changes]
        return overlay_from, (self.parts, self.learning[0].requires_grad, state)


def overlay_from(parts: list[FilePart], requires_grad: bool, state: list) -> RowOverlay:
    """An overlay that was pickled."""
    overlay = RowOverlay(parts, requires_grad)
    for changes, (index, values) in zip(overlay.changes, state, strict=True):
        changes.index, changes.values = index, values
    return overlay


def stand_in(changes: ChangedRows, requires_grad: bool) -> nn.Parameter:
    """A parameter without rows that an optimizer holds for a part in a file."""
    parameter = nn.Parameter(
        torch.empty(0, changes.part.shape[1], dtype=changes.part.dtype, device="cpu"), requires_grad
    )
    parameter.changes = changes
    return parameter


def part_shape(part: torch.Tensor) -> tuple[int, int]:
    """Rows and width of a part, wherever it is."""
    changes = getattr(part, "changes", None)
    return tuple(part.shape) if changes is None else changes.part.shape


@torch.no_grad()
def read_part(part: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `(rows,)` of a part, wherever it is: `(rows, width)`, a copy in the table's type."""
    changes = getattr(part, "changes", None)
    return part.detach().index_select(0, rows) if changes is None else changes.read(rows)


@torch.no_grad()
def write_part(part: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Writes `values` `(rows, width)` to rows `(rows,)` of a part, ascending and unique, wherever it is."""
    changes = getattr(part, "changes", None)
    if changes is None:
        part.detach().index_copy_(0, rows, values.to(part.dtype))
    else:
        changes.write(rows, values)


def expect_writes(part: torch.Tensor, rows: torch.Tensor) -> None:
    """Makes room where rows `(rows,)` of a part will be written, so that it is made once."""
    changes = getattr(part, "changes", None)
    if changes is not None:
        changes.expect(rows)
