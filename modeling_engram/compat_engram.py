"""What differs between versions of the packages below this one: one place for it, and for their private names.

What it chooses: behaviour is probed or read off a signature, and versions are compared only in messages, so that code
which travels with a checkpoint has the best chance under a later release.
Promises: no other module of the package asks for a version or depends on the name of the cache argument. Never patches
another package.
Source: transformers 5.20 to 5.24.
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


# Attention that reads keys and values from an engine's own pages.
ENGINES = ("vllm", "sglang", "paged")


def refuse_engine(config: PreTrainedConfig) -> None:
    """Raises NotImplementedError where a serving engine runs the backbone, whose cache the memory cannot see.

    Transformers tells which attention was set by a private attribute alone; `set_attn_implementation` is public.

    Args:
        config (`PreTrainedConfig`): of the backbone.
    """
    attention = config._attn_implementation
    if isinstance(attention, str) and any(name in attention for name in ENGINES):
        raise NotImplementedError(
            f"attention {attention!r} belongs to a serving engine, which hands over the next tokens of many requests "
            "without the tokens before them: the memory would read wrong n-grams. Use generate() of this model."
        )


class _ProbedLayer(GradientCheckpointingLayer):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2


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
