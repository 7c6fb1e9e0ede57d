"""Decoding with tables of 100,000 to 1,000,000,000 rows: what a hundred times as many rows cost.

Every table has rows of 16 bytes, is read 32 rows a token, and is full of random bytes; the largest takes 16 GB. On disk
with a warm and with a cold page cache, and resident as far as a table fits into 60 % of the free RAM. Decoding feeds
the text's own next token, so that all sizes read the same n-grams.

Run: python -m benchmarks.scale
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import grafts, models, page_cache, passes
from .command import integers, limit_seconds, parser, run, say, start, whole_donor
from .compare import interleave, ratios, speeds, spread
from .room import refuse_without_room, workplace
from .text import real_ids


PROMPT = 64
HEADS_A_LAYER = 16
DTYPE = "bfloat16"

# Of the RAM that is free; a resident table beyond would push out what others need.
MOST_OF_FREE_RAM = 0.6


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--sizes", type=integers, default=[10**n for n in range(5, 10)], help="rows of all tables")
    made.add_argument("--head-dim", type=int, default=8, help="values in a row")
    made.add_argument("--tokens", type=int, default=32, help="tokens that are decoded")
    made.add_argument("--text", type=int, default=2048, help="tokens whose rows are read at once")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    donor = whole_donor(asked.donor)
    heads, row_bytes = len(asked.layers) * HEADS_A_LAYER, asked.head_dim * grafts.WIDTHS[DTYPE]
    parts = {"tables": sum(asked.sizes) * row_bytes}
    refuse_without_room(asked.work, {**parts, "copies of the donor": len(asked.sizes) * grafts.donor_bytes(donor)})
    with workplace(asked.work, "scale") as place:
        made = {}
        for size in sorted(asked.sizes):
            say(f"filling {size:,} rows, {size * row_bytes / 1e9:.2f} GB")
            rows = max(2, size // heads)
            made[size] = grafts.filled_graft(donor, place / str(size), asked.layers, rows, asked.head_dim, DTYPE)
        sizes = {"donor": donor.name, "tables": {str(size): grafts.describe(folder) for size, folder in made.items()}}
        measured = compare_sizes(asked, donor, made)
    return {"sizes": sizes | {"tokens_a_round": asked.tokens, "text_tokens": asked.text}, "measured": measured}


def compare_sizes(asked: argparse.Namespace, donor: Path, made: dict[int, Path]) -> dict:
    """Decoding and bare reading, all sizes and places taking turns."""
    ids = real_ids(models.tokenizer_of(donor), max(PROMPT + asked.tokens, asked.text))
    prompt, text = ids[:, :PROMPT], ids[:, PROMPT : PROMPT + asked.tokens]
    plain = models.load(donor)
    loaded = load_places(made)

    def decode(model: torch.nn.Module, files: list[Path]) -> Iterator[float]:
        page_cache.drop(files)
        yield from passes.decode(model, prompt, asked.tokens, text)

    warm = {"donor": lambda: decode(plain, [])}
    warm |= {name: (lambda model=model: decode(model, [])) for name, model in loaded.items()}
    cold = {
        name.replace("warm", "cold"): (
            lambda name=name, size=size: decode(loaded[name], grafts.memory_files(made[size]))
        )
        for name, size in ((on_disk(size), size) for size in made)
    }
    limit = limit_seconds(asked) / 3
    say(f"decoding: {', '.join(warm)}")
    warm_seconds = interleave(warm, asked.rounds, limit_s=limit)
    # Reading alone, where the noise of the backbone does not hide what a size costs.
    reading = interleave(
        {name: (lambda model=model: read_one_by_one(model, ids[:, : asked.tokens])) for name, model in loaded.items()},
        2 * asked.rounds,
        limit_s=limit,
    )
    at_once = interleave(
        {name: (lambda model=model: read_at_once(model, ids[:, : asked.text])) for name, model in loaded.items()},
        2 * asked.rounds,
        limit_s=limit,
    )
    # Last and apart: it drops what the warm ones have read.
    say("decoding, cold")
    cold_seconds = interleave({"donor": warm["donor"], **cold}, asked.rounds, warm_up=0, limit_s=limit)
    return {
        "decode": against_smallest(speeds(warm_seconds, "donor", asked.tokens), warm_seconds, made),
        "decode_cold": speeds(cold_seconds, "donor", asked.tokens),
        "reading_microseconds_a_token": {name: spread([1e6 * v for v in values]) for name, values in reading.items()},
        "reading_text_milliseconds": {name: spread([1e3 * v for v in values]) for name, values in at_once.items()},
    }


def on_disk(size: int) -> str:
    """Name of a way."""
    return f"{size:,} rows, on disk, warm"


def load_places(made: dict[int, Path]) -> dict[str, torch.nn.Module]:
    """Every size on disk, and resident where it fits."""
    loaded = {}
    for size, folder in made.items():
        loaded[on_disk(size)] = models.load(folder, placement="disk")
        files = grafts.memory_files(folder)
        if grafts.table_bytes(files) <= MOST_OF_FREE_RAM * free_ram():
            page_cache.warm(files)
            loaded[f"{size:,} rows, resident"] = models.load(folder, placement="device")
    return loaded


def free_ram() -> int:
    """Bytes that could be used without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def against_smallest(found: dict[str, dict], seconds: dict[str, list[float]], made: dict[int, Path]) -> dict:
    """Adds to every way how its time compares with the smallest table's in the same place."""
    smallest = f"{min(made):,} rows"
    for name in seconds:
        if name != "donor":
            same_place = smallest + name[name.index(" rows") + len(" rows") :]
            found[name]["times_the_smallest"] = spread(ratios(seconds[name], seconds[same_place]))
    return found


@torch.no_grad()
def read_one_by_one(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds to hash and read one token's rows of all layers, over a text."""
    begin = time.perf_counter()
    for number in range(ids.shape[1]):
        models.read_rows(model, ids[:, number : number + 1])
    return (time.perf_counter() - begin) / ids.shape[1]


@torch.no_grad()
def read_at_once(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds to hash and read the rows of a whole text."""
    begin = time.perf_counter()
    models.read_rows(model, ids)
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("scale", measure, options(argv))


if __name__ == "__main__":
    start("scale", measure, options())
