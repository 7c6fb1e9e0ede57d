"""Which parameters are trainable.

- "memory": tables, projections, norms and convolution of the memory; the backbone is frozen.
- "tables": only the rows.
- "reader": only projections, norms and convolution, over frozen rows.
- "memory+lora": the memory, and the PEFT adapters in the backbone.
- "all": everything.

Promises: the choice is stored in `config.json` and restored by `from_pretrained`; all other parameters are frozen.
Source: docs/training.md.
"""

import sys
from collections.abc import Iterator
from operator import attrgetter

from torch import nn


TRAINABLE = ("memory", "tables", "reader", "memory+lora", "all")


def _check_trainable(trainable: str) -> str:
    """Raises ValueError for an unknown choice."""
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable={trainable!r} must be one of {', '.join(map(repr, TRAINABLE))}.")
    return trainable


def apply_trainable(model, trainable: str, adapters_must_be_there: bool = True) -> None:
    """Sets which parameters of a model are trained.

    Args:
        model ([`EngramForCausalLM`]): the model.
        trainable (`str`): one of `TRAINABLE`.
        adapters_must_be_there (`bool`, *optional*, defaults to `True`): False while a model is loaded.

    Raises:
        `ValueError`: for another value, for "memory+lora" without an adapter, or for a quantised table.
    """
    _check_trainable(trainable)
    adapters = list(adapter_parameters(model)) if trainable in ("memory+lora", "all") else []
    if trainable == "memory+lora" and adapters_must_be_there and not adapters:
        raise ValueError(
            "set_trainable('memory+lora') found no adapter in the backbone: get_peft_model(model, LoraConfig(...)) or "
            "model.add_adapter(LoraConfig(...)) first, or set_trainable('memory')."
        )
    model.memory.tables.requires_grad_(trainable != "reader")  # first: rows of a quantised table refuse it
    for parameter in model.backbone.parameters():
        # Quantised weights are never trained.
        parameter.requires_grad_(trainable == "all" and parameter.is_floating_point())
    model.memory.layers.requires_grad_(trainable != "tables")
    for parameter in adapters:
        parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of the active PEFT adapters in a model."""
    tuners, others = (sys.modules.get(name) for name in ("peft.tuners.tuners_utils", "peft.utils.other"))
    if tuners is None or others is None:  # PEFT was never imported
        return
    for module in model.modules():
        if not isinstance(module, (tuners.BaseTunerLayer, others.AuxiliaryTrainingWrapper)):
            continue
        for name in module.adapter_layer_names:
            held = attrgetter(name)(module) if hasattr(module, name.split(".")[0]) else {}
            for adapter in module.active_adapters:
                if adapter in held:
                    found = held[adapter]
                    yield from [found] if isinstance(found, nn.Parameter) else found.parameters()
