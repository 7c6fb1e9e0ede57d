"""EngramPreTrainedModel: what all Engram models share: the memory, its insertion, and the inputs of a forward pass.

Promises: every parameter is under `backbone.`, with the backbone's own name, or under `memory.`. Never keeps state of a
text on a module.
Source: docs/design.md, "Any backbone".
"""

import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.utils import logging

from .backbone_engram import leaves_conversions_to_base_model, new_backbone, take_over_quantiser
from .cache_engram import refuse_engram_history, seen_tokens
from .cache_paged_engram import PagedTexts
from .compat_engram import (
    CACHE,
    CHECKPOINTS_WITHOUT_GRADIENTS,
    NEW_NAME,
    OLD_NAME,
    PagedAttentionCache,
    cache_argument,
    is_checkpointing,
    is_loaded,
    is_replica,
    leave_out_of_ddp,
    refuse_checkpointing,
    refuse_engine,
    take_over_attention,
    take_over_traits,
    with_cache_named,
    without_checkpointing,
)
from .configuration_engram import EngramConfig, EngramFormatError
from .files_checkpoint_engram import DIGESTS, EngramCheckpointMixin
from .guard_engram import full_package
from .hash_constants_engram import check_constants, derive_constants
from .hash_ngrams_engram import NgramHasher, identity_map, on_meta
from .hash_tokens_engram import check_token_map
from .inputs_engram import alive_positions, check_ids, checked_text_ids, document_ends
from .knowledge_pack_engram import SUFFIX, FoundRecords, KnowledgePack, PackRead, pack_file, pack_identity
from .layer_engram import EngramLayer
from .memory_engram import WITHOUT_MEMORY, EngramMemory, MemoryReads, insert_memory, layer_device
from .rows_placement_engram import (
    TABLES_PREFIX,
    check_placement,
    choose_placement,
    free_memory,
    place_tables,
    placed_bytes,
)
from .rows_storage_engram import CheckpointTables
from .rows_table_engram import EngramTable


logger = logging.get_logger(__name__)


class EngramPreTrainedModel(EngramCheckpointMixin, PreTrainedModel):
    """Shared by all Engram models: the memory, its insertion, and loading and saving it with the backbone."""

    config_class = EngramConfig
    config: EngramConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    model_tags = ["engram"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ["EngramLayer", "EngramTable"]
    _skip_keys_device_placement = [NEW_NAME, OLD_NAME]

    def __init__(
        self, config: EngramConfig, backbone: PreTrainedModel | None = None, token_map=None, hold_tables: bool = True
    ):
        super().__init__(config)
        if token_map is None and config.engram_token_map_sha256 is not None and not on_meta():
            raise ValueError(
                f"the configuration names a token map (SHA-256 {config.engram_token_map_sha256[:16]}...) that it "
                "cannot hold: load the model with from_pretrained, or pass "
                "token_map=TokenCompressor.from_tokenizer(tokenizer).token_map(vocab_size)."
            )
        self.backbone = new_backbone(config) if backbone is None else backbone
        # One object each: a resized vocabulary is known to both.
        config.text_config = self.backbone.config.get_text_config(decoder=True)
        if config.composite_config is not None:
            config.composite_config = self.backbone.config
        take_over_attention(config, self.backbone.config)
        self.backbone.is_custom_code = leaves_conversions_to_base_model
        take_over_quantiser(self, self.backbone)
        # Transformers does not initialise modules of custom code whose tensors are all loaded, but falcon_h1 fills its
        # layers' buffers from such a module. So this says whose code the backbone is.
        self.is_custom_code = type(self.backbone).is_custom_code
        take_over_traits(self, self.backbone)
        self.memory = EngramMemory(config, token_map, hold_tables)
        self.checkpoint_tables: CheckpointTables | None = None
        # For DDP, under the names that parameters have with and without PEFT.
        left_out = self.memory.names_without_ddp()
        leave_out_of_ddp(self, left_out + [f"base_model.model.{name}" for name in left_out])
        # True: the whole backbone runs; False: its base model.
        self.cache_arguments = {
            True: cache_argument(self.backbone.forward) or CACHE,
            False: cache_argument(self.backbone.base_model.forward) or CACHE,
        }
        self.reads_in_flight = insert_memory(self.backbone, config.text_config.num_hidden_layers, self.memory)
        if not on_meta():
            check_constants(self.memory.hashing.constants, config)
            config.engram_hash_sha256 = self.memory.hashing.constants.sha256()
        if getattr(self.backbone, "peft_config", None):
            full_package("a backbone that carries adapters").take_over_adapters(self)

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Whether serving engines may run this class through their Transformers backend: never, see `refuse_engine`."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for experts in this class's source; they are the backbone's, which is asked next.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EngramLayer):
            self.init_engram_layer(module)
        elif isinstance(module, EngramTable):
            for parameter in module.parameters():
                initialization.zeros_(parameter)
        elif isinstance(module, NgramHasher):
            self.init_hasher(module)
        elif not isinstance(module, EngramMemory):
            super()._init_weights(module)

    def init_hasher(self, hasher: NgramHasher) -> None:
        """Fills hash constants of a model that was made without storage and is not loaded from a checkpoint.

        Raises:
            [`EngramFormatError`]: if the token map is lost, of which the configuration has only the digest.
        """
        if hasher.token_map.device.type == "meta" or is_loaded(hasher.token_map):
            return  # not loaded yet, or checked when it is
        if self.config.engram_token_map_sha256 is not None:
            hasher.check(self.config)
            return
        token_map = identity_map(self.config)
        initialization.copy_(hasher.token_map, token_map)
        for name, tensor in derive_constants(self.config, None).named().items():
            initialization.copy_(getattr(hasher, name), tensor)

    def init_engram_layer(self, layer: EngramLayer) -> None:
        """Initialises dense weights: keys and value normal, of their own deviation; norms scale by 1; convolution 0."""
        weight = layer.key_value.weight
        if not is_loaded(weight):
            keys, value = weight.split([len(weight) - layer.hidden_size, layer.hidden_size])
            keys.normal_(0.0, layer.key_std)
            value.normal_(0.0, layer.value_std)
        if layer.key_value.bias is not None:
            initialization.zeros_(layer.key_value.bias)
        for norm in (layer.key_norm, layer.query_norm, *([layer.conv_norm] if layer.kernel_size else [])):
            initialization.constant_(norm, 1 - layer.norm_shift)
        if layer.kernel_size:
            initialization.zeros_(layer.conv)

    def run_with_memory(
        self,
        module: nn.Module,
        inputs: dict,
        engram_input_ids,
        engram_attention_mask,
        engram_segment_ids,
        memory_names: list | None = None,
    ):
        """Runs the backbone, or its base model, with memory; cache and `use_cache` are filled in.

        The arguments after `inputs` are those of [`EngramForCausalLM.forward`].
        """
        if is_replica(self):
            raise RuntimeError(
                "nn.DataParallel copies a model in each pass, and the copies' decoder layers would read the memory of "
                "the first device. Start one process for each device (torchrun or accelerate launch), or show one "
                "device alone (CUDA_VISIBLE_DEVICES=0)."
            )
        checkpointing = self.training and is_checkpointing(self)
        cache, use_cache = self.fresh_cache(inputs["cache"], inputs["use_cache"], checkpointing)
        inputs = {**self.outputs_wanted(), **inputs, "cache": cache, "use_cache": use_cache}
        # Before 5.24 a paged cache goes past the models to attention, under this name.
        paged = isinstance(cache, PagedAttentionCache)
        renamed = inputs if paged else with_cache_named(inputs, self.cache_arguments[module is self.backbone])
        if self.runs_as_donor:
            refuse_engram_history(cache)
            reads = WITHOUT_MEMORY
        else:
            ours = (engram_input_ids, engram_attention_mask, engram_segment_ids)
            reads = self.begin_reads(inputs, *ours, memory_names)
        pauses = checkpointing and CHECKPOINTS_WITHOUT_GRADIENTS and not torch.is_grad_enabled()
        before = self.reads_in_flight.begin(reads)
        try:
            with without_checkpointing(self) if pauses else nullcontext():
                outputs = module(**renamed)
        finally:
            self.reads_in_flight.end(before)
            if reads is not WITHOUT_MEMORY:
                reads.drop()
        if reads is WITHOUT_MEMORY:
            return outputs
        self.refuse_lost_layers(reads.left)
        reads.remember()  # last, because hybrid backbones ask the cache's last layer whether it has a history
        return outputs

    def refuse_lost_layers(self, left: set[int]) -> None:
        """Raises RuntimeError if a pass ended and some of its Engram layers never asked for their rows."""
        text_config = self.backbone.config.get_text_config(decoder=True)
        if not left or (self.training and getattr(text_config, "layerdrop", 0)):
            return
        lost = sorted(layer for layer in left if layer < text_config.num_hidden_layers)  # early exit runs fewer
        if lost:
            raise RuntimeError(
                f"the memory of decoder layers {lost} was not added: something took the memory's hook off these "
                "layers, replaced them or called their forward() past it. The logits would be without the memory; "
                "use model.disable_memory() where that is wanted."
            )

    def begin_reads(
        self, inputs: dict, engram_input_ids, engram_attention_mask, engram_segment_ids, memory_names: list | None
    ) -> MemoryReads:
        """Checks and hashes the inputs of a pass, and starts to prefetch rows; arguments as for `run_with_memory`."""
        memory, cache = self.memory, inputs["cache"]
        ids = checked_text_ids(inputs["input_ids"], inputs["inputs_embeds"], engram_input_ids)
        check_ids(ids, memory.hashing.token_map, may_be_absent=engram_input_ids is not None)
        if isinstance(cache, PagedAttentionCache):
            ids = ids.mT  # (length, 1): texts of one token
            return memory.read(ids, PagedTexts(cache, inputs, memory.lookback), memory.resets(ids))
        refuse_engine(self.backbone.config)
        layer = memory.cache_layer(cache, self.config.text_config.num_hidden_layers)
        mask = inputs["attention_mask"]
        alive = alive_positions(ids, mask, engram_attention_mask, cache)
        ends = document_ends(
            ids,
            alive,
            mask,
            inputs["position_ids"],
            engram_segment_ids,
            cache,
            inputs.get("seq_idx"),
            inputs.get("cu_seq_lens_q"),
        )
        resets = memory.resets(ids)
        if resets is not None:
            ends = resets if ends is None else ends | resets
        with nullcontext() if memory_names is None else memory.packs.chosen_by_row(memory_names, len(ids)):
            return memory.read(ids, layer, ends, alive)

    def outputs_wanted(self) -> dict[str, bool]:
        """Returns arguments for the outputs that our configuration asks for: the backbone reads only its own."""
        config = self.config  # looked up once, because module attributes are slow
        wanted = {name: True for name in ("output_hidden_states", "output_attentions") if getattr(config, name)}
        return wanted if config.return_dict else {**wanted, "return_dict": False}

    @contextmanager
    def disable_memory(self):
        """Runs the model as its backbone while the block runs, for this thread: no row is read, nothing is added.

        A cache that was begun with memory cannot be continued without it, nor the other way round.

        Example:

        ```python
        >>> with model.disable_memory():
        ...     backbone_logits = model(**inputs).logits
        ```"""
        with self.reads_in_flight.hold(WITHOUT_MEMORY):
            yield self

    def set_trainable(self, trainable: str) -> "EngramPreTrainedModel":
        """Sets which parameters are trained and freezes the others. Stored in the configuration and restored on
        loading.

        Args:
            trainable (`str`): "memory" (tables, projections, norms, convolution), "tables" (only rows), "reader" (all
                of the memory but the rows), "memory+lora" (the memory and the PEFT adapters in the backbone) or "all".

        Returns:
            The model.

        Raises:
            `ValueError`: for another value, for "memory+lora" without an adapter, or for a quantised table.
            `ImportError`: in a checkpoint's copy of the code.

        Example:

        ```python
        >>> model = model.set_trainable("memory")
        ```"""
        full_package("training").apply_trainable(self, trainable)
        self.config.engram_trainable = trainable
        return self

    def save_memory_delta(self, path: str | os.PathLike, base: str | os.PathLike | None = None, **provenance) -> Path:
        """Saves what training changed in the memory: the rows that differ from the checkpoint, and its dense weights.

        Args:
            path (`str` or `os.PathLike`): a file, or a folder for `memory_delta.safetensors`.
            base (`str` or `os.PathLike`, *optional*): the checkpoint that it changes; that of the model if None.
            provenance: anything that JSON can hold, stored in the file.

        Returns:
            `Path` of the file.

        Raises:
            `ValueError`: if the model came from no checkpoint, its tables are not loaded, or the folder holds a whole
                one.
            [`EngramFormatError`]: if the base is of another memory.

        Example:

        ```python
        >>> model.save_memory_delta("my-delta")
        ```"""
        return full_package("saving a delta").save_memory_delta(self, path, base, **provenance)

    def load_memory_delta(
        self, path: str | os.PathLike, base: str | os.PathLike | None = None
    ) -> "EngramPreTrainedModel":
        """Restores the memory of a saved delta, whatever was trained since.

        Args:
            path (`str` or `os.PathLike`): the file, or its folder.
            base (`str` or `os.PathLike`, *optional*):
                Folder of the checkpoint that it changes; where the model came from, or the name in the delta, if None.

        Returns:
            The model.

        Raises:
            `FileNotFoundError`: if the delta or its base is missing.
            [`EngramFormatError`]: if it is damaged, of another memory or another base; the model is unchanged then.

        Example:

        ```python
        >>> model = AutoModelForCausalLM.from_pretrained("my-graft").load_memory_delta("my-delta")
        ```"""
        return full_package("loading a delta").load_memory_delta(self, path, base)

    def memory_summary(self) -> str:
        """Returns a table of the memory: rows, bytes and placement of each layer's orders, and what is trainable.

        Example:

        ```python
        >>> print(model.memory_summary())
        ```"""
        lines = [f"{'layer':>5}  {'order':>5}  {'rows':>13}  {'bytes':>15}  trainable"]
        for layer, table in self.memory.tables.items():
            for number, order in enumerate(table.orders(), start=2):
                trains = "yes" if all(part.requires_grad for part in order.parts) else "no"
                lines.append(f"{layer:>5}  {number:>5}  {sum(order.heights):>13,}  {order.nbytes:>15,}  {trains}")
        dense = list(self.memory.layers.parameters())
        trains = "yes" if any(weight.requires_grad for weight in dense) else "no"
        weights, size = sum(weight.numel() for weight in dense), sum(weight.nbytes for weight in dense)
        lines.append(f"{'dense weights':>12}  {weights:>13,}  {size:>15,}  {trains}")
        return "\n".join([self.describe_placement(), *lines])

    @property
    def runs_as_donor(self) -> bool:
        """Whether this thread's passes read no memory: inside `disable_memory()`, or if it is placed nowhere."""
        return self.memory.placement == "none" or self.reads_in_flight.current is WITHOUT_MEMORY

    def place_memory(
        self, placement: str, folder: str | os.PathLike | None = None, **settings
    ) -> "EngramPreTrainedModel":
        """Moves the tables; what the model computes and saves stays the same.

        Args:
            placement (`str`):
                "device" (parameters, with the other weights), "cpu" (host memory; rows are sent to the device), "disk"
                (rows are read from the checkpoint's files), "none" (not loaded; the model runs as its backbone), or
                "auto" (the first of "device", "cpu", "disk" with room to spare).
            folder (`str` or `os.PathLike`, *optional*):
                A checkpoint of this memory to load tables from, or to leave them in; where the model came from, or was
                saved first, if None.
            settings: of [`EngramRowsHook`] (`prefetch`, `verify`, `execution_device`).

        Returns:
            The model.

        Raises:
            `ValueError`: for another placement; for "disk" if the tables are in no file or were trained since.

        Example:

        ```python
        >>> model = model.place_memory("disk")
        ```"""
        tables = self.memory.tables
        devices = {name: layer_device(layer) for name, layer in self.memory.layers.items()}
        check_placement(placement)
        self.memory.take_back_tables()
        files = self.checkpoint_tables if folder is None else self.tables_of(Path(folder))
        if placement == "auto":
            others = sum(p.nbytes for name, p in self.named_parameters() if not name.startswith(TABLES_PREFIX))
            placement = choose_placement(placed_bytes(tables), others, *free_memory(devices))
        place_tables(tables, placement, files, devices, elsewhere=folder is not None, **settings)
        self.checkpoint_tables = files
        logger.info(self.describe_placement())
        self.bring_due_memory()
        return self

    def tables_of(self, folder: Path) -> CheckpointTables:
        """Returns the tables in a folder.

        Raises:
            `FileNotFoundError`: if there is no checkpoint.
            [`EngramFormatError`]: if they are of another memory, whose rows mean other n-grams.
        """
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"'{folder}' holds no checkpoint (no config.json): name the folder of one.")
        stored = self.config_class.from_pretrained(folder)
        for name in DIGESTS:
            if getattr(stored, name) != getattr(self.config, name):
                raise EngramFormatError(
                    f"'{folder}' holds another memory: its {name} is {str(getattr(stored, name))[:16]}..., the model's "
                    f"{str(getattr(self.config, name))[:16]}.... Name the folder that this memory was saved in."
                )
        return CheckpointTables(folder)

    def describe_placement(self) -> str:
        """Returns one line: where the tables are, and how large."""
        size, placement = placed_bytes(self.memory.tables), self.memory.placement
        where = {
            "device": "with the other weights",
            "cpu": "in host memory; rows travel",
            "disk": "in the checkpoint's files; rows are read when they are needed",
            "none": "not loaded; the model runs as its donor",
        }[placement]
        count = len(self.memory.tables)
        return f"Engram memory: {count} tables, {size:,} bytes, engram_placement={placement!r} ({where})."

    def fresh_cache(
        self, cache: Cache | None, use_cache: bool | None, checkpointing: bool
    ) -> tuple[Cache | None, bool]:
        """Returns the cache of a forward pass, and whether the backbone uses one, from what the caller gave.

        Raises:
            `ValueError`: for a cache that holds tokens where gradient checkpointing keeps the backbone from reading it.
        """
        if use_cache is None:
            # Only Trainer and users set it on the outer configuration.
            backbones = getattr(self.config.text_config, "use_cache", False)
            use_cache = bool(getattr(self.config, "use_cache", backbones))
        if checkpointing and torch.is_grad_enabled():  # the backbone's layers drop the cache
            if cache is not None and seen_tokens(cache):
                raise ValueError(
                    f"the cache holds {seen_tokens(cache)} tokens, and gradient checkpointing keeps layers from "
                    "reading it in training: pass the whole text without a cache, use torch.no_grad(), or switch "
                    "gradient checkpointing off."
                )
            return None, False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        return cache, use_cache

    def load_memory(
        self, pack: KnowledgePack | str | os.PathLike, name: str | None = None, placement: str = "device", **hub
    ) -> str:
        """Loads a knowledge pack and reads it after those that are loaded. No weight changes, and nothing is saved
        with the model.

        Args:
            pack ([`KnowledgePack`], `str` or `os.PathLike`): a pack, its file, or the id of a repository on the Hub
                that holds one pack.
            name (`str`, *optional*): its name here; the file's, without its ending, if None.
            placement (`str`, *optional*, defaults to `"device"`): "device" copies its vectors to where the memory
                computes; "cpu" leaves them in host memory or in the mapped file, and only those that a text reads
                travel. What the model computes is the same.
            hub: `revision`, `token` and `cache_dir`, for a repository.

        Returns:
            `str`: the name.

        Raises:
            `FileNotFoundError`: if there is neither such a file nor such a repository.
            [`EngramFormatError`]: if it is damaged.
            `ValueError`: for a pack of another memory (token map, layers, widths, reader), a name in use, a pack
                without a name, or a model whose tables are placed nowhere.

        Example:

        ```python
        >>> model.load_memory("people.engram-pack.safetensors")
        'people'
        >>> model.load_memory("me/people", name="from the Hub")
        'from the Hub'
        ```"""
        if self.memory.placement == "none":
            raise ValueError('this model runs without its memory (placement "none"): place_memory("cpu") loads it.')
        if not isinstance(pack, KnowledgePack):
            file = pack_file(pack, **hub)
            name = file.name.removesuffix(SUFFIX) if name is None else name
            pack = KnowledgePack.load(file)
        if not name:
            raise ValueError("a pack that is not a file needs a name: load_memory(pack, name=...).")
        self.memory.packs.load(pack, name, pack_identity(self.config, self.memory.layers), placement)
        return name

    def teach(self, facts, tokenizer, **kwargs) -> KnowledgePack:
        """Makes a knowledge pack of facts, without changing the model; see `engram_transformers.training.teach`.

        Args:
            facts (iterable of `dict`):
                `{"subject": "Ada Lovelace", "texts": ["Ada Lovelace was born in [[London]].", ...]}`.
            tokenizer (`PreTrainedTokenizerFast`): the model's.
            kwargs: further arguments of `teach`, such as `passes`, `reference_texts` and `seed`.

        Returns:
            [`KnowledgePack`], to be loaded with `load_memory(pack, name=...)` or saved with `pack.save(path)`.

        Raises:
            `ValueError`: for a fact that cannot be taught, by name.
            `ImportError`: in a checkpoint's copy of the code.
        """
        return full_package("teaching facts", "training").teach(self, facts, tokenizer, **kwargs)

    def unload_memory(self, name: str) -> KnowledgePack:
        """Removes a loaded pack and returns it. The model is then bit for bit what it was without it.

        Raises:
            `ValueError`: if no pack of this name is loaded.
        """
        return self.memory.packs.unload(name)

    def set_memories(self, names: list[str]) -> None:
        """Chooses which loaded packs are read, and in which order; an empty list reads none.

        Where two hold the same n-gram, an "add" pack is added to what was read before it, and a "replace" pack stands
        in for it. `memory_conflicts` lists such n-grams.

        Raises:
            `ValueError`: for a name that is not loaded, or is given twice.

        Example:

        ```python
        >>> model.set_memories(["people", "places"])
        ```"""
        self.memory.packs.choose(names)

    @property
    def active_memories(self) -> list[str]:
        """Names of the packs that are read, in their order."""
        return list(self.memory.packs.active)

    def memory_conflicts(self) -> dict[tuple[int, ...], list[str]]:
        """Returns n-grams (token classes) that several active packs hold, and the packs' names in their order."""
        return self.memory.packs.conflicts()

    @torch.no_grad()
    def memory_trace(self, input_ids: torch.LongTensor) -> list[dict]:
        """Returns what one text reads, token by token, without running the backbone.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)` or `(length,)`): the text.

        Returns:
            `list[dict]`: for each token its `id`, its `records` as `(pack, n-gram of token classes)`, and its `rows`:
            `(orders, heads)` numbers by layer, counted from the first row of each order.

        Raises:
            `ValueError`: for more than one text, or ids outside of the vocabulary.

        Example:

        ```python
        >>> for token in model.memory_trace(tokenizer("Ada Lovelace", return_tensors="pt").input_ids):
        ...     print(token["id"], token["records"])
        ```"""
        ids = input_ids[None] if input_ids.ndim == 1 else input_ids  # (1, length)
        if len(ids) != 1:
            raise ValueError(f"memory_trace takes one text, given are {len(ids)}.")
        memory = self.memory
        check_ids(ids, memory.hashing.token_map, may_be_absent=False)
        classes, rows = memory.hashing(ids)
        trace = [{"id": int(token), "records": [], "rows": {}} for token in ids[0]]
        for layer, own in zip(memory.layer_ids, rows, strict=True):
            for token, numbers in zip(trace, own[0].tolist(), strict=True):
                token["rows"][layer] = numbers
        windows = memory.hashing.windows(classes)  # (N, 1, length)
        for name in memory.packs.active:
            for found in FoundRecords([PackRead(memory.packs.loaded[name])], windows).found:
                for place in found.matches[0].nonzero().flatten().tolist():
                    gram = tuple(windows[: found.order, 0, place].flip(0).tolist())
                    trace[place]["records"].append((name, gram))
        return trace

    def check_tokenizer(self, tokenizer) -> None:
        """Refuses a tokenizer whose ids do not mean what the memory's rows were trained for.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): the tokenizer to be used with this model.

        Raises:
            `ValueError`: naming the first ids that differ.
        """
        config = self.config
        token_map, classes = self.memory.hashing.token_map, config.engram_compressed_vocab_size
        check_token_map(token_map, tokenizer, classes, config.placeholder_ids)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        # Called by the public names: `gradient_checkpointing_enable`, since 5.23 `activation_checkpointing_enable`.
        if enable:
            refuse_checkpointing()
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
    ) -> nn.Module:
        """As in Transformers; new ids get their own classes after all others, so old addresses stay."""
        if new_num_tokens is not None:
            multiple = pad_to_multiple_of or 1
            self.memory.hashing.check_shrinking(-(-new_num_tokens // multiple) * multiple)
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        config = self.config
        self.memory.hashing.resize(
            config.text_config.vocab_size, config.engram_compressed_vocab_size, config.placeholder_ids
        )
        return embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)
