"""Tables that are away from the device: what their size costs, what crosses to a device, and how a file is best read.

- "sizes": decoding with tables of 100,000 to 1,000,000,000 rows of 16 bytes, resident (as far as they fit into 60 % of
  the free RAM) and on disk, the page cache warm and cold. Decoding feeds the text's own next token, so that all sizes
  read the same n-grams. Needs 18 GB of disk.
- "bytes": what one forward pass copies to the device for each placement, and for an ordinary embedding of the table's
  size under accelerate's `cpu_offload`. Counted exactly, on the tests' own device (tests/counting_device).
- "reading": ways to read rows out of a file, warm and cold: why rows on disk are read by position, after the kernel was
  told all places. 32 rows are one token of a memory, 65,536 are 2,048 tokens.

Run: python -m benchmarks.offload (--parts sizes,bytes,reading for some)
"""

import argparse
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import cpu_offload

from tests.counting_device import BuildFailed, NoCompiler, counted
from tests.counting_device import load as load_device

from . import grafts, models
from .command import CannotMeasure, integers, parser, refuse_without_room, say, start, target, whole_donor, workplace
from .compare import interleave, ratios, seconds_of, speeds, spread


DEVICE = "counting:0"

# Of the RAM that is free; a resident table beyond would push out what others need.
MOST_OF_FREE_RAM = 0.6
BYTES_HEAD_DIM, SIZES_HEAD_DIM, ROW_BYTES = 80, 8, 160


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--parts", default="sizes,bytes,reading", help="some of them")
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--sizes", type=integers, default=[10**n for n in range(5, 10)], help="rows of all tables")
    made.add_argument("--tokens", type=int, default=32, help="tokens that are decoded")
    made.add_argument("--rows", type=int, default=20_000, help="rows of a head for the bytes; 0.1 GB")
    made.add_argument("--passes", type=integers, default=[1, 128], help="tokens of a forward pass for the bytes")
    made.add_argument("--bytes", type=int, default=4 * 10**9, help="size of the file that is read")
    made.add_argument("--reads", type=integers, default=[32, 65_536], help="rows of one read")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark: one result for each part."""
    parts = {"sizes": compare_sizes, "bytes": count_bytes, "reading": compare_reading}
    for name in asked.parts.split(","):
        if name not in parts:
            raise ValueError(f"'{name}' is not a part of this benchmark: choose from {', '.join(parts)}.")
        with workplace(asked.work, name) as place:
            sizes, measured = parts[name](asked, place)
        yield "offload", sizes, {name: measured}


def compare_sizes(asked: argparse.Namespace, place: Path) -> tuple[dict, dict]:
    """Decoding with every size in every place, by turns."""
    donor, heads = whole_donor(asked.donor), len(asked.layers) * grafts.HEADS_A_LAYER
    ids = models.real_ids(donor, models.PROMPT + asked.tokens)
    prompt, text = ids[:, : models.PROMPT], ids[:, models.PROMPT :]
    loaded, files, about = {"donor": models.load(donor)}, {"donor": []}, {}
    for size in sorted(asked.sizes):
        rows = max(2, size // heads)
        folder = grafts.filled_graft(donor, place / str(size), asked.layers, rows, SIZES_HEAD_DIM)
        about[str(size)] = grafts.describe(folder)
        places = {"on disk, warm": "disk"}
        if about[str(size)]["table_bytes"] <= MOST_OF_FREE_RAM * free_ram():
            places["resident"] = "device"
        for name, placement in places.items():
            loaded[f"{size:,} rows, {name}"] = models.load(folder, placement=placement)
            files[f"{size:,} rows, {name}"] = grafts.table_files(folder)

    def decode(name: str, cold: bool) -> Iterator[float]:
        if cold:
            grafts.drop(files[name])
        yield from models.decode(loaded[name], prompt, asked.tokens, text)

    say(f"decoding: {', '.join(loaded)}")
    limit = 60 * asked.minutes / 2
    warm = interleave({name: (lambda n=name: decode(n, False)) for name in loaded}, asked.rounds, limit_s=limit)
    # Last and apart, because it drops what the warm ones have read.
    ways = {n.replace("warm", "cold"): (lambda n=n: decode(n, True)) for n in loaded if "resident" not in n}
    cold = interleave(ways, asked.rounds, warm_up=0, limit_s=limit)
    found = speeds(warm, "donor", asked.tokens)
    for name in set(loaded) - {"donor"}:
        smallest = f"{min(asked.sizes):,} rows, {name.partition(' rows, ')[2]}"
        found[name]["times_the_smallest"] = spread(ratios(warm[name], warm[smallest]))
    largest = f"{max(asked.sizes):,} rows, on disk, warm"
    target(f"{largest}, times the smallest", found[largest]["times_the_smallest"]["median"], at_most=1.05)
    sizes = {"tables": about, "row_bytes": SIZES_HEAD_DIM * 2, "reads_a_token": heads, "tokens_a_round": asked.tokens}
    return sizes, {"decode": found, "decode_cold": speeds(cold, "donor", asked.tokens)}


def free_ram() -> int:
    """Bytes that could be used without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


@torch.no_grad()
def count_bytes(asked: argparse.Namespace, place: Path) -> tuple[dict, dict]:
    """Bytes and copies to the device in one forward pass; every placement must give the same logits."""
    donor = whole_donor(asked.donor)
    try:
        load_device()
    except (NoCompiler, BuildFailed) as error:
        raise CannotMeasure(f"bytes are counted by a device that has to be compiled: {error}") from error
    graft = grafts.filled_graft(donor, place / "graft", asked.layers, asked.rows, BYTES_HEAD_DIM)
    sizes = grafts.describe(graft)
    whole_table = torch.nn.Embedding(sizes["rows"], BYTES_HEAD_DIM, dtype=torch.bfloat16)
    cpu_offload(whole_table, execution_device=torch.device(DEVICE))
    placed = {}
    for placement in ("device", "cpu", "disk"):
        placed[placement] = models.load(graft, placement="device").to(DEVICE).place_memory(placement)
    measured = {}
    for tokens in asked.passes:
        ids = models.real_ids(donor, tokens).to(DEVICE)
        asks = tokens * len(asked.layers) * grafts.HEADS_A_LAYER
        ways, logits = {}, {}
        for name, model in placed.items():
            model(input_ids=ids, use_cache=False)
            with counted() as count:
                logits[name] = model(input_ids=ids, use_cache=False).logits
            ways[f'table on "{name}"'] = {"bytes": count.h2d, "copies": count.h2d_copies}
            if not torch.allclose(logits[name].cpu(), logits["device"].cpu(), atol=1e-4, rtol=1e-4):
                raise CannotMeasure(f'a table on "{name}" gives other logits than one on the device.')
        with counted() as count:
            whole_table(torch.zeros(1, asks, dtype=torch.long, device=DEVICE))
        ways["accelerate's `cpu_offload` of an embedding"] = {"bytes": count.h2d, "copies": count.h2d_copies}
        for entry in ways.values():
            entry["of_rows_read"] = round(entry["bytes"] / (asks * sizes["row_bytes"]), 4)
        target(f"{tokens} tokens, bytes a byte of rows", ways['table on "disk"']["of_rows_read"], at_most=1.05)
        measured[f"{tokens:,} token{'s' if tokens > 1 else ''}"] = {"ways": ways}
    return sizes, measured


def mapped(file: int, rows: np.ndarray, out: np.ndarray) -> None:
    """Gathers from a mapping, as safetensors makes it: the kernel faults page by page."""
    whole_file = np.frombuffer(mmap.mmap(file, 0, prot=mmap.PROT_READ), np.uint8)
    np.take(whole_file[: len(whole_file) // ROW_BYTES * ROW_BYTES].reshape(-1, ROW_BYTES), rows, axis=0, out=out)


def positioned(file: int, rows: np.ndarray, out: np.ndarray, told: bool = False) -> None:
    """Reads by position, one `preadv` a row; `told` tells the kernel all places before."""
    for row in rows.tolist() if told else ():
        os.posix_fadvise(file, row * ROW_BYTES, ROW_BYTES, os.POSIX_FADV_WILLNEED)
    for row, place in zip(rows.tolist(), out, strict=True):
        os.preadv(file, [place], row * ROW_BYTES)


READS = {"mapped gather": mapped, "preadv": positioned, "told, then preadv": partial(positioned, told=True)}


def compare_reading(asked: argparse.Namespace, place: Path) -> tuple[dict, dict]:
    """Microseconds a row of every way, warm and cold; random rows in ascending order."""
    refuse_without_room(asked.work, {"file of rows": asked.bytes})
    random, path = np.random.default_rng(0), place / "rows"
    path.touch()
    file = os.open(path, os.O_RDWR)
    for begin in range(0, asked.bytes, grafts.BLOCK):
        size = min(grafts.BLOCK, asked.bytes - begin)
        grafts.write_all(file, grafts.random_block(random, size, "BF16"), begin)

    def once(way: Callable, reads: int, cold: bool) -> float:
        rows, out = np.sort(random.integers(0, asked.bytes // ROW_BYTES, reads)), np.zeros((reads, ROW_BYTES), np.uint8)
        if cold:
            grafts.drop([path])
        else:
            way(file, rows, out)
        return 1e6 / reads * seconds_of(lambda: way(file, rows, out))

    measured: dict[str, dict] = {}
    for reads in asked.reads:
        found = measured.setdefault(f"{reads:,} rows", {name: {} for name in READS})
        for state in ("warm", "cold"):
            say(f"{reads:,} rows, {state}")
            ways = {name: (lambda w=way: once(w, reads, state == "cold")) for name, way in READS.items()}  # noqa: B023
            for name, values in interleave(ways, 4 * asked.rounds, limit_s=15 * asked.minutes).items():
                found[name][state] = spread(values)
    os.close(file)
    return {"file_bytes": asked.bytes, "row_bytes": ROW_BYTES}, measured


if __name__ == "__main__":
    start(measure, options())
