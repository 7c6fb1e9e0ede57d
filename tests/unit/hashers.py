"""Small hashers over 60 ids, batches for them, and their hashes by the naive twin."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from engram_transformers.hash_constants_engram import HashConstants, derive_multipliers, derive_primes, head_offsets
from engram_transformers.hash_ngrams_engram import NgramHasher, naive_hash_ids
from engram_transformers.hash_tokens_engram import DEAD


VOCABULARY = 60


@dataclass
class Case:
    """A hasher and a batch for it."""

    hasher: NgramHasher
    ids: torch.Tensor
    alive: torch.Tensor

    @property
    def n(self) -> int:
        return self.hasher.context_length + 1

    @property
    def classes(self) -> torch.Tensor:
        return self.hasher.compress(self.ids, self.alive)


def make_hasher(n: int, heads: int, layers=(1, 4), classes: int = 40, dead_ids: int = 3, seed: int = 0) -> NgramHasher:
    """A hasher over 60 ids in `classes` classes; the last `dead_ids` ids have no tokenizer entry."""
    primes = torch.from_numpy(derive_primes(len(layers), [11] * (n - 1), heads))
    multipliers = torch.from_numpy(derive_multipliers(list(layers), n, classes, seed))
    token_map = torch.arange(VOCABULARY) % classes
    token_map[VOCABULARY - dead_ids :] = DEAD
    return NgramHasher(
        list(layers), token_map, HashConstants(multipliers, primes, head_offsets(primes), torch.tensor([2]))
    )


@st.composite
def cases(draw, max_length: int = 64, pads: bool = True) -> Case:
    """Orders 2 to 4, 1 to 5 texts of 1 to 64 ids, with ids that are dead and positions that are pads anywhere."""
    n, heads = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    batch, length = draw(st.integers(1, 5)), draw(st.integers(1, max_length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    share = draw(st.sampled_from([0.0, 0.1, 0.5])) if pads else 0.0
    alive = torch.rand(batch, length, generator=generator) >= share
    return Case(make_hasher(n, heads, seed=draw(st.integers(0, 5))), ids, alive)


def naive(hasher: NgramHasher, classes: torch.Tensor) -> torch.Tensor:
    """`(layers, batch, length, orders, heads)` hashes by the naive twin."""
    shape = (len(hasher.layer_ids), *classes.shape, *hasher.primes.shape[1:])
    pad_class = int(hasher.pad_class)
    hashes = [
        naive_hash_ids(text, multipliers, primes, pad_class)
        for multipliers, primes in zip(hasher.multipliers.tolist(), hasher.primes.tolist(), strict=True)
        for text in classes.tolist()
    ]
    return torch.tensor(hashes).view(shape)


def all_inside(hasher: NgramHasher, rows: torch.Tensor) -> bool:
    """Whether every row, counted from the first of its order, belongs to its head."""
    first = hasher.offsets - hasher.offsets[:, :, :1]  # (layers, orders, heads)
    return bool(((rows >= first[:, None, None]) & (rows < (first + hasher.primes)[:, None, None])).all())
