"""Measurements: losses in nats a token, and completions.

Promises: the same windows in the same order and batches for every model, in float32, so that equal models give equal
numbers. Never samples.
"""

import torch
from torch.utils.data import Dataset

from .corpus import Corpus


BATCH = 4


class WindowDataset(Dataset):
    """Windows as Trainer wants them.

    Args:
        windows (`torch.LongTensor` of shape `(windows, length)`): token ids; labels are the same ids.
    """

    def __init__(self, windows: torch.Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


@torch.no_grad()
def mean_loss(model, windows: torch.Tensor, advance) -> float:
    """Mean loss over all predicted tokens.

    Args:
        model: a causal language model in evaluation mode.
        windows (`torch.LongTensor` of shape `(windows, length)`): token ids.
        advance (callable): told after each batch how many windows are done.

    Returns:
        `float`: nats a token.
    """
    total = 0.0
    for batch in windows.split(BATCH):
        total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
        advance(len(batch))
    return total / len(windows)


def all_losses(model, corpus: Corpus, progress, what: str) -> dict[str, float]:
    """Losses on the three samples, behind one progress bar."""
    model.eval()
    samples = {name: getattr(corpus, name) for name in ("recall", "held_out", "other_domain")}
    task = progress.add_task(f"losses {what}", total=sum(map(len, samples.values())))
    return {
        name: mean_loss(model, windows, lambda done: progress.advance(task, done)) for name, windows in samples.items()
    }


@torch.no_grad()
def completions(model, tokenizer, prompts: list[str], tokens: int = 24) -> list[str]:
    """Greedy completions, up to the end of the line.

    Args:
        model: a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`list[str]`): beginnings.
        tokens (`int`, *optional*, defaults to 24): most tokens to add.
    """
    model.eval()
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(text.strip().split("\n")[0].strip())
    return texts
