"""Conversion: from a backbone's files to an Engram checkpoint. Never copied into a checkpoint."""

from .backbone import graft_onto
from .foreign_import import export_memory, import_memory
from .graft import graft
from .plan import GraftPlan, plan_graft
from .recipes import graft_arguments, read_recipe
from .table_cast import CastReport, cast


__all__ = [
    "CastReport",
    "GraftPlan",
    "cast",
    "export_memory",
    "graft",
    "graft_arguments",
    "graft_onto",
    "import_memory",
    "plan_graft",
    "read_recipe",
]
