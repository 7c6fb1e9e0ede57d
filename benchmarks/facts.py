"""Facts about invented people: a knowledge pack, LoRA, and the facts in the prompt.

Every person has a birthplace and a job. Some phrasings are taught, four others are asked; nobody can know the answers.
All ways learn from the same batches, with the answers' tokens in the loss; the pack learns to change nothing else as
well. The way "solve" makes the pack by the other method of [`teach`], which has batches of its own. Measured are the
answers that are right, and what else has changed: general text, texts about other people, and texts about the taught
people that do not ask for a fact. Controls: the vectors of the pack dealt to other n-grams, and random vectors of the
same size.

A result that is there already (same sizes) is not measured again. Run: python -m benchmarks.facts
"""

import argparse
import random
import time
from collections.abc import Iterator
from functools import cached_property

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramForCausalLM
from engram_transformers.knowledge_pack_engram import KnowledgePack
from engram_transformers.training import fact_report, report_pack, teach
from engram_transformers.training.fact_texts import answer_loss, fact_texts, pad_id, padded, shuffled_batches
from examples.texts import FACTBOOK, read_texts

from .command import integers, parser, say, start, whole_donor
from .record import lines_of


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

# Phrasings of each relation: taught ones, and ones that are only asked.
TAUGHT = {
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
UNSEEN = {
    "birthplace": ("{n} comes from the city of [[{a}]].", "People say that {n} grew up in [[{a}]]."),
    "job": ("{n} earns a living as a [[{a}]].", "For many years {n} has been a [[{a}]]."),
}

KNOWN = "Albert Einstein,Marie Curie,Isaac Newton,Ada Lovelace,Charles Darwin,Jane Austen,Mark Twain,Galileo Galilei"
NEUTRAL = (
    "{n} opened the door, looked at the rain and decided to stay at home for another hour.",
    "It was late when {n} came back. The lamp was still burning and the soup was cold.",
    "A letter for {n} had been lying on the table since Monday, and nobody had read it.",
)
FEW = 24  # texts of each kind that are compared
MOST_ASKED = 2000  # texts of which answers are counted; a sample if there are more
LORA_RANK = 16
MORE_PASSES = 2  # times those of the other ways, for a pack that is solved: its vectors share no step


def people(count: int, seed: int) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Invented people `(name, birthplace, job)`, and free names that share a word with one of theirs."""
    order = random.Random(seed)
    cities, jobs, parts = CITIES.split(), JOBS.split(), SYLLABLES.split()

    def word(syllables: int) -> str:
        return "".join(order.choice(parts) for _ in range(syllables)).capitalize()

    names = set()
    while len(names) < count:
        names.add(f"{word(2)} {word(3)}")
    found = [(name, order.choice(cities), order.choice(jobs)) for name in sorted(names)]
    relatives = [f"{word(2)} {name.split()[1]}" for name in sorted(names)[:FEW]]
    return found, [name for name in relatives if name not in names]


def facts_of(found: list[tuple[str, str, str]], phrasings: dict) -> list[dict]:
    """Facts about people, as [`teach`] takes them."""
    return [
        {"subject": name, "relation": relation, "texts": [p.format(n=name, a=answer) for p in phrasings[relation]]}
        for name, *answers in found
        for relation, answer in zip(phrasings, answers, strict=True)
    ]


def other_texts(found: list[tuple[str, str, str]], relatives: list[str]) -> dict[str, list[str]]:
    """Texts that do not ask for a taught fact, by kind."""
    names = [name for name, _, _ in found[:FEW]]
    return {
        "general": [text for text in read_texts(FACTBOOK) if len(text) > 400][:FEW],
        "same_relation": [form.format(n=name) for name in KNOWN.split(",") for form in ("{n} was born in", "{n} is a")],
        "shared_name": [f"{name} was born in" for name in relatives],
        "about_a_subject": [NEUTRAL[i % len(NEUTRAL)].format(n=name) for i, name in enumerate(names)],
    }


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=1)
    made.add_argument("--arms", default="pack,permuted,random,lora,prompt", help="ways, in their order; also solve")
    made.add_argument("--people", type=integers, default=[100], help="numbers of people")
    made.add_argument("--seeds", type=integers, default=[0, 1, 2], help="of people, order and projections")
    made.add_argument("--rates", default="1e-4,3e-4,1e-3,3e-3", help="learning rates of LoRA")
    made.add_argument("--layers", type=integers, default=[4, 10], help="Engram layers")
    made.add_argument("--passes", type=int, default=6, help="how often each text is read")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark: one result for each way, number of people and seed."""
    donor = whole_donor(asked.donor)
    torch.set_num_threads(asked.threads)
    for count in asked.people:
        for seed in asked.seeds:
            ways = _Ways(donor, asked, count, seed)
            for arm in asked.arms.split(","):
                for rate in [float(rate) for rate in asked.rates.split(",")] if arm == "lora" else [None]:
                    passes = asked.passes * (MORE_PASSES if arm == "solve" else 1)
                    sizes = {"arm": arm, "people": count, "seed": seed, "rate": rate, "passes": passes}
                    sizes |= {} if arm in ("lora", "prompt") else {"layers": asked.layers}
                    if _is_measured(asked, sizes):
                        continue
                    say(f"facts: {sizes}")
                    yield "facts", sizes, ways.measure(arm, rate)


def _is_measured(asked: argparse.Namespace, sizes: dict) -> bool:
    """Whether a result of these sizes is there."""
    have = lines_of(asked.results / "facts.jsonl")
    return any(sizes.items() <= line["sizes"].items() for line in have)


class _Ways:
    """People of one seed, and what every way is measured with."""

    def __init__(self, donor, asked: argparse.Namespace, count: int, seed: int):
        self.donor, self.asked, self.seed = donor, asked, seed
        self.tokenizer = AutoTokenizer.from_pretrained(donor)
        self.people, relatives = people(count, seed)
        self.taught, self.unseen = facts_of(self.people, TAUGHT), facts_of(self.people, UNSEEN)
        self.others = other_texts(self.people, relatives)

    def measure(self, arm: str, rate: float | None) -> dict:
        """What one way learns."""
        torch.manual_seed(self.seed)
        if arm == "lora":
            return self.lora(rate)
        if arm == "prompt":
            return self.prompt()
        model, pack, seconds = (
            self.teach("solve", MORE_PASSES * self.asked.passes) if arm == "solve" else self.taught_pack
        )
        if arm in ("permuted", "random"):
            pack = without_knowledge(pack, arm)
        asked = {"facts": self.sample(self.taught), "unseen": self.sample(self.unseen)}
        report = report_pack(model, pack, self.tokenizer, **asked, other_texts=self.others)
        return {"seconds": seconds, "loss": pack.provenance["loss"], **report}

    @cached_property
    def taught_pack(self) -> tuple[EngramForCausalLM, KnowledgePack, float]:
        """What [`_Ways.teach`] returns of the method "train"."""
        return self.teach("train", self.asked.passes)

    def teach(self, method: str, passes: int) -> tuple[EngramForCausalLM, KnowledgePack, float]:
        """A graft, the pack that it was taught, and the seconds that teaching took."""
        sizes = {"engram_layer_ids": self.asked.layers, "engram_vocab_size": 1000, "engram_head_dim": 48}
        model = EngramForCausalLM.from_backbone(str(self.donor), dtype=torch.float32, **sizes)
        begun = time.monotonic()
        pack = teach(model, self.taught, self.tokenizer, method=method, passes=passes, seed=self.seed)
        return model, pack, time.monotonic() - begun

    def lora(self, rate: float) -> dict:
        """LoRA of every linear layer, with the steps, batches, loss and schedule of [`teach`]."""
        model = AutoModelForCausalLM.from_pretrained(self.donor, dtype=torch.float32)
        lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).eval()
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        texts = fact_texts(self.taught, self.tokenizer)
        steps = -(-self.asked.passes * len(texts) // 64)
        optimizer = torch.optim.Adam(learned, lr=rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 5) * max(0.05, 1 - step / steps)
        )
        begun = time.monotonic()
        with sdpa_kernel(SDPBackend.MATH):  # as `teach` does on a CPU
            for batch in shuffled_batches(texts, 64, steps, self.seed):
                ids, mask, labels = padded(batch, pad_id(self.tokenizer), model.device)
                with torch.autocast(model.device.type, torch.bfloat16):
                    loss = answer_loss(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        seconds = time.monotonic() - begun
        others = {
            kind: fact_report.changes(model, texts, self.tokenizer, model.disable_adapter)
            for kind, texts in self.others.items()
        }
        answers = {"taught": self.answers(model, self.taught), "unseen": self.answers(model, self.unseen)}
        size = sum(parameter.nbytes for parameter in learned)
        return {"seconds": seconds, "loss": float(loss), "bytes": size, **answers, "other_texts": others}

    def prompt(self) -> dict:
        """The backbone with a person's facts in front of each question."""
        model = AutoModelForCausalLM.from_pretrained(self.donor, dtype=torch.float32).eval()
        told = {
            name: f"{name} was born in the city of {city}. {name} is a {job} by trade. "
            for name, city, job in self.people
        }
        found = {}
        for kind, facts in {"taught": self.taught, "unseen": self.unseen}.items():
            texts = fact_texts(self.sample(facts), self.tokenizer)
            found[kind] = fact_report.answers(
                model, [self.after(told[text.subject], text) for text in texts], self.tokenizer
            )
        return found

    def after(self, told: str, text):
        """A text behind another one."""
        ids = self.tokenizer(told.strip() + " ")["input_ids"]
        return type(text)(text.subject, text.relation, text.prompt, ids + text.ids, [False] * len(ids) + text.answer)

    def answers(self, model, facts: list[dict]) -> dict:
        """Answers of a model with an adapter, and those without."""
        texts = fact_texts(self.sample(facts), self.tokenizer)
        with model.disable_adapter():
            before = fact_report.answers(model, texts, self.tokenizer)
        return {**fact_report.answers(model, texts, self.tokenizer), "before": before}

    def sample(self, facts: list[dict]) -> list[dict]:
        """All facts, or some of them."""
        each = len(facts[0]["texts"])
        return facts if len(facts) * each <= MOST_ASKED else random.Random(0).sample(facts, MOST_ASKED // each)


def without_knowledge(pack: KnowledgePack, how: str) -> KnowledgePack:
    """A control: the same n-grams with one another's vectors ("permuted"), or with random ones ("random")."""
    torch.manual_seed(0)
    ngrams, vectors = {}, {layer: {} for layer in pack.fits["layers"]}
    for order, records in pack.records.items():
        ngrams[order], deal = records.ngrams, torch.randperm(len(records.ngrams))
        for layer, rows in records.vectors.items():
            noise = torch.randn_like(rows)
            noise *= rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            vectors[layer][order] = rows[deal] if how == "permuted" else noise
    return KnowledgePack(ngrams, vectors, pack.fits, pack.mode, pack.provenance)


if __name__ == "__main__":
    start(measure, options())
