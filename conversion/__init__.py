"""Conversion: from a backbone's files to an Engram checkpoint. Never copied into a checkpoint."""

from .backbone import graft_onto
from .graft import graft
from .plan import GraftPlan, plan_graft
from .recipes import family_recipes, graft_arguments, read_recipe


__all__ = ["GraftPlan", "family_recipes", "graft", "graft_arguments", "graft_onto", "plan_graft", "read_recipe"]
