"""PEFT adapters and the memory: what is saved with an adapter, and what is loaded with it.

What it chooses: a memory that is trainable, or differs from its checkpoint, is saved into every adapter folder as a
delta. A model has one memory, however many adapters: an adapter that brings another memory than loaded ones is refused.
An adapter's folder without a delta leaves the memory as it is.
Promises: a memory is saved with an adapter or the save raises an error; a delta is in place before the adapter's
settings name it, and is checked before the adapter is loaded. Never needs PEFT to be installed.
Source: docs/peft.md.
"""

import hashlib
import json
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from ..compat_engram import mark_loaded, set_carries_adapters
from ..configuration_engram import EngramFormatError
from ..files_atomic_engram import (
    ADAPTER_NAME,
    DELTA_KEY,
    DELTA_NAME,
    OLD_DELTA_KEY,
    OLD_DELTA_NAME,
    checkpoint_in,
    locked,
    named_delta,
    remove_checkpoint,
)
from ..guard_engram import adapter_file, where_of_adapter
from ..memory_engram import EngramMemory, refuse_copied_code
from ..rows_placement_engram import named_orders
from ..rows_storage_engram import CheckpointTables
from .memory_delta import (
    base_digest,
    blocks_that_differ,
    changed_rows,
    dense_weights,
    is_over,
    load_memory_delta,
    named_parts,
    stored_weights,
    write_delta,
)


logger = logging.get_logger(__name__)

# PEFT's warning about our setting, which processes without this package still see.
UNKNOWN_SETTING = rf"Unexpected keyword arguments \['({DELTA_KEY}|{OLD_DELTA_KEY})'\]"


def load_adapter(original, model: nn.Module, source: str | None, name: str | None, *args, **kwargs):
    """Transformers' `load_adapter`, with the memory that was saved with the adapter.

    Args:
        original (`Callable`): Transformers' method, bound to this model.
        model ([`EngramForCausalLM`]): the model.
        source (`str`, *optional*): the adapter's folder or Hub id.
        name (`str`, *optional*): the adapter's name.

    Raises the errors of `EngramCheckpointMixin.load_adapter`.
    """
    adapter = name or "default"
    delta = None if source is None else find_delta(source, **where_of_adapter(kwargs))
    # In `from_pretrained` tables are not placed yet.
    take_delta(model, adapter, delta, later=kwargs.get("load_config") is not None)
    with quiet_about_deltas():
        info = original(source, name, *args, **kwargs)
    if info.missing_keys and info.unexpected_keys:
        model.delete_adapter(adapter)
        raise other_layers(source, info.missing_keys, info.unexpected_keys)
    return info


def inside(model: nn.Module) -> nn.Module | None:
    """Returns the model with a memory inside of PEFT's objects; None if there is none."""
    for module in model.modules():
        if isinstance(module._modules.get("memory"), EngramMemory):
            return module
    return None


def unwrapped_donor(donor):
    """Removes PEFT's wrapper from a backbone; its adapter layers become adapters of the graft."""
    return donor.get_base_model() if hasattr(donor, "peft_config") and hasattr(donor, "get_base_model") else donor


def take_over_adapters(model: nn.Module) -> None:
    """Makes adapters in a backbone the model's, as after `load_adapter`."""
    settings = model.backbone.__dict__.pop("peft_config", None)
    if settings:
        set_carries_adapters(model.backbone, False)
        for module in model.backbone.modules():
            mark_loaded(module)  # Transformers would initialise adapter layers again
        model.peft_config = settings
        set_carries_adapters(model, True)


@torch.no_grad()
def _memory_travels(model: nn.Module) -> bool:
    """Whether an adapter needs the memory saved with it: it is trainable, or differs from its checkpoint."""
    if model.due_delta is not None:
        raise ValueError(
            f"the memory of '{model.due_delta}' was not loaded (engram_placement='none'), and a save would lose it: "
            "model.place_memory('disk') first."
        )
    if model.memory.placement == "none":
        return False
    parts, dense = named_parts(model), dense_weights(model)
    files = model.checkpoint_tables
    if files is None:  # a new graft: zero rows add nothing, biases do
        biases = [weight for name, weight in dense.items() if name.endswith("bias")]
        tables = [rows for _, order in named_orders(model.memory.tables) for rows in order.tensors()]
        return any(bool(tensor.any()) for tensor in (*tables, *biases))
    if any(tensor.requires_grad for tensor in (*parts.values(), *dense.values())):
        return True
    for name, data in stored_weights(files):
        weight = dense[name]
        stored = torch.frombuffer(bytearray(data), dtype=files.part(name).dtype).view(weight.shape)
        if not torch.equal(stored.to(weight.dtype), weight.to("cpu")):
            return True
    return any(differs(part, files.part(name)) for name, part in parts.items())


@torch.no_grad()
def same_memory(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models that were loaded from the tables of one checkpoint have the same memory now."""
    files = one.checkpoint_tables, other.checkpoint_tables
    if None in files or files[0].name != files[1].name:
        return False
    weights, others = dense_weights(one), dense_weights(other)
    if any(not torch.equal(weight.to("cpu"), others[name].to("cpu", weight.dtype)) for name, weight in weights.items()):
        return False
    others = named_parts(other)
    for name, part in named_parts(one).items():
        changes = changed_rows(part, files[0].part(name)), changed_rows(others[name], files[1].part(name))
        if not all(map(torch.equal, *changes)):
            return False
    return True


def differs(part: torch.Tensor, stored) -> bool:
    """Whether any row of a part differs from its file."""
    if is_over(part, stored):
        return len(changed_rows(part, stored)[0]) > 0
    return next(blocks_that_differ(part, stored), None) is not None


@contextmanager
def memory_beside(model: nn.Module, folders: list[Path]):
    """Saves the memory into adapter folders, if needed, and names it in the settings that the block writes.

    Raises:
        `ValueError`: if there is no checkpoint that a delta could refer to; nothing is written then.
    """
    if not folders:
        yield
        return
    travels = _memory_travels(model)
    if travels and model.checkpoint_tables is None:
        raise ValueError(
            "the memory was trained on a graft that is in no folder, and an adapter's folder holds only what changed "
            "from one. Save the graft before adapters are put into it (model.save_pretrained(folder)); this model can "
            "be kept whole with peft_model.merge_and_unload().save_pretrained(folder)."
        )
    for folder in folders:
        _remove_other_checkpoint(model, folder)
        if not travels:
            (folder / DELTA_NAME).unlink(missing_ok=True)  # of an adapter that was here before
        elif folder is folders[0]:
            write_delta(model, folder / DELTA_NAME)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                shutil.copyfile(folders[0] / DELTA_NAME, folder / f"{DELTA_NAME}.part")
                os.replace(folder / f"{DELTA_NAME}.part", folder / DELTA_NAME)
    yield
    for folder in folders:
        with locked(folder):
            _name_delta(folder / ADAPTER_NAME, model, travels)
            (folder / OLD_DELTA_NAME).unlink(missing_ok=True)


def _remove_other_checkpoint(model: nn.Module, folder: Path) -> None:
    """Removes a checkpoint from an adapter's folder, unless the adapter is for it: it would be loaded as the base."""
    base = model.checkpoint_tables
    if base is not None and base.folder.resolve() == folder.resolve():
        return
    try:
        kind = checkpoint_in(folder)
        if kind is None or (kind == "whole" and base is not None and _is_copy(model, CheckpointTables(folder), base)):
            return
    except (EngramFormatError, FileNotFoundError):
        pass  # of another memory, or damaged
    logger.warning(f"removed an older checkpoint from '{folder}': it is not the one that the adapter is for.")
    remove_checkpoint(folder)


def _is_copy(model: nn.Module, there: CheckpointTables, base: CheckpointTables) -> bool:
    """Whether two checkpoints hold the same memory, as far as a delta's digest shows."""
    none = {name: torch.empty(0, dtype=torch.int64, device="cpu") for name in named_parts(model)}
    return base_digest(model.config, there, none) == base_digest(model.config, base, none)


def _name_delta(path: Path, model: nn.Module, travels: bool) -> None:
    """Records in an adapter's settings whether a memory belongs to it, and the checkpoint if none is named.

    `auto_mapping` records it too, because PEFT drops unknown settings but keeps that: a checkpoint's own copy of the
    code refuses the adapter by it (`refuse_adapters_of_peft`).
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    named = settings.get("auto_mapping") or {}
    if travels:
        settings.pop(OLD_DELTA_KEY, None)
        settings[DELTA_KEY] = DELTA_NAME
        # PEFT needs the other two in every `auto_mapping`, and reads them for adapters without a task.
        own = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        settings["auto_mapping"] = {**own, **named, DELTA_KEY: DELTA_NAME}
        if not settings.get("base_model_name_or_path"):
            settings["base_model_name_or_path"] = model.checkpoint_tables.name
            settings["revision"] = settings.get("revision") or model.checkpoint_tables.revision
    elif (
        named.pop(DELTA_KEY, named.pop(OLD_DELTA_KEY, None)) is None
    ):  # from the settings that the adapter was loaded with
        return
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(draft, path)


def find_delta(source: str | os.PathLike, **where) -> Path | None:
    """Returns the delta that an adapter's settings name, in its folder or repository; None if they name none.

    Raises:
        `FileNotFoundError`: if the delta is missing.
        [`EngramFormatError`]: if the folder has a delta that they do not name.
    """
    settings = adapter_file(source, ADAPTER_NAME, **where)
    if settings is None:
        return None  # PEFT says what is missing
    named, is_local = named_delta(settings), Path(source).is_dir()
    delta = None
    if named or is_local:
        delta = adapter_file(source, DELTA_NAME, **where) or adapter_file(source, OLD_DELTA_NAME, **where)
    if named and delta is None:
        raise FileNotFoundError(
            f"the adapter '{source}' was saved with a memory, and {DELTA_NAME} is not there: copy it again, or take "
            f"'{DELTA_KEY}' out of its {ADAPTER_NAME} to load the adapter without."
        )
    if delta is not None and not named and checkpoint_in(delta.parent) != "delta":
        raise EngramFormatError(
            f"'{delta}' lies beside an adapter whose settings do not name it: the save of one of them was interrupted. "
            f"Save the adapter again, or delete the delta, or add '{DELTA_KEY}': '{DELTA_NAME}' to {ADAPTER_NAME}."
        )
    return delta if named else None


def refuse_deltas(model: nn.Module, source: str | os.PathLike, **where) -> None:
    """Refuses an adapter in a folder that was saved with a memory, for a model that has none.

    Raises:
        `ValueError`: if it was.
        `TypeError`: if it was, and the model's memory is made by its checkpoint's own copy of the code.
    """
    # Only local adapters: others would cost a request for each adapter of every model.
    settings = adapter_file(source, ADAPTER_NAME, **where) if Path(source).is_dir() else None
    known = {} if settings is None else json.loads(settings.read_text(encoding="utf-8"))
    if {DELTA_KEY, OLD_DELTA_KEY} & {*known}:
        refuse_copied_code(model)
        raise ValueError(
            f"the adapter '{source}' was trained together with a memory, which this model has not: load it with "
            f"AutoModelForCausalLM.from_pretrained('{source}'), or onto '{known.get('base_model_name_or_path')}'. To "
            f"use the adapter without its memory, take '{DELTA_KEY}' out of its {ADAPTER_NAME}."
        )


def take_delta(model: nn.Module, adapter: str, delta: Path | None, later: bool = False) -> None:
    """Loads the memory that was saved with an adapter, before the adapter.

    Args:
        model ([`EngramForCausalLM`]): the model.
        adapter (`str`): the adapter's name; an existing one is being restored.
        delta (`Path`, *optional*): from `find_delta`; None leaves the memory as it is.
        later (`bool`, *optional*, defaults to `False`): whether the tables are not placed yet.

    Raises:
        `ValueError`: if other adapters brought another memory.
        [`EngramFormatError`]: if the delta does not fit the model, which is unchanged then.
    """
    if delta is None:
        return
    digest = sha256(delta)
    there = getattr(model, "peft_config", None) or {}
    others = {name: held for name, held in model.adapter_deltas.items() if name in there and name != adapter}
    if adapter not in there and any(held != digest for held in others.values()):
        raise ValueError(
            f"adapter {adapter!r} brings another memory than {', '.join(map(repr, sorted(others)))}, and a model has "
            "one for all its adapters: load it into a model of its own, or delete_adapter the others first."
        )
    if later or model.memory.placement == "none":
        model.due_delta = delta
        if not later:
            logger.warning(f"the memory in '{delta}' waits for place_memory(...): engram_placement='none'.")
    else:
        load_memory_delta(model, delta)
    model.adapter_deltas = {**dict.fromkeys(others, digest), adapter: digest}


def sha256(path: Path) -> str:
    """Returns the digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def other_layers(source, missing, unexpected) -> ValueError:
    """Returns the error for an adapter whose weights do not fit any layer and would silently be ignored."""
    return ValueError(
        f"the adapter '{source}' is for other layers: {len(missing)} weights are not in it (first {min(missing)}), "
        f"{len(unexpected)} of its own have no place (first {min(unexpected)}). It was made for another model, or by a "
        "method that load_adapter of Transformers does not know: PeftModel.from_pretrained(model, ...) knows all."
    )


@contextmanager
def quiet_about_deltas():
    """Suppresses PEFT's warning about the setting that names a delta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNKNOWN_SETTING)
        yield
