"""The command line that all benchmarks share: `python -m benchmarks.<name>`.

Promises: one line of JSON on stdout for each result, the same line added to the results; progress, targets and errors
on stderr; exit 2 with a message where a model, disk space or a permission is missing. What a run makes is deleted when
it ends, fails or is stopped by a signal; what a killed run left is deleted by the next one.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from . import record


WORK = Path("runs/benchmarks")

# Most that a benchmark may write to a disk, and what it leaves free for others.
MOST_BYTES, SPARE_BYTES = 50 * 10**9, 2 * 10**9
PREFIX = "made-by-"


class CannotMeasure(RuntimeError):
    """Something that a benchmark needs is missing; the message says what."""


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark; each adds its own."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    donor = Path(os.environ.get("ENGRAM_DONOR", "runs/donor"))
    made.add_argument("--donor", type=Path, default=donor, help="folder of the backbone; `make donor` makes one")
    made.add_argument("--work", type=Path, default=WORK, help="where checkpoints are made and deleted")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the files of results")
    made.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    made.add_argument("--threads", type=int, default=record.cores(), help="threads of torch; all cores by default")
    made.add_argument("--minutes", type=float, default=float("inf"), help="start no further round after this time")
    return made


def run(measure: Callable[[argparse.Namespace], Iterator[tuple[str, dict, dict]]], asked: argparse.Namespace) -> list:
    """Prints a line for each result (name, sizes, measurements), adds it to the results, and returns all lines."""
    torch.set_num_threads(asked.threads)
    logging.disable_progress_bar()
    asked.work.mkdir(parents=True, exist_ok=True)
    lines, begun = [], time.monotonic()
    for name, sizes, measured in measure(asked):
        sizes = {"threads": asked.threads, "donor": asked.donor.name, **sizes}
        lines.append(record.line(name, sizes, measured, asked.work, time.monotonic() - begun))
        print(json.dumps(lines[-1], ensure_ascii=False), flush=True)
        say(f"added to {record.append(lines[-1], asked.results / f'{name}.jsonl')}")
        begun = time.monotonic()
    return lines


def start(measure: Callable, asked: argparse.Namespace) -> None:
    """`run` for the command line: a missing requirement is a message and not a traceback."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, so that what was made is deleted
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        run(measure, asked)
    except (OSError, ValueError, CannotMeasure) as error:
        say(f"error: {type(error).__name__}: {error}")
        sys.exit(2)


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def target(name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> bool:
    """Says whether a measurement reaches what it aims at; the pages for users show measurements alone."""
    good = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    limit = f"at least {at_least:g}" if at_most is None else f"at most {at_most:g}"
    say(f"target, {name}: {value:.4g}, {limit}: {'reached' if good else 'MISSED'}")
    return good


def whole_donor(folder: Path) -> Path:
    """The folder of the backbone; FileNotFoundError if it does not hold a model with its tokenizer."""
    names = ("config.json", "tokenizer_config.json")
    if not all((folder / name).is_file() for name in names) or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"'{folder}' does not hold weights and a tokenizer: run `make donor`, or name a folder that does with "
            "--donor or ENGRAM_DONOR."
        )
    return folder


def integers(text: str) -> list[int]:
    """A list such as "1,14"."""
    return [int(part) for part in text.split(",")]


def refuse_without_room(folder: Path, parts: Mapping[str, int]) -> None:
    """Raises OSError, with the sum, if files of these sizes do not fit on the disk of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(folder).free, sum(parts.values())
    if need > min(MOST_BYTES, free - SPARE_BYTES):
        listed = " + ".join(f"{size / 1e9:.2f} GB {name}" for name, size in parts.items())
        raise OSError(
            f"{listed} = {need / 1e9:.2f} GB are needed in '{folder}', where {free / 1e9:.2f} GB are free (2 GB stay "
            "free, and 50 GB are the most). Make room, ask for fewer rows, or name a larger disk with --work."
        )


@contextmanager
def workplace(work: Path, name: str) -> Iterator[Path]:
    """An empty folder that lasts as long as the block; folders of killed runs are deleted first."""
    for left in work.glob(f"{PREFIX}*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = work.resolve() / f"{PREFIX}{os.getpid()}-{name}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
