"""Conversion: from a backbone's files to an Engram checkpoint. Never copied into a checkpoint."""

from .backbone import graft_onto
from .foreign_import import export_memory, import_memory
from .graft import graft
from .plan import GraftPlan, plan_graft
from .recipes import graft_arguments, read_recipe


__all__ = [
    "GraftPlan",
    "export_memory",
    "graft",
    "graft_arguments",
    "graft_onto",
    "import_memory",
    "plan_graft",
    "read_recipe",
]
