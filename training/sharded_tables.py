"""Tables sharded by row over ranks, for tables that no rank can hold.

What it chooses: rank r holds one contiguous block of rows of every order. In a forward pass each rank sends the ids
that it needs to the ranks that hold them, and gets the rows; the backward pass sends gradients the same way. Three
all-to-alls for an order forward (counts, ids, rows), one backward; only unique rows are sent.
Promises: rows are read bit for bit; a row is updated only by the rank that holds it, with the mean over all ranks;
norms of these gradients are those of all ranks, so clipping is the same everywhere; what would need the whole table is
refused. Never holds a whole table, also not while loading or saving.
Source: Engram (arXiv 2601.07372), section 2.5 (tables sharded over accelerators, all-to-all of active rows);
docs/processes.md.
"""

import math
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..memory_engram import layer_device
from ..rows_gradient_engram import RowGradient, row_gradient, sum_rows
from ..rows_placement_engram import TABLES_PREFIX, held_rows, named_orders, stored_rows
from ..rows_table_engram import OrderRows, check_range
from .distributed import RankPart, gather, ranks_of, wire_device


aten = torch.ops.aten

# Rows read from a file, or sent to the saving rank, at once.
BLOCK = 1 << 16


class RankRowGradient(RowGradient):
    """Gradient of the rows that a rank holds, summed over all ranks.

    Its norm is that of all ranks' rows: every rank must ask for it, as with FSDP.
    """

    group = None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        gradient = args[0]
        if not isinstance(gradient, RankRowGradient):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.linalg_vector_norm.default:
            return _norm_of_ranks(func(gradient.row_values, *args[1:], **(kwargs or {})), args[1:], gradient.group)
        if func is aten.isfinite.default:
            finite = gradient.row_values.isfinite().all().float()
            return torch.stack(gather(finite, gradient.group)).min().bool()
        if func is aten.detach.default:
            return _rank_gradient(gradient, gradient.rows, gradient.row_values, gradient.group)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _norm_of_ranks(own: torch.Tensor, arguments: tuple, group) -> torch.Tensor:
    """Combines the norms `own` of all ranks."""
    order = float(arguments[0]) if arguments else 2.0
    norms = torch.stack(gather(own.reshape(()), group))  # (ranks,), so the same sum everywhere
    return norms.max() if math.isinf(order) else norms.pow(order).sum().pow(1 / order)


def _rank_gradient(part: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, group) -> RankRowGradient:
    """Makes a gradient that needs no exchange."""
    gradient = RankRowGradient(part, rows, values)
    gradient.group, gradient.exchanged = group, True
    return gradient


class RankRows(OrderRows):
    """Rows of one order; this rank holds those from `first` on.

    Args:
        order ([`OrderRows`]): the order that it replaces.
        part (`torch.Tensor` of shape `(own rows, width)`): the rows of this rank.
        learns (`bool`): whether they are trainable.
        group (`ProcessGroup`, *optional*): the ranks.
    """

    def __init__(self, order: OrderRows, part: torch.Tensor, learns: bool, group=None):
        super().__init__(order.heights, order.width, order.dtype, hold=False)
        self._parameters.clear()
        self.group, self.bounds = group, row_bounds(sum(order.heights), ranks_of(group))
        self.first = self.bounds[dist.get_rank(group)]
        self.absent = False
        self.register_parameter("0", RankPart(part, requires_grad=learns))
        self.part.group = group
        self.gathered: list[torch.Tensor] | None = None  # the whole parts, while they are saved

    @property
    def part(self) -> torch.Tensor:
        """The rows of this rank, `(own rows, width)`."""
        return self._parameters["0"]

    def tensors(self) -> list[torch.Tensor]:
        raise RuntimeError(
            f"this table is sharded by row, and rank {dist.get_rank(self.group)} holds {len(self.part)} of its "
            f"{self.bounds[-1]} rows: save with save_sharded(model, folder) on every rank, and load that to place it "
            "elsewhere."
        )

    @torch.compiler.disable
    def forward(self, rows: torch.Tensor, brought=None) -> torch.Tensor:
        learns = torch.is_grad_enabled() and self.part.requires_grad
        rows = rows.to(self.part.device)
        return ReadOverRanks.apply(self.anchor if learns else self.anchor.detach(), rows, self)

    def ask(self, rows: torch.Tensor) -> "RowsAsked":
        """Sends the ids of unique, ascending `rows` to the ranks that hold them."""
        check_range(rows, self.bounds[-1])
        wire = wire_device([self.part], self.group)
        bounds = torch.tensor(self.bounds[1:-1], device=rows.device)
        owners = torch.bucketize(rows, bounds, right=True)  # (unique,)
        asked = torch.bincount(owners, minlength=ranks_of(self.group))
        wanted = torch.empty_like(asked, device=wire)
        dist.all_to_all_single(wanted, asked.to(wire), group=self.group)
        counts = RowsAsked(asked.tolist(), wanted.tolist(), rows, wire, self.group)
        counts.rows = counts.send(rows).to(self.part.device) - self.first
        return counts

    def leave_gradient(self, asked: "RowsAsked", values: torch.Tensor) -> None:
        """Sends gradients `(unique, width)` to the ranks that hold the rows, and sets this rank's."""
        home = asked.send(values).to(self.part.device)  # (asked by all, width), ranks in order
        rows = torch.unique(asked.rows)
        summed = home.new_zeros(len(rows), self.width)  # (touched, width)
        for theirs, gradient in zip(asked.rows.split(asked.wanted), home.split(asked.wanted), strict=True):
            summed[torch.searchsorted(rows, theirs)] += gradient  # unique in a rank, so summed in the ranks' order
        summed /= ranks_of(self.group)
        held = row_gradient(self.part)
        if held is not None:
            rows, summed = sum_rows(torch.cat([held.rows, rows]), torch.cat([held.row_values, summed]))
        # Set even if no row of this rank was read: every rank must take part in norms.
        self.part.grad = _rank_gradient(self.part, rows, summed, self.group)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for number, whole in enumerate(self.tensors() if self.gathered is None else self.gathered):
            destination[f"{prefix}{number}"] = whole

    def _load_from_state_dict(self, *arguments, **settings):
        self.tensors()


class RowsAsked:
    """The exchange of rows between ranks in one pass.

    Args:
        asked, wanted (`list[int]`): numbers of rows that this rank asks of every rank, and every rank of this one.
        rows (`torch.LongTensor`): see `RankRows.ask`; later the wanted rows, counted within this rank's part.
        wire (`torch.device`): device that can send.
        group (`ProcessGroup`, *optional*): the ranks.
    """

    def __init__(self, asked: list[int], wanted: list[int], rows: torch.Tensor, wire: torch.device, group):
        self.asked, self.wanted, self.rows, self.wire, self.group = asked, wanted, rows, wire, group

    def send(self, given: torch.Tensor) -> torch.Tensor:
        """Sends from asking to holding ranks: `(asked, ...)` in, `(wanted, ...)` out."""
        return self.travel(given, self.asked, self.wanted)

    def answer(self, given: torch.Tensor) -> torch.Tensor:
        """Sends from holding to asking ranks: `(wanted, ...)` in, `(asked, ...)` out."""
        return self.travel(given, self.wanted, self.asked)

    def travel(self, given: torch.Tensor, away: list[int], back: list[int]) -> torch.Tensor:
        got = given.new_empty(sum(back), *given.shape[1:], device=self.wire)
        dist.all_to_all_single(got, given.to(self.wire).contiguous(), back, away, group=self.group)
        return got


class ReadOverRanks(torch.autograd.Function):
    """Reads rows from the ranks that hold them, and sends their gradients back."""

    @staticmethod
    def forward(ctx, anchor, rows, order):
        unique, places = torch.unique(rows, return_inverse=True)
        asked = order.ask(unique)
        held = F.embedding(asked.rows, order.part.detach())  # (wanted, width)
        values = asked.answer(held.view(torch.uint8)).view(order.dtype).to(rows.device)  # as bytes, for any dtype
        ctx.order, ctx.asked = order, asked
        ctx.save_for_backward(places)
        return F.embedding(places, values)  # (*rows.shape, width)

    @staticmethod
    def backward(ctx, gradients: torch.Tensor):
        (places,) = ctx.saved_tensors
        unique = sum(ctx.asked.asked)
        summed = torch.zeros(unique, gradients.shape[-1], device=gradients.device)  # (unique, width)
        summed.index_add_(0, places.flatten(), gradients.reshape(-1, gradients.shape[-1]).float())
        ctx.order.leave_gradient(ctx.asked, summed)
        return torch.zeros(1, device="cpu"), None, None


def row_bounds(height: int, ranks: int) -> list[int]:
    """Returns where each rank's rows begin, and the end; blocks are as equal as possible."""
    return [height * rank // ranks for rank in range(ranks + 1)]


@torch.no_grad()
def shard_tables(model, group=None):
    """Shards every table by row, so that each rank holds its own block, for training or generation.

    All ranks must then run forward passes together. Load with `engram_placement="disk"` (or "none", or "cpu", which
    maps files): no rank holds more than its own rows at any time.

    Args:
        model ([`EngramForCausalLM`]): changed in place; make the optimizer afterwards.
        group (`ProcessGroup`, *optional*): the ranks that share the tables; all if None.

    Returns:
        The model.

    Raises:
        `ValueError`: if the tables are sharded already, have selected rows, or are in no file and not loaded.

    Example:

    ```python
    >>> from engram_transformers.training import save_sharded, shard_tables

    >>> model = AutoModelForCausalLM.from_pretrained("my-graft", engram_placement="disk")
    >>> optimizer = create_optimizer(shard_tables(model))
    >>> save_sharded(model, "trained")
    ```"""
    model.memory.take_back_tables()
    ready = []
    for prefix, order in named_orders(model.memory.tables):
        if isinstance(order, RankRows):
            raise ValueError(f"'{prefix}*' is sharded by row already.")
        if any(part.selected is not None for part in order.parts):
            raise ValueError(f"rows of '{prefix}*' were selected (select_rows), by their numbers in the whole table.")
        source = held_rows(order) or stored_rows(prefix, order, model.checkpoint_tables)
        learns = any(part.requires_grad for part in order.parts)
        layer = model.memory.layers[prefix.removeprefix(TABLES_PREFIX).split(".")[0]]
        ready.append((prefix, order, source, learns, layer_device(layer)))
    for prefix, order, source, learns, device in ready:
        bounds = row_bounds(sum(order.heights), ranks_of(group))
        first, last = bounds[dist.get_rank(group)], bounds[dist.get_rank(group) + 1]
        part = torch.empty(last - first, order.width, dtype=order.dtype, device=device)
        for begin in range(first, last, BLOCK):
            rows = torch.arange(begin, min(begin + BLOCK, last), device=device if order.is_resident else "cpu")
            part[begin - first : begin - first + len(rows)] = source.read(rows)
        layer, name = prefix.removeprefix(TABLES_PREFIX).rstrip(".").split(".")
        model.memory.tables[layer].register_module(name, RankRows(order, part, learns, group))
    return model


def save_sharded(model, folder, group=None, **settings) -> None:
    """Saves a model whose tables are sharded by row, as ordinary files; call it on every rank.

    Rank 0 writes. It receives the other ranks' rows in blocks and stores them in temporary files next to the folder:
    this needs the tables' size twice on disk, and nowhere in memory.

    Args:
        model ([`EngramForCausalLM`]): after `shard_tables`.
        folder (`str` or `os.PathLike`): as for `save_pretrained`.
        group (`ProcessGroup`, *optional*): that of `shard_tables`.
        settings: further arguments of `save_pretrained`.

    Raises:
        `RuntimeError`: on the other ranks, if rank 0 could not save.
    """
    orders = [order for _, order in named_orders(model.memory.tables) if isinstance(order, RankRows)]
    if dist.get_rank(group) != 0:
        _serve_rows(orders, group)
        return
    problem = "it was stopped"
    try:
        with _laid_down(orders, Path(folder), group):
            model.save_pretrained(folder, **settings)
        problem = None
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        _broadcast_from_rank0({"problem": problem}, group)


@contextmanager
def _laid_down(orders: list[RankRows], folder: Path, group):
    """Makes whole parts available to a state dict inside the block, in temporary files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rows-of-ranks-", dir=folder.parent) as draft:
        for number, order in enumerate(orders):
            size = order.bounds[-1] * order.width * order.dtype.itemsize
            data = torch.from_file(f"{draft}/{number}", shared=True, size=size, dtype=torch.uint8)  # (bytes,)
            whole = data.view(order.dtype).view(-1, order.width)  # (rows, width)
            for rank, (first, last) in enumerate(zip(order.bounds, order.bounds[1:], strict=False)):
                for begin in range(first, last, BLOCK):
                    end = min(begin + BLOCK, last)
                    whole[begin:end] = _fetch_rows(order, number, rank, begin, end, group)
            order.gathered = list(whole.split(order.heights))
        try:
            yield
        finally:
            for order in orders:
                order.gathered = None


def _fetch_rows(order: RankRows, number: int, rank: int, begin: int, end: int, group) -> torch.Tensor:
    """Returns rows `begin` to `end` of an order from `rank`, on rank 0: `(end - begin, width)`."""
    if rank == 0:
        return order.part[begin:end]
    _broadcast_from_rank0({"order": number, "rank": rank, "begin": begin, "end": end}, group)
    got = torch.empty(end - begin, order.width, dtype=order.dtype, device=wire_device([order.part], group))
    dist.recv(got.view(torch.uint8), src=_global_rank(rank, group), group=group)
    return got


def _serve_rows(orders: list[RankRows], group) -> None:
    """Sends rows to rank 0 until it has all.

    Raises:
        `RuntimeError`: if it could not save.
    """
    while "order" in (wish := _broadcast_from_rank0(None, group)):
        if wish["rank"] == dist.get_rank(group):
            order = orders[wish["order"]]
            rows = order.part.detach()[wish["begin"] - order.first : wish["end"] - order.first]
            rows = rows.to(wire_device([order.part], group)).contiguous()
            dist.send(rows.view(torch.uint8), dst=_global_rank(0, group), group=group)
    if wish["problem"] is not None:
        raise RuntimeError(f"rank 0 could not save ({wish['problem']}): the folder holds what it held before.")


def _broadcast_from_rank0(what: dict | None, group) -> dict:
    """Broadcasts an object from rank 0."""
    heard = [what]
    dist.broadcast_object_list(heard, src=_global_rank(0, group), group=group)
    return heard[0]


def _global_rank(rank: int, group) -> int:
    """Returns the global rank of a group's rank."""
    return rank if group is None else dist.get_global_rank(group, rank)
