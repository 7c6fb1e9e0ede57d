"""Placement: where the tables of a memory are, in one word.

- "device": parameters of the model, like its other weights.
- "cpu": in host memory, mapped from the checkpoint until they are trained; rows travel to where they are needed.
- "disk": in the checkpoint's own files; rows are read when they are needed.
- "none": nowhere; the model runs as its donor.
- "auto": the first of "device", "cpu" and "disk" that has room to spare.

Promises: results, state dict and saved files are the same in every place; a move that would lose trained rows is
refused; nothing is changed before everything that is needed is there. Never copies a file.
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

# What "auto" leaves free: caches of a generation, activations, the system.
ROOM_TO_SPARE = 0.2

# Tables that are about to be trained are copied out of their files if they take at most this share of free host memory.
# Others are written in place, where each row that is first touched costs a page of 4096 bytes and about 8 microseconds.
COPIED_AT_ONCE = 0.25

# Controller, root, limit and what counts against it for good (pages of files are given back) of the control groups that
# a container runs in, whose limits the system's own figures do not show: version 2, version 1.
GROUPS = (
    ("", "/sys/fs/cgroup", "memory.max", "anon"),
    ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"),
)


# Words of a device map that mean every accelerator there is.
ALL_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(placement: str) -> str:
    """Raises ValueError for a word that is no placement."""
    if placement not in PLACEMENTS:
        raise ValueError(f"engram_placement={placement!r} must be one of {', '.join(map(repr, PLACEMENTS))}.")
    return placement


def choose_placement(table_bytes: int, other_bytes: int, device_free: int | None, host_free: int) -> str:
    """What "auto" means on a machine.

    Args:
        table_bytes (`int`): size of all tables.
        other_bytes (`int`): size of the model's other weights, which go to the device.
        device_free (`int`, *optional*): free bytes of the accelerators; None if the model runs on the CPU.
        host_free (`int`): free bytes of host memory.

    Returns:
        `str`: "device", "cpu" or "disk".
    """
    room = 1 - ROOM_TO_SPARE
    if device_free is None:
        return "device" if table_bytes + other_bytes <= room * host_free else "disk"
    if table_bytes + other_bytes <= room * device_free:
        return "device"
    return "cpu" if table_bytes <= room * host_free else "disk"


def free_memory(device_map, max_memory: Mapping | None = None) -> tuple[int | None, int]:
    """Free bytes of the accelerators that a device map may use, and of the host.

    None for the accelerators if it uses none, or if they share the host's memory (Apple's, NVIDIA's integrated ones):
    what is free of it is one number. Accelerators that the map does not use are not asked.

    Args:
        device_map (`str`, `int`, `torch.device`, `dict`, *optional*): as for `from_pretrained`.
        max_memory (mapping, *optional*): as for `from_pretrained`.
    """
    budget = get_max_memory(dict(max_memory)) if max_memory else {}
    host = min(budget.get("cpu", 0) if max_memory else host_memory(), group_limit())
    if isinstance(device_map, str) and device_map in ALL_DEVICES:
        budget = budget or get_max_memory()  # it asks every accelerator, as whoever loads the model to all of them does
        shared = not max_memory and "cpu" not in budget  # accelerate counts memory that two places share once
        sizes = [] if shared else [size for place, size in budget.items() if place not in ("cpu", "disk", "mps")]
    else:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        used = {place_number(place) for place in places if str(place) not in ("None", "cpu", "disk", "meta")}
        sizes = [budget.get(place, 0) if max_memory else device_memory(place) for place in used]
    sizes = [size for size in sizes if size is not None]
    return (sum(sizes) if sizes else None), host


def host_memory() -> int:
    """Free bytes of host memory, without a look at any accelerator."""
    return psutil.virtual_memory().available


def device_memory(place: int | str) -> int | None:
    """Free bytes of one accelerator, 0 if it is not there; None if it shares the host's memory.

    To ask makes a context on the accelerator, half a gigabyte on a GPU: the others are left alone.
    """
    try:
        device = torch.device(place)
        accelerator = torch.get_device_module(device)
        if not hasattr(accelerator, "mem_get_info"):  # Apple's
            return None
        properties = getattr(accelerator, "get_device_properties", lambda device: None)(device)
        return None if getattr(properties, "is_integrated", False) else accelerator.mem_get_info(device)[0]
    except (AssertionError, RuntimeError):  # no such device, or torch was built without it
        return 0


def place_number(place) -> int | str:
    """The key of `get_max_memory` for a device."""
    if isinstance(place, int):
        return place
    device = torch.device(place)
    if device.type in ("mps", "cpu"):
        return device.type
    return device.index or 0


def group_limit() -> float:
    """Bytes that this process' control group, and those above it, leave beside what they use; infinite without one."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    free = [float("inf")]
    for controller, root, limit, used in GROUPS:
        # In a container the path may be one that only the host sees: then there is no such folder, and the root counts.
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
    """Where a hand-written device map puts a module: the entry of the longest name; None if it has none."""
    if not isinstance(device_map, dict):
        return None
    fitting = [key for key in device_map if key == "" or name == key or name.startswith(f"{key}.")]
    return device_map[max(fitting, key=len)] if fitting else None


def without_tables(device_map):
    """A hand-written device map without its entries for tables, which are not there to be placed."""
    if not isinstance(device_map, dict):
        return device_map
    prefix = TABLES_PREFIX.rstrip(".")
    return {name: place for name, place in device_map.items() if not f"{name}.".startswith(f"{prefix}.")}


def named_orders(tables: nn.ModuleDict) -> list[tuple[str, OrderRows]]:
    """What holds rows, with its state-dict prefix."""
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
    """Moves the rows of all tables.

    Args:
        tables (`nn.ModuleDict`): by layer.
        placement (`str`): where to, not "auto".
        checkpoint ([`CheckpointTables`], *optional*): files to read from or to map.
        devices (mapping of `str` to `torch.device`): where each layer computes.
        elsewhere (`bool`, *optional*, defaults to `False`): whether these are other files than rows are read from now.
        settings: of [`EngramRowsHook`].

    Raises:
        `ValueError`: if rows have no file to be read from, or differ from it.
        `FileNotFoundError` or [`EngramFormatError`]: if files are missing or damaged.
    """
    # Everything that can fail comes before the first change.
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
    """The rows of an order, wherever they are; None if they were left out."""
    return HostRows(order.tensors()) if order.is_resident else order.store


def _store_at(
    placement: str,
    prefix: str,
    order: OrderRows,
    checkpoint: CheckpointTables | None,
    elsewhere: bool,
    mappings: dict[ShardFile, mmap.mmap],
) -> RowStore | None:
    """The rows of an order as they are to be kept; None for nowhere. Mappings are shared with other orders."""
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
        # Nothing to compare if it is these very files that are mapped, and no page of them was written to.
        mapped = isinstance(held, HostRows) and set(stored.files) <= set(held.files)
        if held is not None and not (mapped and not any(map(written_to, held.parts))):
            check_same_rows(prefix, stored, held)
        return RowOverlay(stored) if placement == "disk" else None
    if isinstance(held, HostRows):
        return HostRows([part.to("cpu") for part in held.parts]) if order.is_resident and placement == "cpu" else held
    stored = held or stored_rows(prefix, order, checkpoint)
    return HostRows(stored.tensors(mappings), stored.files)


def stored_rows(prefix: str, order: OrderRows, checkpoint: CheckpointTables | None) -> FileRows:
    """The rows of an order in the files of a checkpoint."""
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
    """Lets tables on disk be read from other files; parts stay the same objects, for an optimizer that holds them."""
    ready = [(order, RowOverlay(stored_rows(prefix, order, checkpoint))) for prefix, order in named_orders(tables)]
    for order, store in ready:
        order.store = rows_hook(order).store = store
        order.mend_parts()


def own_rows(tables: nn.ModuleDict) -> int:
    """Copies small tables that are mapped from their files, and learn, into memory of their own.

    Args:
        tables (`nn.ModuleDict`): by layer.

    Returns:
        `int`: how many bytes were copied; 0 for tables that stay where they are.
    """
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
    """Raises ValueError if stored rows are not what the model holds: those were trained since."""
    for number, (part, kept) in enumerate(zip(stored.tensors(), held.tensors(), strict=True)):
        for first in range(0, len(part), 1 << 16):
            block, own = part[first : first + (1 << 16)], kept.detach()[first : first + (1 << 16)].to("cpu")
            if not torch.equal(block.view(torch.uint8), own.contiguous().view(torch.uint8)):
                raise ValueError(
                    f"'{prefix}{number}' differs from its file, it was trained since: save_pretrained(folder) first, "
                    "and then place it from there."
                )


def placed_bytes(tables: nn.ModuleDict) -> int:
    """Bytes of all tables."""
    return sum(table.nbytes for table in tables.values())
