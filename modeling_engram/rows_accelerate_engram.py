"""Accelerate's hooks on tables: ours, which copies rows to the device, and code that removes accelerate's own.

What it chooses: accelerate's hooks copy a whole table to the device in every forward pass; ours copies rows. It is
attached to the `OrderRows` of a memory. After `dispatch_model`, `cpu_offload`, `disk_offload` or a device map, the next
forward pass takes tables back: rows are then read from where accelerate keeps them.
Promises: results, state dict and saved files are those of the module without it; parts hold no row while it is
attached, so that `.to`, broadcasts and sharding move no table; detaching undoes attaching; other hooks stay. Never
keeps rows of an earlier pass, and never moves a table.
Source: accelerate 1.15, `hooks.py` and `utils/offload.py`; docs/offload.md.
"""

from pathlib import Path

import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from torch import nn

from .files_safetensors_engram import read_header
from .rows_overlay_engram import RowOverlay
from .rows_prefetch_engram import RowFetch
from .rows_storage_engram import FEW_ROWS, FilePart, FileRows, HostRows, RowStore, ShardFile, file_part
from .rows_table_engram import BroughtRows, EngramTable, OrderRows


class EngramRowsHook(ModelHook):
    """Copies the rows that an order is asked for to the device that needs them; the table stays where it is.

    Args:
        store ([`RowStore`], *optional*): where the rows are; the order's own, moved to the host, if None.
        execution_device (`torch.device` or `str`, *optional*): where rows are needed; the device of the ids if None.
        prefetch (`bool`, *optional*, defaults to `True`): read rows before the layers that need them.
        verify (`bool`, *optional*, defaults to `False`): for debugging: read all rows again when they are used.
    """

    def __init__(self, store: RowStore | None = None, execution_device=None, prefetch: bool = True, verify=False):
        self.store, self.prefetch, self.verify = store, prefetch, verify
        self.execution_device = None if execution_device is None else torch.device(execution_device)
        self.gives_back = True  # whether detaching gives the order its rows back

    def __repr__(self) -> str:
        placement = None if self.store is None else self.store.kind
        return (
            f"EngramRowsHook(placement={placement!r}, execution_device={self.execution_device}, "
            f"prefetch={self.prefetch}, verify={self.verify})"
        )

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Takes the rows out of an order.

        Raises:
            `TypeError`: for another module.
            `ValueError`: if the rows have no storage.
        """
        if not isinstance(module, OrderRows):
            raise TypeError(f"EngramRowsHook goes on the OrderRows of a memory's table, got {type(module).__name__}.")
        if self.store is None:
            parts = module.tensors()
            if any(part.is_meta for part in parts):
                raise ValueError("the table has no storage (meta): load it first, or pass the hook a store.")
            self.store = HostRows([part.detach().to("cpu") for part in parts])
        if module.store is not self.store:
            module.place(self.store)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Gives the order its rows back, on the host."""
        if self.gives_back:
            module.place(self.store, torch.device("cpu"))
        return module

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, ids: torch.Tensor, fetch: RowFetch | None = None):
        if fetch is None:
            fetch = self.ask(module, ids, ids.device)
        brought = fetch.result()
        if self.verify:
            self.compare(module, ids, brought)
        parts = module.parts
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            many = brought.places.numel() > FEW_ROWS  # their rows are unique and ascending
            if many and isinstance(module.store, RowOverlay) and brought.values.is_cpu:
                module.store.see(brought.rows, brought.values)  # for the optimizer
            brought = BroughtRows(brought.values, brought.places, brought.rows, parts)
        return (ids,), {"brought": brought}

    def ask(self, module: OrderRows, ids: torch.Tensor, device: torch.device) -> RowFetch:
        """Returns a prefetch that has not started."""
        return RowFetch(module.store, ids, self.execution_device or device)

    def compare(self, module: OrderRows, ids: torch.Tensor, brought: BroughtRows) -> None:
        """Raises RuntimeError at the first row that is not the table's."""
        rows = ids.to("cpu").flatten()
        given = brought.values.detach().to("cpu")[brought.places.to("cpu").flatten()]  # (reads, width)
        right = module.store.read(rows)  # (reads, width)
        # As bytes, because a row may hold NaN.
        differs = (given.view(torch.uint8) != right.view(torch.uint8)).any(1) if len(rows) == len(given) else rows >= 0
        if bool(differs.any()):
            first = int(torch.nonzero(differs)[0])
            raise RuntimeError(
                f"row {int(rows[first])} of {type(module).__name__} was fetched as {given[first][:4].tolist()}..., the "
                f"table holds {right[first][:4].tolist()}... ({int(differs.sum())} of {len(rows)} reads differ)."
            )


class HookedForward:
    """Replaces a hooked module's `forward` as accelerate does, but can be pickled.

    Args:
        module (`nn.Module`): a module with a hook.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args, **kwargs):
        args, kwargs = self.module._hf_hook.pre_forward(self.module, *args, **kwargs)
        return self.module._hf_hook.post_forward(self.module, self.module._old_forward(*args, **kwargs))


def attach_rows_hook(module: nn.Module, hook: EngramRowsHook) -> None:
    """Appends our hook to those that a module has."""
    add_hook_to_module(module, hook, append=True)
    if module._hf_hook is hook:
        module.forward = HookedForward(module)


def _held_hooks(module: nn.Module) -> list[ModelHook]:
    """Returns the hooks on a module; accelerate nests sequences."""

    def flat(hook) -> list[ModelHook]:
        return [inner for held in hook.hooks for inner in flat(held)] if isinstance(hook, SequentialHook) else [hook]

    return flat(module._hf_hook) if "_hf_hook" in module.__dict__ else []


def rows_hook(module: nn.Module) -> EngramRowsHook | None:
    """Returns our hook on a module, if any."""
    return next((hook for hook in _held_hooks(module) if isinstance(hook, EngramRowsHook)), None)


def detach_rows_hook(module: nn.Module) -> None:
    """Removes our hook from a module; other hooks stay."""
    ours = rows_hook(module)
    if ours is None:
        return
    others = [hook for hook in _held_hooks(module) if hook is not ours]
    remove_hook_from_module(module)
    for hook in others:
        add_hook_to_module(module, hook, append=True)


def take_back_table(table: EngramTable) -> None:
    """Takes a table back from accelerate's hooks, which would copy it to the device as a whole.

    Called at the start of a forward pass, when dispatching is done.
    """
    orders = table.orders()
    if not any("_hf_hook" in module.__dict__ for module in (table, *orders)):
        return
    elsewhere = False
    for order in orders:
        align = _align_hooks(order)
        if order.is_resident and any(hook.offload for hook in align):
            source = _waiting_rows(order, next(hook for hook in align if hook.offload))
            _drop_align_hooks(order)
            attach_rows_hook(order, EngramRowsHook(source))
        elif align and not order.is_resident:
            _drop_align_hooks(order)
            order.mend_parts()
        elsewhere = elsewhere or not order.is_resident
    if elsewhere and _align_hooks(table):  # it would copy row numbers to the device and back
        _drop_align_hooks(table)


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Returns accelerate's own hooks on a module."""
    return [hook for hook in _held_hooks(module) if isinstance(hook, AlignDevicesHook)]


def computing_device(module: nn.Module) -> torch.device:
    """Returns where a module computes: the device of accelerate's hooks, or of its first tensor."""
    hooks = [hook for inner in module.modules() for hook in _align_hooks(inner)]
    device = next((hook.execution_device for hook in hooks if hook.execution_device is not None), None)
    if device is not None:
        return torch.empty(0, device=device).device  # accelerate writes `0` for the first accelerator
    return next(module.parameters()).device


def _drop_align_hooks(module: nn.Module) -> None:
    """Removes accelerate's own hooks without moving anything; other hooks stay."""
    kept = [hook for hook in _held_hooks(module) if not isinstance(hook, AlignDevicesHook)]
    if kept:
        module._hf_hook = kept[0] if len(kept) == 1 else SequentialHook(*kept)
        return
    module._hf_hook = ModelHook()  # whose detaching does nothing
    remove_hook_from_module(module)


def _waiting_rows(order: OrderRows, hook: AlignDevicesHook) -> RowStore:
    """Returns the store where accelerate keeps the rows of an order between passes.

    Raises:
        `RuntimeError`: if there is none.
    """
    weights = hook.weights_map
    dataset, prefix = getattr(weights, "dataset", weights), getattr(weights, "prefix", "")
    names = [str(number) for number in range(len(order.heights))]
    index = getattr(dataset, "index", {})
    state = getattr(dataset, "state_dict", dataset)
    if all(prefix + name in state for name in names):
        return HostRows([state[prefix + name] for name in names])
    try:
        opened: dict[Path, ShardFile] = {}  # many parts are in one file
        parts = [_offloaded_part(dataset, index[prefix + name], prefix + name, order, opened) for name in names]
        return RowOverlay(FileRows(parts))
    except (KeyError, AttributeError) as error:
        raise RuntimeError(
            f"accelerate has offloaded '{prefix}' to a place that is not known ({error}): load the model with "
            "engram_placement='cpu' or 'disk', which keeps its tables out of accelerate's hands."
        ) from error


def _offloaded_part(dataset, entry: dict, name: str, order: OrderRows, opened: dict[Path, ShardFile]) -> FilePart:
    """Returns the location of a part in accelerate's offload folder, or in the safetensors file of its index."""
    if "safetensors_file" in entry:
        path = Path(entry["safetensors_file"])
        if path not in opened:
            opened[path] = ShardFile(path)
        return file_part(opened[path], read_header(path), entry.get("weight_name", name))
    return FilePart(ShardFile(f"{dataset.save_folder}/{name}.dat"), 0, tuple(entry["shape"]), order.dtype)
