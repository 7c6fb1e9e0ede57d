"""Engram for Hugging Face: a memory of hashed n-grams for any causal language model of Transformers.

Importing this package registers [`EngramConfig`], [`EngramModel`] and [`EngramForCausalLM`] with the Auto classes, so
that `AutoModelForCausalLM.from_pretrained(folder)` reads an Engram checkpoint. It loads no model and no trainer.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import adapters
from .adapters import load_memory_pack, save_memory_pack
from .compression_engram import TokenCompressor
from .configuration import PRESETS
from .configuration_engram import EngramConfig, EngramFormatError
from .guard_engram import register
from .hashing_engram import NgramHasher
from .layer_engram import EngramLayer
from .modeling_engram import EngramForCausalLM, EngramModel


__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "EngramConfig",
    "EngramForCausalLM",
    "EngramFormatError",
    "EngramLayer",
    "EngramModel",
    "EngramTrainer",
    "EngramTrainingArguments",
    "NgramHasher",
    "TokenCompressor",
    "load_memory_pack",
    "save_memory_pack",
]

register(adapters)  # what models call that is not in the files beside a checkpoint
adapters.support_peft_when_imported()

AutoConfig.register(EngramConfig.model_type, EngramConfig, exist_ok=True)
AutoModel.register(EngramConfig, EngramModel, exist_ok=True)
AutoModelForCausalLM.register(EngramConfig, EngramForCausalLM, exist_ok=True)

# With these, every save carries the code that `trust_remote_code=True` needs on a machine without this package.
EngramConfig.register_for_auto_class()
EngramModel.register_for_auto_class("AutoModel")
EngramForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def __getattr__(name: str):
    # They pull in transformers' Trainer, which inference does not need.
    if name in ("EngramTrainer", "EngramTrainingArguments"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
