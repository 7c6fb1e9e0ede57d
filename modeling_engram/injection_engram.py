"""Injection: pre-hooks that add a memory to the residual stream of a backbone's decoder layers.

Promises: the data of a pass belong to that pass and that thread; a layer that runs without its pass's rows raises an
error, and never silently omits its memory. Never finds layers by name.
Source: Engram (arXiv 2601.07372), section 2.3. Hooks are objects, because a closure would still refer to the first
model after `deepcopy`.
"""

import threading
from contextlib import contextmanager
from enum import Enum

import torch
from torch import nn

from .backbone_engram import find_decoder_layers
from .compat_engram import cache_argument, counts_positions, keeps_own_state
from .layer_engram import EngramLayer
from .memory_engram import EngramMemory, MemoryReads, layer_device


class WithoutMemory(Enum):
    """Reasons to run a pass without memory."""

    SWITCHED_OFF = "disable_memory() was called, or the tables are placed nowhere"
    BACKBONE_ALONE = "the backbone was called, and not the Engram model"


WITHOUT_MEMORY = WithoutMemory.SWITCHED_OFF


class _ThreadMark(threading.local):
    # Set here, which runs once in each thread, and not in the class: compilers check the instance for the attribute.
    def __init__(self):
        self.mark: MemoryReads | WithoutMemory | None = None


class ReadsInFlight:
    """The state of the forward pass that is running in this thread.

    Its mark is the pass's reads, a reason to run without memory, or None where nothing is running. A decoder layer that
    runs without a mark raises an error.
    """

    def __init__(self):
        self._thread = _ThreadMark()

    @property
    def current(self) -> MemoryReads | WithoutMemory | None:
        """The mark of this thread's pass; None outside of one."""
        return self._thread.mark

    def begin(self, mark: MemoryReads | WithoutMemory) -> MemoryReads | WithoutMemory | None:
        """Sets the mark of a pass; returns the previous one, for `end`.

        Not a context manager: compilers before torch 2.8 do not trace through one made from a generator.
        """
        before = self._thread.mark
        self._thread.mark = mark
        return before

    def end(self, before: MemoryReads | WithoutMemory | None) -> None:
        """Restores the previous mark."""
        self._thread.mark = before

    @contextmanager
    def hold(self, mark: MemoryReads | WithoutMemory):
        """Sets a mark while the block runs, also for decoder layers that are called directly."""
        before = self.begin(mark)
        try:
            yield
        finally:
            self.end(before)

    def mark_backbone(self, *_) -> None:
        """Forward pre-hook of a backbone's base model: outside of a pass of the Engram model it runs without memory."""
        if self._thread.mark is None:
            self._thread.mark = WithoutMemory.BACKBONE_ALONE

    def unmark_backbone(self, *_) -> None:
        """Forward hook of a backbone's base model."""
        if self._thread.mark is WithoutMemory.BACKBONE_ALONE:
            self._thread.mark = None

    def __reduce__(self):  # copies and pickles start with nothing in flight
        return ReadsInFlight, ()


class InsertMemory:
    """Forward pre-hook of one decoder layer: adds the memory to the residual stream."""

    def __init__(self, layer: EngramLayer, layer_id: int, in_flight: ReadsInFlight):
        self.layer, self.layer_id, self.in_flight = layer, layer_id, in_flight

    def __call__(self, decoder_layer: nn.Module, args: tuple, kwargs: dict):
        reads = self.in_flight.current
        if isinstance(reads, WithoutMemory):
            return None
        if reads is None or self.layer_id not in reads.left:
            raise RuntimeError(self.lost(decoder_layer, again=reads is not None))
        reads.left.discard(self.layer_id)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.check_stream(decoder_layer, hidden_states, reads.shape)
        vectors, alive, segments = reads.vectors(self.layer_id), reads.alive, reads.segments
        # With several devices the layer computes where its weights are, and the stream stays where it is.
        came_from, home, stream = hidden_states.device, layer_device(self.layer), hidden_states
        if not came_from == vectors.device == reads.device == home:  # cheaper than calling `.to` on each
            stream, vectors, alive = stream.to(home), vectors.to(home), alive.to(home)
            segments = None if segments is None else segments.to(home)
        added = self.layer(stream, vectors, alive, cache=reads.cache, segments=segments)
        if added.device != came_from:
            added = added.to(came_from)
        # Not in place: the backbone may use its stream elsewhere.
        hidden_states = hidden_states + added
        if args:
            return (hidden_states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_states}

    def lost(self, decoder_layer: nn.Module, again: bool) -> str:
        """Returns the error message for a layer that runs and has nothing to add."""
        name = f"{type(decoder_layer).__name__} {self.layer_id}"
        if again:
            return (
                f"{name} runs a second time in one forward pass, and its memory was read once: a backbone that "
                "repeats its layers, or calls itself inside a pass, cannot carry an Engram memory."
            )
        return (
            f"{name} has an Engram memory and runs outside of its model's forward pass, so there are no rows for it. "
            "Call the Engram model, or run the layer inside `with model.disable_memory():`. Activation checkpointing "
            "that wraps layers from outside runs them again in the "
            "backward pass: use model.gradient_checkpointing_enable() instead. A decoder layer that was copied alone, "
            "or runs in another thread, has no memory."
        )

    def check_stream(self, decoder_layer: nn.Module, hidden_states: torch.Tensor, shape: torch.Size) -> None:
        """Raises ValueError if the residual stream has another shape than the memory was made for."""
        layer = self.layer
        streams = () if layer.streams == 1 and hidden_states.ndim == 3 else (layer.streams,)
        expected = (*shape, *streams, layer.hidden_size)
        if hidden_states.shape != expected:
            raise ValueError(
                f"{type(decoder_layer).__name__} {self.layer_id} gets a residual stream of shape "
                f"{tuple(hidden_states.shape)}, Engram needs {expected}: this backbone's streams are not supported."
            )


def insert_memory(backbone: nn.Module, depth: int, memory: EngramMemory) -> ReadsInFlight:
    """Registers a pre-hook on every Engram layer of a backbone with `depth` decoder layers.

    Returns:
        [`ReadsInFlight`] through which forward passes hand over their reads.

    Raises:
        `ValueError`: if the layers cannot be found or have a memory already, or the backbone keeps its history outside
            of a `Cache`.
    """
    if not counts_positions(backbone.config.get_text_config(decoder=True)):
        raise ValueError(
            f"{type(backbone).__name__} has no layer of attention: its cache does not count the tokens that it holds, "
            "so the memory's history could not be checked against it. Engram cannot be inserted into this backbone."
        )
    takes_cache = cache_argument(backbone.forward) is not None
    if not takes_cache or keeps_own_state(backbone):
        raise ValueError(
            f"{type(backbone).__name__} takes no cache that Transformers makes: its state is elsewhere and the "
            "memory's history could not be kept with it. Engram cannot be inserted into this backbone."
        )
    decoder_layers = find_decoder_layers(backbone, depth)
    for layer in decoder_layers:
        if any(isinstance(hook, InsertMemory) for hook in layer._forward_pre_hooks.values()):
            raise ValueError(
                "this backbone already carries an Engram memory: load the donor again, or pass the Engram model's own "
                "folder to from_pretrained."
            )
    in_flight = ReadsInFlight()
    backbone.base_model.register_forward_pre_hook(in_flight.mark_backbone)
    backbone.base_model.register_forward_hook(in_flight.unmark_backbone, always_call=True)
    for layer_id in memory.layer_ids:
        hook = InsertMemory(memory.layers[str(layer_id)], layer_id, in_flight)
        decoder_layers[layer_id].register_forward_pre_hook(hook, with_kwargs=True)
    return in_flight
