"""Hashing of both layers against the January demo's NumPy procedure, and as a share of a forward pass.

The same ids of real text, one token and 2048; the integers are compared before anything is timed. One token is hashed
as decoding does it, in Python integers and with the classes of the two tokens before it; the demo, which keeps none,
gets the one alone.

Run: python -m benchmarks.hash
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from engram_transformers import EngramForCausalLM
from engram_transformers.hash_ngrams_engram import NgramHasher

from . import models, passes
from .command import CannotMeasure, integers, limit_seconds, parser, run, say, start, whole_donor
from .compare import interleave, ratios, spread
from .numpy_hash import NumpyHash
from .text import real_ids


PROMPT = 64

# Calls in one round: about 0.2 s of either procedure on the machine where this was written.
CALLS_ONE, CALLS_MANY = 1000, 40


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=20)
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--tokens", type=int, default=2048, help="tokens of the long text")
    made.add_argument("--rows", type=int, default=2_262_400, help="rows of a head whose hash is timed")
    made.add_argument("--calls", type=int, default=1, help="times as many calls a round")
    made.add_argument("--decoded", type=int, default=64, help="tokens decoded for the share of a forward")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    donor = whole_donor(asked.donor)
    ids = real_ids(models.tokenizer_of(donor), max(asked.tokens, PROMPT + asked.decoded))
    # Rows of the forward do not change what it costs, and zero tables of 50 rows need no disk.
    fields = {"engram_n_heads": 8, "engram_head_dim": asked.head_dim}
    model = EngramForCausalLM.from_backbone(
        models.load(donor), models.tokenizer_of(donor), asked.layers, engram_vocab_size=50, **fields
    ).eval()
    hasher = hasher_of(model, asked.rows)
    demo = NumpyHash(hasher)
    long, one = ids[:, : asked.tokens], ids[:, 2:3]
    refuse_other_rows(hasher, demo, long)
    step = a_step(hasher, one, hasher.compress(ids[:, :2]))
    measured = {}
    for name, text, work, calls in (
        ("one_token", one, step, CALLS_ONE * asked.calls),
        ("long_text", long, a_text(hasher, long), CALLS_MANY * asked.calls),
    ):
        say(f"hashing, {text.shape[1]} token(s)")
        measured[name] = compare(work, demo, text, calls, asked)
    measured["one_token"]["share_of_forward"] = share(
        lambda: sum(passes.decode(model, ids[:, :PROMPT], asked.decoded)) / asked.decoded,
        lambda: per_call(step, CALLS_ONE),
        asked,
    )
    measured["long_text"]["share_of_forward"] = share(
        lambda: passes.prefill_seconds(model, long), lambda: per_call(a_text(hasher, long), CALLS_MANY), asked
    )
    sizes = {
        "layers": asked.layers,
        "orders": model.config.engram_orders,
        "heads": 8,
        "rows_a_head": asked.rows,
        "tokens": [1, asked.tokens],
        "rounds": asked.rounds,
        "backbone_dtype": models.dtype_of(model),
    }
    return {"sizes": sizes, "measured": measured}


def hasher_of(model: EngramForCausalLM, rows: int) -> NgramHasher:
    """A hasher over the model's token map, with heads of the paper's size."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.engram_vocab_size, config.engram_hash_sha256 = rows, None
    return NgramHasher.from_config(config, model.memory.hashing.token_map)


def refuse_other_rows(hasher: NgramHasher, demo: NumpyHash, ids: torch.Tensor) -> None:
    """Raises CannotMeasure if the two procedures do not give the same integers: then their times say nothing."""
    theirs = demo(ids.numpy())
    for layer in hasher.layer_ids:
        if not np.array_equal(hasher.hash_ids(ids, layer).numpy(), theirs[layer]):
            raise CannotMeasure(f"the demo's procedure and ours give other hashes in layer {layer}.")
    step = a_step(hasher, ids[:, 2:3], hasher.compress(ids[:, :2]))
    decoded = torch.tensor(step())  # (layers, batch, orders * heads)
    if not torch.equal(decoded, a_text(hasher, ids[:, :3])()[:, :, 2].flatten(2)):
        raise CannotMeasure("a step of decoding gives other rows than the text.")


def a_text(hasher: NgramHasher, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What a forward pass over a text does between ids and rows `(layers, batch, length, orders, heads)`."""
    return lambda: hasher(hasher.compress(ids, None))


def a_step(hasher: NgramHasher, ids: torch.Tensor, history: torch.Tensor) -> Callable[[], list]:
    """What a step of decoding does between ids `(batch, 1)` and rows, after classes `(batch, N - 1)`."""
    before = history.tolist()
    return lambda: hasher.rows_of_texts(hasher.living_texts(ids.tolist(), before))


def per_call(work: Callable[[], object], calls: int) -> float:
    """Seconds of one call, over many."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def compare(
    ours: Callable[[], object], demo: NumpyHash, ids: torch.Tensor, calls: int, asked: argparse.Namespace
) -> dict:
    """Microseconds of both procedures, and how many times faster ours is."""
    array = ids.numpy()
    seconds = interleave(
        {
            "demo": lambda: per_call(lambda: demo(array), calls),
            "ours": lambda: per_call(ours, calls),
        },
        asked.rounds,
        limit_s=limit_seconds(asked) / 4,
    )
    return {
        "microseconds": {name: spread([1e6 * value for value in values]) for name, values in seconds.items()},
        "times_faster": spread(ratios(seconds["demo"], seconds["ours"])),
    }


@torch.no_grad()
def share(forward: Callable[[], float], hashing: Callable[[], float], asked: argparse.Namespace) -> dict:
    """Hashing's share of a forward pass, round by round."""
    seconds = interleave(
        {"forward": forward, "hash": hashing}, max(3, asked.rounds // 3), limit_s=limit_seconds(asked) / 4
    )
    return {
        "share": spread(ratios(seconds["hash"], seconds["forward"])),
        "forward_seconds": spread(seconds["forward"]),
    }


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("hash", measure, options(argv))


if __name__ == "__main__":
    start("hash", measure, options())
