"""EngramTable: the rows of one layer, and the only gradient path into them.

Promises: a gather copies only the rows that it was asked for; the gradient of a table is its unique rows and their
values ([`RowGradient`]), whatever the table's size. Never makes a dense or a sparse torch gradient.
Source: Engram (arXiv 2601.07372), section 2.2 (one physical table per layer) and 2.5 (rows travel, tables stay).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .rows_gradient_engram import add_row_gradient, row_gradient, sum_rows
from .rows_quantised_engram import stored_as, vectors_of


def read_parts(rows: torch.Tensor, part_height: int, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Copies rows of a table that is stored in parts, to `(*rows.shape, width)` in the table's dtype and on its device.

    `rows`, of any shape, are counted over all parts; `part_height` is the height of all parts but the last.
    """
    parts = list(parts)
    if len(parts) == 1:
        return F.embedding(rows, parts[0])
    values = parts[0].new_empty(*rows.shape, parts[0].shape[1])
    place = part_of(rows, part_height, len(parts))
    for index, part in enumerate(parts):
        # By numbers: a mask with one value makes torch fill, by a float64 that loses the bits of some NaN.
        inside = (place == index).nonzero(as_tuple=True)
        values[inside] = F.embedding(rows[inside] - index * part_height, part)
    return values


def check_range(rows: torch.Tensor, height: int) -> None:
    """Raises IndexError for rows outside of the table, where other bytes would be read."""
    if not len(rows):
        return
    low, high = (int(bound) for bound in torch.aminmax(rows))
    if low < 0 or high >= height:
        raise IndexError(f"row {low if low < 0 else high} is outside the {height} rows of the table.")


# The gather is an operator that compilers do not trace: they see no table that they might copy, and no gradient whose
# size depends on data. Autograd passes gradients only to inputs, and the table must get none from it, so the gather has
# an unused input, the anchor, whose backward runs the operator that sets the row gradients.
#
# The namespace is unique to this module, because a checkpoint's own copy of the code may run in the same process; the
# version number rises with every change of a backward, because compilers cache graphs by operator names.
OPERATORS = f"engram_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"


# Finding the part of each row needs the host, which CUDA graphs cannot capture. Older torch has no such tag.
NOT_CAPTURED = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


# Schemas are explicit because torch 2.6 cannot infer one from `list[torch.Tensor]`.
@torch.library.custom_op(
    f"{OPERATORS}::gather_rows_2",
    mutates_args=(),
    schema="(Tensor rows, SymInt part_height, Tensor[] parts, Tensor anchor) -> Tensor",
    **NOT_CAPTURED,
)
def gather_rows(rows: torch.Tensor, part_height: int, parts: list[torch.Tensor], anchor: torch.Tensor) -> torch.Tensor:
    """`read_parts` with a backward that sets a `RowGradient` on each part."""
    return read_parts(rows, part_height, parts)


@gather_rows.register_fake
def _gathered_shape(rows, part_height, parts, anchor):
    return parts[0].new_empty(*rows.shape, parts[0].shape[1])


@torch.library.custom_op(
    f"{OPERATORS}::leave_row_gradients_2",
    mutates_args=(),
    schema="(Tensor rows, Tensor values, SymInt part_height, Tensor[] parts) -> Tensor",
    **NOT_CAPTURED,
)
def _leave_row_gradients(
    rows: torch.Tensor, values: torch.Tensor, part_height: int, parts: list[torch.Tensor]
) -> torch.Tensor:
    """Adds the gradient `values` of gathered `rows` to the parts' row gradients; returns the anchor's, a zero."""
    rows, values = sum_rows(rows.flatten(), values.reshape(-1, values.shape[-1]))  # (touched,), (touched, width)
    if len(parts) == 1:  # no search, and so no wait for the device
        if parts[0].requires_grad and len(rows):
            add_row_gradient(parts[0], rows, values)
        return torch.zeros(1, device="cpu")
    place = part_of(rows, part_height, len(parts))
    for index, part in enumerate(parts):
        if not part.requires_grad:
            continue
        inside = place == index
        if bool(inside.any()):
            add_row_gradient(part, rows[inside] - index * part_height, values[inside])
    return torch.zeros(1, device="cpu")


@_leave_row_gradients.register_fake
def _anchor_shape(rows, values, part_height, parts):
    return torch.zeros(1, device="cpu")


def _keep_for_backward(ctx, inputs, output) -> None:
    rows, ctx.part_height, ctx.parts, _ = inputs
    ctx.save_for_backward(rows)


def _gather_backward(ctx, values: torch.Tensor):
    (rows,) = ctx.saved_tensors
    return None, None, [None] * len(ctx.parts), _leave_row_gradients(rows, values, ctx.part_height, ctx.parts)


gather_rows.register_autograd(_gather_backward, setup_context=_keep_for_backward)


def part_of(rows: torch.Tensor, part_height: int, parts: int) -> torch.Tensor:
    """Returns the part of each row; the last part also has the remaining rows."""
    return (rows // part_height).clamp(max=parts - 1)


class TablePart(nn.Parameter):
    """A part of a table, registered under its state-dict name wherever its rows are.

    It holds its rows, or has shape `(0, width)` on the host while a store holds them. So everything that walks
    parameters (freezing, optimizers, clipping, PEFT, DDP, FSDP) finds it.

    `store` holds its rows ([`HostPart`], [`ChangedRows`]); None if the part itself does. `selected` `(rows,)`,
    ascending, are the rows that may change; None if all may.
    """

    store = None
    selected: torch.Tensor | None = None

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True):
        return super().__new__(cls, data.detach() if isinstance(data, TablePart) else data, requires_grad)

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "TablePart":
        """Converts a plain parameter, with its attributes."""
        part = cls(parameter.detach(), parameter.requires_grad)
        part.__dict__.update(parameter.__dict__)
        return part

    def __reduce_ex__(self, protocol: int):  # torch's would unpickle a plain parameter
        return _part_from, (self.detach(), self.requires_grad, self.__dict__)

    @property
    def is_quantised(self) -> bool:
        """Whether its rows are records, which are not trained."""
        return self.dtype == torch.uint8

    @property
    def table_shape(self) -> tuple[int, int]:
        """Rows and width, wherever they are."""
        return tuple(self.shape) if self.store is None else self.store.shape

    @torch.no_grad()
    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns a copy of rows `(rows,)`, `(rows, width)`, in the table's dtype."""
        return self.detach().index_select(0, rows) if self.store is None else self.store.read(rows)

    @torch.no_grad()
    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Writes `values` `(rows, width)` to rows `(rows,)`, ascending and unique.

        Raises:
            `TypeError`: for values where a quantised table has records.
        """
        if self.is_quantised and values.dtype != torch.uint8:
            raise TypeError(
                f"a quantised table is written records (uint8), given are {values.dtype}: "
                "rows_quantised_engram.quantise(values, dtype) makes them."
            )
        if self.store is None:
            self.detach().index_copy_(0, rows, values.to(self.dtype))
        else:
            self.store.write(rows, values)

    def requires_grad_(self, requires_grad: bool = True) -> "TablePart":
        """As in torch.

        Raises:
            `ValueError`: for rows of a quantised table, which are not trained.
        """
        if requires_grad and self.is_quantised:
            raise ValueError(
                "rows of a quantised table (engram_table_dtype 'int8' or 'float8_e4m3fn') cannot be trained: `engram "
                "cast IN OUT --dtype bfloat16` makes a checkpoint whose rows can; cast it back after training."
            )
        return super().requires_grad_(requires_grad)

    def expect(self, rows: torch.Tensor) -> None:
        """Allocates memory for rows `(rows,)` that will be written."""
        if self.store is not None:
            self.store.expect(rows)


def _part_from(rows: torch.Tensor, requires_grad: bool, noted: dict) -> TablePart:
    """Restores a pickled part."""
    part = TablePart(rows, requires_grad)
    part.__dict__.update(noted)
    return part


class GatherBrought(torch.autograd.Function):
    """Reads rows that were copied to the device, and sets their gradients on the table on the host."""

    @staticmethod
    def forward(ctx, anchor, values, places, rows, part_height, parts):
        ctx.rows, ctx.part_height, ctx.parts = rows, part_height, parts
        ctx.save_for_backward(places)
        return F.embedding(places, values)

    @staticmethod
    def backward(ctx, gradients: torch.Tensor):
        (places,) = ctx.saved_tensors
        # Summed on the device, so that only gradients of unique rows are copied to the host.
        unique, summed = sum_rows(places.flatten(), gradients.reshape(-1, gradients.shape[-1]))
        host = ctx.rows.device
        _leave_row_gradients(ctx.rows[unique.to(host)], summed.to(host), ctx.part_height, ctx.parts)
        return torch.zeros(1, device="cpu"), None, None, None, None, None


@dataclass
class BroughtRows:
    """Rows that were copied to the device that needs them.

    Args:
        values (`torch.Tensor` of shape `(unique, width)`): the rows.
        places (`torch.LongTensor` of any shape): index into `values` for each read.
        rows (`torch.LongTensor` of shape `(unique,)`): their numbers in the table, on the host.
        parts (`list[TablePart]`, *optional*): the parts that get their gradients, if they are trainable.
    """

    values: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    parts: list[TablePart] | None = None


class OrderRows(nn.Module):
    """Rows of one order, in parts. A module that is called, because accelerate's hooks act on calls.

    Args:
        heights (`list[int]`): rows of each part.
        width (`int`): values in a row.
        dtype (`torch.dtype`): type of the rows; `.to(dtype)`, `.half()` and `part.data = ...` do not change it.
        hold (`bool`, *optional*, defaults to `True`): whether to allocate rows, or leave them to be placed later.

    `store` ([`RowStore`]) holds the rows while the parts hold none; `absent` says that they were left out on purpose.
    """

    def __init__(self, heights: list[int], width: int, dtype: torch.dtype, hold: bool = True):
        super().__init__()
        self.heights, self.width, self.dtype = heights, width, dtype
        self.store, self.absent = None, not hold
        self.part_height = heights[0]
        self.anchor = torch.zeros(1, requires_grad=True, device="cpu")  # see `gather_rows`
        for number, height in enumerate(heights):
            rows = torch.zeros(height, width, dtype=dtype) if hold else self.no_rows()
            self.register_parameter(str(number), TablePart(rows, rows.is_floating_point()))

    def __len__(self) -> int:
        return len(self.heights)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.tensors()[number]

    def no_rows(self) -> torch.Tensor:
        """Returns the data of a part whose rows are elsewhere: `(0, width)`, on the host."""
        return torch.empty(0, self.width, dtype=self.dtype, device="cpu")

    @property
    def parts(self) -> list[TablePart]:
        """The registered parts."""
        return list(self._parameters.values())

    @property
    def is_resident(self) -> bool:
        """Whether the parts hold their rows."""
        return self.store is None and not self.absent

    def tensors(self) -> list[torch.Tensor]:
        """Returns the rows of all parts, wherever they are; those on disk as a mapping.

        Raises:
            `RuntimeError`: if the table was not loaded.
        """
        if self.store is not None:
            return self.store.tensors()
        if self.absent:
            raise RuntimeError("this memory's tables were not loaded: model.place_memory('disk') or 'cpu' loads them.")
        self.mend_parts()
        return self.parts

    def place(self, store, device: torch.device | None = None) -> None:
        """Moves the rows to a store, or with `device` from a store into the parts; no store leaves them out."""
        if store is not None and store is self.store and device is None:
            return
        held = [self.no_rows()] * len(self.heights) if device is None else store.tensors()
        flags = [part.requires_grad for part in self.parts]
        self.store, self.absent = (store if device is None else None), store is None
        for number, (rows, learns) in enumerate(zip(held, flags, strict=True)):
            rows = rows.detach() if device is None else rows.detach().to(device)
            self.register_parameter(str(number), TablePart(rows, requires_grad=learns))
        self.mend_parts()

    def mend_parts(self) -> None:
        """Restores parts that other code has changed.

        Loaders, copies and pickles put plain parameters in their place; PEFT's `prepare_model_for_kbit_training` makes
        every 16-bit parameter float32 by `part.data = ...`; accelerate's hooks move empty parts to a device.
        """
        for number, part in enumerate(self.parts):
            if self.store is not None and (part.shape[0] or not part.is_cpu or type(part) is not TablePart):
                part = TablePart(self.no_rows(), requires_grad=part.requires_grad)
                self._parameters[str(number)] = part
            elif type(part) is nn.Parameter:
                part = self._parameters[str(number)] = TablePart.of(part)
            if part.dtype != self.dtype:
                part.data = part.data.to(self.dtype)
            if self.store is not None:
                part.store = self.store.part(number)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module; a plain parameter becomes a part."""
        if type(param) is nn.Parameter:
            param = TablePart.of(param)
        super().register_parameter(name, param)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.mend_parts()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(self.heights) * self.width * self.dtype.itemsize

    def forward(self, rows: torch.Tensor, brought: BroughtRows | None = None) -> torch.Tensor:
        """Reads rows `(*rows.shape, width)`, in the table's dtype and on its device.

        Args:
            rows (`torch.LongTensor` of any shape): rows to read.
            brought ([`BroughtRows`], *optional*): given by the hook of a table that is elsewhere.
        """
        if brought is not None:
            if brought.parts is None:
                return F.embedding(brought.places, brought.values)
            return GatherBrought.apply(
                self.anchor, brought.values, brought.places, brought.rows, self.part_height, brought.parts
            )
        parts = self.tensors()
        rows = rows.to(parts[0].device)
        learns = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if learns or torch.compiler.is_compiling():
            return gather_rows(rows, self.part_height, parts, self.anchor if learns else self.anchor.detach())
        return read_parts(rows, self.part_height, parts)  # without the overhead of an operator

    def _apply(self, fn, recurse=True):
        if not self.is_resident:
            return self  # empty parts stay on the host

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor.new_empty(0))
            return fn(tensor) if moved.dtype == tensor.dtype else tensor.to(moved.device)

        held = {name: row_gradient(part) for name, part in self.named_parameters()}
        for name, part in self.named_parameters():
            if held[name] is not None:
                part.grad = None  # torch would move its storage, which it does not have
        super()._apply(keep_dtype, recurse)
        self.mend_parts()
        for name, part in self.named_parameters():
            if held[name] is not None:
                add_row_gradient(part, held[name].rows.to(part.device), held[name].row_values.to(part.device))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.is_resident:
            self.mend_parts()
            super()._save_to_state_dict(destination, prefix, keep_vars)
        elif self.store is not None:
            for number, rows in enumerate(self.store.tensors()):
                destination[f"{prefix}{number}"] = rows

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        if self.is_resident:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            self.mend_parts()
            return
        for number, height in enumerate(self.heights):
            name, given = f"{prefix}{number}", state_dict.get(f"{prefix}{number}")
            if given is None:
                missing += [name] if strict and self.store is not None else []
            elif self.store is None:
                unexpected += [name] if strict else []
            elif self.store.kind == "disk":
                errors.append(f"{name} is on disk and not written to: model.place_memory('cpu') first.")
            elif given.shape != (height, self.width):
                errors.append(f"{name} has shape {tuple(given.shape)}, the table has {(height, self.width)}.")
            else:
                self.store.tensors()[number].copy_(given)


class EngramTable(nn.Module):
    """Rows of all orders and heads of one Engram layer.

    Every order is a list of parts, `order2.0`, `order2.1`, ..., each a parameter of shape `(rows, width)`. Rows start
    at zero: a memory that was never trained contributes exactly nothing.

    Args:
        order_rows (`list[int]`): rows of each order, bigrams first.
        width (`int`): values in a row.
        parts (`int`): parameters for each order.
        dtype (`torch.dtype`): type of the rows; `.to(dtype)`, `.half()` and `dtype=` do not change it. Rows of a
            quantised type are records, and the parameters uint8 of shape `(rows, record)`.
        hold (`bool`, *optional*, defaults to `True`): whether to allocate rows, or leave them to be placed later.
    """

    def __init__(self, order_rows: list[int], width: int, parts: int, dtype: torch.dtype, hold: bool = True):
        super().__init__()
        self.width, self.dtype = width, dtype
        stored, length = stored_as(dtype, width)
        self.part_heights = [rows // parts for rows in order_rows]
        for order, rows in enumerate(order_rows, start=2):
            if rows < parts:
                raise ValueError(
                    f"engram_table_parts={parts} is more than the {rows} rows of order {order}: use fewer."
                )
            height = self.part_heights[order - 2]
            heights = [height] * (parts - 1) + [rows - height * (parts - 1)]
            self.register_module(f"order{order}", OrderRows(heights, length, stored, hold))

    def orders(self) -> list[OrderRows]:
        """Returns the rows by order, bigrams first."""
        return [getattr(self, f"order{order}") for order in range(2, 2 + len(self.part_heights))]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(order.nbytes for order in self.orders())

    def forward(self, rows: torch.Tensor, fetches: list | None = None) -> torch.Tensor:
        """Reads memory vectors `(batch, length, orders * heads * width)`, in the table's dtype and on its device; those
        of a quantised table in float32.

        Args:
            rows (`torch.LongTensor` of shape `(batch, length, orders, heads)`):
                Rows counted from the first of their order, on any device.
            fetches (`list[RowFetch]`, *optional*): prefetches of each order of a table that is elsewhere.
        """
        # (batch, length, heads) -> (batch, length, heads * stored width), for every order
        given = [{}] * len(self.part_heights) if fetches is None else [{"fetch": fetch} for fetch in fetches]
        read = [order(rows[:, :, i], **given[i]).flatten(-2) for i, order in enumerate(self.orders())]
        if not torch.is_autocast_enabled(read[0].device.type):  # entering its context is slow
            read = torch.cat(read, dim=-1)  # (batch, length, orders * heads * stored width)
        else:
            with torch.autocast(read[0].device.type, enabled=False):  # it supports one half-precision dtype only
                read = torch.cat(read, dim=-1)  # (batch, length, orders * heads * stored width)
        return vectors_of(read, self.dtype, self.width)  # (batch, length, orders * heads * width)
