"""Steps of an optimizer that tests of it share, and what they compare."""

import torch


def four_batches() -> list[dict]:
    """Four batches of two texts."""
    texts = torch.randint(3, 300, (4, 2, 20), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": text, "labels": text} for text in texts]


def backward(model, batch):
    """Gradients of one batch."""
    model(**batch).loss.backward()


def run(model, optimizer, batches):
    """A step for each batch."""
    for batch in batches:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()


def rows_of(model):
    """Every row of every part, and the layers."""
    tables = {n: p.read(torch.arange(150)) for n, p in model.named_parameters() if ".tables." in n}
    return {**tables, **{n: p.detach().clone() for n, p in model.named_parameters() if ".layers." in n}}


def equal(one, other):
    """Whether two states are the same to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
