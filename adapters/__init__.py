"""What a model with a memory needs beyond running: deltas, adapters of PEFT, and which parameters are trained.

What it chooses: none of it travels with a checkpoint. `engram_transformers` registers this package with the code that
does travel when it is imported; a checkpoint's own copy of that code refuses what is done here.
Promises: importing it imports no PEFT.
Source: docs/design.md, "What travels".
"""

from .memory_delta import from_delta, load_memory_delta, save_changes, save_memory_delta
from .peft_adapters import load_adapter, memory_beside, take_over_adapters, unwrapped_donor
from .peft_patches import support_peft, support_peft_when_imported
from .trainable import apply_trainable


__all__ = [
    "apply_trainable",
    "from_delta",
    "load_adapter",
    "load_memory_delta",
    "memory_beside",
    "save_changes",
    "save_memory_delta",
    "support_peft",
    "support_peft_when_imported",
    "take_over_adapters",
    "unwrapped_donor",
]
