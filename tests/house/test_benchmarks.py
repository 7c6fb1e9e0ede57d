"""The benchmarks' own arithmetic and manners: what they compare, what they refuse, what they leave behind.

No time is asserted here. Run: pytest tests/house/test_benchmarks.py
"""

import ast
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as every
from benchmarks import big, command, page_cache, publish, record, room, sections
from benchmarks.compare import LEAST_ROUNDS, interleave, quantile, ratios, speeds, spread
from benchmarks.memory_cap import MemoryCap, candidates, memory_cap


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
MODULES = sorted(FOLDER.glob("*.py"))
MOST_LINES = 400

numbers = st.floats(min_value=1e-6, max_value=1e6, allow_nan=False)


# Comparing.


def ways_that_write(log: list[str], *names: str) -> dict:
    return {name: (lambda name=name: log.append(name) or float(len(log))) for name in names}


def test_every_way_runs_once_a_round_and_each_is_first_in_turn():
    log: list[str] = []
    measured = interleave(ways_that_write(log, "a", "b", "c"), rounds=3, warm_up=0)
    assert "".join(log) == "abc" + "bca" + "cab"
    assert measured == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_rounds_for_warming_up_run_and_do_not_count():
    log: list[str] = []
    measured = interleave(ways_that_write(log, "a", "b"), rounds=2, warm_up=3)
    assert len(log) == 10
    assert all(len(values) == 2 and min(values) > 6 for values in measured.values())


def test_ways_that_give_parts_take_turns_after_every_part():
    log: list[str] = []

    def parts(name: str):
        for number in range(3):
            log.append(f"{name}{number}")
            yield float(number + 1)

    measured = interleave({name: (lambda name=name: parts(name)) for name in "ab"}, rounds=1, warm_up=0)
    assert sorted(log[:2]) == ["a0", "b0"] and sorted(log[2:4]) == ["a1", "b1"] and sorted(log[4:]) == ["a2", "b2"]
    assert log[0][0] != log[2][0], "the first of a part is not the first of the next"
    assert measured == {"a": [6.0], "b": [6.0]}


def test_a_way_with_parts_and_a_way_without_share_a_round():
    measured = interleave({"parts": lambda: iter([1.0, 2.0]), "whole": lambda: 7.0}, rounds=2)
    assert measured == {"parts": [3.0, 3.0], "whole": [7.0, 7.0]}


@pytest.mark.parametrize(("rounds", "expected"), [(1, 1), (2, 2), (9, LEAST_ROUNDS)])
def test_a_time_limit_leaves_enough_rounds_for_a_median(rounds, expected):
    assert len(interleave({"a": lambda: 1.0}, rounds, limit_s=0)["a"]) == expected
    assert len(interleave({"a": lambda: 1.0}, rounds)["a"]) == rounds  # control: without a limit


@given(st.lists(numbers, min_size=1, max_size=30), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_a_quantile_is_numpys(values, share):
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-12)


@given(st.lists(numbers, min_size=1, max_size=30))
def test_a_spread_has_median_quartiles_extremes_and_the_number_of_rounds(values):
    found = spread(values, digits=17)
    assert found["median"] == pytest.approx(statistics.median(values), rel=1e-12)
    assert (found["min"], found["max"], found["rounds"]) == (min(values), max(values), len(values))
    assert found["min"] <= found["q1"] <= found["median"] <= found["q3"] <= found["max"]


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no round was run"):
        spread([])


def test_ratios_are_taken_round_by_round():
    # The machine was ten times slower in the second round, which counts no more than the first.
    assert ratios([3.0, 20.0], [1.0, 10.0]) == [3.0, 2.0]
    with pytest.raises(ValueError, match="2 rounds cannot be compared with 1"):
        ratios([1.0, 2.0], [1.0])


def test_a_speed_ratio_above_one_is_faster():
    found = speeds({"donor": [2.0, 4.0], "slower": [4.0, 8.0]}, "donor", amount=8)
    assert found["slower"]["speed_ratio"]["median"] == 0.5
    assert found["donor"]["speed_ratio"]["median"] == 1.0
    assert found["slower"]["per_second"]["max"] == 2.0


# Disk room.


def test_too_little_room_is_refused_with_the_sum(tmp_path):
    parts = {"table": 3_000_000_000, "copy of the donor": 540_000_000}
    with pytest.raises(room.NoRoomError) as refused:
        room.refuse_without_room(tmp_path, parts, free=5_000_000_000)
    said = str(refused.value)
    assert "3.00 GB table + 0.54 GB copy of the donor = 3.54 GB" in said
    assert "5.54 GB in all, but only 5.00 GB are free" in said
    assert room.refuse_without_room(tmp_path, parts, free=5_540_000_000) == 3_540_000_000  # control: it just fits


def test_more_than_50_gigabytes_are_refused_however_much_is_free(tmp_path):
    with pytest.raises(room.NoRoomError, match=r"50\.10 GB, more than the 50\.00 GB"):
        room.refuse_without_room(tmp_path, {"table": 50_100_000_000}, free=10**15)


def test_what_is_free_is_asked_of_the_disk(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free > room.MOST_BYTES:
        assert room.refuse_without_room(tmp_path, {"table": 1}) == 1
    with pytest.raises(room.NoRoomError):
        room.refuse_without_room(tmp_path, {"table": free})


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_workplace_is_deleted_when_the_block_fails_or_is_interrupted(tmp_path, error):
    with pytest.raises(error), room.workplace(tmp_path, "x") as place:
        (place / "deep").mkdir()
        (place / "deep" / "file").write_bytes(b"x")
        assert list(tmp_path.iterdir()) == [place]
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_deletes_the_workplace(tmp_path, number):
    passed_by = []
    before = signal.signal(number, lambda *arguments: passed_by.append(number))  # or the test would end with pytest
    try:
        with pytest.raises(KeyboardInterrupt), command.stopped_by_signals(), room.workplace(tmp_path, "x"):
            os.kill(os.getpid(), number)
            assert not passed_by, "the benchmark's own handler was not asked"
        assert list(tmp_path.iterdir()) == []
        os.kill(os.getpid(), number)
        assert passed_by == [number], "control: after the block the handler is the one from before"
    finally:
        signal.signal(number, before)


def test_what_a_killed_run_left_goes_with_the_next_one_and_a_living_runs_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, living, other = (
        tmp_path / name for name in (f"{room.PREFIX}{ended.pid}-graft", f"{room.PREFIX}{os.getppid()}-graft", "mine")
    )
    for folder in (left, living, other):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    with room.workplace(tmp_path, "x"):
        assert not left.exists()
    assert living.exists() and other.exists()


# Results.


def result(name: str = "decode", **measured) -> dict:
    return {"benchmark": name, "measured": measured}


def test_results_are_appended_as_whole_lines(tmp_path):
    for number in range(3):
        path = record.append(result(number=number, text="\u00e9"), tmp_path)
    assert path == tmp_path / "decode.jsonl"
    assert [json.loads(line)["measured"]["number"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert path.read_text().endswith("\n")
    assert [entry["measured"]["number"] for entry in record.results_of("decode", tmp_path)] == [0, 1, 2]


def test_a_line_that_was_cut_off_is_closed_and_passed_over(tmp_path):
    path = record.append(result(number=0), tmp_path)
    with open(path, "a") as file:
        file.write('{"benchmark": "decode", "meas')
    record.append(result(number=1), tmp_path)
    assert [entry["measured"]["number"] for entry in record.results_of("decode", tmp_path)] == [0, 1]
    assert len(path.read_text().splitlines()) == 3


def test_runs_that_end_together_do_not_mix_their_lines(tmp_path):
    threads = [
        threading.Thread(target=record.append, args=(result(number=number, text="x" * 200_000), tmp_path))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry["measured"]["number"] for entry in record.results_of("decode", tmp_path)) == list(range(8))


def test_numbers_that_json_does_not_know_are_refused_before_the_file_is_touched(tmp_path):
    record.append(result(number=0), tmp_path)
    with pytest.raises(ValueError):
        record.append(result(number=float("nan")), tmp_path)
    assert len((tmp_path / "decode.jsonl").read_text().splitlines()) == 1


def test_a_line_names_machine_versions_commit_and_sizes(tmp_path):
    line = record.line("decode", sizes={"rows": 1}, measured={"x": 2}, folder=tmp_path, seconds=1.23)
    assert set(line["machine"]) == {"cpu", "cores", "ram_bytes", "kernel", "disk_free_bytes"}
    assert {"python", "torch", "transformers", "accelerate", "safetensors", "engram-transformers"} <= set(
        line["versions"]
    )
    assert "not installed" not in line["versions"].values()
    assert line["sizes"] == {"rows": 1} and line["measured"] == {"x": 2} and line["took_seconds"] == 1.2
    assert line["machine"]["cores"] >= 1 and line["machine"]["ram_bytes"] > 2**28


def test_the_commit_is_dirty_only_where_something_else_than_results_was_changed(tmp_path):
    def git(*args: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    assert record.commit(tmp_path) == "unknown (no git checkout)"
    git("init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    clean = record.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "decode.jsonl").write_text("{}\n")
    assert record.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("x = 2\n")
    assert record.commit(tmp_path) == clean + "+dirty"


# The page.


def test_publishing_twice_gives_the_same_page_and_names_what_is_missing(tmp_path, capsys):
    target = tmp_path / "docs" / "performance.md"
    publish.main(["--results", str(tmp_path / "results"), "--docs", str(target.parent)])
    first = target.read_bytes()
    said = capsys.readouterr().err
    for name in sections.SECTIONS:
        assert name in said
        assert f"Not measured yet: `python -m benchmarks.{name}`" in first.decode()
    publish.main(["--results", str(tmp_path / "results"), "--docs", str(target.parent)])
    assert target.read_bytes() == first


def test_the_page_in_the_repository_is_made_from_the_results_in_it():
    text, _ = publish.page(record.RESULTS)
    assert publish.PAGE.read_text(encoding="utf-8") == text, "run `python -m benchmarks.publish`"


@pytest.mark.parametrize(
    ("target", "value", "word"),
    [
        ("decode, table resident", 0.97, "reached"),
        ("decode, table resident", 0.9699, "missed"),
        ("prefill, table on disk, warm", 0.92, "reached"),
        ("prefill, table on disk, warm", 0.9199, "missed"),
        ("hash one token", 3.99, "missed"),
        ("hash text", 2.0, "reached"),
        ("hash share", 0.0051, "missed"),
    ],
)
def test_a_target_is_reached_or_missed_by_the_median(target, value, word):
    kind = {"median": value, "q1": 0.0, "q3": 10.0}  # quartiles excuse nothing
    assert sections.verdict(target, kind).endswith(f"**{word}**")


def test_numbers_are_written_for_readers():
    assert [sections.number(value) for value in (0, 0.01234, 1.0, 12.345, 1234.5, 40_100_000)] == [
        "0",
        "0.0123",
        "1.00",
        "12.3",
        "1,230",
        "40,100,000",
    ]


# The large one.


def test_a_finished_stage_does_not_run_again(tmp_path):
    runs: list[str] = []
    for _ in range(2):
        stages = big.Stages(tmp_path, {"table_bytes": 1})
        assert stages.once("load", lambda: runs.append("load") or {"seconds": 1}) == {"seconds": 1}
    assert runs == ["load"]


def test_a_stage_that_was_interrupted_runs_again(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        big.Stages(tmp_path, {}).once("load", interrupted)
    assert big.Stages(tmp_path, {}).once("load", lambda: 7) == 7


def test_an_unfinished_run_of_other_sizes_is_refused(tmp_path):
    big.Stages(tmp_path, {"table_bytes": 1}).once("made", lambda: True)
    with pytest.raises(ValueError, match="--discard"):
        big.Stages(tmp_path, {"table_bytes": 2})


def test_tables_are_kept_and_measurements_are_not_when_the_code_has_changed(tmp_path):
    stages = big.Stages(tmp_path, {})
    stages.once("made", lambda: True)
    stages.done["filled"] = ["a"]
    stages.once("load", lambda: 1)
    kept = json.loads(stages.file.read_text())
    stages.file.write_text(json.dumps({**kept, "commit": "another"}))
    again = big.Stages(tmp_path, {})
    assert (again.done["made"], again.done["filled"]) == (True, ["a"])
    assert again.once("load", lambda: 2) == 2


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with (
        big.only_run(tmp_path / "big"),
        pytest.raises(command.CannotMeasure, match="another run"),
        big.only_run(tmp_path / "big"),
    ):
        pass
    with big.only_run(tmp_path / "big"):
        assert (tmp_path / "big").is_dir()  # control: one after the other is fine


def test_without_a_control_group_nothing_runs_and_the_reasons_are_said(tmp_path):
    with pytest.raises(command.CannotMeasure, match=r"cap of 6 GB.*none is mounted"), memory_cap(6 * 10**9, []):
        pass
    no_group = [(1, tmp_path / "absent")]
    with pytest.raises(command.CannotMeasure, match="No such file"), memory_cap(6 * 10**9, no_group):
        pass


ALLOCATE = (
    "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096]); print(len(block))"
)


def test_a_child_beyond_its_cap_is_killed_and_one_within_it_is_not():
    try:
        with memory_cap(100_000_000) as cap:
            within, beyond = (
                subprocess.run(cap.command([sys.executable, "-c", ALLOCATE, str(size)]), capture_output=True, text=True)
                for size in (10_000_000, 400_000_000)
            )
            peak = cap.peak()
            assert isinstance(cap, MemoryCap) and cap.folder.is_dir()
    except command.CannotMeasure as error:
        pytest.skip(f"no control group may be made here: {error}")
    assert within.stdout.strip() == "10000000", within.stderr
    assert beyond.returncode == -signal.SIGKILL
    assert peak is None or 10_000_000 < peak <= 100_000_000
    assert not cap.folder.exists()
    assert (cap.version, cap.folder.parent) in list(candidates())


# The page cache.


def lies_in_memory(path: Path) -> bool:
    """Whether a file is on a file system that has no disk behind its page cache."""
    device = f"{os.major(path.stat().st_dev)}:{os.minor(path.stat().st_dev)}"
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return any(before.split()[2] == device and after.split()[0] in ("tmpfs", "ramfs") for before, after in mounts)


def test_the_page_cache_is_warm_after_reading_and_cold_after_dropping(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(os.urandom(1 << 20))
    if page_cache.cached_share([path]) is None:
        pytest.skip("this kernel does not say what its page cache holds (Linux 6.5 does)")
    if lies_in_memory(path):
        pytest.skip("the folder of this test lies in memory, where nothing can be dropped")
    page_cache.drop([path])
    assert page_cache.cached_share([path]) == 0
    page_cache.warm([path])
    assert page_cache.cached_share([path]) == 1


# The files.


def names_of_benchmarks() -> set[str]:
    """Modules that append a result: they hand their own name to `run` or `record.line`."""
    adds = ('run("{}", measure', 'record.line("{}"')
    return {path.stem for path in MODULES if any(a.format(path.stem) in path.read_text("utf-8") for a in adds)}


def test_every_benchmark_has_a_section_and_every_section_a_benchmark():
    assert names_of_benchmarks() == {*sections.SECTIONS, *publish.FIGURES} == {*every.QUICK, "big", "domain"}
    with pytest.raises(SystemExit):
        every.main(["big"])  # by `make bench-long` only


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_is_short_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) < MOST_LINES
    assert docstring and docstring[0].isupper()
    if path.stem in names_of_benchmarks():
        assert f"Run: python -m benchmarks.{path.stem}" in docstring


def test_nothing_that_is_installed_imports_a_benchmark():
    folders = ("configuration", "modeling_engram", "adapters", "training", "conversion", "inspection", "model_cards")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py") if "benchmarks" in imports_of(p)]
    assert found == []
    assert "benchmarks" in imports_of(Path(__file__))  # control


def imports_of(path: Path) -> set[str]:
    """First names of what a file imports absolutely."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found
