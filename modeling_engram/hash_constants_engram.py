"""Hash constants: multipliers, head sizes and offsets, which determine the row of every n-gram.

Promises: they derive only from the configuration, equally on every machine and in every version. A checkpoint stores
them and a model uses the stored ones; `check_constants` refuses stored constants that cannot belong to the
configuration. Never reads a file.
Source: Engram (arXiv 2601.07372), section 2.2; the demo's NgramHashMapping for multipliers and the order of the primes;
`Qwen4ExpTextNGramEmbedding` of Transformers for Qwen4-Exp's multipliers (splitmix64). Its primes are the demo's.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from .configuration_engram import EngramFormatError
from .hash_tokens_engram import DEAD


INT64_MAX = 2**63 - 1

# Distance between the random streams of two layers (the demo's constant).
LAYER_SEED_STEP = 10007

# Distance between two states of splitmix64.
SPLITMIX_STEP = 0x9E3779B97F4A7C15

# Deterministic Miller-Rabin bases for every integer below 3.3e24.
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    """Whether `n` is prime; exact for every int64."""
    if n < 2:
        return False
    for p in WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in WITNESSES:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def multiplier_bound(compressed_vocab_size: int) -> int:
    """Exclusive upper bound of half a multiplier: no class below V' times a multiplier overflows int64."""
    return max(1, (INT64_MAX // compressed_vocab_size) // 2)


def derive_multipliers(layer_ids: list[int], orders: int, compressed_vocab_size: int, seed: int) -> np.ndarray:
    """Derives odd int64 multipliers `(layers, N)`; entry i belongs to the token i positions back.

    The bound on products depends on the number of classes, `compressed_vocab_size` (V').
    """
    bound = multiplier_bound(compressed_vocab_size)
    streams = (np.random.default_rng(seed + LAYER_SEED_STEP * layer) for layer in layer_ids)
    return np.stack([2 * rng.integers(0, bound, size=orders, dtype=np.int64) + 1 for rng in streams])


def derive_qwen_multipliers(layers: int, orders: int, compressed_vocab_size: int, seed: int) -> np.ndarray:
    """As `derive_multipliers`, with Qwen4-Exp's random numbers, whose streams count Engram layers from 0."""
    bound = multiplier_bound(compressed_vocab_size)
    multipliers = np.zeros((layers, orders), dtype=np.int64)
    for layer, place in np.ndindex(multipliers.shape):
        state = seed + LAYER_SEED_STEP * layer + SPLITMIX_STEP * (place + 1)
        multipliers[layer, place] = 2 * (_splitmix64(state) % bound) + 1
    return multipliers


def _splitmix64(state: int) -> int:
    """Returns the random 64-bit number that follows a state (splitmix64)."""
    mask = 2**64 - 1
    mixed = (state + SPLITMIX_STEP) & mask
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    return mixed ^ mixed >> 31


def derive_primes(layers: int, vocab_sizes: list[int], heads: int) -> np.ndarray:
    """Derives the rows of every head, int64 of shape `(layers, orders, heads)`.

    They are ascending primes from the order's size in `vocab_sizes` on, none used twice in the model.
    """
    seen: set[int] = set()
    primes = np.zeros((layers, len(vocab_sizes), heads), dtype=np.int64)
    for layer, order, head in np.ndindex(primes.shape):
        candidate = vocab_sizes[order] if head == 0 else int(primes[layer, order, head - 1]) + 1
        while candidate in seen or not is_prime(candidate):
            candidate += 1
        seen.add(candidate)
        primes[layer, order, head] = candidate
    return primes


@dataclass(frozen=True)
class HashConstants:
    """Constants that turn classes into rows, as tensors of int64.

    Args:
        multipliers (`torch.LongTensor` of shape `(layers, N)`): odd factors by look-back distance.
        primes (`torch.LongTensor` of shape `(layers, orders, heads)`): rows of every head.
        offsets (`torch.LongTensor` of shape `(layers, orders, heads)`): first row of every head in its layer.
        pad_class (`torch.LongTensor` of shape `(1,)`): class that stands for "nothing".
    """

    multipliers: torch.Tensor
    primes: torch.Tensor
    offsets: torch.Tensor
    pad_class: torch.Tensor

    def named(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by their names in a checkpoint."""
        return {
            "multipliers": self.multipliers,
            "primes": self.primes,
            "offsets": self.offsets,
            "pad_class": self.pad_class,
        }

    def order_rows(self) -> list[list[int]]:
        """Returns the rows of every order, for each layer."""
        return self.primes.sum(-1).tolist()

    def sha256(self) -> str:
        """SHA-256 over name, shape and little-endian int64 entries of each tensor, in the order of `named()`."""
        digest = hashlib.sha256()
        for name, tensor in self.named().items():
            digest.update(f"{name}:{','.join(map(str, tensor.shape))};".encode())
            digest.update(tensor.cpu().contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def head_offsets(primes: torch.Tensor) -> torch.Tensor:
    """Returns the first row of every head: the exclusive sum of rows in (order, head) order, for each layer."""
    flat = primes.flatten(1)  # (layers, orders * heads)
    return (flat.cumsum(1) - flat).view_as(primes)  # (layers, orders, heads)


def derive_constants(config, token_map: torch.Tensor | None) -> HashConstants:
    """Derives all hash constants from a configuration and a token map `(vocab_size,)`; without one every id is a class.

    Raises:
        `ValueError`: if the pad id is dead in the token map.
    """
    layers, orders = config.engram_layer_ids, config.engram_orders
    sizes = (config.engram_max_ngram_size, config.engram_compressed_vocab_size, config.engram_seed)
    if config.engram_hash_scheme == "qwen":
        multipliers = derive_qwen_multipliers(len(layers), *sizes)
    else:
        multipliers = derive_multipliers(layers, *sizes)
    if config.engram_hash_scheme == "one_row":
        primes = np.ones((len(layers), len(orders), config.engram_n_heads), dtype=np.int64)
    else:
        primes = derive_primes(len(layers), config.engram_vocab_sizes, config.engram_n_heads)
    pad_class = config.engram_pad_token_id if token_map is None else int(token_map[config.engram_pad_token_id])
    if pad_class == DEAD:
        raise ValueError(
            f"engram_pad_token_id={config.engram_pad_token_id} has no entry in the tokenizer: name an id that has one."
        )
    primes = torch.from_numpy(primes)
    return HashConstants(
        torch.from_numpy(multipliers),
        primes,
        head_offsets(primes),
        torch.tensor([pad_class], dtype=torch.int64, device="cpu"),
    )


def check_constants(constants: HashConstants, config) -> None:
    """Raises EngramFormatError for stored constants that cannot belong to the configuration."""
    if config.engram_hash_sha256 not in (None, constants.sha256()):
        raise EngramFormatError(
            f"the stored hash constants have SHA-256 {constants.sha256()[:16]}..., config.json says "
            f"{config.engram_hash_sha256[:16]}...: they belong to another checkpoint. Restore the "
            "`model-*.safetensors` files that were saved together with this config.json."
        )
    multipliers, primes = constants.multipliers.cpu(), constants.primes.cpu()
    bound = 2 * multiplier_bound(config.engram_compressed_vocab_size)
    bad = multipliers[(multipliers % 2 == 0) | (multipliers < 1) | (multipliers >= bound)]
    if len(bad):
        raise EngramFormatError(
            f"stored hash multiplier {int(bad[0])} must be odd, positive and below {bound} for "
            f"{config.engram_compressed_vocab_size} classes: the file is damaged, restore it."
        )
    if config.engram_hash_scheme != "one_row":
        _check_primes(primes, config.engram_vocab_sizes)
    elif not bool((primes == 1).all()):
        raise EngramFormatError(
            "engram_hash_scheme='one_row' needs one row in every head: restore the file that holds them."
        )
    if not torch.equal(constants.offsets.cpu(), head_offsets(primes)):
        raise EngramFormatError(
            "stored head offsets are not the sums of the head sizes: restore the file that holds them."
        )
    if not 0 <= int(constants.pad_class) < config.engram_compressed_vocab_size:
        raise EngramFormatError(
            f"stored pad class {int(constants.pad_class)} is outside the {config.engram_compressed_vocab_size} "
            "classes: restore the file that holds them."
        )


def _check_primes(primes: torch.Tensor, vocab_sizes: list[int]) -> None:
    """Checks that head sizes `(layers, orders, heads)` are prime, distinct and at least their order's size."""
    flat = primes.flatten().tolist()
    for size in flat:
        if not is_prime(size):
            raise EngramFormatError(f"stored head size {size} is not prime: restore the file that holds them.")
    if len(set(flat)) != len(flat):
        raise EngramFormatError("two heads have the same number of rows: restore the file that holds them.")
    for order, least in enumerate(vocab_sizes):
        smallest = int(primes[:, order].min())
        if smallest < least:
            raise EngramFormatError(
                f"a head of order {order + 2} has {smallest} rows, engram_vocab_size asks for at least {least}: config "
                "and weight files belong to different checkpoints."
            )
