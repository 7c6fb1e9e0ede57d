"""Facts: a knowledge pack, hashed rows, the whole memory, LoRA, and the facts in the prompt.

Taught are facts about invented people, or facts of WordNet that the model does not know (`--facts real`); they, their
phrasings and harder questions are in `fact_sets.py`. All ways learn from the same batches, with the answers' tokens in
the loss; the pack learns to change nothing else as well. The way "solve", the other method of [`teach`], has batches of
its own. Measured are the answers that are right, and what else has changed: general text, texts about other people,
and texts about the subjects that do not ask for a fact. Controls: the vectors of the pack dealt to other n-grams, and
random vectors of the same size.

A result that is there already (same sizes) is not measured again. Run: python -m benchmarks.facts, or a sweep:
python -m benchmarks.facts --arms pack --layers "1;10;15;20;1,10"
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import product

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramForCausalLM
from engram_transformers.knowledge_pack_engram import KnowledgePack
from engram_transformers.training import create_optimizer, fact_report, teach
from engram_transformers.training.fact_texts import (
    FactText,
    answer_loss,
    fact_texts,
    pad_id,
    padded,
    shuffled_batches,
)
from examples.demo.measure import without_packs

from . import fact_sets
from .command import integers, parser, say, start, whole_donor
from .record import lines_of


MOST_ASKED = 2000  # texts of which answers are counted; a sample if there are more
LORA_RANK = 16
ROWS = 50_000  # of a head, where rows are trained
TRAINABLE = {"rows": "tables", "memory": "memory"}
ARMS = "pack,permuted,random,solve,rows,memory,lora,prompt"
WITHOUT_LAYERS = ("lora", "prompt")
MORE_PASSES = 2  # times those of the other ways, for a pack that is solved: its vectors share no step


def lists(text: str) -> list[list[int]]:
    """Lists of layers such as "1;1,10"."""
    return [integers(part) for part in text.split(";")]


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=1)
    made.add_argument(
        "--arms", default="pack,permuted,random,solve,rows,memory,lora,prompt", help="ways, in their order"
    )
    made.add_argument("--facts", choices=("invented", "real"), default="invented", help="what is taught")
    made.add_argument("--people", type=integers, default=[100], help="numbers of people, or of real facts")
    made.add_argument("--seeds", type=integers, default=[0, 1, 2], help="of people, order and projections")
    made.add_argument("--rates", default="1e-4,3e-4,1e-3,3e-3", help="learning rates of LoRA")
    made.add_argument("--layers", type=lists, default=[[4, 10]], help="Engram layers; ; between several lists")
    made.add_argument("--passes", type=int, default=6, help="how often each text is read")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark: one result for each way, number of people, seed and list of layers."""
    donor = whole_donor(asked.donor)
    torch.set_num_threads(asked.threads)
    for count, seed in product(asked.people, asked.seeds):
        ways = _Ways(donor, asked, count, seed)
        for layers, arm in product(asked.layers, asked.arms.split(",")):
            for rate in [float(rate) for rate in asked.rates.split(",")] if arm == "lora" else [None]:
                passes = asked.passes * (MORE_PASSES if arm == "solve" else 1)
                sizes = {"arm": arm, "people": count, "seed": seed, "rate": rate, "passes": passes}
                sizes |= {} if arm in WITHOUT_LAYERS else {"layers": layers}
                sizes |= {} if asked.facts == "invented" else {"facts": asked.facts}
                if _is_measured(asked, sizes):
                    continue
                say(f"facts: {sizes}")
                yield "facts", sizes, ways.measure(arm, rate, layers)


def _is_measured(asked: argparse.Namespace, sizes: dict) -> bool:
    """Whether a result of these sizes is there."""
    have = lines_of(asked.results / "facts.jsonl")
    return any(sizes == {k: v for k, v in line["sizes"].items() if k not in ("threads", "donor")} for line in have)


class _Ways:
    """Facts of one seed, and what every way is measured with."""

    def __init__(self, donor, asked: argparse.Namespace, count: int, seed: int):
        self.donor, self.asked, self.count, self.seed = donor, asked, count, seed
        self.tokenizer = AutoTokenizer.from_pretrained(donor)
        self.packs: dict[tuple, tuple] = {}

    @cached_property
    def set(self) -> fact_sets.FactSet:
        """What is taught and asked."""
        if self.asked.facts == "real":
            return fact_sets.real(self.count, self.donor)
        return fact_sets.invented(self.count, self.seed)

    @cached_property
    def taught(self) -> list[dict]:
        """The facts in the phrasings that are taught."""
        return self.set.said(fact_sets.TAUGHT)

    def measure(self, arm: str, rate: float | None, layers: list[int]) -> dict:
        """What one way learns."""
        torch.manual_seed(self.seed)
        if arm == "lora":
            return self.lora(rate)
        if arm == "prompt":
            return self.prompt()
        if arm in TRAINABLE:
            return self.rows(TRAINABLE[arm], layers)
        return self.pack(arm, layers)

    def graft(self, layers: list[int], rows: int) -> EngramForCausalLM:
        """A fresh memory on the backbone."""
        sizes = {"engram_layer_ids": layers, "engram_vocab_size": rows, "engram_head_dim": 48}
        return EngramForCausalLM.from_backbone(str(self.donor), dtype=torch.float32, **sizes).eval()

    def pack(self, arm: str, layers: list[int]) -> dict:
        """A knowledge pack, or one of its controls."""
        key = ("solve" if arm == "solve" else "train", *layers)
        if key not in self.packs:
            model, begun = self.graft(layers, 1000), time.monotonic()
            passes = self.asked.passes * (MORE_PASSES if arm == "solve" else 1)
            options = {"passes": passes, "seed": self.seed, "reference_texts": self.set.reference_texts}
            pack = teach(model, self.taught, self.tokenizer, method=key[0], **options)
            self.packs = {key: (model, pack, time.monotonic() - begun)}  # one model at a time
        model, pack, seconds = self.packs[key]
        pack = without_knowledge(pack, arm) if arm in ("permuted", "random") else pack
        name = model.load_memory(pack, "taught")
        found = self.learned(model, lambda: without_packs(model))
        model.unload_memory(name)
        made = {"seconds": seconds, "loss": pack.provenance["loss"], "records": len(pack), "bytes": pack.nbytes}
        return {**made, **found}

    def rows(self, trainable: str, layers: list[int]) -> dict:
        """Hashed rows of the tables, alone or with the rest of the memory, by the package's own optimizer."""
        model = self.graft(layers, ROWS).set_trainable(trainable)
        return self.trained(model, create_optimizer(model, seed=self.seed), model.disable_memory)

    def lora(self, rate: float) -> dict:
        """LoRA of every linear layer."""
        model = AutoModelForCausalLM.from_pretrained(self.donor, dtype=torch.float32)
        lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).eval()
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self.trained(model, torch.optim.Adam(learned, lr=rate, betas=(0.9, 0.99)), model.disable_adapter)

    def trained(self, model, optimizer: torch.optim.Optimizer, off: Callable) -> dict:
        """What a model learns with the steps, batches, loss and schedule of [`teach`]; `off()` gives the backbone."""
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        texts = fact_texts(self.taught, self.tokenizer)
        steps = -(-self.asked.passes * len(texts) // 64)
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
        made = {"seconds": time.monotonic() - begun, "loss": loss.item(), "bytes": sum(p.nbytes for p in learned)}
        return {**made, **self.learned(model, off)}

    def learned(self, model, off: Callable) -> dict:
        """What a model answers and what else has changed, each beside the same of the model inside `off()`."""

        def ask(texts: list[FactText]) -> dict:
            with off():
                before = fact_report.answers(model, texts, self.tokenizer)
            return {"before": before, **fact_report.answers(model, texts, self.tokenizer)}

        others = self.set.other_texts().items()
        changed = {kind: fact_report.changes(model, texts, self.tokenizer, off) for kind, texts in others}
        return {**self.asked_by(ask), "other_texts": changed}

    def prompt(self) -> dict:
        """The backbone with the facts of its subjects in front of each question."""
        model, told = AutoModelForCausalLM.from_pretrained(self.donor, dtype=torch.float32).eval(), self.set.told()

        def ask(texts: list[FactText]) -> dict:
            behind = [self.after("".join(told[name] for name in told if name in text.prompt), text) for text in texts]
            return fact_report.answers(model, behind, self.tokenizer)

        return self.asked_by(ask)

    def after(self, told: str, text: FactText) -> FactText:
        """A text behind another one."""
        ids = self.tokenizer(told)["input_ids"]
        return FactText(text.subject, text.relation, text.prompt, ids + text.ids, [False] * len(ids) + text.answer)

    def asked_by(self, ask: Callable[[list[FactText]], dict]) -> dict:
        """Answers to taught and to other phrasings, and to each kind of harder questions."""
        kinds = {"taught": self.taught, "unseen": self.set.said(fact_sets.UNSEEN)}
        found, harder = (
            {kind: ask(fact_texts(self.sample(facts), self.tokenizer)) for kind, facts in asked.items() if facts}
            for asked in (kinds, self.set.harder())
        )
        return {**found, "harder": harder}

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
