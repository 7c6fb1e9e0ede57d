"""What one text reads from a memory, and what the memory adds because of it, token by token.

Promises: gates and sums are those of a forward pass of the model, observed and not computed a second time; the model is
afterwards what it was. Never writes and never trains.
Source: Engram (arXiv 2601.07372), section 6.5 (where gates open).
"""

from dataclasses import dataclass

import torch

from .changed_memory import gates_through


@dataclass
class TextReads:
    """What one text reads.

    L Engram layers, T tokens, M residual streams, N - 1 orders, H heads; arrays are on the CPU.

    Args:
        tokens (`list[str]`): the text in pieces, each up to where its token ends.
        ids (`list[int]`): token ids.
        layer_ids (`list[int]`): the Engram layers.
        gates (`torch.Tensor` of shape `(L, T, M)`): how far the gate was open, 0 to 1.
        added (`torch.Tensor` of shape `(L, T, M)`): L2 norm of what was added to the residual stream.
        stream (`torch.Tensor` of shape `(L, T, M)`): L2 norm of the residual stream that it was added to.
        by_order (`torch.Tensor` of shape `(L, T, M, N - 1)`): L2 norm of the gated value of each order's rows alone,
            before the convolution.
        rows (`torch.LongTensor` of shape `(L, T, N - 1, H)`): rows that were read, counted from the first of their
            order.
        filled (`torch.BoolTensor` of shape `(L, T, N - 1, H)`): whether the row holds anything but zeros; in a memory
            that began with zeros, whether it was ever trained.
        records (`list[list[tuple]]`): for each token the records of active packs, `(pack, n-gram of token classes)`.
    """

    tokens: list[str]
    ids: list[int]
    layer_ids: list[int]
    gates: torch.Tensor
    added: torch.Tensor
    stream: torch.Tensor
    by_order: torch.Tensor
    rows: torch.Tensor
    filled: torch.Tensor
    records: list[list[tuple]]

    def ngram(self, place: int, order: int) -> str:
        """Returns the text of the n-gram of `order` tokens that ends at a token; shorter at the text's beginning."""
        return "".join(self.tokens[max(0, place - order + 1) : place + 1])

    def to_dict(self) -> dict:
        """Returns everything as values that JSON can hold."""
        plain = {name: getattr(self, name) for name in ("tokens", "ids", "layer_ids", "records")}
        for name in ("gates", "added", "stream", "by_order"):
            plain[name] = (getattr(self, name).double() * 1e4).round().div(1e4).tolist()  # four places
        return {**plain, "rows": self.rows.tolist(), "filled": self.filled.int().tolist()}


@torch.no_grad()
def read_text(model, tokenizer, text: str) -> TextReads:
    """Runs a model over a text and returns what its memory did at every token.

    Args:
        model ([`EngramForCausalLM`]): with a loaded memory, in eager mode.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        text (`str`): at least one token.

    Returns:
        [`TextReads`].

    Raises:
        `ValueError`: for a text without tokens, a slow tokenizer, or a model whose memory is not loaded.

    Example:

    ```python
    >>> from engram_transformers.inspection import read_text

    >>> reads = read_text(model, tokenizer, "Alexander the Great")
    >>> reads.gates.shape
    torch.Size([2, 3, 1])
    ```"""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not say where its tokens begin: use the fast tokenizer.")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]], dtype=torch.long, device=model.device)  # (1, T)
    if not ids.numel():
        raise ValueError(f"the text {text!r} has no tokens: give one that has.")
    if model.runs_as_donor:
        raise ValueError("this model runs without its memory, so there is nothing to see: place_memory('cpu') first.")
    gates, seen = {}, {}

    def note_gate(layer: int, gate: torch.Tensor) -> torch.Tensor:
        gates[layer] = gate[0, :, :, 0]  # (T, M)
        return gate

    layers = {layer: model.memory.layers[str(layer)] for layer in model.memory.layer_ids}
    hooks = [
        module.register_forward_hook(lambda module, given, out, layer=layer: seen.update({layer: (*given[:2], out)}))
        for layer, module in layers.items()
    ]
    try:
        with gates_through(model, note_gate):
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    norms = {layer: _norms(layers[layer], gates[layer], *seen[layer]) for layer in layers}
    trace = model.memory_trace(ids.to(model.memory.hashing.token_map.device))
    numbers = [[token["rows"][layer] for token in trace] for layer in layers]
    rows = torch.tensor(numbers, device="cpu")  # (L, T, N - 1, H)
    added, stream, by_order = (torch.stack([found[i] for found in norms.values()]) for i in range(3))
    return TextReads(
        tokens=_pieces(text, encoded),
        ids=ids[0].tolist(),
        layer_ids=list(layers),
        gates=torch.stack([gates[layer].float().cpu() for layer in layers]),
        added=added,
        stream=stream,
        by_order=by_order,
        rows=rows,
        filled=torch.stack([_filled(model, layer, own) for layer, own in zip(layers, rows, strict=True)]),
        records=[token["records"] for token in trace],
    )


def _norms(layer, gate: torch.Tensor, stream: torch.Tensor, vectors: torch.Tensor, added: torch.Tensor) -> tuple:
    """Returns norms of what was added and of the stream `(T, M)`, and of each order's gated value `(T, M, N - 1)`."""
    by_stream = (-1, layer.streams, layer.hidden_size)
    flat = [tensor.reshape(by_stream).float().norm(dim=-1).cpu() for tensor in (added, stream)]  # (T, M)
    orders = layer.dilation - 1  # the convolution's taps are N positions apart
    weight = layer.key_value.weight[-layer.hidden_size :].float()  # (D, E): the value's rows
    values = [
        (part @ columns.T).norm(dim=-1)  # (T,)
        for part, columns in zip(vectors[0].float().chunk(orders, -1), weight.chunk(orders, -1), strict=True)
    ]
    return *flat, (gate.float()[..., None] * torch.stack(values, -1)[:, None]).cpu()


def _filled(model, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """Returns which rows `(T, N - 1, H)` hold anything but zeros."""
    orders = model.memory.tables[str(layer)].orders()
    return torch.stack([(order(rows[:, i]) != 0).any(-1).cpu() for i, order in enumerate(orders)], 1)


def _pieces(text: str, encoded) -> list[str]:
    """Returns the part of a text that each token ends; a character of several tokens stands at the first."""
    pieces, told = [], 0
    for token, (begin, end) in zip(encoded.tokens(), encoded["offset_mapping"], strict=True):
        pieces.append(token if begin == end else text[told:end])  # special tokens stand for no characters
        told = max(told, end)
    return pieces
