"""Refusals of a checkpoint's own copy of this code: it says what to install for what it cannot do.

What it chooses: the files copied into a checkpoint hold what runs a model. Memory deltas, adapters with a memory and
`set_trainable` are in `engram_transformers.adapters`, registered here when the package is imported. A checkpoint's copy
works without them, even where the package is installed.
Promises: a memory that belongs to an adapter or a delta is loaded with it, or an error is raised; so is a trainable
memory saved with an adapter. Never imports PEFT, never patches another package.
Source: docs/design.md, "What travels".
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

from torch import nn
from transformers.utils import cached_file

from .files_atomic_engram import ADAPTER_NAME, DELTA_KEY, OLD_DELTA_KEY, delta_file, named_delta


# Arguments of `from_pretrained` and `load_adapter` that locate files.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")

_parts: dict[str, Callable[[], ModuleType]] = {}


def register(**parts: Callable[[], ModuleType]) -> None:
    """Registers parts of the package that are not copied; called when the package is imported."""
    _parts.update(parts)


def registered() -> ModuleType | None:
    """Returns `engram_transformers.adapters`; None in a checkpoint's own copy of this code."""
    return _parts["adapters"]() if _parts else None


def full_package(purpose: str, part: str = "adapters") -> ModuleType:
    """Imports a part of `engram_transformers` that is not copied into a checkpoint.

    Raises:
        `ImportError`: in a checkpoint's own copy of this code; `purpose` is the subject of its first sentence.
    """
    if not _parts:
        raise ImportError(
            f"{purpose} needs the package engram-transformers, and this model runs the copy of its code that is in the "
            "checkpoint: `pip install engram-transformers`, `import engram_transformers`, and load the model again "
            "without trust_remote_code."
        )
    return _parts[part]()


def refuse_adapter(source: str | os.PathLike, **where) -> None:
    """Raises ImportError if a memory belongs to the adapter in a folder or repository."""
    settings = adapter_file(source, ADAPTER_NAME, **where)
    if settings is not None and (named_delta(settings) or delta_file(settings.parent)):
        full_package(f"the adapter '{source}' was saved together with a memory, and loading both")


def refuse_adapters_of_peft(model: nn.Module) -> None:
    """Raises ImportError if a memory belongs to an adapter whose weights PEFT is loading.

    PEFT drops our setting that names the memory but keeps `auto_mapping`, so that names the memory too.
    """
    if _parts:
        return  # the package checks the adapter's folder
    for name, settings in (model.__dict__.get("peft_config") or {}).items():
        if {DELTA_KEY, OLD_DELTA_KEY} & {*(getattr(settings, "auto_mapping", None) or {})}:
            full_package(f"the adapter {name!r} was saved together with a memory, and loading both")


def where_of_adapter(kwargs: dict) -> dict:
    """Returns the arguments that locate an adapter's files, from those of `load_adapter`."""
    loading = kwargs.get("load_config")  # from `from_pretrained`
    return {**(loading.download_kwargs or {} if loading else {}), **(kwargs.get("adapter_kwargs") or {}), **kwargs}


def saving_adapters(model: nn.Module, folders: list[Path]) -> AbstractContextManager:
    """Returns a context in which adapters that Transformers saves into folders get their memory saved with them.

    Raises:
        `ImportError`: in a checkpoint's own copy of this code, if the memory is trainable.
    """
    if _parts:
        return registered().memory_beside(model, folders)
    if any(parameter.requires_grad for parameter in model.memory.layers.parameters()):
        full_package("the memory learns, and saving it with an adapter")
    return nullcontext()


def adapter_file(source: str | os.PathLike, name: str, **where) -> Path | None:
    """Returns a file of an adapter, downloaded if needed; None if it does not exist."""
    if Path(source).is_dir():
        path = Path(source, where.get("subfolder") or "", name)
        return path if path.is_file() else None
    known = {key: value for key, value in where.items() if key in HUB_ARGUMENTS and value is not None}
    found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **known)
    return None if found is None else Path(found)
