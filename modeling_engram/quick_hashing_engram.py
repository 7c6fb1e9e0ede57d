"""Hashing of many tokens in an eager pass on a CPU: what `NgramHasher` does, with fewer and cheaper operators.

Promises: the rows of the readable twin, exactly. What it cannot do (`is_plain` False, `remainders` None) is left to the
caller's tensors. Never wakes another thread for the 2048 tokens and 16 heads of a layer of the paper's memory.

What is done once for all heads is NumPy's, what is done for each head torch's: NumPy starts an operator in half a
microsecond where torch takes two to four, more than the work on 2048 tokens takes; torch has the quicker loops.
"""

from fractions import Fraction

import numpy as np
import torch

from .constants_engram import INT64_MAX


# Rows of a head below which remainders by multiplication are proven exact.
MOST_QUICK_ROWS = 2**30

# Where an int64 is cut in two: 18 bits with the sign, and 46 without.
CUT = 46

# A float64 from 2**52 up to 2**53 holds an integer in its lowest 52 bits, behind these.
FIRST_WHOLE, FIRST_WHOLE_BITS = 2.0**52, 0x4330_0000_0000_0000


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
        self.layers = list(zip(*(term[..., None, None].unbind() for term in terms), strict=True))

    def __call__(self, numbers: np.ndarray) -> torch.Tensor:
        """Of every number the remainder by every head of its layer and order, and the head's start.

        Args:
            numbers (`np.ndarray` of int64 and shape `(layers, orders, batch, length)`): integers from 0.

        Returns:
            `torch.LongTensor` of shape `(layers, orders, heads, batch, length)`.
        """
        numbers = numbers[:, :, None]  # (layers, orders, 1, batch, length)
        highs = torch.from_numpy((numbers >> CUT).astype(np.float64))
        lows = (numbers & (2**CUT - 1)).astype(np.float64)
        lows += 0.25
        lows = torch.from_numpy(lows)
        made = np.empty((*self.heads, *numbers.shape[3:]), dtype=np.int64)
        # Layer by layer, so that 2048 tokens and 16 heads are just few enough for torch not to wake its other threads.
        for bits, high, low, terms in zip(made, highs.unbind(), lows.unbind(), self.layers, strict=True):
            of_high, of_low, primes, starts = terms
            rows = torch.from_numpy(bits.view(np.float64))  # (orders, heads, batch, length)
            torch.mul(high, of_high, out=rows).addcmul_(low, of_low)
            rows.frac_().mul_(primes).add_(starts)  # rounded to integers by their size
            np.bitwise_xor(bits, FIRST_WHOLE_BITS, out=bits)
        return torch.from_numpy(made)


class QuickHash:
    """What an eager pass on a CPU takes of a memory's constants.

    Args:
        multipliers, primes, offsets, pad_class (`torch.LongTensor`): as in `HashConstants`.

    Attributes:
        most (`int`): the largest class whose products int64 holds.
        remainders ([`QuickRemainders`], *optional*): None where a head is too large for them.
    """

    def __init__(self, multipliers: torch.Tensor, primes: torch.Tensor, offsets: torch.Tensor, pad_class: torch.Tensor):
        self.multipliers, self.pad_class = multipliers.numpy(), int(pad_class)
        self.most = INT64_MAX // max(1, int(multipliers.max()))
        quick = int(primes.max()) < MOST_QUICK_ROWS
        self.remainders = QuickRemainders(primes, offsets - offsets[:, :, :1]) if quick else None

    def text(self, classes: torch.Tensor, history: torch.Tensor | None) -> np.ndarray:
        """Classes `(batch, length)` behind the N - 1 before them, pad classes at the start of a text."""
        (batch, length), context = classes.shape, self.multipliers.shape[1] - 1
        text = np.empty((batch, context + length), dtype=np.int64)
        text[:, :context] = self.pad_class if history is None else history.numpy()
        text[:, context:] = classes.numpy()
        return text

    def is_plain(self, text: np.ndarray) -> bool:
        """Whether no class is dead, and none so large that its products overflow."""
        return bool(text.view(np.uint64).max(initial=0) <= self.most)  # as numbers without a sign, dead ones are large

    def mix(self, text: np.ndarray) -> np.ndarray:
        """Mixed products `(layers, orders, batch, length)` of a plain text `(batch, N - 1 + length)`.

        Products are made once and looked at N times, each a place further back.
        """
        products = text * self.multipliers[:, :, None, None]  # (layers, N, batch, N - 1 + length)
        layers, n, batch, places = products.shape
        length = places - n + 1
        mixed = np.empty((layers, n - 1, batch, length), dtype=np.int64)
        last = products[:, 0, :, n - 1 :]  # (layers, batch, length)
        for i in range(1, n):
            earlier = products[:, i, :, n - 1 - i : n - 1 - i + length]  # (layers, batch, length)
            last = np.bitwise_xor(last, earlier, out=mixed[:, i - 1])  # (layers, batch, length)
        return mixed
