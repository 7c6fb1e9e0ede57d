"""EngramTrainer: transformers' Trainer for a model with memory.

Promises: what requires a gradient is trained, the memory alone unless told otherwise; global-norm clipping counts the
tables' row gradients; schedules, accumulation, evaluation, saving and resuming are Trainer's own. Refuses, rather than
trains wrongly, what is not supported yet: several processes and fp16 loss scaling.
"""

import torch
from transformers import Trainer
from transformers.utils import logging

from .optimizer import TABLE_LR_MULTIPLIER, EngramAdamW, engram_optimizer, learnable


logger = logging.get_logger(__name__)


class EngramTrainer(Trainer):
    """Trains a memory.

    Args:
        model ([`EngramForCausalLM`]): the model.
        args (`TrainingArguments`): as for Trainer; `learning_rate` is that of the dense weights.
        table_lr_multiplier (`float`, *optional*, defaults to 40): times `learning_rate`, the learning rate of tables.
        train_backbone (`bool`, *optional*, defaults to `False`):
            Leave `requires_grad` of the backbone as it is. By default the backbone is frozen.
        kwargs: further arguments of Trainer.

    Raises:
        `TypeError`: for a model without memory, or an optimizer that does not know rows.
        `ValueError`: for several processes, fp16, or tables that are on disk.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from engram_transformers import EngramTrainer

    >>> trainer = EngramTrainer(model, TrainingArguments("runs/train", learning_rate=2e-3), train_dataset=dataset)
    >>> trainer.train()
    ```"""

    def __init__(
        self,
        model=None,
        args=None,
        *positional,
        table_lr_multiplier: float = TABLE_LR_MULTIPLIER,
        train_backbone: bool = False,
        **kwargs,
    ):
        if not hasattr(model, "memory"):
            raise TypeError(
                f"EngramTrainer trains models with a memory, got {type(model).__name__}: make one with "
                "EngramForCausalLM.from_donor(model, tokenizer)."
            )
        if model.memory.placement in ("disk", "none"):
            raise ValueError(
                f"the memory's placement is {model.memory.placement!r}, where rows cannot be written: "
                "model.place_memory('cpu') keeps them in host memory, 'device' with the other weights."
            )
        quantised = getattr(model, "is_quantized", False)
        if quantised and not train_backbone:  # Trainer asks for an adapter: the memory is one, in full precision
            model.is_quantized = False
        super().__init__(model, args, *positional, **kwargs)
        if quantised:
            model.is_quantized = True
        self.table_lr_multiplier = table_lr_multiplier
        if self.args.world_size > 1:
            raise ValueError(
                f"{self.args.world_size} processes: row gradients are not exchanged between processes yet. "
                "Train with one."
            )
        if self.args.fp16:
            raise ValueError("fp16 loss scaling does not reach row gradients: use bf16=True, or full precision.")
        if self.optimizer is not None and not isinstance(self.optimizer, EngramAdamW):
            raise TypeError(
                f"{type(self.optimizer).__name__} does not see row gradients, the tables would stay as they are: pass "
                "engram_transformers.training.engram_optimizer(model), or no optimizer."
            )
        if not train_backbone:
            model.backbone.requires_grad_(False)
        trained = sum(p.numel() for _, p in learnable(model) if p.requires_grad)
        logger.info(f"training {trained:,} parameters, {'all' if train_backbone else 'the memory alone'}")

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = engram_optimizer(
                self.model if model is None else model,
                lr=self.args.learning_rate,
                table_lr_multiplier=self.table_lr_multiplier,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def _clip_grad_norm(self, model):
        # Tables in host memory are no parameters of the model.
        return torch.nn.utils.clip_grad_norm_(dict(learnable(model)).values(), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is not None:
            return grad_norm
        return torch.nn.utils.get_total_norm([p.grad for _, p in learnable(model) if p.grad is not None])
