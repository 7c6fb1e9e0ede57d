"""Packs of random records, which the tests of packs share."""

import torch
from transformers import PreTrainedModel

from engram_transformers.knowledge_pack_engram import KnowledgePack, pack_identity


def classes_of(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    """Token classes of one text of ids `(length,)`."""
    return model.memory.hashing.compress(ids[None])[0].tolist()


def ngrams_in(classes: list[int], orders=(2, 3)) -> set[tuple[int, ...]]:
    """All n-grams of a text, found in plain Python."""
    return {tuple(classes[i : i + n]) for n in orders for i in range(len(classes) - n + 1)}


def pack_of(model: PreTrainedModel, ngrams, seed: int = 0, **kwargs) -> KnowledgePack:
    """A pack of random vectors, large enough for every match to reach the logits."""
    fits = pack_identity(model.config, model.memory.layers)
    generator = torch.Generator().manual_seed(seed)
    by_order = {int(n): sorted(gram for gram in ngrams if len(gram) == int(n)) for n in fits["widths"]}
    grams = {n: torch.tensor(found, dtype=torch.int64).view(-1, n) for n, found in by_order.items()}
    vectors = {
        layer: {n: 3 * torch.randn(len(grams[n]), fits["widths"][str(n)], generator=generator) for n in grams}
        for layer in fits["layers"]
    }
    return KnowledgePack(grams, vectors, fits, **kwargs)
