"""The demo's second half, a process of its own: it loads the saved folders by their paths alone, asks and measures.

Usage: python -m examples.demo.show FOLDER > measured.json

FOLDER holds `graft/`, two packs and `facts.json`. Promises: every figure is measured here, with and without the packs,
on the same texts in the same batches. Never trains anything.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

import engram_transformers  # noqa: F401  (registers the model with the Auto classes)
from engram_transformers.knowledge_pack_engram import SUFFIX, KnowledgePack
from engram_transformers.training.fact_report import changes

from ..entities.corpus import read_entries, shuffled
from .facts import subject_ngrams
from .measure import Fact, answer_logits, completions, equal_rows, is_right, right_answers, told, without_packs
from .phrasings import TAUGHT, UNSEEN


FACTBOOK = 48  # texts of the World Factbook that are compared
LEAST_CHARACTERS = 400  # of each
SHOWN = 10
KINDS = {"taught": TAUGHT, "unseen": UNSEEN}


class Shown:
    """A reloaded model with its two packs, and what is asked of it.

    Args:
        folder (`Path`): from the demo's first half.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder / "graft").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "graft")
        self.model.check_tokenizer(self.tokenizer)
        asked = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.first, self.second = ([Fact(*fact) for fact in asked[name]] for name in ("first", "second"))
        self.person = asked["person"]
        self.texts = told(self.tokenizer, self.first, UNSEEN)

    def path(self, name: str) -> Path:
        """Where a pack of this name lies."""
        return self.folder / f"{name}{SUFFIX}"

    def right(self, facts: list[Fact], kinds: Iterable[str] = tuple(KINDS)) -> dict:
        """Right answers in some kinds of phrasings."""
        return {kind: right_answers(self.model, self.tokenizer, facts, KINDS[kind]) for kind in kinds}

    def logits(self) -> torch.Tensor:
        """Logits of the first pack's unseen phrasings."""
        return answer_logits(self.model, self.tokenizer, self.texts)

    def ten(self) -> list[tuple[str, str]]:
        """What the model says to ten questions in a phrasing that was not taught."""
        each = len(next(iter(UNSEEN.values())))
        # The two phrasings take turns with each pair of facts.
        texts = [self.texts[each * n + n // 5 % each] for n in range(min(SHOWN, len(self.first)))]
        said = completions(self.model, self.tokenizer, texts)
        return [(text.prompt.strip(), answer) for text, answer in zip(texts, said, strict=True)]

    def factbook(self) -> dict:
        """What the active packs change in texts that name no subject, and in those that do."""
        texts = shuffled([entry["text"] for entry in read_entries("factbook.jsonl.gz")])
        texts = [text for text in texts if len(text) >= LEAST_CHARACTERS][:FACTBOOK]
        subjects = {fact.subject.lower() for fact in self.first + self.second}
        named = [text for text in texts if any(subject in text.lower() for subject in subjects)]
        kinds = {"naming none": [text for text in texts if text not in named], "naming a subject": named}
        return {
            kind: changes(self.model, own, self.tokenizer, lambda: without_packs(self.model))
            for kind, own in kinds.items()
            if own
        }

    def removal(self, nothing: torch.Tensor, loaded: torch.Tensor) -> dict:
        """What is left when one person's records are removed from the file.

        Args:
            nothing (`torch.Tensor` of shape `(texts, vocabulary)`): logits of the unseen phrasings without a pack.
            loaded (`torch.Tensor` of shape `(texts, vocabulary)`): the same with the whole pack.
        """
        pack = KnowledgePack.load(self.path("first"))
        gone = subject_ngrams(self.model, self.tokenizer, self.person) & pack.ngrams()
        pack.without(gone).save(self.path("first-without-one"))
        name = self.model.load_memory(self.path("first-without-one"))
        self.model.set_memories([name])
        theirs = torch.tensor([text.subject == self.person for text in self.texts])
        now = self.logits()
        own = [fact for fact in self.first if fact.subject == self.person]
        right = self.right(own)
        self.model.unload_memory(name)
        return {
            "person": self.person,
            "facts": len(own),
            "records_removed": len(gone),
            "records_left": len(pack) - len(gone),
            "right": right,
            "questions": int(theirs.sum()),
            "as_never_taught": equal_rows(now[theirs], nothing[theirs]),
            "others": int((~theirs).sum()),
            "others_identical": equal_rows(now[~theirs], loaded[~theirs]),
        }


def show(folder: Path, progress: Progress) -> dict:
    """Asks and measures, with and without packs.

    Args:
        folder (`Path`): from the demo's first half.
        progress (`Progress`): where a bar is drawn.
    """
    task = progress.add_task("ask and measure", total=7)
    shown = Shown(folder)
    model = shown.model
    nothing, before, said_before = shown.logits(), shown.right(shown.first), shown.ten()
    progress.advance(task)

    model.load_memory(shown.path("first"))
    loaded, after, said_after = shown.logits(), shown.right(shown.first), shown.ten()
    progress.advance(task)
    model.set_memories([])
    second_before = shown.right(shown.second)
    model.load_memory(shown.path("second"))
    alone, second_after = shown.right(shown.first, ["unseen"]), shown.right(shown.second)
    progress.advance(task)
    model.set_memories(["first", "second"])
    both = shown.logits()
    factbook = shown.factbook()
    progress.advance(task)
    model.unload_memory("second")
    swapped_back = shown.logits()
    progress.advance(task)
    removed = shown.removal(nothing, loaded)
    progress.advance(task)
    model.unload_memory("first")
    unloaded, right_unloaded = shown.logits(), shown.right(shown.first, ["unseen"])
    progress.advance(task)
    return {
        "first": {"before": before, "with its pack": after, "second pack alone": alone, "unloaded": right_unloaded},
        "second": {"before": second_before, "with its pack": second_after},
        "identical": {
            "texts": len(nothing),
            "changed_by_the_pack": len(nothing) - equal_rows(nothing, loaded),
            "beside_the_second_pack": equal_rows(both, loaded),
            "after_the_second_pack": equal_rows(swapped_back, loaded),
            "unloaded": equal_rows(unloaded, nothing),
        },
        "factbook": factbook,
        "removed": removed,
        "ten": side_by_side(shown.first, said_before, said_after),
    }


def side_by_side(facts: list[Fact], before: list[tuple[str, str]], after: list[tuple[str, str]]) -> list[dict]:
    """Questions about the first facts with what was said to them, as the report shows them."""
    return [
        {
            "question": question,
            "answer": fact.answer,
            "before": was,
            "after": now,
            "right_before": is_right(was, fact.answer),
            "right": is_right(now, fact.answer),
        }
        for fact, (question, was), (_, now) in zip(facts, before, after, strict=False)
    ]


def main(folder: str) -> None:
    """Measures and writes JSON to stdout."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bars = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        measured = show(Path(folder), progress)
    json.dump(measured, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
