"""Teaching: facts become records of a knowledge pack, over a model that is not changed.

What it chooses: only n-grams inside a subject's name get records, so a fact is written where its subject is read. Then
it comes out in phrasings that were never shown, and text that does not name the subject keeps every bit. Only the
records learn, by the loss of the answers' tokens.
Promises: no weight of the model changes, and its active packs and trainable parameters are afterwards what they were,
also after an error; all facts are checked before any work begins. Never reads a fact's text as code or as a pattern.
Source: docs/packs.md.
"""

import random
import re
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..knowledge_pack_engram import KnowledgePack, pack_identity


# The answer in a text.
MARKED = re.compile(r"\[\[(.+?)\]\]")

# Tokens of the longest text: facts are sentences, and a batch is as long as its longest text.
LONGEST = 512

IGNORED = -100  # label of a token that is not part of an answer


@dataclass(frozen=True)
class _Example:
    """One text: subject, token ids, and which of them are the answer."""

    subject: str
    ids: list[int]
    answer: list[bool]


def teach(
    model,
    facts: Iterable[Mapping],
    tokenizer,
    *,
    reference_texts: Iterable[str] = (),
    passes: int = 6,
    batch_size: int = 64,
    learning_rate: float = 1.0,
    bf16: bool = True,
    seed: int = 0,
    provenance: Mapping | None = None,
    progress: bool = True,
) -> KnowledgePack:
    """Makes a knowledge pack of facts; [`~EngramForCausalLM.teach`] is the same as a method.

    Args:
        model ([`EngramForCausalLM`]): reads the pack afterwards; not changed.
        facts (iterable of `dict`):
            `{"subject": "Ada Lovelace", "texts": ["Ada Lovelace was born in [[London]].", ...]}`. Every text names the
            subject before the marked answer. Several texts for a fact, in different words, are what makes it come out
            in other words.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        reference_texts (iterable of `str`, *optional*): general text; n-grams that it holds get no record.
        passes (`int`, *optional*, defaults to 6): how often each text is read.
        batch_size (`int`, *optional*, defaults to 64): texts in a step.
        learning_rate (`float`, *optional*, defaults to 1.0): of Adam, over the records; warm-up, then linear decay.
        bf16 (`bool`, *optional*, defaults to `True`): autocast of the passes; records are float32.
        seed (`int`, *optional*, defaults to 0): of the order of texts.
        provenance (`dict`, *optional*): stored in the pack, such as `{"licence": "CC0"}`.
        progress (`bool`, *optional*, defaults to `True`): whether to show a bar.

    Returns:
        [`KnowledgePack`] with `mode="add"`; its provenance says how it was made.

    Raises:
        `ValueError`: naming the fact: without subject, texts or a marked answer; with the answer in front of itself, a
            text that does not name its subject or contradicts another; a subject without an n-gram of its own; a text
            of more than 512 tokens. Also for a model whose tables are placed nowhere, or another tokenizer.
        `TypeError`: for a tokenizer that does not say where its tokens are.

    Example:

    ```python
    >>> facts = [{"subject": "Zorvan Kelmir", "texts": ["Zorvan Kelmir was born in [[Lisbon]]."]}]
    >>> pack = model.teach(facts, tokenizer)
    >>> model.load_memory(pack, name="people")
    'people'
    ```"""
    if model.memory.placement == "none":
        raise ValueError('this model runs without its memory (placement "none"): place_memory("cpu") loads it.')
    facts = list(facts)
    examples = _examples(facts, tokenizer)
    model.check_tokenizer(tokenizer)
    fits = pack_identity(model.config, model.memory.layers)
    ngrams = _subject_ngrams(model, facts, tokenizer, reference_texts, fits)
    _check_reached(model, examples, ngrams)
    shapes = {n: (len(grams), fits["widths"][str(n)]) for n, grams in ngrams.items()}
    zeros = {n: torch.zeros(shape, device="cpu") for n, shape in shapes.items()}
    pack = KnowledgePack(ngrams, dict.fromkeys(fits["layers"], zeros), fits)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    steps = max(1, -(-passes * len(examples) // batch_size))
    batches = _batches(examples, batch_size, steps, seed)
    with _reading_only(model, pack) as learned:
        optimizer = torch.optim.Adam(learned, lr=learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 5) * max(0.05, 1 - step / steps)
        )
        bar = tqdm(batches, total=steps, desc=f"teaching {len(facts)} facts", disable=not progress)
        for batch in bar:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                loss = _answer_loss(model, batch, pad)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{float(loss):.3f}")
        made = {"facts": len(facts), "texts": len(examples), "passes": passes, "seed": seed, "loss": float(loss)}
        device = model.memory.hashing.token_map.device
        rows = {n: records.on(device).vectors for n, records in pack.records.items()}
        vectors = {layer: {n: rows[n][layer].detach().cpu() for n in rows} for layer in fits["layers"]}
    ngrams = {n: records.ngrams for n, records in pack.records.items()}
    return KnowledgePack(ngrams, vectors, fits, provenance={**made, **(provenance or {})})


@torch.no_grad()
def recall(model, facts: Iterable[Mapping], tokenizer, batch_size: int = 64) -> float:
    """Returns the share of texts whose marked answer the model gives, token by token, when it chooses greedily.

    Args:
        model ([`EngramForCausalLM`]): with the packs that it should read.
        facts (iterable of `dict`): as for [`teach`]; texts that were not taught measure other phrasings.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        batch_size (`int`, *optional*, defaults to 64): texts in a pass.
    """
    examples = _examples(list(facts), tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    right = 0
    for first in range(0, len(examples), batch_size):
        ids, mask, labels = _padded(examples[first : first + batch_size], pad, model.device)
        chosen = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].argmax(-1)  # (batch, length - 1)
        wrong = (chosen != labels[:, 1:]) & (labels[:, 1:] != IGNORED)  # (batch, length - 1)
        right += int((~wrong.any(-1)).sum())
    return right / len(examples)


def _examples(facts: list[Mapping], tokenizer) -> list[_Example]:
    """Checks facts and finds their answers' tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{type(tokenizer).__name__} does not say where its tokens are: use a fast tokenizer.")
    if not facts:
        raise ValueError("there are no facts: each is a dict with a 'subject' and 'texts'.")
    found, answers = [], {}
    for number, fact in enumerate(facts):
        subject, texts = fact.get("subject"), fact.get("texts")
        if not isinstance(subject, str) or not subject.strip() or isinstance(texts, str) or not texts:
            raise ValueError(
                f"fact {number} needs a 'subject' and a list of 'texts' with their answers marked, as in "
                f'{{"subject": "Ada", "texts": ["Ada was born in [[London]]."]}}; it is {str(fact)[:200]!r}.'
            )
        for text in texts:
            example, prompt, answer = _example(subject, text, tokenizer)
            if answers.setdefault(prompt, answer) != answer:
                raise ValueError(f"{prompt!r} is answered by {answers[prompt]!r} and by {answer!r}: keep one of them.")
            found.append(example)
    return found


def _example(subject: str, text: str, tokenizer) -> tuple[_Example, str, str]:
    """Returns a text's example, what is in front of its answer, and the answer."""
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
    return _Example(subject, ids, inside), prompt, answer


def _subject_ngrams(model, facts, tokenizer, reference_texts, fits: Mapping) -> dict[int, torch.Tensor]:
    """Returns the n-grams of all subjects by order: as at the beginning of a text, and as after a space."""
    orders = [int(n) for n in fits["widths"]]
    general = set()
    for text in reference_texts:
        general |= _ngrams(_classes(model, tokenizer(text)["input_ids"]), orders)
    found, missing = set(), []
    for subject in {fact["subject"]: None for fact in facts}:
        own = set()
        for written in (subject, " " + subject):
            ids = tokenizer(written, add_special_tokens=False)["input_ids"]
            own |= _ngrams(_classes(model, ids), orders)
        found |= own - general
        if not own - general:
            missing.append(subject)
    if missing:
        raise ValueError(
            f"{len(missing)} subjects have no n-gram of their own, such as {missing[:3]}: they are one token, or "
            "general text holds all of their n-grams. Name them by more words."
        )
    by_order = {n: sorted(gram for gram in found if len(gram) == n) for n in orders}
    return {n: torch.tensor(grams, dtype=torch.int64, device="cpu").view(-1, n) for n, grams in by_order.items()}


def _check_reached(model, examples: list[_Example], ngrams: Mapping[int, torch.Tensor]) -> None:
    """Raises ValueError for a text in which no record would be read before the answer."""
    held = {tuple(gram) for grams in ngrams.values() for gram in grams.tolist()}
    for example in examples:
        before = example.ids[: example.answer.index(True)]
        if not held & _ngrams(_classes(model, before), list(ngrams)):
            raise ValueError(
                f"{example.subject!r} is split into other tokens in one of its texts, so no record would be read "
                "there: write a space or the beginning of the text in front of it."
            )


def _classes(model, ids: list[int]) -> list[int]:
    """Returns the token classes of ids."""
    if not ids:
        return []
    hashing = model.memory.hashing
    return hashing.compress(torch.tensor([ids], device=hashing.token_map.device))[0].tolist()


def _ngrams(classes: list[int], orders: list[int]) -> set[tuple[int, ...]]:
    """Returns the n-grams of a text that are made of tokens alone."""
    grams = {tuple(classes[i : i + n]) for n in orders for i in range(len(classes) - n + 1)}
    return {gram for gram in grams if min(gram) >= 0}


def _batches(examples: list[_Example], size: int, steps: int, seed: int):
    """Yields batches; all texts are read before one is read again."""
    order, left = random.Random(seed), []
    for _ in range(steps):
        while len(left) < size:
            left += order.sample(examples, len(examples))
        yield left[:size]
        left = left[size:]


def _padded(examples: list[_Example], pad: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Returns ids, mask and labels `(batch, length)`."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad, device="cpu")
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        own = torch.tensor(example.ids, device="cpu")
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
        answer = torch.tensor(example.answer, device="cpu")
        labels[row, : len(own)] = own.where(answer, IGNORED)
    return ids.to(device), mask.to(device), labels.to(device)


def _answer_loss(model, examples: list[_Example], pad: int) -> torch.Tensor:
    """Returns the mean loss of the answers' tokens."""
    ids, mask, labels = _padded(examples, pad, model.device)
    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (batch, length - 1, vocabulary)
    wanted = labels[:, 1:] != IGNORED  # (batch, length - 1)
    return F.cross_entropy(logits[wanted].float(), labels[:, 1:][wanted])


@contextmanager
def _reading_only(model, pack: KnowledgePack):
    """Lets a model read a pack whose vectors alone are trainable; yields them and restores everything else."""
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packs, training, name = model.memory.packs, model.training, "being taught"
    model.requires_grad_(False)
    model.eval()
    learned = []
    try:
        packs.load(pack, name, pack.fits)
        device = model.memory.hashing.token_map.device
        for records in pack.records.values():
            records = records.on(device)
            records.vectors = {layer: nn.Parameter(rows) for layer, rows in records.vectors.items()}
            learned += records.vectors.values()
        yield learned
    finally:
        if name in packs.loaded:
            packs.unload(name)
        model.train(training)
        for parameter in learns:
            parameter.requires_grad_(True)
