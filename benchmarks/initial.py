"""What a memory learns when its tables start as zeros, as normal numbers, or from a text; at equal training.

Each init and seed is a graft, trained by EngramTrainer on the same windows of the World Factbook; the seed is that of
the hash, of the fresh weights and of the order of the windows. The text of "embeddings" and "corpus" is what is trained
on. Measured in nats a token, in float32: the loss on a fixed sample of what was trained on (recall) and on articles
that were held out, before and after.

Run: python -m benchmarks.initial; --seeds 0 --steps 2 for a try
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from engram_transformers import EngramTrainer
from engram_transformers.conversion import graft
from engram_transformers.conversion.initial_tables import INITS
from examples.texts import FACTBOOK, read_texts, windows

from .command import integers, parser, say, start, whole_donor, workplace


HELD_OUT = 20  # articles


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=1)
    made.add_argument("--inits", type=lambda text: text.split(","), default=list(INITS))
    made.add_argument("--seeds", type=integers, default=[0, 1, 2])
    made.add_argument("--layers", type=integers, default=[1, 10])
    made.add_argument("--rows", type=int, default=20_000, help="rows of each head")
    made.add_argument("--head-dim", type=int, default=48)
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--length", type=int, default=128)
    made.add_argument("--sample", type=int, default=16, help="windows of each measured sample")
    made.add_argument("--std", type=float, default=None, help="init_std; that of the package by default")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark: a result for each init and seed."""
    donor = whole_donor(asked.donor).resolve()
    tokenizer = AutoTokenizer.from_pretrained(donor)
    texts = read_texts(FACTBOOK)
    random.Random(0).shuffle(texts)
    held_out = windows(tokenizer, texts[:HELD_OUT], asked.length)[: asked.sample]
    count = asked.steps * asked.batch
    train = windows(tokenizer, texts[HELD_OUT:], asked.length)[:count]
    samples = {"recall": random.Random(0).sample(train, min(asked.sample, count)), "held_out": held_out}
    samples = {name: torch.tensor([window["input_ids"] for window in chosen]) for name, chosen in samples.items()}
    names = ("layers", "rows", "head_dim", "steps", "batch", "length", "sample", "std")
    with workplace(asked.work, "initial") as place:
        (place / "text.txt").write_text(tokenizer.decode([i for w in train for i in w["input_ids"]]), encoding="utf-8")
        for seed in asked.seeds:
            for init in asked.inits:
                say(f"{init}, seed {seed}")
                sizes = {name: getattr(asked, name) for name in names} | {"init": init, "seed": seed}
                yield "initial", sizes, run_of(asked, donor, place, init, seed, train, samples)


def run_of(asked, donor: Path, place: Path, init: str, seed: int, train: list, samples: dict) -> dict:
    """Grafts, trains and measures."""
    fields = {"engram_vocab_size": asked.rows, "engram_head_dim": asked.head_dim, "engram_seed": seed}
    if init != "zero":
        fields |= {"init": init, "init_std": asked.std}
        fields |= {} if init == "normal" else {"init_text": place / "text.txt"}
    begun = time.perf_counter()
    out = graft(donor, place / f"{init}-{seed}", asked.layers, **fields)
    measured: dict = {"graft_seconds": round(time.perf_counter() - begun, 1)}
    model = AutoModelForCausalLM.from_pretrained(out, engram_placement="device")
    measured["before"] = losses(model, samples)
    settings = TrainingArguments(
        place / "trainer",
        max_steps=asked.steps,
        per_device_train_batch_size=asked.batch,
        learning_rate=2e-3,
        logging_steps=max(1, asked.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=seed,
        bf16=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = EngramTrainer(model, settings, train_dataset=train)
    begun = time.perf_counter()
    trainer.train()
    measured["train_seconds"] = round(time.perf_counter() - begun, 1)
    measured["losses"] = [round(float(entry["loss"]), 4) for entry in trainer.state.log_history if "loss" in entry]
    return measured | {"after": losses(model, samples)}


@torch.no_grad()
def losses(model, samples: dict) -> dict[str, float]:
    """Mean loss on each sample."""
    model.eval()
    found = {}
    for name, ids in samples.items():
        batches = ids.split(4)
        found[name] = round(sum(float(model(input_ids=b, labels=b).loss) * len(b) for b in batches) / len(ids), 5)
    return found


if __name__ == "__main__":
    start(measure, options())
