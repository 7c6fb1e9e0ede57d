"""What differs between versions of the packages below this one: one place for it, and for their private names.

What it chooses: behaviour is probed or read off a signature, and versions are compared only in messages, so that code
which travels with a checkpoint has the best chance under a later release.
Promises: every private name that is touched here or overridden elsewhere is in `private_names_engram.py`. No other
module asks for a version or depends on the name of the cache argument. Never patches another package.
Source: transformers 5.20 to 5.24, torch 2.13, accelerate 1.15, peft 0.21.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_engram import REMEDY
from .private_names_engram import PRIVATE_NAMES


# What models of this Transformers call the cache, in arguments and in outputs: "cache" since 5.24. The old name is
# renamed in arguments until 5.40; after that, stock models would swallow it without a word.
NEW_NAME, OLD_NAME = "cache", "past_key_values"
CACHE = NEW_NAME if NEW_NAME in {field.name for field in fields(CausalLMOutputWithPast)} else OLD_NAME
OLD_NAME_GONE = "5.40.0"


def cache_argument(forward: Callable) -> str | None:
    """What a model's forward calls the cache: custom code from the Hub keeps the old name; None if it takes none.

    Args:
        forward (`Callable`): a method of a model.
    """
    parameters = inspect.signature(forward).parameters
    return next((name for name in (NEW_NAME, OLD_NAME) if name in parameters), None)


def takes_old_cache_name(forward: Callable) -> Callable:
    """Lets a forward with an argument `cache` take `past_key_values` too, as this Transformers' own models do.

    Where models call it `cache`, the old name gives Transformers' own FutureWarning. Where they call it
    `past_key_values`, that name belongs to the signature, which `generate` reads.

    Args:
        forward (`Callable`): a method with an argument `cache` and `**kwargs`.
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
    """Arguments of a forward with the cache under `name`, whatever it is called in `inputs`."""
    other = OLD_NAME if name == NEW_NAME else NEW_NAME
    if other not in inputs:
        return inputs
    return {(name if key == other else key): value for key, value in inputs.items()}


def counts_positions(config: PreTrainedConfig) -> bool:
    """Whether a cache made for a backbone has a layer of attention, which knows how many tokens were read.

    Args:
        config (`PreTrainedConfig`): of the text model.
    """
    cache = DynamicCache(config=config)
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def mark_static_address(tensor: torch.Tensor) -> None:
    """Tells CUDA graphs that a tensor stays where it is.

    `torch.compiler` has no public function for it; Transformers' own cache layers use this one.
    """
    torch._dynamo.mark_static_address(tensor)


def is_replica(module: nn.Module) -> bool:
    """Whether a module is one of nn.DataParallel's copies, whose parameters are plain attributes.

    Torch marks them with a private attribute; nothing public tells them from other modules.
    """
    return getattr(module, "_is_replica", False)


def data_parallel_replica(module: nn.Module) -> nn.Module:
    """A replica of a module as nn.DataParallel makes it, whose public function wants several GPUs."""
    return module._replicate_for_data_parallel()


def undo_compile(module: nn.Module) -> None:
    """Takes back `module.compile()`, for which torch has no public way."""
    module._compiled_call_impl = None


def wrapper_subclass(cls: type, like: torch.Tensor) -> torch.Tensor:
    """A tensor of a subclass that has the shape, dtype and device of another one, and no storage."""
    return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)


# What gradient scalers call for lists of gradients.
UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


def keeps_own_state(backbone: nn.Module) -> bool:
    """Whether a backbone keeps its state elsewhere than in a `Cache` that `generate` makes."""
    on_modules = hasattr(backbone.base_model, "_setup_cache")  # recurrent_gemma
    return on_modules or not backbone._supports_default_dynamic_cache()


# What Transformers asks of a class and only the backbone knows: whether states can be rolled back, what compiles, and
# which kinds of attention there are.
_TRAITS = (
    "_is_stateful",
    "_can_compile_fullgraph",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
)


def take_over_traits(model: nn.Module, backbone: nn.Module) -> None:
    """Lets a model answer what its backbone's class would."""
    for name in _TRAITS:
        if hasattr(backbone, name):
            setattr(model, name, getattr(backbone, name))


def take_over_attention(config: PreTrainedConfig, backbone: PreTrainedConfig) -> None:
    """The kind of attention that a backbone was made with."""
    config._attn_implementation = backbone._attn_implementation


def leave_out_of_ddp(model: nn.Module, names: list[str]) -> None:
    """Names of parameters and buffers that DistributedDataParallel leaves alone."""
    model._ddp_params_and_buffers_to_ignore = names


def left_out_of_ddp(model: nn.Module) -> list[str]:
    """What `leave_out_of_ddp` was given."""
    return model._ddp_params_and_buffers_to_ignore


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether a tensor was filled from a checkpoint, so that nothing may initialise it."""
    return getattr(tensor, "_is_hf_initialized", False)


def mark_loaded(module: nn.Module) -> None:
    """Keeps Transformers from giving a module fresh weights."""
    module._is_hf_initialized = True


def carries_adapters(model: nn.Module) -> bool:
    """Whether Transformers has put an adapter of PEFT into a model."""
    return getattr(model, "_hf_peft_config_loaded", False)


def set_carries_adapters(model: nn.Module, carries: bool) -> None:
    """Tells Transformers whether a model has an adapter."""
    model._hf_peft_config_loaded = carries


def adapter_reaches(tuner, config, name: str) -> bool:
    """Whether a tuner of PEFT would adapt the module `name`."""
    return bool(tuner._check_target_module_exists(config, name))


def register_adapter_layer(config, layers: dict[type, type]) -> None:
    """Tells PEFT's LoRA which of its layers to put around which of ours."""
    config._register_custom_module(layers)


def check_parent(parent: type, path: str) -> None:
    """Refuses to build on a class that has lost a private method which one of ours stands in for, or calls.

    A method under a name that was dropped is never called, and nothing else would say so.

    Args:
        parent (`type`): a class of another package.
        path (`str`): its dotted path in `PRIVATE_NAMES`.

    Raises:
        `ImportError`: naming the methods and the version.
    """
    names = [p.name.removeprefix(f"{path}.") for p in PRIVATE_NAMES if p.name.startswith(f"{path}.")]
    if missing := [name for name in names if not hasattr(parent, name)]:
        raise ImportError(
            f"{path} of transformers {transformers_version} has no {missing}, which this package builds on: {REMEDY}"
        )


# Attention that reads keys and values from an engine's own pages.
ENGINES = ("vllm", "sglang", "paged")


def refuse_engine(config: PreTrainedConfig) -> None:
    """Raises NotImplementedError where a serving engine runs the backbone, whose cache the memory cannot see.

    Transformers tells which attention was set by a private attribute alone; `set_attn_implementation` is public.

    Args:
        config (`PreTrainedConfig`): of the backbone.
    """
    attention = config._attn_implementation  # nothing public tells it
    if isinstance(attention, str) and any(name in attention for name in ENGINES):
        raise NotImplementedError(
            f"attention {attention!r} belongs to a serving engine, which hands over the next tokens of many requests "
            "without the tokens before them: the memory would read wrong n-grams. Use generate() of this model."
        )


class _ProbedLayer(GradientCheckpointingLayer):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.square()  # keeps its input for the backward pass, or nothing would be run again


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


# Whether a checkpointed layer of Transformers runs its hooks a second time in the backward pass (before 5.23), and
# whether it drops the cache also where nothing will be run again, because no gradient is wanted (before 5.24).
CHECKPOINTS_RUN_HOOKS, CHECKPOINTS_WITHOUT_GRADIENTS = _probe_checkpointing()


def refuse_checkpointing() -> None:
    """Raises RuntimeError where gradient checkpointing would run the memory's hooks a second time."""
    if CHECKPOINTS_RUN_HOOKS:
        raise RuntimeError(
            f"gradient checkpointing with a memory needs transformers 5.23 or newer, this is {transformers_version}: "
            "here a layer's hooks run again in the backward pass, which would give wrong gradients. Upgrade, or train "
            "without gradient checkpointing."
        )


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any layer of a model is checkpointed in training."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def without_checkpointing(model: nn.Module):
    """Runs a pass without gradients as this Transformers would from 5.24 on: nothing is run again, the cache is kept.

    Args:
        model (`nn.Module`): whose layers have the flag `gradient_checkpointing`.
    """
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
