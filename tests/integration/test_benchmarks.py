"""Every benchmark runs from end to end at tiny size, its result fills its section, and it leaves nothing behind.

No time is asserted. Not run here: engram-peft's side, which pip has to install, and the limit on memory of `big`, which
needs root. Run: pytest tests/integration/test_benchmarks.py
"""

import json
from functools import partial

import pytest

from benchmarks import big, fact_sets, facts, grafts, offload, peer, publish, side, speed, training, transplant
from benchmarks.command import CannotMeasure, run


pytestmark = pytest.mark.slow


@pytest.fixture
def measured(tmp_path, donor, capsys):
    """Runs a benchmark with tiny sizes; its lines."""
    places = {"donor": donor, "work": tmp_path / "work", "results": tmp_path / "results"}
    given = [text for name, path in places.items() for text in (f"--{name}", str(path))]
    given += ["--threads", "1", "--rounds", "1", "--layers", "1,2"]

    def measure(benchmark, *options: str) -> list[dict]:
        lines = run(benchmark.measure, benchmark.options([*given, *options]))
        assert [json.loads(text) for text in capsys.readouterr().out.splitlines()] == lines
        assert all(line["commit"] and line["machine"]["cpu"] and line["versions"]["torch"] for line in lines)
        assert list((tmp_path / "work").iterdir()) == []
        return lines

    measure.figures = partial(publish.figures, results=tmp_path / "results")
    return measure


def test_speed_compares_every_placement_with_the_donor(measured):
    lines = measured(speed, "--rows", "50", "--head-dim", "4", "--tokens", "10", "--text", "40", "--batch", "2")
    for line in lines:
        for ways in line["measured"]["by_backbone_dtype"].values():
            assert list(ways)[:2] == ["donor", "donor, once more"] and len(ways) == 5
    assert "| backbone bfloat16 | tokens/s |" in measured.figures("decode")
    assert "40 tokens, batch 2. Memory: " in measured.figures("prefill")


def test_offload_measures_sizes_bytes_and_ways_of_reading(measured):
    options = ["--sizes", "1000,5000", "--tokens", "4", "--bytes", "2000000", "--reads", "8,64", "--rows", "300"]
    try:
        lines = measured(offload, *options, "--passes", "1,20")
    except CannotMeasure as error:
        pytest.skip(str(error))
    ways = lines[1]["measured"]["bytes"]["20 tokens"]["ways"]
    assert ways['table on "device"']["bytes"] == 0
    # At most the rows, and for each of the 32 reads of a token 8 bytes to say where they go.
    read = 32 * 20 * lines[1]["sizes"]["row_bytes"]
    assert 0 < ways['table on "disk"']["bytes"] <= read + 8 * 32 * 20
    assert ways["accelerate's `cpu_offload` of an embedding"]["bytes"] == lines[1]["sizes"]["table_bytes"]
    for name in ("sizes", "bytes", "reading"):
        assert "\n| --- |" in measured.figures(f"offload {name}")


def test_training_measures_every_way_and_size(measured):
    options = ["--rows", "60", "--head-dim", "4", "--sizes", "1000,5000", "--width", "4", "--places", "disk"]
    (line,) = measured(training, *options, "--batch", "2", "--length", "16")
    ways = line["measured"]["ways"]
    assert list(ways) == list(training.WAYS) and {entry["steps"] for entry in ways.values()} == {2}
    assert ways["lora"]["state_bytes"] < ways["full"]["state_bytes"]
    assert line["measured"]["first_step"]["disk"]["touched_values"] > 0
    assert "| memory + LoRA |" in measured.figures("training")


def test_a_transplant_is_compared_with_permuted_and_random_rows(measured):
    options = ["--rows", "50", "--head-dim", "4", "--seeds", "0", "--steps", "2", "--reader-steps", "1"]
    (line,) = measured(transplant, *options, "--batch", "2", "--length", "16", "--measured", "2")
    assert list(line["measured"]) == ["donor", "its own reader", *transplant.ARMS]
    assert all(len(losses) == 3 for losses in line["measured"].values())
    assert "| transplanted, seed 0 |" in measured.figures("transplant")


def test_facts_compares_a_pack_with_its_controls_and_with_every_other_way(measured):
    options = ("--people", "3", "--seeds", "0", "--passes", "1", "--rates", "1e-3", "--layers", "1,2")
    lines = measured(facts, *options)
    ways = {line["sizes"]["arm"]: line["measured"] for line in lines}
    assert list(ways) == ["pack", "permuted", "random", "solve", "rows", "memory", "lora", "prompt"]
    same = {arm: found["other_texts"]["general"]["texts_identical"] for arm, found in ways.items() if arm != "prompt"}
    assert [same[arm] for arm in ("pack", "permuted", "random", "solve")] == [1.0] * 4
    assert max(same[arm] for arm in ("rows", "memory", "lora")) < 1.0
    assert ways["pack"]["records"] == ways["permuted"]["records"] == ways["random"]["records"]
    assert ways["pack"]["records"] > ways["solve"]["records"] > 0
    assert 0 < ways["rows"]["bytes"] < ways["memory"]["bytes"], "the projections learn in one of them"
    asked = {"two_facts": 4, "after_a_paragraph": 6, "name_far_back": 6, "in_german": 6}
    for found in ways.values():
        assert {kind: its["texts"] for kind, its in found["harder"].items()} == asked
    assert measured(facts, *options) == [], "what is there is not measured again"
    shown = measured.figures("facts")
    assert shown.count("\n| ") == 3 + 2 * len(lines) and "| in German |" in shown


def test_no_answer_about_invented_people_stands_in_front_of_a_harder_question():
    answers = [*fact_sets.CITIES.split(), *fact_sets.JOBS.split()]
    assert len(answers) == 50 and not [answer for answer in answers if answer in fact_sets.PARAGRAPH]


def test_a_sweep_over_layers_and_real_facts_have_results_of_their_own(measured):
    options = ("--people", "5", "--seeds", "0", "--passes", "1", "--arms", "pack", "--layers")
    swept = measured(facts, *options, "1;1,2")
    assert [line["sizes"]["layers"] for line in swept] == [[1], [1, 2]]
    (real,) = measured(facts, *options, "1", "--facts", "real")
    assert real["measured"]["taught"]["texts"] == 5 * 7 and "two_facts" not in real["measured"]["harder"]
    shown = measured.figures("facts")
    for row in ("knowledge pack, 5, 0, 1 passes, layers 1 and 2 |", "knowledge pack, 5 real facts, 0, 1 passes, lay"):
        assert shown.count(f"| {row}") == 2


def test_our_side_of_the_peer_generates_the_donors_tokens(tmp_path, donor):
    asked = peer.options(["--rounds", "1", "--layers", "1,2", "--rows", "60", "--head-dim", "4", "--length", "64"])
    shape = (asked.layers, asked.rows, asked.head_dim, "float32")
    graft = grafts.filled_graft(donor, tmp_path / "graft", *shape, engram_value_initializer_range=1e-9)
    worker = side.Worker("memory", training.job_of(asked, donor, graft) | {"prompt": 8, "generated": 4})
    assert worker.forward()["same"] and worker.generate()["same"]


def test_big_reads_the_large_table_warm_and_cold(tmp_path, donor):
    asked = big.options(["--donor", str(donor), "--rounds", "1", "--tokens", "40", "--decoded", "8"])
    for name, rows in (("on_disk", 300), ("resident", 30)):
        grafts.filled_graft(donor, tmp_path / name, [1, 2], rows, 4, max_memory_shard_size="3KB")
    assert len(grafts.table_files(tmp_path / "on_disk")) > 6
    for what in ("prefill", "decode"):
        found = big.compare(tmp_path, asked, what)
        assert set(found["speeds"]) | set(found["cold"]["speeds"]) > {"donor", "on disk, warm", "on disk, cold"}
    assert big.load(tmp_path / "on_disk")["anonymous"] > 0
