"""The benchmarks' arithmetic, and the pages that show their results.

Run: pytest tests/house/test_benchmarks.py
"""

import pytest

from benchmarks import publish
from benchmarks.compare import interleave, ratios, speeds, spread
from examples.domain.publish import pages


def test_ways_take_turns_and_ratios_are_taken_inside_a_round():
    log: list[str] = []
    ways = {name: (lambda name=name: log.append(name) or float(len(log))) for name in "abc"}
    measured = interleave(ways, rounds=2, warm_up=1)
    assert "".join(log) == "abc" + "bca" + "cab", "each is first in turn"
    assert measured == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}, "the round to warm up does not count"
    log.clear()
    parts = {name: (lambda name=name: (log.append(name) or 1.0 for _ in range(2))) for name in "ab"}
    assert interleave(parts, rounds=1, warm_up=0) == {"a": [2.0], "b": [2.0]}
    assert {"".join(log[:2]), "".join(log[2:])} == {"ab", "ba"}, "turns after every part"
    assert ratios([3.0, 20.0], [1.0, 10.0]) == [3.0, 2.0]
    assert speeds({"donor": [2.0, 4.0], "slower": [4.0, 8.0]}, "donor", 8)["slower"]["speed_ratio"]["median"] == 0.5
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3, "q1": 2, "q3": 4, "min": 1, "max": 5, "rounds": 5}


def test_the_pages_in_the_repository_are_made_from_the_results_in_it(tmp_path):
    for name in publish.PAGES:
        page = publish.ROOT / "docs" / name
        copy = tmp_path / name
        copy.write_bytes(page.read_bytes())
        assert publish.publish(pages=[copy]) == []
        assert copy.read_bytes() == page.read_bytes(), "run `make docs`"
    shown = "".join(page.read_text(encoding="utf-8") for page in (publish.ROOT / "docs").glob("*.md"))
    assert all(shown.count(publish.FIRST.format(name)) == 1 for name in publish.SECTIONS)
    assert all(page.read_text(encoding="utf-8") == text for page, text in pages().items()), "run `make docs`"


def test_a_section_without_a_result_says_so_and_a_missing_mark_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{publish.FIRST.format('decode')}\nold\n{publish.LAST.format('decode')}\nafter\n")
    assert publish.publish(tmp_path, [page]) == ["decode"]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "Not measured" in text and "old" not in text
    for broken in (text.replace(publish.FIRST.format("decode"), ""), text.replace(publish.LAST.format("decode"), "")):
        with pytest.raises(ValueError, match="no pair of marks"):
            publish.put(broken, "decode", "")
