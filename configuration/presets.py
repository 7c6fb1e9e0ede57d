"""Presets: the sizes of the paper's memories.

Promises: only fields of `EngramConfig`; which layers read depends on the backbone's depth (30 layers: the paper's own
two). Nothing here is a default.
Source: Engram (arXiv 2601.07372), section 4.1 and Table 5.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _preset(rows: int) -> Mapping[str, Any]:
    """Returns the paper's memory with this many rows for each head."""
    return MappingProxyType(
        {
            "engram_vocab_size": rows,
            "engram_max_ngram_size": 3,
            "engram_n_heads": 8,
            "engram_head_dim": 80,
            "engram_kernel_size": 4,
        }
    )


class Presets(dict[str, Mapping[str, Any]]):
    """Sizes of the paper's memories, fields of [`EngramConfig`] by name: "engram-27b" and "engram-40b".

    In two layers these are 5.8 billion values (23 GB in float32) and 18.5 billion (74 GB).

    Raises:
        `ValueError`: for another name.

    Example:

    ```python
    >>> from engram_transformers.configuration import PRESETS

    >>> PRESETS["engram-27b"]["engram_vocab_size"]
    2262400
    ```"""

    def __missing__(self, name: str):
        raise ValueError(f"there is no preset {name!r}: choose from {', '.join(self)}, or give sizes.")


PRESETS = Presets({"engram-27b": _preset(2_262_400), "engram-40b": _preset(7_239_680)})
