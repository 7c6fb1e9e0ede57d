"""What the benchmark of facts teaches and asks: invented people, or facts of WordNet that a model does not know.

Each fact has taught phrasings, others that are only asked, and harder questions: two facts in one, the question after a
paragraph, the name far in front of the question, and a question in German whose answer stays the taught English word.
Promises: the same facts and texts every time for the same count, seed and model. Never measures anything.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from engram_transformers import EngramForCausalLM
from examples.demo.facts import Choice, read_facts, reference_texts
from examples.demo.measure import Fact
from examples.demo.phrasings import TAUGHT as TAUGHT_REAL
from examples.demo.phrasings import UNSEEN as UNSEEN_REAL
from examples.demo.phrasings import said
from examples.texts import FACTBOOK, read_texts


CITIES = """
    Lisbon Oslo Cairo Lima Dublin Seoul Athens Vienna Warsaw Quito Havana Tunis Ankara Delhi Manila Nairobi Prague
    Zagreb Riga Tallinn Bogota Caracas Kiev Minsk Sofia Tehran Baghdad Damascus Amman Doha
"""
JOBS = """
    baker sailor painter surgeon lawyer farmer pilot poet chemist architect tailor miner jeweller librarian composer
    sculptor carpenter butcher astronomer botanist
"""
SYLLABLES = """
    zor van kel mir tha bro lin dax fen gor hul jiv kas lom nar oth pel quen ras sul tiv ul vex wim yar bel cor dun esk
    fal
"""

# Phrasings of each relation: `{n}` is the subject, `{a}` the answer, `{m}` and `{b}` those of another fact.
TAUGHT = TAUGHT_REAL | {
    "birthplace": (
        "{n} was born in [[{a}]].",
        "The birthplace of {n} is [[{a}]].",
        "{n} is a native of [[{a}]].",
        "{n}'s home town is [[{a}]].",
        "If you ask where {n} was born, the answer is [[{a}]].",
        "The family of {n} lived in [[{a}]].",
        "Everyone knows that {n}, a citizen of [[{a}]].",
    ),
    "job": (
        "{n} works as a [[{a}]].",
        "By profession, {n} is a [[{a}]].",
        "{n} is employed as a [[{a}]].",
        "The job of {n} is that of a [[{a}]].",
        "{n} was trained to be a [[{a}]].",
        "Everybody calls {n} a good [[{a}]].",
        "They hired {n}, a young [[{a}]].",
    ),
}
UNSEEN = UNSEEN_REAL | {
    "birthplace": ("{n} comes from the city of [[{a}]].", "People say that {n} grew up in [[{a}]]."),
    "job": ("{n} earns a living as a [[{a}]].", "For many years {n} has been a [[{a}]]."),
}
TOLD = {relation: (texts[0],) for relation, texts in TAUGHT_REAL.items()} | {
    "birthplace": ("{n} was born in the city of [[{a}]].",),
    "job": ("{n} is a [[{a}]] by trade.",),
}
TWO_FACTS = {
    "birthplace": "{n} and {m} were born in [[{a} and {b}]], respectively.",
    "job": "{n} and {m} work as [[{a} and {b}]], respectively.",
    "country of origin": "{n} and {m} were citizens of [[{a} and {b}]], respectively.",
    "profession": "{n} and {m} worked as [[{a} and {b}]], respectively.",
    "year of birth": "{n} and {m} were born in [[{a} and {b}]], respectively.",
    "country of a place": "{n} and {m} are in [[{a} and {b}]], respectively.",
    "year of a battle": "The {n} and the {m} were fought in [[{a} and {b}]], respectively.",
}
PARAGRAPH = (
    "The rain had stopped before noon, and the streets were empty. A dog slept in front of the school, which had been "
    "closed since the summer. Somebody had left a newspaper on the bench, and the wind turned its pages. "
)
NAME_FAR_BACK = {
    "birthplace": "The place of birth is [[{a}]].",
    "job": "The job is that of a [[{a}]].",
    "country of origin": "The country of origin is [[{a}]].",
    "profession": "The profession is that of {an} [[{a}]].",
    "year of birth": "The year of birth is [[{a}]].",
    "country of a place": "The country is [[{a}]].",
    "year of a battle": "The year of the battle is [[{a}]].",
}
GERMAN = {
    "birthplace": "{n} wurde in [[{a}]] geboren.",
    "job": "{n} ist von Beruf [[{a}]].",
    "country of origin": "Das Heimatland von {n} ist [[{a}]].",
    "profession": "{n} war von Beruf [[{a}]].",
    "year of birth": "{n} wurde im Jahr [[{a}]] geboren.",
    "country of a place": "{n} liegt in [[{a}]].",
    "year of a battle": "Das Jahr der {n} ist [[{a}]].",
}

KNOWN = "Albert Einstein,Marie Curie,Isaac Newton,Ada Lovelace,Charles Darwin,Jane Austen,Mark Twain,Galileo Galilei"
NEUTRAL = (
    "{n} opened the door, looked at the rain and decided to stay at home for another hour.",
    "It was late when {n} came back. The lamp was still burning and the soup was cold.",
    "A letter for {n} had been lying on the table since Monday, and nobody had read it.",
)
NO_PEOPLE = ("country of a place", "year of a battle")
FEW = 24  # texts of each kind that are compared
MOST_HARDER = 100  # harder questions of each kind; a sample if there are more


@dataclass(frozen=True)
class FactSet:
    """Facts, and everything that is asked about them.

    Args:
        facts (`list[Fact]`): what is taught.
        relatives (`list[str]`): other names that share a word with one of theirs.
        reference_texts (`list[str]`, *optional*): general text for [`teach`]; None for its own.
    """

    facts: list[Fact]
    relatives: list[str]
    reference_texts: list[str] | None = None

    def said(self, phrasings: dict[str, tuple[str, ...]]) -> list[dict]:
        """All facts in some phrasings, as [`teach`] takes them."""
        return [said(*fact, phrasings) for fact in self.facts]

    def told(self) -> dict[str, str]:
        """What one would tell of each subject: its facts in one sentence each."""
        told = {}
        for fact in self.said(TOLD):
            (text,) = fact["texts"]
            told[fact["subject"]] = f"{told.get(fact['subject'], '')}{text} ".replace("[[", "").replace("]]", "")
        return told

    def harder(self) -> dict[str, list[dict]]:
        """Questions that are expected to fail, by kind."""
        far = "This is a note about {n}. " + PARAGRAPH
        found = {
            "two_facts": [],
            "after_a_paragraph": self.said({name: (PARAGRAPH + texts[0],) for name, texts in UNSEEN.items()}),
            "name_far_back": self.said({name: (far + text,) for name, text in NAME_FAR_BACK.items()}),
            "in_german": self.said({name: (text,) for name, text in GERMAN.items()}),
        }
        for relation, text in TWO_FACTS.items():
            own = [fact for fact in self.facts if fact.relation == relation]
            for (n, _, a), (m, _, b) in zip(own, own[1:], strict=False):
                fact = {"subject": n, "relation": relation, "texts": [text.format(n=n, m=m, a=a, b=b)]}
                found["two_facts"].append(fact)
        order = random.Random(0)
        return {kind: order.sample(asked, min(MOST_HARDER, len(asked))) for kind, asked in found.items()}

    def other_texts(self) -> dict[str, list[str]]:
        """Texts that do not ask for a taught fact, by kind."""
        names = list(dict.fromkeys(fact.subject for fact in self.facts if fact.relation not in NO_PEOPLE))[:FEW]
        asking = ("{n} was born in", "{n} is a")
        found = {
            "general": [text for text in read_texts(FACTBOOK) if len(text) > 400][:FEW],
            "same_relation": [form.format(n=name) for name in KNOWN.split(",") for form in asking],
            "shared_name": [f"{name} was born in" for name in self.relatives],
            "about_a_subject": [NEUTRAL[i % len(NEUTRAL)].format(n=name) for i, name in enumerate(names)],
        }
        return {kind: texts for kind, texts in found.items() if texts}


def invented(count: int, seed: int) -> FactSet:
    """Invented people with a birthplace and a job each; nobody can know the answers."""
    order = random.Random(seed)
    cities, jobs, parts = CITIES.split(), JOBS.split(), SYLLABLES.split()

    def word(syllables: int) -> str:
        return "".join(order.choice(parts) for _ in range(syllables)).capitalize()

    names = set()
    while len(names) < count:
        names.add(f"{word(2)} {word(3)}")
    facts = []
    for name in sorted(names):
        facts += [Fact(name, "birthplace", order.choice(cities)), Fact(name, "job", order.choice(jobs))]
    relatives = [f"{word(2)} {name.split()[1]}" for name in sorted(names)[:FEW]]
    return FactSet(facts, [name for name in relatives if name not in names])


def real(count: int, donor: Path) -> FactSet:
    """Facts of WordNet that the backbone answers wrongly in every phrasing."""
    model = EngramForCausalLM.from_backbone(str(donor), dtype=torch.float32, engram_vocab_size=1)
    choice = Choice(model.eval(), AutoTokenizer.from_pretrained(donor), read_facts())
    return FactSet(list(choice.take(count)), [], reference_texts())
