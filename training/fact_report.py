"""Fact reports: what a model answers with a pack and without it, and what the pack does to other texts.

Promises: every figure has its control, the same model without the pack, measured on the same texts; the model and its
active packs are afterwards what they were. Never samples: answers are chosen greedily. Source: docs/packs.md.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F

from ..knowledge_pack_engram import KnowledgePack
from .fact_texts import IGNORED, FactText, fact_texts, pad_id, padded


# Tokens of a text about something else that are compared; the rest is left out.
COMPARED = 256


def recall(model, facts: Iterable[Mapping], tokenizer, batch_size: int = 64) -> float:
    """Returns the share of texts whose marked answer the model gives, token by token, when it chooses greedily.

    Args:
        model (`PreTrainedModel`): with the packs that it should read.
        facts (iterable of `dict`): as for [`teach`]; texts that were not taught measure other phrasings.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        batch_size (`int`, *optional*, defaults to 64): texts in a pass.
    """
    return answers(model, fact_texts(facts, tokenizer), tokenizer, batch_size)["right"]


def report_pack(
    model,
    pack: KnowledgePack,
    tokenizer,
    *,
    facts: Iterable[Mapping],
    unseen: Iterable[Mapping] = (),
    other_texts: Mapping[str, Iterable[str]] | None = None,
) -> dict:
    """Measures what a pack teaches a model, and what it changes elsewhere.

    The model's active packs stay active, so facts of another pack can be among the other texts.

    Args:
        model ([`EngramForCausalLM`]): has not loaded the pack.
        pack ([`KnowledgePack`]): what is measured.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        facts (iterable of `dict`): the taught ones.
        unseen (iterable of `dict`, *optional*): the same facts in phrasings that were not taught.
        other_texts (`dict[str, list[str]]`, *optional*): texts about something else, by a name for each kind.

    Returns:
        `dict` that JSON can hold: `"taught"` and `"unseen"` as from [`answers`], each with `"before"`, the same without
        the pack; `"other_texts"` by name, as from [`changes`]; `"records"` and `"bytes"`.

    Example:

    ```python
    >>> report = report_pack(model, pack, tokenizer, facts=facts, other_texts={"general": ["It rained all day."]})
    >>> report["other_texts"]["general"]["texts_identical"]
    1.0
    ```"""
    kinds = {"taught": fact_texts(facts, tokenizer)}
    unseen = list(unseen)
    if unseen:
        kinds["unseen"] = fact_texts(unseen, tokenizer)
    report = {"records": len(pack), "bytes": pack.nbytes}
    for kind, texts in kinds.items():
        report[kind] = {"before": answers(model, texts, tokenizer)}
    name = model.load_memory(pack, "being measured")

    @contextmanager
    def off():
        active = model.active_memories
        model.set_memories([other for other in active if other != name])
        try:
            yield
        finally:
            model.set_memories(active)

    try:
        for kind, texts in kinds.items():
            report[kind] |= answers(model, texts, tokenizer)
        others = {kind: changes(model, texts, tokenizer, off) for kind, texts in (other_texts or {}).items()}
    finally:
        model.unload_memory(name)
    return {**report, "other_texts": others}


def report_lines(report: Mapping) -> list[str]:
    """Returns a report from [`report_pack`] as lines for people.

    Example:

    ```python
    >>> print(*report_lines(pack.provenance["report"]), sep="\\n")
    ```"""
    lines = [f"{report['records']:,} records, {report['bytes']:,} bytes"]
    for kind in ("taught", "unseen"):
        if kind in report:
            now, before = report[kind], report[kind]["before"]
            line = f"{kind} phrasings: {now['right']:.1%} of {now['texts']} right (before: {before['right']:.1%})"
            if now["candidates"] > 1:
                among, earlier = now["right_among_candidates"], before["right_among_candidates"]
                line += f"; among {now['candidates']:.0f} candidates {among:.1%} (before: {earlier:.1%})"
            lines.append(line)
    for kind, found in report["other_texts"].items():
        lines.append(
            f"{kind} texts: {found['texts_identical']:.1%} of {found['texts']} identical bit for bit; loss "
            f"{found['loss']:.4f} (before: {found['loss_before']:.4f}), KL {found['kl']:.4f} nats a token"
        )
    return lines


@torch.no_grad()
def answers(model, texts: list[FactText], tokenizer, batch_size: int = 64) -> dict:
    """Returns how many answers of texts are right.

    Args:
        model (`PreTrainedModel`): any causal language model.
        texts (`list[FactText]`): from `fact_texts`.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        batch_size (`int`, *optional*, defaults to 64): texts in a pass.

    Returns:
        `dict`: `"texts"`; `"right"`, the share whose answer is chosen greedily, token by token;
        `"right_among_candidates"`, the share whose answer has the most probable first token among the candidates, which
        are the first tokens of all answers of the same relation; `"candidates"`, their mean number.
    """
    candidates: dict[str, set[int]] = {}
    for text in texts:
        candidates.setdefault(text.relation, set()).add(text.answer_ids[0])
    right = among = 0
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        ids, mask, labels = padded(batch, pad_id(tokenizer), model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (batch, length - 1, V)
        wanted = labels[:, 1:] != IGNORED  # (batch, length - 1)
        wrong = (logits.argmax(-1) != labels[:, 1:]) & wanted  # (batch, length - 1)
        right += int((~wrong.any(-1)).sum())
        begins = wanted.int().argmax(-1)  # (batch,)
        for row, text in enumerate(batch):
            offered = torch.tensor(sorted(candidates[text.relation]), device=logits.device)
            chosen = offered[logits[row, begins[row]][offered].argmax()]
            among += int(chosen) == text.answer_ids[0]
    return {
        "texts": len(texts),
        "right": right / len(texts),
        "right_among_candidates": among / len(texts),
        "candidates": sum(len(candidates[text.relation]) for text in texts) / len(texts),
    }


@torch.no_grad()
def changes(model, texts: Iterable[str], tokenizer, off: Callable[[], AbstractContextManager]) -> dict:
    """Returns what a change of a model does to texts, compared with the model inside `off()`.

    Args:
        model (`PreTrainedModel`): the changed model.
        texts (iterable of `str`): their first 256 tokens are read, each text alone.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        off (`Callable`): gives a context in which the model is as it was.

    Returns:
        `dict`: `"texts"`; `"texts_identical"` and `"tokens_identical"`, the shares whose logits are the same bit for
        bit; `"loss_before"` and `"loss"`, nats a token; `"kl"`, nats a token, from the model as it was;
        `"largest_difference"` of a logit.
    """
    tokens = same_tokens = same_texts = count = 0
    before_sum = after_sum = divergence = largest = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:COMPARED]], device=model.device)  # (1, length)
        after = model(input_ids=ids, use_cache=False).logits[0]  # (length, vocabulary)
        with off():
            before = model(input_ids=ids, use_cache=False).logits[0]  # (length, vocabulary)
        same = (after == before).all(-1)  # (length,)
        count, tokens = count + 1, tokens + len(same)
        same_tokens, same_texts = same_tokens + int(same.sum()), same_texts + bool(same.all())
        largest = max(largest, float((after - before).abs().max()))
        after, before = after.float().log_softmax(-1), before.float().log_softmax(-1)
        divergence += float(F.kl_div(after, before, reduction="sum", log_target=True))
        before_sum += float(F.nll_loss(before[:-1], ids[0, 1:], reduction="sum"))
        after_sum += float(F.nll_loss(after[:-1], ids[0, 1:], reduction="sum"))
    if not count:
        raise ValueError("there are no texts to compare.")
    scored = max(1, tokens - count)  # the first token of a text is not predicted
    return {
        "texts": count,
        "texts_identical": same_texts / count,
        "tokens_identical": same_tokens / tokens,
        "loss_before": before_sum / scored,
        "loss": after_sum / scored,
        "kl": divergence / tokens,
        "largest_difference": largest,
    }
