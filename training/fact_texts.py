"""Fact texts: usage sentences with a marked answer, as token ids for learning and for measuring.

Promises: all facts are checked before any work begins, and an error names the fact. Never reads a text as code or as a
pattern. Source: docs/packs.md.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F


# The answer in a text.
MARKED = re.compile(r"\[\[(.+?)\]\]")

# Tokens of the longest text: facts are sentences, and a batch is as long as its longest text.
LONGEST = 512

GROUPED = 16  # most batches that are sorted by length together

IGNORED = -100  # label of a token that is not part of an answer


@dataclass(frozen=True)
class FactText:
    """One text of a fact.

    Args:
        subject (`str`): whom it is about.
        relation (`str`): what it says of the subject; "" if the fact does not say.
        prompt (`str`): what stands in front of the answer.
        ids (`list[int]`): its tokens.
        answer (`list[bool]`): which of them are the answer.
    """

    subject: str
    relation: str
    prompt: str
    ids: list[int]
    answer: list[bool]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return tuple(token for token, inside in zip(self.ids, self.answer, strict=True) if inside)


def fact_texts(facts: Iterable[Mapping], tokenizer) -> list[FactText]:
    """Checks facts and finds their answers' tokens.

    Args:
        facts (iterable of `dict`): as for [`teach`].
        tokenizer (`PreTrainedTokenizerFast`): says where its tokens are.

    Raises:
        `ValueError`: naming the fact, for everything that [`teach`] refuses in a text.
        `TypeError`: for a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{type(tokenizer).__name__} does not say where its tokens are: use a fast tokenizer.")
    facts = list(facts)
    if not facts:
        raise ValueError("there are no facts: each is a dict with a 'subject' and 'texts'.")
    found, answers = [], {}
    for number, fact in enumerate(facts):
        subject, texts = (fact.get("subject"), fact.get("texts")) if isinstance(fact, Mapping) else (None, None)
        if not isinstance(subject, str) or not subject.strip() or isinstance(texts, str) or not texts:
            raise ValueError(
                f"fact {number} needs a 'subject' and a list of 'texts' with their answers marked, as in "
                f'{{"subject": "Ada", "texts": ["Ada was born in [[London]]."]}}; it is {str(fact)[:200]!r}.'
            )
        for text in texts:
            example, answer = _fact_text(subject, str(fact.get("relation", "")), text, tokenizer)
            if answers.setdefault(example.prompt, answer) != answer:
                raise ValueError(
                    f"{example.prompt!r} is answered by {answers[example.prompt]!r} and by {answer!r}: keep one of "
                    "them."
                )
            found.append(example)
    return found


def _fact_text(subject: str, relation: str, text: str, tokenizer) -> tuple[FactText, str]:
    """Returns a text with its tokens, and its answer."""
    marks = list(MARKED.finditer(text))
    if len(marks) != 1 or not marks[0][1].strip():
        raise ValueError(f"a text of {subject!r} needs one [[answer]], it has {len(marks)}: {text[:200]!r}.")
    prompt, answer, rest = text[: marks[0].start()], marks[0][1], text[marks[0].end() :]
    if subject not in prompt:
        raise ValueError(f"this text does not name {subject!r} before its answer: {text[:200]!r}.")
    if answer in prompt:
        raise ValueError(f"the answer {answer!r} is in front of itself, so nothing would be learned: {text[:200]!r}.")
    read = tokenizer(prompt + answer + rest, return_offsets_mapping=True)
    ids = read["input_ids"]
    if len(ids) > LONGEST:
        raise ValueError(f"a text of {subject!r} has {len(ids)} tokens, at most {LONGEST} are taught: {text[:200]!r}.")
    begin, end = len(prompt), len(prompt + answer)
    inside = [first < end and last > begin for first, last in read["offset_mapping"]]
    return FactText(subject, relation, prompt, ids, inside), answer


def shuffled_batches(texts: list[FactText], size: int, steps: int, seed: int) -> Iterator[list[FactText]]:
    """Yields batches of texts that are about equally long, so that little is padded.

    The order is random, both of batches and of texts among batches. No text is read three times while another one
    waits for its first, and a batch holds a text more than twice only if there are fewer texts than half of its places.
    """
    order, left, ready = random.Random(seed), [], []
    # Sorted together are whole batches of one pass: of several, the copies of a text would fill a batch.
    together = max(1, min(GROUPED, len(texts) // size)) * size
    for _ in range(steps):
        if not ready:
            while len(left) < together:
                left += order.sample(texts, len(texts))
            group, left = sorted(left[:together], key=lambda text: len(text.ids)), left[together:]
            ready = [group[first : first + size] for first in range(0, len(group), size)]
            order.shuffle(ready)
        yield ready.pop()


def padded(texts: list[FactText], pad: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Returns ids, mask and labels `(batch, length)`; labels are `IGNORED` outside the answers."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), longest), pad, device="cpu")
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, text in enumerate(texts):
        own = torch.tensor(text.ids, device="cpu")
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
        answer = torch.tensor(text.answer, device="cpu")
        labels[row, : len(own)] = own.where(answer, IGNORED)
    return ids.to(device), mask.to(device), labels.to(device)


def pad_id(tokenizer) -> int:
    """An id for places that the mask hides."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of the answers' tokens, in nats.

    Args:
        logits (`torch.Tensor` of shape `(batch, length, vocabulary)`): of a batch from `padded`.
        labels (`torch.LongTensor` of shape `(batch, length)`): of the same batch.
    """
    wanted = labels[:, 1:] != IGNORED  # (batch, length - 1)
    return F.cross_entropy(logits[:, :-1][wanted].float(), labels[:, 1:][wanted])


def divergence(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean KL divergence of all tokens that do not predict an answer, in nats.

    Args:
        before (`torch.Tensor` of shape `(batch, length, vocabulary)`): logits that should be kept.
        after (`torch.Tensor` of shape `(batch, length, vocabulary)`): logits that are compared with them.
        labels (`torch.LongTensor` of shape `(batch, length)`): of a batch from `padded`.
        mask (`torch.LongTensor` of shape `(batch, length)`): of the same batch.
    """
    predicts = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # (batch, length)
    kept = mask.bool() & ~predicts  # (batch, length)
    before, after = (logits[kept].float().log_softmax(-1) for logits in (before, after))  # (tokens, vocabulary)
    return F.kl_div(after, before, reduction="batchmean", log_target=True)
