"""Fact expressions: a language model writes more texts for facts, which are then taught beside the given ones.

What it chooses: a model continues a list of a fact's own texts, and a line is kept only if it names subject and answer
once, in this order, and no other fact's subject or answer. Promises: every text that is returned can be taught; facts,
model, its mode and the state of random numbers are afterwards what they were; the same seed gives the same texts.
Never checks that a text is true or good English: look at them before you teach.
Source: docs/packs.md.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from tqdm import tqdm
from transformers.utils import logging

from .fact_texts import LONGEST, MARKED, fact_texts, pad_id


logger = logging.get_logger(__name__)

_ASKED = "The same fact, said in many different ways:"
_SHOWN = 4  # texts of a fact in a list
_TRIES = 5  # samples for each text that is wanted
_NEW_TOKENS = 32  # of a line


def more_texts(
    model,
    tokenizer,
    facts: Iterable[Mapping],
    count: int,
    *,
    temperature: float = 0.8,
    batch_size: int = 64,
    bf16: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Lets a model write more texts for facts. A fact for which fewer were good gets fewer, with a warning.

    Args:
        model (`PreTrainedModel`): any causal language model; it writes with `generate`.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        facts (iterable of `dict`): as for [`teach`]; facts of the same `"relation"` keep one another's answers out.
        count (`int`): most texts for each fact.
        temperature (`float`, *optional*, defaults to 0.8): of sampling.
        batch_size (`int`, *optional*, defaults to 64): texts that are written at once.
        bf16 (`bool`, *optional*, defaults to `True`): autocast.
        seed (`int`, *optional*, defaults to 0): of sampling.
        progress (`bool`, *optional*, defaults to `True`): whether to show a bar.

    Returns:
        `list[dict]`: the facts that got texts, with these alone and their answers marked.

    Raises:
        `ValueError`: if `count` or `temperature` is too small, and for facts that [`teach`] refuses.
        `TypeError`: for a tokenizer that does not say where its tokens are.

    Example:

    ```python
    >>> facts = [{"subject": "Zorvan Kelmir", "texts": ["Zorvan Kelmir was born in [[Lisbon]]."]}]
    >>> pack = model.teach(facts + more_texts(model, tokenizer, facts, 3), tokenizer)
    ```"""
    check_count("count", count, least=1)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be larger than 0: without sampling, all texts are the same.")
    facts = list(facts)
    fact_texts(facts, tokenizer)
    kept, order, training = _Kept(facts), random.Random(seed), model.training
    on_device = [] if model.device.type == "cpu" else [model.device]
    model.eval()
    try:
        with torch.random.fork_rng(on_device, device_type=model.device.type):
            torch.manual_seed(seed)
            bar = tqdm(total=count * len(facts), desc="writing texts", disable=not progress)
            for _ in range(_TRIES):
                wanted = [n for n, texts in enumerate(kept.texts) for _ in range(count - len(texts))]
                for first in range(0, len(wanted), batch_size):
                    asked = wanted[first : first + batch_size]
                    prompts = [_prompt(facts[n], order) for n in asked]
                    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                        lines = _lines(model, tokenizer, prompts, temperature)
                    bar.update(sum(kept.add(n, line) for n, line in zip(asked, lines, strict=True)))
            bar.close()
    finally:
        model.train(training)
    few = [fact["subject"] for fact, texts in zip(facts, kept.texts, strict=True) if len(texts) < count]
    if few:
        logger.warning(
            f"{len(few)} of {len(facts)} facts got fewer than {count} written texts, such as those of {few[:3]}: "
            f"{_TRIES} samples for each text gave no more. Write texts for them, or let another model write."
        )
    return [{**fact, "texts": texts} for fact, texts in zip(facts, kept.texts, strict=True) if texts]


def check_count(name: str, count: int, least: int) -> None:
    """Raises ValueError for a number of texts that is too small or not whole."""
    if not isinstance(count, int) or count < least:
        raise ValueError(f"{name}={count!r} must be a whole number of texts for each fact, at least {least}.")


def _prompt(fact: Mapping, order: random.Random) -> str:
    """Returns the beginning of a list, with some of a fact's texts."""
    shown = order.sample(list(fact["texts"]), min(_SHOWN, len(fact["texts"])))
    return "\n- ".join([_ASKED, *(MARKED.sub(r"\1", text) for text in shown)]) + "\n-"


def _lines(model, tokenizer, prompts: list[str], temperature: float) -> list[str]:
    """Returns how a model continues prompts: the first line, or "" if it does not end."""
    read, pad = tokenizer(prompts)["input_ids"], pad_id(tokenizer)
    longest = max(map(len, read))
    padded = [[pad] * (longest - len(own)) + own for own in read]
    mask = [[0] * (longest - len(own)) + [1] * len(own) for own in read]
    sampled = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "max_new_tokens": _NEW_TOKENS}
    ids, mask = (torch.tensor(rows, device=model.device) for rows in (padded, mask))  # (prompts, longest)
    out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **sampled)  # (prompts, longest + new)
    written = (text.partition("\n") for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True))
    return [line.strip() if end else "" for line, end, _ in written]


class _Kept:
    """The written texts of facts that can be taught.

    Args:
        facts (`list[dict]`): the given facts.
    """

    def __init__(self, facts: list[Mapping]):
        self.facts, self.texts = facts, [[] for _ in facts]
        marked = [[MARKED.split(text) for text in fact["texts"]] for fact in facts]  # what is before, answer, the rest
        self._prompts = {before for texts in marked for before, _, _ in texts}
        self._own = [texts[0][1] for texts in marked]
        self._answers = defaultdict(set)
        for fact, answer in zip(facts, self._own, strict=True):
            self._answers[fact.get("relation")].add(answer)
        self._subjects = {fact["subject"] for fact in facts}

    def add(self, number: int, line: str) -> bool:
        """Keeps a line as a text of a fact if it can be taught; returns whether it was kept."""
        subject, answer = self.facts[number]["subject"], self._own[number]
        before, found, after = line.partition(answer)
        front, named, back = before.partition(subject)
        # A subject's records are those of its tokens at the beginning of a text and after a space.
        is_read = named and front[-1:] in ("", " ") and not back[:1].isalnum() and subject not in back + after
        whole = found and not before[-1:].isalnum() and not after[:1].isalnum()
        if not (is_read and whole) or answer in after or before in self._prompts:
            return False
        others = self._subjects | self._answers[self.facts[number].get("relation")]
        said = line.replace(subject, "")
        if any(other in said for other in others if other not in answer):
            return False
        # A token has at least one byte, so this text is short enough for any tokenizer.
        if "[[" in line or "]]" in line or len(line.encode()) >= LONGEST:
            return False
        self._prompts.add(before)
        self.texts[number].append(f"{before}[[{answer}]]{after}")
        return True
