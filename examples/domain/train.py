"""One run of the experiment: a donor learns a text by its memory, by LoRA or by both, and is measured.

Promises: the same sequences in the same order for every way with the same seed; losses in nats a token, in float32,
over the same windows; rows are shuffled among those that were trained, so that every n-gram that was learned reads the
row of another. Never trains the donor's own weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from engram_transformers import EngramForCausalLM
from engram_transformers.training import create_optimizer

from .text import SAMPLES, DomainText


# Windows that are measured at once; the logits of one take 100 MB.
MEASURED_AT_ONCE = 4

# The matrices of a decoder layer, which is what LoRA is usually given.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Args:
        memory (`dict`, *optional*): fields of EngramConfig; None for no memory.
        table_lr (`float`): learning rate of tables.
        dense_lr (`float`): learning rate of the memory's other weights.
        lora_lr (`float`, *optional*): learning rate of LoRA; None for no LoRA.
        lora_rank (`int`): its rank; its alpha is twice that.
        passes (`int`): times that the text is read.
        batch (`int`): sequences in a step.
        length (`int`): tokens in a sequence.
        warmup (`float`): share of the steps with a rising rate; it falls to 0 in a line after that.
        beta2 (`float`): Adam's decay of the second moments.
        table_optimizer (`str`): "adam", "adagrad" or "sinkhorn".
        table_eps (`float`): its epsilon.
        clip (`float`): largest global norm of a gradient.
        bf16 (`bool`): train under autocast to bfloat16.
    """

    memory: dict | None = None
    table_lr: float = 0.08
    dense_lr: float = 2e-3
    lora_lr: float | None = None
    lora_rank: int = 16
    passes: int = 1
    batch: int = 4
    length: int = 256
    warmup: float = 0.05
    beta2: float = 0.99
    table_optimizer: str = "adam"
    table_eps: float = 1e-8
    clip: float = 1.0
    bf16: bool = True

    def with_one_row(self) -> "Recipe":
        """The control: all the same, but every head has one row."""
        return replace(self, memory={**self.memory, "engram_hash_scheme": "one_row"})


def build(donor: Path, recipe: Recipe, seed: int) -> torch.nn.Module:
    """The donor with what is to be trained added to it, and nothing else trainable."""
    torch.manual_seed(seed)
    lora = None
    if recipe.lora_lr is not None:
        lora = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=2 * recipe.lora_rank,
            target_modules=LORA_TARGETS,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
    if recipe.memory is None:
        model = AutoModelForCausalLM.from_pretrained(donor)
        return model.requires_grad_(False) if lora is None else get_peft_model(model, lora)
    model = EngramForCausalLM.from_backbone(str(donor), **recipe.memory)
    if lora is None:
        return model.set_trainable("memory")
    inject_adapter_in_model(lora, model.backbone)
    return model.set_trainable("memory+lora")


def optimizer_for(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over what requires a gradient, each kind at its own rate."""
    betas = (0.9, recipe.beta2)
    if recipe.memory is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=recipe.lora_lr, betas=betas, weight_decay=0.0)
    optimizer = create_optimizer(
        model,
        lr=recipe.dense_lr,
        table_lr_multiplier=recipe.table_lr / recipe.dense_lr,
        betas=betas,
        table_optimizer=recipe.table_optimizer,
    )
    for group in optimizer.param_groups:
        if group["name"] == "tables":
            group["eps"] = recipe.table_eps
        elif group["name"] == "backbone":  # nothing of it is trained but LoRA
            group["lr"] = recipe.lora_lr
    return optimizer


def train(
    model: torch.nn.Module, windows: torch.Tensor, recipe: Recipe, seed: int, advance: Callable[[int, int, float], None]
) -> dict:
    """Trains on windows.

    Args:
        model (`nn.Module`): from [`build`].
        windows (`torch.LongTensor` of shape `(windows, length)`): the text.
        recipe ([`Recipe`]): how.
        seed (`int`): of the order of the sequences.
        advance (callable): told step, steps and loss after every step.

    Returns:
        `dict`: "minutes", "steps", "tokens", and "losses" of the training text, one for each tenth of the run.
    """
    sequences = windows.reshape(-1, recipe.length)
    steps = len(sequences) // recipe.batch * recipe.passes
    optimizer = optimizer_for(model, recipe)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, round(recipe.warmup * steps)), steps)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    begun = time.perf_counter()
    model.train()
    for _ in range(recipe.passes):
        shuffled = torch.randperm(len(sequences), generator=order)
        for chosen in shuffled[: len(sequences) // recipe.batch * recipe.batch].split(recipe.batch):
            ids = sequences[chosen]  # (batch, length)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            advance(len(losses), steps, losses[-1])
    model.eval()
    tenth = max(1, len(losses) // 10)
    return {
        "minutes": round((time.perf_counter() - begun) / 60, 2),
        "steps": steps,
        "tokens": steps * recipe.batch * recipe.length,
        "losses": [round(sum(part) / len(part), 4) for part in (losses[i : i + tenth] for i in range(0, steps, tenth))],
    }


@torch.no_grad()
def losses_of(model: torch.nn.Module, text: DomainText, bf16: bool = False) -> dict[str, float]:
    """Mean loss on each of the four samples, nats a token."""
    model.eval()
    found = {}
    for name in SAMPLES:
        windows = getattr(text, name)
        total = 0.0
        for batch in windows.split(MEASURED_AT_ONCE):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
        found[name] = round(total / len(windows), 5)
    return found


@torch.no_grad()
def shuffle_rows(model: torch.nn.Module, seed: int = 0) -> int:
    """Gives every trained row of every part the place of another trained row; the number of rows that were moved."""
    generator = torch.Generator().manual_seed(seed)
    moved = 0
    for part in model.memory.tables.parameters():
        trained = part.any(dim=1).nonzero().squeeze(1)  # (trained,)
        part[trained] = part[trained[torch.randperm(len(trained), generator=generator)]]
        moved += len(trained)
    return moved
