"""Conversion: from a backbone's files to an Engram checkpoint. Never copied into a checkpoint."""

from .backbone import graft_onto
from .budget import Budget, budget_lines
from .graft import graft
from .plan import GraftPlan, plan_graft
from .publish import publish_checkpoint
from .recipes import family_recipes, graft_arguments, read_recipe


__all__ = [
    "Budget",
    "GraftPlan",
    "budget_lines",
    "family_recipes",
    "graft",
    "graft_arguments",
    "graft_onto",
    "plan_graft",
    "publish_checkpoint",
    "read_recipe",
]
