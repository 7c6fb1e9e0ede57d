"""Offload hooks in Accelerate's terms: modules that read rows by integer ids, with their tables left elsewhere.

What it chooses: accelerate's own hooks bring a module's whole table to the device in every forward pass; this one
brings the rows. It is attached to what gathers rows (`OrderRows` of a memory, or any embedding), and to nothing else.
Promises: results, state dict and saved files are those of the module without it; a table behind it is no parameter, so
no `.to`, no device map, no broadcast and no sharding reaches it; detaching undoes attaching. Never keeps rows of an
earlier pass.
Source: accelerate 1.15 `hooks.py`; docs/offload.md.
"""

import functools

import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.utils import logging

from .fetch_engram import RowFetch
from .overlay_engram import RowOverlay
from .rows_engram import FEW_ROWS, HostRows
from .table_engram import BroughtRows, OrderRows


logger = logging.get_logger(__name__)


class EngramRowsHook(ModelHook):
    """Brings the rows that a module is asked for to where they are needed; the table stays where it is.

    Args:
        source ([`HostRows`] or [`FileRows`], *optional*): the rows; the module's own parameters, on the host, if None.
        execution_device (`torch.device` or `str`, *optional*): where rows are needed; where the ids are if None.
        prefetch (`bool`, *optional*, defaults to `True`): let a memory fetch rows before the layers that need them.
        verify (`bool`, *optional*, defaults to `False`): for debugging: read all rows again when they are used.

    On an embedding the rows stand in for the weight while it runs: one thread at a time, and it does not learn. The
    tables of a memory know neither limit.

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
        if parts and self.device_before is None:  # accelerate detaches and attaches again when another hook comes
            self.device_before = next(iter(parts.values())).device
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
            # Torch marks the function that it is given, and a bound method takes no mark.
            module.register_state_dict_post_hook(functools.partial(self.add_to_state_dict)),
            module.register_load_state_dict_pre_hook(self.take_from_state_dict),
        ]
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Gives the module its table back, on the host."""
        for handle in self.handles:
            handle.remove()
        module.__dict__.pop("weight", None)
        if isinstance(module, OrderRows):
            module.source = None
        if not self.give_back:
            return module
        learns = getattr(module, "learns", True)
        for name, part in zip(self.names, self.source.tensors(), strict=True):
            kept = part if isinstance(part, nn.Parameter) else nn.Parameter(part, requires_grad=learns)
            module.register_parameter(name, kept)
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
        if torch.is_grad_enabled() and module.training and self.source.parts[0].requires_grad:
            logger.warning_once(
                f"{type(module).__name__} does not learn while its table is offloaded: detach_memory_offload(model) to "
                "train it, or freeze it."
            )
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
        """Rows with the parts that their gradients go to, if they learn; an overlay keeps them for its optimizer."""
        if torch.is_grad_enabled() and any(part.requires_grad for part in self.source.learning):
            many = brought.places.numel() > FEW_ROWS  # their rows are unique and ascending
            if many and isinstance(self.source, RowOverlay) and brought.values.is_cpu:
                self.source.see(brought.rows, brought.values)
            return BroughtRows(brought.values, brought.places, brought.rows, self.source.learning)
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
    fits = isinstance(module, OrderRows) or (isinstance(module, nn.Embedding) and list(parts) == ["weight"])
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


def held_hooks(module: nn.Module) -> list[ModelHook]:
    """The hooks on a module; accelerate puts sequences into sequences."""

    def flat(hook) -> list[ModelHook]:
        return [inner for held in hook.hooks for inner in flat(held)] if isinstance(hook, SequentialHook) else [hook]

    return flat(module._hf_hook) if "_hf_hook" in module.__dict__ else []


def rows_hook(module: nn.Module) -> EngramRowsHook | None:
    """The hook of ours on a module."""
    return next((hook for hook in held_hooks(module) if isinstance(hook, EngramRowsHook)), None)


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
        model.memory.settle()
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
        hook = rows_hook(module)
        if hook is not None:
            detach_rows_hook(module)
            for name in hook.names if hook.device_before is not None else ():
                module.register_parameter(name, moved(module._parameters[name], hook.device_before))
    return model


def detach_rows_hook(module: nn.Module) -> None:
    """Takes our hook off a module; other hooks stay."""
    ours = rows_hook(module)
    if ours is None:
        return
    others = [hook for hook in held_hooks(module) if hook is not ours]
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
