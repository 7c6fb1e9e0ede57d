"""RowSelection: which rows of a memory may change, chosen by how new texts and general texts read them.

What it chooses: a row is scored by TF-IDF: how often new texts read it, against the number of general texts that do.
Rows that are not chosen get no gradient, so norms, clipping and optimizers see only rows that will change.
Promises: texts are read once, one at a time; memory grows with the distinct rows that the new texts read, whatever the
size of the tables and of the general text. A selection for another memory is refused.
Source: Sparse Memory Finetuning (arXiv 2510.15103), with rows of hashed n-grams instead of its memory slots.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from ..files_checkpoint_engram import DIGESTS
from ..inputs_engram import alive_positions, check_ids, checked_text_ids, document_ends
from ..rows_gradient_engram import are_among
from ..rows_placement_engram import TABLES_PREFIX
from ..rows_table_engram import part_of


# Reads that are counted together, to avoid sorting the same rows repeatedly.
TOGETHER = 2**16


@dataclass
class SelectedPart:
    """The chosen rows of one part of a table.

    Args:
        rows (`torch.LongTensor` of shape `(chosen,)`): rows that may change, ascending, counted within the part.
        reads (`torch.LongTensor` of shape `(chosen,)`): how often the new texts read each.
        general (`torch.LongTensor` of shape `(chosen,)`): how many of the general texts read each.
        all_rows (`int`): distinct rows of the part that the new texts read.
        all_reads (`int`): how often they read them.
    """

    rows: torch.Tensor
    reads: torch.Tensor
    general: torch.Tensor
    all_rows: int
    all_reads: int


@dataclass
class RowSelection:
    """Rows of a memory that may change; made by [`select_rows`].

    Args:
        parts (`dict[str, SelectedPart]`): by the state-dict name of the part, `memory.tables.1.order2.0`.
        general_texts (`int`): number of general texts that were counted.
        digests (`dict[str, str | None]`): of the memory's hash constants and token map.

    Example:

    ```python
    >>> from engram_transformers.training import select_rows

    >>> selection = select_rows(model, new_texts, reference_texts=general_texts, tokenizer=tokenizer)
    >>> print(selection)
    >>> selection.apply(model)  # until selection.clear(model)
    ```"""

    parts: dict[str, SelectedPart]
    general_texts: int
    digests: dict[str, str | None]

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """Rows that may change, by part."""
        return {name: part.rows for name, part in self.parts.items()}

    @property
    def coverage(self) -> float:
        """Share of the new texts' reads that go to chosen rows."""
        reads = sum(part.all_reads for part in self.parts.values())
        return sum(int(part.reads.sum()) for part in self.parts.values()) / max(reads, 1)

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts.values())

    def __str__(self) -> str:
        rows = sum(part.all_rows for part in self.parts.values())
        shared = sum(int((part.general > 0).sum()) for part in self.parts.values())
        return (
            f"{len(self):,} of the {rows:,} rows that the new texts read may change; {self.coverage:.1%} of their "
            f"reads; {shared:,} of these rows are read by general text too ({self.general_texts:,} texts)"
        )

    def apply(self, model) -> "RowSelection":
        """Lets only the chosen rows of a model's tables change, from the next backward pass on.

        It applies to the tables as they are placed; `create_optimizer` applies it again after `place_memory`, and
        stores it in its state. Projections, norms and convolution are not rows: `model.set_trainable("tables")` freezes
        them too.

        Args:
            model ([`EngramForCausalLM`]): the model, or a PEFT model around it.

        Raises:
            `ValueError`: if the rows are those of another memory, or the tables are not loaded.
        """
        self.check(model)
        for name, part in model.memory.named_parts().items():
            part.selected = self.parts[name].rows.to(part.device)
        model.memory.row_selection = self
        return self

    def check(self, model) -> None:
        """Raises ValueError unless the rows are those of this model's memory, and its tables are loaded."""
        for name, digest in self.digests.items():
            own = getattr(model.config, name)
            if own != digest:
                raise ValueError(
                    f"the selection was made for another memory: its {name} is {str(digest)[:16]}..., the model's "
                    f"{str(own)[:16]}.... Make one with select_rows for this model."
                )
        held = model.memory.named_parts()
        if not held:
            raise ValueError("the memory's tables are not loaded: model.place_memory('cpu') or 'disk' loads them.")
        if held.keys() != self.parts.keys():
            wrong = sorted(held.keys() ^ self.parts.keys())
            raise ValueError(f"the selection does not fit the memory's parts, such as {wrong[0]}: make a new one.")
        for name, part in held.items():
            rows, height = self.parts[name].rows, part.table_shape[0]
            ascending = len(rows) < 2 or bool((rows.diff() > 0).all())
            if not ascending or (len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < height):
                raise ValueError(f"rows of {name} must be unique, ascending and below {height}: make a new selection.")

    @staticmethod
    def clear(model) -> None:
        """Lets all rows of a model's tables change again."""
        for part in model.memory.named_parts().values():
            part.selected = None
        model.memory.row_selection = None

    def state_dict(self) -> dict:
        """Returns plain tensors, numbers and strings, for `torch.save`."""
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return {"parts": parts, "general_texts": self.general_texts, "digests": dict(self.digests)}

    @classmethod
    def from_state_dict(cls, state: dict) -> "RowSelection":
        """Restores a `state_dict`."""
        parts = {name: SelectedPart(**part) for name, part in state["parts"].items()}
        return cls(parts, state["general_texts"], state["digests"])


class RowCounts:
    """Counts how often each row of one order was read."""

    def __init__(self):
        self.rows = torch.empty(0, dtype=torch.int64, device="cpu")  # (distinct,), ascending
        self.counts = torch.empty(0, dtype=torch.int64, device="cpu")  # (distinct,)
        self.waiting: list[torch.Tensor] = []
        self.reads = 0

    def add(self, rows: torch.Tensor) -> None:
        """Counts reads `(reads,)`, in any order and with repeats."""
        self.waiting.append(rows)
        self.reads += len(rows)
        if sum(map(len, self.waiting)) > max(TOGETHER, len(self.rows)):  # so that a read is sorted only a few times
            self.merge_waiting()

    def merge_waiting(self) -> None:
        """Merges waiting reads into the counts."""
        if self.waiting:
            fresh, times = torch.unique(torch.cat(self.waiting), return_counts=True)
            rows, places = torch.unique(torch.cat([self.rows, fresh]), return_inverse=True)
            counts = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
            self.counts = counts.index_add_(0, places, torch.cat([self.counts, times]))
            self.rows, self.waiting = rows, []


def select_rows(
    model,
    texts: Iterable,
    reference_texts: Iterable,
    tokenizer=None,
    top_k: int | None = None,
    min_score: float | None = None,
) -> RowSelection:
    """Chooses the rows that may change when a model learns new texts: those that they read often and general text
    rarely.

    A row i of a layer's order scores `c(i) / sum(c) * log((B + 1) / (b(i) + 1))`: c counts its reads in the new texts,
    b(i) the general texts that read it, out of B. A row that all general texts read scores 0 and is never chosen.

    Args:
        model ([`EngramForCausalLM`]): the model, wherever its tables are; they are not read.
        texts (iterable): what is to be learned, read once: strings, lists or tensors of token ids, or batches of a
            data loader (mappings with `input_ids`, and where needed `attention_mask`, `position_ids`).
        reference_texts (iterable): general text, of the same kinds; each entry is one of the B texts.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for strings.
        top_k (`int`, *optional*): largest number of rows to choose in each layer's order.
        min_score (`float`, *optional*): lowest score of a chosen row.

    Returns:
        [`RowSelection`], not yet applied. With neither `top_k` nor `min_score`: the rows that no general text reads.

    Raises:
        `ValueError`: if there are no texts, or no general ones.
        `TypeError`: for strings without a tokenizer.

    Example:

    ```python
    >>> selection = select_rows(model, new_texts, reference_texts=general_texts, tokenizer=tokenizer, top_k=10_000)
    >>> selection.apply(model)
    >>> EngramTrainer(model, args, train_dataset=dataset).train()
    ```"""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: at least one row of each layer's order must be chosen.")
    memory, config = model.memory, model.config
    tables = [memory.tables[str(layer)].orders() for layer in memory.layer_ids]
    counted = [[RowCounts() for _ in orders] for orders in tables]
    for rows in _read_rows(model, texts, tokenizer, "texts"):
        for layer, own in zip(counted, rows, strict=True):
            for order, counts in enumerate(layer):
                counts.add(own[:, order].flatten())
    for layer in counted:
        for counts in layer:
            counts.merge_waiting()
    general = [[torch.zeros_like(counts.rows) for counts in layer] for layer in counted]
    number = 0
    for rows in _read_rows(model, reference_texts, tokenizer, "reference_texts"):
        number += 1
        for layer, frequencies, own in zip(counted, general, rows, strict=True):
            for order, counts in enumerate(layer):
                read = torch.unique(own[:, order])
                known = read[are_among(read, counts.rows)]
                frequencies[order][torch.searchsorted(counts.rows, known)] += 1
    parts = {}
    for layer, orders, counts, frequencies in zip(memory.layer_ids, tables, counted, general, strict=True):
        for order, held in enumerate(orders):
            chosen = choose(counts[order], frequencies[order], number, top_k, min_score)
            prefix = f"{TABLES_PREFIX}{layer}.order{order + 2}."
            parts.update(in_parts(prefix, held, counts[order], frequencies[order], chosen))
    return RowSelection(parts, number, {name: getattr(config, name) for name in DIGESTS})


def scores(counts: RowCounts, general: torch.Tensor, texts: int) -> torch.Tensor:
    """TF-IDF of the rows of one order, `(distinct,)`, from how many of the general `texts` read each."""
    return counts.counts.double() / max(counts.reads, 1) * torch.log((texts + 1) / (general.double() + 1))


def choose(
    counts: RowCounts, general: torch.Tensor, texts: int, top_k: int | None, min_score: float | None
) -> torch.Tensor:
    """Returns which rows of one order may change, `(distinct,)`; of equal scores the lower row is preferred."""
    if top_k is None and min_score is None:
        return general == 0
    score = scores(counts, general, texts)
    chosen = score > 0
    if min_score is not None:
        chosen &= score >= min_score
    if top_k is not None:
        best = torch.sort(score, descending=True, stable=True).indices[:top_k]
        chosen &= torch.zeros_like(chosen).index_fill_(0, best, True)
    return chosen


def in_parts(prefix: str, order, counts: RowCounts, general, chosen) -> Iterator[tuple[str, SelectedPart]]:
    """Splits the chosen rows of one order by part."""
    place = part_of(counts.rows, order.part_height, len(order))
    for number in range(len(order)):
        inside = place == number
        kept = inside & chosen
        rows = counts.rows[kept] - number * order.part_height
        reads = int(counts.counts[inside].sum())
        yield (
            f"{prefix}{number}",
            SelectedPart(rows, counts.counts[kept], general[kept], int(inside.sum()), reads),
        )


@torch.no_grad()
def _read_rows(model, entries: Iterable, tokenizer, name: str) -> Iterator[torch.Tensor]:
    """Yields the rows that a forward pass of each entry would read, `(layers, positions of text, orders, heads)`."""
    if isinstance(entries, (str, Mapping)):
        raise TypeError(f"{name} is one {type(entries).__name__}: pass a list of texts.")
    memory, empty = model.memory, True
    for entry in entries:
        given = _as_inputs(entry, tokenizer, memory.hashing.token_map.device)
        if not given["input_ids"].numel():
            continue
        empty = False
        ids, mask = checked_text_ids(given["input_ids"], None, None), given.get("attention_mask")
        check_ids(ids, memory.hashing.token_map, may_be_absent=True)
        alive = alive_positions(ids, mask, None, None)
        ends = document_ends(ids, alive, mask, given.get("position_ids"), given.get("engram_segment_ids"), None)
        resets = memory.resets(ids)
        if resets is not None:
            ends = resets if ends is None else ends | resets
        segments = None if ends is None else memory.segments(ends, None)
        # (batch, length), (layers, batch, length, orders, heads)
        classes, rows = memory.hashing(ids, alive, None, segments)
        yield rows[:, classes >= 0].cpu()
    if empty:
        raise ValueError(f"{name} holds no text: rows are chosen by what reads them.")


def _as_inputs(entry, tokenizer, device: torch.device) -> dict[str, torch.Tensor]:
    """Makes arguments of a forward pass, each `(batch, length)`, from a string, token ids or a batch."""
    if isinstance(entry, str):
        if tokenizer is None:
            raise TypeError("texts are strings: pass tokenizer=, or token ids.")
        entry = tokenizer(entry)
    given = entry if isinstance(entry, Mapping) else {"input_ids": entry}
    wanted = ("input_ids", "attention_mask", "position_ids", "engram_segment_ids")
    tensors = {name: torch.as_tensor(given[name], device=device) for name in wanted if given.get(name) is not None}
    return {name: tensor[None] if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}
