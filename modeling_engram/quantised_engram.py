"""Backbones that a quantiser of Transformers has changed: what a graft takes over from them.

Promises: a memory stays in its own precision whatever the backbone's is (see `Projection` in `layer_engram.py`);
modules that were to be left alone are left alone under the names of a graft. Never quantises anything.
Source: transformers 5.23, `quantizers/`; torchao 0.18 and bitsandbytes 0.50 for what saving does with a state dict.
"""

import copy
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


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
