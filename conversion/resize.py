"""Resizing: the memory of a checkpoint gets another number of rows or heads, and keeps what it knows of a text.

What it chooses: with more heads, each old head's row is read by several new ones and the projection's columns are
divided among them, so that what a text reads stays the same; with fewer, the last heads are dropped.
Promises: an n-gram of the text reads what it read before, up to collisions; every other row is zero. Never changes the
old checkpoint or loads its tables.
Source: docs/surgery.md.
"""

import copy
import os
from collections.abc import Iterable

import torch

from ..files_safetensors_engram import MAX_MEMORY_SHARD_SIZE, parse_size
from ..hash_constants_engram import derive_constants
from ..hash_ngrams_engram import NgramHasher
from ..knowledge_pack_engram import KnowledgePack
from ..memory_engram import MEMORY_PREFIX
from .graft import parts_for
from .new_checkpoint import (
    NewTensors,
    check_loads,
    copy_other_files,
    copy_weights,
    new_folder,
    write_receipt,
    write_zero_tables,
)
from .readdress import Readdressed, TextNgrams, pack_ngrams, readdress
from .source_checkpoint import LAYERS_PREFIX, SourceCheckpoint


def resize_memory(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    vocab_size: int | list[int] | None = None,
    n_heads: int | None = None,
    texts: Iterable[str] | None = None,
    pack: KnowledgePack | None = None,
    max_memory_shard_size: int | str = MAX_MEMORY_SHARD_SIZE,
) -> Readdressed:
    """Writes a checkpoint whose memory has another number of rows or heads.

    Args:
        folder (`str` or `os.PathLike`): an Engram checkpoint.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        vocab_size (`int` or `list[int]`, *optional*): new `engram_vocab_size`.
        n_heads (`int`, *optional*): new `engram_n_heads`.
        texts (iterable of `str`, *optional*): texts whose n-grams keep their rows.
        pack ([`KnowledgePack`], *optional*): in place of texts: its n-grams keep their rows.
        max_memory_shard_size (`int` or `str`, *optional*, defaults to `"8GB"`): largest memory file.

    Returns:
        [`Readdressed`]: how many rows have a value.

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: if nothing would change, or neither or both of texts and pack are given.

    Example:

    ```python
    >>> from engram_transformers.conversion import resize_memory, text_blocks

    >>> print(resize_memory("runs/graft", "runs/larger", vocab_size=50_000, texts=text_blocks("corpus.txt")))
    ```"""
    if (texts is None) == (pack is None):
        raise ValueError("the n-grams that keep their rows come from texts or from a pack: give one of them.")
    source = SourceCheckpoint(folder)
    config = copy.deepcopy(source.config)
    config.engram_vocab_size = config.engram_vocab_size if vocab_size is None else vocab_size
    config.engram_n_heads = config.engram_n_heads if n_heads is None else n_heads
    config.check_engram()
    shard_bytes = parse_size(max_memory_shard_size)
    config.engram_table_parts = max(config.engram_table_parts, parts_for(config, shard_bytes))
    constants = derive_constants(config, source.hasher.token_map)
    config.engram_hash_sha256 = constants.sha256()
    if constants.sha256() == source.hasher.constants.sha256():
        raise ValueError(
            f"vocab_size={vocab_size} and n_heads={n_heads} change nothing: the memory has "
            f"engram_vocab_size={source.config.engram_vocab_size} and engram_n_heads={source.config.engram_n_heads}."
        )
    layout = NgramHasher(config.engram_layer_ids, source.hasher.token_map, constants)
    if pack is not None:
        _check_fits(pack, source)
        ngrams = pack_ngrams(pack, layout)
    else:
        tokenizer = source.tokenizer()
        ngrams = TextNgrams(texts, source.hasher, layout, tokenizer, tokenizer)
    changed = {f"{MEMORY_PREFIX}hashing.{name}": tensor for name, tensor in constants.named().items()}
    with new_folder(out) as draft:
        copy_other_files(source.folder, draft)
        config.save_pretrained(draft)
        weight_map = copy_weights(source, draft, changed | _reader_with_heads(source, config.engram_n_heads))
        write_zero_tables(draft, config, weight_map, shard_bytes)
        report = readdress(source, layout, ngrams, NewTensors(draft), draft)
        sizes = {"vocab_size": config.engram_vocab_size, "n_heads": config.engram_n_heads}
        write_receipt(draft, source.folder, config, "resize", **sizes, rows=report.rows, filled=report.filled)
        check_loads(draft)
    return report


def _check_fits(pack: KnowledgePack, source: SourceCheckpoint) -> None:
    """Raises ValueError for a pack whose n-grams are of another token map."""
    of_memory = (source.config.engram_token_map_sha256, source.config.engram_compressed_vocab_size)
    if (pack.fits["token_map"], pack.fits["classes"]) != of_memory:
        raise ValueError("the pack's n-grams are of another token map than this memory's: give one made for it.")
    if max(pack.records) > source.config.engram_max_ngram_size:
        raise ValueError(f"the pack has n-grams of {max(pack.records)} tokens, longer than this memory reads.")


def _reader_with_heads(source: SourceCheckpoint, heads: int) -> dict[str, torch.Tensor]:
    """Returns projections for another number of heads."""
    orders, before, width = (
        len(source.config.engram_orders),
        source.config.engram_n_heads,
        source.config.engram_head_dim,
    )
    if heads == before:
        return {}
    from_heads = torch.arange(heads, device="cpu") % before  # (heads,)
    shares = torch.bincount(from_heads, minlength=before)[from_heads]  # (heads,)
    changed = {}
    for name in source.names(LAYERS_PREFIX):
        if name.endswith("key_value.weight"):
            weight = source.tensor(name)
            by_head = weight.view(len(weight), orders, before, width)  # ((M + 1) * D, orders, heads, W)
            by_head = by_head[:, :, from_heads] / shares[:, None]
            changed[name] = by_head.flatten(1).to(weight.dtype)  # ((M + 1) * D, E)
    return changed
