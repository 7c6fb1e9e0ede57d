"""The words of a placement and what "auto" makes of them: which place has room, what a device map says of the tables,
and how much memory a machine, a device map or a container leaves.

Memory sizes are given in place of the machine's, and to files like a control group's; nothing is measured here.
Run: pytest tests/unit/test_placement.py
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers import rows_placement_engram
from engram_transformers.rows_placement_engram import (
    PLACEMENTS,
    ROOM_TO_SPARE,
    check_placement,
    choose_placement,
    device_memory,
    free_memory,
    group_limit,
    mapped_place,
    place_number,
    without_tables,
)


SIZES = st.integers(min_value=0, max_value=1 << 40)


@pytest.mark.parametrize("word", PLACEMENTS)
def test_a_placement_is_its_word(word):
    assert check_placement(word) == word


@pytest.mark.parametrize("word", ["gpu", "CPU", "", "cuda:0", None, 0])
def test_another_word_is_refused_with_all_that_there_are(word):
    with pytest.raises(ValueError, match="'auto', 'device', 'cpu', 'disk', 'none'") as refused:
        check_placement(word)
    assert repr(word) in str(refused.value)


# Table, other weights, free on the device, free on the host; a fifth is left free.
CHOICES = {
    "all fits on the device": (60, 20, 100, 0, "device"),
    "one byte too many for the device": (61, 20, 100, 1000, "cpu"),
    "the other weights count on the device": (10, 75, 100, 1000, "cpu"),
    "and not on the host": (80, 75, 100, 100, "cpu"),
    "one byte too many for the host": (81, 75, 100, 100, "disk"),
    "the CPU is the device": (60, 20, None, 100, "device"),
    "the CPU is the device and has too little": (61, 20, None, 100, "disk"),
    "a device without memory": (60, 20, 0, 100, "cpu"),
    "nothing at all": (0, 0, 0, 0, "device"),
}


@pytest.mark.parametrize(("table", "other", "device", "host", "expected"), CHOICES.values(), ids=CHOICES)
def test_auto_takes_the_first_place_with_room_to_spare(table, other, device, host, expected):
    assert ROOM_TO_SPARE == 0.2
    assert choose_placement(table, other, device, host) == expected


@given(table=SIZES, other=SIZES, device=st.none() | SIZES, host=SIZES, more=SIZES)
def test_more_memory_never_moves_a_table_further_away(table, other, device, host, more):
    distance = {"device": 0, "cpu": 1, "disk": 2}
    chosen = distance[choose_placement(table, other, device, host)]
    assert distance[choose_placement(table, other, device, host + more)] <= chosen
    if device is not None:
        assert distance[choose_placement(table, other, device + more, host)] <= chosen


@given(table=SIZES, other=SIZES, device=st.none() | SIZES, host=SIZES)
def test_what_was_chosen_fits_and_what_was_passed_over_does_not(table, other, device, host):
    chosen = choose_placement(table, other, device, host)
    near = host if device is None else device
    assert (chosen == "device") == (table + other <= (1 - ROOM_TO_SPARE) * near)
    if chosen == "cpu":
        assert device is not None
        assert table <= (1 - ROOM_TO_SPARE) * host


TWO_CARDS = {0: 1000, 1: 500, "cpu": 8000}
FREE = {
    "no device map": (None, None, (None, 8000)),
    "the CPU": ("cpu", None, (None, 8000)),
    "cuda": ("cuda", None, (1000, 8000)),
    "a number": (1, None, (500, 8000)),
    "a device": (torch.device("cuda", 1), None, (500, 8000)),
    "a card that is not there": ("cuda:7", None, (0, 8000)),
    "auto": ("auto", None, (1500, 8000)),
    "balanced": ("balanced", None, (1500, 8000)),
    "balanced_low_0": ("balanced_low_0", None, (1500, 8000)),
    "sequential": ("sequential", None, (1500, 8000)),
    "a map of both": ({"a": 0, "b": "cuda:1", "c": "cpu"}, None, (1500, 8000)),
    "a map that names one twice": ({"a": 0, "b": "cuda:0", "c": "disk"}, None, (1000, 8000)),
    "a map of the host": ({"a": "cpu", "b": "disk"}, None, (None, 8000)),
    "max_memory": ("auto", {0: 300, "cpu": 70}, (300, 70)),
    "max_memory in words": ("auto", {0: "1KB", "cpu": "2KB"}, (1000, 2000)),
    "max_memory without a host": ("auto", {0: 300}, (300, 0)),
}


@pytest.fixture
def machine(monkeypatch):
    """A machine with two cards; says which of them were asked."""
    asked = []

    def card(place):
        asked.append(place)
        return TWO_CARDS.get(place, 0)

    def budget(memory=None):
        words = {"1KB": 1000, "2KB": 2000}
        if memory is not None:
            return {place: words.get(size, size) for place, size in memory.items()}
        asked.extend([0, 1])
        return dict(TWO_CARDS)

    monkeypatch.setattr(rows_placement_engram, "host_memory", lambda: TWO_CARDS["cpu"])
    monkeypatch.setattr(rows_placement_engram, "device_memory", card)
    monkeypatch.setattr(rows_placement_engram, "get_max_memory", budget)
    monkeypatch.setattr(rows_placement_engram, "GROUPS", ())
    return asked


@pytest.mark.parametrize(("device_map", "given_memory", "expected"), FREE.values(), ids=FREE)
def test_free_memory_is_that_of_the_devices_that_a_map_may_use(device_map, given_memory, expected, machine):
    assert free_memory(device_map, given_memory) == expected


ASKED = {
    "no device map": (None, None, []),
    "the CPU": ("cpu", None, []),
    "a map of the host": ({"a": "cpu", "b": "disk"}, None, []),
    "one card": ("cuda:1", None, [1]),
    "a map of one card": ({"a": 1, "b": "cuda:1", "c": "cpu"}, None, [1]),
    "max_memory": ("auto", {0: 300, "cpu": 70}, []),
    "auto": ("auto", None, [0, 1]),
}


@pytest.mark.parametrize(("device_map", "given_memory", "expected"), ASKED.values(), ids=ASKED)
def test_a_card_that_is_not_in_question_is_not_asked(device_map, given_memory, expected, machine):
    """To ask makes a context on it, which takes its memory for as long as the process lives."""
    free_memory(device_map, given_memory)
    assert machine == expected


@pytest.mark.parametrize("budget", [{"mps": 8000}, {0: 8000}], ids=["Apple's", "NVIDIA's integrated"])
def test_memory_that_a_device_shares_with_the_host_counts_once(budget, machine, monkeypatch):
    """accelerate names the device alone there; the host is not without memory."""
    monkeypatch.setattr(rows_placement_engram, "get_max_memory", lambda memory=None: dict(budget))
    monkeypatch.setattr(rows_placement_engram, "device_memory", lambda place: None)
    for device_map in (None, "auto", *budget, {"": next(iter(budget))}):
        assert free_memory(device_map) == (None, 8000)


def test_without_an_accelerator_the_host_is_all_there_is(machine, monkeypatch):
    monkeypatch.setattr(rows_placement_engram, "get_max_memory", lambda memory=None: {"cpu": 8000})
    for device_map in (None, "auto", "sequential", {"": "cpu"}):
        assert free_memory(device_map) == (None, 8000)


def test_what_is_free_here_is_a_number_that_can_be():
    """Without a stand-in: more than nothing and less than 1 PB."""
    device, host = free_memory(None)
    assert device is None
    assert 1 << 20 < host < 1 << 50


def test_a_device_s_own_numbers_are_asked(counting_device):
    with counting_device.total_memory(1 << 20):
        assert device_memory("counting") == counting_device.mem_get_info()[0] <= 1 << 20
    assert device_memory("cuda:7") == (0 if not torch.cuda.is_available() else device_memory("cuda:7"))
    assert device_memory("mps") is None


@pytest.mark.parametrize("shared", [True, False])
def test_a_device_that_says_that_it_is_integrated_shares_the_hosts_memory(shared, counting_device, monkeypatch):
    module = torch.get_device_module("counting")
    properties = SimpleNamespace(is_integrated=shared)
    monkeypatch.setattr(module, "get_device_properties", lambda device: properties, raising=False)
    assert (device_memory("counting") is None) == shared


# What files of two control groups hold (limit, and what is in use), and how much they leave.
GROUPS = {
    "a limit": ([("4000", "anon 0")], 4000),
    "a limit and what is in use": ([("4000\n", "file 70\nanon 1500\nslab 9\n")], 2500),
    "more in use than there is": ([("4000\n", "anon 4100\n")], 0),
    "no word of what is in use": ([("4000\n", "file 70\n")], 4000),
    "no limit": ([("max\n", "anon 1500\n")], float("inf")),
    "no such file": ([None], float("inf")),
    "the second kind of group": ([None, ("5000\n", "anon 1500\n")], 3500),
    "no limit in the first": ([("max", "anon 1500"), ("5000", "anon 0")], 5000),
    "both": ([("4000", "anon 1500"), ("5000", "anon 3000")], 2000),
}


@pytest.mark.parametrize(("files", "expected"), GROUPS.values(), ids=GROUPS)
def test_a_container_leaves_what_its_limit_is_above_what_it_uses(files, expected, tmp_path, monkeypatch):
    groups = []
    for number, texts in enumerate(files):
        folder = tmp_path / str(number)
        folder.mkdir()
        groups.append(("no controller", str(folder), "limit", "anon"))
        if texts is not None:
            (folder / "limit").write_text(texts[0])
            (folder / "memory.stat").write_text(texts[1])
    monkeypatch.setattr(rows_placement_engram, "GROUPS", tuple(groups))
    assert group_limit() == expected
    monkeypatch.setattr(rows_placement_engram, "host_memory", lambda: 3000)
    assert free_memory(None) == (None, min(3000, expected))


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="this system has no control groups")
@pytest.mark.parametrize(("own", "above", "expected"), [(3000, 9000, 2500), (9000, 3000, 2500), (None, 3000, 2500)])
def test_a_process_is_limited_by_its_own_group_and_those_above(own, above, expected, tmp_path, monkeypatch):
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    controller, path = lines[-1][1].split(",")[0], lines[-1][2].strip("/") or "."
    for folder, limit in ((tmp_path / path, own), (tmp_path, above)):
        if limit is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "limit").write_text(str(limit))
            (folder / "memory.stat").write_text("anon 500\n")
    if path == ".":  # one group: what was written last counts
        expected = above - 500
    monkeypatch.setattr(rows_placement_engram, "GROUPS", ((controller, str(tmp_path), "limit", "anon"),))
    assert group_limit() == expected


def test_a_group_below_the_root_counts_and_so_do_those_above_it(tmp_path, monkeypatch):
    """Where a process is, its own word tells; the least of all limits on the way holds."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), None)
    if own is None:
        pytest.skip("this system names no group of version 2 for a process")
    inner = tmp_path / own.strip("/")
    inner.mkdir(parents=True, exist_ok=True)
    (inner / "limit").write_text("3000")
    (inner / "memory.stat").write_text("anon 1000")
    monkeypatch.setattr(rows_placement_engram, "GROUPS", (("", str(tmp_path), "limit", "anon"),))
    assert group_limit() == 2000


@pytest.mark.parametrize(
    ("place", "expected"),
    [(0, 0), (3, 3), ("cpu", "cpu"), ("mps", "mps"), ("cuda", 0), ("cuda:2", 2), (torch.device("xpu", 1), 1)],
)
def test_a_place_has_the_key_that_accelerate_gives_it(place, expected):
    assert place_number(place) == expected


TABLES = "memory.tables"
MAPPED = {
    "whole": ({"": 0}, 0),
    "the memory": ({"backbone": 0, "memory": "cpu"}, "cpu"),
    "the tables": ({"": 0, "memory": 1, "memory.tables": "disk"}, "disk"),
    "the longest name counts": ({"memory.tables": "disk", "": 0}, "disk"),
    "a part of them alone": ({"backbone": 0, "memory.tables.1": "cpu"}, None),
    "a name that begins like it": ({"memory.tables_of_mine": 0, "mem": 1}, None),
    "nothing of the memory": ({"backbone": 0}, None),
    "a word": ("auto", None),
    "none": (None, None),
}


@pytest.mark.parametrize(("device_map", "expected"), MAPPED.values(), ids=MAPPED)
def test_a_map_s_longest_name_says_where_tables_are(device_map, expected):
    assert mapped_place(device_map, TABLES) == expected


WITHOUT = {
    "tables": ({"": 0, "memory.tables": "cpu"}, {"": 0}),
    "parts of them": ({"backbone": 0, "memory.tables.1": 0, "memory.tables.2.order2": 1}, {"backbone": 0}),
    "others of the memory stay": ({"memory": 0, "memory.layers": 1}, {"memory": 0, "memory.layers": 1}),
    "a name that begins like it stays": ({"memory.tables_of_mine": 0}, {"memory.tables_of_mine": 0}),
    "a word": ("auto", "auto"),
    "none": (None, None),
}


@pytest.mark.parametrize(("device_map", "expected"), WITHOUT.values(), ids=WITHOUT)
def test_a_map_without_tables_is_the_rest_of_it_and_the_given_one_stays(device_map, expected):
    before = dict(device_map) if isinstance(device_map, dict) else device_map
    assert without_tables(device_map) == expected
    assert device_map == before
