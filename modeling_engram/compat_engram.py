"""Differences between versions of the packages that this one needs, and calls to their private names, in one place.

What it chooses: behaviour is probed or read off a signature; versions are compared only in messages, so that code in an
old checkpoint has the best chance under a later release.
Promises: every private name that is called here or overridden elsewhere is in `private_names_engram.py`. No other
module asks for a version or depends on the name of the cache argument. Never patches another package.
Source: transformers 5.20 to 5.24, torch 2.13, accelerate 1.15, peft 0.21.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields

import torch
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_engram import REMEDY
from .private_names_engram import PRIVATE_NAMES


try:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
    from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION, SLIDING_ATTENTION
    from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
except ImportError:  # a later release, see `kinds_of_pages`
    FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
    PagedAttentionCache, PagedAttentionArgs = type("PagedAttentionCache", (), {}), None


# Name of the cache in arguments and outputs of models: "cache" since Transformers 5.24. Models accept the old name
# until 5.40; after that they would ignore it silently.
NEW_NAME, OLD_NAME = "cache", "past_key_values"
CACHE = NEW_NAME if NEW_NAME in {field.name for field in fields(CausalLMOutputWithPast)} else OLD_NAME
OLD_NAME_GONE = "5.40.0"


def cache_argument(forward: Callable) -> str | None:
    """Returns the name of the cache argument of a model's forward; None if it takes none. Custom code keeps the old
    name.
    """
    parameters = inspect.signature(forward).parameters
    return next((name for name in (NEW_NAME, OLD_NAME) if name in parameters), None)


def takes_old_cache_name(forward: Callable) -> Callable:
    """Decorates a forward that has an argument `cache` and `**kwargs`, so that it accepts `past_key_values` too.

    Under Transformers that say `cache`, the old name gives their FutureWarning. Under older ones, `past_key_values` is
    added to the signature, which `generate` reads.
    """
    if CACHE == NEW_NAME:
        return deprecate_kwarg(OLD_NAME, version=OLD_NAME_GONE, new_name=NEW_NAME)(forward)

    @functools.wraps(forward)
    def renaming(*args, **kwargs):
        if OLD_NAME in kwargs:
            cache = kwargs.pop(OLD_NAME)
            if kwargs.get(NEW_NAME) is not None and cache is not None:
                raise ValueError(
                    f"both `cache` and `past_key_values` were given: under transformers {transformers_version} "
                    "`generate` knows the second alone. Pass the cache as past_key_values."
                )
            if cache is not None or NEW_NAME not in kwargs:
                kwargs[NEW_NAME] = cache
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    old = inspect.Parameter(OLD_NAME, inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, rest = signature.parameters.values()
    renaming.__signature__ = signature.replace(parameters=[*named, old, rest])
    return renaming


def with_cache_named(inputs: dict, name: str) -> dict:
    """Returns arguments of a forward with the cache under `name`, whatever its name in `inputs`."""
    other = OLD_NAME if name == NEW_NAME else NEW_NAME
    if other not in inputs:
        return inputs
    return {(name if key == other else key): value for key, value in inputs.items()}


def counts_positions(config: PreTrainedConfig) -> bool:
    """Whether a cache made for the text model's `config` has an attention layer, which counts the tokens read."""
    cache = DynamicCache(config=config)
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def mark_static_address(tensor: torch.Tensor) -> None:
    """Tells CUDA graphs that a tensor keeps its address, as Transformers' cache layers do; nothing public does."""
    torch._dynamo.mark_static_address(tensor)


def is_replica(module: nn.Module) -> bool:
    """Whether a module is a copy made by nn.DataParallel, whose parameters are plain attributes."""
    return getattr(module, "_is_replica", False)


def data_parallel_replica(module: nn.Module) -> nn.Module:
    """Returns a replica as nn.DataParallel makes it; the public function needs several GPUs."""
    return module._replicate_for_data_parallel()


def undo_compile(module: nn.Module) -> None:
    """Undoes `module.compile()`, which has no public inverse."""
    module._compiled_call_impl = None


def wrapper_subclass(cls: type, like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of a subclass with another tensor's shape, dtype and device, and no storage."""
    return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)


# The operator that gradient scalers call.
UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


def keeps_own_state(backbone: nn.Module) -> bool:
    """Whether a backbone keeps its state elsewhere than in a `Cache` that `generate` makes."""
    on_modules = hasattr(backbone.base_model, "_setup_cache")  # recurrent_gemma
    return on_modules or not backbone._supports_default_dynamic_cache()


# Class attributes that Transformers reads and only the backbone knows.
_TRAITS = (
    "_is_stateful",
    "_can_compile_fullgraph",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
)


def take_over_traits(model: nn.Module, backbone: nn.Module) -> None:
    """Copies the class traits of the backbone to the model."""
    for name in _TRAITS:
        if hasattr(backbone, name):
            setattr(model, name, getattr(backbone, name))


class GeneratesAsBackbone:
    """Leaves to `self.backbone` what composite models override of `GenerationMixin`: positions, images, beams."""

    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        own = {name: value for name, value in model_kwargs.items() if not name.startswith("engram_")}
        self.backbone._validate_model_kwargs(own)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args, **kwargs) -> dict:
        return self.backbone._maybe_prepare_encoder_kwargs_for_generation(*args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args, **kwargs) -> torch.Tensor:
        return self.backbone._prepare_position_ids_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args, **kwargs) -> tuple:
        return self.backbone._expand_inputs_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args, **kwargs) -> dict:
        return self.backbone._update_model_kwargs_for_generation(*args, **kwargs)


# What a composite model may override of `GenerationMixin`: what ours leaves to it, and `_expand_multimodal_outputs`,
# which `_expand_inputs_for_generation` calls.
LEFT_TO_BACKBONE = {name for name in vars(GeneratesAsBackbone) if not name.startswith("__")}
LEFT_TO_BACKBONE |= {"prepare_inputs_for_generation", "_expand_multimodal_outputs"}


def refuse_old_composites() -> None:
    """Raises RuntimeError where some of Transformers' own composite models generate wrongly."""
    if Version(transformers_version).release < (5, 23):
        raise RuntimeError(
            f"whole composite models with a memory need transformers 5.23 or newer, this is {transformers_version}: "
            "some of Transformers' own composite models generate wrongly here. Upgrade, or graft the text model alone: "
            "text_only=True."
        )


def refuse_own_generation(backbone: nn.Module) -> None:
    """Raises ValueError for a backbone that replaces other parts of `generate`, which would not run in our model."""
    replaced = sorted(
        name
        for name, own in vars(GenerationMixin).items()
        if name not in LEFT_TO_BACKBONE
        and not name.startswith("__")
        and inspect.getattr_static(type(backbone), name, own) is not own
    )
    if replaced:
        raise ValueError(
            f"{type(backbone).__name__} has its own {', '.join(replaced)} in place of GenerationMixin's, and a model "
            "with a memory would not generate as it does: whole models of this type are not supported. Graft its text "
            "model alone: text_only=True."
        )


def take_over_attention(config: PreTrainedConfig, backbone: PreTrainedConfig) -> None:
    """Copies the attention implementation of the backbone.

    The public setter would set the backbone's parts too, which may differ (got_ocr2's language model from the whole).
    """
    config._attn_implementation_internal = backbone._attn_implementation


def leave_out_of_ddp(model: nn.Module, names: list[str]) -> None:
    """Sets which parameters and buffers DistributedDataParallel ignores."""
    model._ddp_params_and_buffers_to_ignore = names


def left_out_of_ddp(model: nn.Module) -> list[str]:
    """Returns what `leave_out_of_ddp` was given."""
    return model._ddp_params_and_buffers_to_ignore


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether a tensor was loaded from a checkpoint and must not be initialised."""
    return getattr(tensor, "_is_hf_initialized", False)


def mark_loaded(module: nn.Module) -> None:
    """Keeps Transformers from initialising a module."""
    module._is_hf_initialized = True


def carries_adapters(model: nn.Module) -> bool:
    """Whether Transformers has added a PEFT adapter to a model."""
    return getattr(model, "_hf_peft_config_loaded", False)


def set_carries_adapters(model: nn.Module, carries: bool) -> None:
    """Tells Transformers whether a model has an adapter."""
    model._hf_peft_config_loaded = carries


def adapter_reaches(tuner, config, name: str) -> bool:
    """Whether a PEFT tuner would adapt the module `name`."""
    return bool(tuner._check_target_module_exists(config, name))


def register_adapter_layer(config, layers: dict[type, type]) -> None:
    """Tells PEFT's LoRA which of its layers wraps which of ours."""
    config._register_custom_module(layers)


def check_parent(parent: type, path: str) -> None:
    """Raises ImportError if a class has lost a private method that we override or call: nothing would call ours then.

    Args:
        parent (`type`): a class of another package.
        path (`str`): its dotted path in `PRIVATE_NAMES`.
    """
    names = [p.name.removeprefix(f"{path}.") for p in PRIVATE_NAMES if p.name.startswith(f"{path}.")]
    if missing := [name for name in names if not hasattr(parent, name)]:
        raise ImportError(
            f"{path} of transformers {transformers_version} has no {missing}, which this package builds on: {REMEDY}"
        )


# Attention implementations of serving engines.
ENGINES = ("vllm", "sglang", "paged")


def refuse_engine(config: PreTrainedConfig) -> None:
    """Raises NotImplementedError if a serving engine runs the backbone: the memory cannot see its cache.

    Not for a pass of Transformers' own continuous batching, which hands over its cache.
    """
    attention = config._attn_implementation
    if isinstance(attention, str) and any(name in attention for name in ENGINES):
        raise NotImplementedError(
            f"attention {attention!r} belongs to a serving engine, which hands over the next tokens of many requests "
            "without the tokens before them: the memory would read wrong n-grams. Use generate() of this model."
        )


# The arguments of a forward pass that say where a paged cache holds the tokens of each request.
_PAGE_ARGUMENTS = {"cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index", "block_table"}


def kinds_of_pages(config: PreTrainedConfig) -> set[str]:
    """Returns the kinds of attention for which continuous batching keeps pages of a text model.

    Raises:
        `NotImplementedError`: if a layer has no pages, or Transformers keeps or describes pages in another way.
    """
    if PagedAttentionArgs is None or not set(PagedAttentionArgs.__annotations__) >= _PAGE_ARGUMENTS:
        raise NotImplementedError(
            f"continuous batching of transformers {transformers_version} has other pages than those that the memory "
            "knows: install transformers 5.20.2 to 5.24, or use generate() with a batch."
        )
    others = set(getattr(config, "layer_types", None) or []) - {FULL_ATTENTION, SLIDING_ATTENTION}
    if others:
        raise NotImplementedError(
            f"Transformers' continuous batching has no pages for layers of {sorted(others)}: use generate() with a "
            "batch."
        )
    return set(group_layers_by_attn_type(config))


class _ProbedLayer(GradientCheckpointingLayer):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.square()  # saves its input for the backward pass, without which nothing is recomputed


def _probe_checkpointing() -> tuple[bool, bool]:
    layer, hooked, checkpointed = _ProbedLayer(), [], []

    def checkpointing(function, *args):
        checkpointed.append(torch.is_grad_enabled())
        return checkpoint(function, *args, use_reentrant=False)

    layer.register_forward_pre_hook(lambda *_: hooked.append(1))
    layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpointing
    with torch.inference_mode(False), torch.enable_grad():
        layer(torch.ones(1, device="cpu", requires_grad=True)).sum().backward()
        runs_hooks_again = len(hooked) > 1
        with torch.no_grad():
            layer(torch.ones(1, device="cpu"))
    return runs_hooks_again, False in checkpointed


# Whether a checkpointed layer runs its hooks again in the backward pass (Transformers before 5.23), and whether it
# drops the cache also in passes without gradients (before 5.24).
CHECKPOINTS_RUN_HOOKS, CHECKPOINTS_WITHOUT_GRADIENTS = _probe_checkpointing()


def refuse_checkpointing() -> None:
    """Raises RuntimeError if gradient checkpointing would run the memory's hooks a second time."""
    if CHECKPOINTS_RUN_HOOKS:
        raise RuntimeError(
            f"gradient checkpointing with a memory needs transformers 5.23 or newer, this is {transformers_version}: "
            "here a layer's hooks run again in the backward pass, which would give wrong gradients. Upgrade, or train "
            "without gradient checkpointing."
        )


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any layer of a model uses gradient checkpointing."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def without_checkpointing(model: nn.Module):
    """Disables gradient checkpointing inside the block, so that a pass without gradients keeps its cache."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
