"""Configuration of Engram checkpoints. No torch tensors, no files, no models."""

from .configuration_engram import PRESETS, EngramConfig, EngramFormatError


__all__ = ["PRESETS", "EngramConfig", "EngramFormatError"]
