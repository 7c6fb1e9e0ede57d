"""How a corpus uses the rows of a memory: occupancy, collisions, frequent rows, and who else reads a row.

Promises: addresses are those of the model, and every count is exact; no table is read and no forward pass is run, so
tables may be anywhere. A corpus is read once and text by text. What is kept are its distinct n-grams (8 bytes for each
token of each) and, for one head at a time, two counts for each row. Never writes.
Source: Engram (arXiv 2601.07372), section 2.2 (several heads, so that n-grams which share one row do not share all).
"""

from collections.abc import Iterable, Iterator

import torch

from ..hash_tokens_engram import token_key


GATHERED = 1 << 18  # positions that are gathered before they are merged with the n-grams of before
HASHED = 1 << 16  # n-grams that are hashed at once


class CorpusNgrams:
    """The distinct n-grams of a corpus, in token classes, and how often each was read.

    Args:
        model ([`EngramForCausalLM`]): whose token map and orders count.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        texts (iterable of `str`): read once, each text alone.

    Raises:
        `ValueError`: if the texts have no token.
    """

    def __init__(self, model, tokenizer, texts: Iterable[str]):
        self.hasher, self.tokenizer = model.memory.hashing, tokenizer
        self.orders = range(2, self.hasher.context_length + 2)
        self.by_order: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (U, order) newest last, (U,)
        self.tokens, waiting, size = 0, [], 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long, device=self.hasher.token_map.device)
            read = self.hasher.lookback(self.hasher.compress(ids))[:, 0].cpu()  # (N, length)
            waiting.append(read)
            size, self.tokens = size + read.shape[1], self.tokens + read.shape[1]
            if size >= GATHERED:
                self._merge(torch.cat(waiting, 1))
                waiting, size = [], 0
        if not self.tokens:
            raise ValueError("the texts have no token: give a corpus that is not empty.")
        if waiting:
            self._merge(torch.cat(waiting, 1))

    def _merge(self, read: torch.Tensor) -> None:
        """Adds n-grams `(N, length)`, newest class first."""
        for order in self.orders:
            ngrams = read[:order].flip(0).T  # (length, order)
            counts = ngrams.new_ones(len(ngrams))  # (length,)
            if order in self.by_order:
                before, counted = self.by_order[order]
                ngrams, counts = torch.cat([before, ngrams]), torch.cat([counted, counts])
            distinct, place = torch.unique(ngrams, dim=0, return_inverse=True)  # (U, order), (length,)
            self.by_order[order] = distinct, counts.new_zeros(len(distinct)).index_add_(0, place, counts)

    def hashes(self, order: int) -> Iterator[torch.Tensor]:
        """Yields the rows `(layers, n-grams, heads)` of an order's n-grams, counted from the first of each head."""
        for ngrams in self.by_order[order][0].split(HASHED):
            read = ngrams.new_zeros(self.hasher.context_length + 1, len(ngrams))  # (N, n-grams)
            read[:order] = ngrams.flip(1).T  # older classes change only the longer orders
            hashed = self.hasher.hash_lookback(read[:, None].to(self.hasher.token_map.device))
            yield hashed[:, 0, :, order - 2].cpu()

    def words(self, ngram: torch.Tensor) -> str:
        """Returns an n-gram of classes as text; a class reads as what its tokens have in common."""
        if not hasattr(self, "_example"):
            self._example = {own: token for token, own in enumerate(self.hasher.token_map.tolist())}
        return " ".join(token_key(self.tokenizer, self._example[own]) for own in ngram.tolist())


def row_use(corpus: CorpusNgrams, hot: int = 10) -> list[dict]:
    """Returns how the rows of every layer and order are used by a corpus.

    Args:
        corpus ([`CorpusNgrams`]): the n-grams of a corpus.
        hot (`int`, *optional*, defaults to 10): most frequent rows to name.

    Returns:
        `list[dict]`: `"layer"`, `"order"`, `"ngrams"` (distinct ones) and `"rows"` (of all heads); `"occupancy"`, the
        share of rows that any n-gram reads; `"most_ngrams"` on one row; `"collide"`, the shares of n-grams that share
        their row with another one in 0, 1, ... of the heads; `"reads"`, how often the row of rank 1, 2, 4, ... is read
        (all heads together); `"hot"`, the most frequent rows with up to three n-grams each.

    Example:

    ```python
    >>> from engram_transformers.inspection import CorpusNgrams, row_use

    >>> row_use(CorpusNgrams(model, tokenizer, open("corpus.txt")))[0]["occupancy"]
    0.09
    ```"""
    found = []
    for order in corpus.orders:
        hashes = torch.cat(list(corpus.hashes(order)), 1)  # (layers, U, heads)
        for number, layer in enumerate(corpus.hasher.layer_ids):
            primes = corpus.hasher.primes[number, order - 2].tolist()
            found.append({"layer": layer, "order": order, **_order_use(corpus, order, hashes[number], primes, hot)})
    return sorted(found, key=lambda one: (one["layer"], one["order"]))


def _order_use(corpus: CorpusNgrams, order: int, hashes: torch.Tensor, primes: list[int], hot: int) -> dict:
    """Returns how n-grams with `hashes` `(U, heads)` use the rows of one layer and order."""
    ngrams, counts = corpus.by_order[order]
    shared = counts.new_zeros(len(ngrams))  # heads in which an n-gram is not alone
    occupied, most, reads, hottest = 0, 0, [], []
    for head, (rows, prime) in enumerate(zip(hashes.unbind(1), primes, strict=True)):
        distinct = torch.bincount(rows, minlength=prime)  # (rows of the head,)
        read = counts.new_zeros(prime).index_add_(0, rows, counts)  # (rows of the head,)
        shared += distinct[rows] > 1
        occupied, most = occupied + int((distinct > 0).sum()), max(most, int(distinct.max()))
        reads.append(read[read > 0])
        top = read.topk(min(hot, prime))
        hottest += [(count, head, row) for count, row in zip(*map(torch.Tensor.tolist, top), strict=True) if count]
    ranked = torch.cat(reads).sort(descending=True).values
    ranks = [2**power for power in range(len(ranked).bit_length())]
    shares = torch.bincount(shared, minlength=len(primes) + 1).double() / len(ngrams)
    named = []
    for count, head, row in sorted(hottest, reverse=True)[:hot]:
        own = (hashes[:, head] == row).nonzero().flatten()
        own = own[counts[own].argsort(descending=True)][:3]
        named.append({"head": head, "row": row, "reads": count, "ngrams": [corpus.words(ngrams[i]) for i in own]})
    return {
        "ngrams": len(ngrams),
        "rows": sum(primes),
        "occupancy": occupied / sum(primes),
        "most_ngrams": most,
        "collide": shares.tolist(),
        "reads": {rank: int(ranked[rank - 1]) for rank in ranks},
        "hot": named,
    }


def sharers(corpus: CorpusNgrams, reads, most: int = 3) -> dict[tuple[int, int, int], list[str]]:
    """Returns which n-grams of a corpus read the rows that a text reads.

    Args:
        corpus ([`CorpusNgrams`]): the n-grams of a corpus.
        reads ([`TextReads`]): from [`read_text`].
        most (`int`, *optional*, defaults to 3): n-grams to name for a row, the most frequent first.

    Returns:
        `dict`: texts of n-grams by (layer, order, row counted from the first of its order). The text's own n-gram is
        among them if the corpus holds it.
    """
    found: dict[tuple[int, int, int], list[str]] = {}
    for order in corpus.orders:
        ngrams, counts = corpus.by_order[order]
        for number, layer in enumerate(reads.layer_ids):
            offsets = corpus.hasher.offsets[number, order - 2].cpu()
            rows = torch.cat([hashed[number] for hashed in corpus.hashes(order)]) + offsets - offsets[0]  # (U, heads)
            wanted = torch.isin(rows, reads.rows[number, :, order - 2].unique())  # (U, heads)
            holders: dict[int, list[int]] = {}
            for place, head in wanted.nonzero().tolist():
                holders.setdefault(int(rows[place, head]), []).append(place)
            for row, places in holders.items():
                places.sort(key=lambda place: -int(counts[place]))
                found[layer, order, row] = [corpus.words(ngrams[place]) for place in places[:most]]
    return found
