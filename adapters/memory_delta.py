"""Memory deltas: what training changed in a memory, in one file separate from the checkpoint.

What it chooses: a delta names its base (a folder, or a Hub id and its commit) and holds the rows that differ from it
and the memory's dense weights, as values and not as differences, so that base and delta give the trained memory bit for
bit. The base's digest covers hash constants, token map, dense weights and a sample of rows of every part, because
reading a large table would cost more than the training.
Promises: a delta is checked completely, against file, model and base, before anything is changed; it is written under
another name and then renamed. Never unpickles, never writes into the base.
Source: docs/training.md, docs/format.md.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..compat_engram import transformers_version
from ..configuration_engram import EngramFormatError
from ..files_atomic_engram import ADAPTER_NAME, DELTA_NAME, INDEX_NAME, delta_file, flush, locked, whole_save
from ..files_checkpoint_engram import DIGESTS, auto_map
from ..files_safetensors_engram import DTYPE_NAMES, read_header
from ..rows_overlay_engram import ChangedRows
from ..rows_storage_engram import CheckpointTables, FilePart, FileRows
from ..rows_table_engram import TablePart
from .trainable import apply_trainable


KIND = "engram-memory-delta"
OLD_KIND = "engram-memory-pack"  # before 0.1; still read
VERSION = "1"

# State-dict prefix of the memory's dense weights.
LAYERS_PREFIX = "memory.layers."

# Rows of every part that the base's digest samples, besides those that a delta changes. A memory in which 1 of 300
# other rows differs passes for the base once in 30 with one part, and once in 800,000 with four.
SAMPLED_ROWS = 1024

# Rows compared at once.
BLOCK = 1 << 16


@dataclass(frozen=True)
class DeltaHeader:
    """Header of a delta.

    Args:
        base (`str`): folder or Hub id of the checkpoint that it changes.
        revision (`str`, *optional*): the commit of a base on the Hub; None for a folder, and in older deltas.
        subfolder (`str`): subfolder of a base on the Hub.
        base_sha256 (`str`): digest of the base's memory, see `base_digest`.
        digests (`dict[str, str]`): of hash constants and token map, as in `config.json`.
        provenance (`dict`): versions, and what the caller gave.
        rows (`dict[str, int]`): changed rows of each part.
    """

    base: str
    revision: str | None
    subfolder: str
    base_sha256: str
    digests: dict[str, str]
    provenance: dict
    rows: dict[str, int]

    @property
    def base_name(self) -> str:
        """The base as errors name it."""
        return _named_base(self.base, self.revision)


def _named_base(base: str, revision: str | None) -> str:
    """Returns a checkpoint as errors name it."""
    return repr(base) if revision is None else f"{base!r} (revision {revision})"


def save_memory_delta(model, path: str | os.PathLike, base: str | os.PathLike | None = None, **provenance) -> Path:
    """Implements `model.save_memory_delta`."""
    path = _delta_path(path)
    if path.name == DELTA_NAME and (path.parent / INDEX_NAME).exists() and not (path.parent / ADAPTER_NAME).exists():
        raise ValueError(
            f"'{path.parent}' holds a whole checkpoint, and loading would not know which of both is meant: name "
            "another folder or file for the delta, or save the model whole (model.save_pretrained(folder))."
        )
    return write_delta(model, path, base, **provenance)


def write_delta(model, path: Path, base: str | os.PathLike | None = None, **provenance) -> Path:
    """Writes a delta's file; see `save_memory_delta`."""
    _check_loaded(model)
    files, name = _base_of(model, base)
    parts = named_parts(model)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in dense_weights(model).items()}
    changed = {}
    for part_name, part in parts.items():
        rows, values = changed_rows(part, files.part(part_name))
        changed[part_name] = rows
        if len(rows):
            tensors[f"{part_name}.rows"], tensors[f"{part_name}.values"] = rows, values.contiguous()
    metadata = {
        "format": "pt",
        "kind": KIND,
        "version": VERSION,
        "base": name,
        **({} if files.revision is None else {"base_revision": files.revision, "base_subfolder": files.subfolder}),
        "base_sha256": base_digest(model.config, files, changed),
        "digests": json.dumps({field: getattr(model.config, field) for field in DIGESTS}),
        "provenance": json.dumps({"transformers": transformers_version, "torch": torch.__version__, **provenance}),
        "rows": json.dumps({name: len(rows) for name, rows in changed.items() if len(rows)}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):  # so that drafts found there are abandoned ones
        for stale in path.parent.glob(f".part-*-{path.name}"):
            stale.unlink()  # left by a killed process
        draft = path.with_name(f".part-{os.getpid()}-{path.name}")
        try:
            save_file(tensors, draft, metadata)
            flush(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    return path


def load_memory_delta(model, path: str | os.PathLike, base: str | os.PathLike | None = None):
    """Implements `model.load_memory_delta`."""
    _check_loaded(model)
    path = _delta_path(path)
    path = delta_file(path.parent) or path if path.name == DELTA_NAME else path
    header = read_delta_header(path)
    for field in DIGESTS:
        if header.digests.get(field) != getattr(model.config, field):
            raise EngramFormatError(
                f"'{path}' is of another memory: its {field} is {str(header.digests.get(field))[:16]}..., the model's "
                f"{str(getattr(model.config, field))[:16]}.... Load the checkpoint that it was made from: "
                f"{header.base_name}."
            )
    parts = named_parts(model)
    dense = dense_weights(model)
    tensors = _checked_tensors(path, parts, dense)
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    files = _matching_base(model, base, header, {name: tensors.get(f"{name}.rows", none) for name in parts})
    # Everything that can fail is done before the first change.
    changes = []
    for name, part in parts.items():
        rows, values = tensors.get(f"{name}.rows"), tensors.get(f"{name}.values")
        changes.append((part, undone(part, files.part(name)), rows, values))
    with torch.no_grad():
        for part, before, rows, values in changes:
            if isinstance(before, tuple):
                part.write(*before)
            elif isinstance(part.store, ChangedRows):
                part.store.clear()
            if rows is not None:
                part.write(rows.to(part.device), values.to(part.device))
        for name, weight in dense.items():
            weight.copy_(tensors[name])
    return model


def save_changes(model, folder: str | os.PathLike) -> None:
    """Saves a memory delta and a configuration that names it: `from_pretrained(folder)` loads the delta and its base.

    Args:
        model ([`EngramForCausalLM`]): the model, wherever its tables are.
        folder (`str` or `os.PathLike`): an older checkpoint in it is replaced.

    Raises:
        `ValueError`: if the folder is that of the base, which the delta needs, or as for `save_memory_delta`.
    """
    folder = Path(folder)
    files, _ = _base_of(model, None)
    if files.folder.resolve() == folder.resolve():
        raise ValueError(
            f"'{folder}' holds the checkpoint that a delta would name as its base: name another folder, or save the "
            "model whole (model.save_pretrained(folder))."
        )
    config = copy.deepcopy(model.config)
    config.engram_memory_delta = DELTA_NAME
    with whole_save(folder) as draft:
        save_memory_delta(model, draft)
        # The configuration's copy comes second: it replaces the re-export of the same name.
        custom_object_save(model, draft, config=config)
        config.auto_map = auto_map(config)
        config.save_pretrained(draft)


def from_delta(cls, delta: Path, *model_args, **kwargs):
    """Loads the base of a delta, with the delta's memory and the `engram_trainable` of the configuration in its folder.

    Raises:
        `FileNotFoundError`: if the base is missing.
    """
    header = read_delta_header(delta)
    if header.revision is None and os.path.isabs(header.base) and not os.path.isdir(header.base):
        raise FileNotFoundError(
            f"'{delta.parent}' holds what training changed in '{header.base}', which is not there: put it back or load "
            f"the checkpoint from where it is and call load_memory_delta(model, '{delta}', base=...)."
        )
    for name in ("subfolder", "revision"):  # of the delta's repository
        kwargs.pop(name, None)
    if header.revision is not None:
        kwargs |= {"revision": header.revision, "subfolder": header.subfolder}
    if isinstance(kwargs.get("config"), PreTrainedConfig):
        kwargs["config"] = copy.deepcopy(kwargs["config"])
        kwargs["config"].engram_memory_delta = None
    found = cls.from_pretrained(header.base, *model_args, **kwargs)
    model = found[0] if isinstance(found, tuple) else found
    if model.memory.placement == "none":
        return found
    load_memory_delta(model, delta)
    word = cls.config_class.from_pretrained(delta.parent).engram_trainable
    if word is not None:
        apply_trainable(model, word, adapters_must_be_there=False)
        model.config.engram_trainable = word
    return found


def _delta_path(path: str | os.PathLike) -> Path:
    """Returns a delta's file; in a folder it has its usual name."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / DELTA_NAME


def read_delta_header(path: str | os.PathLike) -> DeltaHeader:
    """Reads and checks the header of a delta.

    Raises:
        `FileNotFoundError`: if it is missing.
        [`EngramFormatError`]: if it is not a delta, truncated, or of a later version.
    """
    path = _delta_path(path)
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise EngramFormatError(f"'{path}' cannot be read ({error}): copy it again.") from error
    if metadata.get("kind") not in (KIND, OLD_KIND) or metadata.get("version") != VERSION:
        raise EngramFormatError(
            f"'{path}' is not a memory delta of version {VERSION} (kind {metadata.get('kind')!r}, version "
            f"{metadata.get('version')!r}): name a file that save_memory_delta wrote, or upgrade this package."
        )
    try:
        held = {name: json.loads(metadata[name]) for name in ("digests", "provenance", "rows")}
        where = {"revision": metadata.get("base_revision"), "subfolder": metadata.get("base_subfolder", "")}
        return DeltaHeader(metadata["base"], base_sha256=metadata["base_sha256"], **where, **held)
    except (KeyError, ValueError) as error:
        raise EngramFormatError(f"'{path}' has a damaged header ({error!r}): copy it again.") from error


def _check_loaded(model) -> None:
    """Raises an error for a model without loaded tables."""
    if not hasattr(model, "memory"):
        raise TypeError(f"{type(model).__name__} has no memory: a delta is of an EngramForCausalLM.")
    if model.memory.placement == "none":
        raise ValueError("the memory was not loaded (engram_placement='none'): model.place_memory('disk') first.")


def named_parts(model) -> dict[str, TablePart]:
    """Returns the parts of all tables by their state-dict names."""
    model.memory.take_back_tables()
    return dict(sorted(model.memory.named_parts().items()))


def dense_weights(model) -> dict[str, torch.Tensor]:
    """Returns the memory's weights other than tables by their state-dict names."""
    # PEFT renames the weight of a projection that has an adapter.
    return {
        f"{LAYERS_PREFIX}{name.replace('.base_layer.', '.')}": weight
        for name, weight in model.memory.layers.named_parameters()
        if ".lora_" not in name
    }


def _base_of(model, base: str | os.PathLike | None) -> tuple[CheckpointTables, str]:
    """Returns the files that a memory came from, and their name."""
    if base is not None:
        return model.tables_of(Path(base)), os.path.abspath(base)
    files = model.checkpoint_tables
    if files is None:
        raise ValueError(
            "this memory came from no checkpoint, and a delta holds what differs from one: name it (base=...), or keep "
            "the model whole (model.save_pretrained(folder))."
        )
    return files, files.name


def base_digest(config, files: CheckpointTables, changed: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a stored memory: constants, token map, dense weights, sampled rows, and the rows of a delta."""
    digest = hashlib.sha256(json.dumps([getattr(config, field) for field in DIGESTS]).encode())
    for name, data in stored_weights(files):
        digest.update(name.encode() + data)
    for name, rows in changed.items():
        part = files.part(name)
        sampled = torch.linspace(0, part.shape[0] - 1, SAMPLED_ROWS, dtype=torch.float64, device="cpu").long()
        rows = torch.cat([sampled, rows]).unique()  # (sampled or changed,), ascending
        digest.update(f"{name} {part.shape} {part.dtype}".encode())
        digest.update(FileRows([part]).read(rows).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_weights(files: CheckpointTables) -> Iterator[tuple[str, bytes]]:
    """Yields names and bytes of the memory's dense weights in a checkpoint's files."""
    for name in sorted(name for name in files.weight_map if name.startswith(LAYERS_PREFIX)):
        part = files.part(name)
        buffer = bytearray(torch.Size(part.shape).numel() * part.dtype.itemsize)
        part.file.read(memoryview(buffer), part.offset)
        yield name, bytes(buffer)


def _matching_base(model, base, header: DeltaHeader, changed: dict[str, torch.Tensor]) -> CheckpointTables:
    """Returns the files of the base of a delta that changes these rows.

    Raises:
        `FileNotFoundError`: if there is none.
        [`EngramFormatError`]: if the digest differs.
    """
    tried = []
    if base is not None or model.checkpoint_tables is not None:
        files, name = _base_of(model, base)
        if base_digest(model.config, files, changed) == header.base_sha256:
            return files
        tried.append(_named_base(name, files.revision))
    if base is None and header.revision is None and Path(header.base, "config.json").is_file():
        files = model.tables_of(Path(header.base))
        if base_digest(model.config, files, changed) == header.base_sha256:
            return files
        tried.append(repr(header.base))
    if not tried:
        raise FileNotFoundError(
            f"the delta changes the memory of {header.base_name}, which is not here: name the folder (base=...)."
        )
    raise EngramFormatError(
        f"the delta changes the memory of {header.base_name} (digest {header.base_sha256[:16]}...); "
        f"{' and '.join(tried)} has other rows or weights. Load the delta's base"
        f"{f' (revision={header.revision!r})' if header.revision else ''}, or name it (base=...)."
    )


def _checked_tensors(path: Path, parts: dict, dense: dict) -> dict[str, torch.Tensor]:
    """Reads a delta's tensors, after checking them against the model by the file's header.

    Raises:
        [`EngramFormatError`]: naming what does not fit.
    """
    entries = read_header(path)
    expected = {name: (DTYPE_NAMES[weight.dtype], tuple(weight.shape)) for name, weight in dense.items()}
    for name, part in parts.items():
        if f"{name}.rows" in entries or f"{name}.values" in entries:
            count = entries[f"{name}.rows"].shape[0] if f"{name}.rows" in entries else None
            expected[f"{name}.rows"] = ("I64", (count,))
            expected[f"{name}.values"] = (DTYPE_NAMES[part.dtype], (count, part.table_shape[1]))
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    for name in sorted({*found, *expected}):
        wanted, is_there = expected.get(name), found.get(name)
        dense_in_another_type = name in dense and is_there is not None and is_there[1] == wanted[1]
        if wanted != is_there and not dense_in_another_type:
            raise EngramFormatError(
                f"'{path}' holds '{name}' as {is_there or 'nothing'}, the model needs {wanted or 'no such tensor'}: "
                "the delta belongs to a memory of other sizes, or is damaged."
            )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in found}
    for name, part in parts.items():
        rows = tensors.get(f"{name}.rows")
        if rows is None or not len(rows):
            continue
        if int(rows[0]) < 0 or int(rows[-1]) >= part.table_shape[0] or bool((rows.diff() <= 0).any()):
            raise EngramFormatError(
                f"'{path}' names rows of '{name}' that are not ascending and unique within {part.table_shape[0]:,} "
                "rows: the delta is damaged."
            )
    return tensors


def changed_rows(part: torch.Tensor, stored: FilePart) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows of a part that differ from a file, `(changed,)`, and their values, `(changed, width)`."""
    if is_over(part, stored):
        rows, values = part.store.named()
        differs = _unequal(values, FileRows([stored]).read(rows))
        return rows[differs], values[differs]
    found = list(blocks_that_differ(part, stored))
    if not found:
        return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(
            0, stored.shape[1], dtype=stored.dtype, device="cpu"
        )
    return torch.cat([rows for rows, _, _ in found]), torch.cat([values for _, values, _ in found])


def undone(part: torch.Tensor, stored: FilePart) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns rows of a part that differ from a file, and the file's values; None if clearing changes is enough."""
    if is_over(part, stored):
        return None
    found = list(blocks_that_differ(part, stored))
    if not found:
        return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(
            0, stored.shape[1], dtype=stored.dtype, device="cpu"
        )
    return torch.cat([rows for rows, _, _ in found]), torch.cat([was for _, _, was in found])


def is_over(part: TablePart, stored: FilePart) -> bool:
    """Whether a part consists of these rows of a file with changes over them."""
    if not isinstance(part.store, ChangedRows):
        return False
    held = part.store.part
    return (held.file, held.offset) == (stored.file, stored.offset)


def blocks_that_differ(part: torch.Tensor, stored: FilePart) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields rows that differ, their values in the model, and those in the file, block by block."""
    reader, height = FileRows([stored]), stored.shape[0]
    for first in range(0, height, BLOCK):
        rows = torch.arange(first, min(height, first + BLOCK), device="cpu")
        held, was = part.read(rows.to(part.device)).to("cpu"), reader.read(rows)
        differs = _unequal(held, was)
        if bool(differs.any()):
            yield rows[differs], held[differs], was[differs]


def _unequal(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns which rows differ in any bit, `(rows,)`: NaN equals itself, and 0 is not -0."""
    return (values.contiguous().view(torch.uint8) != others.contiguous().view(torch.uint8)).any(1)
