"""A handful of tokens on a CPU, from ids to memory vectors without a tensor in between: a step of decoding.

Between two steps the backbone's weights drive all else out of the processor's caches, and an operator of torch then
takes 5 to 30 microseconds, whatever it works on. A step reads 32 rows with some forty operators and four fetches; as
Python integers and bytes it takes half of their time (0.40 milliseconds, not 0.74), and where rows are on disk 40 %
(0.45, not 1.2). What is left is code and rows that come from memory for the first time in a step.

Promises: the bytes that the tensors' way reads, and the same history in the cache; what is not plainly the case (a
dead token, a packed row, a hook, a table that learns, a row that must be waited for) is left to that way. Never keeps
anything of a pass, and never calls a table's module: a hook on one is a reason to leave it alone.
Source: docs/performance.md, decode.
"""

import torch

from .cache_engram import EngramCacheLayer
from .compat_engram import has_global_hooks, in_forward_mode
from .hashing_engram import is_handful
from .offload_engram import EngramRowsHook
from .table_engram import EngramTable, OrderRows


class HandfulReads:
    """What a pass over a handful of tokens hands to its Engram layers; stands where `MemoryReads` does.

    Args:
        texts (`list[list[int]]`): classes of every text's tokens behind the N - 1 before them; no token is dead.
        shape (`torch.Size`): of the pass, (batch, length).
        brought (`dict[int, torch.Tensor]`): memory vectors by layer id, `(batch, length, orders * heads * width)`.
        cache ([`EngramCacheLayer`], *optional*): where histories go.
    """

    mask = segments = None
    device = torch.device("cpu")

    def __init__(
        self,
        texts: list[list[int]],
        shape: torch.Size,
        brought: dict[int, torch.Tensor],
        cache: EngramCacheLayer | None,
    ):
        self.texts, self.shape, self.brought, self.cache = texts, shape, brought, cache
        self.left = set(brought)  # layers that have not asked yet

    def vectors(self, layer_id: int) -> torch.Tensor:
        """Memory vectors of a layer, `(batch, length, orders * heads * width)`."""
        return self.brought[layer_id]

    def remember(self) -> None:
        """Adds the pass's classes to the history, when the backbone has run."""
        if self.cache is not None:
            self.cache.remember_texts(self.texts, self.shape[1])

    def drop(self) -> None:
        """Nothing is under way."""


def read_handful(
    memory, ids: torch.Tensor, alive: torch.Tensor | None, cache: EngramCacheLayer | None
) -> HandfulReads | None:
    """Hashes a handful of tokens and reads the rows of every layer.

    Args:
        memory ([`EngramMemory`]): what is read.
        ids (`torch.LongTensor` of shape `(batch, length)`): from `checked_text_ids`.
        alive (`torch.BoolTensor` of shape `(batch, length)`, *optional*): from `alive_positions`.
        cache ([`EngramCacheLayer`], *optional*): what came before.

    Returns:
        [`HandfulReads`], or None if this is nothing for Python integers.
    """
    if not is_handful(ids) or not memory_is_at_hand(memory):
        return None
    texts = memory.hashing.living_texts(ids.tolist(), None if cache is None else cache.recent_texts())
    if texts is None or (alive is not None and not all(map(all, alive.tolist()))):
        return None
    brought = {}
    for layer, rows in zip(memory.layer_ids, memory.hashing.rows_of_texts(texts), strict=True):
        vectors = memory.tables._modules[str(layer)].read_few(rows)  # (positions, orders * heads * width)
        if vectors is None:
            return None
        brought[layer] = vectors.view(*ids.shape, -1)  # (batch, length, orders * heads * width)
    return HandfulReads(texts, ids.shape, brought, cache)


def memory_is_at_hand(memory) -> bool:
    """Whether hash constants and layers are on the CPU, and nothing looks at what the tables' modules are called with.

    What modules hold is taken from their dictionaries: an attribute of a module costs a microsecond.
    """
    hashing = memory.hashing
    if not (hashing._buffers["token_map"].is_cpu and is_bare(hashing)) or has_global_hooks():
        return False
    if in_forward_mode():
        return False
    layers = memory.layers._modules.values()
    if not all(layer._modules["key_value"]._parameters["weight"].is_cpu for layer in layers):
        return False
    return all(is_bare(table) and table_is_at_hand(table) for table in memory.tables._modules.values())


def table_is_at_hand(table: EngramTable) -> bool:
    """Whether a table's rows may be taken without calling its orders: see `order_is_at_hand`."""
    with_gradients = torch.is_grad_enabled()
    return all(order_is_at_hand(order, with_gradients) for order in table._modules.values())


def order_is_at_hand(order: OrderRows, with_gradients: bool) -> bool:
    """Whether nothing but our own hook is on an order, and no gradient will come back to it."""
    if type(order) is not OrderRows or order._forward_hooks or order._forward_pre_hooks:
        return False
    if order.source is None:
        return "forward" not in order.__dict__ and not (with_gradients and requires_grad(order._parameters.values()))
    hook = order.__dict__.get("_hf_hook")
    return (
        type(hook) is EngramRowsHook
        and hook.source is order.source
        and hook.prefetch
        and not hook.verify
        and (hook.execution_device is None or hook.execution_device.type == "cpu")
        and not (with_gradients and requires_grad(order.source.learning))
    )


def is_bare(module: torch.nn.Module) -> bool:
    """Whether calling a module runs its forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def requires_grad(parts) -> bool:
    """Whether any of some tensors requires a gradient."""
    return any(part.requires_grad for part in parts)
