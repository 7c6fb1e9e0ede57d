"""Configuration floor: what an Engram checkpoint says about itself. No torch tensors, no files, no models."""

from .configuration_engram import EngramConfig, EngramFormatError


__all__ = ["EngramConfig", "EngramFormatError"]
