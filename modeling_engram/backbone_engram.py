"""Backbones: finding the layers that a memory goes in front of, and what a graft takes over from a quantiser.

What it chooses: layers are found by their structure, and never by a model's name.
Promises: a memory stays in its own precision whatever the backbone's is (see `Projection` in `layer_engram.py`);
modules that were to be left alone are left alone under the names of a graft. Never quantises anything.
Source: docs/design.md, "Any backbone"; transformers 5.23, `quantizers/`; torchao 0.18 and bitsandbytes 0.50 for what
saving does with a state dict.
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


# What Transformers puts on a model that it has quantised.
QUANTISER_ATTRIBUTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")

# Fields of `quantization_config` that name modules.
SKIP_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules")


def take_over_quantiser(model: PreTrainedModel, backbone: PreTrainedModel) -> None:
    """Lets a model be saved by the quantiser of its backbone, if there is one."""
    for name in QUANTISER_ATTRIBUTES:
        if getattr(backbone, name, None) is not None:
            setattr(model, name, getattr(backbone, name))


def quantization_in_graft(quantization):
    """A copy of a donor's `quantization_config` that names its modules also as they are called in a graft."""
    quantization = copy.deepcopy(quantization)
    held = quantization if isinstance(quantization, dict) else vars(quantization)
    for field in SKIP_LISTS:
        if held.get(field):
            held[field] = [*held[field], *(f"backbone.{name}" for name in held[field])]
    return quantization


@contextmanager
def only_state(model: PreTrainedModel, state: dict[str, torch.Tensor]):
    """Lets `model.state_dict()` give `state` while the block runs: a quantiser saves that, whatever it is handed."""
    model.__dict__["state_dict"] = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del model.__dict__["state_dict"]


def find_decoder_layers(backbone: nn.Module, depth: int) -> nn.ModuleList:
    """The backbone's decoder layers: its one list of `depth` checkpointable layers, whatever it is called.

    Args:
        backbone (`nn.Module`): any causal language model of Transformers.
        depth (`int`): `num_hidden_layers` of its configuration.

    Raises:
        `ValueError`: if there is none, or more than one.
    """
    found = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(found) != 1:
        named = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"{type(backbone).__name__} must have exactly one ModuleList of {depth} GradientCheckpointingLayers (its "
            f"num_hidden_layers), found: {named}. Engram cannot be inserted into this backbone."
        )
    return found[0][1]


def leaves_conversions_to_base_model() -> bool:
    """Stands in for `is_custom_code` of a backbone, so that its renamings of old checkpoint keys keep their scope.

    Transformers 5.23 applies a model type's renamings below the outermost model of that type. Alone that is the base
    model ("model."); in a wrapper it would be the whole language model, and a pattern such as deepseek_v4's ".norm."
    would match one level too high. A model of custom code is passed over, and its base model takes the renamings.
    """
    return True
