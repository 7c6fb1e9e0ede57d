"""Virtual depth: how soon a model's layers predict what its last one does, and which layers of two models are alike.

What it chooses: LogitLens puts the stream after each layer through the model's own last norm and head. Layers are
compared by linear CKA with the unbiased estimator of HSIC, summed over minibatches, so that a corpus of any size is
streamed; the soft alignment of a layer is the mean index of the five most similar layers of the other model, weighted
by their similarity.
Promises: a model is afterwards what it was; a backbone that changes its logits after the head is refused, because the
lens would show something else. Never trains and never writes.
Source: Engram (arXiv 2601.07372), section 6.1; HSIC: Song and others 2012, equation 5; minibatches: Nguyen and others
2021 (arXiv 2010.15327).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F

from ..backbone_engram import find_decoder_layers


LONGEST = 512  # tokens of a text that are read
LEAST = 4  # examples in a minibatch, which the unbiased estimator needs
ALIKE = 5  # layers in a soft alignment


@torch.no_grad()
def logit_lens(model, tokenizer, texts: Iterable[str]) -> torch.Tensor:
    """Returns how far each layer is from the prediction of the model.

    Args:
        model ([`EngramForCausalLM`]): in eager mode; inside `disable_memory()` it is its backbone.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        texts (iterable of `str`): their first 512 tokens are read, each text alone.

    Returns:
        `torch.Tensor` of shape `(layers,)`: KL divergence of the lens from the model's prediction, nats a token; 0 for
        the last layer.

    Raises:
        `ValueError`: if there is no text, or the model's logits are not its last norm and head alone.

    Example:

    ```python
    >>> from engram_transformers.inspection import logit_lens

    >>> with_memory = logit_lens(model, tokenizer, texts)
    >>> with model.disable_memory():
    ...     without = logit_lens(model, tokenizer, texts)
    ```"""
    total, tokens = 0.0, 0
    for text in texts:
        with _layer_outputs(model) as (outputs, seen):
            logits = _run(model, tokenizer, text)[0].float().log_softmax(-1)  # (length, V)
        norm, head = seen["norm"], model.get_output_embeddings()
        lens = [head(norm(stream[0])).float().log_softmax(-1) for stream in outputs]  # (length, V) each
        kl = [float(F.kl_div(one, logits, reduction="sum", log_target=True)) for one in lens]
        if kl[-1] > 1e-3 * len(logits):
            raise ValueError(
                f"{type(model.backbone).__name__} changes its logits after the last norm and head (by {kl[-1]:.3g} "
                "nats in a text), so a lens through these would not show its predictions."
            )
        total, tokens = total + torch.tensor(kl, dtype=torch.float64, device="cpu"), tokens + len(logits)
    if not tokens:
        raise ValueError("there are no texts: give some.")
    return total / tokens


@torch.no_grad()
def layer_states(
    model,
    tokenizer,
    texts: Iterable[str],
    within: Callable[[], AbstractContextManager] = nullcontext,
    batch_size: int = 64,
) -> Iterator[torch.Tensor]:
    """Yields the stream after every layer at the last token of each text.

    Args:
        model ([`EngramForCausalLM`]): in eager mode.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        texts (iterable of `str`): such as names and set phrases; each is read alone.
        within (`Callable`, *optional*): gives a context to run in, such as `model.disable_memory`.
        batch_size (`int`, *optional*, defaults to 64): texts in a minibatch; the last ones are left out if they are
            fewer than four.

    Returns:
        an iterator of tensors `(layers, texts, hidden)` in float32 on the CPU.
    """
    batch = []
    for text in texts:
        with within(), _layer_outputs(model) as (outputs, _):
            _run(model, tokenizer, text)
        batch.append(torch.stack([stream[0, -1].float().cpu() for stream in outputs]))  # (layers, hidden)
        if len(batch) == batch_size:
            yield torch.stack(batch, 1)
            batch = []
    if len(batch) >= LEAST:
        yield torch.stack(batch, 1)


def cka_map(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the similarity of every layer of one model with every layer of another.

    Args:
        first (iterable of `torch.Tensor` of shape `(layers, texts, hidden)`): minibatches from [`layer_states`]; at
            least four texts in each.
        second (iterable of `torch.Tensor`): those of the other model for the same texts.

    Returns:
        `torch.Tensor` of shape `(layers of the first, layers of the second)`, at most 1.

    Raises:
        `ValueError`: if there is no minibatch, or one has fewer than four texts.

    Example:

    ```python
    >>> from engram_transformers.inspection import cka_map, layer_states, soft_alignment

    >>> off = layer_states(model, tokenizer, texts, model.disable_memory)
    >>> soft_alignment(cka_map(off, layer_states(model, tokenizer, texts)))
    ```"""
    cross = own_first = own_second = None
    for one, other in zip(first, second, strict=True):
        if one.shape[1] < LEAST:
            raise ValueError(f"a minibatch holds {one.shape[1]} texts: unbiased HSIC needs at least {LEAST}.")
        grams = [_centred_gram(states.double()) for states in (one, other)]  # (layers, texts, texts)
        parts = hsic(grams[0][:, None], grams[1]), hsic(grams[0], grams[0]), hsic(grams[1], grams[1])
        before = (0, 0, 0) if cross is None else (cross, own_first, own_second)
        cross, own_first, own_second = (sum(pair) for pair in zip(before, parts, strict=True))
    if cross is None:
        raise ValueError(f"there is no minibatch: give at least {LEAST} texts.")
    return cross / (own_first[:, None] * own_second).sqrt()


def hsic(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns the unbiased estimate of HSIC from Gram matrices `(..., n, n)` whose diagonals are zero."""
    n = first.shape[-1]
    sums = first.sum(-1), second.sum(-1)  # (..., n)
    traces = (first * second.mT).sum((-2, -1))  # (...,)
    products = sums[0].sum(-1) * sums[1].sum(-1) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (sums[0] * sums[1]).sum(-1)
    return (traces + products - mixed) / (n * (n - 3))


def _centred_gram(states: torch.Tensor) -> torch.Tensor:
    """Returns Gram matrices `(layers, n, n)` of states `(layers, n, hidden)` with zero diagonals.

    The estimate is the same for shifted states; without their mean fewer digits are lost.
    """
    states = states - states.mean(1, keepdim=True)
    grams = states @ states.mT  # (layers, n, n)
    return grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))


def soft_alignment(similarity: torch.Tensor, most: int = ALIKE) -> torch.Tensor:
    """Returns for each layer of the second model the layer of the first that it is like, `(layers of the second,)`.

    Args:
        similarity (`torch.Tensor` of shape `(layers of the first, layers of the second)`): from [`cka_map`].
        most (`int`, *optional*, defaults to 5): most similar layers whose indices are averaged.
    """
    values, places = similarity.topk(min(most, len(similarity)), dim=0)
    return (values * places).sum(0) / values.sum(0)


def _run(model, tokenizer, text: str) -> torch.Tensor:
    """Returns the logits of one text, `(1, length, V)`."""
    ids = torch.tensor([tokenizer(text)["input_ids"][:LONGEST]], dtype=torch.long, device=model.device)  # (1, length)
    if not ids.numel():
        raise ValueError(f"the text {text!r} has no tokens: leave it out.")
    return model(input_ids=ids, use_cache=False).logits


@contextmanager
def _layer_outputs(model) -> Iterator[tuple[list[torch.Tensor], dict]]:
    """Gathers the stream after each decoder layer of the next pass, `(1, length, hidden)`, and the norm of the head."""
    backbone, outputs, seen, made = model.backbone, [], {}, {}
    layers = find_decoder_layers(backbone, model.config.text_config.num_hidden_layers)

    def note(_, given, output) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        if stream.ndim != 3:
            raise ValueError(f"{type(backbone).__name__} has several residual streams, which have no common head.")
        outputs.append(stream)

    def note_made(module, given, output) -> None:
        if isinstance(output, torch.Tensor):
            made[output.data_ptr()] = module

    def note_head(module, given) -> None:
        seen["norm"] = made.get(given[0].data_ptr(), torch.nn.Identity())

    hooks = [layer.register_forward_hook(note) for layer in layers]
    hooks += [
        module.register_forward_hook(note_made)
        for name, module in backbone.named_modules()
        if name and not any(True for _ in module.children())
    ]
    hooks.append(model.get_output_embeddings().register_forward_pre_hook(note_head))
    try:
        yield outputs, seen
    finally:
        for hook in hooks:
            hook.remove()


def depth_lines(kl: dict[str, torch.Tensor], alignment: torch.Tensor | None = None) -> list[str]:
    """Returns lenses by name, and an alignment, as lines of Markdown, one for each layer."""
    columns = {f"KL, {name}": [f"{value:.4f}" for value in values.tolist()] for name, values in kl.items()}
    if alignment is not None:
        said = [f"{value:.2f}" if math.isfinite(value) else "" for value in alignment.tolist()]
        columns["is like layer, of the other"] = said
    lines = [f"| layer | {' | '.join(columns)} |", "| ---: |" + " ---: |" * len(columns)]
    return lines + [
        f"| {layer} | {' | '.join(cells)} |" for layer, cells in enumerate(zip(*columns.values(), strict=True))
    ]
