"""Placement: where the tables of a memory are.

- "device": parameters of the model, like its other weights.
- "cpu": in host memory, mapped from the checkpoint until they are trained; rows are sent to the device.
- "disk": in the checkpoint's own files; rows are read when they are needed.
- "none": nowhere; the model runs as its backbone.
- "auto": the first of "device", "cpu" and "disk" that has room to spare.

Promises: results, state dict and saved files are the same for every placement; a move that would lose trained rows is
refused; nothing is changed before everything needed is available. Never copies a file.
Source: Engram (arXiv 2601.07372), section 2.5; docs/offload.md.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path

import psutil  # accelerate needs it
import torch
from accelerate.utils import get_max_memory
from torch import nn

from .rows_accelerate_engram import EngramRowsHook, attach_rows_hook, detach_rows_hook, rows_hook
from .rows_overlay_engram import RowOverlay
from .rows_storage_engram import CheckpointTables, FileRows, HostRows, RowStore, ShardFile, is_mapped, written_to
from .rows_table_engram import OrderRows


PLACEMENTS = ("auto", "device", "cpu", "disk", "none")

# State-dict prefix of tables.
TABLES_PREFIX = "memory.tables."

# Share that "auto" leaves free for caches, activations and the system.
ROOM_TO_SPARE = 0.2

# Tables that are about to be trained are copied out of their files if they take at most this share of free host memory.
# Others are written in place, where the first write to a row costs a page fault and a whole page.
COPIED_AT_ONCE = 0.25

# Control groups of a container, versions 2 and 1: controller, root, limit, and the use that cannot be reclaimed. The
# system's own figures do not show their limits.
GROUPS = (
    ("", "/sys/fs/cgroup", "memory.max", "anon"),
    ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"),
)


# Device maps that use every accelerator.
ALL_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(placement: str) -> str:
    """Raises ValueError for an unknown placement."""
    if placement not in PLACEMENTS:
        raise ValueError(f"engram_placement={placement!r} must be one of {', '.join(map(repr, PLACEMENTS))}.")
    return placement


def choose_placement(table_bytes: int, other_bytes: int, device_free: int | None, host_free: int) -> str:
    """Resolves "auto" to "device", "cpu" or "disk".

    `other_bytes` are the model's other weights, which go to the device; `device_free` is None if the model runs on the
    CPU.
    """
    room = 1 - ROOM_TO_SPARE
    if device_free is None:
        return "device" if table_bytes + other_bytes <= room * host_free else "disk"
    if table_bytes + other_bytes <= room * device_free:
        return "device"
    return "cpu" if table_bytes <= room * host_free else "disk"


def free_memory(device_map, max_memory: Mapping | None = None) -> tuple[int | None, int]:
    """Returns free bytes of the accelerators that a device map uses, and of the host.

    None for the accelerators if none is used, or if they share the host's memory. Unused accelerators are not queried.
    `device_map` and `max_memory` are as for `from_pretrained`.
    """
    budget = get_max_memory(dict(max_memory)) if max_memory else {}
    host = min(budget.get("cpu", 0) if max_memory else host_memory(), group_limit())
    if isinstance(device_map, str) and device_map in ALL_DEVICES:
        budget = budget or get_max_memory()  # queries every accelerator
        shared = not max_memory and "cpu" not in budget  # accelerate counts shared memory once
        sizes = [] if shared else [size for place, size in budget.items() if place not in ("cpu", "disk", "mps")]
    else:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        used = {place_number(place) for place in places if str(place) not in ("None", "cpu", "disk", "meta")}
        sizes = [budget.get(place, 0) if max_memory else device_memory(place) for place in used]
    sizes = [size for size in sizes if size is not None]
    return (sum(sizes) if sizes else None), host


def host_memory() -> int:
    """Returns free bytes of host memory, without querying an accelerator."""
    return psutil.virtual_memory().available


def device_memory(place: int | str) -> int | None:
    """Returns free bytes of one accelerator, 0 if it does not exist; None if it shares the host's memory.

    The query creates a context, half a gigabyte on a GPU, so it is not made for unused ones.
    """
    try:
        device = torch.device(place)
        accelerator = torch.get_device_module(device)
        if not hasattr(accelerator, "mem_get_info"):  # Apple's
            return None
        properties = getattr(accelerator, "get_device_properties", lambda device: None)(device)
        return None if getattr(properties, "is_integrated", False) else accelerator.mem_get_info(device)[0]
    except (AssertionError, RuntimeError):  # no such device, or torch has no support for it
        return 0


def place_number(place) -> int | str:
    """Returns the key of `get_max_memory` for a device."""
    if isinstance(place, int):
        return place
    device = torch.device(place)
    if device.type in ("mps", "cpu"):
        return device.type
    return device.index or 0


def group_limit() -> float:
    """Returns the bytes that this process's control group and its parents leave free; infinite without a limit."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    free = [float("inf")]
    for controller, root, limit, used in GROUPS:
        # In a container the path may exist only on the host; then the root counts.
        own = next((path for _, names, path in lines if controller in names.split(",")), "/")
        group = Path(root, own.strip("/"))
        for folder in (group, *(above for above in group.parents if above.is_relative_to(root))):
            try:
                allowed = (folder / limit).read_text().strip()
                counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if allowed.isdigit():
                free.append(max(0, int(allowed) - int(counted.get(used, 0))))
    return min(free)


def mapped_place(device_map, name: str):
    """Returns a device map's entry for a module, that of the longest matching name; None without one."""
    if not isinstance(device_map, dict):
        return None
    fitting = [key for key in device_map if key == "" or name == key or name.startswith(f"{key}.")]
    return device_map[max(fitting, key=len)] if fitting else None


def without_tables(device_map):
    """Returns a device map without its entries for tables."""
    if not isinstance(device_map, dict):
        return device_map
    prefix = TABLES_PREFIX.rstrip(".")
    return {name: place for name, place in device_map.items() if not f"{name}.".startswith(f"{prefix}.")}


def named_orders(tables: nn.ModuleDict) -> list[tuple[str, OrderRows]]:
    """Returns all `OrderRows` with their state-dict prefixes."""
    return [
        (f"{TABLES_PREFIX}{layer}.{name}.", order)
        for layer, table in tables.items()
        for name, order in table.named_children()
    ]


def place_tables(
    tables: nn.ModuleDict,
    placement: str,
    checkpoint: CheckpointTables | None,
    devices: Mapping[str, torch.device],
    elsewhere: bool = False,
    **settings,
) -> None:
    """Moves the rows of all tables, with `settings` of [`EngramRowsHook`].

    Args:
        tables (`nn.ModuleDict`): by layer.
        placement (`str`): target, not "auto".
        checkpoint ([`CheckpointTables`], *optional*): files to read from or to map.
        devices (mapping of `str` to `torch.device`): where each layer computes.
        elsewhere (`bool`, *optional*, defaults to `False`): whether rows are now read from other files than these.

    Raises ValueError if rows are in no file, or differ from it; FileNotFoundError or [`EngramFormatError`] if files are
    missing or damaged.
    """
    # Everything that can fail is done before the first change.
    ready, mappings = [], {}
    for prefix, order in named_orders(tables):
        store = _store_at(placement, prefix, order, checkpoint, elsewhere, mappings)
        layer = prefix.removeprefix(TABLES_PREFIX).split(".")[0]
        ready.append((order, store, EngramRowsHook(store, **settings), devices[layer]))
    for order, store, hook, device in ready:
        held = rows_hook(order)
        if held is not None:
            held.gives_back = False
            detach_rows_hook(order)
        if placement == "device" and order.is_resident:
            order.to(device)  # the parts stay the same objects
        else:
            order.place(store, device if placement == "device" else None)
        if placement in ("cpu", "disk"):
            attach_rows_hook(order, hook)


def held_rows(order: OrderRows) -> RowStore | None:
    """Returns the rows of an order, wherever they are; None if they were left out."""
    return HostRows(order.tensors()) if order.is_resident else order.store


def _store_at(
    placement: str,
    prefix: str,
    order: OrderRows,
    checkpoint: CheckpointTables | None,
    elsewhere: bool,
    mappings: dict[ShardFile, mmap.mmap],
) -> RowStore | None:
    """Returns the store of an order's rows at a placement; None for nowhere. Mappings are shared between orders."""
    held = held_rows(order)
    if isinstance(held, HostRows) and any(part.is_meta for part in held.parts):
        raise ValueError(
            f"'{prefix}*' have no storage (meta): load the model first, or make it with hold_tables=False and name the "
            "folder of its tables."
        )
    if placement in ("disk", "none"):
        if held is None and placement == "none":
            return None
        if isinstance(held, RowOverlay) and not elsewhere and (placement == "disk" or not held.changed):
            return held if placement == "disk" else None
        stored = stored_rows(prefix, order, checkpoint)
        # Mappings of these files without a written page need no comparison.
        mapped = isinstance(held, HostRows) and set(stored.files) <= set(held.files)
        if held is not None and not (mapped and not any(map(written_to, held.parts))):
            check_same_rows(prefix, stored, held)
        return RowOverlay(stored) if placement == "disk" else None
    if isinstance(held, HostRows):
        return HostRows([part.to("cpu") for part in held.parts]) if order.is_resident and placement == "cpu" else held
    stored = held or stored_rows(prefix, order, checkpoint)
    return HostRows(stored.tensors(mappings), stored.files)


def stored_rows(prefix: str, order: OrderRows, checkpoint: CheckpointTables | None) -> FileRows:
    """Returns the rows of an order in the files of a checkpoint."""
    if checkpoint is None:
        raise ValueError(
            "this memory was made here and has no files yet: save_pretrained(folder) first, or load it with "
            "from_pretrained."
        )
    parts = [checkpoint.part(f"{prefix}{number}") for number in range(len(order.heights))]
    for number, (part, height) in enumerate(zip(parts, order.heights, strict=True)):
        if part.shape != (height, order.width) or part.dtype != order.dtype:
            raise ValueError(
                f"'{prefix}{number}' is stored as {part.dtype} {list(part.shape)}, the model needs {order.dtype} "
                f"{[height, order.width]}: the files belong to another memory."
            )
    return FileRows(parts)


def reread_tables(tables: nn.ModuleDict, checkpoint: CheckpointTables) -> None:
    """Makes tables on disk read from other files; parts stay the same objects, because optimizers hold them."""
    ready = [(order, RowOverlay(stored_rows(prefix, order, checkpoint))) for prefix, order in named_orders(tables)]
    for order, store in ready:
        order.store = rows_hook(order).store = store
        order.mend_parts()


def own_rows(tables: nn.ModuleDict) -> int:
    """Copies small trainable tables that are mapped from files into anonymous memory; returns the bytes copied."""
    held = [(order, held_rows(order)) for _, order in named_orders(tables) if order.parts[0].requires_grad]
    mapped = [(order, rows) for order, rows in held if isinstance(rows, HostRows) and any(map(is_mapped, rows.parts))]
    copied = sum(order.nbytes for order, _ in mapped)
    if copied > COPIED_AT_ONCE * free_memory(None)[1]:
        return 0
    for order, rows in mapped:
        rows.own()
        if order.is_resident:
            for part, own in zip(order.parts, rows.parts, strict=True):
                part.data = own
    return copied


def check_same_rows(prefix: str, stored: FileRows, held: RowStore) -> None:
    """Raises ValueError if stored rows are not the model's, which then were trained since."""
    for number, (part, kept) in enumerate(zip(stored.tensors(), held.tensors(), strict=True)):
        for first in range(0, len(part), 1 << 16):
            block, own = part[first : first + (1 << 16)], kept.detach()[first : first + (1 << 16)].to("cpu")
            if not torch.equal(block.view(torch.uint8), own.contiguous().view(torch.uint8)):
                raise ValueError(
                    f"'{prefix}{number}' differs from its file, it was trained since: save_pretrained(folder) first, "
                    "and then place it from there."
                )


def placed_bytes(tables: nn.ModuleDict) -> int:
    """Returns the bytes of all tables."""
    return sum(table.nbytes for table in tables.values())
