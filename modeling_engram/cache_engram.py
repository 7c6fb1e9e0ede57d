"""EngramCacheLayer: what decoding must remember, kept in the Transformers cache and nowhere else.

Promises: the last N - 1 classes and the convolution's last inputs follow every reorder, repeat, select, reset and crop
of the cache, so that beams, interleaved requests and chunked prefill read their own history; a crop that would leave a
gap, and a cache that went on without the memory, are refused. Never stored on a module.
Source: transformers 5.23 `cache_utils.LinearAttentionLayer` (its convolution states fit both histories).
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionLayer


# State 0 holds classes, state 1 + i the convolution inputs of the i-th Engram layer, and one more behind them where
# documents end, if the memory looks for that.
CLASS_STATE = 0


class EngramCacheLayer(LinearAttentionLayer):
    """One extra layer at the end of a `Cache`.

    Classes are stored plus one, so that zero, which a fresh or reset state holds, means "nothing came before".

    Args:
        convolutions (`int`): Engram layers with a convolution.
        context_length (`int`): classes to remember, N - 1.
        span (`int`, *optional*, defaults to 0): places for which to remember whether a document ended there.
    """

    def __init__(self, convolutions: int, context_length: int, span: int = 0):
        super().__init__(number_of_states=1 + convolutions + (span > 0))
        self.context_length, self.span, self.end_state = context_length, span, 1 + convolutions
        # Tokens remembered; None after a compiled pass, where counting would compile each one anew.
        self.seen: int | None = 0

    def recent_classes(self) -> torch.Tensor | None:
        """Classes of the last tokens, `(batch, N - 1)`, -1 where there was no text; None before the first token."""
        if not self.has_previous_state[CLASS_STATE]:
            return None
        stored = self.conv_states[CLASS_STATE][..., -self.context_length :]  # (batch, up to N - 1)
        return F.pad(stored, (self.context_length - stored.shape[-1], 0)) - 1

    def remember_classes(self, classes: torch.Tensor) -> None:
        """Appends the classes `(batch, length)` of a forward pass that has run."""
        self.update_conv_state(classes + 1, state_idx=CLASS_STATE, conv_kernel_size=self.context_length)
        if torch.compiler.is_compiling():
            self.seen = None
        elif self.seen is not None:
            self.seen += classes.shape[1]

    def extend_ends(self, ends: torch.Tensor) -> torch.Tensor:
        """Appends `(batch, length)` flags, True where a document ends; returns them after `span` earlier ones."""
        full = self.update_conv_state(ends, state_idx=self.end_state, conv_kernel_size=self.span)
        wanted = self.span + ends.shape[1]
        return F.pad(full, (max(0, wanted - full.shape[1]), 0))[:, -wanted:]  # (batch, span + length)

    def extend_convolution(self, inputs: torch.Tensor, state_idx: int, reach: int) -> torch.Tensor:
        """Appends convolution inputs and returns them with the history in front.

        Args:
            inputs (`torch.Tensor` of shape `(batch, channels, length)`): this pass's inputs.
            state_idx (`int`): 1 + the layer's place.
            reach (`int`): earlier inputs that the taps can see.

        Returns:
            `torch.Tensor` of shape `(batch, channels, history and length)`; the history may be shorter than `reach`.
        """
        return self.update_conv_state(inputs, state_idx=state_idx, conv_kernel_size=reach)

    def reset(self) -> None:
        """Forgets everything; tensors stay where they are."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove (`int`): their number, negative as in Transformers; 0 drops what only a crop would need.

        Raises:
            `RuntimeError`: if older histories were not kept for it.
        """
        removed = abs(tokens_to_remove)
        left = None if self.seen is None else self.seen - removed
        for index, state in self.conv_states.items():
            if not self.is_conv_states_initialized[index]:
                continue
            kernel = self.conv_kernel_size[index]
            needed = kernel if left is None else min(kernel, left)
            kept = state.shape[-1] - removed
            if tokens_to_remove > 0 or (removed and not (self.record_past and kept >= needed)):
                raise RuntimeError(
                    f"crop({tokens_to_remove}): the memory's history cannot go back that far. Crop by a negative "
                    "number of tokens that were read after cache.activate_past_recording(), or read the text again."
                )
            self.conv_states[index] = state[..., max(0, kept - kernel) : kept]
        self.seen = left

    # The states of different layers may lie on different devices, and the parent moves indices to the first one's.

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given batch entries."""
        for index, state in self.conv_states.items():
            if self.is_conv_states_initialized[index]:
                self.conv_states[index] = state.index_select(0, indices.to(state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch entry in place."""
        for index, state in self.conv_states.items():
            if self.is_conv_states_initialized[index]:
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
        raise TypeError(
            f"past_key_values must be a transformers Cache, got {type(cache).__name__}: use DynamicCache()."
        )
    for layer in cache.layers:
        if isinstance(layer, EngramCacheLayer):
            refuse_gap(cache, layer)
            return layer
    if seen := seen_tokens(cache):
        raise ValueError(
            f"past_key_values holds {seen} tokens that were read without the memory (by the backbone alone?): their "
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


def refuse_gap(cache: Cache, layer: EngramCacheLayer) -> None:
    """Raises ValueError if the backbone's layers hold other tokens than the memory's, as far as counting is free."""
    if layer.seen is None or torch.compiler.is_compiling():
        return
    held = seen_positions(cache)
    if held is not None and held != layer.seen:
        raise ValueError(
            f"past_key_values holds {held} tokens, its memory {layer.seen}: it went on without the memory, or was "
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
            "past_key_values was begun with the memory on, and running on without it would leave a gap in its history: "
            "start from an empty cache inside without_memory()."
        )


def seen_tokens(cache: Cache) -> int:
    """Tokens already in a cache, 0 where its kind does not count them before it is filled."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache of linear-attention layers alone counts nothing
        return int(any(all(getattr(layer, "has_previous_state", {0: False}).values()) for layer in cache.layers))
