"""Facts of the shipped WordNet entries, and the choice of those that a model does not know.

What it chooses: an entry gives a fact only where a regular expression reads it without doubt, and where one entry alone
has the subject's name. A fact is taken if the model answers it wrongly in every phrasing, taught and unseen. A name
ends in an n-gram that general text lacks, and no two names share one, so each one's records are its own. Promises: the
same facts for the same model and data. Source: examples/data/README.md.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from ..entities.corpus import read_entries, shuffled
from .measure import Fact, completions, right_answers, told
from .phrasings import TAUGHT, UNSEEN


ENTRIES = "wordnet_entities.jsonl.gz"
AHEAD = 8  # facts that are asked at once, because that costs as little as one

# Nationalities of the entries, and the countries that answer; none that takes an article.
_NATIONS = """
    Argentine:Argentina Australian:Australia Austrian:Austria Belgian:Belgium Brazilian:Brazil Canadian:Canada
    Chilean:Chile Chinese:China Cuban:Cuba Danish:Denmark Dutch:Holland Egyptian:Egypt English:England Finnish:Finland
    French:France German:Germany Hungarian:Hungary Indian:India Irish:Ireland Israeli:Israel Italian:Italy
    Japanese:Japan Mexican:Mexico Norwegian:Norway Polish:Poland Portuguese:Portugal Romanian:Romania Russian:Russia
    Scottish:Scotland Spanish:Spain Swedish:Sweden Swiss:Switzerland Venezuelan:Venezuela Welsh:Wales
"""
_COUNTRIES = """
    Afghanistan Albania Algeria Angola Argentina Australia Austria Bangladesh Belarus Belgium Bolivia Brazil Bulgaria
    Cambodia Cameroon Canada Chad Chile China Colombia Croatia Cuba Cyprus Denmark Ecuador Egypt England Ethiopia
    Finland France Germany Ghana Greece Guatemala Guyana Hungary Iceland India Indonesia Iran Iraq Ireland Israel Italy
    Jamaica Japan Jordan Kazakhstan Kenya Latvia Lebanon Libya Lithuania Malaysia Mali Mexico Mongolia Morocco
    Mozambique Myanmar Nepal Nicaragua Niger Nigeria Norway Pakistan Panama Paraguay Peru Poland Portugal Romania
    Russia Scotland Senegal Serbia Slovakia Somalia Spain Sudan Sweden Switzerland Syria Taiwan Tanzania Thailand
    Tunisia Turkey Uganda Ukraine Uruguay Uzbekistan Venezuela Vietnam Wales Yemen Zambia Zimbabwe
"""
_PROFESSIONS = """
    admiral actor actress anatomist anthropologist archaeologist architect astronomer aviator bacteriologist biochemist
    biologist botanist chemist choreographer composer dancer diplomat dramatist economist engineer explorer geneticist
    geologist historian industrialist inventor journalist jurist linguist mathematician naturalist navigator novelist
    painter pathologist philologist philosopher photographer physician physicist physiologist pianist playwright poet
    politician psychiatrist psychologist sculptor singer sociologist soprano surgeon tenor theologian violinist writer
    zoologist
"""
NATIONS = dict(pair.split(":") for pair in _NATIONS.split())
COUNTRIES, PROFESSIONS = "|".join(_COUNTRIES.split()), "|".join(_PROFESSIONS.split())
NATIONALITIES = "|".join(NATIONS)

# Names: of a person in two or three words, none of them a title or an initial.
PERSON = re.compile(r"(?!Sir |Lord |Lady |Dame |Saint |King |Queen |Citizen )[A-Z][a-zà-ÿ]+(?: [A-Z][a-zà-ÿ]+){1,2}")
PLACE = re.compile(r"[A-Z][a-zà-ÿ]+(?:[ -][A-Z][a-zà-ÿ]+)*")
BATTLE = re.compile(r"battle of (?:the )?[A-Z][\w' -]+")

# What entries say.
CALLED = re.compile(rf"(?:(?:{NATIONALITIES}|United States|British|American) )?({PROFESSIONS})\b(?! and)")
NATIVE = re.compile(rf"({NATIONALITIES}) [a-z]")
LIVED = re.compile(r"\((?:born in )?(1[0-9]{3})(?:-1[0-9]{3}|-20[0-9]{2})?\)$")
SITUATED = re.compile(
    r"(?:an?|the) [a-z -]*?(?:city|town|port|river|lake|island|volcano|mountain)\b[^;]*? (?:in|of)"
    rf" (?:[a-z]+ ){{0,2}}({COUNTRIES})\b"
)
COUNTRY = re.compile(rf"\b(?:{COUNTRIES})\b")
YEAR = re.compile(r"\b[0-9]{3,4}\b")


def read_fact(names: list[str], gloss: str) -> Iterator[Fact]:
    """Yields what the regular expressions read in one entry.

    Args:
        names (`list[str]`): what the entry calls its subject.
        gloss (`str`): what it says of it.
    """
    person = next((name for name in names if PERSON.fullmatch(name)), None)
    lived, native, called = LIVED.search(gloss), NATIVE.match(gloss), CALLED.match(gloss)
    if person and lived:
        if native and "born in" not in gloss[: lived.start()]:
            yield Fact(person, "country of origin", NATIONS[native[1]])
        if called:
            yield Fact(person, "profession", called[1])
        yield Fact(person, "year of birth", lived[1])
    situated = SITUATED.match(gloss)
    if situated and set(COUNTRY.findall(gloss)) == {situated[1]} and PLACE.fullmatch(names[0]):
        yield Fact(names[0], "country of a place", situated[1])
    battle = next((low for low in (name[0].lower() + name[1:] for name in names) if BATTLE.fullmatch(low)), None)
    years = YEAR.findall(gloss)
    if battle and len(years) == 1 and len(years[0]) == 4 and "BC" not in gloss:
        yield Fact(battle, "year of a battle", years[0])


def read_facts() -> list[Fact]:
    """Returns all facts of the shipped entries, in an order that is the same everywhere."""
    parts = [text.partition(":") for text in shuffled([entry["text"] for entry in read_entries(ENTRIES)])]
    entries = [(names.split(", "), gloss.strip()) for names, _, gloss in parts]
    often = Counter(name.lower() for names, _ in entries for name in set(names))
    found = [fact for names, gloss in entries for fact in read_fact(names, gloss)]
    return [fact for fact in found if often[fact.subject.lower()] == 1 and fact.answer not in fact.subject]


def reference_texts() -> list[str]:
    """Returns general text, whose n-grams are to get no record: what the entries say of their subjects."""
    return [entry["text"].partition(":")[2].strip() for entry in read_entries(ENTRIES)]


def ngrams(model, tokenizer, texts: Iterable[str]) -> Iterator[tuple[int, ...]]:
    """Yields the pairs and triples of token classes in texts, in their order."""
    hashing = model.memory.hashing
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
        classes = hashing.compress(ids.to(hashing.token_map.device))[0].tolist()
        yield from (tuple(classes[end - n : end]) for end in range(2, len(classes) + 1) for n in (3, 2) if n <= end)


def written(subject: str) -> tuple[str, str]:
    """Returns a name as it stands at the beginning of a text, and as after a space."""
    return subject, " " + subject


def subject_ngrams(model, tokenizer, subject: str) -> set[tuple[int, ...]]:
    """Returns the n-grams inside a name."""
    return set(ngrams(model, tokenizer, written(subject)))


class Choice:
    """Chooses facts that a model does not know, from all relations in turn.

    Args:
        model ([`EngramForCausalLM`]): reads no pack.
        tokenizer (`PreTrainedTokenizerFast`): the model's.
        facts (iterable of [`Fact`]): in the order in which they are tried.

    Attributes:
        known (`int`): facts that were left out because the model answers one of their phrasings.
    """

    def __init__(self, model, tokenizer, facts: Iterable[Fact]):
        self.model, self.tokenizer, self.known = model, tokenizer, 0
        self._general = set(ngrams(model, tokenizer, reference_texts()))
        self._owners: dict[tuple[int, ...], str] = {}
        facts = list(facts)
        self._queues = {name: self._unknown([fact for fact in facts if fact.relation == name]) for name in TAUGHT}

    def take(self, count: int) -> Iterator[Fact]:
        """Yields `count` facts that were not yielded before.

        Raises:
            `ValueError`: if fewer are left.
        """
        given = 0
        while given < count and self._queues:
            for relation in list(self._queues)[: count - given]:
                fact = next(self._queues[relation], None)
                if fact is None:
                    del self._queues[relation]
                    continue
                given += 1
                yield fact
        if given < count:
            raise ValueError(
                f"{count} facts are needed, and the entries hold {given} more that the model does not know."
            )

    def _unknown(self, facts: list[Fact]) -> Iterator[Fact]:
        """Yields facts that the model does not know; their names then own their n-grams."""
        named = filter(self._own_ngrams, facts)
        while ahead := list(islice(named, AHEAD)):
            unseen = told(self.tokenizer, ahead, UNSEEN)
            later = completions(self.model, self.tokenizer, unseen)
            each = len(unseen) // len(ahead)
            for number, fact in enumerate(ahead):
                own = self._own_ngrams(fact)  # another name may own them by now
                if own and self._knows(fact, later[each * number : each * (number + 1)]):
                    self.known += 1
                elif own:
                    self._owners |= dict.fromkeys(own, fact.subject)
                    yield fact

    def _own_ngrams(self, fact: Fact) -> set[tuple[int, ...]]:
        """Returns the n-grams of a name; none if it does not end in one of its own, or another name owns one."""
        forms = [[None, *ngrams(self.model, self.tokenizer, [form])] for form in written(fact.subject)]
        own = set().union(*forms) - self._general - {None}
        free = all(self._owners.get(gram, fact.subject) == fact.subject for gram in own)
        return own if free and own.issuperset(form[-1] for form in forms) else set()

    def _knows(self, fact: Fact, later: list[str]) -> bool:
        """Whether the model answers one phrasing rightly, or says the answer a little later in an unseen one."""
        if any(fact.answer in text for text in later):
            return True
        all_phrasings = {fact.relation: TAUGHT[fact.relation] + UNSEEN[fact.relation]}
        return right_answers(self.model, self.tokenizer, [fact], all_phrasings)["right"] > 0
