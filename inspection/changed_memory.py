"""Contexts in which a loaded memory is read in another way: the controls of an ablation.

Promises: inside a context the model computes with the change and everything else as before; afterwards it is bit for
bit what it was, also after an error. Nothing is written, and no row is changed. They are for eager models: what was
compiled before keeps its gates and addresses.
Source: Engram (arXiv 2601.07372), section 6.3; deepseek-ai/Engram, issues 20 and 24 (does the table matter?).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gates_through(model, change: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Passes every gate through a function.

    Args:
        model ([`EngramForCausalLM`]): an eager model.
        change (`Callable`): gets the layer's number and its gates `(batch, length, streams, 1)`; returns what the layer
            uses in their place.
    """
    layers = model.memory.layers

    def changed(number: int, compute: Callable) -> Callable:
        return lambda stream, keys: change(number, compute(stream, keys))

    try:
        for name, layer in layers.items():
            layer.open_gate = changed(int(name), layer.open_gate)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("open_gate", None)


def fixed_gate(model, value: float):
    """Opens every gate by the same amount, whatever the context.

    Example:

    ```python
    >>> with fixed_gate(model, 1.0):
    ...     loss = model(input_ids=ids, labels=ids).loss
    ```"""
    return gates_through(model, lambda _, gate: torch.full_like(gate, value))


@contextmanager
def only_layers(model, layer_ids: Iterable[int]) -> Iterator[None]:
    """Lets some Engram layers add to the residual stream, and no other.

    Raises:
        `ValueError`: for a layer without a memory.
    """
    wanted, have = set(layer_ids), set(model.memory.layer_ids)
    if wanted - have:
        raise ValueError(f"layers {sorted(wanted - have)} have no memory; the Engram layers are {sorted(have)}.")
    hooks = [
        model.memory.layers[str(layer)].register_forward_hook(lambda *given: torch.zeros_like(given[-1]))
        for layer in have - wanted
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def rows_through(model, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Passes every address through a function.

    Args:
        model ([`EngramForCausalLM`]): an eager model.
        change (`Callable`): gets rows `(layers, batch, length, orders, heads)`, each counted from the first row of its
            head; returns rows of the same shape.
    """
    hasher = model.memory.hashing
    # The head's first row within its order: (layers, 1, 1, orders, heads).
    first = (hasher.offsets - hasher.offsets[:, :, :1])[:, None, None]

    def through(_, given: tuple, found: tuple) -> tuple:
        classes, rows = found
        return classes, change(rows - first) + first

    hook = hasher.register_forward_hook(through)
    try:
        yield
    finally:
        hook.remove()


def shuffled_rows(model, seed: int = 0):
    """Gives every n-gram the rows of another one: a random permutation of each head's rows.

    The permutation is `(a * row + b) mod rows`, which is one because heads have prime numbers of rows; so it takes no
    memory.
    """
    primes = model.memory.hashing.primes[:, None, None]  # (layers, 1, 1, orders, heads)
    drawn = torch.Generator().manual_seed(seed)
    both = torch.randint(2**31, (2, *primes.shape), generator=drawn, device="cpu").to(primes.device)
    factors, shifts = both  # each (layers, 1, 1, orders, heads)
    factors = 1 + factors % (primes - 1).clamp(min=1)
    return rows_through(model, lambda rows: (rows * factors + shifts) % primes)


def one_row(model, rows: torch.Tensor):
    """Gives every n-gram the same row of each head: what the memory's dense weights do without knowledge of n-grams.

    Args:
        model ([`EngramForCausalLM`]): an eager model.
        rows (`torch.LongTensor` of shape `(layers, orders, heads)`): counted from the first row of each head.
    """
    return rows_through(model, lambda read: rows.to(read.device)[:, None, None].expand_as(read))
