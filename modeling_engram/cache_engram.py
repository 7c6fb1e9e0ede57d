"""EngramCacheLayer: the state that decoding needs, stored in the Transformers cache and nowhere else.

Promises: the last N - 1 classes and the convolution's last inputs follow every reorder, repeat, select, reset and crop
of the cache, so beams, interleaved requests and chunked prefill read their own history. A crop that would leave a gap,
and a cache that was continued without the memory, are refused. Never stored on a module.
Source: `transformers.cache_utils`.
"""

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from .compat_engram import PagedAttentionCache, mark_static_address


# State 0 holds classes, state 1 + i the convolution inputs of the i-th Engram layer. If the memory resets at document
# ends, the last state holds where they are.
CLASS_STATE = 0


class EngramCacheLayer(LinearAttentionCacheLayerMixin):
    """One extra layer at the end of a `Cache`.

    Classes are stored plus one, so that the zeros of a fresh or reset state mean "no text". Time is dimension 1 of
    every state. Every member that `Cache` asks of a layer is defined here and none is inherited, because the parent's
    answers change between releases; its type makes masks and key-value code skip this layer.

    Args:
        convolutions (`int`): number of Engram layers with a convolution.
        context_length (`int`): classes to remember, N - 1.
        lookback (`int`, *optional*, defaults to 0): positions for which to remember whether a document ended there.
    """

    is_sliding = False
    supports_early_init = False
    is_croppable = True  # what cannot be cropped raises in `crop`
    # True even while the past is recorded: if one layer says no, Transformers makes no mask for the static keys and
    # values of the others, and attention reads unfilled positions.
    is_compileable = True

    def __init__(self, convolutions: int, context_length: int, lookback: int = 0):
        super().__init__(number_of_states=1 + convolutions + (lookback > 0))
        states = range(1 + convolutions + (lookback > 0))
        self.number_of_states = len(states)
        self.conv_states: dict[int, torch.Tensor | None] = dict.fromkeys(states)
        self.has_previous_state = dict.fromkeys(states, False)
        self.kernels: dict[int, int | None] = dict.fromkeys(states)
        self.record_past = False
        self.context_length, self.lookback, self.end_state = context_length, lookback, 1 + convolutions
        # Number of tokens remembered; None after a compiled pass, where counting would recompile every pass.
        self.seen: int | None = 0

    @property
    def is_initialized(self) -> bool:
        """Whether any state was stored yet."""
        return any(state is not None for state in self.conv_states.values())

    def get_max_length(self) -> int:
        """Returns -1: this layer sets no limit."""
        return -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise TypeError("the memory's cache layer holds no states of attention: nothing but the memory writes to it.")

    update_conv_state = update_recurrent_state = update = lazy_initialization

    def recent_classes(self, classes: torch.Tensor | None = None) -> torch.Tensor | None:
        """Returns the classes of the last tokens, `(batch, N - 1)`, -1 for no text; None before the first token.

        `classes`, those of the pass, is for `PagedTexts`, where a token's history may be in its own pass.
        """
        if not self.has_previous_state[CLASS_STATE]:
            return None
        stored = self.conv_states[CLASS_STATE]  # (batch, any number)
        if stored.shape[1] != self.context_length:
            stored = with_front(stored[:, -self.context_length :], self.context_length)  # (batch, N - 1)
        return stored - 1

    def remember_classes(self, classes: torch.Tensor) -> None:
        """Appends the classes `(batch, length)` of a finished forward pass."""
        self.append(classes + 1, CLASS_STATE, self.context_length)
        if torch.compiler.is_compiling():
            self.seen = None
        elif self.seen is not None:
            self.seen += classes.shape[1]

    def extend_ends(self, ends: torch.Tensor) -> torch.Tensor:
        """Appends `(batch, length)` flags, True where a document ends; returns them after `lookback` earlier ones."""
        full = self.append(ends, self.end_state, self.lookback)
        wanted = self.lookback + ends.shape[1]
        return with_front(full, wanted)[:, -wanted:]  # (batch, lookback + length)

    def extend_convolution(self, inputs: torch.Tensor, state_idx: int, receptive_field: int) -> torch.Tensor:
        """Appends convolution inputs `(batch, length, channels)` to state `state_idx` (1 + the layer's index).

        Returns:
            `torch.Tensor` of shape `(batch, history + length, channels)`; the history may be shorter than
            `receptive_field`.
        """
        return self.append(inputs, state_idx, receptive_field)

    def append(self, new: torch.Tensor, index: int, keep: int) -> torch.Tensor:
        """Appends `new` `(batch, length, ...)` to a state and keeps its last `keep` positions, or all while recording.

        Returns:
            `torch.Tensor` of shape `(batch, history + length, ...)`.
        """
        if self.conv_states[index] is None:
            self.begin_state(new, index, keep)
        full = torch.cat([self.conv_states[index], new], dim=1) if self.has_previous_state[index] else new
        self.has_previous_state[index] = True
        if self.record_past or self.must_replace(self.conv_states[index]):
            self.conv_states[index] = full if self.record_past else with_front(full, keep)[:, -keep:].clone()
        else:  # a copy: captured graphs hold the state's address
            full = with_front(full, keep)
            self.conv_states[index].copy_(full[:, -keep:])
        return full

    def begin_state(self, new: torch.Tensor, index: int, keep: int) -> None:
        """Allocates the zeros that a history begins with."""
        self.kernels[index] = keep
        state = torch.zeros(new.shape[0], keep, *new.shape[2:], dtype=new.dtype, device=new.device)
        if not torch.compiler.is_compiling() and not self.record_past:
            mark_static_address(state)
        self.conv_states[index] = state

    def must_replace(self, state: torch.Tensor) -> bool:
        """Whether a state was made under `torch.inference_mode` and may not be written to outside of it."""
        if torch.compiler.is_compiling():  # compilers cannot trace the question
            return False
        return state.is_inference() and not torch.is_inference_mode_enabled()

    def living_states(self) -> list[tuple[int, torch.Tensor]]:
        """Returns the states that were made, with their indices."""
        return [(index, state) for index, state in self.conv_states.items() if state is not None]

    def reset(self) -> None:
        """Forgets everything; tensors keep their addresses."""
        for index, state in self.living_states():
            if self.must_replace(state):
                self.conv_states[index] = torch.zeros_like(state)
            else:
                state.zero_()
            self.has_previous_state[index] = False
        self.seen = 0

    def activate_past_recording(self) -> None:
        """Keeps all states from now on, so that `crop` can go back to any of them."""
        self.record_past = True

    def offload(self) -> None:
        """Does nothing: the state is a few hundred numbers for each text."""

    def prefetch(self) -> None:
        """Does nothing: the state is never offloaded."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove (`int`): their number, negative as in Transformers; 0 drops what only a crop would need.

        Raises:
            `RuntimeError`: if the older history was not recorded.
        """
        removed = abs(tokens_to_remove)
        left = None if self.seen is None else self.seen - removed
        for index, state in self.living_states():
            kernel = self.kernels[index]
            needed = kernel if left is None else min(kernel, left)
            kept = state.shape[1] - removed
            if tokens_to_remove > 0 or (removed and not (self.record_past and kept >= needed)):
                raise RuntimeError(
                    f"crop({tokens_to_remove}): the memory's history cannot go back that far. Crop by a negative "
                    "number of tokens that were read after cache.activate_past_recording(), or read the text again."
                )
            self.conv_states[index] = state[:, max(0, kept - kernel) : kept]
        self.seen = left

    # States of different layers may be on different devices.

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given batch entries."""
        for index, state in self.living_states():
            self.conv_states[index] = state.index_select(0, indices.to(state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch entry in place."""
        for index, state in self.living_states():
            self.conv_states[index] = state.repeat_interleave(repeats, dim=0)


def engram_cache_layer(
    cache: Cache, backbone_layers: int, convolutions: int, context_length: int, lookback: int = 0
) -> EngramCacheLayer:
    """Returns the cache's Engram layer, appended on first use after the backbone's layers; see [`EngramCacheLayer`].

    Raises:
        `TypeError`: if `cache` is not a `Cache`.
        `ValueError`: if the cache already holds tokens that this memory has not seen.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a transformers Cache, got {type(cache).__name__}: use DynamicCache().")
    for layer in reversed(cache.layers):
        if isinstance(layer, EngramCacheLayer):
            _refuse_gap(cache, layer)
            return layer
    if seen := seen_tokens(cache):
        raise ValueError(
            f"the cache holds {seen} tokens that were read without the memory (by the backbone alone?): their "
            "n-grams are unknown. Start from an empty cache, or from one that this model has returned."
        )
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < backbone_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = EngramCacheLayer(convolutions, context_length, lookback)
    if any(getattr(other, "record_past", False) for other in cache.layers):
        layer.activate_past_recording()
    cache.layers.append(layer)
    return layer


def with_front(state: torch.Tensor, places: int) -> torch.Tensor:
    """Pads `(batch, time, ...)` with zeros in front to at least `places` positions."""
    missing = places - state.shape[1]
    if missing <= 0:
        return state
    return torch.cat([state.new_zeros(len(state), missing, *state.shape[2:]), state], dim=1)


def _refuse_gap(cache: Cache, layer: EngramCacheLayer) -> None:
    """Raises ValueError if the backbone's layers hold another number of tokens, where counting needs no device sync."""
    if layer.seen is None or torch.compiler.is_compiling():
        return
    held = seen_positions(cache)
    if held is not None and held != layer.seen:
        raise ValueError(
            f"the cache holds {held} tokens, its memory {layer.seen}: it went on without the memory, or was "
            "cropped in part. Start from an empty cache, or from a copy made before."
        )


def seen_positions(cache: Cache | None) -> int | None:
    """Returns the positions that a cache holds; None if counting would wait for the device, or no layer counts them."""
    if cache is None:
        return 0
    if torch.compiler.is_compiling():
        return None
    try:
        seen = cache.get_seq_length()
    except ValueError:  # only linear-attention layers
        return None
    if isinstance(seen, torch.Tensor):
        return int(seen) if seen.device.type == "cpu" else None
    return seen


def refuse_engram_history(cache: Cache | None) -> None:
    """Raises ValueError for a cache with a memory history when a pass is to run without the memory."""
    paged = isinstance(cache, PagedAttentionCache)  # without a memory the backbone batches by itself
    if paged or (cache is not None and any(isinstance(layer, EngramCacheLayer) for layer in cache.layers)):
        raise ValueError(
            "the cache was begun with the memory on, and running on without it would leave a gap in its history: "
            "start from an empty cache inside disable_memory()."
        )


def seen_tokens(cache: Cache) -> int:
    """Returns the number of tokens in a cache; 0 or 1 (empty or not) for a cache that does not count them."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache of only linear-attention layers does not count
        return int(any(all(getattr(layer, "has_previous_state", {0: False}).values()) for layer in cache.layers))
