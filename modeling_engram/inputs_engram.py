"""Inputs of a forward pass: which ids the memory reads, which positions are alive, where documents end.

Promises: every input that would read a wrong row is refused, where checking is cheap (values are checked in eager mode;
on an accelerator only before passes of more than one token). Never changes an input.
Source: docs/design.md, "Pads and other positions that are not text" and "Documents packed into one row".
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .cache_engram import seen_positions


def checked_text_ids(input_ids, inputs_embeds, engram_input_ids) -> torch.Tensor:
    """Returns the ids that the memory reads, `(batch, length)`: `engram_input_ids`, else `input_ids`.

    Raises:
        `ValueError` or `TypeError`: if there are none, or of a wrong shape or type.
    """
    ids = input_ids if engram_input_ids is None else engram_input_ids
    name = "input_ids" if engram_input_ids is None else "engram_input_ids"
    if ids is None:
        raise ValueError(
            "the memory is addressed by token ids, and inputs_embeds has none: pass engram_input_ids beside it, of "
            "shape (batch, length), with -1 where a position is not text."
        )
    _check_integers(ids, name)
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: it must be (batch, length) with at least one token.")
    given = input_ids if input_ids is not None else inputs_embeds
    if given is not None and ids.shape != given.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, the model's input has {tuple(given.shape[:2])}.")
    return ids if ids.dtype == torch.int64 else ids.long()


def _check_integers(values, name: str) -> None:
    """Raises TypeError unless `values` is a tensor of integers."""
    integers = isinstance(values, torch.Tensor) and not (values.is_floating_point() or values.is_complex())
    if not integers or values.dtype == torch.bool:
        kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {kind}.")


def check_ids(ids: torch.Tensor, token_map: torch.Tensor, may_be_absent: bool) -> None:
    """Raises IndexError for ids `(batch, length)` outside the vocabulary of `token_map`, on a CPU in eager mode.

    `may_be_absent` allows -1, for positions that are not text.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    lowest = -1 if may_be_absent else 0
    if low < lowest or high >= token_map.shape[0]:
        wrong = low if low < lowest else high
        hint = "pads belong into the attention mask, labels of -100 into labels" if low < lowest else "wrong tokenizer?"
        raise IndexError(f"token id {wrong} is outside the vocabulary of {len(token_map)} ids: {hint}.")


def alive_positions(ids, attention_mask, engram_attention_mask, cache: Cache | None) -> torch.Tensor | None:
    """Returns which positions of this pass are not pads, `(batch, length)`; None if no mask was given.

    `engram_attention_mask`, `(batch, length)` or `(batch, past + length)`, takes precedence over the backbone's mask;
    the cache says how many positions came before.

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
            "positions are pads. Pass engram_attention_mask of shape (batch, length) beside it."
        )
    batch, length = ids.shape
    past = seen_positions(cache)
    columns = {None if past is None else past + length}
    if engram_attention_mask is not None:
        columns.add(length)
    if mask.shape[0] != batch or mask.shape[1] < length or (None not in columns and mask.shape[1] not in columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, {length} new tokens after {past or 0} in the cache need "
            f"({batch}, {(past or 0) + length})."
        )
    return mask[:, -length:].to(ids.device) != 0  # (batch, length)


def document_ends(
    ids,
    alive,
    attention_mask,
    position_ids,
    engram_segment_ids,
    cache: Cache | None,
    seq_idx=None,
    cu_seq_lens=None,
) -> torch.Tensor | None:
    """Finds where documents end that are packed into the rows of this pass.

    Args:
        ids (`torch.LongTensor` of shape `(batch, length)`): from `checked_text_ids`.
        alive (`torch.BoolTensor` of shape `(batch, length)`, *optional*): from `alive_positions`.
        attention_mask (`torch.Tensor`, *optional*): the backbone's mask.
        position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*): documents begin where they do not
            rise by one, as in Transformers' masks.
        engram_segment_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): takes precedence over all
            others.
        cache (`Cache`, *optional*): excludes packed documents.
        seq_idx (`torch.IntTensor` of shape `(batch, length)`, *optional*): the document of each token, as collators
            give it for state space models.
        cu_seq_lens (`torch.IntTensor` of shape `(documents + 1,)`, *optional*): where documents begin in the flattened
            batch, as collators give it for flash attention.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`, True at the last position of every document but the row's last;
        None if every row is one document.

    Raises:
        `ValueError`: if there is a cache, or a mask that hides the documents from the backbone; if two inputs
            contradict each other; if a document begins in the middle.
    """
    if engram_segment_ids is not None:
        told = _ends_of_segments(engram_segment_ids, ids, "engram_segment_ids")
        if cache is not None:
            raise ValueError("engram_segment_ids are for rows read at once: pass use_cache=False.")
        return told
    looks = not torch.compiler.is_compiling() and (ids.device.type == "cpu" or ids.shape[1] > 1 or cache is None)
    told, name = None, None
    if seq_idx is not None:
        told, name = _ends_of_segments(seq_idx, ids, "seq_idx"), "seq_idx"
    if cu_seq_lens is not None:
        ends = _ends_of_lengths(cu_seq_lens, ids)
        if told is not None and looks and not torch.equal(told, ends):
            raise ValueError("seq_idx and cu_seq_lens_q part the row into other documents: pass one of them.")
        told, name = ends, "cu_seq_lens_q"
    if told is not None:
        return _checked_borders(told, name, position_ids, cache, looks)
    if position_ids is None or position_ids.ndim != 2:  # multimodal positions are three to a token
        return None
    positions = position_ids.to(ids.device).expand(len(ids), -1)  # (batch, length)
    steps = positions.diff(dim=1)  # (batch, length - 1)
    packed = cache is None and not _is_flat(attention_mask)
    if looks:
        _refuse_beginnings(positions, steps, alive, packed, cache)
    if torch.compiler.is_compiling():
        return _ends_where(steps != 1) if packed else None
    if packed:
        return _ends_where(steps != 1) if bool((steps != 1).any()) else None
    if looks:
        _refuse_restarts(positions, alive, attention_mask, cache)
    return None


def _ends_of_segments(segments, ids, name: str) -> torch.Tensor:
    """Returns flags `(batch, length)` from the document of each token."""
    _check_integers(segments, name)
    if segments.shape != ids.shape:
        raise ValueError(f"{name} has shape {tuple(segments.shape)}, the ids have {tuple(ids.shape)}.")
    return _ends_where(segments.to(ids.device).diff(dim=1) != 0)


def _ends_of_lengths(cu_seq_lens, ids) -> torch.Tensor:
    """Returns flags `(batch, length)` from the positions where documents begin, `(documents + 1,)`."""
    _check_integers(cu_seq_lens, "cu_seq_lens_q")
    if cu_seq_lens.ndim != 1 or len(cu_seq_lens) < 2:
        raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seq_lens.shape)}: it must be (documents + 1,).")
    places = torch.arange(ids.numel(), device=ids.device)  # (batch * length,)
    last = torch.isin(places, cu_seq_lens[1:].to(ids.device) - 1)  # (batch * length,)
    return _ends_where(last.view(ids.shape)[:, :-1])  # (batch, length)


def _checked_borders(told, name: str, position_ids, cache: Cache | None, looks: bool) -> torch.Tensor | None:
    """Returns borders `(batch, length)` if positions agree with them and there is no cache; None if there are none."""
    if not looks:
        return told
    if not bool(told.any()):
        return None
    if cache is not None:
        raise ValueError(f"{name} parts the row into documents, which are read at once: pass use_cache=False.")
    if position_ids is not None and position_ids.ndim == 2:
        steps = position_ids.to(told.device).expand(len(told), -1).diff(dim=1)  # (batch, length - 1)
        if bool((told[:, :-1] & (steps == 1)).any()):
            raise ValueError(
                f"{name} ends a document where position_ids go on: attention that looks at positions would read across "
                "it. Let positions restart at 0 in every document."
            )
    return told


def _is_flat(attention_mask) -> bool:
    """Whether a mask is of shape (batch, length), which names pads and hides documents from the backbone."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def _ends_where(borders: torch.Tensor) -> torch.Tensor:
    """Returns flags `(batch, length)` from borders `(batch, length - 1)` between neighbours."""
    return F.pad(borders, (0, 1))  # (batch, length)


def _refuse_beginnings(positions, steps, alive, packed: bool, cache: Cache | None) -> None:
    """Raises ValueError if a text begins at a position above 0, so that earlier tokens are missing.

    Serving engines call a model so: one row with the next token of many requests, and keep the cache themselves.
    """
    if seen_positions(cache):
        return
    alive = torch.ones_like(positions, dtype=torch.bool) if alive is None else alive  # (batch, length)
    if packed:
        wrong = F.pad(steps != 1, (1, 0), value=True) & alive & (positions != 0)  # (batch, length)
    else:  # pads may be counted too
        places = torch.arange(positions.shape[1], device=positions.device)  # (length,)
        wrong = (alive.cumsum(1) == 1) & alive & (positions > places)  # (batch, length)
    if bool(wrong.any()):
        row, place = (int(number) for number in wrong.nonzero()[0])
        raise ValueError(
            f"position_ids have {int(positions[row, place])} at token {place} of row {row}, and the tokens before it "
            "are neither in the row nor in a cache: their n-grams are unknown. Pass the cache or the whole text; "
            "positions of every document begin at 0. Where they mean something else, pass engram_segment_ids."
        )


def _refuse_restarts(positions, alive, attention_mask, cache: Cache | None) -> None:
    """Raises ValueError if positions of text restart where the backbone would attend across the restart."""
    alive = torch.ones_like(positions, dtype=torch.bool) if alive is None else alive  # (batch, length)
    restarts = (positions.diff(dim=1) < 1) & alive[:, 1:] & alive[:, :-1]  # (batch, length - 1)
    again = alive[:, 0] & (positions[:, 0] == 0)  # (batch,): position 0 again, after text in the cache
    past = seen_positions(cache)
    if not past or (attention_mask is not None and not _is_flat(attention_mask)):
        again = torch.zeros_like(again)
    elif attention_mask is not None:
        again = again & (attention_mask[:, :past] != 0).any(1).to(again.device)
    if bool(restarts.any() | again.any()):
        what = "a cache" if cache is not None else "a two-dimensional attention_mask"
        raise ValueError(
            f"position_ids restart beside {what}: with it the backbone reads on from one document into the next. "
            "Packed documents need attention_mask=None and use_cache=False."
        )
