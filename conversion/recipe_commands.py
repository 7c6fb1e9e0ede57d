"""The verb `engram recipes`: the recipes that come with the package, one for each family of backbones.

Promises: a recipe is printed as it is in its file, comments too, so that it can be saved and changed.
Source: docs/grafting.md, "Recipes".
"""

from typing import Annotated

import typer

from .recipes import family_recipes, read_recipe
from .terminal import user_errors


@user_errors
def recipes(family: Annotated[str | None, typer.Argument(help="Such as qwen3; all are listed if left out.")] = None):
    """List the recipes of the package, or print one: `engram recipes qwen3 > qwen3.yaml`."""
    files = family_recipes()
    if family is None:
        for name, file in files.items():
            recipe = read_recipe(file)
            print(f"{name:<12} {recipe['donor']}, layers {', '.join(map(str, recipe['layer_ids']))}")
    elif family in files:
        print(files[family].read_text(encoding="utf-8"), end="")
    else:
        raise ValueError(f"there is no recipe for {family!r}: choose from {', '.join(files)}.")
