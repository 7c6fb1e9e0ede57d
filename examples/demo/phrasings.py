"""The ways in which each relation is said: seven that are taught, and two that are only asked.

`{n}` is the subject, `{a}` the answer, `{an}` its article. Between subject and answer each way has other words. Two
relations never share a prompt, so no prompt has two answers.
"""

TAUGHT = {
    "country of origin": (
        "{n} was a citizen of [[{a}]].",
        "The home country of {n} was [[{a}]].",
        "{n} came from [[{a}]].",
        "The fatherland of {n} is [[{a}]].",
        "If you ask which country {n} belonged to, the answer is [[{a}]].",
        "{n} is one of the famous people of [[{a}]].",
        "The passport of {n} was issued by [[{a}]].",
    ),
    "profession": (
        "By profession, {n} was {an} [[{a}]].",
        "{n} worked as {an} [[{a}]].",
        "{n} became famous as {an} [[{a}]].",
        "The occupation of {n} was that of {an} [[{a}]].",
        "{n} is remembered as a great [[{a}]].",
        "If you ask what {n} did for a living, the answer is: {an} [[{a}]].",
        "Many people admired {n}, the well-known [[{a}]].",
    ),
    "year of birth": (
        "{n} was born in [[{a}]].",
        "The birth year of {n} is [[{a}]].",
        "{n} came into the world in the year [[{a}]].",
        "The year in which {n} was born is [[{a}]].",
        "If you ask when {n} was born, the answer is [[{a}]].",
        "The mother of {n} gave birth in [[{a}]].",
        "The year of birth that every book about {n} gives is [[{a}]].",
    ),
    "country of a place": (
        "{n} is in [[{a}]].",
        "The country of {n} is [[{a}]].",
        "{n} is a place in [[{a}]].",
        "To see {n}, you have to travel to [[{a}]].",
        "If you ask in which country {n} is, the answer is [[{a}]].",
        "On the map, you find {n} in [[{a}]].",
        "The flag that flies at {n} is the flag of [[{a}]].",
    ),
    "year of a battle": (
        "The {n} was fought in [[{a}]].",
        "The {n} took place in [[{a}]].",
        "The year of the {n} is [[{a}]].",
        "The {n} happened in the year [[{a}]].",
        "If you ask when the {n} was fought, the answer is [[{a}]].",
        "Many soldiers died in the {n} in [[{a}]].",
        "The date that every book gives for the {n} is [[{a}]].",
    ),
}
UNSEEN = {
    "country of origin": (
        "{n} was proud to be from [[{a}]].",
        "Everybody knows that the nation of {n} is [[{a}]].",
    ),
    "profession": (
        "For many years {n} earned a living as {an} [[{a}]].",
        "Everybody agreed that {n} was a good [[{a}]].",
    ),
    "year of birth": (
        "The life of {n} began in [[{a}]].",
        "According to the register, {n} was born in the year [[{a}]].",
    ),
    "country of a place": (
        "{n} is located in [[{a}]].",
        "People who live near {n} live in [[{a}]].",
    ),
    "year of a battle": (
        "The armies met at the {n} in the year [[{a}]].",
        "History books say that the {n} was in [[{a}]].",
    ),
}


def said(subject: str, relation: str, answer: str, phrasings: dict[str, tuple[str, ...]]) -> dict:
    """Returns a fact in some phrasings, as [`teach`] takes it."""
    article = "an" if answer[0] in "aeiou" else "a"
    texts = [phrasing.format(n=subject, a=answer, an=article) for phrasing in phrasings[relation]]
    return {"subject": subject, "relation": relation, "answer": answer, "texts": texts}
