"""Teaching: facts become records of a knowledge pack, over a model that is not changed.

What it chooses: only n-grams inside a subject's name get records, so a fact is written where its subject is read. Then
it comes out in phrasings that were never shown, and text that does not name the subject keeps every bit. Only the
records learn: the answers' tokens, and to leave the other tokens of those texts as they were. They learn by descent, or
one vector of each subject does and the records are solved for.
Promises: no weight of the model changes, and its active packs and trainable parameters are afterwards what they were,
also after an error; all facts are checked before any work begins. Source: docs/packs.md.
"""

import gzip
import random
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..knowledge_pack_engram import KnowledgePack, pack_identity
from .fact_descent import Descent, EarlyStop
from .fact_expressions import check_count, more_texts
from .fact_report import report_pack
from .fact_solving import Place, find_places, solve, whole_subjects
from .fact_texts import FactText, fact_texts, pad_id, shuffled_batches


_TAUGHT = "being taught"  # name of the pack whose records learn
_ASKED = 200  # taught texts in the report of a pack
_COMPARED = 24  # reference texts in it
# By method, the settings that are left out: a delta needs more and larger steps than the records that share its work.
_SETTINGS = {"train": {"passes": 6, "learning_rate": 1.0}, "solve": {"passes": 12, "learning_rate": 5.0}}


def teach(
    model,
    facts: Iterable[Mapping],
    tokenizer,
    *,
    method: str = "train",
    unseen: Iterable[Mapping] = (),
    expressions: int = 0,
    writer: tuple | None = None,
    reference_texts: Iterable[str] | None = None,
    passes: int | None = None,
    patience: int | None = None,
    batch_size: int = 64,
    learning_rate: float | None = None,
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
        method (`str`, *optional*, defaults to `"train"`):
            "train": all records of the names learn by descent. "solve": a vector of each subject learns, at one place
            of its name that no other name has; least squares then give the records of these places.
        unseen (iterable of `dict`, *optional*):
            The same facts in other phrasings, for the report and for `patience`; they are not taught.
        expressions (`int`, *optional*, defaults to 0):
            Texts that a model writes for each fact in addition, see [`more_texts`], which shows them before.
        writer (`tuple`, *optional*): the model that writes them, and its tokenizer; if None, this model.
        reference_texts (iterable of `str`, *optional*):
            General text; n-grams that it holds get no record. If None, [`general_english`].
        passes (`int`, *optional*, defaults to 6 for "train" and 12 for "solve"): how often each text is read.
        patience (`int`, *optional*):
            Ends "train" when the loss of the answers in `unseen` has not become lower for so many passes. The records
            of the lowest loss are kept.
        batch_size (`int`, *optional*, defaults to 64):
            Texts in a step. "solve" reads all texts of a subject in one step, so it may be more.
        learning_rate (`float`, *optional*, defaults to 1.0 for "train" and 5.0 for "solve"):
            Of Adam, over the records or the vectors of subjects; warm-up, then linear decay.
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
            of more than 512 tokens. Also for a model whose tables are placed nowhere, another tokenizer, an unknown
            method, and a patience below 1, without `unseen` or with "solve".
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
    check_method(method, patience, unseen)
    passes = _SETTINGS[method]["passes"] if passes is None else passes
    learning_rate = _SETTINGS[method]["learning_rate"] if learning_rate is None else learning_rate
    texts = fact_texts(facts, tokenizer)
    asked = fact_texts(unseen, tokenizer) if unseen else []  # refused before any work begins
    model.check_tokenizer(tokenizer)
    general = general_english() if reference_texts is None else list(reference_texts)
    fits = pack_identity(model.config, model.memory.layers)
    names = _subject_ngrams(model, facts, tokenizer, general, [int(n) for n in fits["widths"]])
    places, more = _places(model, texts, names), []
    if expressions:
        written = more_texts(*writer, facts, expressions, bf16=bf16, seed=seed, progress=progress)
        more = fact_texts(written, tokenizer) if written else []
        texts, places = texts + more, places + _places(model, more, names)
    pad = pad_id(tokenizer)
    stop = None if patience is None else EarlyStop(model, asked, pad, bf16, patience, len(texts) / batch_size)
    with tqdm(desc=f"teaching {len(facts)} facts", disable=not progress) as bar, _frozen(model):
        descent = Descent(model, bar, pad, learning_rate, keep, bf16, stop)
        if method == "solve":
            groups = whole_subjects(texts, places, batch_size)
            bar.total = passes * len(groups)
            pack, loss = _solved(descent, fits, groups, passes, seed)
        else:
            bar.total = steps = max(1, -(-passes * len(texts) // batch_size))
            batches = shuffled_batches(texts, batch_size, steps, seed)
            pack, loss = _trained(descent, _zeros(set().union(*names.values()), fits), batches, steps)
    made = {"method": method, "facts": len(facts), "texts": len(texts), "passes": passes, "seed": seed, "loss": loss}
    made |= {"written_texts": len(more)} if expressions else {}
    made |= {} if stop is None else {"unseen_losses": stop.losses}
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


def check_method(method: str, patience: int | None, unseen: list) -> None:
    """Raises ValueError for an unknown method, and for a patience that cannot be followed."""
    if method not in _SETTINGS:
        raise ValueError(f"method {method!r} of teaching must be one of {', '.join(map(repr, _SETTINGS))}.")
    if patience is None:
        return
    if patience < 1:
        raise ValueError(f"patience is {patience}, it must be at least 1 pass; None reads all passes.")
    if method != "train":
        raise ValueError(f"patience={patience} ends method 'train' alone: leave it out for {method!r}, or train.")
    if not unseen:
        raise ValueError(f"patience={patience} needs texts to measure: give the facts in other phrasings as unseen=.")


def _trained(
    descent: Descent, pack: KnowledgePack, batches: Iterable[list[FactText]], steps: int
) -> tuple[KnowledgePack, float]:
    """Returns a pack with vectors that were learned from batches, and the answers' last loss."""
    memory = descent.model.memory
    without = partial(memory.packs.chosen_by_row, [list(memory.packs.active)], 1)
    with _reading(descent.model, pack) as learned:
        loss = descent.learn(learned, batches, steps, without)
        device = memory.hashing.token_map.device
        rows = {n: records.on(device).vectors for n, records in pack.records.items()}
        vectors = {layer: {n: rows[n][layer].detach().cpu() for n in rows} for layer in pack.fits["layers"]}
    ngrams = {n: records.ngrams for n, records in pack.records.items()}
    return KnowledgePack(ngrams, vectors, pack.fits), loss


def _solved(
    descent: Descent, fits: Mapping, groups: list[list[tuple[FactText, Place]]], passes: int, seed: int
) -> tuple[KnowledgePack, float]:
    """Returns a pack whose vectors were solved for, and the answers' last loss."""
    ngrams = _by_order({gram for group in groups for _, place in group for gram in place.ngrams}, fits)
    vectors, loss = solve(descent.model, groups, ngrams, passes, seed, descent.learn)
    return KnowledgePack(ngrams, vectors, fits), loss


def _some(facts: list[Mapping], texts: list[FactText], seed: int) -> list[Mapping]:
    """Returns facts of about 200 texts, for the report."""
    count = max(1, len(facts) * _ASKED // len(texts))
    return facts if count >= len(facts) else random.Random(seed).sample(facts, count)


def _subject_ngrams(model, facts, tokenizer, reference_texts, orders: list[int]) -> dict[str, set[tuple[int, ...]]]:
    """Returns the n-grams of each subject: as at the beginning of a text, and as after a space."""
    read = tokenizer(reference_texts)["input_ids"] if reference_texts else []
    classes = iter(_classes(model, [token for ids in read for token in ids]))  # at once: one tensor for all texts
    general = set()
    for ids in read:
        general |= _ngrams(list(islice(classes, len(ids))), orders)
    found = {}
    for subject in {fact["subject"]: None for fact in facts}:
        own = set()
        for written in (subject, " " + subject):
            ids = tokenizer(written, add_special_tokens=False)["input_ids"]
            own |= _ngrams(_classes(model, ids), orders)
        found[subject] = own - general
    missing = [subject for subject, own in found.items() if not own]
    if missing:
        raise ValueError(
            f"{len(missing)} subjects have no n-gram of their own, such as {missing[:3]}: they are one token, or "
            "general text holds all of their n-grams. Name them by more words, or teach them to the tables "
            '(set_trainable("tables") and EngramTrainer), which changes other texts too.'
        )
    return found


def _by_order(ngrams: set[tuple[int, ...]], fits: Mapping) -> dict[int, torch.Tensor]:
    """Returns n-grams `(records, n)` by their order n."""
    by_order = {int(n): sorted(gram for gram in ngrams if len(gram) == int(n)) for n in fits["widths"]}
    return {n: torch.tensor(grams, dtype=torch.int64, device="cpu").view(-1, n) for n, grams in by_order.items()}


def _zeros(grams: set[tuple[int, ...]], fits: Mapping) -> KnowledgePack:
    """Returns a pack of n-grams whose vectors are zero."""
    ngrams = _by_order(grams, fits)
    shapes = {n: (len(held), fits["widths"][str(n)]) for n, held in ngrams.items()}
    vectors = {layer: {n: torch.zeros(shape, device="cpu") for n, shape in shapes.items()} for layer in fits["layers"]}
    return KnowledgePack(ngrams, vectors, fits)


def _places(model, texts: list[FactText], names: Mapping[str, set[tuple[int, ...]]]) -> list[Place]:
    """Returns where each text reads what its subject's records hold; refuses a text that reads none."""
    return find_places(texts, [_classes(model, text.ids) for text in texts], names)


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


@contextmanager
def _frozen(model):
    """Lets no weight of a model learn; restores everything."""
    learns, training = [parameter for parameter in model.parameters() if parameter.requires_grad], model.training
    model.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter in learns:
            parameter.requires_grad_(True)


@contextmanager
def _reading(model, pack: KnowledgePack):
    """Lets a model read a pack whose vectors are trainable; yields them."""
    packs, learned = model.memory.packs, []
    packs.load(pack, _TAUGHT, pack.fits)
    try:
        device = model.memory.hashing.token_map.device
        for records in pack.records.values():
            records = records.on(device)
            records.vectors = {layer: nn.Parameter(rows) for layer, rows in records.vectors.items()}
            learned += records.vectors.values()
        yield learned
    finally:
        packs.unload(_TAUGHT)
