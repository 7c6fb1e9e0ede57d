"""What is trained, in one word.

- "memory": tables, projections, norms and convolution of the memory; the backbone is frozen.
- "tables": the rows alone.
- "memory+lora": the memory, and the adapters that PEFT has put into the backbone.
- "all": everything.

Promises: the word is kept in `config.json` and restored by `from_pretrained`; what it does not name is frozen.
Source: docs/training.md.
"""

import sys
from collections.abc import Iterator
from operator import attrgetter

from torch import nn


TRAINABLE = ("memory", "tables", "memory+lora", "all")


def _check_trainable(word: str) -> str:
    """Raises ValueError for a word that is no mode."""
    if word not in TRAINABLE:
        raise ValueError(f"trainable={word!r} must be one of {', '.join(map(repr, TRAINABLE))}.")
    return word


def apply_trainable(model, word: str, adapters_must_be_there: bool = True) -> None:
    """Says which parameters of a model learn.

    Args:
        model ([`EngramForCausalLM`]): the model.
        word (`str`): one of `TRAINABLE`.
        adapters_must_be_there (`bool`, *optional*, defaults to `True`): False while a model is loaded.

    Raises:
        `ValueError`: for another word, or for "memory+lora" without an adapter.
    """
    _check_trainable(word)
    adapters = list(adapter_parameters(model)) if word in ("memory+lora", "all") else []
    if word == "memory+lora" and adapters_must_be_there and not adapters:
        raise ValueError(
            "set_trainable('memory+lora') found no adapter in the backbone: get_peft_model(model, LoraConfig(...)) or "
            "model.add_adapter(LoraConfig(...)) first, or set_trainable('memory')."
        )
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(word == "all" and parameter.is_floating_point())  # quantised weights never learn
    model.memory.requires_grad_(True)
    model.memory.layers.requires_grad_(word != "tables")
    for parameter in adapters:
        parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the active adapters that PEFT has put into a model."""
    tuners, others = (sys.modules.get(name) for name in ("peft.tuners.tuners_utils", "peft.utils.other"))
    if tuners is None or others is None:  # nothing of PEFT's can be in a model
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
