"""What a forward pass may be given: which ids the memory reads and which positions are alive.

Promises: every input that would read a wrong row is refused with a message, as far as that costs nothing (values are
looked at in eager mode on the CPU only). Never changes an input.
Source: docs/design.md, "Pads and other positions that are no text".
"""

import torch
from transformers.cache_utils import Cache


def checked_text_ids(input_ids, inputs_embeds, engram_input_ids) -> torch.Tensor:
    """The ids that the memory reads.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): the model's ids.
        inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`, *optional*): the model's embeddings.
        engram_input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids given for the memory.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`.

    Raises:
        `ValueError` or `TypeError`: if there are none, or of a wrong shape or type.
    """
    ids = input_ids if engram_input_ids is None else engram_input_ids
    name = "input_ids" if engram_input_ids is None else "engram_input_ids"
    if ids is None:
        raise ValueError(
            "the memory is addressed by token ids, and inputs_embeds has none: pass engram_input_ids beside it, of "
            "shape (batch, length), with -1 where a position is no text."
        )
    integers = isinstance(ids, torch.Tensor) and not (ids.is_floating_point() or ids.is_complex())
    if not integers or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {kind}.")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: it must be (batch, length) with at least one token.")
    given = input_ids if input_ids is not None else inputs_embeds
    if given is not None and ids.shape != given.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, the model's input has {tuple(given.shape[:2])}.")
    return ids.long()


def check_ids(ids: torch.Tensor, token_map: torch.Tensor, may_be_absent: bool) -> None:
    """Refuses ids outside the vocabulary, where looking costs nothing.

    Args:
        ids (`torch.LongTensor` of shape `(batch, length)`): from `checked_text_ids`.
        token_map (`torch.LongTensor` of shape `(vocab_size,)`): what they index.
        may_be_absent (`bool`): whether -1 is allowed, for positions that are no text.

    Raises:
        `IndexError`: naming the id and the vocabulary.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    least = -1 if may_be_absent else 0
    if low < least or high >= len(token_map):
        wrong = low if low < least else high
        hint = "pads belong into the attention mask, labels of -100 into labels" if low < least else "wrong tokenizer?"
        raise IndexError(f"token id {wrong} is outside the vocabulary of {len(token_map)} ids: {hint}.")


def alive_positions(ids, attention_mask, engram_attention_mask, cache: Cache | None) -> torch.Tensor | None:
    """Which of this pass's positions are no pads.

    Args:
        ids (`torch.LongTensor` of shape `(batch, length)`): from `checked_text_ids`.
        attention_mask (`torch.Tensor`, *optional*): the backbone's mask.
        engram_attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*): goes before it.
        cache (`Cache`, *optional*): tells how many positions came before.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`, or None if no mask was given.

    Raises:
        `ValueError`: for a mask that does not say which positions are pads.
    """
    mask = attention_mask if engram_attention_mask is None else engram_attention_mask
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}: from a mask that is not (batch, length) the memory cannot tell which "
            "positions are pads. Pass engram_attention_mask of shape (batch, past + length) beside it."
        )
    batch, length = ids.shape
    past = seen_positions(cache)
    if mask.shape[0] != batch or mask.shape[1] < length or (past is not None and mask.shape[1] != past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, {length} new tokens after {past or 0} in the cache need "
            f"({batch}, {(past or 0) + length})."
        )
    return mask[:, -length:].to(ids.device) != 0  # (batch, length)


def seen_positions(cache: Cache | None) -> int | None:
    """Positions that a cache holds; None where asking would cost a wait for the device, or nothing counts them."""
    if cache is None:
        return 0
    if torch.compiler.is_compiling():
        return None
    try:
        seen = cache.get_seq_length()
    except ValueError:  # linear-attention layers alone
        return None
    if isinstance(seen, torch.Tensor):
        return int(seen) if seen.device.type == "cpu" else None
    return seen
