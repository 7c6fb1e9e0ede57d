"""Forward passes that are timed, the same for every model.

Promises: what is timed is the passes alone, under the same switches for all sides. Needs torch and nothing of ours, so
that a process without this package can run it.
"""

import time
from collections.abc import Iterator

import torch

from engram_transformers.compat_engram import CACHE


@torch.no_grad()
def decode(
    model: torch.nn.Module, prompt: torch.Tensor, tokens: int, text: torch.Tensor | None = None, piece: int = 8
) -> Iterator[float]:
    """Seconds of forward passes of one token each over a cache; the prompt is read before and not counted.

    Args:
        model (`nn.Module`): donor or graft.
        prompt (`torch.LongTensor` of shape `(1, length)`): read at once.
        tokens (`int`): forward passes that are timed.
        text (`torch.LongTensor` of shape `(1, tokens)`, *optional*):
            Fed in place of the greedy choice, which is made all the same: then all models read the same n-grams, and
            none falls into a loop whose rows it has just read.
        piece (`int`, *optional*, defaults to 8): passes between which others take their turn (about 0.3 s).

    Yields:
        `float`: seconds of the next passes.
    """
    read = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    cache = read[CACHE]
    chosen = read.logits[:, -1:].argmax(-1)  # (1, 1)
    for first in range(0, tokens, piece):
        start = time.perf_counter()
        for number in range(first, min(first + piece, tokens)):
            fed = chosen if text is None else text[:, number : number + 1]
            chosen = model(input_ids=fed, **{CACHE: cache}, use_cache=True).logits[:, -1:].argmax(-1)  # (1, 1)
        yield time.perf_counter() - start


@torch.no_grad()
def prefill_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds to read a text at once into a cache, as `generate` does it: logits of the last position only."""
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start
