"""Measurements of the demo: right answers, the logits behind them, and what is said.

Promises: the same texts in the same batches every time, so that equal models give equal bits. Never samples.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch

from engram_transformers.training.fact_report import answers
from engram_transformers.training.fact_texts import FactText, fact_texts, pad_id, padded

from .phrasings import said


BATCH = 64
MOST_SAID = 8  # tokens of an answer that is shown


class Fact(NamedTuple):
    """Who, what of them, and the answer; `relation` is a key of `TAUGHT`."""

    subject: str
    relation: str
    answer: str


def told(tokenizer, facts: Iterable[Fact], phrasings: dict[str, tuple[str, ...]]) -> list[FactText]:
    """Returns facts in phrasings, as tokens."""
    return fact_texts([said(*fact, phrasings) for fact in facts], tokenizer)


def right_answers(model, tokenizer, facts: list[Fact], phrasings: dict[str, tuple[str, ...]]) -> dict:
    """Counts texts that a model, choosing greedily, answers rightly to the last token.

    Returns:
        `dict`: `"texts"` and `"right"`, numbers of texts, and `"relations"` with the same of each relation.
    """
    relations = {}
    for relation in {fact.relation: None for fact in facts}:
        found = answers(model, told(tokenizer, [f for f in facts if f.relation == relation], phrasings), tokenizer)
        relations[relation] = {"texts": found["texts"], "right": round(found["right"] * found["texts"])}
    sums = {key: sum(of[key] for of in relations.values()) for key in ("texts", "right")}
    return {**sums, "relations": relations}


@torch.no_grad()
def answer_logits(model, tokenizer, texts: list[FactText]) -> torch.Tensor:
    """Returns the logits from which the first token of each answer is chosen, `(texts, vocabulary)`."""
    found = []
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        ids, mask, _ = padded(batch, pad_id(tokenizer), model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocabulary)
        places = [text.answer.index(True) - 1 for text in batch]
        found.append(logits[torch.arange(len(batch)), places])
    return torch.cat(found)


def equal_rows(some: torch.Tensor, others: torch.Tensor) -> int:
    """Counts rows `(texts, vocabulary)` that are the same bit for bit."""
    return int((some == others).all(-1).sum())


@torch.no_grad()
def completions(model, tokenizer, texts: list[FactText]) -> list[str]:
    """Returns what a model says where each text has its answer, up to the end of the line."""
    prompts = [text.ids[: text.answer.index(True)] for text in texts]
    longest, pad = max(map(len, prompts)), pad_id(tokenizer)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])  # (texts, longest)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # (texts, longest)
    ids, mask = ids.to(model.device), mask.to(model.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=MOST_SAID, do_sample=False, pad_token_id=pad
    )
    found = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [text.strip().partition("\n")[0].strip() for text in found]


def is_right(completion: str, answer: str) -> bool:
    """Whether a completion begins with the answer and not with a longer word."""
    return completion.startswith(answer) and not completion[len(answer) : len(answer) + 1].isalnum()


@contextmanager
def without_packs(model):
    """Lets a model read none of its packs."""
    active = model.active_memories
    model.set_memories([])
    try:
        yield
    finally:
        model.set_memories(active)
