"""Conversion: from a donor's files to an Engram checkpoint. Knows files and donors, and never travels with one."""

from .backbone import graft_onto
from .graft import graft


__all__ = ["graft", "graft_onto"]
