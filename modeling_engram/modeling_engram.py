"""EngramModel and EngramForCausalLM: any causal language model of Transformers with an Engram memory in it.

What it chooses: the backbone stays as it is, under `backbone.`, with the parameter names that it always had; everything
else, under `memory.`, belongs to the memory. A forward pass hashes its ids once, reads the rows of all layers, and lets
pre-hooks on the decoder layers add them to the residual stream.
Promises: a fresh graft gives the donor's logits; decoding with a cache equals decoding without; a memory is never
silently random. Never keeps state of a text on a module.
Source: Engram (arXiv 2601.07372), section 2; docs/design.md for what differs.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .cache_engram import refuse_engram_history
from .checkpoint_engram import EngramCheckpointMixin
from .compression_engram import check_token_map
from .configuration_engram import EngramConfig
from .constants_engram import check_constants
from .donor_engram import engram_config, load_donor
from .layer_engram import EngramLayer
from .memory_engram import EngramMemory, insert_memory
from .reading_engram import alive_positions, check_ids, checked_text_ids
from .table_engram import EngramTable, clear_row_gradients, with_row_gradients


logger = logging.get_logger(__name__)


class EngramPreTrainedModel(EngramCheckpointMixin, PreTrainedModel):
    """What both Engram models share: the memory, its insertion, and loading and saving it with the backbone."""

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
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: EngramConfig, backbone: PreTrainedModel | None = None, token_map=None):
        super().__init__(config)
        if token_map is None and config.engram_token_map_sha256 is not None and not on_meta():
            raise ValueError(
                f"the configuration names a token map (SHA-256 {config.engram_token_map_sha256[:16]}...) that it "
                "cannot hold: load the model with from_pretrained, or pass "
                "token_map=TokenCompressor.from_tokenizer(tokenizer).token_map(vocab_size)."
            )
        self.backbone = AutoModelForCausalLM.from_config(config.text_config) if backbone is None else backbone
        self.backbone.is_custom_code = leaves_conversions_to_base_model
        self.memory = EngramMemory(config, token_map)
        self.reads_in_flight = insert_memory(self.backbone, config.text_config.num_hidden_layers, self.memory)
        if not on_meta():
            check_constants(self.memory.hashing.constants, config)
            config.engram_hash_sha256 = self.memory.hashing.constants.sha256()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EngramLayer):
            self.init_engram_layer(module)
        elif isinstance(module, EngramTable):
            for parameter in module.parameters():
                initialization.zeros_(parameter)
        elif not isinstance(module, EngramMemory):
            super()._init_weights(module)

    def init_engram_layer(self, layer: EngramLayer) -> None:
        """Fresh dense weights: keys and value normal with deviations of their own, norms 1, convolution 0."""
        weight = layer.key_value.weight
        if not getattr(weight, "_is_hf_initialized", False):
            keys, value = weight.split([len(weight) - layer.hidden_size, layer.hidden_size])
            keys.normal_(0.0, layer.key_std)
            value.normal_(0.0, layer.value_std)
        if layer.key_value.bias is not None:
            initialization.zeros_(layer.key_value.bias)
        for norm in (layer.key_norm, layer.query_norm):
            initialization.ones_(norm)
        if layer.taps:
            initialization.ones_(layer.conv_norm)
            initialization.zeros_(layer.conv)

    @contextmanager
    def reading_memory(self, input_ids, inputs_embeds, attention_mask, cache, engram_input_ids, engram_attention_mask):
        """Reads the memory for one forward pass and lets the backbone's layers have it while the block runs."""
        if self.reads_in_flight.is_off:
            refuse_engram_history(cache)
            yield
            return
        ids = checked_text_ids(input_ids, inputs_embeds, engram_input_ids)
        check_ids(ids, self.memory.hashing.token_map, may_be_absent=engram_input_ids is not None)
        layer = self.memory.cache_layer(cache, self.config.text_config.num_hidden_layers)
        alive = alive_positions(ids, attention_mask, engram_attention_mask, cache)
        classes = self.memory.hashing.compress(ids.to(self.memory.hashing.token_map.device), alive)
        with self.reads_in_flight.hold(self.memory.read(classes, layer)):
            yield
        if layer is not None:
            # After the backbone has run: hybrid backbones ask the cache's last layer whether anything came before.
            layer.remember_classes(classes)

    @contextmanager
    def without_memory(self):
        """Runs the model as its donor while the block runs, for this thread: no row is read, nothing is added.

        A cache that was begun with memory cannot be continued without it, nor the other way round.

        Example:

        ```python
        >>> with model.without_memory():
        ...     donor_logits = model(**inputs).logits
        ```"""
        with self.reads_in_flight.switch_off():
            yield self

    def fresh_cache(self, past_key_values: Cache | None, use_cache: bool | None) -> tuple[Cache | None, bool]:
        """The cache of a forward pass, and whether the backbone is to use one."""
        if use_cache is None:
            use_cache = bool(getattr(self.config.text_config, "use_cache", False))
        if self.training and self.is_gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.get_text_config(decoder=True))
        return past_key_values, use_cache

    def check_tokenizer(self, tokenizer) -> None:
        """Refuses a tokenizer whose ids do not mean what the memory's rows were trained for.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): the tokenizer to be used with this model.

        Raises:
            `ValueError`: naming the first ids that differ.
        """
        check_token_map(self.memory.hashing.token_map, tokenizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears dense gradients and the tables' row gradients."""
        super().zero_grad(set_to_none)
        waiting = list(with_row_gradients(self.parameters()))
        if any(not parameter.row_grad.applied for parameter in waiting):
            logger.warning_once(
                "The memory's row gradients were dropped without being applied: torch's optimizers do not see them. "
                "Use EngramTrainer, or an optimizer from engram_transformers.training.engram_optimizer(model)."
            )
        clear_row_gradients(waiting)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in Transformers; new ids get classes of their own after all others, so old addresses stay."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.memory.hashing.resize(self.config.text_config.vocab_size, self.config.engram_compressed_vocab_size)
        return embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)


class EngramModel(EngramPreTrainedModel):
    """The backbone without its language-model head, with memory; the same state-dict keys as [`EngramForCausalLM`].

    Args:
        config ([`EngramConfig`]): the configuration.

    Example:

    ```python
    >>> import engram_transformers
    >>> from transformers import AutoModel

    >>> model = AutoModel.from_pretrained("runs/demo/checkpoint")
    ```"""

    def __init__(self, config: EngramConfig, backbone: PreTrainedModel | None = None, token_map=None):
        super().__init__(config, backbone, token_map)
        drop_head(self.backbone)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        engram_input_ids: torch.LongTensor | None = None,
        engram_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Runs the backbone with memory.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*):
                0 at pads, which break n-grams and shut the gate.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): handed to the backbone.
            past_key_values (`Cache`, *optional*): holds the memory's histories beside keys and values.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*):
                Needs `engram_input_ids`.
            use_cache (`bool`, *optional*): defaults to the backbone's setting.
            engram_input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Ids for the memory, -1 where a position is no text. Defaults to `input_ids`.
            engram_attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*):
                The two-dimensional mask, needed when `attention_mask` is not.

        Returns:
            `BaseModelOutputWithPast`, as the backbone returns it.
        """
        past_key_values, use_cache = self.fresh_cache(past_key_values, use_cache)
        with self.reading_memory(
            input_ids, inputs_embeds, attention_mask, past_key_values, engram_input_ids, engram_attention_mask
        ):
            return self.backbone.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )


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

    >>> model = AutoModelForCausalLM.from_pretrained("runs/demo/checkpoint")
    ```"""

    def __init__(self, config: EngramConfig, backbone: PreTrainedModel | None = None, token_map=None):
        super().__init__(config, backbone, token_map)
        self.backbone_slices_logits = "logits_to_keep" in inspect.signature(self.backbone.forward).parameters
        self.post_init()

    @classmethod
    def from_donor(
        cls,
        donor: PreTrainedModel | str,
        tokenizer=None,
        engram_layer_ids: list[int] | None = None,
        *,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> "EngramForCausalLM":
        """Grafts a fresh memory onto a model, in memory and trainable at once; the logits stay the donor's.

        Args:
            donor (`PreTrainedModel` or `str`): a causal language model (taken over, not copied), a folder or a Hub id.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): the donor's; found by itself for a folder or id.
            engram_layer_ids (`list[int]`, *optional*): layers that read, counted from 0; the second and middle if None.
            trust_remote_code (`bool`, *optional*, defaults to `False`): for donors that bring code of their own.
            kwargs: other fields of [`EngramConfig`] (`engram_vocab_size=200_000`, `engram_head_dim=48`, ...); for a
                folder or id also arguments of `from_pretrained` (`dtype`, `device_map`, ...).

        Returns:
            [`EngramForCausalLM`] in evaluation mode.

        Raises:
            `TypeError`: if the donor is no model, or a model comes without its tokenizer.

        Example:

        ```python
        >>> from engram_transformers import EngramForCausalLM

        >>> model = EngramForCausalLM.from_donor("runs/donor", engram_layer_ids=[1, 10], engram_vocab_size=200_000)
        ```"""
        engram = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("engram_")}
        donor, tokenizer = load_donor(donor, tokenizer, trust_remote_code=trust_remote_code, **kwargs)
        config, token_map = engram_config(donor.config, tokenizer, engram_layer_ids=engram_layer_ids, **engram)
        model = cls(config, backbone=donor, token_map=token_map)
        model.generation_config = donor.generation_config
        model.memory.layers.to(device=donor.device, dtype=donor.dtype)
        model.memory.to(device=donor.device)
        return model.eval()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        engram_input_ids: torch.LongTensor | None = None,
        engram_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Runs the language model with memory.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*):
                0 at pads, which break n-grams and shut the gate.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): handed to the backbone.
            past_key_values (`Cache`, *optional*): holds the memory's histories beside keys and values.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*):
                Needs `engram_input_ids`.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): for the loss; -100 is left out.
            use_cache (`bool`, *optional*): defaults to the backbone's setting.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): last positions to compute; 0 for all.
            engram_input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Ids for the memory, -1 where a position is no text. Defaults to `input_ids`.
            engram_attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*):
                The two-dimensional mask, needed when `attention_mask` is not.

        Returns:
            `CausalLMOutputWithPast`, as the backbone returns it.
        """
        past_key_values, use_cache = self.fresh_cache(past_key_values, use_cache)
        if self.backbone_slices_logits:
            kwargs["logits_to_keep"] = logits_to_keep
        with self.reading_memory(
            input_ids, inputs_embeds, attention_mask, past_key_values, engram_input_ids, engram_attention_mask
        ):
            return self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                **kwargs,
            )

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        # `inputs_embeds` is named because `generate` looks for it in this signature.
        engram_ids = kwargs.pop("engram_input_ids", None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if attention_mask is not None and attention_mask.ndim == 2:
            inputs["engram_attention_mask"] = attention_mask  # the parent makes it 4-D for compilable caches
        if inputs.get("inputs_embeds") is not None and engram_ids is not None:
            inputs["engram_input_ids"] = engram_ids[:, -inputs["inputs_embeds"].shape[1] :]
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if self.reads_in_flight.is_off:
            return result
        layer = self.memory.cache_layer(model_kwargs.get("past_key_values"), self.config.text_config.num_hidden_layers)
        # Before anything is recorded: `generate` has already asked the other layers of an assistant's cache to.
        if layer is not None and generation_config.is_assistant:
            layer.activate_past_recording()
        return result

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)


def on_meta() -> bool:
    """Whether modules are being made without storage, to be filled from a checkpoint."""
    return torch.empty(0).device.type == "meta"


def leaves_conversions_to_base_model() -> bool:
    """Stands in for `is_custom_code` of a backbone, so that its renamings of old checkpoint keys keep their scope.

    Transformers 5.23 applies a model type's renamings below the outermost model of that type. Alone that is the base
    model ("model."); in a wrapper it would be the whole language model, and a pattern such as deepseek_v4's ".norm." would
    match one level too high. A model of custom code is passed over, and its base model takes the renamings.
    """
    return True


def drop_head(backbone: PreTrainedModel) -> None:
    """Takes the language-model head off a backbone; the other names stay what they were."""
    head = backbone.get_output_embeddings()
    names = [name for name, module in backbone.named_modules() if module is head]
    backbone.set_output_embeddings(nn.Identity())
    tied = getattr(backbone, "all_tied_weights_keys", {})
    backbone.all_tied_weights_keys = {
        target: source for target, source in tied.items() if not any(target.startswith(f"{name}.") for name in names)
    }
    backbone._tied_weights_keys = None
