"""Training: optimizers that touch only the rows that were read, and a Trainer that uses them."""

from .optimizer import EngramAdamW, engram_optimizer
from .trainer import EngramTrainer


__all__ = ["EngramAdamW", "EngramTrainer", "engram_optimizer"]
