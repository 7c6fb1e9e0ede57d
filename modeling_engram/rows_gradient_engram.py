"""RowGradient: the gradient of a table: the rows that were read and their gradients.

What it chooses: it is the parameter's own `.grad`, a tensor with the table's shape that stores only its rows. So
everything that measures, clips or unscales gradients (torch's clipping, Trainer, Accelerate, gradient scalers) works on
rows, and an optimizer that cannot update a table by rows raises an error instead of skipping it.
Promises: its size is that of the rows that were read; a gradient that no optimizer will apply raises an error and does
not grow. Never becomes a dense tensor.
Source: Engram (arXiv 2601.07372), section 2.5 (gradients of active rows go back to the table).
"""

import sys
from collections.abc import Iterable, Iterator

import torch

from .compat_engram import UNSCALE, wrapper_subclass


aten = torch.ops.aten

ROWS_ALONE = (
    "the gradient of a table has rows alone, and torch's own optimizers cannot train it: use EngramTrainer, or "
    "engram_transformers.training.create_optimizer(model), or leave the tables out "
    "(model.memory.tables.requires_grad_(False))."
)


class RowGradient(torch.Tensor):
    """Gradient of a part of a table at the rows that were read.

    Args:
        part (`torch.Tensor` of shape `(rows of the part, width)`): the parameter.
        rows (`torch.LongTensor` of shape `(touched,)`): ascending and unique.
        row_values (`torch.FloatTensor` of shape `(touched, width)`): float32.

    `applied` says whether an optimizer has used it, `exchanged` whether it is summed over all processes.
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
        # That of the values: GradScaler refuses float16 gradients, and groups them by dtype.
        return self.row_values.dtype

    @property
    def is_sparse(self) -> bool:
        # Torch's optimizers ask this first; later, AdamW would already have decayed the whole table and allocated a
        # state of its size.
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith("torch.optim."):
            raise TypeError(ROWS_ALONE)
        return False


def _on_values(func, gradient: RowGradient, *args, **kwargs):
    """Measures the values, for example their norm."""
    return func(gradient.row_values, *args, **kwargs)


def _in_place(func, gradient: RowGradient, *args, **kwargs) -> RowGradient:
    """Scales the values."""
    func(gradient.row_values, *args, **kwargs)
    return gradient


def _same_rows(func, gradient: RowGradient, *args, **kwargs) -> RowGradient:
    """Returns another gradient with the same values."""
    return RowGradient(gradient, gradient.rows, gradient.row_values)


def unscaled(func, gradients, found_inf: torch.Tensor, inv_scale: torch.Tensor):
    """Unscales several gradients at once, some of them of tables."""
    if inv_scale.is_cpu:
        _wait_for_accelerators()
    return func([g.row_values if isinstance(g, RowGradient) else g for g in gradients], found_inf, inv_scale)


def _wait_for_accelerators() -> None:
    """Waits for GradScaler's asynchronous copies of its numbers to the host, which it does not wait for itself.

    The device of the scale is not known here, so this waits for every device that the process uses.
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
    """Returns the row gradient of a parameter; None if it has none, or a dense one."""
    return part.grad if isinstance(part.grad, RowGradient) else None


def sum_rows(rows: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the values `(reads, width)` of equal rows `(reads,)`.

    Returns:
        `tuple`: unique rows, ascending, `(touched,)`, and their sums in float32, `(touched, width)`.
    """
    unique, inverse = torch.unique(rows, return_inverse=True)
    summed = torch.zeros(len(unique), values.shape[1], dtype=torch.float32, device=values.device)
    return unique, summed.index_add_(0, inverse, values.float())  # (touched,), (touched, width)


def add_row_gradient(part: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Accumulates gradients of unique rows into `part.grad`; rows outside of `part.selected`, if set, get none."""
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
    """Returns for each of `rows` `(rows,)` whether it is in `known` `(known,)`, ascending."""
    if not len(known):
        return torch.zeros_like(rows, dtype=torch.bool)
    near = torch.searchsorted(known, rows).clamp_(max=len(known) - 1)
    return known[near] == rows


def with_row_gradients(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the parameters that have a row gradient."""
    return (p for p in parameters if row_gradient(p) is not None)
