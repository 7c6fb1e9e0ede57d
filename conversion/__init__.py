"""Conversion: from a donor's files to an Engram checkpoint. Knows files and donors, and never travels with one."""

from .graft import graft


__all__ = ["graft"]
