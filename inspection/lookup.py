"""One n-gram in a memory: its rows, the rows that are most like them, its records, and what they do to the next token.

Promises: a table is read once, block by block, wherever it is; the model is afterwards what it was. Never writes a row.
Source: docs/inspection.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..rows_quantised_engram import vectors_of
from .ablation import without_packs
from .corpus_use import CorpusNgrams, sharers
from .text_reads import TextReads, read_text


BLOCK = 1 << 16  # rows of a table that are compared at once


@dataclass
class RowFound:
    """One row of an n-gram.

    Args:
        layer (`int`): the Engram layer.
        order (`int`): tokens of the n-gram.
        head (`int`): the head.
        row (`int`): counted from the first row of its order.
        norm (`float`): L2 norm; 0 if it was never trained.
        neighbours (`list[tuple[int, float]]`): other rows of the head and their cosines, the most similar first.
        sharers (`list[str]`): n-grams of a corpus that read it.
    """

    layer: int
    order: int
    head: int
    row: int
    norm: float
    neighbours: list[tuple[int, float]]
    sharers: list[str]


@dataclass
class LookUp:
    """What a memory holds for the n-grams that end with a text.

    Args:
        reads ([`TextReads`]): the text's reads.
        rows (`list[RowFound]`): rows of the last token.
        next_tokens (`dict[str, list[tuple[str, float]]]`): the most probable next tokens with their probabilities:
            "as it is", "without these rows", and with active packs "without packs".
        kl (`dict[str, float]`): KL divergence of the others from "as it is", in nats.
    """

    reads: TextReads
    rows: list[RowFound]
    next_tokens: dict[str, list[tuple[str, float]]]
    kl: dict[str, float]


@torch.no_grad()
def look_up(model, tokenizer, text: str, corpus: CorpusNgrams | None = None, most: int = 3) -> LookUp:
    """Looks up the n-grams that end with a text.

    Args:
        model ([`EngramForCausalLM`]): with a loaded memory, in eager mode.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        text (`str`): such as "Princess of Wales".
        corpus ([`CorpusNgrams`], *optional*): in which other readers of the rows are looked for.
        most (`int`, *optional*, defaults to 3): neighbours of a row, and n-grams of a corpus.

    Returns:
        [`LookUp`].

    Raises:
        `ValueError`: for a text without tokens, or a model whose memory is not loaded.

    Example:

    ```python
    >>> from engram_transformers.inspection import look_up

    >>> look_up(model, tokenizer, "Princess of Wales").kl["without these rows"]
    0.0
    ```"""
    reads = read_text(model, tokenizer, text)
    found = []
    for number, layer in enumerate(reads.layer_ids):
        for order in range(2, 2 + reads.rows.shape[2]):
            rows = reads.rows[number, -1, order - 2]  # (heads,)
            norms, neighbours = _like(model, number, layer, order, rows, most)
            for head, row in enumerate(rows.tolist()):
                found.append(RowFound(layer, order, head, row, norms[head], neighbours[head], []))
    if corpus is not None:
        _name_sharers(corpus, reads, found, most)
    ways = {"as it is": nullcontext, "without these rows": lambda: _without_last_rows(model)}
    if model.active_memories:
        ways["without packs"] = lambda: without_packs(model)
    ids = torch.tensor([reads.ids], device=model.device)  # (1, length)
    scores = {}
    for name, way in ways.items():
        with way():
            scores[name] = model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)  # (V,)
    next_tokens = {}
    for name, one in scores.items():
        top = one.topk(5)
        words = [tokenizer.decode([token]) for token in top.indices.tolist()]
        next_tokens[name] = list(zip(words, top.values.exp().tolist(), strict=True))
    full = scores.pop("as it is")
    kl = {name: float(F.kl_div(one, full, reduction="sum", log_target=True)) for name, one in scores.items()}
    return LookUp(reads, found, next_tokens, kl)


def _like(
    model, number: int, layer: int, order: int, rows: torch.Tensor, most: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Returns the norms of rows `(heads,)` of an order, and the rows of each head that are most like them."""
    hasher, table = model.memory.hashing, model.memory.tables[str(layer)]
    offsets = hasher.offsets[number, order - 2].cpu()
    begins = offsets - offsets[0]  # (heads,)
    ends = begins + hasher.primes[number, order - 2].cpu()
    parts = table.orders()[order - 2].tensors()
    own = torch.cat([vectors_of(block, table.dtype, table.width) for block in _picked(parts, rows)]).float()
    best = [(own.new_empty(0), rows.new_empty(0))] * len(rows)
    first = 0
    for part in parts:
        for block in part.detach().split(BLOCK):
            values = F.normalize(vectors_of(block.cpu(), table.dtype, table.width).float(), dim=-1)  # (block, width)
            cosines = values @ F.normalize(own, dim=-1).T  # (block, heads)
            numbers = torch.arange(first, first + len(block), device="cpu")
            for head in range(len(rows)):
                inside = (numbers >= begins[head]) & (numbers < ends[head]) & (numbers != rows[head])
                merged = torch.cat([best[head][0], cosines[inside, head]]), torch.cat([best[head][1], numbers[inside]])
                top = merged[0].topk(min(most, len(merged[0])))
                best[head] = top.values, merged[1][top.indices]
            first += len(block)
    neighbours = [[(int(row), float(cosine)) for cosine, row in zip(*one, strict=True) if cosine > 0] for one in best]
    return own.norm(dim=-1).tolist(), neighbours


def _picked(parts: list[torch.Tensor], rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields rows `(heads,)`, counted over all parts, one by one, as they are stored `(1, stored width)`."""
    for row in rows.tolist():
        for part in parts:
            if row < len(part):
                yield part.detach()[row : row + 1].cpu()
                break
            row -= len(part)


def _name_sharers(corpus: CorpusNgrams, reads: TextReads, found: list[RowFound], most: int) -> None:
    """Fills in which n-grams of a corpus read the rows."""
    shared = sharers(corpus, reads, most)
    for one in found:
        one.sharers = shared.get((one.layer, one.order, one.row), [])


@contextmanager
def _without_last_rows(model) -> Iterator[None]:
    """Reads zeros in place of the rows of a text's last token; its records are still read."""

    def through(_, given: tuple, vectors: torch.Tensor) -> torch.Tensor:
        vectors = vectors.clone()
        vectors[:, -1] = 0
        return vectors

    hooks = [table.register_forward_hook(through) for table in model.memory.tables.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
