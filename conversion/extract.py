"""Extraction: the memory alone, without its backbone, or the rows of a text's n-grams as a knowledge pack.

What it chooses: a memory's folder holds tables, reader, hash constants, configuration and tokenizer. It does not load
as a model; `graft(donor, out, init_from=folder, init_reader=True)` puts it back on its backbone. A pack's record is
what the table gives for an n-gram; n-grams for which it gives zeros get no record.
Promises: table files are copied whole, holes included; a folder appears whole or not at all. Never loads a table.
Source: docs/surgery.md; docs/packs.md.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..files_atomic_engram import MODEL_STEM
from ..files_safetensors_engram import shard_name, write_shard
from ..hash_tokens_engram import DEAD
from ..knowledge_pack_engram import SUFFIX, KnowledgePack, pack_identity
from ..memory_engram import MEMORY_PREFIX, EngramMemory
from ..rows_placement_engram import TABLES_PREFIX
from ..rows_table_engram import read_parts
from .new_checkpoint import copy_other_files, new_folder, write_indexes, write_receipt
from .readdress import rows_of
from .reference_copy import copy_by_reference
from .source_checkpoint import LAYERS_PREFIX, SourceCheckpoint


def extract_memory(folder: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes the memory of a checkpoint without the backbone.

    Args:
        folder (`str` or `os.PathLike`): an Engram checkpoint.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.

    Returns:
        `Path` of the new folder.

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: if the folder holds no whole checkpoint.

    Example:

    ```python
    >>> from engram_transformers.conversion import extract_memory, graft

    >>> extract_memory("runs/graft", "runs/memory")
    >>> graft("runs/donor", "runs/again", init_from="runs/memory", init_reader=True)
    ```"""
    source, out = SourceCheckpoint(folder), Path(out)
    tables = set(source.names(TABLES_PREFIX))
    files = {source.weight_map[name] for name in tables}
    dense = [name for name in source.names(MEMORY_PREFIX) if name not in tables]
    with new_folder(out) as draft:
        copy_other_files(source.folder, draft)
        source.config.save_pretrained(draft)
        for file_name in sorted(files):
            copy_by_reference(source.folder / file_name, draft / file_name)
        file_name = shard_name(MODEL_STEM, 1, 1)
        write_shard(draft / file_name, {name: source.tensor(name) for name in dense})
        weight_map = {name: source.weight_map[name] for name in tables} | dict.fromkeys(dense, file_name)
        write_indexes(draft, weight_map)
        write_receipt(draft, source.folder, source.config, "extract")
        SourceCheckpoint(draft)
    return out


def extract_pack(folder: str | os.PathLike, file: str | os.PathLike, texts: Iterable[str]) -> KnowledgePack:
    """Writes a knowledge pack with what a checkpoint's table gives for the n-grams of texts.

    Over a table of zeros with the same reader, the pack gives these texts what the table gives them, but for n-grams
    that reach before a text: packs have none.

    Args:
        folder (`str` or `os.PathLike`): an Engram checkpoint.
        file (`str` or `os.PathLike`): the new file, whose name ends with ".engram-pack.safetensors".
        texts (iterable of `str`): the texts.

    Returns:
        [`KnowledgePack`].

    Raises:
        `FileExistsError`: if the file is there.
        `ValueError`: if the file has another ending, or the table gives nothing for these texts.

    Example:

    ```python
    >>> from engram_transformers.conversion import extract_pack, text_blocks

    >>> pack = extract_pack("runs/graft", "law.engram-pack.safetensors", text_blocks("law.txt"))
    ```"""
    file = Path(file)
    if not file.name.endswith(SUFFIX):
        raise ValueError(f"'{file}' must end with {SUFFIX}, as the name of every pack.")
    if os.path.lexists(file):
        raise FileExistsError(f"'{file}' is there already: nothing is overwritten. Name another file.")
    source = SourceCheckpoint(folder)
    grams = _ngrams(source, texts)
    layers = source.config.engram_layer_ids
    vectors = {layer: {} for layer in layers}
    for order, found in grams.items():
        own = {layer: _vectors(source, layer, order, found) for layer in layers}
        live = torch.stack([rows.any(-1) for rows in own.values()]).any(0)  # (records,)
        grams[order] = found[live]
        for layer in layers:
            vectors[layer][order] = own[layer][live]
    if not sum(map(len, grams.values())):
        raise ValueError(f"the table of '{folder}' gives zeros for every n-gram of the text: give one that it learned.")
    memory = EngramMemory(source.config, hold_tables=False)
    memory.layers.load_state_dict(
        {name.removeprefix(LAYERS_PREFIX): source.tensor(name) for name in source.names(LAYERS_PREFIX)}
    )
    told = {"extracted": {"memory": source.folder.resolve().name}}
    pack = KnowledgePack(grams, vectors, pack_identity(source.config, memory.layers), provenance=told)
    pack.save(file)
    return pack


def _ngrams(source: SourceCheckpoint, texts: Iterable[str]) -> dict[int, torch.Tensor]:
    """Returns the n-grams of texts by order, `(records, n)`, once each."""
    tokenizer, hasher = source.tokenizer(), source.hasher
    grams = {order: torch.empty(0, order, dtype=torch.int64, device="cpu") for order in source.config.engram_orders}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows = hasher.windows(hasher.compress(torch.tensor([ids], dtype=torch.int64, device="cpu")))  # (N, 1, L)
        for order, before in grams.items():
            own = windows[:order, 0].flip(0).T  # (L, n)
            # Tokens that a resize appended have no place in a pack.
            whole = ((own != DEAD) & (own < source.config.engram_compressed_vocab_size)).all(-1)  # (L,)
            grams[order] = torch.cat([before, own[whole]]).unique(dim=0)  # (records, n)
    return grams


def _vectors(source: SourceCheckpoint, layer: int, order: int, grams: torch.Tensor) -> torch.Tensor:
    """Returns what a table gives for n-grams `(records, n)`: `(records, heads * width)`."""
    hasher, parts = source.hasher, source.order_parts(layer, order)
    missing = grams.new_full((hasher.context_length + 1 - order, 1, len(grams)), int(hasher.pad_class))
    backwards = torch.cat([grams.flip(1).T[:, None], missing])  # (N, 1, records)
    rows = rows_of(hasher, backwards)[hasher.layer_index(layer), :, order - 2]  # (records, heads)
    return source.values(read_parts(rows, len(parts[0]), parts)).flatten(1)  # (records, heads * width)
