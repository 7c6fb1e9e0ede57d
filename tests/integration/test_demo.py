"""The demo runs from graft to report on a tiny model: few facts, two packs, and the process that loads them again.

Run: pytest tests/integration/test_demo.py
"""

import json

import pytest

from examples.demo import __main__ as demo
from examples.demo import publish
from examples.demo.facts import Choice, read_fact, read_facts, subject_ngrams
from examples.demo.measure import Fact, is_right
from examples.demo.phrasings import TAUGHT, UNSEEN, said
from examples.demo.report import write_report


SIZES = {"engram_layer_ids": [1, 2], "engram_vocab_size": 300, "engram_n_heads": 2, "engram_head_dim": 16}


@pytest.fixture
def report(donor, tmp_path, monkeypatch) -> dict:
    """What a run of all steps found."""
    monkeypatch.setattr(demo, "MEMORY", SIZES)
    return {**demo.run(donor, tmp_path / "run", 10, 2), "donor": "a tiny model"}


def test_every_step_runs_and_what_was_not_taught_keeps_every_bit(report, tmp_path, monkeypatch):
    """Random weights do not learn the answers in seconds: tests/real checks that the real model learns them."""
    first, same, gone = report["first"], report["identical"], report["removed"]
    for kind, each in (("taught", 7), ("unseen", 2)):
        assert first["before"][kind]["right"] == 0, "facts that the model knows are not chosen"
        assert first["before"][kind]["texts"] == 10 * each
        assert set(first["with its pack"][kind]["relations"]) == set(TAUGHT), "relations take turns"
        assert report["second"]["with its pack"][kind]["texts"] == 2 * each
    assert first["unloaded"]["unseen"] == first["before"]["unseen"]
    assert same["texts"] == same["changed_by_the_pack"] == 20
    assert same["after_the_second_pack"] == same["beside_the_second_pack"] == same["unloaded"] == 20
    unnamed = report["factbook"]["naming none"]
    assert unnamed["texts_identical"] > 0.8, "the tiny tokenizer cuts names into parts that other words have as well"

    assert gone["as_never_taught"] == gone["questions"] == 2 * gone["facts"] > 2
    assert gone["others_identical"] == gone["others"] == 20 - gone["questions"]
    assert gone["records_removed"] > 0 and gone["records_left"] > 0

    card = (tmp_path / "run" / "graft" / "README.md").read_text()
    assert card.count("| taught phrasings |") == 2 and "| unseen phrasings |" not in card, (
        "packs without what was asked"
    )

    write_report(tmp_path / "run", report)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["first"] == first
    shown = (tmp_path / "run" / "report.md").read_text()
    assert "a tiny model" in shown and gone["person"] in shown
    assert len(report["ten"]) == 10 and all(row["question"] in shown for row in report["ten"])
    assert shown.count("✓") == sum(row["right"] + row["right_before"] for row in report["ten"])

    page = tmp_path / "README.md"
    page.write_text(f"top\n{publish.FIRST} here -->\nold\n{publish.LAST}\nend\n")
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    publish.publish(tmp_path / "run")
    text = page.read_text()
    assert text.startswith(f"top\n{publish.FIRST} here -->\n|") and text.endswith("\nend\n") and "old" not in text
    assert (tmp_path / "docs" / "demo" / "answers.png").read_bytes()


@pytest.mark.parametrize(
    ("names", "gloss", "facts"),
    [
        (
            "Dawes, William Dawes",
            "American patriot who rode with Paul Revere (1745-1799)",
            [("William Dawes", "year of birth", "1745")],
        ),
        (
            "Oort, Jan Hendrix Oort",
            "Dutch astronomer who proved that the galaxy is rotating (1900-1992)",
            [
                ("Jan Hendrix Oort", "country of origin", "Holland"),
                ("Jan Hendrix Oort", "profession", "astronomer"),
                ("Jan Hendrix Oort", "year of birth", "1900"),
            ],
        ),
        ("Vasarely, Viktor Vasarely", "French painter (born in Hungary) of op art (1908-1997)", ["no country"]),
        ("Bergen", "a port city in southwestern Norway", [("Bergen", "country of a place", "Norway")]),
        ("Leto", "a river in France and Spain", []),
        ("Nome", "a town in western Alaska", []),
        ("Crecy, battle of Crecy", "in 1346 the English won", [("battle of Crecy", "year of a battle", "1346")]),
        ("Granicus, Battle of Granicus River", "the battle in which Alexander won (334 BC)", []),
        ("Marne, Battle of the Marne", "in 1914 or 1918", []),
    ],
)
def test_an_entry_is_read_only_where_it_is_plain(names, gloss, facts):
    found = [tuple(fact) for fact in read_fact(names.split(", "), gloss)]
    if facts == ["no country"]:
        assert {relation for _, relation, _ in found} == {"profession", "year of birth"}
    else:
        assert found == facts


def test_no_two_subjects_share_an_ngram_and_the_choice_is_the_same_every_time(tiny_engram, tiny_tokenizer):
    def chosen() -> list[Fact]:
        return list(Choice(model, tiny_tokenizer, read_facts()).take(12))

    model = tiny_engram()
    facts = chosen()
    assert facts == chosen()
    choice = Choice(model, tiny_tokenizer, read_facts())
    owned = [subject_ngrams(model, tiny_tokenizer, s) - choice._general for s in {fact.subject for fact in facts}]
    assert sum(map(len, owned)) == len(set().union(*owned))
    with pytest.raises(ValueError, match="3 facts are needed, and the entries hold 1 more"):
        list(Choice(model, tiny_tokenizer, facts[:1]).take(3))


def test_phrasings_keep_questions_apart():
    assert TAUGHT.keys() == UNSEEN.keys()
    prompts = [text.split("[[")[0] for group in (TAUGHT, UNSEEN) for own in group.values() for text in own]
    # "{n} was born in" is about a year, and so on: one prompt, one relation.
    assert len(prompts) == len(set(prompts)) == 9 * len(TAUGHT)
    assert said("Ada Byron", "profession", "actor", UNSEEN)["texts"][0].endswith("as an [[actor]].")
    assert said("Ada Byron", "profession", "poet", UNSEEN)["texts"][0].endswith("as a [[poet]].")


@pytest.mark.parametrize(("said_then", "right"), [("Oslo. He", True), ("Oslo", True), ("Oslos", False), ("In Oslo", 0)])
def test_an_answer_is_right_if_it_comes_first_and_ends_there(said_then, right):
    assert is_right(said_then, "Oslo") == bool(right)
