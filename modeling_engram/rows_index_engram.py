"""RowIndex: the slot of every row that was ever touched.

What it chooses: two ascending lists with one int64 for each row (row and slot packed): a long one, and a short one for
recent rows. New rows are merged into the short list, and that into the long one when it has grown to an eighth of it,
so a row is copied about 8 times in all, where one list would be copied at every step. A hash table takes several times
the memory, and an array over all rows grows with the table.
Promises: 8 bytes a row; nothing depends on the size of the table.
"""

import torch


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
