"""N-gram hashing: classes of token ids to table rows.

Promises: int64 integer arithmetic only, the same rows on every device, dtype, batch shape and chunking; stored tables
depend on it. `naive_hash_ids` is its readable twin in plain Python. Never reads a file.
Source: Engram (arXiv 2601.07372), section 2.2, equations 1 and 2; the demo's NgramHashMapping for the heads' order.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .configuration_engram import EngramFormatError
from .hash_constants_engram import HashConstants, check_constants, derive_constants
from .hash_tokens_engram import DEAD, appended_from, token_map_sha256, without_placeholders


# Devices on which a supported PyTorch may round int64 to float32: MPS before PyTorch 2.8.
IN_DOUBT = {"mps"}


def on_meta() -> bool:
    """Whether modules are being made without storage, to be filled from a checkpoint."""
    return torch.empty(0).device.type == "meta"


def identity_map(config) -> torch.Tensor:
    """Returns the token map of a memory without compression: every id is its own class, but placeholders are dead.

    It has no storage if modules are made so, and cannot be mistaken for the checkpoint's map.
    """
    ids = torch.arange(config.text_config.vocab_size, dtype=torch.int64, device="meta" if on_meta() else "cpu")
    return without_placeholders(ids, config.placeholder_ids)


@torch.compiler.assume_constant_result
@functools.cache
def has_exact_remainders(kind: str) -> bool:
    """Whether a kind of device divides large int64 products exactly; computed once on it."""
    factors, prime = (2**40 + 3, 2**22 + 1), 1_000_003
    first, second = (torch.tensor([factor], device=kind) for factor in factors)
    return torch.remainder(first * second, torch.tensor([prime], device=kind)).item() == factors[0] * factors[1] % prime


class NgramHasher(nn.Module):
    """Maps token ids to table rows, for all Engram layers and heads in a few tensor operations.

    Heads are in (order, head) order: all heads of bigrams, then all of trigrams, and so on. A dead position (pad,
    non-text, id without tokenizer entry) counts as the pad class, and so does every older position of the n-gram.

    Args:
        layer_ids (`list[int]`): Engram layers, in the order of the constants.
        token_map (`torch.LongTensor` of shape `(vocab_size,)`): class of every id, -1 for dead ones.
        constants ([`HashConstants`]): stored or derived constants.

    Example:

    ```python
    >>> import torch
    >>> from engram_transformers import EngramConfig
    >>> from engram_transformers.hash_ngrams_engram import NgramHasher

    >>> config = EngramConfig(engram_layer_ids=[1], engram_vocab_size=1000, engram_n_heads=2)
    >>> hasher = NgramHasher.from_config(config, torch.arange(config.text_config.vocab_size))
    >>> hasher.rows(torch.tensor([[5, 6, 7]]), layer_id=1).shape
    torch.Size([1, 3, 4])
    ```"""

    def __init__(self, layer_ids: list[int], token_map: torch.Tensor, constants: HashConstants):
        super().__init__()
        self.layer_ids = list(layer_ids)
        self.register_buffer("token_map", token_map)
        for name, tensor in constants.named().items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_config(cls, config, token_map: torch.Tensor | None = None) -> "NgramHasher":
        """Makes the hasher of a new memory.

        `token_map`, `(tokens,)`, is from `TokenCompressor.lookup_table` or `.token_map(vocab_size)`; None makes every
        id its own class.
        """
        constants = derive_constants(config, token_map)
        return cls(config.engram_layer_ids, identity_map(config) if token_map is None else token_map, constants)

    @property
    def constants(self) -> HashConstants:
        """The constants in use."""
        return HashConstants(self.multipliers, self.primes, self.offsets, self.pad_class)

    @property
    def context_length(self) -> int:
        """Number of earlier classes that an n-gram needs: N - 1."""
        return self.multipliers.shape[1] - 1

    def compress(self, input_ids: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the classes of ids `(batch, length)`; negative ids and positions that are not alive are dead."""
        text = input_ids >= 0
        if alive is not None:
            text = text & alive
        return torch.where(text, self.token_map[input_ids.clamp(min=0)], DEAD)

    def lookback(
        self, classes: torch.Tensor, history: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns every position's n-gram, with everything at or before a dead position replaced by the pad class.

        Args:
            classes (`torch.LongTensor` of shape `(batch, length)`): from `compress`.
            history (`torch.LongTensor` of shape `(batch, N - 1)`, *optional*): earlier classes; None at the start of a
                text.
            segments (`torch.LongTensor` of shape `(batch, N - 1 or more + length)`, *optional*):
                Document number of each position; positions of another document count as the pad class.

        Returns:
            `torch.LongTensor` of shape `(N, batch, length)`; entry i is i positions back.
        """
        shifted, blocked = self._reach(classes, history, segments)
        return torch.where(blocked, self.pad_class, shifted)

    def windows(
        self, classes: torch.Tensor, history: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `lookback`, with -1 at and before what ends an n-gram: no class, so no n-gram of a text has it."""
        shifted, blocked = self._reach(classes, history, segments)
        return shifted.masked_fill(blocked, DEAD)

    def _reach(
        self, classes: torch.Tensor, history: torch.Tensor | None, segments: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns classes `(N, batch, length)`, entry i is i positions back, and which of them end an n-gram."""
        batch, length = classes.shape
        n = self.context_length + 1
        if history is None:
            history = classes.new_full((batch, n - 1), DEAD)
        shifted = _shift_back(torch.cat([history, classes], dim=1), n, length)  # (N, batch, length)
        blocked = shifted < 0  # (N, batch, length)
        for i in range(1, n):
            blocked[i] |= blocked[i - 1]  # something dead at or after this position (faster than cummin)
        if segments is not None:
            places = _shift_back(segments, n, length)  # (N, batch, length)
            blocked = blocked | (places != places[0])
        return shifted, blocked

    def hash_lookback(self, lookback: torch.Tensor) -> torch.Tensor:
        """Hashes n-grams `(N, batch, length)` to `(layers, batch, length, orders, heads)`, before offsets."""
        hashes = self.divided(mix(lookback * self.multipliers[:, :, None, None]))
        return hashes.permute(0, 3, 4, 1, 2)  # (layers, batch, length, orders, heads)

    def divided(self, mixed: torch.Tensor) -> torch.Tensor:
        """Returns hashes `(layers, orders, heads, batch, length)` of mixed products.

        Positions are the last dimension, because one divisor for many contiguous numbers is faster.

        Raises:
            `RuntimeError`: on a device that rounds remainders.
        """
        if mixed.device.type in IN_DOUBT and not has_exact_remainders(mixed.device.type):
            raise RuntimeError(
                f"torch {torch.__version__} rounds the remainders of large integers on '{mixed.device.type}', so every "
                "row of the memory would be a wrong one: install torch 2.8 or newer, or keep the model on the CPU."
            )
        return torch.remainder(mixed[:, :, None], self.primes[..., None, None])

    def hash_ids(self, input_ids: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Hashes ids `(batch, length)` for one layer: `(batch, length, orders * heads)`, each within its own head.

        Raises:
            `ValueError`: for a layer without a memory.
        """
        hashes = self.hash_lookback(self.lookback(self.compress(input_ids)))
        return hashes[self.layer_index(layer_id)].flatten(-2)  # (batch, length, orders * heads)

    def rows(self, input_ids: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Returns rows `(batch, length, orders * heads)` of one layer's table: `hash_ids` plus the head's first row."""
        return self.hash_ids(input_ids, layer_id) + self.offsets[self.layer_index(layer_id)].flatten()

    def forward(
        self,
        input_ids: torch.Tensor,
        alive: torch.Tensor | None = None,
        history: torch.Tensor | Callable | None = None,
        segments: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the classes of a batch and its rows in all layers, each counted from the first row of its order.

        All buffers are read in this one call, so that accelerate's hooks can bring them. Inputs may be on any device.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): ids inside the vocabulary, or negative.
            alive (`torch.BoolTensor` of shape `(batch, length)`, *optional*): False at pads.
            history (`torch.LongTensor` of shape `(batch, N - 1 or more)` or `Callable`, *optional*):
                Classes before the first position, or what returns them for the classes of the batch.
            segments (`torch.LongTensor` of shape `(batch, N - 1 or more + length)`, *optional*): see `lookback`.

        Returns:
            `tuple`: classes `(batch, length)`, and rows `(layers, batch, length, orders, heads)`.
        """
        device = self.token_map.device
        given = (input_ids, alive, segments)
        input_ids, alive, segments = [None if tensor is None else tensor.to(device) for tensor in given]
        classes = self.compress(input_ids, alive)
        history = history(classes) if callable(history) else history
        history = None if history is None else history.to(device)
        return classes, self.rows_of_classes(classes, history, segments)

    def rows_of_classes(
        self, classes: torch.Tensor, history: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `forward`, for given classes: rows `(layers, batch, length, orders, heads)`."""
        hashes = self.hash_lookback(self.lookback(classes, history, segments))
        # The head's first row within its order: (layers, 1, 1, orders, heads).
        return hashes + (self.offsets - self.offsets[:, :, :1])[:, None, None]

    def layer_index(self, layer_id: int) -> int:
        """Returns the index of a layer among the constants."""
        if layer_id not in self.layer_ids:
            raise ValueError(f"layer {layer_id} has no memory; the Engram layers are {self.layer_ids}.")
        return self.layer_ids.index(layer_id)

    def check(self, config) -> None:
        """Refuses stored constants or a token map that do not belong to `config`; see `check_constants`."""
        check_constants(self.constants, config)
        original = self.original_token_map(config.engram_compressed_vocab_size)
        digest = token_map_sha256(original)
        identity = torch.equal(original.cpu(), torch.arange(len(original), device="cpu"))
        if config.engram_token_map_sha256 is None and identity:
            return
        if digest != config.engram_token_map_sha256:
            raise EngramFormatError(
                f"the stored token map has SHA-256 {digest[:16]}..., config.json says "
                f"{str(config.engram_token_map_sha256)[:16]}...: it belongs to another checkpoint. "
                "Restore the `model-*.safetensors` files that were saved together with this config.json."
            )

    def resize(self, vocab_size: int, compressed_vocab_size: int, placeholders: Sequence[int] = ()) -> None:
        """Follows a resized vocabulary: new ids get their own classes after all others, old addresses stay.

        Ids after the tokenizer's last one (a padded vocabulary) count as new. `compressed_vocab_size` is V' at the
        graft, `placeholders` are ids that stay dead.

        Raises:
            `ValueError`: if ids that have rows in the memory would go.
        """
        self.check_shrinking(vocab_size)
        known = max(int(torch.nonzero(self.token_map != DEAD).max()), *placeholders, 0) + 1
        first = max(compressed_vocab_size, int(self.token_map.max()) + 1)
        added = torch.arange(first, first + vocab_size - known, device=self.token_map.device)
        self.token_map = torch.cat([self.token_map[:known], added])  # (vocab_size,)

    def check_shrinking(self, vocab_size: int) -> None:
        """Raises ValueError if ids at or above `vocab_size` have rows in the memory."""
        if bool((self.token_map[vocab_size:] != DEAD).any()):
            raise ValueError(
                f"the vocabulary cannot shrink from {len(self.token_map)} to {vocab_size} ids: the memory's token map "
                "uses the ids in between. Graft the donor again with the smaller vocabulary."
            )

    def original_token_map(self, compressed_vocab_size: int) -> torch.Tensor:
        """Returns the map as it was at the graft, without ids that a resize appended (classes at or above V')."""
        return self.token_map[: appended_from(self.token_map, compressed_vocab_size)]


def mix(products: torch.Tensor) -> torch.Tensor:
    """XORs each order's products, `(layers, N, batch, length)` to `(layers, orders, batch, length)`."""
    last, *others = products.unbind(1)
    mixes = []
    for product in others:
        last = last ^ product  # (layers, batch, length)
        mixes.append(last)
    return torch.stack(mixes, dim=1)


def _shift_back(full: torch.Tensor, places: int, length: int) -> torch.Tensor:
    """Stacks the last `length` columns of `(batch, time)` and the same 1, 2, ... earlier: `(places, batch, length)`."""
    first = full.shape[1] - length
    return torch.stack([full[:, first - i : first - i + length] for i in range(places)])


def naive_hash_ids(
    classes: list[int], multipliers: list[int], primes: list[list[int]], pad_class: int
) -> list[list[int]]:
    """The hash of one layer in plain Python integers, one position at a time, to check by eye.

    Args:
        classes (`list[int]`): classes of one sequence, -1 for dead positions.
        multipliers (`list[int]`): N factors.
        primes (`list[list[int]]`): rows by order and head.
        pad_class (`int`): class for "nothing".

    Returns:
        `list[list[int]]`: for every position the hashes in (order, head) order, before offsets.
    """
    hashes = []
    for t in range(len(classes)):
        blocked, mix, position = False, 0, []
        for i, multiplier in enumerate(multipliers):
            blocked = blocked or t - i < 0 or classes[t - i] < 0
            product = (pad_class if blocked else classes[t - i]) * multiplier
            mix ^= (product + 2**63) % 2**64 - 2**63  # int64 overflow, which only appended ids can reach
            if i > 0:
                position += [mix % prime for prime in primes[i - 1]]
        hashes.append(position)
    return hashes
