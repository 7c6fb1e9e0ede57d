"""Transplant: a table that one reader has trained is read by a fresh one, against random and permuted rows.

A memory learns the World Factbook. Its table is transplanted into a new graft of the donor, whose reader (projections,
norms, convolution) is fresh, and learns to read the frozen rows on one half of the same texts. The loss on the other
half, which the table has seen and the new reader has not, tells whether the rows mean something without the reader that
they were trained with. Controls, at equal steps and batches: the same rows dealt to one another's places within their
table, and random rows of the same lengths; rows that are zero stay so.

Run: python -m benchmarks.transplant
"""

import argparse
import gc
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import create_optimizer
from engram_transformers.conversion import graft
from examples.texts import FACTBOOK, WORDNET, read_texts, windows

from .command import integers, parser, say, start, whole_donor, workplace


ARMS = ("transplanted", "permuted", "random")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=1)
    made.add_argument("--layers", type=integers, default=[1, 10], help="Engram layers")
    made.add_argument("--rows", type=int, default=20_000, help="least rows of a head")
    made.add_argument("--head-dim", type=int, default=48, help="values in a row")
    made.add_argument("--seeds", type=integers, default=[0, 1, 2], help="of the fresh reader, order and random rows")
    made.add_argument("--taught", type=Path, help="folder of a memory that was taught before, to go on from there")
    made.add_argument("--steps", type=int, default=100, help="of the memory that the table comes from")
    made.add_argument("--reader-steps", type=int, default=100, help="of each fresh reader")
    made.add_argument("--reader-rate", type=float, default=2e-3, help="learning rate of each fresh reader")
    made.add_argument("--batch", type=int, default=8, help="sequences in a step")
    made.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    made.add_argument("--measured", type=int, default=32, help="sequences that a loss is measured on")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark: one result for each seed of the fresh reader."""
    donor = whole_donor(asked.donor)
    sizes = {"layers": asked.layers, "rows": asked.rows, "head_dim": asked.head_dim, "steps": asked.steps}
    sizes |= {
        "reader_steps": asked.reader_steps,
        "reader_rate": asked.reader_rate,
        "batch": asked.batch,
        "length": asked.length,
    }
    texts = _Texts(donor, asked)
    with workplace(asked.work, "transplant") as folder:
        taught = asked.taught or _teach(donor, texts.all, asked, folder)
        model = _loaded(taught)
        with model.disable_memory():
            before = {"donor": texts.losses(model)}
        before["its own reader"] = texts.losses(model)
        say(f"transplant: {before}")
        del model
        gc.collect()
        moved = graft(donor, folder / "moved", init_from=taught)
        model = _loaded(moved).set_trainable("reader")
        rows = [part.clone() for part in model.memory.tables.parameters()]
        for seed in asked.seeds:
            found = dict(before)
            for arm in ARMS:
                _prepare(model, rows, arm, seed)
                _train(model, texts.taught, asked.reader_steps, asked.batch, seed, asked.reader_rate)
                found[arm] = texts.losses(model)
                say(f"transplant, seed {seed}, {arm}: {found[arm]}")
            yield "transplant", {**sizes, "seed": seed}, found


def _teach(donor: Path, texts: list[torch.Tensor], asked: argparse.Namespace, folder: Path) -> Path:
    """A checkpoint whose memory has learned the texts."""
    fields = {"engram_vocab_size": asked.rows, "engram_head_dim": asked.head_dim}
    model = _loaded(graft(donor, folder / "fresh", asked.layers, **fields))
    _train(model.set_trainable("memory"), texts, asked.steps, asked.batch, seed=0)
    model.save_pretrained(folder / "taught")
    return folder / "taught"


class _Texts:
    """Windows of the corpus and of another one."""

    def __init__(self, donor, asked: argparse.Namespace):
        tokenizer = AutoTokenizer.from_pretrained(donor)
        entries = read_texts(FACTBOOK)
        self.taught, self.other_half, other = (
            [torch.tensor(window["input_ids"]) for window in windows(tokenizer, texts, asked.length)]
            for texts in (entries[::2], entries[1::2], read_texts(WORDNET)[:1000])
        )
        self.all = self.taught + self.other_half
        random.Random(0).shuffle(self.all)
        kinds = {"half that the reader learned": self.taught, "other half": self.other_half, "other text": other}
        self.measured = {kind: _spread(found, asked.measured) for kind, found in kinds.items()}
        self.batch = asked.batch

    @torch.no_grad()
    def losses(self, model) -> dict[str, float]:
        """Mean loss in nats a token on each kind of text."""
        means = {}
        for kind, found in self.measured.items():
            parts = [found[first : first + self.batch] for first in range(0, len(found), self.batch)]
            means[kind] = sum(_loss(model, torch.stack(part)).item() * len(part) for part in parts) / len(found)
        return means


def _spread(found: list, count: int) -> list:
    """Some of a list, from all of its parts."""
    return found[:: max(1, len(found) // count)][:count]


def _loaded(folder):
    """A graft, its tables among its parameters."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, engram_placement="device").eval()


def _loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Loss of sequences `(batch, length)`."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(model.device.type, torch.bfloat16):
        return model(ids, labels=ids, use_cache=False).loss


def _train(model, texts: list[torch.Tensor], steps: int, batch: int, seed: int, rate: float = 2e-3) -> None:
    """Trains what may learn, with a linear decay."""
    optimizer, draw = create_optimizer(model, lr=rate, seed=seed), random.Random(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / steps))
    order: list[torch.Tensor] = []
    for _ in range(steps):
        while len(order) < batch:
            order += draw.sample(texts, len(texts))
        taken, order = order[:batch], order[batch:]
        _loss(model, torch.stack(taken)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def _prepare(model, originals: list[torch.Tensor], arm: str, seed: int) -> None:
    """Gives a graft a fresh reader of a seed, and the rows of an arm, made of the transplanted ones."""
    torch.manual_seed(seed)
    for layer in model.memory.layers.values():
        model.init_engram_layer(layer)
    for part, original in zip(model.memory.tables.parameters(), originals, strict=True):
        part.copy_(original)
        used = part.any(-1).nonzero()[:, 0]  # (rows that are not zero,)
        rows = part[used]
        if arm == "permuted":
            part[used] = rows[torch.randperm(len(used))]
        elif arm == "random":
            noise = torch.randn_like(rows)
            part[used] = noise * rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


if __name__ == "__main__":
    start(measure, options())
