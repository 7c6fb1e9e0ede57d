"""Operations on knowledge packs: several become one, and two are compared.

What it chooses: a merged pack is what its packs are when a model reads all of them, in their order. An n-gram that
several packs hold is an error unless the caller says what it shall become, because one of two facts may be lost there.
Promises: the packs are not changed; every vector that only one pack holds keeps its bits. Never reads or writes a file.
Source: docs/packs.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..knowledge_pack_engram import FITS, KnowledgePack


CONFLICTS = ("refuse", "sum", "later")


def merge_packs(packs: Sequence[KnowledgePack], conflicts: str = "refuse") -> KnowledgePack:
    """Returns one pack with the records of several, in the order in which a model would read them.

    Args:
        packs (`list[KnowledgePack]`): packs of one memory and one mode.
        conflicts (`str`, *optional*, defaults to `"refuse"`):
            What becomes of an n-gram that several packs hold. "refuse" raises an error, "sum" adds the vectors (what
            packs with `mode="add"` do in a model), "later" keeps the last one's (what `mode="replace"` does).

    Returns:
        [`KnowledgePack`]; its provenance is `{"merged": [...]}`, with the provenance of each.

    Raises:
        `ValueError`: for packs of different memories or modes, n-grams that several hold, or a sum of packs that
            replace.

    Example:

    ```python
    >>> merged = merge_packs([KnowledgePack.load("people.engram-pack.safetensors"), places], conflicts="sum")
    ```"""
    if conflicts not in CONFLICTS:
        raise ValueError(f"conflicts={conflicts!r} must be one of {', '.join(map(repr, CONFLICTS))}.")
    if not packs:
        raise ValueError("there are no packs to merge: give at least one.")
    fits, mode = _shared_fits(packs), packs[0].mode
    if any(pack.mode != mode for pack in packs):
        raise ValueError(
            f"packs of the modes {[pack.mode for pack in packs]} make no single pack: a pack adds everywhere, or "
            "replaces everywhere. Merge those of one mode."
        )
    if mode == "replace" and conflicts == "sum":
        raise ValueError('packs with mode "replace" are not added in a model: conflicts="later" is what they do there.')
    joined = {order: _joined(packs, order) for order in packs[0].records}
    shared = sorted(tuple(gram) for grams, counts, _ in joined.values() for gram in grams[counts > 1].tolist())
    if shared and conflicts == "refuse":
        raise ValueError(
            f"{len(shared)} n-grams are in several of these packs: {_some(shared)}. Choose conflicts='sum' (vectors "
            "are added) or conflicts='later' (the last pack's stay), or remove them from a pack."
        )
    vectors = {
        layer: {
            order: _placed(packs, layer, order, slots, len(grams), conflicts == "sum")
            for order, (grams, _, slots) in joined.items()
        }
        for layer in fits["layers"]
    }
    ngrams = {order: grams for order, (grams, _, _) in joined.items()}
    return KnowledgePack(ngrams, vectors, fits, mode, {"merged": [pack.provenance for pack in packs]})


@dataclass(frozen=True)
class PackDifference:
    """What two packs do not share; false if they read the same.

    Args:
        only_first (`list[tuple[int, ...]]`): n-grams (token classes) of the first pack alone.
        only_second (`list[tuple[int, ...]]`): n-grams of the second pack alone.
        changed (`dict[tuple[int, ...], float]`): n-grams of both with other vectors, and the largest difference.
        modes (`tuple[str, str]`): the packs' modes.
    """

    only_first: list[tuple[int, ...]]
    only_second: list[tuple[int, ...]]
    changed: dict[tuple[int, ...], float]
    modes: tuple[str, str]

    def __bool__(self) -> bool:
        return bool(self.only_first or self.only_second or self.changed or self.modes[0] != self.modes[1])


def compare_packs(first: KnowledgePack, second: KnowledgePack) -> PackDifference:
    """Returns the records in which two packs of one memory differ. Their provenance is not compared.

    Raises:
        `ValueError`: for packs of different memories, whose n-grams and vectors mean different things.

    Example:

    ```python
    >>> compare_packs(pack, pack.without([(74, 234)])).only_first
    [(74, 234)]
    ```"""
    _shared_fits([first, second])
    only_first, only_second, changed = [], [], {}
    for order, (grams, counts, slots) in ((order, _joined([first, second], order)) for order in first.records):
        apart = torch.zeros(len(grams), device="cpu")  # (records,)
        for layer in first.fits["layers"]:
            one, other = (
                _placed([pack], layer, order, [own], len(grams), False)
                for pack, own in zip((first, second), slots, strict=True)
            )
            apart = torch.maximum(apart, (one - other).abs().amax(-1))
        held = torch.zeros(len(grams), dtype=torch.bool, device="cpu")  # (records,)
        held[slots[0]] = True
        only_first += map(tuple, grams[held & (counts == 1)].tolist())
        only_second += map(tuple, grams[~held].tolist())
        other = (counts > 1) & (apart > 0)
        changed |= dict(zip(map(tuple, grams[other].tolist()), apart[other].tolist(), strict=True))
    return PackDifference(only_first, only_second, changed, (first.mode, second.mode))


def _shared_fits(packs: Sequence[KnowledgePack]) -> dict:
    """Returns the memory that all packs fit; a pack without a reader fits every reader."""
    fits = dict(packs[0].fits)
    for number, pack in enumerate(packs[1:], start=2):
        fits["reader"] = pack.fits.get("reader") if fits.get("reader") is None else fits["reader"]
        different = [
            key
            for key in FITS
            if pack.fits.get(key) != fits.get(key) and not (key == "reader" and pack.fits.get(key) is None)
        ]
        if different:
            raise ValueError(
                f"pack {number} was made for another memory than the packs before it (other {', '.join(different)}): "
                "only packs that one model can load belong together."
            )
    return fits


def _joined(packs: Sequence[KnowledgePack], order: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Returns all n-grams of an order `(records, n)`, how many packs hold each, and where each pack's are."""
    held = [pack.records[order].ngrams for pack in packs]
    grams, slots, counts = torch.unique(
        torch.cat(held), dim=0, return_inverse=True, return_counts=True
    )  # (records, n); (sum of own records,); (records,)
    return grams, counts, list(slots.split([len(own) for own in held]))


def _placed(
    packs: Sequence[KnowledgePack], layer: int, order: int, slots: list[torch.Tensor], count: int, add: bool
) -> torch.Tensor:
    """Returns vectors `(count, width)` with each pack's at its slots; a later pack's replace or are added."""
    placed = torch.zeros(count, packs[0].fits["widths"][str(order)], device="cpu")  # (count, width)
    filled = torch.zeros(count, 1, dtype=torch.bool, device="cpu")
    for pack, own in zip(packs, slots, strict=True):
        rows = pack.records[order].vectors[layer]  # (own records, width)
        placed[own] = torch.where(filled[own], placed[own] + rows, rows) if add else rows
        filled[own] = True
    return placed


def _some(ngrams: list[tuple[int, ...]]) -> str:
    """Returns the first n-grams as text."""
    return ", ".join(map(str, ngrams[:5])) + (", ..." if len(ngrams) > 5 else "")
