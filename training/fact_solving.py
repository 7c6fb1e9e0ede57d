"""Solving: a delta of each subject is learned first, then the records that give all deltas are solved for at once.

What it chooses: a delta is one vector for each Engram layer. It is added to the memory vector at one place of each text
of its subject: the last token of the name that reads a record which no other name has. All texts of a subject, of all
its facts, share it, so no phrasing has a vector of its own. Records are the ridge solution of "the records that a place
reads are the delta of its subject".
Promises: memory stays bounded, because deltas of few subjects are learned together. Never changes a weight.
Source: EngramEdit (2026), which learns deltas at the last token of a subject; docs/packs.md.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .fact_texts import FactText


_RIDGE = 0.01  # of a record's squared norm, where each text that reads it counts 1


class Place(NamedTuple):
    """Where a text reads what its subject's records hold.

    Args:
        token (`int`): of the text.
        ngrams (`list[tuple[int, ...]]`): that end there and have a record.
    """

    token: int
    ngrams: list[tuple[int, ...]]


def find_places(
    texts: list[FactText], classes: list[list[int]], names: Mapping[str, set[tuple[int, ...]]]
) -> list[Place]:
    """Finds the place of each text: before the answer, and read by no other subject if it has such a place.

    Args:
        texts (`list[FactText]`): from `fact_texts`.
        classes (`list[list[int]]`): the token classes of each text.
        names (`dict[str, set[tuple[int, ...]]]`): by subject, the n-grams of its name that get records.

    Raises:
        `ValueError`: for a text in which no record of its subject would be read before the answer.
    """
    holders = Counter(gram for ngrams in names.values() for gram in ngrams)
    places = []
    for text, read in zip(texts, classes, strict=True):
        known, found = names[text.subject], []
        for token in range(text.answer.index(True)):
            ending = {tuple(read[max(0, token + 1 - n) : token + 1]) for n in {len(gram) for gram in known}}
            own = sorted(gram for gram in ending & known if holders[gram] == 1)
            if ending & known:
                found.append((bool(own), token, own or sorted(ending & known)))
        if not found:
            raise ValueError(
                f"{text.subject!r} is split into other tokens in one of its texts, so no record would be read "
                "there: write a space or the beginning of the text in front of it."
            )
        places.append(Place(*max(found)[1:]))
    return places


def whole_subjects(texts: list[FactText], places: list[Place], size: int) -> list[list[tuple[FactText, Place]]]:
    """Returns texts and places in groups of whole subjects, with at most `size` texts if no subject has more."""
    by_subject: dict[str, list] = {}
    for text, place in zip(texts, places, strict=True):
        by_subject.setdefault(text.subject, []).append((text, place))
    groups = [[]]
    for own in by_subject.values():
        if groups[-1] and len(groups[-1]) + len(own) > size:
            groups.append([])
        groups[-1] += own
    return groups


def solve(
    model,
    groups: list[list[tuple[FactText, Place]]],
    ngrams: Mapping[int, torch.Tensor],
    passes: int,
    seed: int,
    descend: Callable,
) -> tuple[dict[int, dict[int, torch.Tensor]], float]:
    """Returns the vectors of records by layer and order, and the mean of the answers' last losses.

    Args:
        model ([`EngramForCausalLM`]): whose weights are frozen.
        groups (`list`): from `whole_subjects`; a group is a batch.
        ngrams (`dict[int, torch.LongTensor]`): by order n, the n-grams of all places `(records, n)`.
        passes (`int`): steps of each delta.
        seed (`int`): of the order of texts, which decides which of them are compared with the model without the pack.
        descend (`Callable`): `descend(parameters, batches, steps, without)` lets parameters learn.
    """
    order, losses, wanted = random.Random(seed), [], {layer: [] for layer in model.memory.layer_ids}
    for group in groups:
        shared = _SharedDeltas(model, group)
        with shared.read():
            losses.append(descend(list(shared.deltas.values()), shared.batches(passes, order), passes, shared.off))
        for layer, deltas in shared.of_texts().items():
            wanted[layer].append(deltas)
    parts = {layer: torch.cat(own).unflatten(1, (len(ngrams), -1)) for layer, own in wanted.items()}
    # parts: (texts, orders, width)
    places, vectors = [place for group in groups for _, place in group], {layer: {} for layer in parts}
    for slot, (n, grams) in enumerate(sorted(ngrams.items())):
        number = {tuple(gram): record for record, gram in enumerate(grams.tolist())}
        read = [(row, number[gram]) for row, place in enumerate(places) for gram in place.ngrams if len(gram) == n]
        rows, records = torch.tensor(read, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)  # (reads,) each
        for layer, deltas in parts.items():
            vectors[layer][n] = ridge(records, deltas[rows, slot], len(grams), _RIDGE)
    return vectors, sum(losses) / len(losses)


def ridge(records: torch.Tensor, wanted: torch.Tensor, count: int, weight: float) -> torch.Tensor:
    """Returns the vectors of one order that minimise `sum |vectors[records] - wanted|^2 + weight * sum |vectors|^2`.

    A place reads at most one n-gram of an order, and each order has its own part of the memory vector. So the matrix of
    the normal equations is diagonal, and is solved exactly in the memory of its result.

    Args:
        records (`torch.LongTensor` of shape `(reads,)`): which record is read.
        wanted (`torch.Tensor` of shape `(reads, width)`): the part of a delta that it should give.
        count (`int`): number of records.
        weight (`float`): above 0 if a record may have no read.
    """
    sums = wanted.new_zeros(count, wanted.shape[1]).index_add(0, records, wanted)  # (records, width)
    reads = torch.bincount(records, minlength=count).to(wanted)  # (records,)
    return sums / (reads + weight)[:, None]


class _SharedDeltas:
    """Deltas of a group of subjects, which a model reads at the places of its texts."""

    def __init__(self, model, group: list[tuple[FactText, Place]]):
        self.memory, self.group = model.memory, group
        self.device, size = model.memory.hashing.token_map.device, model.config.engram_memory_dim
        self.rows = {subject: row for row, subject in enumerate(dict.fromkeys(text.subject for text, _ in group))}
        self.orders = range(2, model.config.engram_max_ngram_size + 1)
        self.width = size // len(self.orders)
        layers = model.memory.layer_ids
        self.deltas = {layer: nn.Parameter(torch.zeros(len(self.rows), size, device=self.device)) for layer in layers}
        self.reads = None  # of a batch: rows, tokens, deltas, and the parts of the memory vector that have a record

    def of_texts(self) -> dict[int, torch.Tensor]:
        """Returns the deltas of the group's texts `(texts, E)` by layer."""
        rows = [self.rows[text.subject] for text, _ in self.group]
        return {layer: deltas.detach().cpu()[rows] for layer, deltas in self.deltas.items()}

    def batches(self, steps: int, order: random.Random) -> Iterator[list[FactText]]:
        """Yields the group in a new order for each step; until the next one the deltas are read at its places."""
        for _ in range(steps):
            batch = order.sample(self.group, len(self.group))
            rows = [self.rows[text.subject] for text, _ in batch]
            tokens = [place.token for _, place in batch]
            held = [[any(len(gram) == n for gram in place.ngrams) for n in self.orders] for _, place in batch]
            parts = torch.tensor(held, device=self.device).repeat_interleave(self.width, 1)  # (batch, E)
            self.reads = *torch.tensor([range(len(batch)), tokens, rows], device=self.device), parts
            yield [text for text, _ in batch]

    @contextmanager
    def read(self):
        """Adds deltas to memory vectors while the block runs."""
        hooks = [
            self.memory.layers[str(layer)].register_forward_pre_hook(partial(self._add, layer)) for layer in self.deltas
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def off(self):
        """Reads no delta while the block runs."""
        reads, self.reads = self.reads, None
        try:
            yield
        finally:
            self.reads = reads

    def _add(self, layer: int, _, args: tuple) -> tuple | None:
        """Forward pre-hook of an Engram layer: adds deltas to its vectors `(batch, length, E)`."""
        if self.reads is None:
            return None
        stream, vectors, *rest = args
        rows, tokens, numbers, parts = (index.to(vectors.device) for index in self.reads)
        deltas = self.deltas[layer].to(vectors.device)[numbers] * parts  # (batch, E)
        return stream, vectors.float().index_put((rows, tokens), deltas, accumulate=True), *rest
