"""Imports and exports of foreign memories: a graft of a backbone that reads them, and their own files again.

Promises: what was imported and not trained is exported with the same bytes; source, backbone and configuration are
checked before anything is written; the new folder appears whole or not at all; tables are copied in blocks. Never
unpickles, and never runs foreign code.
Source: docs/foreign.md.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..configuration import EngramConfig, EngramFormatError
from ..files_checkpoint_engram import expected_shards
from ..files_safetensors_engram import (
    DTYPE_NAMES,
    check_folder,
    read_header,
    read_index,
    start_of_data,
    write_index,
    write_shard,
)
from ..hash_constants_engram import HashConstants, derive_constants
from ..layer_engram import EngramLayer
from ..memory_engram import MEMORY_PREFIX
from ..rows_placement_engram import TABLES_PREFIX
from . import foreign_deepseek_v4_1, foreign_january_demo, foreign_qwen_ple
from .donor import RECEIPT_NAME, donor_folder, read_donor
from .foreign_layouts import (
    SIZES,
    Constant,
    ForeignMemory,
    ForeignTensor,
    Kept,
    Layout,
    Rows,
    WeightMap,
    constant_of,
    read_config,
    read_tensor,
)
from .foreign_rows import RowPiece, fill_pieces, read_rows, row_blocks
from .foreign_weights import from_memory, to_memory
from .graft import graft
from .new_checkpoint import dry_load, new_folder, refuse_used


LAYOUTS = {
    layout.name: layout
    for layout in (foreign_january_demo.LAYOUT, foreign_qwen_ple.LAYOUT, foreign_deepseek_v4_1.LAYOUT)
}

# Bytes of the source that a memory has no place for.
KEPT_NAME = "engram_foreign.safetensors"

_ENGRAM_PEFT = (
    "it hashes other tokens (its bigram at a position is the two tokens before it, its trigram is reversed) with a "
    "token map that its folders do not hold, so every row lies at another address. Graft the base model (`engram graft "
    "DONOR OUT`) and train the memory on the same texts, or teach facts as a pack (docs/packs.md)."
)

_LAYERS = f"{MEMORY_PREFIX}layers."


def import_memory(
    layout: str,
    source: str | os.PathLike,
    backbone: str | os.PathLike,
    out: str | os.PathLike,
    *,
    on_bytes: Callable[[int], None] = lambda written: None,
    **graft_options,
) -> Path:
    """Writes a graft of `backbone` with the memory of another model.

    Args:
        layout (`str`): "january-demo", "qwen-ple" or "deepseek-v4.1".
        source (`str` or `os.PathLike`): folder with the memory's safetensors files and its `config.json`; tensors of
            the rest of the model may be there too.
        backbone (`str` or `os.PathLike`): a folder or Hub id; of the memory's hidden size and number of residual
            streams, with the tokenizer that the memory was trained with.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        on_bytes (`Callable`, *optional*): is called with the bytes of each block of rows that was written.
        graft_options: options of [`graft`] that do not describe the memory, such as `tokenizer`.

    Returns:
        `Path` of the new folder.

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: for an unknown layout, or a backbone that the memory does not fit.
        [`EngramFormatError`]: for files that are incomplete, damaged, or not of this layout or `config.json`.

    Example:

    ```python
    >>> from engram_transformers.conversion import import_memory

    >>> import_memory("january-demo", "demo-weights", "backbone", "my-graft")
    ```"""
    source, out = Path(source), Path(out)
    refuse_used(out)
    foreign = _layout(layout)
    told = read_config(source)
    if told.get("model_type") == "engram" or (source / "engram_adapters.safetensors").exists():
        raise ValueError(f"'{source}' is a folder of engram-peft: {_ENGRAM_PEFT}")
    prefix, tensors = foreign.tensors(source)
    memory = foreign.read(told, tensors)
    fields = {**memory.fields, **foreign.fixed}
    config, constants = _planned(foreign, memory, fields, backbone, graft_options)
    stored = {name for layer in tensors.values() for name in layer}
    numbers = memory.numbers | {"rows": constants.primes.sum((1, 2)).tolist()}
    names = foreign.weight_map(config, 0, numbers).items()
    numbers["not_stored"] = sorted(n for n, place in names if isinstance(place, Constant) and n not in stored)
    foreign.check(config, constants, tensors, numbers)
    dense, kept = _read_weights(foreign, config, tensors, numbers)

    with new_folder(out) as draft:
        graft(backbone, draft, memory.layer_ids, **fields, **graft_options)
        config = EngramConfig.from_pretrained(draft)
        _replace_dense(draft, dense)
        if kept:
            write_shard(draft / KEPT_NAME, kept)
        for number, layer in enumerate(config.engram_layer_ids):
            sources = _foreign_pieces(foreign.weight_map(config, number, numbers), tensors[layer])
            for written in fill_pieces(_own_pieces(draft, config, layer), sources):
                on_bytes(written)
        _sign(draft, {"layout": layout, "source": source.resolve().name, "prefix": prefix, "numbers": numbers})
        if problem := dry_load(draft):
            raise EngramFormatError(f"the import of '{source}' does not load cleanly: {problem}.")
    return out


def export_memory(
    layout: str,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    on_bytes: Callable[[int], None] = lambda written: None,
) -> Path:
    """Writes the memory of a graft in a foreign layout: a file for each layer, and a `config.json`.

    Args:
        layout (`str`): "january-demo", "qwen-ple" or "deepseek-v4.1".
        checkpoint (`str` or `os.PathLike`): folder of a graft; the layout must have all of its memory's settings.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        on_bytes (`Callable`, *optional*): is called with the bytes of each block of rows that was written.

    Returns:
        `Path` of the new folder.

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: for an unknown layout, or a memory with settings that it does not have.
        `FileNotFoundError` or [`EngramFormatError`]: if the graft is incomplete or damaged.

    Example:

    ```python
    >>> from engram_transformers.conversion import export_memory

    >>> export_memory("january-demo", "my-graft", "demo-weights")
    ```"""
    folder, out = Path(checkpoint), Path(out)
    refuse_used(out)
    foreign = _layout(layout)
    config = EngramConfig.from_pretrained(folder)
    if config.engram_memory_delta is not None:
        raise ValueError(
            f"'{folder}' holds what training changed, and not the memory: load it and save it into a new folder first."
        )
    constants = derive_constants(config, None)
    signed = _signature(folder, layout)
    numbers = {"not_stored": [], **foreign.numbers, **signed.get("numbers", {})}
    numbers["rows"] = constants.primes.sum((1, 2)).tolist()
    _check_settings(foreign, config, foreign.fixed)
    told = foreign.write(config, numbers)
    _check_settings(foreign, config, foreign.read(told, {}).fields)
    _check_memory(folder, config)

    with new_folder(out) as draft:
        for number, layer in enumerate(config.engram_layer_ids):
            names = f"{signed.get('prefix', '')}layers.{layer}.{foreign.inside}."
            tensors = _foreign_layer(folder, foreign, config, constants, number, numbers)
            path = draft / f"engram-layer-{layer:05d}.safetensors"
            for written in _write_stream(path, {names + name: tensor for name, tensor in tensors.items()}):
                on_bytes(written)
        (draft / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return out


def _layout(name: str) -> Layout:
    """Returns a layout by its name."""
    if name == "engram-peft":
        raise ValueError(f"memories of engram-peft are not imported: {_ENGRAM_PEFT}")
    if name not in LAYOUTS:
        raise ValueError(f"layout '{name}' is unknown: known are {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def _planned(
    foreign: Layout, memory: ForeignMemory, fields: dict, backbone: str | os.PathLike, options: dict
) -> tuple[EngramConfig, HashConstants]:
    """Returns configuration and constants of the graft that will be made, from the backbone's configuration alone."""
    hub = {name: options.get(name) for name in ("token", "cache_dir")}
    folder = donor_folder(
        backbone, options.get("subfolder", ""), revision=options.get("revision"), weights=False, **hub
    )
    trusted = options.get("trust_remote_code", False)
    read = read_donor(folder, options.get("tokenizer"), options.get("text_only"), trusted, **hub)
    made = read.fresh_memory(memory.layer_ids, **fields)
    config, constants = made.config, derive_constants(made.config, made.token_map)
    for name, wanted in memory.backbone.items():
        found = getattr(config if name.startswith("engram_") else config.text_config, name)
        if found != wanted:
            raise ValueError(
                f"the memory needs a backbone with {name}={wanted}, and '{backbone}' has {found}: give the backbone "
                "that the memory was trained with, and its tokenizer."
            )
    rows = constants.primes.sum((1, 2)).tolist()
    if memory.rows not in (None, rows):
        raise EngramFormatError(
            f"config.json says that the tables have {memory.rows} rows, and its other fields give {rows}: rows would "
            "be read at wrong addresses. Give the config.json that belongs to the weights."
        )
    return config, constants


def _read_weights(
    foreign: Layout, config: EngramConfig, tensors: Mapping[int, Mapping[str, ForeignTensor]], numbers: dict
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns everything but the rows of a foreign memory: dense tensors of ours, and what is kept beside them."""
    dense, kept = {}, {}
    for number, layer in enumerate(config.engram_layer_ids):
        weights, given = foreign.weight_map(config, number, numbers), tensors[layer]
        made = to_memory(weights, given, _layer_shapes(config, layer))
        dense |= {f"{_LAYERS}{layer}.{name}": tensor for name, tensor in made.items()}
        for name, place in weights.items():
            if isinstance(place, Kept):
                kept[f"{layer}.{name}"] = read_tensor(given[name])
        sources, first = _foreign_pieces(weights, given), numbers["rows"][number]
        if (last := max(piece.first + piece.rows for piece in sources)) > first:
            width = sum(piece.width for piece in sources if piece.first == 0)
            kept[f"{layer}.padding"] = torch.from_numpy(read_rows(sources, first, last - first, width))
    return dense, kept


def _replace_dense(draft: Path, dense: dict[str, torch.Tensor]) -> None:
    """Writes the file of a graft's dense weights again, with others in their own type."""
    weight_map = read_index(draft)
    (path,) = {draft / weight_map[name] for name in dense}
    others = {name: _stored(path, name) for name in read_header(path) if name not in dense}
    path.unlink()
    write_shard(path, others | dense)
    files = {draft / name for name in weight_map.values()}
    total = sum(entry.end - entry.begin for file in files for entry in read_header(file).values())
    write_index(draft, weight_map, total, [name for name in weight_map if name.startswith(TABLES_PREFIX)])


def _own_pieces(folder: Path, config: EngramConfig, layer: int) -> list[RowPiece]:
    """Returns the parts of a layer's table in a checkpoint, with rows counted over all orders."""
    weight_map, pieces, first = read_index(folder), [], 0
    for order in config.engram_orders:
        for part in range(config.engram_table_parts):
            name = f"{TABLES_PREFIX}{layer}.order{order}.{part}"
            path = folder / weight_map[name]
            entry = read_header(path)[name]
            rows = entry.shape[0]
            width = (entry.end - entry.begin) // rows
            pieces.append(RowPiece(path, start_of_data(path) + entry.begin, first, rows, width))
            first += rows
    return pieces


def _foreign_pieces(weights: WeightMap, tensors: Mapping[str, ForeignTensor]) -> list[RowPiece]:
    """Returns the rows of a layer's foreign tensors."""
    pieces = []
    for name, place in weights.items():
        if isinstance(place, Rows):
            tensor, (rows, values) = tensors[name], place.shape
            width = values * SIZES[tensor.entry.dtype]
            pieces.append(RowPiece(tensor.path, tensor.begin, place.first, rows, width, place.column))
    return pieces


def _foreign_layer(
    folder: Path, foreign: Layout, config: EngramConfig, constants: HashConstants, number: int, numbers: dict
) -> dict[str, tuple[str, tuple[int, ...], Iterable]]:
    """Returns a layer's foreign tensors by name: type, shape and blocks of bytes."""
    layer, weights = config.engram_layer_ids[number], foreign.weight_map(config, number, numbers)
    weight_map, pieces = read_index(folder), _own_pieces(folder, config, layer)
    kept_path = folder / KEPT_NAME
    kept = {name: _stored(kept_path, name) for name in (read_header(kept_path) if kept_path.is_file() else ())}
    width, start = pieces[0].width, f"{_LAYERS}{layer}."
    if f"{layer}.padding" in kept:
        entry = read_header(kept_path)[f"{layer}.padding"]
        begin = start_of_data(kept_path) + entry.begin
        pieces.append(RowPiece(kept_path, begin, numbers["rows"][number], entry.shape[0], width))
    own = {
        name[len(start) :]: _stored(folder / weight_map[name], name) for name in weight_map if name.startswith(start)
    }
    kept = {name[len(f"{layer}.") :]: tensor for name, tensor in kept.items() if name.startswith(f"{layer}.")}
    dense = from_memory(weights, own, kept)
    made = {}
    for name, place in weights.items():
        if isinstance(place, Rows):
            dtype = place.dtype or DTYPE_NAMES[getattr(torch, config.engram_table_dtype)]
            made[name] = (dtype, place.shape, _columns(pieces, place, place.shape[1] * SIZES[dtype], width))
        elif isinstance(place, Constant) and name not in numbers["not_stored"]:
            values = constant_of(constants, place.name, number)
            made[name] = ("I64", place.shape, [values.numpy()])
        elif name in dense:
            dtype = place.dtype or DTYPE_NAMES[dense[name].dtype]
            made[name] = (dtype, place.shape, [dense[name].view(torch.uint8).numpy()])
    return made


def _columns(pieces: list[RowPiece], place: Rows, width: int, row_bytes: int) -> Iterable:
    """Yields the bytes of a foreign tensor of rows, block by block."""
    for block in row_blocks(pieces, place.first, place.shape[0], row_bytes):
        yield block[:, place.column : place.column + width].copy()


def _write_stream(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], Iterable]]) -> Iterable[int]:
    """Writes a safetensors file from blocks, the widest types first; yields the bytes of each block."""
    ordered = sorted(tensors, key=lambda name: (-SIZES[tensors[name][0]], name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in ordered:
        dtype, shape, _ = tensors[name]
        end = offset + torch.Size(shape).numel() * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in ordered:
            for block in tensors[name][2]:
                file.write(memoryview(block).cast("B"))
                yield block.nbytes


def _stored(path: Path, name: str) -> torch.Tensor:
    """Reads a tensor of a safetensors file."""
    entry = read_header(path)[name]
    return read_tensor(ForeignTensor(path, entry, start_of_data(path) + entry.begin))


def _sign(draft: Path, imported: dict) -> None:
    """Notes in the receipt of a graft what was imported."""
    path = draft / RECEIPT_NAME
    receipt = json.loads(path.read_text(encoding="utf-8")) | {"imported": imported}
    del receipt["outputs"]  # of the files as the graft left them
    path.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _signature(folder: Path, layout: str) -> dict:
    """Returns what the receipt says of an import from this layout."""
    path = folder / RECEIPT_NAME
    imported = json.loads(path.read_text(encoding="utf-8")).get("imported", {}) if path.is_file() else {}
    return imported if imported.get("layout") == layout else {}


def _layer_shapes(config: EngramConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a layer's dense tensors by name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in EngramLayer(config, layer).state_dict().items()}


def _check_memory(folder: Path, config: EngramConfig) -> None:
    """Raises FileNotFoundError or EngramFormatError unless a graft's memory is complete."""
    check_folder(folder, expected_shards(config))
    weight_map = read_index(folder)
    for layer in config.engram_layer_ids:
        for name, shape in _layer_shapes(config, layer).items():
            stored = f"{_LAYERS}{layer}.{name}"
            if stored not in weight_map or read_header(folder / weight_map[stored])[stored].shape != shape:
                raise EngramFormatError(f"'{folder}' lacks '{stored}' of the shape {list(shape)}: restore its files.")


def _check_settings(foreign: Layout, config: EngramConfig, held: Mapping[str, Any]) -> None:
    """Raises ValueError for a memory with other settings than those that files of the layout would have."""
    for name, value in held.items():
        own = getattr(config, name)
        own = config.engram_vocab_sizes if name == "engram_vocab_size" and isinstance(value, list) else own
        if own != value and (name != "engram_table_dtype" or name in foreign.fixed):
            raise ValueError(
                f"a memory of the layout {foreign.name} has {name}={value!r}, and this one {own!r}: it would compute "
                "something else there. Export it to a layout that has it (docs/foreign.md), or keep it as it is."
            )
