"""FlatMemory: a graft's memory for a batch of tokens that belong to many requests, one after the other, as engines run.

What it chooses: each token is a text of its own length-N window, so hashing, packs and the layer are used as they are,
and a pass needs no more than the N - 1 ids before each request's first token.
Promises: rows, records and additions are those of `engram_transformers` for each request alone. Rows are read from host
memory or from the checkpoint's files, and no table is copied to the device. Never keeps anything of a request.
Source: docs/serving.md.
"""

from pathlib import Path

import torch
from torch import nn

from .hash_constants_engram import HashConstants
from .hash_ngrams_engram import NgramHasher
from .knowledge_pack_engram import SUFFIX, KnowledgePack, PackStack, pack_identity
from .layer_engram import EngramLayer
from .rows_quantised_engram import vectors_of
from .rows_storage_engram import CheckpointTables, FileRows, HostRows, RowStore


PLACEMENTS = ("cpu", "disk")


def windows(ids: torch.Tensor, starts: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Returns the ids of the window that ends at each token, oldest first; -1 where its text had not begun.

    Shapes: T tokens, R requests, N longest n-gram.

    Args:
        ids (`torch.LongTensor` of shape `(T,)`): tokens of all requests, one request after the other.
        starts (`torch.LongTensor` of shape `(R + 1,)`): where each request begins in `ids`, and where the last ends.
        before (`torch.LongTensor` of shape `(R, N - 1)`): ids before each request's first token, oldest first, or -1.

    Returns:
        `torch.LongTensor` of shape `(T, N)`. Tokens after the last request are not text.

    Example:

    ```python
    >>> import torch
    >>> from engram_vllm.flat_memory import windows

    >>> windows(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3]), torch.tensor([[3, 4], [-1, 9]])).tolist()
    [[3, 4, 5], [4, 5, 6], [-1, 9, 7]]
    ```"""
    reach = before.shape[1]
    places = torch.arange(len(ids), device=ids.device)  # (T,)
    request = torch.searchsorted(starts[1:], places, right=True)  # (T,)
    text = request < len(before)
    request = request.clamp(max=len(before) - 1)
    offset = places - starts[request]  # (T,)
    columns = []
    for back in range(reach, -1, -1):
        here = ids[(places - back).clamp(min=0)]  # (T,)
        earlier = before[request, (offset - back).clamp(-reach, -1)]  # (T,)
        columns.append(torch.where(text, torch.where(offset >= back, here, earlier), -1))
    return torch.stack(columns, dim=1)  # (T, N)


class FlatMemory(nn.Module):
    """Hashing, rows, packs and layers of a graft.

    Args:
        config ([`ServedConfig`] or [`EngramConfig`]): sizes and variants.
        folder (`str` or `os.PathLike`): the graft's folder.
        placement (`str`, *optional*, defaults to `"cpu"`): where rows are: "cpu" (mapped into host memory) or "disk".
        packs (`list[str]`, *optional*): files of knowledge packs, read in this order by every request.

    Raises:
        `ValueError`: for an unknown placement, a pack that does not fit or is named twice.
        `FileNotFoundError`: if the folder or a pack is not there.
    """

    def __init__(self, config, folder, placement: str = "cpu", packs=()):
        super().__init__()
        if placement not in PLACEMENTS:
            raise ValueError(f"engram_placement={placement!r} must be one of {PLACEMENTS}.")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"'{folder}' must be a local folder: download it first (`hf download {folder}`).")
        self.reset_ids = list(config.engram_reset_token_ids or [])
        self.layer_ids, checkpoint = list(config.engram_layer_ids), CheckpointTables(folder)

        def stored(name: str) -> torch.Tensor:
            part = checkpoint.part(f"memory.{name}")
            return part.within(part.file.map()).clone()

        constants = [stored(f"hashing.{name}") for name in ("multipliers", "primes", "offsets", "pad_class")]
        self.hashing = NgramHasher(self.layer_ids, stored("hashing.token_map"), HashConstants(*constants))
        self.hashing.check(config)
        self.layers = nn.ModuleDict({str(layer): EngramLayer(config, layer) for layer in self.layer_ids})
        self.layers.load_state_dict({name: stored(f"layers.{name}") for name in self.layers.state_dict()})
        self.width, self.table_dtype = config.engram_head_dim, getattr(torch, config.engram_table_dtype)
        self.stores: dict[int, list[RowStore]] = {}
        for layer in self.layer_ids:
            names = [f"memory.tables.{layer}.order{order}." for order in config.engram_orders]
            parts = [[checkpoint.part(f"{name}{i}") for i in range(config.engram_table_parts)] for name in names]
            rows = [FileRows(own) for own in parts]
            self.stores[layer] = rows if placement == "disk" else [HostRows(own.tensors(), own.files) for own in rows]
        self.packs = PackStack()
        for file in packs:
            name = Path(file).name.removesuffix(SUFFIX)
            self.packs.load(KnowledgePack.load(file), name, pack_identity(config, self.layers))

    @property
    def reach(self) -> int:
        """Ids before a request's first token that are needed: N - 1."""
        return self.hashing.context_length

    @torch.no_grad()
    def read(self, ids: torch.Tensor, starts: torch.Tensor, before: torch.Tensor) -> "FlatReads":
        """Hashes a batch and reads its rows; see `windows` for the arguments."""
        seen = windows(ids, starts, before)  # (T, N)
        segments = None
        if self.reset_ids:
            ends = torch.isin(seen, torch.tensor(self.reset_ids, device=seen.device))  # (T, N)
            segments = ends.cumsum(1) - ends.long()  # the last position still belongs to its document
        classes = self.hashing.compress(seen)  # (T, N)
        history, classes = classes[:, :-1], classes[:, -1:]  # (T, N - 1), (T, 1)
        rows = self.hashing.rows_of_classes(classes, history, segments).cpu()  # (layers, T, 1, orders, heads)
        records = None
        if self.packs.active:
            records = self.packs.find(self.hashing.windows(classes, history, segments))
        vectors = {}
        for layer, own in zip(self.layer_ids, rows, strict=True):
            read = [store.read(own[:, 0, i].flatten()) for i, store in enumerate(self.stores[layer])]
            stored = torch.cat([values.view(len(ids), 1, -1) for values in read], dim=-1)  # (T, 1, stored width)
            found = vectors_of(stored.to(ids.device), self.table_dtype, self.width)  # (T, 1, E)
            vectors[layer] = found if records is None else records.apply(layer, found)
        return FlatReads(self.layers, vectors, classes >= 0)


class FlatReads:
    """What one pass adds to the residual stream.

    Args:
        layers (`nn.ModuleDict`): of the memory.
        vectors (`dict[int, torch.Tensor]`): memory vectors by layer, `(T, 1, E)`.
        alive (`torch.BoolTensor` of shape `(T, 1)`): False where the gate is shut.
    """

    def __init__(self, layers: nn.ModuleDict, vectors: dict[int, torch.Tensor], alive: torch.Tensor):
        self.layers, self.vectors, self.alive = layers, vectors, alive

    def added(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """Returns the residual stream `(T, D)` with the memory of a layer added to it."""
        return stream + self.layers[str(layer)](stream[:, None], self.vectors[layer], self.alive)[:, 0]  # (T, D)
