"""Copy-on-write rows over a table in files, so that it can be trained, and the index of touched rows.

What it chooses: written rows are stored in memory, in the order of their first write, and read instead of the file's.
Memory grows with the rows that training touches (writing into a mapping takes a whole page for each), and the changes
are known without a look at the table. The index is two ascending lists with one int64 for each row (row and slot
packed): a long one, and a short one for recent rows. New rows are merged into the short list, and that into the long
one when it has grown to an eighth of it, so a row is copied about 8 times in all, where one list would be copied at
every step. A hash table takes several times the memory, and an array over all rows grows with the table.
Promises: a row is the last one written, or the file's; the files are never written to; the index takes 8 bytes a row.
Never holds a table.
Source: docs/training.md.
"""

import copy

import torch

from .rows_storage_engram import FilePart, FileRows, RowStore, ShardFile
from .rows_table_engram import check_range, part_of


SLOT_BITS = 31  # leaves 32 bits for the row's number
LONGEST_RECENT = 1 << 16  # below that, merging costs less than two look-ups


class RowIndex:
    """Slots of rows, in the order in which rows first came.

    Args:
        device (`torch.device`, *optional*): where the row numbers are.
    """

    def __init__(self, device: torch.device | None = None):
        self.older = torch.empty(0, dtype=torch.int64, device=device)  # (older,), ascending
        self.recent = torch.empty(0, dtype=torch.int64, device=device)  # (recent,), ascending

    def __len__(self) -> int:
        return len(self.older) + len(self.recent)

    @property
    def rows(self) -> torch.Tensor:
        """All rows, ascending."""
        return self.merged() >> SLOT_BITS

    @property
    def places(self) -> torch.Tensor:
        """Their slots."""
        return self.merged() & ((1 << SLOT_BITS) - 1)

    def find(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns slots of rows `(rows,)` in any order, and which are known; unknown rows' slots are undefined."""
        slots, known = _look_up(self.older, rows)
        if len(self.recent):
            unknown = (~known).nonzero().squeeze(1)  # (unknown,)
            slots[unknown], known[unknown] = _look_up(self.recent, rows[unknown])
        return slots, known

    def slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns slots of rows `(rows,)`, ascending and unique; new rows get the next slots, in their order."""
        slots, known = self.find(rows)
        unknown = (~known).nonzero().squeeze(1)  # (unknown,)
        if len(unknown):
            added = torch.arange(len(self), len(self) + len(unknown), device=rows.device)
            slots[unknown] = added
            self.recent = merge(self.recent, (rows[unknown] << SLOT_BITS) | added)
            if len(self.recent) > max(LONGEST_RECENT, len(self.older) // 8) or not len(self.older):
                self.older, self.recent = self.merged(), self.recent[:0].clone()
        return slots

    def merged(self) -> torch.Tensor:
        """Returns both lists as one."""
        return merge(self.older, self.recent)


def _look_up(known: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns slots of rows in one list, and which of them it has."""
    if not len(known):
        return torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    near = known[torch.searchsorted(known, rows << SLOT_BITS).clamp_(max=len(known) - 1)]
    return near & ((1 << SLOT_BITS) - 1), (near >> SLOT_BITS) == rows


def merge(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Merges two ascending lists."""
    if not len(one) or not len(other):
        return one if len(one) else other
    both = torch.cat([one, other])
    if both.device.type != "cpu":
        return both.sort().values
    both.numpy().sort(kind="stable")  # unlike torch's sort, it merges ascending runs
    return both


class ChangedRows:
    """Copy-on-write rows of one part.

    Args:
        part ([`FilePart`]): where unchanged rows are.
    """

    def __init__(self, part: FilePart):
        self.part, self.stored = part, FileRows([part])
        self.index = RowIndex()
        self.values = torch.empty(0, part.shape[1], dtype=part.dtype, device="cpu")  # (capacity, width)
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None  # last rows read, ascending, and their values

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the whole part, and width."""
        return self.part.shape

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the current rows `(reads,)` as `(reads, width)`."""
        places, known = self.index.find(rows)
        if not bool(known.any()):
            return self.unchanged(rows)
        values = self.values.new_empty(len(rows), self.values.shape[1])  # (reads, width)
        there, others = known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)  # numbers, as in `read_parts`
        values[there] = self.values.index_select(0, places[there])
        values[others] = self.unchanged(rows[others])
        return values

    def unchanged(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows `(reads,)` that were never written, `(reads, width)`; those in `seen` are not read again."""
        if self.seen is not None and len(self.seen[0]):
            near = torch.searchsorted(self.seen[0], rows).clamp_(max=len(self.seen[0]) - 1)  # (reads,)
            if torch.equal(self.seen[0][near], rows):
                return self.seen[1][near]  # (reads, width)
        return self.stored.read(rows)

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Writes `values` to rows `(rows,)`, ascending and unique."""
        check_range(rows, self.part.shape[0])
        places = self.index.slots(rows)
        self.reserve(len(self.index))
        self.values.index_copy_(0, places, values.to(self.values.dtype))

    def expect(self, rows: torch.Tensor) -> None:
        """Allocates memory for rows `(rows,)` that will be written."""
        _, known = self.index.find(rows)
        self.reserve(len(self.index) + int((~known).sum()))

    def reserve(self, count: int) -> None:
        """Allocates memory for `count` changed rows: exactly as many at first, then half as many again."""
        if count > len(self.values):
            room = max(count, len(self.values) * 3 // 2)
            grown = self.values.new_empty(room, self.values.shape[1])  # (capacity, width)
            grown[: len(self.values)] = self.values
            self.values = grown

    def clear(self) -> None:
        """Discards all changes."""
        self.index, self.values, self.seen = RowIndex(), self.values[:0].clone(), None

    def named(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the changed rows `(changed,)`, ascending, and their values `(changed, width)`."""
        return self.index.rows, self.values[self.index.places]


class RowOverlay(RowStore):
    """Rows of one order in a checkpoint's files, with changed rows in memory.

    Args:
        stored ([`FileRows`]): the rows in the files.
    """

    kind = "disk"

    def __init__(self, stored: FileRows):
        self.stored, self.heights = stored, stored.heights
        self.width, self.dtype = stored.width, stored.dtype
        self.changes = [ChangedRows(part) for part in stored.parts]

    @property
    def files(self) -> list[ShardFile]:
        return self.stored.files

    def part(self, number: int) -> ChangedRows:
        return self.changes[number]

    @property
    def changed(self) -> int:
        """Number of changed rows."""
        return sum(len(changes) for changes in self.changes)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.changed:
            return self.stored.read(rows)
        values = torch.empty(len(rows), self.width, dtype=self.dtype, device="cpu")  # (reads, width)
        unchanged = (~self.lay_over(rows, values)).nonzero().squeeze(1)  # (unchanged,)
        values[unchanged] = self.stored.read(rows[unchanged])
        return values

    def read_resident(self, rows: torch.Tensor) -> torch.Tensor | None:
        values = self.stored.read_resident(rows)
        if values is not None and self.changed:
            self.lay_over(rows, values)
        return values

    def see(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps the rows `(rows,)`, ascending and unique, that a training pass has read, and their `values` `(rows,
        width)`.

        The optimizer reads them again before the next pass.
        """
        height = self.heights[0]
        starts = torch.arange(1, len(self.heights), device="cpu") * height  # (parts - 1,)
        bounds = [0, *torch.searchsorted(rows, starts).tolist(), len(rows)]
        for number, changes in enumerate(self.changes):
            own = slice(bounds[number], bounds[number + 1])
            changes.seen = rows[own] - number * height, values[own]

    def lay_over(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Writes changed rows over `values` `(reads, width)`; returns which were changed, `(reads,)`."""
        over = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        height = self.heights[0]
        place = part_of(rows, height, len(self.heights))
        for number, changes in enumerate(self.changes):
            if len(changes):
                places, known = changes.index.find(rows - number * height)
                known &= place == number
                there = known.nonzero().squeeze(1)  # (changed,)
                values[there] = changes.values.index_select(0, places[there])
                over |= known
        return over

    def tensors(self, mappings: dict | None = None) -> list[torch.Tensor]:
        """Returns the parts as tensors mapped from the files, with changed rows in private pages."""
        tensors = self.stored.tensors(mappings)
        for tensor, changes in zip(tensors, self.changes, strict=True):
            if len(changes):
                rows, values = changes.named()
                tensor[rows] = values
        return tensors

    def __deepcopy__(self, memo) -> "RowOverlay":
        changes = [(copy.deepcopy(own.index, memo), own.values.clone()) for own in self.changes]
        return _overlay_from(self.stored, changes)

    def __reduce__(self):
        return _overlay_from, (self.stored, [(own.index, own.values) for own in self.changes])


def _overlay_from(stored: FileRows, changes: list) -> RowOverlay:
    """Restores a copied or pickled overlay."""
    overlay = RowOverlay(stored)
    for own, (index, values) in zip(overlay.changes, changes, strict=True):
        own.index, own.values = index, values
    return overlay
