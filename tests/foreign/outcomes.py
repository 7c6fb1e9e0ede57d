"""What became of foreign tests, and whether an Engram model fell behind the stock one.

A test of an Engram model may fail, or be skipped where the same backbone without a memory or the stock Llama is not,
only if `EXPLAINED` names it and says why; every message must be the one that is named there. An entry that no longer
holds is an error too.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple


KINDS = ("Model", "ForCausalLM")
BACKBONES = ("Llama", "DeepseekV4")

# What pytest's files call outcomes, the worst last. An error is one before the test began, or after it ended.
WORDS = {"skipped": "skipped", "failure": "failed", "error": "broken"}


class Outcome(NamedTuple):
    """What became of one test.

    Args:
        word (`str`): passed, skipped, failed or broken.
        messages (`tuple[str, ...]`): of every failure (subtests fail one by one), or of the skip.
    """

    word: str
    messages: tuple[str, ...] = ()


class Case(NamedTuple):
    """Names of an Engram test case and of the stock cases that it is compared with."""

    engram: str
    stock: str
    llama: str


CASES = [
    Case(f"Engram{backbone}{kind}Test", f"Stock{backbone}{kind}Test", f"StockLlama{kind}Test")
    for backbone in BACKBONES
    for kind in KINDS
]


@dataclass(frozen=True)
class Reason:
    """Why a test of an Engram model fails or is skipped.

    Args:
        word (`str`): failed or skipped.
        says (`str`): regular expression that every message must match.
        why (`str`): the reason, for docs/foreign-tests.md.
        cases (`tuple[str, ...]`): patterns of test cases.
    """

    word: str
    says: str
    why: str
    cases: tuple[str, ...] = ("Engram*",)


Outcomes = dict[str, dict[str, Outcome]]


def read_outcomes(path: Path) -> Outcomes:
    """Outcomes by test case and test, from a JUnit file that pytest wrote."""
    found: Outcomes = defaultdict(dict)
    for element in ElementTree.parse(path).iter("testcase"):
        case, outcome = element.get("classname", "").rsplit(".", 1)[-1], Outcome("passed")
        for tag, word in WORDS.items():
            if messages := tuple(entry.get("message", "") for entry in element.findall(tag)):
                outcome = Outcome(word, messages)
        found[case][element.get("name", "")] = outcome
    return dict(found)


def count_words(outcomes: dict[str, Outcome]) -> Counter:
    """How many tests of a case passed, failed and were skipped."""
    return Counter(outcome.word for outcome in outcomes.values())


def executed(outcomes: dict[str, Outcome]) -> int:
    """Tests that ran, with a good end or a bad one."""
    return sum(outcome.word in ("passed", "failed") for outcome in outcomes.values())


def differences(outcomes: Outcomes) -> Iterator[tuple[str, str, Outcome]]:
    """Case, test and outcome of everything that has to be explained."""
    for case in CASES:
        for test, outcome in outcomes[case.engram].items():
            skipped_by_all = all(outcomes[name][test].word == "skipped" for name in case)
            if outcome.word != "passed" and not skipped_by_all:
                yield case.engram, test, outcome


def explanation(case: str, test: str, explained: dict[str, Reason]) -> str | None:
    """Key of the entry that speaks of a test, or None."""
    for key, reason in explained.items():
        if fnmatchcase(test, key) and any(fnmatchcase(case, pattern) for pattern in reason.cases):
            return key
    return None


def complaints(outcomes: Outcomes, explained: dict[str, Reason]) -> list[str]:
    """Everything that is wrong with a run, one line each; nothing if it is as it should be."""
    found = []
    for case in CASES:
        if not outcomes.get(case.engram):
            return [f"{case.engram} was not run."]
        for other in (case.stock, case.llama):
            if set(outcomes[case.engram]) != set(outcomes.get(other, ())):
                return [f"{case.engram} and {other} did not run the same tests: they cannot be compared."]
    different = {(case, test): outcome for case, test, outcome in differences(outcomes)}
    for (case, test), outcome in different.items():
        key = explanation(case, test, explained)
        reason = explained.get(key)
        if reason is None:
            found.append(f"{case}::{test} {outcome.word}, and no entry explains it: {outcome.messages[0][:300]}")
        elif reason.word != outcome.word:
            found.append(f"{case}::{test} {outcome.word}, '{key}' says {reason.word}: {outcome.messages[0][:300]}")
        else:
            strange = [text for text in outcome.messages if not re.search(reason.says, text)]
            found += [f"{case}::{test} {outcome.word} for another reason than '{key}': {t[:300]}" for t in strange]
    for case in CASES:
        for test in outcomes[case.engram]:
            key = explanation(case.engram, test, explained)
            if key is not None and (case.engram, test) not in different:
                found.append(f"{case.engram}::{test} needs no explanation any more: narrow or remove '{key}'.")
    used = {explanation(case, test, explained) for case, test in different}
    found += [f"No test is explained by '{key}': remove it." for key in explained if key not in used]
    return found
