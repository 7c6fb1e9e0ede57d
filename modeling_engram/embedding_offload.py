"""Offloads one big embedding: its weight stays in host memory or on disk, and a forward pass reads rows of it.

For embeddings other than a memory's: Gemma's `embed_tokens_per_layer`, Qwen4's `ngram_embedding`.
Promises: outputs, state dict and saved files are those of the module without it; a gradient that reaches the embedding
raises an error. Never copied into a checkpoint; nothing else of the package imports it.
Source: accelerate 1.15 `hooks.py`; docs/offload.md.
"""

import gc
import inspect
import os
from functools import partial
from pathlib import Path

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from .files_safetensors_engram import DTYPE_NAMES, read_header
from .rows_prefetch_engram import RowFetch
from .rows_storage_engram import FileRows, HostRows, RowStore, ShardFile, file_part


_UNDO = "accelerate.hooks.remove_hook_from_module(module) puts the whole weight back"


def offload_embedding(
    module: nn.Embedding, placement: str = "cpu", checkpoint: str | os.PathLike | None = None
) -> nn.Embedding:
    """Keeps the weight of an embedding in host memory or on disk, and reads the rows that a forward pass needs.

    Args:
        module (`nn.Embedding`): with its weight loaded; a subclass must take ids as its only argument.
        placement (`str`, *optional*, defaults to `"cpu"`): `"cpu"` (host memory) or `"disk"`.
        checkpoint (`str` or `os.PathLike`, *optional*):
            For `"disk"`: a safetensors file with the same weight as one tensor, or a folder of such files. It is found
            by its values, which are read once for that.

    Returns:
        `nn.Embedding`: the module. `accelerate.hooks.remove_hook_from_module(module)` puts the weight back, on the CPU.

    Raises:
        `TypeError`: for a module that is not an embedding with an ordinary weight.
        `ValueError`: if the weight is not loaded, is offloaded already, is tied, or is not in the checkpoint.

    Example:

    ```python
    >>> from engram_transformers.embedding_offload import offload_embedding

    >>> offload_embedding(model.get_submodule("model.language_model.embed_tokens_per_layer"), "cpu")
    >>> model.to("cuda")
    ```"""
    if placement not in ("cpu", "disk") or (placement == "disk") != (checkpoint is not None):
        raise ValueError(f"{placement!r} with checkpoint={checkpoint!r}: give 'cpu' alone, or 'disk' and a checkpoint.")
    _check(module)
    weight = module.weight.detach()
    store = HostRows([weight.to("cpu")]) if placement == "cpu" else _rows_in_files(Path(checkpoint), weight)
    return add_hook_to_module(module, _EmbeddingHook(store), append=True)


class _EmbeddingHook(ModelHook):
    """Runs an embedding on the rows that it reads; its weight holds no rows, only device, dtype and `requires_grad`."""

    def __init__(self, store: RowStore):
        self.store, self.handle = store, None

    def init_hook(self, module: nn.Module) -> nn.Module:
        if self.handle is not None:  # Transformers attaches hooks again after resizing an embedding
            raise RuntimeError(f"the embedding was resized while it was offloaded: before that, {_UNDO}.")
        self.forward_before, module._old_forward = module._old_forward, partial(self.run, module)
        module.weight = nn.Parameter(module.weight.detach().new_empty(0, self.store.width), module.weight.requires_grad)
        # A partial, because torch sets an attribute on the hook, which a bound method does not allow.
        self.handle = module.register_state_dict_post_hook(partial(self.add_to_state_dict))
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.handle = self.handle.remove()
        module._old_forward = self.forward_before
        module.weight = nn.Parameter(self.table(module), module.weight.requires_grad)
        return module

    @torch.compiler.disable
    def run(self, module: nn.Module, *args, **kwargs) -> torch.Tensor:
        """Runs the module's own forward pass with the rows that it reads as its weight."""
        if len(module.weight):
            raise RuntimeError(f"the embedding's weight was replaced while it was offloaded: before that, {_UNDO}.")
        (ids,) = (*args, *kwargs.values())
        brought = RowFetch(self.store, ids.long(), ids.device).result()
        rows = brought.values.to(module.weight.dtype)  # (unique, width)
        if torch.is_grad_enabled() and module.weight.requires_grad:
            rows.requires_grad_().register_hook(_refuse_gradient)
        # Another module with the same attributes, because threads may share this one. `padding_idx` indexes the whole
        # table, and matters only to gradients.
        reader = type(module).__new__(type(module))
        vars(reader).update(vars(module), _parameters={"weight": rows}, padding_idx=None)
        return self.forward_before.__func__(reader, brought.places)

    def table(self, module: nn.Module) -> torch.Tensor:
        """Returns the whole weight on the CPU, `(rows, width)`, in the module's present dtype."""
        return self.store.tensors()[0].to(module.weight.dtype)

    def add_to_state_dict(self, module: nn.Module, state_dict: dict, prefix: str, metadata) -> None:
        state_dict[prefix + "weight"] = self.table(module)


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise RuntimeError(f"an offloaded embedding does not learn: freeze it (requires_grad_(False)), or {_UNDO}.")


def _check(module: nn.Module) -> None:
    """Raises an error unless a module's weight can be offloaded."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or type(weight) is not nn.Parameter or module.max_norm is not None:
        raise TypeError(
            f"{kind} (weight: {type(weight).__name__}) is not an nn.Embedding with an ordinary, whole weight and no "
            "max_norm: pass the embedding itself, before it is sharded or quantised."
        )
    if weight.is_meta:
        raise ValueError("the weight is not loaded (meta): load it, and keep it out of what accelerate offloads.")
    if weight.shape != (module.num_embeddings, module.embedding_dim):
        raise ValueError(f"the weight has the shape {tuple(weight.shape)}: it is offloaded already; {_UNDO}.")
    forward = getattr(module, "_old_forward", module.forward)
    if not hasattr(forward, "__func__") or len(inspect.signature(forward).parameters) != 1:
        raise TypeError(f"{kind}.forward must take ids and nothing else: offload an embedding that only reads rows.")
    for other in gc.get_objects():  # a module does not know which others share its weight
        held = vars(other).get("_parameters", {}) if issubclass(type(other), nn.Module) and other is not module else {}
        if any(parameter is weight for parameter in held.values()):
            raise ValueError(f"the weight is tied to a {type(other).__name__}, which needs it whole: leave it.")


def _rows_in_files(checkpoint: Path, weight: torch.Tensor) -> FileRows:
    """Returns the rows of a tensor in a file, or in the files of a folder, that equals the weight bit for bit."""
    paths = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    for path in paths:
        header = read_header(path)
        for name, entry in header.items():
            if (entry.shape, entry.dtype) == (tuple(weight.shape), DTYPE_NAMES.get(weight.dtype)):
                store = FileRows([file_part(ShardFile(path), header, name)])
                if all(_same(store, weight, rows) for rows in torch.arange(len(weight), device="cpu").split(4096)):
                    return store
    raise ValueError(
        f"no tensor of {[str(path) for path in paths]} is the weight ({weight.dtype}, {tuple(weight.shape)}): load the "
        "model with dtype='auto'. If its files hold the weight in pieces, save it whole (safetensors.torch.save_file)."
    )


def _same(store: FileRows, weight: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether contiguous rows are equal in a file and in a weight, as bytes, because a row may hold NaN."""
    held = weight[rows[0] : rows[-1] + 1].to("cpu").contiguous()  # (rows, width)
    return torch.equal(store.read(rows).view(torch.uint8), held.view(torch.uint8))
