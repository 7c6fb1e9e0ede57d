"""Forward passes, generation and training steps compared with engram-peft 1.2.7, which also gives a model an Engram.

Each side has its own process with a plain backbone in it, tables of equal size, the same prompts, float32
(training in bfloat16 by autocast); the processes take turns. pip installs engram-peft into an environment that is made
for the run and deleted after it, and sees this environment's torch and transformers. Both memories add nothing (their
values are zero, ours next to zero), so that every side generates the backbone's own tokens.

Run: python -m benchmarks.peer
"""

import argparse
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import torch

from . import grafts
from .command import CannotMeasure, parser, refuse_without_room, say, start, target, whole_donor, workplace
from .compare import ratios, spread
from .side import Side, take_turns
from .training import job_of, seconds_of_steps, training_options


PACKAGE = "engram-peft==1.2.7"

# Of the environment without torch and transformers, and pip's own copies meanwhile.
ENVIRONMENT_BYTES = 10**9


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = training_options(parser(__doc__, rounds=8))
    made.add_argument("--prompt", type=int, default=64, help="tokens before generating")
    made.add_argument("--generated", type=int, default=32, help="tokens that are generated")
    made.add_argument("--environment", type=Path, help="Python of an environment in which engram-peft is installed")
    return made.parse_args(argv)


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark."""
    donor = whole_donor(asked.donor).resolve()
    refuse_without_room(asked.work, {"environment": ENVIRONMENT_BYTES})
    with workplace(asked.work, "peer") as place:
        python = asked.environment or environment(place / "environment")
        shape = (asked.layers, asked.rows, asked.head_dim, "float32")
        graft = grafts.filled_graft(donor, place / "graft", *shape, engram_value_initializer_range=1e-9)
        job = job_of(asked, donor, graft) | {"prompt": asked.prompt, "generated": asked.generated}
        measured: dict[str, dict] = {}
        for work in ("forward", "generate"):
            say(work)
            sides = {"ours": Side("memory", job, place), "theirs": Side("theirs", job, place, python)}
            same: list[bool] = []

            def times(answer: dict, same: list[bool] = same) -> float:
                same.append(answer["same"])
                return answer["memory"] / answer["donor"]

            found, _ = take_turns(sides, work, times, asked.rounds, 20 * asked.minutes)
            measured[work] = {
                "times_the_donor": {side: spread(values) for side, values in found.items()},
                "theirs_over_ours": spread(ratios(found["theirs"], found["ours"])),
                "same_as_the_donor": all(same),
            }
        sides = {
            "ours": Side("memory", job, place),
            "ours on disk": Side("memory", {**job, "placement": "disk"}, place),
            "theirs": Side("theirs", job, place, python),
        }
        seconds, held = seconds_of_steps(asked, sides)
        measured["step"] = {
            "theirs_over_ours": spread(ratios(seconds["theirs"], seconds["ours"])),
            "theirs_over_ours_on_disk": spread(ratios(seconds["theirs"], seconds["ours on disk"])),
            "sides": {name: {"seconds": spread(seconds[name]), **held[name]} for name in sides},
        }
        sizes = {**grafts.describe(graft), **{name: getattr(asked, name) for name in ("batch", "length", "generated")}}
    yield "peer", {**sizes, "peer": PACKAGE}, measured
    target("engram-peft's step, times ours", measured["step"]["theirs_over_ours"]["median"], at_least=1.0)


def environment(folder: Path) -> Path:
    """Makes an environment with engram-peft in it; its Python. Raises [`CannotMeasure`] if pip cannot install it."""
    say(f"installing {PACKAGE}")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # The same torch and transformers for both sides, and no second download of them.
    (packages / "alongside.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise CannotMeasure(f"pip could not install {PACKAGE}:\n{done.stderr.strip()[-1500:]}")
    return python


if __name__ == "__main__":
    start(measure, options())
