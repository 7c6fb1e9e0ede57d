"""Hash constants: the multipliers, head sizes and offsets that decide where every row of a memory lies.

Promises: derived from the configuration alone, the same everywhere and in every version; head sizes of 16 million rows
are found in milliseconds. A checkpoint stores them and a model uses the stored ones; `check_constants` refuses stored
constants that cannot belong to the configuration. Never reads a file.
Source: Engram (arXiv 2601.07372), section 2.2; the demo's NgramHashMapping for multipliers and the order of the primes.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from .compression_engram import DEAD
from .configuration_engram import EngramFormatError


INT64_MAX = 2**63 - 1

# Distance between the random streams of two layers (the demo's constant).
LAYER_SEED_STEP = 10007

# Rows of a head below which remainders by multiplication are proven exact; see `QuickRemainders`.
MOST_QUICK_ROWS = 2**30

# Where an int64 is cut in two for them: 18 bits with the sign, and 46 without.
CUT = 46

# A float64 from 2**52 up to 2**53 holds an integer in its lowest 52 bits, behind these.
FIRST_WHOLE, FIRST_WHOLE_BITS = 2.0**52, 0x4330_0000_0000_0000

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
    """Exclusive upper bound of the random halves: no product of one of the V' classes and a multiplier leaves int64."""
    return max(1, (INT64_MAX // compressed_vocab_size) // 2)


def derive_multipliers(layer_ids: list[int], orders: int, compressed_vocab_size: int, seed: int) -> np.ndarray:
    """Odd multipliers, one for each look-back distance.

    Args:
        layer_ids (`list[int]`): Engram layers, counted from 0.
        orders (`int`): longest n-gram N.
        compressed_vocab_size (`int`): classes V'.
        seed (`int`): `engram_seed`.

    Returns:
        `np.ndarray` of int64 and shape `(layers, N)`; entry i belongs to the token i places back.
    """
    bound = multiplier_bound(compressed_vocab_size)
    streams = (np.random.default_rng(seed + LAYER_SEED_STEP * layer) for layer in layer_ids)
    return np.stack([2 * rng.integers(0, bound, size=orders, dtype=np.int64) + 1 for rng in streams])


def derive_primes(layers: int, vocab_sizes: list[int], heads: int) -> np.ndarray:
    """Rows of every head: ascending primes from the order's size on, none used twice in the whole model.

    Args:
        layers (`int`): number of Engram layers.
        vocab_sizes (`list[int]`): least rows of a head, one entry for each order.
        heads (`int`): heads for each order.

    Returns:
        `np.ndarray` of int64 and shape `(layers, orders, heads)`.
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
    """What turns classes into rows, as tensors of int64.

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
        """The tensors under the names that a checkpoint gives them."""
        return {
            "multipliers": self.multipliers,
            "primes": self.primes,
            "offsets": self.offsets,
            "pad_class": self.pad_class,
        }

    def order_rows(self) -> list[list[int]]:
        """Rows of every order, for each layer."""
        return self.primes.sum(-1).tolist()

    def sha256(self) -> str:
        """SHA-256 over name, shape and little-endian int64 entries of each tensor, in the order of `named()`."""
        digest = hashlib.sha256()
        for name, tensor in self.named().items():
            digest.update(f"{name}:{','.join(map(str, tensor.shape))};".encode())
            digest.update(tensor.cpu().contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def head_offsets(primes: torch.Tensor) -> torch.Tensor:
    """First row of every head: exclusive sum of the rows before it in (order, head) order, for each layer."""
    flat = primes.flatten(1)  # (layers, orders * heads)
    return (flat.cumsum(1) - flat).view_as(primes)  # (layers, orders, heads)


class QuickRemainders:
    """Remainders of many integers by each head's rows, plus a first row, without a division. For CPUs.

    An integer x from 0 is h * 2**46 + l, with h below 2**17 and l below 2**46. With c the remainder of 2**46 by p,
    x / p and t = h * (c / p) + l / p have the same fraction, r / p for the remainder r. In float64 h * (c / p) +
    (l + 1 / 4) / p is worked out; its fraction times p is r + 1 / 4, and r when rounded to the nearest integer, if the
    sum is off by less than 1 / (4 p). It is: the first product and its coefficient are off by 2**-37 each, the second
    and its coefficient by 2**-7 / p each, their sum by 2**-36 + 2**-7 / p. Times p < 2**30 that is 0.055 together.

    Each step is one elementwise operator: a product of matrices would do three of them at once, and wake the threads of
    its library for a few microseconds of work (14 milliseconds where another process has the cores).

    Args:
        primes (`torch.LongTensor` of shape `(layers, orders, heads)`): rows of every head, below `MOST_QUICK_ROWS`.
        starts (`torch.LongTensor` of shape `(layers, orders, heads)`): what is added to the remainders, from 0.
    """

    def __init__(self, primes: torch.Tensor, starts: torch.Tensor):
        of_high = [float(Fraction(2**CUT % p, p)) for p in primes.flatten().tolist()]
        of_low = [float(Fraction(1, p)) for p in primes.flatten().tolist()]
        terms = [torch.tensor(of, dtype=torch.float64, device=primes.device) for of in (of_high, of_low)]
        terms = [term.view(primes.shape) for term in terms]  # (layers, orders, heads)
        terms += [primes.double(), starts.double() + FIRST_WHOLE]
        self.heads = primes.shape
        self.layers = list(zip(*(term[..., None].unbind() for term in terms), strict=True))

    def __call__(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Of every number the remainder by every head of its layer and order, and the head's start.

        Args:
            numbers (`torch.LongTensor` of shape `(layers, orders, numbers)`): integers from 0.

        Returns:
            `torch.LongTensor` of shape `(layers, orders, heads, numbers)`.
        """
        numbers = numbers[:, :, None]  # (layers, orders, 1, numbers)
        highs, lows = (numbers >> CUT).double(), (numbers & (2**CUT - 1)).double().add_(0.25)
        shape = (*self.heads, numbers.shape[-1])
        made = torch.empty(shape, dtype=torch.float64, device=numbers.device)
        # Layer by layer, so that 2048 tokens and 16 heads are just few enough for torch not to wake its other threads.
        for rows, high, low, terms in zip(made.unbind(), highs.unbind(), lows.unbind(), self.layers, strict=True):
            of_high, of_low, primes, starts = terms
            torch.mul(high, of_high, out=rows).addcmul_(low, of_low)  # (orders, heads, numbers)
            rows.frac_().mul_(primes).add_(starts)  # rounded to integers by their size
            rows.view(torch.int64).bitwise_xor_(FIRST_WHOLE_BITS)
        return made.view(torch.int64)


def derive_constants(config, token_map: torch.Tensor | None) -> HashConstants:
    """Derives all hash constants from a configuration.

    Args:
        config ([`EngramConfig`]): sizes, layers and seed.
        token_map (`torch.LongTensor` of shape `(vocab_size,)`, *optional*): None where every id is its own class.

    Returns:
        [`HashConstants`]

    Raises:
        `ValueError`: if the pad id is dead in the token map.
    """
    layers, orders = config.engram_layer_ids, config.engram_orders
    multipliers = derive_multipliers(
        layers, config.engram_max_ngram_size, config.engram_compressed_vocab_size, config.engram_seed
    )
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
        torch.from_numpy(multipliers), primes, head_offsets(primes), torch.tensor([pad_class], dtype=torch.int64)
    )


def check_constants(constants: HashConstants, config) -> None:
    """Refuses stored constants that cannot belong to the configuration.

    Args:
        constants ([`HashConstants`]): as read from a checkpoint.
        config ([`EngramConfig`]): the configuration saved beside it.

    Raises:
        [`EngramFormatError`]: naming the constant, its value and what is needed.
    """
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
    if config.engram_hash_scheme == "deepseek":
        check_primes(primes, config.engram_vocab_sizes)
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


def check_primes(primes: torch.Tensor, vocab_sizes: list[int]) -> None:
    """Head sizes `(layers, orders, heads)` must be prime, distinct, and at least their order's configured size."""
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
