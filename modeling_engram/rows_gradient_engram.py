"""RowGradient: the gradient of a table, which is the rows that were read and their values.

What it chooses: it is the parameter's own `.grad`, a tensor that claims the table's shape and stores its rows alone. So
whatever measures, clips or unscales gradients (torch's clipping, Trainer, Accelerate, gradient scalers) reaches rows
without knowing of them, and an optimizer that cannot update a table by rows raises an error instead of skipping it.
Promises: its size is that of the rows that were read, whatever the size of the table; a gradient that no optimizer will
ever apply is an error and does not grow. Never becomes a dense tensor.
Source: Engram (arXiv 2601.07372), section 2.5 (gradients of active rows go back to the table).
"""

import sys
import weakref
from collections.abc import Iterable, Iterator

import torch

from .compat_engram import UNSCALE, wrapper_subclass


aten = torch.ops.aten

ROWS_ALONE = (
    "the gradient of a table has rows alone, and torch's own optimizers cannot train it: use EngramTrainer, or "
    "engram_transformers.training.create_optimizer(model), or leave the tables out "
    "(model.memory.tables.requires_grad_(False))."
)


# Optimizers that apply row gradients, as long as they live.
ROW_OPTIMIZERS: weakref.WeakSet = weakref.WeakSet()


class RowGradient(torch.Tensor):
    """Gradient of a part of a table at the rows that were read.

    Args:
        part (`torch.Tensor` of shape `(rows of the part, width)`): what it is the gradient of.
        rows (`torch.LongTensor` of shape `(touched,)`): ascending and unique.
        row_values (`torch.FloatTensor` of shape `(touched, width)`): float32.

    `applied` says whether an optimizer has used it, `exchanged` whether it is that of all processes.
    """

    @staticmethod
    def __new__(cls, part: torch.Tensor, rows: torch.Tensor, row_values: torch.Tensor):
        return wrapper_subclass(cls, part)

    def __init__(self, part: torch.Tensor, rows: torch.Tensor, row_values: torch.Tensor):
        self.rows, self.row_values, self.applied, self.exchanged = rows, row_values, False, False

    def __repr__(self) -> str:
        return f"RowGradient({len(self.rows)} rows of a part of shape {tuple(self.shape)}, {self.row_values.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = ON_VALUES.get(func)
        if known is None:
            raise TypeError(f"{func}: {ROWS_ALONE}")
        return known(func, *args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        # Of the values, whatever the table's: GradScaler refuses gradients of float16, and groups them by this.
        return self.row_values.dtype

    @property
    def is_sparse(self) -> bool:
        # Torch's optimizers ask this first of all. Later would be too late: AdamW decays a whole table, and makes a
        # state of its size, before it looks at the gradient.
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith("torch.optim."):
            raise TypeError(ROWS_ALONE)
        return False


def _on_values(func, gradient: RowGradient, *args, **kwargs):
    """A measure of the values, such as their norm."""
    return func(gradient.row_values, *args, **kwargs)


def _in_place(func, gradient: RowGradient, *args, **kwargs) -> RowGradient:
    """Scales the values."""
    func(gradient.row_values, *args, **kwargs)
    return gradient


def _same_rows(func, gradient: RowGradient, *args, **kwargs) -> RowGradient:
    """Another handle on the same values."""
    return RowGradient(gradient, gradient.rows, gradient.row_values)


def unscaled(func, gradients, found_inf: torch.Tensor, inv_scale: torch.Tensor):
    """Unscales several gradients at once, some of them of tables."""
    if inv_scale.is_cpu:
        _wait_for_accelerators()
    return func([g.row_values if isinstance(g, RowGradient) else g for g in gradients], found_inf, inv_scale)


def _wait_for_accelerators() -> None:
    """Waits for GradScaler's copies of its numbers to the host, which are asynchronous and which it never waits for.

    Torch has no gradients on the host beside others on a device. Which device holds the scale is not said: so every one
    that this process uses is waited for, and no other is woken.
    """
    if not torch.accelerator.is_available():
        return
    allocated = getattr(torch.get_device_module(torch.accelerator.current_accelerator()), "memory_allocated", None)
    for index in range(torch.accelerator.device_count()):
        if allocated is None or allocated(index):
            torch.accelerator.synchronize(index)


ON_VALUES = {
    aten.linalg_vector_norm.default: _on_values,
    aten.isfinite.default: _on_values,
    aten.mul_.Tensor: _in_place,
    aten.mul_.Scalar: _in_place,
    aten.div_.Tensor: _in_place,
    aten.zero_.default: _in_place,
    aten.detach.default: _same_rows,
    UNSCALE: unscaled,
}


def row_gradient(part: torch.Tensor) -> RowGradient | None:
    """The row gradient of a parameter; None if it has none, or a dense one."""
    return part.grad if isinstance(part.grad, RowGradient) else None


def sum_rows(rows: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds up the values of equal rows.

    Args:
        rows (`torch.LongTensor` of shape `(reads,)`): any order, with repeats.
        values (`torch.Tensor` of shape `(reads, width)`): one gradient for each read.

    Returns:
        `tuple`: unique rows, ascending, `(touched,)`, and their sums in float32, `(touched, width)`.
    """
    unique, inverse = torch.unique(rows, return_inverse=True)
    summed = torch.zeros(len(unique), values.shape[1], dtype=torch.float32, device=values.device)
    return unique, summed.index_add_(0, inverse, values.float())  # (touched,), (touched, width)


def add_row_gradient(part: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Accumulates unique rows' gradients into `part.grad`, as autograd does with dense ones.

    Where `part.selected` names the rows that may change (a `RowSelection`), the others get none.
    """
    selected = getattr(part, "selected", None)
    if selected is not None:
        kept = are_among(rows, selected.to(rows.device))
        rows, values = rows[kept], values[kept]
        if not len(rows):
            return
    held = row_gradient(part)
    if held is not None:
        rows, values = sum_rows(torch.cat([held.rows, rows]), torch.cat([held.row_values, values]))
    part.grad = RowGradient(part, rows, values)


def are_among(rows: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Which of `rows` `(rows,)` are in `known` `(known,)`, ascending; a boolean each."""
    if not len(known):
        return torch.zeros_like(rows, dtype=torch.bool)
    near = torch.searchsorted(known, rows).clamp_(max=len(known) - 1)
    return known[near] == rows


def with_row_gradients(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The parameters that hold a row gradient."""
    return (p for p in parameters if row_gradient(p) is not None)
