"""Conversion: from a backbone's files to an Engram checkpoint. Never copied into a checkpoint."""

from .backbone import graft_onto
from .budget import Budget, budget_lines
from .extract import extract_memory, extract_pack
from .foreign_import import export_memory, import_memory
from .graft import graft
from .merge import Merged, merge_memories
from .plan import GraftPlan, plan_graft
from .prune import Pruned, prune_memory
from .publish import publish_checkpoint
from .readdress import Readdressed, text_blocks
from .recipes import family_recipes, graft_arguments, read_recipe
from .resize import resize_memory
from .strip import strip_memory
from .table_cast import CastReport, cast


__all__ = [
    "Budget",
    "CastReport",
    "GraftPlan",
    "Merged",
    "Pruned",
    "Readdressed",
    "budget_lines",
    "cast",
    "export_memory",
    "extract_memory",
    "extract_pack",
    "family_recipes",
    "graft",
    "graft_arguments",
    "graft_onto",
    "import_memory",
    "merge_memories",
    "plan_graft",
    "prune_memory",
    "publish_checkpoint",
    "read_recipe",
    "resize_memory",
    "strip_memory",
    "text_blocks",
]
