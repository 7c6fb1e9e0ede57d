"""The processes that `big` measures in, under a cap on their memory: one line of JSON each.

Promises: nothing is timed but the load, the prefill or the decoding itself; the table's files are dropped from the page
cache before everything that is called cold, and how much of them was cached then is measured.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from . import grafts, models, page_cache, passes
from .compare import interleave, speeds, timed
from .text import real_ids


PROMPT = 64


def memory_held() -> dict[str, int]:
    """Bytes of this process's memory: anonymous, and pages of files that it has mapped and touched."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {ours: 1024 * int(fields[theirs].split()[0]) for ours, theirs in names.items()}


def load(asked: argparse.Namespace) -> dict:
    """Seconds to load one checkpoint, and what is held then."""
    config = AutoConfig.from_pretrained(asked.folder)
    # Transformers imports a model's code when it is first asked for: once, before the clock runs, for both sides.
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(getattr(config, "text_config", config))
    kept = []
    seconds = timed(lambda: kept.append(models.load(asked.folder, placement=asked.placement)))()
    return {"load_seconds": seconds, **memory_held()}


class Sides:
    """The three models that take turns, and the texts they read.

    Args:
        asked (`argparse.Namespace`): folders and sizes.
    """

    def __init__(self, asked: argparse.Namespace):
        self.donor = models.load(asked.donor)
        self.small = models.load(asked.small, placement="device")
        self.big = models.load(asked.big, placement="disk")
        self.files = grafts.memory_files(asked.big)
        page_cache.warm(grafts.memory_files(asked.small))
        self.cached_shares: list[float | None] = []
        self.ids = real_ids(models.tokenizer_of(asked.donor), max(asked.tokens, PROMPT + asked.decoded))

    def drop(self) -> None:
        """Makes the big table cold."""
        page_cache.drop(self.files)
        self.cached_shares.append(page_cache.cached_share(self.files))

    def cached_share(self) -> float | None:
        """The most of the big table that was in the page cache when it was called cold."""
        known = [share for share in self.cached_shares if share is not None]
        return max(known) if known else None


def prefill(asked: argparse.Namespace) -> dict:
    """Reading a text at once. The big table is read cold, then warm, in every round: so warm is always after cold."""
    sides = Sides(asked)
    text = sides.ids[:, : asked.tokens]
    cold: list[float] = []

    def big() -> float:
        sides.drop()
        cold.append(passes.prefill_seconds(sides.big, text))
        return passes.prefill_seconds(sides.big, text)

    seconds = interleave(
        {
            "donor": lambda: passes.prefill_seconds(sides.donor, text),
            "resident": lambda: passes.prefill_seconds(sides.small, text),
            "on disk, warm": big,
        },
        asked.rounds,
    )
    seconds["on disk, cold"] = cold[-len(seconds["donor"]) :]
    return figures(seconds, asked.tokens, sides)


def decode(asked: argparse.Namespace) -> dict:
    """Decoding; every model is fed the text's own next token, so that all of them read the same new n-grams."""
    sides = Sides(asked)
    prompt, text = sides.ids[:, :PROMPT], sides.ids[:, PROMPT : PROMPT + asked.decoded]

    def tokens(model: torch.nn.Module) -> Iterator[float]:
        return passes.decode(model, prompt, asked.decoded, text)

    def cold() -> Iterator[float]:
        sides.drop()
        yield from tokens(sides.big)

    warm_ways = {
        "donor": lambda: tokens(sides.donor),
        "resident": lambda: tokens(sides.small),
        "on disk, warm": lambda: tokens(sides.big),
    }
    seconds = interleave(warm_ways, asked.rounds)
    # Apart, because a cold side would drop what the warm one has read. Half the rounds: each reads every row anew.
    apart = {"donor": warm_ways["donor"], "resident": warm_ways["resident"], "on disk, cold": cold}
    cold_seconds = interleave(apart, max(3, asked.rounds // 2), warm_up=0)
    return {**figures(seconds, asked.decoded, sides), "cold": figures(cold_seconds, asked.decoded, sides)}


def figures(seconds: dict[str, list[float]], tokens: int, sides: Sides) -> dict:
    """Speeds against the donor and against the resident table, and what was held."""
    found = {
        "speeds": speeds(seconds, "donor", tokens),
        "against_resident": {
            name: entry["speed_ratio"] for name, entry in speeds(seconds, "resident", tokens).items() if "disk" in name
        },
        "held_bytes": memory_held(),
    }
    if sides.cached_shares:
        found["cached_share_when_cold"] = sides.cached_share()
    return found


def main() -> None:
    """Runs one of the three and prints its line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["load", "prefill", "decode"])
    for name in ("folder", "donor", "small", "big"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--placement", default=None)
    for name in ("tokens", "decoded", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    print(json.dumps({"load": load, "prefill": prefill, "decode": decode}[asked.what](asked)))


if __name__ == "__main__":
    main()
