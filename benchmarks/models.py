"""What is measured: a backbone and its grafts, loaded in the same way, and the passes that are timed.

Promises: all sides of a comparison have the backbone's weights in one dtype; a graft's table is where it is said to be;
what is timed is the passes alone; the same text every time for the same tokenizer (the prose that the demo ships).
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import engram_transformers  # noqa: F401 (registers the grafts' model type)
from examples.entities.corpus import read_entries, shuffled

from .command import CannotMeasure


# Tokens that are read before decoding is timed, and passes after which other ways take their turn.
PROMPT, PIECE = 64, 8


def load(folder: Path, dtype: str = "auto", placement: str | None = None) -> PreTrainedModel:
    """Loads a backbone, or a graft with its tables in a place; dtype "auto" is the stored one."""
    placed = {} if placement is None else {"engram_placement": placement}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **placed).eval()


def with_weights_of(model: PreTrainedModel, donor: PreTrainedModel) -> PreTrainedModel:
    """`model` with the very tensors of `donor`, so that nothing but the memory differs; refused if they differ."""
    own = dict(getattr(model, "backbone", model).named_parameters())
    for name, theirs in donor.named_parameters():
        if name not in own or not torch.equal(own[name], theirs):
            raise CannotMeasure(f"the backbone's weight '{name}' is not in the model that it is compared with.")
        own[name].data = theirs.data
    return model


def real_ids(folder: Path, tokens: int) -> torch.Tensor:
    """Consecutive tokens of real text, `(1, tokens)`, by the tokenizer of a checkpoint."""
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), []
    for name in ("factbook.jsonl.gz", "wordnet_entities.jsonl.gz"):
        for text in shuffled([entry["text"] for entry in read_entries(name)]):
            ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= tokens:
                return torch.tensor([ids[:tokens]])  # (1, tokens)
    raise ValueError(f"the demo's texts give {len(ids):,} tokens, {tokens:,} are needed: measure fewer.")


def wait_for(device: torch.device) -> None:
    """Waits until an accelerator has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def decode(
    model: torch.nn.Module, prompt: torch.Tensor, tokens: int, text: torch.Tensor | None = None
) -> Iterator[float]:
    """Seconds of forward passes of one token over a cache, `PIECE` by `PIECE`; reading the prompt is not timed.

    `text`, `(batch, tokens)`, is fed in place of the greedy choice: then all models read the same n-grams, and none
    falls into a loop whose rows it has just read.
    """
    read = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    # Transformers 5.24 calls it "cache", older ones "past_key_values".
    given = {name: read[name] for name in ("cache", "past_key_values") if name in read}
    chosen = read.logits[:, -1:].argmax(-1)  # (batch, 1)
    for first in range(0, tokens, PIECE):
        wait_for(prompt.device)
        start = time.perf_counter()
        for number in range(first, min(first + PIECE, tokens)):
            fed = chosen if text is None else text[:, number : number + 1]
            chosen = model(input_ids=fed, use_cache=True, **given).logits[:, -1:].argmax(-1)  # (batch, 1)
        wait_for(prompt.device)
        yield time.perf_counter() - start


@torch.no_grad()
def prefill(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds to read a text at once into a cache, as `generate` does it: logits of the last position only."""
    wait_for(ids.device)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    wait_for(ids.device)
    return time.perf_counter() - start
