"""Configuration floor: what an Engram checkpoint says about itself. No torch tensors, no files, no models."""

from .configuration_engram import EngramConfig, EngramFormatError
from .presets import PRESETS


__all__ = ["PRESETS", "EngramConfig", "EngramFormatError"]
