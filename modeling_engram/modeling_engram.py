"""EngramModel, EngramForCausalLM and EngramForConditionalGeneration: a model of Transformers with an Engram memory.

What it chooses: the backbone is unchanged, under `backbone.`, with its own parameter names; everything under `memory.`
belongs to the memory. A forward pass hashes its ids once, reads the rows of all layers, and lets pre-hooks on the
decoder layers add them to the residual stream.
Promises: a fresh graft gives the backbone's logits; decoding with a cache equals decoding without; a memory is never
silently random. Never keeps state of a text on a module.
Source: Engram (arXiv 2601.07372), section 2; docs/design.md for differences.
"""

import inspect

from .configuration_engram import EngramConfig, saying_what_to_install


with saying_what_to_install():  # imports every other file of a checkpoint's own code
    import torch
    from torch import nn
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.generation import ContinuousBatchingManager
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.processing_utils import Unpack
    from transformers.utils import TransformersKwargs

    from .cache_engram import seen_tokens
    from .cache_paged_engram import batching_settings
    from .compat_engram import (
        CACHE,
        GeneratesAsBackbone,
        cache_argument,
        refuse_old_composites,
        refuse_own_generation,
        takes_old_cache_name,
        with_cache_named,
    )
    from .guard_engram import full_package
    from .pretrained_engram import EngramPreTrainedModel


class EngramModel(EngramPreTrainedModel):
    """The backbone without its language-model head, with memory; same state-dict keys as [`EngramForCausalLM`].

    Args:
        config ([`EngramConfig`]): the configuration.

    Example:

    ```python
    >>> import engram_transformers
    >>> from transformers import AutoModel

    >>> model = AutoModel.from_pretrained("runs/demo/graft")
    ```"""

    def __init__(
        self, config: EngramConfig, backbone: PreTrainedModel | None = None, token_map=None, hold_tables: bool = True
    ):
        super().__init__(config, backbone, token_map, hold_tables)
        _drop_head(self.backbone)
        self.post_init()

    @takes_old_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        engram_input_ids: torch.LongTensor | None = None,
        engram_attention_mask: torch.Tensor | None = None,
        engram_segment_ids: torch.LongTensor | None = None,
        memory_names: list | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast | tuple:
        """Runs the backbone with memory.

        Takes the arguments of [`EngramForCausalLM.forward`] but `labels` and `logits_to_keep`.

        Returns:
            `BaseModelOutputWithPast`, as the backbone returns it.

        Raises:
            `TypeError`: for a backbone that Transformers has only with its head (llama4, whole).
        """
        if self.backbone.base_model is self.backbone:
            raise TypeError(
                f"{type(self.backbone).__name__} has no model without its head: use AutoModelForImageTextToText, or "
                "output_hidden_states=True."
            )
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        ours = (engram_input_ids, engram_attention_mask, engram_segment_ids)
        return self.run_with_memory(self.backbone.base_model, inputs, *ours, memory_names=memory_names)


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """A causal language model with an Engram memory.

    Args:
        config ([`EngramConfig`]): the configuration.
        backbone (`PreTrainedModel`, *optional*): a causal language model to take over; made from `text_config` if None.
        token_map (`torch.LongTensor` of shape `(vocab_size,)`, *optional*): from [`TokenCompressor`].

    Example:

    ```python
    >>> import engram_transformers
    >>> from transformers import AutoModelForCausalLM

    >>> model = AutoModelForCausalLM.from_pretrained("runs/demo/graft")
    ```"""

    def __init__(
        self, config: EngramConfig, backbone: PreTrainedModel | None = None, token_map=None, hold_tables: bool = True
    ):
        self.refuse_other_kind(config)
        super().__init__(config, backbone, token_map, hold_tables)
        self.backbone_slices_logits = "logits_to_keep" in inspect.signature(self.backbone.forward).parameters
        self.post_init()

    @classmethod
    def class_for(cls, config) -> type:
        """Returns [`EngramForConditionalGeneration`] for a checkpoint of a whole composite model: as in Transformers,
        AutoModelForCausalLM may name one.
        """
        composite = getattr(config, "composite_config", None) is not None
        return EngramForConditionalGeneration if composite and cls is EngramForCausalLM else cls

    @classmethod
    def refuse_other_kind(cls, config) -> None:
        """Raises ValueError if a configuration is for another class than this one."""
        if config.composite_config is not None:
            raise ValueError(
                f"this configuration is of a whole composite model ({config.composite_config.model_type}): make it "
                "with EngramForConditionalGeneration or AutoModelForImageTextToText."
            )

    @classmethod
    def from_backbone(
        cls,
        donor: PreTrainedModel | str,
        tokenizer=None,
        engram_layer_ids: list[int] | None = None,
        *,
        trust_remote_code: bool = False,
        text_only: bool | None = None,
        **kwargs,
    ) -> "EngramForCausalLM":
        """Grafts a fresh memory onto a model, in memory and trainable at once; the logits stay the backbone's.

        Args:
            donor (`PreTrainedModel` or `str`):
                A causal language model, or a composite model that reads text and images (used, not copied); a folder or
                a Hub id.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): the backbone's; found for a folder or id if
                None.
            engram_layer_ids (`list[int]`, *optional*): layers that read, counted from 0; the second and middle if None.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Runs the code of a custom tokenizer. A model with custom code is refused: a graft cannot carry it.
            text_only (`bool`, *optional*):
                Of a composite model, whether to take its text model alone (`True`) or the whole (`False`). If None, the
                text model where AutoModelForCausalLM gives that (qwen3_5, llama4), else the whole.
            kwargs: other fields of [`EngramConfig`] (`engram_vocab_size=200_000`, `engram_head_dim=48`, ...), or
                `**PRESETS["engram-27b"]`; for a folder or id also arguments of `from_pretrained` (`dtype`, ...).
                Without `engram_vocab_size`, all tables together take at most 2 bytes for each parameter of the
                backbone, in whole thousands of rows a head: at least 1,000, at most 200,000.

        Returns:
            [`EngramForCausalLM`] in evaluation mode; [`EngramForConditionalGeneration`] of a whole composite model.

        Raises:
            `TypeError`: if the backbone is not a model, or a model comes without its tokenizer.
            `ValueError`: if the backbone cannot take a memory, or tables of the default size would take more than half
                of the free memory.
            `ImportError`: for a backbone that carries adapters, in a checkpoint's copy of the code.

        Example:

        ```python
        >>> from engram_transformers import EngramForCausalLM

        >>> model = EngramForCausalLM.from_backbone("runs/donor", engram_layer_ids=[1, 10], engram_vocab_size=200_000)
        ```"""
        conversion = full_package("grafting a memory", "conversion")
        return conversion.graft_onto(cls, donor, tokenizer, engram_layer_ids, trust_remote_code, text_only, **kwargs)

    @takes_old_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        engram_input_ids: torch.LongTensor | None = None,
        engram_attention_mask: torch.Tensor | None = None,
        engram_segment_ids: torch.LongTensor | None = None,
        memory_names: list | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast | tuple:
        """Runs the language model with memory.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*):
                0 at pads, which break n-grams and shut the gate.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Passed to the backbone. Where they restart, a packed document begins (with `attention_mask=None` and
                `use_cache=False`).
            cache (`Cache`, *optional*):
                Holds the memory's history with keys and values; `past_key_values` is its old name.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*):
                Needs `engram_input_ids`.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): for the loss; -100 is ignored.
            use_cache (`bool`, *optional*): defaults to the backbone's setting.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): last positions to compute; 0 for all.
            engram_input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Ids for the memory, -1 where a position is not text. Defaults to `input_ids`.
            engram_attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                A two-dimensional mask, needed if `attention_mask` is not one; with or without the past's columns.
            engram_segment_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Documents packed into one row, only for n-grams and convolution: attention depends on `attention_mask`
                and `position_ids`. Defaults to where `position_ids` restart.
            memory_names (`list`, *optional*):
                For each row the name of a loaded pack, a list of names in their order, or None for no pack. Without it,
                all rows read `active_memories`.
            kwargs (`TransformersKwargs`): further arguments of the backbone, such as `output_hidden_states`: states
                between layers are those before the memory is added, but the first is what layer 0 is given.

        Returns:
            `CausalLMOutputWithPast`, as the backbone returns it.
        """
        if self.backbone_slices_logits:
            kwargs["logits_to_keep"] = logits_to_keep
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )
        ours = (engram_input_ids, engram_attention_mask, engram_segment_ids)
        return self.run_with_memory(self.backbone, inputs, *ours, memory_names=memory_names)

    def generate(self, inputs=None, *args, memory_names: list | None = None, **kwargs):
        """As in Transformers, and every row of the batch may read packs of its own.

        Args:
            inputs (`torch.Tensor`, *optional*): as in Transformers, like all other arguments.
            memory_names (`list`, *optional*): for each row the name of a loaded pack, a list of names in their order,
                or None for no pack. Without it, all rows read `active_memories`.

        Returns:
            `torch.LongTensor` or `ModelOutput`, as in Transformers.

        Raises:
            `ValueError`: for another number of names than rows, or a name that is not loaded.

        Example:

        ```python
        >>> batch = tokenizer(["Who is Ada?", "Who is Ada?"], return_tensors="pt")
        >>> ids = model.generate(**batch, memory_names=["people", None])
        ```"""
        if memory_names is None:
            return super().generate(inputs, *args, **kwargs)
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch = next((len(tensor) for tensor in given if tensor is not None), 1)
        with self.memory.packs.chosen_by_row(memory_names, batch):
            return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        # `generate` looks for `inputs_embeds` in this signature. The backbone prepares its inputs, because some types
        # (phi3, falcon_h1) override it.
        engram_ids = kwargs.pop("engram_input_ids", None)
        prepare = self.backbone.prepare_inputs_for_generation
        name = cache_argument(prepare) or CACHE
        inputs = prepare(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **with_cache_named(kwargs, name),
        )
        inputs = with_cache_named(inputs, CACHE)
        embeds = inputs.get("inputs_embeds")
        batch, length = (inputs["input_ids"] if embeds is None else embeds).shape[:2]
        # Compilable caches get a mask of four dimensions; no mask means no pads. Only this pass's columns, so that the
        # shape is constant in compiled decoding.
        if attention_mask is not None and attention_mask.ndim == 2:
            inputs["engram_attention_mask"] = attention_mask[:, -length:]  # (batch, length)
        elif attention_mask is None and inputs.get("attention_mask") is not None:
            inputs["engram_attention_mask"] = input_ids.new_ones(batch, length)
        if embeds is not None and engram_ids is not None:
            inputs["engram_input_ids"] = engram_ids[:, -length:]  # (batch, length)
        elif engram_ids is not None:
            cache = inputs.get(CACHE)
            first = 0 if cache is None else seen_tokens(cache)
            given = engram_ids[:, first : first + length]  # (batch, up to length): generated ids are text
            inputs["engram_input_ids"] = torch.cat([given, inputs["input_ids"][:, given.shape[1] :]], dim=1)
        return inputs

    def init_continuous_batching(
        self, generation_config=None, continuous_batching_config=None, workload_hints=None
    ) -> ContinuousBatchingManager:
        """As in Transformers; `generate_batch` and `continuous_batching_context_manager` call it.

        All requests read the packs that are active: choose them before. Where the memory is switched off
        (`disable_memory()`, or placed nowhere), the backbone batches alone.

        Args:
            generation_config (`GenerationConfig`, *optional*): the model's own if None.
            continuous_batching_config (`ContinuousBatchingConfig`, *optional*): not changed.
            workload_hints (`WorkloadHints`, *optional*): as in Transformers.

        Returns:
            `ContinuousBatchingManager`

        Raises:
            `NotImplementedError`: for a backbone or a setting with which a request's history would be lost.

        Example:

        ```python
        >>> prompts = tokenizer(["Who is Ada?", "Where is Oslo?"])["input_ids"]
        >>> outputs = model.generate_batch(prompts, max_new_tokens=20)
        >>> print([tokenizer.decode(output.generated_tokens) for output in outputs.values()])
        ```"""
        written = generation_config or self.generation_config
        if self.runs_as_donor:
            return self.backbone.init_continuous_batching(written, continuous_batching_config, workload_hints)
        text_config = self.config.get_text_config(decoder=True)
        settings = batching_settings(continuous_batching_config, written, text_config, self.memory.lookback)
        return super().init_continuous_batching(written, settings, workload_hints)

    def generate_batch(self, inputs, *args, memory_names: list | None = None, **kwargs):
        """As in Transformers.

        Raises:
            `NotImplementedError`: for `memory_names`: all requests read `active_memories`.
        """
        if memory_names is not None:
            raise NotImplementedError(
                f"memory_names={memory_names}: requests that are batched continuously read the same packs. Choose them "
                "before with set_memories(), or use generate(memory_names=...)."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if self.runs_as_donor:
            return result
        layer = self.memory.cache_layer(model_kwargs.get(CACHE), self.config.text_config.num_hidden_layers)
        # `generate` has already done so for the other layers of an assistant's cache.
        if layer is not None and generation_config.is_assistant:
            layer.activate_past_recording()
        return result

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # Recorded histories grow with every pass, so that each pass would be recompiled.
        cache = model_kwargs.get(CACHE)
        if isinstance(cache, Cache) and any(getattr(layer, "record_past", False) for layer in cache.layers):
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    @property
    def base_model(self) -> "WithoutHead":
        """The model without its head and with its memory, for trainers that apply the head themselves."""
        return WithoutHead(self)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)


class EngramForConditionalGeneration(GeneratesAsBackbone, EngramForCausalLM):
    """A whole composite model (image-text-to-text) with an Engram memory in its language model.

    `forward` and `generate` also take what the backbone takes (`pixel_values`, `image_grid_thw`, ...). Positions of
    images, videos and sound are not text: the memory adds nothing there, and no n-gram reaches across them.
    `config.placeholder_ids` are the ids that say so; `engram_input_ids` overrides them.

    Args:
        config ([`EngramConfig`]): the configuration, with `composite_config`.
        backbone (`PreTrainedModel`, *optional*): a composite model to take over; made from `composite_config` if None.
        token_map (`torch.LongTensor` of shape `(vocab_size,)`, *optional*): from [`TokenCompressor`].

    Raises:
        `ValueError`: for a text model, or a composite one that cannot take a memory.
        `RuntimeError`: with transformers before 5.23.

    Example:

    ```python
    >>> import engram_transformers
    >>> from transformers import AutoModelForImageTextToText

    >>> model = AutoModelForImageTextToText.from_pretrained("my-multimodal-graft")
    ```"""

    def __init__(
        self, config: EngramConfig, backbone: PreTrainedModel | None = None, token_map=None, hold_tables: bool = True
    ):
        super().__init__(config, backbone, token_map, hold_tables)
        refuse_own_generation(self.backbone)
        self.input_modalities = self.backbone.input_modalities

    @classmethod
    def refuse_other_kind(cls, config) -> None:
        if config.composite_config is None:
            raise ValueError(
                f"this configuration is of a text model ({config.text_config.model_type}), which EngramForCausalLM "
                "makes; a composite model needs EngramConfig(composite_config=...)."
            )
        refuse_old_composites()


class WithoutHead:
    """A language model's base model: returns hidden states, memory included; other attributes are the backbone's.

    Args:
        model ([`EngramForCausalLM`]): the model.
    """

    def __init__(self, model: EngramForCausalLM):
        self.model = model

    def __call__(self, *args, **kwargs) -> BaseModelOutputWithPast | tuple:
        return EngramModel.forward(self.model, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["model"].backbone, name)


def _drop_head(backbone: PreTrainedModel) -> None:
    """Removes the language-model head from a backbone; the other names stay."""
    head = backbone.get_output_embeddings()
    names = [name for name, module in backbone.named_modules() if module is head]
    backbone.set_output_embeddings(nn.Identity())
    tied = getattr(backbone, "all_tied_weights_keys", {})
    backbone.all_tied_weights_keys = {
        target: source for target, source in tied.items() if not any(target.startswith(f"{name}.") for name in names)
    }
    backbone._tied_weights_keys = None
