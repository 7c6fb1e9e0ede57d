"""Update rules of rows: Adam, Adagrad, and momentum balanced by Sinkhorn, each over the rows of one step.

A rule names the columns of its state and yields directions, which are multiplied by minus the learning rate. It works
in pieces, so that only a few of them are in memory besides its state.

| rule | state of a row of `width` values | direction | |---|---|---| | `adam` | 2 `width` numbers and a count | `m' /
(sqrt(v') + eps)`, bias corrected by the row's own number of updates | | `adagrad` | 1 number | `g / (sqrt(sum of mean
squares) + eps)` | | `sinkhorn` | `width` numbers | balanced momentum, see `RowSinkhorn` |

Sources: Adam for tables: Engram (arXiv 2601.07372), section 4.1; one Adagrad number a row: FBGEMM's row-wise Adagrad;
Sinkhorn: the tables of DeepSeek-V4.1-Flash (beta 0.95, tau 1e-3, gamma 0.18, 11 rounds).
"""

import math
from collections.abc import Iterator

import torch

from .row_state import RowState, pieces


Directions = Iterator[tuple[slice, torch.Tensor]]


class RowAdam:
    """Adam with moments for touched rows only, and an update count for each row, because rows are read at different
    rates.

    If every row is read at every step, it equals torch's Adam.
    """

    @staticmethod
    def columns(width: int, dtype: torch.dtype) -> dict:
        """Returns the state of a row."""
        return {"exp_avg": ((width,), dtype), "exp_avg_sq": ((width,), dtype), "step": ((), torch.int32)}

    @staticmethod
    def directions(state: RowState, slots: torch.Tensor, gradient: torch.Tensor, group: dict, generator) -> Directions:
        """Takes in gradients `(rows, width)` and yields directions, piece by piece."""
        (decay, decay_sq), eps = group["betas"], group["eps"]
        for piece in pieces(*gradient.shape):
            grad, own = gradient[piece], slots[piece]
            step = state.read("step", own).add_(1)  # (piece,)
            state.write("step", own, step, generator)
            mean = state.read("exp_avg", own).lerp_(grad, 1 - decay)  # (piece, width)
            state.write("exp_avg", own, mean, generator)
            square = state.read("exp_avg_sq", own).mul_(decay_sq).addcmul_(grad, grad, value=1 - decay_sq)
            state.write("exp_avg_sq", own, square, generator)
            scale, scale_sq = (_bias_correction(b, step) for b in (decay, decay_sq))  # (piece,)
            root = square.sqrt_().div_(scale_sq.sqrt_()[:, None]).add_(eps)
            yield piece, mean.div_(scale[:, None]).div_(root)


def _bias_correction(decay: float, steps: torch.Tensor) -> torch.Tensor:
    """Computes `1 - decay ** steps` `(rows,)` in float32; the plain formula would lose three digits."""
    log = math.log(decay) if decay > 0 else -math.inf
    return -torch.expm1(steps.float() * log)


class RowAdagrad:
    """Adagrad with one number for each touched row: the sum of its gradients' mean squares, always float32."""

    @staticmethod
    def columns(width: int, dtype: torch.dtype) -> dict:
        """Returns the state of a row."""
        return {"square_sum": ((), torch.float32)}

    @staticmethod
    def directions(state: RowState, slots: torch.Tensor, gradient: torch.Tensor, group: dict, generator) -> Directions:
        """Takes in gradients `(rows, width)` and yields directions, piece by piece."""
        for piece in pieces(*gradient.shape):
            grad, own = gradient[piece], slots[piece]
            total = state.read("square_sum", own).add_(grad.square().mean(1))  # (piece,)
            state.write("square_sum", own, total, generator)
            yield piece, grad / (total.sqrt_() + group["eps"])[:, None]


class RowSinkhorn:
    """Momentum whose step is balanced: every row, and as far as possible every column, moves equally far.

    M = beta M + (1 - beta) G at touched rows; N = beta M + (1 - beta) G (Nesterov). Rows of N whose norm is at most tau
    times the mean norm are zeroed. N is then divided by its rows' norms and by its columns' norms in turn, 11 times,
    rows first and last, which gives U; the direction is gamma sqrt(width) U: values move by 0.18 of the learning rate
    in root mean square. "Rows" are those that the step touched, for each part separately; the momentum of others is
    unchanged.
    """

    MOMENTUM, FLOOR, GAMMA, ROUNDS, EPS = 0.95, 1e-3, 0.18, 11, 1e-20

    @staticmethod
    def columns(width: int, dtype: torch.dtype) -> dict:
        """Returns the state of a row."""
        return {"momentum": ((width,), dtype)}

    @classmethod
    def directions(
        cls, state: RowState, slots: torch.Tensor, gradient: torch.Tensor, group: dict, generator
    ) -> Directions:
        """Takes in gradients `(rows, width)` and yields directions, piece by piece."""
        squares = torch.empty_like(gradient)  # (rows, width), of N with rows of norm 1
        norms = gradient.new_empty(len(gradient))  # (rows,)
        for piece in pieces(*gradient.shape):
            grad, own = gradient[piece], slots[piece]
            state.write("momentum", own, state.read("momentum", own).lerp_(grad, 1 - cls.MOMENTUM), generator)
            ahead = cls.ahead(state, own, grad)
            norms[piece] = ahead.norm(dim=1)
            squares[piece] = ahead.div_(norms[piece, None].clamp_min(cls.EPS)).square_()
        quiet = norms <= cls.FLOOR * norms.mean()  # (rows,)
        squares.masked_fill_(quiet[:, None], 0.0)
        row, column = cls.balance(squares)
        row = (row / norms.clamp_min(cls.EPS)).masked_fill_(quiet, 0.0)  # (rows,)
        column = column * (cls.GAMMA * gradient.shape[1] ** 0.5)  # (width,)
        del squares
        for piece in pieces(*gradient.shape):
            yield piece, cls.ahead(state, slots[piece], gradient[piece]).mul_(row[piece, None]).mul_(column)

    @classmethod
    def ahead(cls, state: RowState, slots: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Returns Nesterov's momentum, `(piece, width)`, after the gradient was taken in."""
        return state.read("momentum", slots).lerp_(gradient, 1 - cls.MOMENTUM)

    @classmethod
    def balance(cls, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the factors of rows `(rows,)` and columns `(width,)` after 11 rounds, the first of which is done.

        Dividing a matrix by its norms only rescales its rows and columns, so the squares stay the same, and a round is
        a product of a matrix and a vector.
        """
        least = torch.finfo(squares.dtype).tiny
        row, column = squares.new_ones(squares.shape[0]), squares.new_ones(squares.shape[1])
        for round_number in range(2, cls.ROUNDS + 1):
            if round_number % 2:
                row = (squares @ column).clamp_min_(least).reciprocal_()
            else:
                column = (squares.T @ row).clamp_min_(least).reciprocal_()
        return row.sqrt_(), column.sqrt_()


RULES = {"adam": RowAdam, "adagrad": RowAdagrad, "sinkhorn": RowSinkhorn}
