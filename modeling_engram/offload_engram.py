"""Offload hooks in Accelerate's terms: modules that read rows by integer ids, with their tables left elsewhere.

What it chooses: accelerate's own hooks bring a module's whole table to the device in every forward pass; this one
brings the rows. It is attached to what gathers rows (`OrderRows` of a memory, or any embedding), and to nothing else.
Promises: results, state dict and saved files are those of the module without it; a table behind it is no parameter, so
no `.to`, no device map, no broadcast and no sharding reaches it; detaching undoes attaching. Never keeps rows of an
earlier pass.
Source: accelerate 1.15 `hooks.py`; docs/offload.md.
"""

from pathlib import Path

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from .fetch_engram import RowFetch
from .rows_engram import FilePart, FileRows, HostRows, ShardFile, file_part
from .shards_engram import read_header
from .table_engram import BroughtRows, EngramTable, OrderRows


class EngramRowsHook(ModelHook):
    """Brings the rows that a module is asked for to where they are needed; the table stays where it is.

    Args:
        source ([`HostRows`] or [`FileRows`], *optional*): the rows; the module's own parameters, on the host, if None.
        execution_device (`torch.device` or `str`, *optional*): where rows are needed; where the ids are if None.
        prefetch (`bool`, *optional*, defaults to `True`): let a memory fetch rows before the layers that need them.
        verify (`bool`, *optional*, defaults to `False`): for debugging: read all rows again when they are used.

    Example:

    ```python
    >>> from accelerate.hooks import add_hook_to_module
    >>> from engram_transformers import EngramRowsHook

    >>> embedding = add_hook_to_module(torch.nn.Embedding(1_000_000, 256), EngramRowsHook(execution_device="cuda"))
    ```"""

    def __init__(self, source=None, execution_device=None, prefetch: bool = True, verify: bool = False):
        self.source, self.prefetch, self.verify = source, prefetch, verify
        self.execution_device = None if execution_device is None else torch.device(execution_device)
        self.names: list[str] = []
        self.give_back = True  # whether detaching gives the module its table back
        self.device_before: torch.device | None = None
        self.handles: list = []

    def __repr__(self) -> str:
        placement = None if self.source is None else self.source.kind
        return (
            f"EngramRowsHook(placement={placement!r}, execution_device={self.execution_device}, "
            f"prefetch={self.prefetch}, verify={self.verify})"
        )

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Takes the table out of the module.

        Raises:
            `TypeError`: for a module with other parameters than the parts of a table.
        """
        parts = dict(module.named_parameters(recurse=False))
        if self.source is None:
            self.source = HostRows(check_parts(module, parts))
        self.device_before = next((part.device for part in parts.values()), None)
        if isinstance(module, OrderRows):
            self.names = [str(number) for number in range(len(module.heights))]
        else:
            self.names = list(parts)
        for name in parts:
            del module._parameters[name]
        if isinstance(module, OrderRows):
            module.source = self.source
        else:  # transformers looks at where an embedding's weight is
            module.__dict__["weight"] = torch.empty(parts["weight"].shape, dtype=parts["weight"].dtype, device="meta")
        self.handles = [
            module._register_state_dict_hook(self.add_to_state_dict),
            module.register_load_state_dict_pre_hook(self.take_from_state_dict),
        ]
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Gives the module its table back, where it was before."""
        for handle in self.handles:
            handle.remove()
        module.__dict__.pop("weight", None)
        if isinstance(module, OrderRows):
            module.source = None
        if not self.give_back:
            return module
        device = self.device_before or torch.device("cpu")
        for name, part in zip(self.names, self.source.tensors(), strict=True):
            kept = part if isinstance(part, nn.Parameter) else nn.Parameter(part)
            module.register_parameter(name, kept if kept.device == device else moved(kept, device))
        return module

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, ids: torch.Tensor, *args, fetch: RowFetch | None = None, **kwargs):
        device = self.execution_device or ids.device
        if fetch is None:
            fetch = self.ask(ids, device)
        brought = fetch.result()
        if self.verify:
            self.compare(module, ids, brought)
        if isinstance(module, OrderRows):
            return (ids,), {"brought": self.learning(brought)}
        # As accelerate's own hook does: the weight is there while the module runs.
        module.__dict__["weight"] = brought.values
        module.__dict__["_engram_padding"] = module.padding_idx
        module.padding_idx = None  # counts in the whole table, and matters to gradients alone
        return (brought.places, *args), kwargs

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output):
        if not isinstance(module, OrderRows):
            module.padding_idx = module.__dict__.pop("_engram_padding")
            height = sum(part.shape[0] for part in self.source.parts)
            module.__dict__["weight"] = torch.empty(height, self.source.width, dtype=self.source.dtype, device="meta")
        return output

    def ask(self, ids: torch.Tensor, device: torch.device) -> RowFetch:
        """A fetch of rows that has not begun."""
        return RowFetch(self.source, ids, self.execution_device or device)

    def learning(self, brought: BroughtRows) -> BroughtRows:
        """Rows with the parts that their gradients go to, if they learn."""
        if torch.is_grad_enabled() and self.source.kind == "cpu" and any(p.requires_grad for p in self.source.parts):
            return BroughtRows(brought.values, brought.places, brought.rows, self.source.parts)
        return brought

    def compare(self, module: nn.Module, ids: torch.Tensor, brought: BroughtRows) -> None:
        """Raises RuntimeError at the first row that is not the table's."""
        rows = ids.to("cpu").flatten()
        given = brought.values.detach().to("cpu")[brought.places.to("cpu").flatten()]  # (reads, width)
        right = self.source.read(rows)  # (reads, width)
        # As bytes: a row may hold NaN.
        differs = (given.view(torch.uint8) != right.view(torch.uint8)).any(1) if len(rows) == len(given) else rows >= 0
        if bool(differs.any()):
            first = int(torch.nonzero(differs)[0])
            raise RuntimeError(
                f"row {int(rows[first])} of {type(module).__name__} was fetched as {given[first][:4].tolist()}..., the "
                f"table holds {right[first][:4].tolist()}... ({int(differs.sum())} of {len(rows)} reads differ)."
            )

    def add_to_state_dict(self, module: nn.Module, state_dict: dict, prefix: str, metadata) -> None:
        for name, part in zip(self.names, self.source.tensors(), strict=True):
            state_dict[prefix + name] = part.detach()

    @torch.no_grad()
    def take_from_state_dict(self, module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        for name, part in zip(self.names, self.source.parts, strict=True):
            given = state_dict.pop(prefix + name, None)
            if given is None:
                if strict:
                    missing.append(prefix + name)
            elif self.source.kind == "disk":
                errors.append(f"{prefix + name} is on disk and not written to: model.place_memory('cpu') first.")
            elif given.shape != part.shape:
                errors.append(f"{prefix + name} has shape {tuple(given.shape)}, the table has {tuple(part.shape)}.")
            else:
                part.copy_(given)


class HookedForward:
    """What accelerate puts in place of a hooked module's `forward`, as an object: accelerate's cannot be pickled.

    Args:
        module (`nn.Module`): a module with a hook.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args, **kwargs):
        args, kwargs = self.module._hf_hook.pre_forward(self.module, *args, **kwargs)
        return self.module._hf_hook.post_forward(self.module, self.module._old_forward(*args, **kwargs))


def attach_rows_hook(module: nn.Module, hook: EngramRowsHook) -> None:
    """Puts our hook behind those that a module has."""
    add_hook_to_module(module, hook, append=True)
    if module._hf_hook is hook:
        module.forward = HookedForward(module)


def check_parts(module: nn.Module, parts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A module's own table, on the host.

    Raises:
        `TypeError`: if it has none, or other parameters beside it.
        `ValueError`: if its weights are not there.
    """
    fits = isinstance(module, OrderRows) or (list(parts) == ["weight"] and hasattr(module, "padding_idx"))
    if not parts or not fits or any(part.ndim != 2 for part in parts.values()):
        raise TypeError(
            f"EngramRowsHook goes on a table that is read by integer ids (an embedding), {type(module).__name__} has "
            f"the parameters {list(parts) or 'none'}."
        )
    if any(part.is_meta for part in parts.values()):
        raise ValueError(
            f"{type(module).__name__} has no storage (meta): load it first, or pass source=FileRows(...) to the hook."
        )
    return [moved(part, torch.device("cpu")) for part in parts.values()]


def moved(part: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A parameter on another device; the same object if it is there."""
    if part.device == device and isinstance(part, nn.Parameter):
        return part
    return nn.Parameter(part.detach().to(device), requires_grad=part.requires_grad)


def rows_hook(module: nn.Module) -> EngramRowsHook | None:
    """The hook of ours on a module."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((held for held in hooks if isinstance(held, EngramRowsHook)), None)


def settle_table(table: EngramTable) -> None:
    """Takes a table back from accelerate's hooks, which would bring it to the device as a whole.

    Called at the begin of a forward pass, when all dispatching is done.
    """
    orders = table.orders()
    if all(getattr(module, "_hf_hook", None) is None for module in (table, *orders)):
        return
    elsewhere = False
    for order in orders:
        align = align_hooks(order)
        ours = rows_hook(order)
        if ours is None and any(hook.offload for hook in align):
            source = waiting_rows(order, next(hook for hook in align if hook.offload))
            drop_align_hooks(order)
            for name in list(order._parameters):
                del order._parameters[name]
            attach_rows_hook(order, EngramRowsHook(source))
            ours = rows_hook(order)
        elif ours is not None and align:
            drop_align_hooks(order)
        elsewhere = elsewhere or ours is not None
    if elsewhere and align_hooks(table):  # it would carry the rows' numbers to the device and back
        drop_align_hooks(table)


def align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Accelerate's own hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [held for held in hooks if isinstance(held, AlignDevicesHook)]


def drop_align_hooks(module: nn.Module) -> None:
    """Takes accelerate's own hooks off a module without moving anything; other hooks stay."""
    hook = module._hf_hook
    kept = [held for held in getattr(hook, "hooks", ()) if not isinstance(held, AlignDevicesHook)]
    if kept:
        module._hf_hook = kept[0] if len(kept) == 1 else SequentialHook(*kept)
        return
    module._hf_hook = ModelHook()  # whose detaching does nothing
    remove_hook_from_module(module)


def waiting_rows(order: OrderRows, hook: AlignDevicesHook) -> HostRows | FileRows:
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
        return HostRows([as_parameter(state[prefix + name]) for name in names])
    try:
        return FileRows([offloaded_part(dataset, index[prefix + name], prefix + name, order) for name in names])
    except (KeyError, AttributeError) as error:
        raise RuntimeError(
            f"accelerate has offloaded '{prefix}' to a place that is not known ({error}): load the model with "
            "engram_placement='cpu' or 'disk', which keeps its tables out of accelerate's hands."
        ) from error


def as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    """The tensor as a parameter."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def offloaded_part(dataset, entry: dict, name: str, order: OrderRows) -> FilePart:
    """A part in accelerate's offload folder, or in the safetensors file that its index names."""
    if "safetensors_file" in entry:
        path = Path(entry["safetensors_file"])
        return file_part(ShardFile(path), read_header(path), entry.get("weight_name", name))
    return FilePart(ShardFile(f"{dataset.save_folder}/{name}.dat"), 0, tuple(entry["shape"]), order.dtype)


def attach_memory_offload(
    model: nn.Module,
    placement: str = "cpu",
    *,
    modules: list[str] | None = None,
    execution_device=None,
    prefetch: bool = True,
    verify: bool = False,
) -> nn.Module:
    """Leaves the tables of a model where there is room, and brings rows.

    Args:
        model (`nn.Module`): a model with a memory, or any model with big embeddings.
        placement (`str`, *optional*, defaults to `"cpu"`): `"cpu"`, or `"disk"` for a loaded memory.
        modules (`list[str]`, *optional*):
            Names of embeddings that are read by integer ids, in any model (`"model.embed_tokens_per_layer"`); the
            tables of the model's memory if None.
        execution_device (`torch.device` or `str`, *optional*): where rows are needed; where they are asked for if None.
        prefetch (`bool`, *optional*, defaults to `True`): fetch rows of a memory before the layers that need them.
        verify (`bool`, *optional*, defaults to `False`): for debugging: read all rows again when they are used.

    Returns:
        `nn.Module`: the model, changed in place.

    Raises:
        `ValueError`: if a table is offloaded already, or has no file to be read from.
        `TypeError`: for a model without memory, or a module that is no table.

    Example:

    ```python
    >>> from engram_transformers import attach_memory_offload, detach_memory_offload

    >>> attach_memory_offload(model, "cpu")
    >>> dispatch_model(model, device_map)
    >>> detach_memory_offload(model)
    ```"""
    settings = {"execution_device": execution_device, "prefetch": prefetch, "verify": verify}
    if modules is None:
        check_memory(model)
        if model.memory.placement != "device":
            raise ValueError(
                f"the memory is placed on {model.memory.placement!r} already: detach_memory_offload(model) first, or "
                "model.place_memory(...)."
            )
        model.place_memory(placement, **settings)
        return model
    if placement != "cpu":
        raise ValueError(f"placement {placement!r}: embeddings other than a memory's tables can wait on 'cpu' alone.")
    named = [(name, model.get_submodule(name)) for name in modules]
    for name, module in named:
        if rows_hook(module) is not None:
            raise ValueError(f"'{name}' is offloaded already: detach_memory_offload(model) first.")
        check_parts(module, dict(module.named_parameters(recurse=False)))
    for _, module in named:
        attach_rows_hook(module, EngramRowsHook(**settings))
    return model


def detach_memory_offload(model: nn.Module) -> nn.Module:
    """Undoes `attach_memory_offload`: every table is its module's parameter again, on the device where it was.

    Args:
        model (`nn.Module`): a model with offloaded tables.

    Returns:
        `nn.Module`: the model, changed in place.
    """
    for module in model.modules():
        detach_rows_hook(module)
    if hasattr(model, "memory"):
        model.memory.placement = "device"
    return model


def detach_rows_hook(module: nn.Module) -> None:
    """Takes our hook off a module; other hooks stay."""
    ours = rows_hook(module)
    if ours is None:
        return
    others = [hook for hook in getattr(module._hf_hook, "hooks", ()) if hook is not ours]
    remove_hook_from_module(module)
    for hook in others:
        add_hook_to_module(module, hook, append=True)


def check_memory(model: nn.Module) -> None:
    """Raises TypeError for a model without memory."""
    if not hasattr(model, "memory"):
        raise TypeError(
            f"{type(model).__name__} has no Engram memory: name its big embeddings in modules=[...], or graft a memory "
            "with EngramForCausalLM.from_donor(model, tokenizer)."
        )
