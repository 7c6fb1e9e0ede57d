"""Text of the example: what the memory is taught, what it is asked, and what it must leave alone.

Promises: the same windows on every machine; held-out entries share no key with training entries. Never downloads.
Source: examples/data/README.md.
"""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch


DATA = Path(__file__).parent.parent / "data"
SEED = 0

# Tokens in a window.
LENGTH = 512


@dataclass(frozen=True)
class Corpus:
    """Windows of token ids.

    Args:
        train (`torch.LongTensor` of shape `(windows, length)`): training entries.
        recall (`torch.LongTensor` of shape `(windows, length)`): a fixed sample of `train`.
        held_out (`torch.LongTensor` of shape `(windows, length)`): other entries of the same source.
        other_domain (`torch.LongTensor` of shape `(windows, length)`): text of another kind.
        questions (`list[tuple[str, str]]`): names of ten training entries, each with what the entry says of it.
    """

    train: torch.Tensor
    recall: torch.Tensor
    held_out: torch.Tensor
    other_domain: torch.Tensor
    questions: list[tuple[str, str]]


def read_entries(name: str) -> list[dict[str, str]]:
    """Entries of a shipped file, in the file's order."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def shuffled(texts: list[str]) -> list[str]:
    """The texts in an order that is the same everywhere."""
    texts = list(texts)
    random.Random(SEED).shuffle(texts)
    return texts


def windows(tokenizer, texts: list[str], tokens: int) -> torch.Tensor:
    """Joins texts by blank lines and cuts their first tokens into windows.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the donor's.
        texts (`list[str]`): in the order in which they are joined.
        tokens (`int`): how many tokens to take, rounded down to whole windows.

    Returns:
        `torch.LongTensor` of shape `(windows, LENGTH)`.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // LENGTH
    if count == 0:
        raise ValueError(f"the texts give {len(ids)} tokens, fewer than one window of {LENGTH}.")
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)  # (windows, LENGTH)


def load_corpus(tokenizer, train_tokens: int, sample_tokens: int) -> Corpus:
    """Cuts the shipped texts into windows for a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the donor's.
        train_tokens (`int`): tokens to teach.
        sample_tokens (`int`): tokens in each of the three measured samples.
    """
    entries = read_entries("wordnet_entities.jsonl.gz")
    taught = shuffled([entry["text"] for entry in entries if entry["split"] == "train"])
    kept_back = shuffled([entry["text"] for entry in entries if entry["split"] == "held_out"])
    other = shuffled([entry["text"] for entry in read_entries("factbook.jsonl.gz")])
    train = windows(tokenizer, taught, train_tokens)
    return Corpus(
        train=train,
        recall=train[: sample_tokens // LENGTH],
        held_out=windows(tokenizer, kept_back, sample_tokens),
        other_domain=windows(tokenizer, other, sample_tokens),
        questions=[(name + ":", rest.strip()) for name, _, rest in (text.partition(":") for text in taught[:10])],
    )
