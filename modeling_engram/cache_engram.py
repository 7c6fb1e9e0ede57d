"""EngramCacheLayer: what decoding must remember, kept in the Transformers cache and nowhere else.

Promises: the last N - 1 classes and the convolution's last inputs follow every reorder, repeat, select, reset and crop
of the cache, so that beams, interleaved requests and chunked prefill read their own history; a crop that would leave a
gap, and a cache that went on without the memory, are refused. Never stored on a module.
Source: `transformers.cache_utils`, whose cache layers of other models it stands with.
"""

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from .compat_engram import mark_static_address


# State 0 holds classes, state 1 + i the convolution inputs of the i-th Engram layer, and one more behind them where
# documents end, if the memory looks for that.
CLASS_STATE = 0


class EngramCacheLayer(LinearAttentionCacheLayerMixin):
    """One extra layer at the end of a `Cache`.

    Classes are stored plus one, so that zero, which a fresh or reset state holds, means "nothing came before". Time is
    dimension 1 of every state: places lie one behind the other, and a convolution reads whole places. Of the parent it
    takes the kind alone, so that masks and key-value code pass over it: every member that `Cache` asks of a layer is
    defined here, since what a parent answers has changed between releases.

    Args:
        convolutions (`int`): Engram layers with a convolution.
        context_length (`int`): classes to remember, N - 1.
        span (`int`, *optional*, defaults to 0): places for which to remember whether a document ended there.
    """

    is_sliding = False
    supports_early_init = False
    is_croppable = True  # what cannot be cropped raises in `crop`
    # Also while the past is recorded. Where one layer says no, Transformers makes no mask for the static keys and
    # values of the others, and attention reads places that are not filled yet.
    is_compileable = True

    def __init__(self, convolutions: int, context_length: int, span: int = 0):
        super().__init__(number_of_states=1 + convolutions + (span > 0))
        states = range(1 + convolutions + (span > 0))
        self.number_of_states = len(states)
        self.conv_states: dict[int, torch.Tensor | None] = dict.fromkeys(states)
        self.has_previous_state = dict.fromkeys(states, False)
        self.kernels: dict[int, int | None] = dict.fromkeys(states)
        self.record_past = False
        self.context_length, self.span, self.end_state = context_length, span, 1 + convolutions
        # Tokens remembered; None after a compiled pass, where counting would compile each one anew.
        self.seen: int | None = 0

    @property
    def is_initialized(self) -> bool:
        """Whether anything was remembered yet."""
        return any(state is not None for state in self.conv_states.values())

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise TypeError("the memory's cache layer holds no states of attention: nothing but the memory writes to it.")

    update_conv_state = update_recurrent_state = update = lazy_initialization

    def recent_classes(self) -> torch.Tensor | None:
        """Classes of the last tokens, `(batch, N - 1)`, -1 where there was no text; None before the first token."""
        if not self.has_previous_state[CLASS_STATE]:
            return None
        stored = self.conv_states[CLASS_STATE]  # (batch, any number)
        if stored.shape[1] != self.context_length:
            stored = with_front(stored[:, -self.context_length :], self.context_length)  # (batch, N - 1)
        return stored - 1

    def remember_classes(self, classes: torch.Tensor) -> None:
        """Appends the classes `(batch, length)` of a forward pass that has run."""
        self.append(classes + 1, CLASS_STATE, self.context_length)
        if torch.compiler.is_compiling():
            self.seen = None
        elif self.seen is not None:
            self.seen += classes.shape[1]

    def extend_ends(self, ends: torch.Tensor) -> torch.Tensor:
        """Appends `(batch, length)` flags, True where a document ends; returns them after `span` earlier ones."""
        full = self.append(ends, self.end_state, self.span)
        wanted = self.span + ends.shape[1]
        return with_front(full, wanted)[:, -wanted:]  # (batch, span + length)

    def extend_convolution(self, inputs: torch.Tensor, state_idx: int, reach: int) -> torch.Tensor:
        """Appends convolution inputs and returns them with the history in front.

        Args:
            inputs (`torch.Tensor` of shape `(batch, length, channels)`): this pass's inputs.
            state_idx (`int`): 1 + the layer's place.
            reach (`int`): earlier inputs that the taps can see.

        Returns:
            `torch.Tensor` of shape `(batch, history and length, channels)`; the history may be shorter than `reach`.
        """
        return self.append(inputs, state_idx, reach)

    def append(self, new: torch.Tensor, index: int, keep: int) -> torch.Tensor:
        """Appends to a history.

        Args:
            new (`torch.Tensor` of shape `(batch, length, ...)`): what comes behind the history.
            index (`int`): the state.
            keep (`int`): places to keep; all of them while the past is recorded.

        Returns:
            `torch.Tensor` of shape `(batch, history and length, ...)`.
        """
        if self.conv_states[index] is None:
            self.begin_state(new, index, keep)
        full = torch.cat([self.conv_states[index], new], dim=1) if self.has_previous_state[index] else new
        self.has_previous_state[index] = True
        if self.record_past or self.must_replace(self.conv_states[index]):
            self.conv_states[index] = full if self.record_past else with_front(full, keep)[:, -keep:].clone()
        else:  # a copy, because captured graphs know the state by its address
            full = with_front(full, keep)
            self.conv_states[index].copy_(full[:, -keep:])
        return full

    def begin_state(self, new: torch.Tensor, index: int, keep: int) -> None:
        """Makes the zeros that a history begins with."""
        self.kernels[index] = keep
        state = torch.zeros(new.shape[0], keep, *new.shape[2:], dtype=new.dtype, device=new.device)
        if not torch.compiler.is_compiling() and not self.record_past:
            mark_static_address(state)
        self.conv_states[index] = state

    def must_replace(self, state: torch.Tensor) -> bool:
        """Whether a state was made under `torch.inference_mode` and may not be written to after it."""
        if torch.compiler.is_compiling():  # which cannot be asked about modes
            return False
        return state.is_inference() and not torch.is_inference_mode_enabled()

    def living_states(self) -> list[tuple[int, torch.Tensor]]:
        """The states that hold something, with their numbers."""
        return [(index, state) for index, state in self.conv_states.items() if state is not None]

    def reset(self) -> None:
        """Forgets everything; tensors stay where they are."""
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
        """Stays where it is: a few hundred numbers a text."""

    def prefetch(self) -> None:
        """Is always where it is needed."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove (`int`): their number, negative as in Transformers; 0 drops what only a crop would need.

        Raises:
            `RuntimeError`: if older histories were not kept for it.
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

    # The states of different layers may lie on different devices.

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
    cache: Cache, backbone_layers: int, convolutions: int, context_length: int, span: int = 0
) -> EngramCacheLayer:
    """The cache's Engram layer, appended on first sight.

    Args:
        cache (`Cache`): made by `generate`, by the model or by the user.
        backbone_layers (`int`): decoder layers of the backbone, whose places come first.
        convolutions (`int`): Engram layers with a convolution.
        context_length (`int`): N - 1.
        span (`int`, *optional*, defaults to 0): see [`EngramCacheLayer`].

    Returns:
        [`EngramCacheLayer`]

    Raises:
        `TypeError`: if `cache` is no `Cache`.
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
    layer = EngramCacheLayer(convolutions, context_length, span)
    if any(getattr(other, "record_past", False) for other in cache.layers):
        layer.activate_past_recording()
    cache.layers.append(layer)
    return layer


def with_front(state: torch.Tensor, places: int) -> torch.Tensor:
    """Zeros in front of `(batch, time, ...)` until there are `places`; itself if there are."""
    missing = places - state.shape[1]
    if missing <= 0:
        return state
    return torch.cat([state.new_zeros(len(state), missing, *state.shape[2:]), state], dim=1)


def _refuse_gap(cache: Cache, layer: EngramCacheLayer) -> None:
    """Raises ValueError if the backbone's layers hold other tokens than the memory's, as far as counting is free."""
    if layer.seen is None or torch.compiler.is_compiling():
        return
    held = seen_positions(cache)
    if held is not None and held != layer.seen:
        raise ValueError(
            f"the cache holds {held} tokens, its memory {layer.seen}: it went on without the memory, or was "
            "cropped in part. Start from an empty cache, or from a copy made before."
        )


def seen_positions(cache: Cache | None) -> int | None:
    """Positions that a cache holds; None where asking would cost a wait for the device, or nothing counts them."""
    if cache is None:
        return 0
    if torch.compiler.is_compiling():
        return None
    try:
        seen = cache.get_seq_length()
    except ValueError:  # linear-attention layers alone
        return None
    if isinstance(seen, torch.Tensor):
        return int(seen) if seen.device.type == "cpu" else None
    return seen


def refuse_engram_history(cache: Cache | None) -> None:
    """Raises ValueError for a cache that was begun with memory, when a pass is to run without."""
    if cache is not None and any(isinstance(layer, EngramCacheLayer) for layer in cache.layers):
        raise ValueError(
            "the cache was begun with the memory on, and running on without it would leave a gap in its history: "
            "start from an empty cache inside disable_memory()."
        )


def seen_tokens(cache: Cache) -> int:
    """Tokens already in a cache, 0 where its kind does not count them before it is filled."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache of linear-attention layers alone counts nothing
        return int(any(all(getattr(layer, "has_previous_state", {0: False}).values()) for layer in cache.layers))
