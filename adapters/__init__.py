"""What training needs of a model with a memory (deltas, PEFT adapters, trainable parameters), and work on packs.

What it chooses: none of it is copied into a checkpoint. `engram_transformers` registers this package when it is
imported; a checkpoint's copy of the code refuses what is done here.
Promises: importing it does not import PEFT.
Source: docs/design.md, "What travels".
"""

from .memory_delta import from_delta, load_memory_delta, save_changes, save_memory_delta
from .pack_operations import PackDifference, compare_packs, merge_packs
from .pack_texts import PackTexts
from .peft_adapters import load_adapter, memory_beside, take_over_adapters, unwrapped_donor
from .peft_patches import support_peft, support_peft_when_imported
from .trainable import apply_trainable


__all__ = [
    "PackDifference",
    "PackTexts",
    "apply_trainable",
    "compare_packs",
    "from_delta",
    "load_adapter",
    "load_memory_delta",
    "memory_beside",
    "merge_packs",
    "save_changes",
    "save_memory_delta",
    "support_peft",
    "support_peft_when_imported",
    "take_over_adapters",
    "unwrapped_donor",
]
