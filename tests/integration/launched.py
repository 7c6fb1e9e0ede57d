"""What `accelerate launch` runs for test_processes_launch.py: a plain loop on Accelerate, then EngramTrainer.

Each process leaves its weights, and the norms of its gradients, in the folder that it is given.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from engram_transformers import EngramTrainer
from engram_transformers.training import EngramTrainingArguments, create_optimizer, sync_row_gradients

from .process_models import LENGTH, loss_of, small_model, texts, weights


STEPS, PIECES, MAX_NORM = 3, 2, 0.05
SETTINGS = {"lr": 1e-2, "table_lr_multiplier": 5, "eps": 1e-2}


def dataset(count: int = 24) -> list[dict[str, torch.Tensor]]:
    ids = texts(7, count)
    assert ids.shape == (count, LENGTH)
    return [{"input_ids": own, "labels": own} for own in ids]


def loop(batch_size: int) -> tuple[dict, list[float]]:
    """A training loop as users write it; weights and norms."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PIECES)
    model = small_model().set_trainable("all")
    optimizer = create_optimizer(model, **SETTINGS)
    batches = torch.utils.data.DataLoader(dataset(), batch_size=batch_size)
    trained, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    norms = []
    for batch in batches:
        with accelerator.accumulate(trained):
            accelerator.backward(loss_of(trained, batch["input_ids"]))
            if accelerator.sync_gradients:
                sync_row_gradients(optimizer)
                norms.append(float(accelerator.clip_grad_norm_(trained.parameters(), MAX_NORM)))
            optimizer.step()
            optimizer.zero_grad()
    return weights(model), norms


def trainer(batch_size: int, folder: str, **changes) -> EngramTrainer:
    """A trainer, of everything if no `set_trainable` is given, on the same texts in every process."""
    settings = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": PIECES,
        "per_device_train_batch_size": batch_size,
        "learning_rate": SETTINGS["lr"],
        "table_lr_multiplier": SETTINGS["table_lr_multiplier"],
        "adam_epsilon": SETTINGS["eps"],
        "max_grad_norm": MAX_NORM,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    model = changes.pop("model", None) or small_model()
    data = changes.pop("data", None) or dataset()
    evaluated = changes.pop("evaluated", None)
    word = changes.pop("trainable", "all")
    arguments = EngramTrainingArguments(folder, **{**settings, **changes})
    return EngramTrainer(model, arguments, train_dataset=data, eval_dataset=evaluated, trainable=word)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    looped, norms = loop(2)
    trained = trainer(2, str(folder / "run"))
    trained.train()
    rank, count = trained.args.process_index, trained.args.world_size
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    left = {"count": count, "loop": looped, "norms": norms, "trainer": weights(trained.model), "losses": losses}
    torch.save(left, folder / f"rank{rank}.pt")
