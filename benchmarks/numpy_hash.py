"""The hash of DeepSeek's January demo in NumPy, in our own words: what `hash` compares ours with.

Promises: the demo's procedure and its order of work (ids compressed by a look-up, shifts made by padding, products
XOR-ed order by order, one remainder a head, layer by layer), and the same integers as ours at the start of a text.
Source: the demo `engram_demo_v1.py` (CompressedTokenizer, NgramHashMapping).
"""

import numpy as np

from engram_transformers.hash_ngrams_engram import NgramHasher


class NumpyHash:
    """The demo's way to the hashes of all layers.

    Args:
        hasher ([`NgramHasher`]): whose constants and token map are taken over.
    """

    def __init__(self, hasher: NgramHasher):
        constants = hasher.constants
        self.lookup = hasher.token_map.numpy()
        self.pad_class = int(constants.pad_class)
        self.multipliers = dict(zip(hasher.layer_ids, constants.multipliers.numpy(), strict=True))
        self.primes = dict(zip(hasher.layer_ids, constants.primes.tolist(), strict=True))

    def compress(self, ids: np.ndarray) -> np.ndarray:
        """Classes of ids; negative ids stay as they are."""
        classes = ids.astype(np.int64, copy=True)
        text = classes >= 0
        classes[text] = self.lookup[classes[text]]
        return classes

    def layer(self, classes: np.ndarray, layer_id: int) -> np.ndarray:
        """Hashes of one layer, `(batch, length, orders * heads)`, from classes `(batch, length)`."""
        multipliers, length = self.multipliers[layer_id], classes.shape[1]
        shifted = [classes]
        for back in range(1, len(multipliers)):
            padded = np.pad(classes, ((0, 0), (back, 0)), mode="constant", constant_values=self.pad_class)
            shifted.append(padded[:, :length])
        hashes = []
        for order, primes in enumerate(self.primes[layer_id], start=2):
            mix = shifted[0] * multipliers[0]
            for back in range(1, order):
                mix = np.bitwise_xor(mix, shifted[back] * multipliers[back])
            for prime in primes:
                hashes.append((mix % prime).astype(np.int64, copy=False))
        return np.stack(hashes, axis=2)

    def __call__(self, ids: np.ndarray) -> dict[int, np.ndarray]:
        """Hashes of every layer from ids `(batch, length)`."""
        classes = self.compress(ids)
        return {layer_id: self.layer(classes, layer_id) for layer_id in self.multipliers}
