"""Ablation: what a text's loss becomes when a memory is switched off, in part or whole, or reads other rows.

Promises: all ways are measured on the same texts in the same passes' order; the model is afterwards bit for bit what it
was. Memory off is the backbone, exactly. Never trains and never writes.
Source: Engram (arXiv 2601.07372), section 6.3. As its authors say, a model that was trained with a memory suffers from
losing it: an ablation measures dependence, and not what the memory has added.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F

from .changed_memory import fixed_gate, one_row, only_layers, shuffled_rows


FULL = "memory as it is"
LONGEST = 512  # tokens of a text that are read


def _ways(model, tokenizer, texts: list[str], seed: int) -> dict[str, Callable[[], AbstractContextManager]]:
    """Returns the ways in which [`ablate`] changes a model: contexts by their names, the unchanged memory first."""
    memory = model.memory
    if model.runs_as_donor:
        raise ValueError("this model runs without its memory, so nothing can be taken away: place_memory('cpu') first.")
    ways = {FULL: nullcontext, "memory off": model.disable_memory}
    if len(memory.layer_ids) > 1:
        ways |= {f"layer {layer} alone": lambda layer=layer: only_layers(model, [layer]) for layer in memory.layer_ids}
    ways |= {f"gate fixed at {value}": lambda value=value: fixed_gate(model, value) for value in (0.5, 1.0)}
    row = _some_row(model, tokenizer, texts, seed)
    ways |= {"rows shuffled": lambda: shuffled_rows(model, seed), "one row": lambda: one_row(model, row)}
    if model.active_memories:
        ways["packs off"] = lambda: without_packs(model)
    return ways


@contextmanager
def without_packs(model) -> Iterator[None]:
    """Reads no knowledge pack while the block runs."""
    active = model.active_memories
    model.set_memories([])
    try:
        yield
    finally:
        model.set_memories(active)


@torch.no_grad()
def ablate(model, tokenizer, texts: Iterable[str], seed: int = 0) -> dict[str, dict[str, float]]:
    """Measures what texts lose when the memory is changed.

    Args:
        model ([`EngramForCausalLM`]): with a loaded memory, in eager mode.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        texts (iterable of `str`): their first 512 tokens are read, each text alone.
        seed (`int`, *optional*, defaults to 0): of the controls.

    Returns:
        `dict` by way: `"loss"`, nats a token; `"difference"`, of the loss from that of the memory as it is; `"kl"`,
        nats a token from the memory as it is; `"other_token"`, the share of positions whose most probable token
        changes; `"tokens"`, how many are predicted.

    Raises:
        `ValueError`: if there is no text with two tokens, or the memory is not loaded.

    Example:

    ```python
    >>> from engram_transformers.inspection import ablate

    >>> ablate(model, tokenizer, ["Ada Lovelace was born in London."])["memory off"]["difference"]
    0.0
    ```"""
    texts = list(texts)
    ways = _ways(model, tokenizer, texts, seed)
    sums = {name: dict.fromkeys(("loss", "kl", "other_token"), 0.0) for name in ways}
    tokens = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:LONGEST]], device=model.device)  # (1, length)
        if ids.shape[1] < 2:
            continue
        tokens += ids.shape[1] - 1
        full = None
        for name, way in ways.items():
            with way():
                found = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)  # (length - 1, V)
            full = found if full is None else full
            sums[name]["loss"] += float(F.nll_loss(found, ids[0, 1:], reduction="sum"))
            sums[name]["kl"] += float(F.kl_div(found, full, reduction="sum", log_target=True))
            sums[name]["other_token"] += float((found.argmax(-1) != full.argmax(-1)).sum())
    if not tokens:
        raise ValueError("there is no text of two tokens or more: give texts whose tokens can be predicted.")
    means = {name: {what: value / tokens for what, value in found.items()} for name, found in sums.items()}
    for found in means.values():
        found |= {"difference": found["loss"] - means[FULL]["loss"], "tokens": tokens}
    return means


def ablation_lines(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the result of [`ablate`] as lines of Markdown."""
    lines = ["| memory | loss | difference | KL | other token |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        lines.append(
            f"| {name} | {one['loss']:.4f} | {one['difference']:+.4f} | {one['kl']:.4f} | {one['other_token']:.1%} |"
        )
    return lines


def _some_row(model, tokenizer, texts: list[str], seed: int) -> torch.Tensor:
    """Returns the rows `(layers, orders, heads)` of one n-gram of the texts, counted from the first of each head."""
    drawn = random.Random(seed)
    told = [text for text in texts if tokenizer(text)["input_ids"]]
    if not told:
        raise ValueError("there is no text with a token: give texts that are not empty.")
    text = drawn.choice(told)
    hasher = model.memory.hashing
    ids = torch.tensor([tokenizer(text)["input_ids"][:LONGEST]], device=hasher.token_map.device)  # (1, length)
    hashes = hasher.hash_lookback(hasher.lookback(hasher.compress(ids)))  # (layers, 1, length, orders, heads)
    return hashes[:, 0, drawn.randrange(ids.shape[1])]  # (layers, orders, heads)
