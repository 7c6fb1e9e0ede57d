"""Re-addressing: the rows of a table move to where another layout, or another tokenizer, reads the same n-grams.

What it chooses: a hash cannot be turned back, so the n-grams come from texts or from a knowledge pack. Each n-gram has
rows in the old layout and rows in the new one, and a new row becomes the mean of the old rows of all reads that fall
into it, so that frequent n-grams count more. Two tokenizers are aligned by characters: the n-gram of one that ends
where a token of the other ends stands for the n-gram that ends there. New head h takes from old head h modulo their
number.
Promises: rows that no text reads are zero; texts and tables are streamed, so memory is bounded whatever their size.
Never writes into the old table.
Source: docs/surgery.md.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..hash_ngrams_engram import NgramHasher
from ..hash_tokens_engram import DEAD
from ..knowledge_pack_engram import KnowledgePack
from ..rows_table_engram import read_parts
from .new_checkpoint import PIECE_BYTES, NewTensors
from .source_checkpoint import SourceCheckpoint


# Characters of a text that are tokenised together, and n-grams that are added to the sums together.
BLOCK_CHARACTERS = 1 << 15
BATCH = 1 << 12


class Ngrams(NamedTuple):
    """The same n-grams in the classes of two layouts.

    Args:
        old (`torch.LongTensor` of shape `(N, 1, count)`): entry i is i positions back.
        new (`torch.LongTensor` of shape `(N, 1, count)`): the same for the new layout.
        orders (`tuple[int, ...]`): orders that are meant.
    """

    old: torch.Tensor
    new: torch.Tensor
    orders: tuple[int, ...]


@dataclass
class Readdressed:
    """What re-addressing did.

    Args:
        tokens (`int`): of the new layout, that were read.
        aligned (`int`): those that end where a token of the old layout ends.
        rows (`int`): of the new tables.
        filled (`int`): rows that were read.
    """

    tokens: int = 0
    aligned: int = 0
    rows: int = 0
    filled: int = 0

    def __str__(self) -> str:
        return (
            f"{self.filled:,} of {self.rows:,} rows have a value; {self.aligned:,} of {self.tokens:,} n-grams were "
            "found in the old layout"
        )


def text_blocks(path: str | os.PathLike) -> Iterator[str]:
    """Returns a UTF-8 file in blocks that end with a line, if lines are not very long.

    Raises:
        `FileNotFoundError`: if it is missing.
        `ValueError`: if it is empty; or, at the block, if it is not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"'{path}' is not a file: name a text in UTF-8.")
    if not Path(path).stat().st_size:
        raise ValueError(f"'{path}' is empty: give a text whose n-grams the table has learned.")
    return _blocks(path)


def _blocks(path: str | os.PathLike) -> Iterator[str]:
    """Yields the blocks of `text_blocks`."""
    try:
        with open(path, encoding="utf-8") as file:
            while block := file.read(BLOCK_CHARACTERS):
                yield block + file.readline(BLOCK_CHARACTERS)
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not text in UTF-8 ({error}): convert it first.") from error


class TextNgrams:
    """The n-grams of texts in two layouts.

    Args:
        texts (iterable of `str`): texts, each by itself; an n-gram does not reach over an end.
        old, new ([`NgramHasher`]): the layouts.
        old_tokenizer, new_tokenizer (`PreTrainedTokenizerBase`): of the layouts; the same object if they share it.

    Raises:
        `ValueError`: if the tokenizers differ and one does not say where its tokens are in a text.
    """

    def __init__(self, texts: Iterable[str], old: NgramHasher, new: NgramHasher, old_tokenizer, new_tokenizer):
        self.texts, self.layouts, self.report = texts, (old, new), Readdressed()
        self.tokenizers = [old_tokenizer] if old_tokenizer is new_tokenizer else [old_tokenizer, new_tokenizer]
        if len(self.tokenizers) > 1:
            for tokenizer in self.tokenizers:
                if not tokenizer.is_fast:
                    raise ValueError(
                        f"{type(tokenizer).__name__} does not say where its tokens are in a text, so texts cannot be "
                        "aligned: use a fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))."
                    )

    def __iter__(self) -> Iterator[Ngrams]:
        for text in self.texts:
            read = [_read(tokenizer, text, len(self.tokenizers) > 1) for tokenizer in self.tokenizers]
            (old_ids, old_ends), (new_ids, new_ends) = read[0], read[-1]
            pairs = (
                aligned(old_ends, new_ends) if len(read) > 1 else torch.arange(len(new_ids), device="cpu").expand(2, -1)
            )
            self.report.tokens += len(new_ids)
            windows = [
                _windows(hasher, ids)[:, :, places]  # (N, 1, aligned)
                for hasher, ids, places in zip(self.layouts, (old_ids, new_ids), pairs, strict=True)
            ]
            alive = (windows[0][0, 0] != DEAD) & (windows[1][0, 0] != DEAD)  # (aligned,)
            self.report.aligned += int(alive.sum())
            filled = (_padded(h, window[:, :, alive]) for h, window in zip(self.layouts, windows, strict=True))
            yield Ngrams(*filled, tuple(range(2, self.layouts[1].context_length + 2)))


def pack_ngrams(pack: KnowledgePack, hasher: NgramHasher) -> Iterator[Ngrams]:
    """Yields the n-grams of a knowledge pack, for two layouts with the token map of `hasher`."""
    for order, records in pack.records.items():
        backwards = records.ngrams.flip(1).T[:, None]  # (n, 1, records)
        missing = backwards.new_full((hasher.context_length + 1 - order, *backwards.shape[1:]), DEAD)
        window = _padded(hasher, torch.cat([backwards, missing]))  # (N, 1, records)
        yield Ngrams(window, window, (order,))


def aligned(old_ends: list[int], new_ends: list[int]) -> torch.Tensor:
    """Returns the pairs of tokens that end at the same character, `(2, pairs)`; the last one of several counts."""
    old, new = ({end: place for place, end in enumerate(ends)} for ends in (old_ends, new_ends))
    shared = [end for end in new if end in old]
    return torch.tensor([[old[end] for end in shared], [new[end] for end in shared]], dtype=torch.int64, device="cpu")


def _read(tokenizer, text: str, with_ends: bool) -> tuple[torch.Tensor, list[int]]:
    """Returns the ids of a text, and where each ends."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=with_ends, verbose=False)
    return torch.tensor(read["input_ids"], dtype=torch.int64, device="cpu"), [
        end for _, end in read.get("offset_mapping", ())
    ]


def _windows(hasher: NgramHasher, ids: torch.Tensor) -> torch.Tensor:
    """Returns the n-grams of a text, `(N, 1, length)`; -1 before the text."""
    return hasher.windows(hasher.compress(ids[None]))


def _padded(hasher: NgramHasher, windows: torch.Tensor) -> torch.Tensor:
    """Returns n-grams as they are hashed: with the pad class where there is none."""
    return torch.where(windows == DEAD, hasher.pad_class, windows)


def rows_of(hasher: NgramHasher, ngrams: torch.Tensor) -> torch.Tensor:
    """Returns the rows of n-grams `(N, 1, count)`, counted from the first of their order.

    Returns:
        `torch.LongTensor` of shape `(layers, count, orders, heads)`.
    """
    within = (hasher.offsets - hasher.offsets[:, :, :1])[:, None]  # (layers, 1, orders, heads)
    return hasher.hash_lookback(ngrams)[:, 0] + within  # (layers, count, orders, heads)


class RowMeans:
    """Means of the rows of one order, on disk, as reads are added.

    The mean of equal vectors is that vector, bit for bit.

    Args:
        folder (`Path`): where its files are made.
        height (`int`): rows.
        width (`int`): values in a row.
    """

    def __init__(self, folder: Path, height: int, width: int):
        self.means = self._on_disk(folder, np.float32, (height, width))
        self.counts = self._on_disk(folder, np.int64, (height,))

    @staticmethod
    def _on_disk(folder: Path, kind: type, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns zeros on a file without a name, which goes with them."""
        with tempfile.TemporaryFile(dir=folder) as file:
            return torch.from_numpy(np.memmap(file, kind, "w+", shape=shape))

    def add(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Adds reads: rows `(reads,)` and their vectors `(reads, width)`."""
        unique, place, added = rows.unique(return_inverse=True, return_counts=True)
        values, before = values.float(), self.counts[unique]  # (reads, width), (unique,)
        firsts = torch.full_like(unique, len(rows)).scatter_reduce(
            0, place, torch.arange(len(rows), device="cpu"), "amin"
        )
        start = torch.where(before[:, None] > 0, self.means[unique], values[firsts])  # (unique, width)
        moved = torch.zeros_like(start).index_add_(0, place, values - start[place])
        self.means[unique] = start + moved / (before + added)[:, None]
        self.counts[unique] = before + added

    def write(self, new: NewTensors, layer: int, order: int) -> int:
        """Writes the rows that were read into a new table; returns how many."""
        step = max(1, PIECE_BYTES // self.means[:1].nbytes)
        for first in range(0, len(self.means), step):
            if bool(self.counts[first : first + step].any()):
                new.write_order(layer, order, self.means[first : first + step], first)
        return int((self.counts > 0).sum())


def readdress(
    source: SourceCheckpoint, layout: NgramHasher, ngrams: Iterable[Ngrams], new: NewTensors, scratch: Path
) -> Readdressed:
    """Fills the zero tables of a new checkpoint with the rows of another one, where the new layout reads them.

    Args:
        source ([`SourceCheckpoint`]): has the rows; as many layers and orders, and rows as wide.
        layout ([`NgramHasher`]): of the new tables.
        ngrams (iterable of [`Ngrams`]): from [`TextNgrams`] or `pack_ngrams`.
        new ([`NewTensors`]): of the new checkpoint.
        scratch (`Path`): a folder for sums, which are as large as the new tables in float32.

    Returns:
        [`Readdressed`].

    Raises:
        `ValueError`: if there are no n-grams.
    """
    layers, orders, heads = layout.primes.shape
    width = source.config.engram_head_dim
    from_heads = torch.arange(heads, device="cpu") % source.hasher.primes.shape[-1]  # (heads,)
    heights = layout.primes.sum(-1).tolist()
    means = [[RowMeans(scratch, height, width) for height in by_order] for by_order in heights]
    tables = [
        [source.order_parts(layer, order) for order in source.config.engram_orders] for layer in source.hasher.layer_ids
    ]
    count = 0
    for part in _batches(ngrams):
        count += part.new.shape[-1]
        old_rows, new_rows = rows_of(source.hasher, part.old), rows_of(layout, part.new)
        for layer in range(layers):
            for order in part.orders:
                parts = tables[layer][order - 2]
                read = old_rows[layer, :, order - 2][:, from_heads].flatten()  # (count * heads,)
                values = source.values(read_parts(read, len(parts[0]), parts))  # (count * heads, width)
                means[layer][order - 2].add(new_rows[layer, :, order - 2].flatten(), values)
    if not count:
        raise ValueError("not one n-gram was found: give a text whose n-grams the table has learned.")
    report = getattr(ngrams, "report", Readdressed(count, count))
    report.rows = sum(map(sum, heights))
    report.filled = sum(
        own.write(new, layer, order)
        for layer, by_order in zip(layout.layer_ids, means, strict=True)
        for order, own in enumerate(by_order, start=2)
    )
    return report


def _batches(ngrams: Iterable[Ngrams]) -> Iterator[Ngrams]:
    """Cuts n-grams into batches of bounded size; empty ones are left out."""
    for old, new, orders in ngrams:
        for first in range(0, old.shape[-1], BATCH):
            part = slice(first, first + BATCH)
            yield Ngrams(old[:, :, part], new[:, :, part], orders)
