"""EngramMemory: everything that a graft adds to a backbone, and the hooks that add it to the residual stream.

What it chooses: hooks are objects, because a closure would still refer to the first model after `deepcopy`.
Promises: a forward pass hashes its token ids once and reads the rows of all Engram layers once; the data of a pass
belong to that pass and that thread; a layer that runs without its pass's rows raises an error, and never silently omits
its memory. Never finds layers by name and never keeps a history on a module.
Source: Engram (arXiv 2601.07372), sections 2.2 and 2.3.
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .backbone_engram import find_decoder_layers, language_model
from .cache_engram import EngramCacheLayer, engram_cache_layer
from .cache_paged_engram import PagedTexts
from .compat_engram import cache_argument, counts_positions, keeps_own_state
from .hash_constants_engram import derive_constants
from .hash_ngrams_engram import NgramHasher, identity_map
from .knowledge_pack_engram import FoundRecords, PackStack
from .layer_engram import EngramLayer
from .rows_accelerate_engram import rows_hook, take_back_table
from .rows_placement_engram import TABLES_PREFIX, named_orders
from .rows_prefetch_engram import RowFetch, start_prefetch
from .rows_table_engram import EngramTable, TablePart


# State-dict prefix of all tensors of the memory, and of those whose shapes the configuration determines.
MEMORY_PREFIX = "memory."
FIXED_PREFIXES = (TABLES_PREFIX, "memory.hashing.")


@dataclass
class MemoryReads:
    """What one forward pass hands to its Engram layers.

    Args:
        tables (`nn.ModuleDict`): tables by layer.
        classes (`torch.LongTensor` of shape `(batch, length)`): classes of the tokens; the gate is shut at dead ones.
        rows (`dict[int, torch.Tensor]`): rows to read by layer id, `(batch, length, orders, heads)`.
        cache ([`EngramCacheLayer`] or [`PagedTexts`], *optional*): where histories are stored.
        segments (`torch.LongTensor` of shape `(batch, lookback + length)`, *optional*): document numbers, if several.
        fetches (`dict[int, list[RowFetch]]`): running prefetches, by layer id.
        records ([`FoundRecords`], *optional*): what the active knowledge packs hold of the pass's n-grams.
    """

    tables: nn.ModuleDict
    classes: torch.Tensor
    rows: dict[int, torch.Tensor]
    cache: EngramCacheLayer | PagedTexts | None
    segments: torch.Tensor | None = None
    fetches: dict[int, list[RowFetch]] = field(default_factory=dict)
    records: FoundRecords | None = None

    def __post_init__(self):
        self.left = set(self.rows)  # layers that have not asked yet
        self.alive = self.classes >= 0  # (batch, length): False where the gate is shut

    @property
    def turned(self) -> bool:
        """Whether the pass is a row of tokens that are texts of their own: the memory's batch is the row's length."""
        return isinstance(self.cache, PagedTexts)

    @property
    def shape(self) -> torch.Size:
        """(batch, length) of the residual stream."""
        return self.classes.mT.shape if self.turned else self.classes.shape

    @property
    def device(self) -> torch.device:
        """Device of classes, mask and document numbers."""
        return self.classes.device

    def vectors(self, layer_id: int) -> torch.Tensor:
        """Returns a layer's memory vectors, `(batch, length, orders * heads * width)`; waits for their prefetch."""
        vectors = self.tables[str(layer_id)](self.rows[layer_id], self.fetches.get(layer_id))
        return vectors if self.records is None else self.records.apply(layer_id, vectors)

    def remember(self) -> None:
        """Appends the pass's classes to the history, after the backbone has run."""
        if self.cache is not None:
            self.cache.remember_classes(self.classes)

    def drop(self) -> None:
        """Cancels prefetches that nobody will wait for."""
        for fetches in self.fetches.values():
            for fetch in fetches:
                fetch.drop()


class EngramMemory(nn.Module):
    """Hashing, tables and layers of one memory.

    Args:
        config ([`EngramConfig`]): sizes and variants.
        token_map (`torch.LongTensor` of shape `(vocab_size,)`, *optional*): None where every id is its own class.
        hold_tables (`bool`, *optional*, defaults to `True`): whether to allocate tables, or leave them to be placed
            later.
    """

    def __init__(self, config, token_map: torch.Tensor | None = None, hold_tables: bool = True):
        super().__init__()
        self.layer_ids = list(config.engram_layer_ids)
        constants = derive_constants(config, token_map)
        self.hashing = NgramHasher(self.layer_ids, identity_map(config) if token_map is None else token_map, constants)
        dtype = getattr(torch, config.engram_table_dtype)
        self.tables = nn.ModuleDict(
            {
                str(layer): EngramTable(rows, config.engram_head_dim, config.engram_table_parts, dtype, hold_tables)
                for layer, rows in zip(self.layer_ids, constants.order_rows(), strict=True)
            }
        )
        self.layers = nn.ModuleDict({str(layer): EngramLayer(config, layer) for layer in self.layer_ids})
        self.packs = PackStack()
        self.reset_token_ids = list(config.engram_reset_token_ids or [])
        # Earlier positions that the convolution reads, and that either n-grams or the convolution read.
        self.receptive_field = self.layers[str(self.layer_ids[0])].receptive_field
        self.lookback = max(self.hashing.context_length, self.receptive_field)
        self.convolutions = len(self.layer_ids) if self.receptive_field else 0

    def named_parts(self) -> dict[str, TablePart]:
        """Returns the parts of all tables by their state-dict names, unless they are placed nowhere."""
        found = {}
        for prefix, order in named_orders(self.tables):
            order.mend_parts()
            if not order.absent:
                found |= {f"{prefix}{number}": part for number, part in enumerate(order.parts)}
        return found

    def names_without_ddp(self) -> list[str]:
        """Returns the state-dict names that DDP must ignore: rows are exchanged separately, hash constants never
        change.
        """
        tables = [f"{TABLES_PREFIX}{name}" for name, _ in self.tables.named_parameters()]
        return tables + [f"{MEMORY_PREFIX}hashing.{name}" for name, _ in self.hashing.named_buffers()]

    def cache_layer(self, cache: Cache | None, backbone_layers: int) -> EngramCacheLayer | None:
        """Returns the Engram layer of a cache, appended on first use."""
        if cache is None:
            return None
        lookback = self.lookback if self.reset_token_ids else 0
        return engram_cache_layer(cache, backbone_layers, self.convolutions, self.hashing.context_length, lookback)

    def read(
        self,
        ids: torch.Tensor,
        cache: EngramCacheLayer | PagedTexts | None,
        ends: torch.Tensor | None = None,
        alive: torch.Tensor | None = None,
    ) -> MemoryReads:
        """Hashes a batch and starts to read the rows of every layer.

        Args:
            ids (`torch.LongTensor` of shape `(batch, length)`): from `checked_text_ids`.
            cache ([`EngramCacheLayer`] or [`PagedTexts`], *optional*): history of earlier tokens.
            ends (`torch.BoolTensor` of shape `(batch, length)`, *optional*): from `document_ends`.
            alive (`torch.BoolTensor` of shape `(batch, length)`, *optional*): from `alive_positions`.
        """
        recent = None if cache is None else cache.recent_classes
        segments = None if ends is None else self.segments(ends, cache)
        classes, rows = self.hashing(ids, alive, recent, segments)
        by_layer = dict(zip(self.layer_ids, rows.unbind(), strict=True))
        segments = None if segments is None else segments.to(classes.device)
        reads = MemoryReads(self.tables, classes, by_layer, cache, segments)
        if self.packs.active or self.packs.rows.names:
            history = None if recent is None else recent(classes)
            history = None if history is None else history.to(classes.device)
            reads.records = self.packs.find(self.hashing.windows(classes, history, segments))
        if not torch.compiler.is_compiling():
            self.take_back_tables()
        if self.placement != "device":
            reads.fetches = self.prefetch_rows(rows)
        return reads

    def take_back_tables(self) -> None:
        """Takes tables back from accelerate's hooks, if a dispatch has attached any."""
        for table in self.tables._modules.values():
            # Checked on `__dict__`, because module attributes are slow and this runs in every decoding step.
            if any("_hf_hook" in module.__dict__ for module in (table, *table._modules.values())):
                take_back_table(table)

    @property
    def placement(self) -> str:
        """Where the tables are: "device", "cpu", "disk" or "none".

        Raises:
            `RuntimeError`: if rows are missing although they were not placed elsewhere.
        """
        order = next(iter(self.tables._modules.values()))._modules["order2"]
        if order.store is not None:
            return order.store.kind
        if order.absent:
            return "none"
        if order._parameters:
            return "device"
        raise RuntimeError(
            "the memory's tables have lost their parameters, and nothing said that it should run without them: "
            "something replicated or flattened the model (nn.DataParallel, FSDP around the whole model). Use "
            "DistributedDataParallel, or engram_transformers.training.shard_backbone."
        )

    @torch.compiler.disable
    def prefetch_rows(self, rows: torch.Tensor) -> dict[int, list[RowFetch]]:
        """Starts to prefetch rows `(layers, batch, length, orders, heads)` while earlier decoder layers run."""
        fetches, rows = {}, rows.to("cpu")  # one wait for the device, for all layers and orders
        for layer, own in zip(self.layer_ids, rows, strict=True):
            device = layer_device(self.layers[str(layer)])
            hooked = [(rows_hook(order), order) for order in self.tables[str(layer)].orders()]
            if all(hook is not None and hook.prefetch for hook, _ in hooked):
                fetches[layer] = [hook.ask(order, own[:, :, i], device) for i, (hook, order) in enumerate(hooked)]
        start_prefetch([fetch for layer in fetches.values() for fetch in layer])
        return fetches

    def resets(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Returns where documents end by `engram_reset_token_ids`, `(batch, length)`; None if the memory does not
        reset.
        """
        if not self.reset_token_ids:
            return None
        # Compared with Python numbers: a tensor of them would be copied to the device in every pass.
        ends = ids == self.reset_token_ids[0]  # (batch, length)
        for token in self.reset_token_ids[1:]:
            ends |= ids == token
        return ends

    def segments(self, ends: torch.Tensor, cache: EngramCacheLayer | PagedTexts | None) -> torch.Tensor:
        """Numbers the documents, `(batch, lookback + length)`, from flags `(batch, length)` of their last positions."""
        keeps = cache is not None and self.reset_token_ids
        full = cache.extend_ends(ends) if keeps else F.pad(ends, (self.lookback, 0))  # (batch, lookback + length)
        return full.cumsum(1) - full.long()  # the last position still belongs to its document


def refuse_copied_code(model: nn.Module) -> None:
    """Raises TypeError for a model whose memory is made by another copy of this code, such as a checkpoint's own."""
    for module in model.modules():
        memory = type(module._modules.get("memory"))
        if memory.__name__ == EngramMemory.__name__ and memory is not EngramMemory:
            raise TypeError(
                f"this model was loaded with its checkpoint's own copy of the code ({memory.__module__}, by "
                "trust_remote_code=True), which this package cannot train or save: import engram_transformers and load "
                "it again with from_pretrained without trust_remote_code."
            )


def layer_device(layer: EngramLayer) -> torch.device:
    """Returns where a layer computes, also while accelerate or FSDP keep its weights elsewhere."""
    projection = layer.key_value
    if projection.weight.is_meta:
        device = getattr(getattr(projection, "_hf_hook", None), "execution_device", None)
        return torch.device("cpu" if device is None else device)
    if hasattr(projection.weight, "device_mesh"):
        return torch.device(projection.weight.device_mesh.device_type)
    return projection.weight.device


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
        """Forward pre-hook of what runs a backbone's layers: outside of the Engram model's pass, without memory."""
        if self._thread.mark is None:
            self._thread.mark = WithoutMemory.BACKBONE_ALONE

    def unmark_backbone(self, *_) -> None:
        """Forward hook of what runs a backbone's layers."""
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
        came_from, home = hidden_states.device, layer_device(self.layer)
        stream = hidden_states.transpose(0, 1) if reads.turned else hidden_states
        if not came_from == vectors.device == reads.device == home:  # cheaper than calling `.to` on each
            stream, vectors, alive = stream.to(home), vectors.to(home), alive.to(home)
            segments = None if segments is None else segments.to(home)
        added = self.layer(stream, vectors, alive, cache=reads.cache, segments=segments)
        if added.device != came_from:
            added = added.to(came_from)
        if reads.turned:
            added = added.transpose(0, 1)
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
        expected = (*shape, layer.streams, layer.hidden_size)
        side_by_side = (*shape, layer.streams * layer.hidden_size)  # as Qwen4-Exp's, and one stream
        if hidden_states.shape not in (expected, side_by_side):
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
    # Some causal classes (bart's, opt's) call the decoder that holds the layers and not their base model.
    decoder = next(module for module in backbone.modules() if decoder_layers in module.children())
    for alone in {backbone.base_model, language_model(backbone.base_model), decoder}:
        alone.register_forward_pre_hook(in_flight.mark_backbone)
        alone.register_forward_hook(in_flight.unmark_backbone, always_call=True)
    for layer_id in memory.layer_ids:
        hook = InsertMemory(memory.layers[str(layer_id)], layer_id, in_flight)
        decoder_layers[layer_id].register_forward_pre_hook(hook, with_kwargs=True)
    return in_flight
