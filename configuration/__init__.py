"""Configuration of Engram checkpoints. No torch tensors, no files, no models."""

from .configuration_engram import EngramConfig, EngramFormatError
from .presets import PRESETS


__all__ = ["PRESETS", "EngramConfig", "EngramFormatError"]
