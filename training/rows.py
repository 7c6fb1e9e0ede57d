"""Row moments: Adam's state for the rows of one table that were ever touched.

Promises: memory and time grow with the rows touched, not with the table. Never allocates a table-sized tensor.
Source: Engram (arXiv 2601.07372), section 4.1 (tables are trained by Adam); bias correction counts each row's own
updates, because rows are read at very different rates.
"""

import torch


class RowMoments:
    """First and second moments and number of updates, for touched rows in order of first touch.

    Args:
        width (`int`): values in a row.
        device (`torch.device`): where the table is.
    """

    def __init__(self, width: int, device: torch.device):
        self.sorted_rows = torch.empty(0, dtype=torch.int64, device=device)  # (touched,)
        self.sorted_slots = torch.empty(0, dtype=torch.int64, device=device)  # (touched,)
        self.exp_avg = torch.zeros(0, width, device=device)  # (capacity, width)
        self.exp_avg_sq = torch.zeros(0, width, device=device)  # (capacity, width)
        self.step = torch.zeros(0, device=device)  # (capacity,)

    def __len__(self) -> int:
        return len(self.sorted_rows)

    def slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Where the moments of rows are kept, with places made for new ones.

        Args:
            rows (`torch.LongTensor` of shape `(rows,)`): ascending and unique.

        Returns:
            `torch.LongTensor` of shape `(rows,)`.
        """
        touched = len(self)
        place = torch.searchsorted(self.sorted_rows, rows)
        known = torch.zeros_like(rows, dtype=torch.bool)
        if touched:
            known = self.sorted_rows[place.clamp(max=touched - 1)] == rows
        fresh = rows[~known]
        if len(fresh):
            self.reserve(touched + len(fresh))
            # A merge of two ascending lists: a fresh row lands behind the known rows before it and the fresh ones.
            landing = place[~known] + torch.arange(len(fresh), device=rows.device)
            kept = torch.ones(touched + len(fresh), dtype=torch.bool, device=rows.device)
            kept[landing] = False
            slots = torch.arange(touched, touched + len(fresh), device=rows.device)
            self.sorted_rows = merge(self.sorted_rows, fresh, kept)
            self.sorted_slots = merge(self.sorted_slots, slots, kept)
        return self.sorted_slots[torch.searchsorted(self.sorted_rows, rows)]

    def reserve(self, touched: int) -> None:
        """Makes room for that many touched rows, doubling so that growth costs little in all."""
        if touched <= len(self.step):
            return
        more = max(touched, 2 * len(self.step)) - len(self.step)
        width = self.exp_avg.shape[1]
        self.exp_avg = torch.cat([self.exp_avg, self.exp_avg.new_zeros(more, width)])  # (capacity, width)
        self.exp_avg_sq = torch.cat([self.exp_avg_sq, self.exp_avg_sq.new_zeros(more, width)])  # (capacity, width)
        self.step = torch.cat([self.step, self.step.new_zeros(more)])  # (capacity,)

    def adam(self, rows: torch.Tensor, grad: torch.Tensor, betas: tuple[float, float], eps: float) -> torch.Tensor:
        """Takes a gradient in and gives Adam's direction back.

        Args:
            rows (`torch.LongTensor` of shape `(rows,)`): ascending and unique.
            grad (`torch.FloatTensor` of shape `(rows, width)`): their gradients.
            betas (`tuple[float, float]`): decay of the moments.
            eps (`float`): added to the root of the second moment.

        Returns:
            `torch.FloatTensor` of shape `(rows, width)`, to be multiplied by minus the learning rate.
        """
        slots = self.slots(rows)
        exp_avg = self.exp_avg[slots].lerp_(grad, 1 - betas[0])  # (rows, width)
        exp_avg_sq = self.exp_avg_sq[slots].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])  # (rows, width)
        step = self.step[slots] + 1  # (rows,)
        self.exp_avg[slots], self.exp_avg_sq[slots], self.step[slots] = exp_avg, exp_avg_sq, step
        corrected = exp_avg / (1 - betas[0] ** step)[:, None]
        return corrected / ((exp_avg_sq / (1 - betas[1] ** step)[:, None]).sqrt_() + eps)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state as plain tensors, rows ascending."""
        slots = self.sorted_slots
        return {
            "rows": self.sorted_rows.clone(),
            "exp_avg": self.exp_avg[slots],
            "exp_avg_sq": self.exp_avg_sq[slots],
            "step": self.step[slots],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], device: torch.device) -> "RowMoments":
        """Restores what `state_dict` gave."""
        moments = cls(state["exp_avg"].shape[1], device)
        moments.sorted_rows = state["rows"].to(device)
        moments.sorted_slots = torch.arange(len(state["rows"]), device=device)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            setattr(moments, name, state[name].to(device))
        return moments


def merge(old: torch.Tensor, new: torch.Tensor, from_old: torch.Tensor) -> torch.Tensor:
    """Interleaves two lists: entries of `old` where `from_old` is True, entries of `new` elsewhere."""
    merged = old.new_empty(len(from_old))
    merged[from_old], merged[~from_old] = old, new
    return merged
