"""A table of 40 GB on disk, in processes that may have 6 GB: load time, memory, prefill and decoding.

Every byte of the table is written and random. Loading is compared with the backbone's own, in fresh processes that
take turns; reading with the same model over a resident table of 1 GB and with the backbone. "Cold" is after the table's
files were dropped from the page cache. The limit is a control group of the kernel (version 1 or 2, usually as root),
and counts the page cache; without one nothing is measured.

Run: python -m benchmarks.big, or `make bench-long` (42 GB of disk)
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from . import grafts, models
from .command import CannotMeasure, integers, parser, say, start, target, whole_donor, workplace
from .compare import interleave, ratios, seconds_of, speeds, spread
from .record import ROOT
from .side import anonymous


HEAD_DIM = 80

# Version of the control groups, the file that shows it, and the names of the limit and the peak of a group.
GROUPS = (
    (2, Path("/sys/fs/cgroup/cgroup.controllers"), "memory.max", "memory.peak"),
    (1, Path("/sys/fs/cgroup/memory/memory.stat"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark."""
    made = parser(__doc__, rounds=6)
    made.add_argument("--bytes", type=int, default=40_100_000_000, help="size of the table on disk")
    made.add_argument("--resident-bytes", type=int, default=10**9, help="size of the resident table")
    made.add_argument("--cap", type=int, default=6 * 10**9, help="memory that the measuring processes may have")
    made.add_argument("--layers", type=integers, default=[1, 14], help="Engram layers, from 0")
    made.add_argument("--tokens", type=int, default=2048, help="tokens of the text that is read at once")
    made.add_argument("--decoded", type=int, default=256, help="tokens that are decoded")
    made.add_argument("--inside", nargs=2, help="what a measuring process does, and with which folder (internal)")
    return made.parse_args(argv)


@contextmanager
def memory_group(size: int) -> Iterator[tuple[int, Path, Path]]:
    """A control group with a limit: its version, its folder, and the file of its peak."""
    for version, shown, limit, peak in GROUPS:
        # Without that file the folder is an ordinary one, and a group made there would limit nothing.
        if not shown.is_file():
            continue
        folder = shown.parent / f"engram-benchmark-{os.getpid()}"
        if version == 2:
            (shown.parent / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        try:
            (folder / limit).write_text(str(size))
            yield version, folder, folder / peak
        finally:
            time.sleep(1)  # a process that has just ended may still be leaving it
            folder.rmdir()
        return
    raise CannotMeasure("a limit on memory needs a control group of the kernel (version 1 or 2), and none is mounted.")


def inside(group: Path, what: str, folder: Path, asked: argparse.Namespace) -> dict:
    """Runs a measuring process in the group; its last line of output is its result."""
    own = ["--donor", asked.donor, "--tokens", asked.tokens, "--decoded", asked.decoded, "--rounds", asked.rounds]
    own += ["--threads", asked.threads, "--minutes", asked.minutes, "--inside", what, folder]
    join = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    command = [*join, sys.executable, "-m", "benchmarks.big", *map(str, own)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise CannotMeasure(f"{what} ended with {done.returncode} (-9: killed by the limit):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(asked: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """The benchmark."""
    asked.donor = whole_donor(asked.donor).resolve()
    with memory_group(asked.cap) as (version, group, peak), workplace(asked.work, "big") as place:
        for name, size in (("on_disk", asked.bytes), ("resident", asked.resident_bytes)):
            rows = grafts.rows_for(size, asked.layers, HEAD_DIM)
            grafts.filled_graft(asked.donor, place / name, asked.layers, rows, HEAD_DIM)
        measured = {"load": compare_loading(asked, place, group, peak)}
        for what in ("prefill", "decode"):
            say(what)
            forget(asked, place, peak)
            measured[what] = {**inside(group, what, place, asked), "group_peak_bytes": int(peak.read_text())}
        sizes = {name: grafts.describe(place / name) for name in ("on_disk", "resident")}
        sizes |= {"cap_bytes": asked.cap, "control_group_version": version}
        sizes |= {"prefill_tokens": asked.tokens, "decoded_tokens": asked.decoded}
    yield "big", sizes, measured
    load, warm = measured["load"], measured["decode"]["speeds"]["on disk, warm"]
    held = load["anonymous_bytes"]
    target("loading, times the backbone's", load["times_the_donor"]["median"], at_most=1.2)
    target("MiB held after loading", (held["big"]["median"] - held["donor"]["median"]) / 2**20, at_most=64)
    target("decoding, share of the donor's speed", warm["speed_ratio"]["median"], at_least=0.92)


def forget(asked: argparse.Namespace, place: Path, peak: Path) -> None:
    """Drops all weights from the page cache (a page counts for the group that reads it first), and the group's peak."""
    grafts.drop([*asked.donor.glob("*.safetensors"), *place.glob("*/*.safetensors")])
    with suppress(OSError):  # a kernel that cannot
        peak.write_text("0")


def compare_loading(asked: argparse.Namespace, place: Path, group: Path, peak: Path) -> dict:
    """Load time and memory of backbone and graft, each in fresh processes that take turns."""
    folders = {"donor": asked.donor, "big": place / "on_disk"}
    seen: dict[str, list[dict]] = {name: [] for name in folders}

    def once(name: str) -> float:
        seen[name].append(inside(group, "load", folders[name], asked))
        return seen[name][-1]["load_seconds"]

    forget(asked, place, peak)
    seconds = interleave({name: (lambda n=name: once(n)) for name in folders}, asked.rounds)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_the_donor": spread(ratios(seconds["big"], seconds["donor"])),
        "anonymous_bytes": {name: spread([e["anonymous"] for e in entries], 12) for name, entries in seen.items()},
        "group_peak_bytes": int(peak.read_text()),
    }


def load(folder: Path) -> dict:
    """Seconds to load one checkpoint, and what is held then."""
    config = AutoConfig.from_pretrained(folder)
    # Transformers imports a model's code when it is first asked for: once, before the clock runs, for both sides.
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(getattr(config, "text_config", config))
    placement = "disk" if grafts.table_files(folder) else None
    kept = []
    seconds = seconds_of(lambda: kept.append(models.load(folder, placement=placement)))
    return {"load_seconds": seconds, "anonymous": anonymous()}


def compare(folder: Path, asked: argparse.Namespace, what: str) -> dict:
    """Prefill or decoding: the backbone, a resident table, and the large one on disk, warm and then cold.

    Decoding is fed the text's own next token, so that all models read the same new n-grams.
    """
    loaded = {
        "donor": models.load(asked.donor),
        "resident": models.load(folder / "resident", placement="device"),
        "on disk, warm": models.load(folder / "on_disk", placement="disk"),
    }
    grafts.warm(grafts.table_files(folder / "resident"))
    ids = models.real_ids(asked.donor, max(asked.tokens, models.PROMPT + asked.decoded))
    prompt, text = ids[:, : models.PROMPT], ids[:, models.PROMPT : models.PROMPT + asked.decoded]

    def once(name: str):
        if name == "on disk, cold":
            grafts.drop(grafts.table_files(folder / "on_disk"))
        model = loaded[name.replace("cold", "warm")]
        if what == "prefill":
            return models.prefill(model, ids[:, : asked.tokens])
        return models.decode(model, prompt, asked.decoded, text)

    def figures(names: list[str], rounds: int) -> dict:
        seconds = interleave({n: (lambda n=n: once(n)) for n in names}, rounds, limit_s=15 * asked.minutes)
        return {"speeds": speeds(seconds, "donor", asked.tokens if what == "prefill" else asked.decoded)}

    found = figures(list(loaded), asked.rounds)
    # Apart, because a cold side drops what the warm one has read. Half the rounds: each reads every row anew.
    cold = figures(["donor", "resident", "on disk, cold"], max(3, asked.rounds // 2))
    return {**found, "cold": cold}


def main() -> None:
    """The benchmark, or one of its measuring processes, which prints its result."""
    asked = options()
    if asked.inside is None:
        return start(measure, asked)
    torch.set_num_threads(asked.threads)
    what, folder = asked.inside[0], Path(asked.inside[1])
    print(json.dumps(load(folder) if what == "load" else compare(folder, asked, what)))


if __name__ == "__main__":
    main()
