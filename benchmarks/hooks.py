"""Bytes and time of a forward pass when the table is not on the device: accelerate's own hooks against ours.

Accelerate brings a module's whole table to the device in every pass; `attach_memory_offload` brings rows. Bytes are
counted by the tests' own accelerator (tests/counting_device), which is ordinary memory behind PyTorch's PrivateUse1
key: bytes and copies are exact, seconds are those of copying within RAM, which no bus makes slower.

Run: python -m benchmarks.hooks
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import cpu_offload, dispatch_model

from engram_transformers import attach_memory_offload
from tests.counting_device import BuildFailed, NoCompiler, counted
from tests.counting_device import load as load_device

from . import grafts, models
from .command import CannotMeasure, integers, limit_seconds, parser, run, say, start, whole_donor
from .compare import interleave, ratios, spread
from .room import refuse_without_room, workplace
from .text import real_ids


DEVICE = "counting:0"
CONTROL = "table on the device"


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=6)
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--rows", type=int, default=20_000, help="rows of a head; a table of 0.1 GB by default")
    made.add_argument("--tokens", type=integers, default=[1, 128], help="tokens of a forward pass")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    donor = whole_donor(asked.donor)
    try:
        load_device()
    except (NoCompiler, BuildFailed) as error:
        raise CannotMeasure(f"bytes are counted by a device that has to be compiled: {error}") from error
    row_bytes = asked.head_dim * grafts.WIDTHS["bfloat16"]
    table = asked.rows * 16 * len(asked.layers) * row_bytes
    parts = {"table": table, "accelerate's copy of it": table, "copy of the donor": grafts.donor_bytes(donor)}
    refuse_without_room(asked.work, parts)
    ids = real_ids(models.tokenizer_of(donor), max(asked.tokens))
    with workplace(asked.work, "hooks") as place:
        graft = grafts.filled_graft(donor, place / "graft", asked.layers, asked.rows, asked.head_dim, "bfloat16")
        say("placing the models")
        placed = {name: make(graft, place / "offloaded") for name, make in WAYS.items()}
        measured = {}
        for tokens in asked.tokens:
            say(f"{tokens} token(s)")
            text = ids[:, :tokens]
            unique = unique_row_bytes(placed[CONTROL], text, row_bytes)
            measured[f"{tokens} tokens"] = compare(placed, text, unique, asked)
        sizes = {"donor": donor.name, **grafts.describe(graft), "tokens": asked.tokens}
        del placed
    return {"sizes": sizes, "measured": measured}


def on_device(graft: Path, folder: Path) -> torch.nn.Module:
    """The control: everything is on the device."""
    return models.load(graft, placement="device").to(DEVICE)


def whole_tables(model: torch.nn.Module) -> torch.nn.Module:
    """Leaves a memory to accelerate, as any other module: ours takes tables over from its hooks by itself."""
    model.memory.settle = lambda: None
    return model


def offloaded(graft: Path, folder: Path, rows: bool) -> torch.nn.Module:
    """`cpu_offload`: every weight of the model waits on the host."""
    model = models.load(graft, placement="device")
    if rows:
        attach_memory_offload(model, "cpu", execution_device=DEVICE)
    else:
        whole_tables(model)
    return cpu_offload(model, execution_device=torch.device(DEVICE))


def dispatched(graft: Path, folder: Path, place: str, rows: bool) -> torch.nn.Module:
    """`dispatch_model`: the tables wait on the host or on disk, everything else is on the device."""
    model = models.load(graft, placement="device")
    if rows:
        attach_memory_offload(model, place, execution_device=DEVICE)
    else:
        whole_tables(model)
    device_map = dict.fromkeys(("backbone", "memory.hashing", "memory.layers"), DEVICE) | {"memory.tables": place}
    return dispatch_model(model, device_map, main_device=DEVICE, offload_dir=str(folder), force_hooks=True)


WAYS: dict[str, Callable[[Path, Path], torch.nn.Module]] = {
    CONTROL: on_device,
    "cpu_offload, accelerate": lambda graft, folder: offloaded(graft, folder, rows=False),
    "cpu_offload, ours": lambda graft, folder: offloaded(graft, folder, rows=True),
    "dispatch_model to cpu, accelerate": lambda graft, folder: dispatched(graft, folder, "cpu", rows=False),
    "dispatch_model to cpu, ours": lambda graft, folder: dispatched(graft, folder, "cpu", rows=True),
    "dispatch_model to disk, accelerate": lambda graft, folder: dispatched(graft, folder, "disk", rows=False),
    "dispatch_model to disk, ours": lambda graft, folder: dispatched(graft, folder, "disk", rows=True),
}


@torch.no_grad()
def unique_row_bytes(model: torch.nn.Module, ids: torch.Tensor, row_bytes: int) -> int:
    """Bytes of the different rows that a text reads: the least that has to cross."""
    hashing = model.memory.hashing
    rows = hashing(hashing.compress(ids.to(DEVICE), None), None).cpu()  # (layers, batch, length, orders, heads)
    return sum(row_bytes * len(torch.unique(layer[:, :, order])) for layer in rows for order in range(layer.shape[-2]))


def dense_bytes(model: torch.nn.Module) -> int:
    """Bytes of everything in a memory that is neither table nor hash."""
    return sum(parameter.nbytes for parameter in model.memory.layers.parameters())


@torch.no_grad()
def compare(placed: dict[str, torch.nn.Module], text: torch.Tensor, unique: int, asked: argparse.Namespace) -> dict:
    """Bytes, copies and seconds of every way; all must give the control's logits."""
    ids = text.to(DEVICE)
    crossed, logits = {}, {}
    for name, model in placed.items():
        model(input_ids=ids, use_cache=False)
        with counted() as count:
            out = model(input_ids=ids, use_cache=False).logits
        with model.disable_memory(), counted() as plain:
            model(input_ids=ids, use_cache=False)
        # `cpu_offload` also brings the projections of the memory, and its norms and convolutions.
        dense = dense_bytes(placed[CONTROL]) if name.startswith("cpu_offload") else 0
        for_rows = count.h2d - plain.h2d - dense
        crossed[name] = {
            "h2d_bytes": count.h2d,
            "h2d_copies": count.h2d_copies,
            "h2d_bytes_for_rows": for_rows,
            "times_unique_rows": round(for_rows / unique, 4),
            "peak_device_bytes": count.peak,
        }
        logits[name] = out.cpu()
    for name, found in logits.items():
        if not torch.allclose(found, logits[CONTROL], atol=1e-4, rtol=1e-4):
            raise CannotMeasure(f"'{name}' gives other logits than a table on the device: its bytes say nothing.")
    seconds = interleave(
        {name: (lambda model=model: forward_seconds(model, ids)) for name, model in placed.items()},
        asked.rounds,
        limit_s=limit_seconds(asked) / len(asked.tokens),
    )
    return {
        "unique_row_bytes": unique,
        "ways": {
            name: {
                **crossed[name],
                "seconds": spread(values),
                "times_the_control": spread(ratios(values, seconds[CONTROL])),
            }
            for name, values in seconds.items()
        },
    }


def forward_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds of one forward pass; the device does everything at once, so there is nothing to wait for."""
    begin = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("hooks", measure, options(argv))


if __name__ == "__main__":
    start("hooks", measure, options())
