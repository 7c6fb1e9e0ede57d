"""Texts that a model writes for facts: which lines are kept, how often it is asked, and what stays as it was.

The writer is a script that says given lines, so every line has a reason.
Run: pytest tests/unit/test_fact_expressions.py
"""

import itertools
import logging

import pytest
import torch

from engram_transformers.training import fact_expressions, more_texts
from engram_transformers.training.fact_texts import fact_texts


ADA = {"subject": "Ada Lee", "relation": "home", "texts": ["Ada Lee was born in [[Oslo]].", "Ada Lee: [[Oslo]]."]}
DAX = {"subject": "Dax Bolun", "relation": "home", "texts": ["Dax Bolun was born in [[Lima]]."]}
JOB = {"subject": "Dax Bolun", "relation": "job", "texts": ["Dax Bolun is a [[baker]]."]}


class Writer:
    """A model that continues each prompt with the next of its lines for this fact, by the name in the prompt."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, lines, after="\nThe next line"):
        self.tokenizer, self.after, self.training, self.prompts = tokenizer, after, True, []
        self.lines = {key: itertools.chain(own, itertools.repeat("")) for key, own in lines.items()}

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, attention_mask, do_sample, max_new_tokens, **_):
        assert do_sample and not self.training and max_new_tokens <= 64
        read = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        prompts = self.tokenizer.batch_decode(read)
        self.prompts += prompts
        torch.rand(1)  # as sampling does
        said = [next(self.lines[next(key for key in self.lines if key in prompt)]) for prompt in prompts]
        new = self.tokenizer([f" {line}{self.after}" for line in said], padding=True, return_tensors="pt").input_ids
        return torch.cat([input_ids, new], dim=1)


def written(tokenizer, facts, lines, count=1, **kwargs):
    writer = Writer(tokenizer, lines)
    found = more_texts(writer, tokenizer, facts, count, progress=False, **kwargs)
    assert writer.training, "it is as it was"
    return found, writer


def test_a_good_line_is_marked_and_keeps_the_fact_s_other_fields(tiny_tokenizer):
    found, writer = written(tiny_tokenizer, [ADA], {"Ada Lee": ["They say that Ada Lee lives in Oslo, by the sea."]})
    assert found == [{**ADA, "texts": ["They say that Ada Lee lives in [[Oslo]], by the sea."]}]
    assert fact_texts([ADA, *found], tiny_tokenizer)
    (prompt,) = writer.prompts
    assert "- Ada Lee was born in Oslo.\n" in prompt and prompt.endswith("\n-") and "[[" not in prompt


BAD = {
    "another answer": "Ada Lee lives in Lima.",
    "no answer": "Ada Lee lives in Bergen.",
    "no subject": "She lives in Oslo.",
    "subject twice": "Ada Lee, called Ada Lee, lives in Oslo.",
    "subject behind the answer": "In Oslo lives Ada Lee.",
    "answer twice": "Ada Lee lives in Oslo, yes, Oslo.",
    "answer inside a word": "Ada Lee lives in Oslofjord.",
    "subject inside a word": "Here Ada Leeds lives in Oslo.",
    "subject that begins inside a word": "Here lives XAda Lee, in Oslo.",
    "subject that no space is before": "He said (Ada Lee lives in Oslo).",
    "another fact's answer too": "Ada Lee moved from Lima to Oslo.",
    "another fact's subject": "Dax Bolun met Ada Lee in Oslo.",
    "a copy": "Ada Lee was born in Oslo.",
    "a copy with another end": "Ada Lee was born in Oslo, they say.",
    "marks": "Ada Lee [[lives]] in Oslo.",
    "too long": "Ada Lee " + "really " * 80 + "lives in Oslo.",
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_line_that_teaches_something_else_is_left_out(tiny_tokenizer, line):
    found, writer = written(tiny_tokenizer, [ADA, DAX], {"Ada Lee": [line], "Dax": []})
    assert found == [] and len(writer.prompts) == 2 * fact_expressions._TRIES


def test_answers_of_another_relation_and_inside_the_own_one_are_no_reason(tiny_tokenizer):
    inside = {**DAX, "texts": ["Dax Bolun was born in [[Os]]."]}
    good = "The baker Ada Lee lives in Oslo."
    lee = {**JOB, "subject": "Lee", "texts": ["Lee is a [[pilot]]."]}
    found, _ = written(tiny_tokenizer, [ADA, inside, JOB, lee], {"Ada Lee": [good], "Dax": [], "Lee": []})
    assert [fact["texts"] for fact in found] == [["The baker Ada Lee lives in [[Oslo]]."]]


def test_a_line_that_does_not_end_is_left_out(tiny_tokenizer):
    writer = Writer(tiny_tokenizer, {"Ada Lee": ["Ada Lee lives in Oslo and the"]}, after="")
    assert more_texts(writer, tiny_tokenizer, [ADA], 1, progress=False) == []


def test_facts_are_asked_until_they_have_enough_and_those_with_fewer_are_named(tiny_tokenizer, caplog):
    lines = {
        "Ada Lee": ["Ada Lee lives in Oslo.", "Ada Lee lives in Oslo!", "no", "Ada Lee likes Oslo.", "Ada Lee, Oslo."],
        "Dax": ["Dax Bolun likes Lima."],
    }
    logger = logging.getLogger("engram_transformers.training.fact_expressions")
    logger.addHandler(caplog.handler)
    try:
        found, writer = written(tiny_tokenizer, [ADA, DAX], lines, count=2, batch_size=3)
    finally:
        logger.removeHandler(caplog.handler)
    assert [len(fact["texts"]) for fact in found] == [2, 1]
    assert all(prompt.startswith(fact_expressions._ASKED) for prompt in writer.prompts), "pads are masked"
    assert sum("Ada Lee" in prompt for prompt in writer.prompts) == 4, "two, one more, and one more"
    assert "1 of 2 facts got fewer than 2 written texts, such as those of ['Dax Bolun']" in caplog.text


def test_the_state_of_random_numbers_and_a_seed_are_kept(tiny_tokenizer):
    before = torch.get_rng_state()
    written(tiny_tokenizer, [ADA], {"Ada Lee": []})
    assert torch.equal(torch.get_rng_state(), before)
    prompts = [written(tiny_tokenizer, [ADA], {"Ada Lee": []}, count=5, seed=seed)[1].prompts for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]


@pytest.mark.parametrize(
    ("count", "settings", "says"),
    [
        (0, {}, "count=0 must be a whole number"),
        (1.5, {}, "count=1.5 must be"),
        (1, {"temperature": 0}, "temperature=0 must be larger"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_asked(tiny_tokenizer, count, settings, says):
    with pytest.raises(ValueError, match=says):
        more_texts(None, tiny_tokenizer, [ADA], count, **settings)
    with pytest.raises(ValueError, match="does not name 'Ada Lee'"):
        more_texts(None, tiny_tokenizer, [{**ADA, "texts": ["She was born in [[Oslo]]."]}], 1)
