"""Training: optimizers that touch only the rows that were read, and a Trainer that uses them."""

from .optimizer import EngramOptimizer, engram_optimizer
from .processes import clip_gradients, exchange_row_gradients, shard_backbone
from .selection import RowSelection, select_rows
from .sharded import save_sharded, shard_tables
from .trainer import EngramTrainer, EngramTrainerMixin, EngramTrainingArguments


__all__ = [
    "EngramOptimizer",
    "EngramTrainer",
    "EngramTrainerMixin",
    "EngramTrainingArguments",
    "RowSelection",
    "clip_gradients",
    "engram_optimizer",
    "exchange_row_gradients",
    "save_sharded",
    "select_rows",
    "shard_backbone",
    "shard_tables",
]
