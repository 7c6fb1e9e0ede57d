"""Backbones: finds the layers that a memory is added to, and takes over what a quantiser left on the model.

What it chooses: layers are found by their structure, never by a model's name.
Promises: a memory keeps its own precision whatever the backbone's is (see `Projection` in `layer_engram.py`); modules
that a quantiser skips are skipped under their names in a graft too. Never quantises anything.
Source: docs/design.md, "Any backbone"; transformers 5.23, `quantizers/`; torchao 0.18 and bitsandbytes 0.50.
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_engram import holds_other_models


# Attributes that Transformers sets on a quantised model.
QUANTISER_ATTRIBUTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")

# Fields of `quantization_config` that name modules.
SKIP_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules")


def take_over_quantiser(model: PreTrainedModel, backbone: PreTrainedModel) -> None:
    """Lets the backbone's quantiser, if there is one, save the model."""
    for name in QUANTISER_ATTRIBUTES:
        if getattr(backbone, name, None) is not None:
            setattr(model, name, getattr(backbone, name))


def quantization_in_graft(quantization):
    """Copies a backbone's `quantization_config` and adds the names that its modules have in a graft."""
    quantization = copy.deepcopy(quantization)
    held = quantization if isinstance(quantization, dict) else vars(quantization)
    for field in SKIP_LISTS:
        if held.get(field):
            held[field] = [*held[field], *(f"backbone.{name}" for name in held[field])]
    return quantization


@contextmanager
def only_state(model: PreTrainedModel, state: dict[str, torch.Tensor]):
    """Makes `model.state_dict()` return `state` inside the block: quantisers save that and ignore their argument."""
    model.__dict__["state_dict"] = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del model.__dict__["state_dict"]


def new_backbone(config) -> PreTrainedModel:
    """Makes a backbone of an [`EngramConfig`], with fresh weights."""
    maker = AutoModelForCausalLM if config.composite_config is None else AutoModelForImageTextToText
    return maker.from_config(config.whole_config)


def language_model(backbone: nn.Module) -> nn.Module:
    """Returns the model that reads the text: the language model of a composite backbone, else the backbone."""
    config = getattr(backbone, "config", None)
    return backbone.get_decoder() if config is not None and holds_other_models(config) else backbone


def find_decoder_layers(backbone: nn.Module, depth: int) -> nn.ModuleList:
    """Finds the backbone's decoder layers: the only list of `depth` checkpointable layers in its language model.

    Raises:
        `ValueError`: if there is none, or more than one.
    """
    reader = language_model(backbone)
    found = [
        (name, module)
        for name, module in reader.named_modules()
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
    """Replaces `is_custom_code` of a backbone, so that its renamings of old checkpoint keys keep their scope.

    Transformers 5.23 applies a model type's renamings below the outermost model of that type. In a graft that would be
    the whole language model, not its base model, and a pattern such as deepseek_v4's ".norm." would match one level too
    high. Models of custom code are skipped, so the base model gets the renamings again.
    """
    return True
