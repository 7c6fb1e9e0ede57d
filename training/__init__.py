"""Training: optimizers that update only the rows that were read, and a Trainer that uses them."""

from .distributed import clip_grad_norm_, shard_backbone, sync_row_gradients
from .fact_expressions import more_texts
from .fact_files import read_facts, read_lines
from .fact_report import recall, report_lines, report_pack
from .optimizer import EngramOptimizer, create_optimizer
from .row_selection import RowSelection, select_rows
from .sharded_tables import save_sharded, shard_tables
from .teaching import general_english, teach
from .trainer import EngramTrainer, EngramTrainerMixin, EngramTrainingArguments


__all__ = [
    "EngramOptimizer",
    "EngramTrainer",
    "EngramTrainerMixin",
    "EngramTrainingArguments",
    "RowSelection",
    "clip_grad_norm_",
    "create_optimizer",
    "general_english",
    "more_texts",
    "read_facts",
    "read_lines",
    "recall",
    "report_lines",
    "report_pack",
    "save_sharded",
    "select_rows",
    "shard_backbone",
    "shard_tables",
    "sync_row_gradients",
    "teach",
]
