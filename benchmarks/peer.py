"""Forward passes and generation beside engram-peft 1.2.7, the other package that gives a Hugging Face model an Engram.

Each side lives in a process of its own with a plain donor beside it, over tables of equal size, on the same prompts,
float32; the two processes take turns. engram-peft is installed by pip into an environment that is made for the run and
deleted after it, and sees this environment's torch and transformers. Both memories are set to add nothing (their values
are zero, their rows are not), so that every side generates the donor's own tokens.

Run: python -m benchmarks.peer
"""

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import torch

from . import grafts, models
from .command import CannotMeasure, integers, limit_seconds, parser, run, say, start, whole_donor
from .compare import interleave, ratios, spread
from .record import ROOT
from .room import refuse_without_room, workplace
from .text import real_ids


PACKAGE = "engram-peft==1.2.7"

# Of the environment without torch and transformers (measured: 0.3 GB), and pip's own copies meanwhile.
ENVIRONMENT_BYTES = 10**9

SIDES = {"ours": "this package", "theirs": PACKAGE}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=8)
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--head-dim", type=int, default=80, help="values in a row")
    made.add_argument("--rows", type=int, default=50_000, help="rows of a head; 0.5 GB by default")
    made.add_argument("--prompt", type=int, default=64, help="tokens before generating")
    made.add_argument("--generated", type=int, default=32, help="tokens that are generated")
    made.add_argument("--forward", type=int, default=512, help="tokens of the forward pass")
    made.add_argument("--environment", type=Path, help="one in which engram-peft is installed, to use in place of ours")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> dict:
    """The benchmark."""
    donor = whole_donor(asked.donor).resolve()
    tables = asked.rows * 16 * len(asked.layers) * asked.head_dim * grafts.WIDTHS["float32"]
    if asked.environment is None:
        refuse_without_room(asked.work, {"environment": ENVIRONMENT_BYTES})
    with workplace(asked.work.resolve(), "peer") as place:
        pythons = {"ours": sys.executable, "theirs": asked.environment or environment(place / "environment")}
        ids = real_ids(models.tokenizer_of(donor), max(asked.forward, asked.prompt))
        job = {
            **{name: getattr(asked, name) for name in ("layers", "head_dim", "rows", "generated", "threads", "prompt")},
            "donor": str(donor),
            "forward": ids[0, : asked.forward].tolist(),
        }
        (place / "job.json").write_text(json.dumps(job))
        processes = {}
        try:
            for side, python in pythons.items():
                processes[side] = Side(side, str(python), place)
            about = {side: process.about for side, process in processes.items()}
            measured = {work: compare(processes, work, asked) for work in ("forward", "generate")}
        finally:
            for process in processes.values():
                process.end()
    sizes = {
        "donor": donor.name,
        "dtype": "float32",
        "table_bytes": tables,
        "forward_tokens": asked.forward,
        "prompt_tokens": asked.prompt,
        "generated_tokens": asked.generated,
        "sides": about,
    }
    return {"sizes": sizes, "measured": measured}


def environment(folder: Path) -> Path:
    """Makes an environment with engram-peft in it; its Python.

    Raises:
        [`CannotMeasure`]: if pip cannot install it.
    """
    say(f"installing {PACKAGE}")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # The same torch and transformers for both sides, and no second download of them.
    (packages / "alongside.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise CannotMeasure(f"pip could not install {PACKAGE}:\n{done.stderr.strip()[-1500:]}")
    return python


class Side:
    """A process with a donor and a memory, which runs what it is told line by line.

    Args:
        name (`str`): "ours" or "theirs".
        python (`str`): its interpreter.
        place (`Path`): where its job and its errors are.
    """

    def __init__(self, name: str, python: str, place: Path):
        self.name, self.errors = name, place / f"{name}.log"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peer_side", name, str(place / "job.json")],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.about = self.answer()

    def ask(self, work: str, donor_first: bool) -> dict[str, float]:
        """Seconds of donor and memory, one after the other."""
        self.process.stdin.write(json.dumps([work, donor_first]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        """The next line that is an answer; packages print lines of their own."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise CannotMeasure(f"{SIDES[self.name]} failed:\n{self.errors.read_text()[-2000:]}")

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def compare(processes: dict[str, Side], work: str, asked: argparse.Namespace) -> dict:
    """Each side against the donor in its own process, and the two sides by these ratios."""
    say(work)
    seconds: dict[str, list[dict]] = {side: [] for side in processes}

    def way(side: str) -> Callable[[], float]:
        def once() -> float:
            answer = processes[side].ask(work, len(seconds[side]) % 2 == 0)
            seconds[side].append(answer)
            return answer["memory"] / answer["donor"]

        return once

    against_donor = interleave({side: way(side) for side in processes}, asked.rounds, limit_s=limit_seconds(asked) / 2)
    counted = {side: entries[-len(against_donor[side]) :] for side, entries in seconds.items()}
    return {
        "times_the_donor": {side: spread(values) for side, values in against_donor.items()},
        "theirs_over_ours": spread(ratios(against_donor["theirs"], against_donor["ours"])),
        "seconds": {
            side: {name: spread([entry[name] for entry in entries]) for name in ("donor", "memory")}
            for side, entries in counted.items()
        },
    }


def main(argv: list[str] | None = None) -> dict:
    """Measures and returns the line."""
    return run("peer", measure, options(argv))


if __name__ == "__main__":
    start("peer", measure, options())
