"""Conversion: from a backbone's files to an Engram checkpoint. Never copied into a checkpoint."""

from .backbone import graft_onto
from .graft import graft


__all__ = ["graft", "graft_onto"]
