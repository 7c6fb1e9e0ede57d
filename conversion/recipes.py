"""Recipes: the arguments of a graft, written down as YAML under the names of the command's options.

```yaml
donor: HuggingFaceTB/SmolLM2-135M-Instruct
layer_ids: [1, 10]
vocab_size: 200000
head_dim: 48
```

Promises: only YAML's plain values are read; every name is known and given once. A recipe never holds a token and never
allows custom code: those are for whoever runs it.
Source: docs/grafting.md.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import yaml

from ..configuration import PRESETS, EngramConfig


ENDINGS = (".yaml", ".yml")

# Names that are arguments of `graft` as they are; all others are fields of EngramConfig without "engram_".
_ARGUMENTS = (
    "donor",
    "revision",
    "subfolder",
    "tokenizer",
    "text_only",
    "max_memory_shard_size",
    "init",
    "init_std",
    "init_from",
    "init_text",
    "init_reader",
)
# What the graft itself finds out is not among them.
_FOUND = ("engram_format_version", "engram_memory_delta", "engram_compressed_vocab_size")
_FIELDS = tuple(
    field.name.removeprefix("engram_")
    for field in fields(EngramConfig)
    if field.name.startswith("engram_") and not field.name.endswith("_sha256") and field.name not in _FOUND
)
NAMES = (*_ARGUMENTS, "preset", *_FIELDS)


# One recipe for each family of backbones; they come with the package.
FAMILIES = Path(__file__).parent / "families"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; refuses a name that is given twice, of which it would silently take the last."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key) for key, _ in node.value]
        if twice := {str(name) for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def family_recipes() -> dict[str, Path]:
    """Returns the files of the package's recipes by family, such as "qwen3"."""
    return {path.stem: path for path in sorted(FAMILIES.glob("*.yaml"))}


def read_recipe(path: str | os.PathLike) -> dict:
    """Reads a recipe.

    Args:
        path (`str` or `os.PathLike`): a YAML file.

    Returns:
        `dict` of names and values, as [`graft_arguments`] takes them.

    Raises:
        `FileNotFoundError`: if the file is missing.
        `ValueError`: naming the file: if it is not YAML, or holds an unknown name or one twice.

    Example:

    ```python
    >>> graft(out="my-graft", **graft_arguments(read_recipe("recipe.yaml")))
    ```"""
    try:
        told = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506, a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe '{path}' is not YAML that can be read: {error}.") from error
    if not isinstance(told, Mapping) or "donor" not in told:
        raise ValueError(f"the recipe '{path}' must be a mapping with a 'donor', such as donor: owner/model.")
    for name in told:
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}."
            raise ValueError(f"the recipe '{path}' has an unknown name {name!r}: {hint}")
    return dict(told)


def graft_arguments(recipe: Mapping) -> dict:
    """Returns the arguments of [`graft`] and [`plan_graft`] that a recipe stands for.

    Args:
        recipe (`Mapping`): values by the names of the options; a preset's sizes give way to those that stand beside it.

    Raises:
        `ValueError`: for an unknown preset.
    """
    given = {name: value for name, value in recipe.items() if value is not None}
    sizes = dict(PRESETS[given.pop("preset")]) if "preset" in given else {}
    arguments = {name: given.pop(name) for name in _ARGUMENTS if name in given}
    return arguments | sizes | {f"engram_{name}": value for name, value in given.items()}
