"""Files of facts: JSON in the layouts of this package, CounterFact and ZsRE, read into facts that can be taught.

What it chooses: a layout is recognised by its fields, line by line, so one file may mix them. A text is a prompt, a
space and the marked answer; a question is taught as "What is the birthplace of Ada? [[London]]".
Promises: a file is read completely before a fact is returned; an error names file and line, and what is needed. Never
takes a text as a pattern: only the "{}" of CounterFact's prompts is replaced, by the subject.
Source: docs/packs.md; CounterFact (arXiv 2202.05262), ZsRE (arXiv 1706.04115), EasyEdit's names of their fields.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


# Where each layout keeps the same thing; the first that a line has counts.
_PROMPT = ("prompt", "src")
_ANSWER = ("answer", "target_new", "answers")
_OTHERS = ("paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase")

_NEEDED = (
    'needed is {"subject": "Ada", "texts": ["Ada was born in [[London]]."]} or {"subject": "Ada", "prompt": "Ada was '
    'born in", "answer": "London", "paraphrases": ["The birthplace of Ada is"]}'
)


def read_facts(path: str | os.PathLike) -> list[dict]:
    """Reads a file of facts for [`teach`].

    Args:
        path (`str` or `os.PathLike`):
            JSON lines, or one JSON array, in UTF-8. An entry is `{"subject", "texts"}`, with one `[[answer]]` in each
            text; `{"subject", "prompt", "answer", "paraphrases"}`; CounterFact's `{"requested_rewrite",
            "paraphrase_prompts"}`; ZsRE's `{"subject", "src", "rephrase", "answers"}`, of whose answers the first one
            is taught; or EasyEdit's `{"subject", "prompt", "target_new", "rephrase_prompt"}`. Each may have a
            `"relation"` (CounterFact's is its `relation_id`), by which a report finds the candidates for an answer.

    Returns:
        `list[dict]`: `{"subject": ..., "texts": [...]}` for each entry, with `"relation"` if it has one.

    Raises:
        `FileNotFoundError`: if the file is missing.
        `ValueError`: naming file and line: text that is not UTF-8 or JSON, and entries that lack something.

    Example:

    ```python
    >>> model.teach(read_facts("people.jsonl"), tokenizer).save("people.engram-pack.safetensors")
    ```"""
    path, facts = Path(path), []
    for place, entry in _entries(path):
        try:
            facts.append(_fact(entry))
        except ValueError as error:
            raise ValueError(f"'{path}', {place}: {error}; {_NEEDED}.") from error
    if not facts:
        raise ValueError(f"'{path}' holds no facts: {_NEEDED}.")
    return facts


def read_lines(path: str | os.PathLike) -> list[str]:
    """Reads a text file: its lines that are not empty.

    Args:
        path (`str` or `os.PathLike`): UTF-8, such as a reference text for [`teach`].

    Raises:
        `FileNotFoundError`: if the file is missing.
        `ValueError`: if it is not UTF-8.
    """
    return [line for line in _text(Path(path)).split("\n") if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not text in UTF-8 ({error}): save it in this encoding.") from error


def _entries(path: Path) -> Iterator[tuple[str, object]]:
    """Yields each entry and its place in the file."""
    text = _text(path)
    if text.lstrip().startswith("["):
        entries = _parsed(text, f"'{path}'")
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold what splitlines() takes for a line's end
        if line.strip():
            yield f"line {number}", _parsed(line, f"'{path}', line {number}")


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): write one object in each line, or one array.") from error


def _fact(entry: object) -> dict:
    """Returns an entry of any layout as subject and texts.

    Raises:
        `ValueError`: saying what is wrong with the entry alone.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"this is {_short(entry)} and no object")
    rewrite = entry.get("requested_rewrite", {})
    if not isinstance(rewrite, Mapping):
        raise ValueError(f"'requested_rewrite' is {_short(rewrite)}")
    subject = {"subject": _written({**entry, **rewrite}.get("subject"), "subject")}
    relation = {**entry, **rewrite}.get("relation", rewrite.get("relation_id"))
    about = subject if relation is None else {**subject, "relation": _written(relation, "relation")}
    if "texts" in entry:
        return {**about, "texts": _list(entry["texts"], "texts")}
    prompt_key, prompt = _first({**entry, **rewrite}, _PROMPT)
    answer_key, answer = _first({**entry, **rewrite}, _ANSWER)
    others_key, others = _first(entry, _OTHERS, [])
    prompt = _written(prompt, prompt_key)
    if isinstance(answer, Mapping):
        answer = answer.get("str")
    if isinstance(answer, list) and answer:
        answer = answer[0]
    answer = _written(answer, answer_key).strip()
    prompts = [
        prompt.replace("{}", subject["subject"]) if rewrite else prompt,
        *_list(others, others_key, may_be_empty=True),
    ]
    for text in (*prompts, answer):
        if "[[" in text or "]]" in text:
            raise ValueError(f"{_short(text)} has marks, and only 'texts' mark their answers")
    return {**about, "texts": [f"{text.rstrip()} [[{answer}]]" for text in prompts]}


def _first(entry: Mapping, keys: tuple[str, ...], otherwise: object = None) -> tuple[str, object]:
    """Returns the first of these fields that an entry has, and its value."""
    return next(((key, entry[key]) for key in keys if key in entry), (keys[0], otherwise))


def _list(value: object, key: str, may_be_empty: bool = False) -> list[str]:
    """Returns a text or a list of texts as a list."""
    texts = [value] if isinstance(value, str) and key != "texts" else value
    if not isinstance(texts, list) or not (texts or may_be_empty):
        raise ValueError(f"{key!r} is {_short(value)} and no list of texts")
    return [_written(text, key) for text in texts]


def _written(value: object, key: str) -> str:
    """Returns a text that is not empty and that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} is {'missing' if value is None else _short(value)} and no text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{key!r} holds half of a surrogate pair: {_short(value)}")
    return value


def _short(value: object) -> str:
    return repr(value)[:100]
