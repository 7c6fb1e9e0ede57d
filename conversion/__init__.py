"""Conversion: from a backbone's files to an Engram checkpoint. Never copied into a checkpoint."""

from .backbone import graft_onto
from .graft import graft
from .plan import GraftPlan, plan_graft
from .readdress import Readdressed, text_blocks
from .recipes import graft_arguments, read_recipe
from .resize import resize_memory


__all__ = [
    "GraftPlan",
    "Readdressed",
    "graft",
    "graft_arguments",
    "graft_onto",
    "plan_graft",
    "read_recipe",
    "resize_memory",
    "text_blocks",
]
