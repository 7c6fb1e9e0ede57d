"""Engram for Hugging Face: a memory of hashed n-grams for any causal language model of Transformers.

Importing this package registers [`EngramConfig`], [`EngramModel`], [`EngramForCausalLM`] and
[`EngramForConditionalGeneration`] with the Auto classes, so that `AutoModelForCausalLM.from_pretrained(folder)` reads
an Engram checkpoint. It loads no model and no trainer.
"""

import importlib

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from . import adapters
from .configuration_engram import EngramConfig, EngramFormatError
from .guard_engram import register
from .modeling_engram import EngramForCausalLM, EngramForConditionalGeneration, EngramModel


__version__ = "0.1.0"

# Names that need more than inference does are imported on first use.
_ELSEWHERE = {
    "EngramTrainer": "training",
    "EngramTrainingArguments": "training",
    "create_optimizer": "training",
    "graft": "conversion",
    "check_generation": "inspection",
    "verify_checkpoint": "inspection",
}

__all__ = [
    "EngramConfig",
    "EngramForCausalLM",
    "EngramForConditionalGeneration",
    "EngramFormatError",
    "EngramModel",
    *_ELSEWHERE,
]

# Parts of the package that models call and that are not copied into a checkpoint.
register(
    adapters=lambda: adapters,
    conversion=lambda: importlib.import_module(".conversion", __name__),
    training=lambda: importlib.import_module(".training", __name__),
)
adapters.support_peft_when_imported()

AutoConfig.register(EngramConfig.model_type, EngramConfig, exist_ok=True)
AutoModel.register(EngramConfig, EngramModel, exist_ok=True)
AutoModelForCausalLM.register(EngramConfig, EngramForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(EngramConfig, EngramForConditionalGeneration, exist_ok=True)

# Every save then carries the code that `trust_remote_code=True` needs on a machine without this package.
EngramConfig.register_for_auto_class()
EngramModel.register_for_auto_class("AutoModel")
EngramForCausalLM.register_for_auto_class("AutoModelForCausalLM")
EngramForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


def __getattr__(name: str):
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ELSEWHERE[name]}", __name__), name)
