"""Teaching: facts become records of a knowledge pack, over a model that is not changed.

What it chooses: only n-grams inside a subject's name get records, so a fact is written where its subject is read. Then
it comes out in phrasings that were never shown, and text that does not name the subject keeps every bit. Only the
records learn: the answers' tokens, and to leave the other tokens of those texts as they were.
Promises: no weight of the model changes, and its active packs and trainable parameters are afterwards what they were,
also after an error; all facts are checked before any work begins. Source: docs/packs.md.
"""

import gzip
import random
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..knowledge_pack_engram import KnowledgePack, pack_identity
from .fact_expressions import check_count, more_texts
from .fact_report import report_pack
from .fact_texts import FactText, answer_loss, divergence, fact_texts, pad_id, padded, shuffled_batches


_TAUGHT = "being taught"  # name of the pack whose records learn
_ASKED = 200  # taught texts in the report of a pack
_COMPARED = 24  # reference texts in it


def teach(
    model,
    facts: Iterable[Mapping],
    tokenizer,
    *,
    unseen: Iterable[Mapping] = (),
    expressions: int = 0,
    writer: tuple | None = None,
    reference_texts: Iterable[str] | None = None,
    passes: int = 6,
    batch_size: int = 64,
    learning_rate: float = 1.0,
    keep: float = 1.0,
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
        unseen (iterable of `dict`, *optional*): the same facts in other phrasings, for the report; they are not taught.
        expressions (`int`, *optional*, defaults to 0):
            Texts that a model writes for each fact in addition, see [`more_texts`], which shows them before.
        writer (`tuple`, *optional*): the model that writes them, and its tokenizer; if None, this model.
        reference_texts (iterable of `str`, *optional*):
            General text; n-grams that it holds get no record. If None, [`general_english`].
        passes (`int`, *optional*, defaults to 6): how often each text is read.
        batch_size (`int`, *optional*, defaults to 64): texts in a step.
        learning_rate (`float`, *optional*, defaults to 1.0): of Adam, over the records; warm-up, then linear decay.
        keep (`float`, *optional*, defaults to 1.0):
            Weight of the KL divergence from the model without the pack, over all tokens that are not an answer (of a
            quarter of each batch): texts about a subject read as before where they do not ask for its fact.
        bf16 (`bool`, *optional*, defaults to `True`): autocast of the passes; records are float32.
        seed (`int`, *optional*, defaults to 0): of the order of texts.
        provenance (`dict`, *optional*): stored in the pack, such as `{"licence": "CC0"}`.
        progress (`bool`, *optional*, defaults to `True`): whether to show a bar.

    Returns:
        [`KnowledgePack`] with `mode="add"`; its provenance says how it was made, and `provenance["report"]` is what
        [`report_pack`] measured of it: up to 200 of the texts, all of `unseen`, and 24 reference texts.

    Raises:
        `ValueError`: naming the fact: without subject, texts or a marked answer; with the answer in front of itself, a
            text that does not name its subject or contradicts another; a subject without an n-gram of its own; a text
            of more than 512 tokens. Also for a model whose tables are placed nowhere, or another tokenizer.
        `TypeError`: for a tokenizer that does not say where its tokens are, and a `writer` that is not such a pair.

    Example:

    ```python
    >>> facts = [{"subject": "Zorvan Kelmir", "texts": ["Zorvan Kelmir was born in [[Lisbon]]."]}]
    >>> pack = model.teach(facts, tokenizer)
    >>> model.load_memory(pack, name="people")
    'people'
    ```"""
    if model.memory.placement == "none":
        raise ValueError('this model runs without its memory (placement "none"): place_memory("cpu") loads it.')
    writer = _writer(model, tokenizer, expressions, writer)
    facts, unseen = list(facts), list(unseen)
    texts = fact_texts(facts, tokenizer)
    if unseen:
        fact_texts(unseen, tokenizer)  # refused before any work begins
    model.check_tokenizer(tokenizer)
    general = general_english() if reference_texts is None else list(reference_texts)
    fits = pack_identity(model.config, model.memory.layers)
    ngrams = _subject_ngrams(model, facts, tokenizer, general, fits)
    _check_reached(model, texts, ngrams)
    if expressions:
        written = more_texts(*writer, facts, expressions, bf16=bf16, seed=seed, progress=progress)
        texts += fact_texts(written, tokenizer) if written else []
    shapes = {n: (len(grams), fits["widths"][str(n)]) for n, grams in ngrams.items()}
    vectors = {layer: {n: torch.zeros(shape, device="cpu") for n, shape in shapes.items()} for layer in fits["layers"]}
    steps = max(1, -(-passes * len(texts) // batch_size))
    batches = shuffled_batches(texts, batch_size, steps, seed)
    bar = tqdm(batches, total=steps, desc=f"teaching {len(facts)} facts", disable=not progress)
    settings = {"learning_rate": learning_rate, "keep": keep, "bf16": bf16}
    pack, loss = _learned(model, KnowledgePack(ngrams, vectors, fits), bar, steps, pad_id(tokenizer), **settings)
    made = {"facts": len(facts), "texts": len(texts), "passes": passes, "seed": seed, "loss": loss}
    shown = {"general": sorted(general, key=len)[-_COMPARED:]} if general else {}
    asked = {"facts": _some(facts, texts, seed), "unseen": unseen}
    report = report_pack(model, pack, tokenizer, **asked, other_texts=shown)
    pack.provenance = {**made, "report": report, **(provenance or {})}
    return pack


def general_english() -> list[str]:
    """Returns 12,287 sentences of ordinary English words, which ship with the package: examples of WordNet 3.0."""
    with gzip.open(Path(__file__).with_name("general_english.txt.gz"), "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def _writer(model, tokenizer, expressions: int, writer: tuple | None) -> tuple:
    """Returns the model that writes texts, and its tokenizer."""
    check_count("expressions", expressions, least=0)
    if writer is None:
        return model, tokenizer
    if not isinstance(writer, tuple) or len(writer) != 2 or not hasattr(writer[0], "generate"):
        raise TypeError(f"writer is a {type(writer).__name__}: give (model, tokenizer) of a model that can generate.")
    if not expressions:
        raise ValueError("there is a writer, and expressions=0 asks it for no text: say how many for each fact.")
    return writer


def _learned(
    model, pack: KnowledgePack, batches, steps: int, pad: int, *, learning_rate: float, keep: float, bf16: bool
) -> tuple[KnowledgePack, float]:
    """Returns a pack with vectors that were learned from batches, and the answers' last loss."""
    with _reading_only(model, pack) as learned, _attention_for_short_texts(model.device):
        optimizer = torch.optim.Adam(learned, lr=learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 5) * max(0.05, 1 - step / steps)
        )
        for batch in batches:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                loss, changed = _losses(model, batch, pad)
            (loss + keep * changed).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            batches.set_postfix(loss=f"{float(loss.detach()):.3f}", changed=f"{float(changed.detach()):.3f}")
        device = model.memory.hashing.token_map.device
        rows = {n: records.on(device).vectors for n, records in pack.records.items()}
        vectors = {layer: {n: rows[n][layer].detach().cpu() for n in rows} for layer in pack.fits["layers"]}
    ngrams = {n: records.ngrams for n, records in pack.records.items()}
    return KnowledgePack(ngrams, vectors, pack.fits), float(loss.detach())


def _some(facts: list[Mapping], texts: list[FactText], seed: int) -> list[Mapping]:
    """Returns facts of about 200 texts, for the report."""
    count = max(1, len(facts) * _ASKED // len(texts))
    return facts if count >= len(facts) else random.Random(seed).sample(facts, count)


def _subject_ngrams(model, facts, tokenizer, reference_texts, fits: Mapping) -> dict[int, torch.Tensor]:
    """Returns the n-grams of all subjects by order: as at the beginning of a text, and as after a space."""
    orders = [int(n) for n in fits["widths"]]
    read = tokenizer(reference_texts)["input_ids"] if reference_texts else []
    classes = iter(_classes(model, [token for ids in read for token in ids]))  # at once: one tensor for all texts
    general = set()
    for ids in read:
        general |= _ngrams(list(islice(classes, len(ids))), orders)
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
            "general text holds all of their n-grams. Name them by more words, or teach them to the tables "
            '(set_trainable("tables") and EngramTrainer), which changes other texts too.'
        )
    by_order = {n: sorted(gram for gram in found if len(gram) == n) for n in orders}
    return {n: torch.tensor(grams, dtype=torch.int64, device="cpu").view(-1, n) for n, grams in by_order.items()}


def _check_reached(model, texts: list[FactText], ngrams: Mapping[int, torch.Tensor]) -> None:
    """Raises ValueError for a text in which no record would be read before the answer."""
    held = {tuple(gram) for grams in ngrams.values() for gram in grams.tolist()}
    for text in texts:
        before = text.ids[: text.answer.index(True)]
        if not held & _ngrams(_classes(model, before), list(ngrams)):
            raise ValueError(
                f"{text.subject!r} is split into other tokens in one of its texts, so no record would be read "
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


def _losses(model, texts: list[FactText], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of the answers, and how much a quarter of the texts changes elsewhere, both in nats a token."""
    ids, mask, labels = padded(texts, pad, model.device)
    logits = model(ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocabulary)
    few = -(-len(texts) // 4)
    with torch.no_grad():
        others = [[name for name in model.active_memories if name != _TAUGHT]] * few
        before = model(ids[:few], attention_mask=mask[:few], use_cache=False, memory_names=others).logits
    return answer_loss(logits, labels), divergence(before, logits[:few], labels[:few], mask[:few])


def _attention_for_short_texts(device: torch.device):
    """Returns a context in which attention on a CPU is plain matrix products.

    The fused kernel's backward pass takes a quarter of a whole step there, because texts are short.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def _reading_only(model, pack: KnowledgePack):
    """Lets a model read a pack whose vectors alone are trainable; yields them and restores everything else."""
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packs, training = model.memory.packs, model.training
    model.requires_grad_(False)
    model.eval()
    learned = []
    try:
        packs.load(pack, _TAUGHT, pack.fits)
        device = model.memory.hashing.token_map.device
        for records in pack.records.values():
            records = records.on(device)
            records.vectors = {layer: nn.Parameter(rows) for layer, rows in records.vectors.items()}
            learned += records.vectors.values()
        yield learned
    finally:
        if _TAUGHT in packs.loaded:
            packs.unload(_TAUGHT)
        model.train(training)
        for parameter in learns:
            parameter.requires_grad_(True)
