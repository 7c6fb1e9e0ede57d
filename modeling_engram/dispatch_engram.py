"""Dispatched tables: taken back from accelerate's hooks, which bring a whole table to the device in every forward pass.

Promises: after the first forward pass of a model that `dispatch_model`, `cpu_offload`, `disk_offload` or a device map
has put hooks on, rows travel and tables do not; they are read from where accelerate keeps them; hooks of others stay.
Never moves a table.
Source: accelerate 1.15, `hooks.py` (AlignDevicesHook) and `utils/offload.py` (where offloaded weights are).
"""

from pathlib import Path

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, remove_hook_from_module
from torch import nn

from .offload_engram import EngramRowsHook, attach_rows_hook, held_hooks
from .overlay_engram import RowOverlay
from .rows_engram import FilePart, FileRows, HostRows, RowStore, ShardFile, file_part
from .shards_engram import read_header
from .table_engram import EngramTable, OrderRows


def settle_table(table: EngramTable) -> None:
    """Takes a table back from accelerate's hooks, which would bring it to the device as a whole.

    Called at the begin of a forward pass, when all dispatching is done.
    """
    orders = table.orders()
    if not any("_hf_hook" in module.__dict__ for module in (table, *orders)):
        return
    elsewhere = False
    for order in orders:
        align = align_hooks(order)
        if order.is_resident and any(hook.offload for hook in align):
            source = waiting_rows(order, next(hook for hook in align if hook.offload))
            drop_align_hooks(order)
            attach_rows_hook(order, EngramRowsHook(source))
        elif align and not order.is_resident:
            drop_align_hooks(order)
            order.mend_parts()
        elsewhere = elsewhere or not order.is_resident
    if elsewhere and align_hooks(table):  # it would carry the rows' numbers to the device and back
        drop_align_hooks(table)


def align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Accelerate's own hooks on a module."""
    return [hook for hook in held_hooks(module) if isinstance(hook, AlignDevicesHook)]


def computing_device(module: nn.Module) -> torch.device:
    """Where a module computes: where accelerate's hooks bring it, or where its first tensor is."""
    hooks = [hook for inner in module.modules() for hook in align_hooks(inner)]
    device = next((hook.execution_device for hook in hooks if hook.execution_device is not None), None)
    if device is not None:
        return torch.empty(0, device=device).device  # accelerate says `0` for the first accelerator
    return next(module.parameters()).device


def drop_align_hooks(module: nn.Module) -> None:
    """Takes accelerate's own hooks off a module without moving anything; other hooks stay."""
    kept = [hook for hook in held_hooks(module) if not isinstance(hook, AlignDevicesHook)]
    if kept:
        module._hf_hook = kept[0] if len(kept) == 1 else SequentialHook(*kept)
        return
    module._hf_hook = ModelHook()  # whose detaching does nothing
    remove_hook_from_module(module)


def waiting_rows(order: OrderRows, hook: AlignDevicesHook) -> RowStore:
    """Where accelerate keeps the rows of an order between passes.

    Raises:
        `RuntimeError`: if they are nowhere.
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
        parts = [offloaded_part(dataset, index[prefix + name], prefix + name, order, opened) for name in names]
        return RowOverlay(FileRows(parts))
    except (KeyError, AttributeError) as error:
        raise RuntimeError(
            f"accelerate has offloaded '{prefix}' to a place that is not known ({error}): load the model with "
            "engram_placement='cpu' or 'disk', which keeps its tables out of accelerate's hands."
        ) from error


def offloaded_part(dataset, entry: dict, name: str, order: OrderRows, opened: dict[Path, ShardFile]) -> FilePart:
    """A part in accelerate's offload folder, or in the safetensors file that its index names."""
    if "safetensors_file" in entry:
        path = Path(entry["safetensors_file"])
        if path not in opened:
            opened[path] = ShardFile(path)
        return file_part(opened[path], read_header(path), entry.get("weight_name", name))
    return FilePart(ShardFile(f"{dataset.save_folder}/{name}.dat"), 0, tuple(entry["shape"]), order.dtype)
