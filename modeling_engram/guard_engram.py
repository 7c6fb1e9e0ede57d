"""What a checkpoint's own copy of this code cannot do: it refuses, and says what to install.

What it chooses: the files that travel hold what runs a model. Memory deltas, adapters with a memory and the choice of
what is trained are in `engram_transformers.adapters`, which registers itself here when the package is imported. A copy
of these files in a checkpoint's folder stays without it, even where the package is installed.
Promises: a memory that belongs to an adapter or a delta is loaded with it, or an error is raised; so is a memory that
learns saved with an adapter. Never imports PEFT, never patches another package.
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


# Arguments of `from_pretrained` and `load_adapter` that say where files are.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")

_parts: dict[str, Callable[[], ModuleType]] = {}


def register(**parts: Callable[[], ModuleType]) -> None:
    """Makes parts of the package known that do not travel; the package does it when it is imported."""
    _parts.update(parts)


def registered() -> ModuleType | None:
    """`engram_transformers.adapters`; None in a checkpoint's own copy of this code."""
    return _parts["adapters"]() if _parts else None


def full_package(purpose: str, part: str = "adapters") -> ModuleType:
    """A part of `engram_transformers` that does not travel.

    Args:
        purpose (`str`): what it is needed for, as the subject of the error's first sentence.
        part (`str`, *optional*, defaults to `"adapters"`): its name; imported when it is first asked for.

    Raises:
        `ImportError`: in a checkpoint's own copy of this code.
    """
    if not _parts:
        raise ImportError(
            f"{purpose} needs the package engram-transformers, and this model runs the copy of its code that is in the "
            "checkpoint: `pip install engram-transformers`, `import engram_transformers`, and load the model again "
            "without trust_remote_code."
        )
    return _parts[part]()


def refuse_adapter(source: str | os.PathLike, **where) -> None:
    """Raises ImportError if a memory belongs to the adapter in a folder or a repository."""
    settings = adapter_file(source, ADAPTER_NAME, **where)
    if settings is not None and (named_delta(settings) or delta_file(settings.parent)):
        full_package(f"the adapter '{source}' was saved together with a memory, and loading both")


def refuse_adapters_of_peft(model: nn.Module) -> None:
    """The same for adapters that PEFT has put into a model, while it loads their weights.

    PEFT drops the setting that names the memory, and keeps `auto_mapping`, which therefore names it too.

    Raises:
        `ImportError`: if a memory belongs to one of them.
    """
    if _parts:
        return  # it has looked at the adapter's folder
    for name, settings in (model.__dict__.get("peft_config") or {}).items():
        if {DELTA_KEY, OLD_DELTA_KEY} & {*(getattr(settings, "auto_mapping", None) or {})}:
            full_package(f"the adapter {name!r} was saved together with a memory, and loading both")


def where_of_adapter(kwargs: dict) -> dict:
    """Arguments that say where an adapter's files are, from those of `load_adapter`."""
    loading = kwargs.get("load_config")  # from `from_pretrained`
    return {**(loading.download_kwargs or {} if loading else {}), **(kwargs.get("adapter_kwargs") or {}), **kwargs}


def saving_adapters(model: nn.Module, folders: list[Path]) -> AbstractContextManager:
    """A block in which Transformers saves a model's adapters into folders, so that the memory is saved beside them.

    Raises:
        `ImportError`: in a checkpoint's own copy of this code, if the memory learns.
    """
    if _parts:
        return registered().memory_beside(model, folders)
    if any(parameter.requires_grad for parameter in model.memory.layers.parameters()):
        full_package("the memory learns, and saving it with an adapter")
    return nullcontext()


def adapter_file(source: str | os.PathLike, name: str, **where) -> Path | None:
    """A file of an adapter, downloaded if it is not here; None if there is none."""
    if Path(source).is_dir():
        path = Path(source, where.get("subfolder") or "", name)
        return path if path.is_file() else None
    known = {key: value for key, value in where.items() if key in HUB_ARGUMENTS and value is not None}
    found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **known)
    return None if found is None else Path(found)
