"""Files of facts: every layout gives the same facts, and every mistake is named with its file and line.

Run: pytest tests/unit/test_fact_files.py
"""

import json

import pytest

from engram_transformers.training import read_facts, read_lines


ADA = {"subject": "Ada", "texts": ["Ada was born in [[London]]", "The birthplace of Ada is [[London]]"]}
BORN, PLACE = "Ada was born in", "The birthplace of Ada is"

LAYOUTS = {
    "texts": ADA,
    "own": {"subject": "Ada", "prompt": BORN, "answer": "London", "paraphrases": [PLACE]},
    "one paraphrase": {"subject": "Ada", "prompt": BORN + " ", "answer": " London", "paraphrases": PLACE},
    "CounterFact": {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "relation_id": "P19",
            "target_new": {"str": "London", "id": "Q84"},
            "target_true": {"str": "Paris", "id": "Q90"},
            "subject": "Ada",
        },
        "paraphrase_prompts": [PLACE],
        "neighborhood_prompts": ["Bob was born in"],
    },
    "ZsRE": {
        "subject": "Ada",
        "src": BORN,
        "pred": "Rome",
        "rephrase": PLACE,
        "alt": "Rome",
        "answers": ["London", "L"],
    },
    "EasyEdit": {"subject": "Ada", "prompt": BORN, "target_new": "London", "rephrase_prompt": PLACE, "locality": {}},
}


def write(folder, *lines):
    path = folder / "facts.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def expected_of(layout):
    return {**ADA, "relation": "P19"} if layout == "CounterFact" else ADA


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_fact(layout, tmp_path):
    assert read_facts(write(tmp_path, LAYOUTS[layout])) == [expected_of(layout)]
    if layout != "CounterFact":
        assert read_facts(write(tmp_path, {**LAYOUTS[layout], "relation": "home"})) == [{**ADA, "relation": "home"}]


def test_layouts_may_be_mixed_and_a_file_may_be_one_array(tmp_path):
    expected = [expected_of(layout) for layout in LAYOUTS]
    assert read_facts(write(tmp_path, b"", *LAYOUTS.values(), b" \r", b"")) == expected
    assert (
        read_facts(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(list(LAYOUTS.values()), indent=1).encode())) == expected
    )


def test_a_question_and_texts_that_look_like_patterns_stay_as_they_are(tmp_path):
    question = {
        "subject": "X",
        "src": "What is the {} birthplace of X?",
        "rephrase": "{} {0.__class__} X?",
        "answers": ["Lisbon"],
    }
    assert read_facts(write(tmp_path, question))[0]["texts"] == [
        "What is the {} birthplace of X? [[Lisbon]]",
        "{} {0.__class__} X? [[Lisbon]]",
    ]
    rewrite = {"subject": "{}", "prompt": "{} \u2028 {0}", "target_new": {"str": "\\1"}}
    raw = json.dumps({"requested_rewrite": rewrite}, ensure_ascii=False).encode()
    assert read_facts(write(tmp_path, raw)) == [{"subject": "{}", "texts": ["{} \u2028 {0} [[\\1]]"]}]


WRONG = {
    "line 2: 'subject' is missing": {"texts": ["a"]},
    "line 2: 'subject' is 3 and no text": {"subject": 3, "texts": ["a"]},
    "line 2: 'subject' is '  ' and no text": {"subject": "  ", "texts": ["a"]},
    "line 2: 'texts' is 'a' and no list": {"subject": "A", "texts": "a"},
    r"line 2: 'texts' is \[\] and no list": {"subject": "A", "texts": []},
    "line 2: 'texts' is 7 and no text": {"subject": "A", "texts": ["a", 7]},
    "line 2: 'prompt' is missing": {"subject": "A", "answer": "b"},
    "line 2: 'answer' is missing": {"subject": "A", "prompt": "A is"},
    r"line 2: 'answers' is \[\] and no text": {"subject": "A", "src": "A?", "answers": []},
    "line 2: 'target_new' is missing": {"requested_rewrite": {"subject": "A", "prompt": "{} is", "target_new": {}}},
    r"line 2: 'requested_rewrite' is \[1\]": {"requested_rewrite": [1]},
    r"line 2: 'paraphrases' is \{\} and no list": {"subject": "A", "prompt": "A", "answer": "b", "paraphrases": {}},
    "line 2: 'A .* has marks": {"subject": "A", "prompt": "A [[x]] is", "answer": "b"},
    "line 2: this is 5 and no object": 5,
    "line 2: 'subject' holds half of a surrogate pair": {"subject": "A\ud800", "texts": ["a"]},
    "line 2 is not JSON": b'{"subject": "A", "texts": ["a [[b]]"]',
    "line 2 is not JSON .*recursion": b"{" + b'"a":{' * 100_000,
    "is not text in UTF-8": b'{"subject": "\xff"}',
}


@pytest.mark.parametrize(("message", "line"), WRONG.items())
def test_a_wrong_line_is_named(message, line, tmp_path):
    path = write(tmp_path, ADA, line, ADA)
    with pytest.raises(ValueError, match=message) as error:
        read_facts(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


def test_a_wrong_entry_of_an_array_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r'facts.jsonl\', entry 2: .*; needed is \{"subject"'):
        read_facts(write(tmp_path, [ADA, {}]))
    for empty in (b"", b"\n \n", b"[]"):
        with pytest.raises(ValueError, match=r"facts.jsonl' holds no facts: needed is"):
            read_facts(write(tmp_path, empty))
    with pytest.raises(FileNotFoundError):
        read_facts(tmp_path / "none.jsonl")


def test_lines_of_a_reference_text(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffOne.\r\n\n Tw\u2028o\n".encode())
    assert [line.strip() for line in read_lines(tmp_path / "text")] == ["One.", "Tw\u2028o"]
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="save it in this encoding"):
        read_lines(tmp_path / "text")
