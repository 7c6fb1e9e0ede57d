"""The command line that all benchmarks share: `python -m benchmarks.<name>`.

Promises: one line of JSON on stdout, the same line added to the results; progress and errors on stderr; exit 2 with a
message, and no traceback, where a donor, disk room or a permission is missing. A signal to stop ends the run like
Ctrl-C, so that what it made is deleted.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from . import record


WORK = Path("runs/benchmarks")
WHOLE_DONOR = ("config.json", "tokenizer_config.json")


class CannotMeasure(RuntimeError):
    """Something that a benchmark needs is not to be had here; the message says what."""


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark; each adds its own."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    made.add_argument(
        "--donor",
        type=Path,
        default=Path(os.environ.get("ENGRAM_DONOR", "runs/donor")),
        help="folder of the donor; ENGRAM_DONOR, or what `make donor` makes",
    )
    made.add_argument("--work", type=Path, default=WORK, help="where grafts are made and deleted")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="where the line is added")
    made.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    made.add_argument("--threads", type=int, default=record.cores(), help="threads of torch; all cores by default")
    made.add_argument("--minutes", type=float, default=None, help="begin no further round after so long")
    return made


def run(name: str, measure: Callable[[argparse.Namespace], dict], options: argparse.Namespace) -> dict:
    """Measures, prints the line and adds it to the results.

    Args:
        name (`str`): of the benchmark and of its results file.
        measure (`Callable`): takes the options, returns `{"sizes": ..., "measured": ...}`.
        options (`argparse.Namespace`): from `parser`.

    Returns:
        `dict`: the line.
    """
    begun = time.monotonic()
    with stopped_by_signals():
        options.work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(options.threads)
        logging.disable_progress_bar()
        outcome = measure(options)
    outcome["sizes"] = {"threads": options.threads, **outcome["sizes"]}
    result = record.line(name, **outcome, folder=options.work, seconds=time.monotonic() - begun)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    say(f"added to {record.append(result, options.results)}")
    return result


def start(
    name: str,
    measure: Callable[[argparse.Namespace], dict],
    options: argparse.Namespace,
    interrupted: str = "what it had made is deleted",
) -> None:
    """`run` for the command line: what a user can cause is a message."""
    with told(name, interrupted):
        run(name, measure, options)


@contextmanager
def told(name: str, interrupted: str) -> Iterator[None]:
    """Turns what a user can cause into a message and an exit status."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"{name}: interrupted; {interrupted}")
        sys.exit(130)
    except (OSError, ValueError, CannotMeasure) as error:
        say(f"error: {type(error).__name__}: {error}")
        sys.exit(2)


class stopped_by_signals:
    """While the block runs, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, as Ctrl-C does."""

    def __enter__(self) -> None:
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGHUP):
            try:
                self.before[number] = signal.signal(number, interrupt)
            except ValueError:  # not the main thread: whoever runs us there has handlers of their own
                return

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame) -> None:
    """A signal handler."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def limit_seconds(options: argparse.Namespace) -> float:
    """`--minutes` for `interleave`."""
    return float("inf") if options.minutes is None else options.minutes * 60


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def whole_donor(folder: Path) -> Path:
    """The donor's folder.

    Raises:
        `FileNotFoundError`: if there is none.
    """
    if not all((folder / name).is_file() for name in WHOLE_DONOR) or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"'{folder}' is no donor: run `make donor`, or name a folder with weights and tokenizer with --donor or "
            "ENGRAM_DONOR."
        )
    return folder


def integers(text: str) -> list[int]:
    """A list such as "1,14"."""
    return [int(part) for part in text.split(",")]
