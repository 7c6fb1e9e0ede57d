"""Every quick benchmark runs from end to end at tiny size, fills its tables with real bytes, and leaves nothing behind.

What is asserted of a figure is its meaning (sizes, rounds, exact bytes), never a time. Not run here: engram-peft's side
of `peer`, which pip has to install. Run: pytest tests/integration/test_benchmarks.py
"""

import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import (
    big,
    big_child,
    decode,
    grafts,
    hooks,
    memory_cap,
    peer_side,
    placements,
    prefill,
    publish,
    room,
    scale,
)
from benchmarks import hash as hash_benchmark
from benchmarks import models as benchmark_models
from benchmarks.command import CannotMeasure
from benchmarks.numpy_hash import NumpyHash
from engram_transformers.hash_ngrams_engram import NgramHasher


@pytest.fixture
def given(tmp_path, donor):
    """Arguments of a tiny run."""
    places = {"donor": donor, "work": tmp_path / "work", "results": tmp_path / "results"}
    return [
        *(text for name, path in places.items() for text in (f"--{name}", str(path))),
        *("--threads", "1", "--rounds", "2", "--layers", "1,2"),
    ]


def left_over(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "work").iterdir()]


def check_line(line: dict, tmp_path, capsys) -> None:
    """One line on stdout, the same one in the results, which the page can show; nothing left in the work folder."""
    printed = capsys.readouterr().out.splitlines()
    assert [json.loads(text) for text in printed] == [line]
    written = (tmp_path / "results" / f"{line['benchmark']}.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in written] == [line]
    assert left_over(tmp_path) == []
    text, missing = publish.page(tmp_path / "results")
    assert line["benchmark"] not in missing and f"`python -m benchmarks.{line['benchmark']}`, " in text


IDS = torch.arange(12)[None] + 20
WAYS = {"donor", "donor, once more", "table resident", "table on disk, warm"}


def test_decode_compares_both_places_with_the_donor(given, tmp_path, capsys):
    line = decode.main([*given, "--rows", "50", "--head-dim", "4", "--tokens", "10", "--dtypes", "donor,bfloat16"])
    check_line(line, tmp_path, capsys)
    assert set(line["measured"]["by_backbone_dtype"]) == {"float32", "bfloat16"}
    for ways in line["measured"]["by_backbone_dtype"].values():
        assert set(ways) == WAYS
        assert ways["donor"]["speed_ratio"]["median"] == 1
        assert all(entry["seconds"]["rounds"] == 2 for entry in ways.values())
    assert (line["sizes"]["heads"], line["sizes"]["orders"], line["sizes"]["row_bytes"]) == (8, [2, 3], 8)
    assert line["sizes"]["table_bytes"] == 8 * line["sizes"]["rows"] > 2 * 16 * 50 * 8


def test_sides_share_the_weights_of_the_donor_that_they_are_of(tiny_donor, tiny_engram):
    donor, graft = tiny_donor(), tiny_engram()
    logits = graft(IDS).logits
    assert benchmark_models.with_weights_of(graft, donor) is graft
    theirs = [tensor.data_ptr() for tensor in donor.parameters()]
    assert [tensor.data_ptr() for tensor in graft.backbone.parameters()] == theirs
    assert torch.equal(graft(IDS).logits, logits)
    with torch.no_grad():
        donor.lm_head.weight[0, 0] += 1
    with pytest.raises(CannotMeasure, match="the weight '.*' of the donor is not in the model"):
        benchmark_models.with_weights_of(tiny_engram(), donor)


def test_prefill_reads_a_text_with_the_same_models(given, tmp_path, capsys):
    line = prefill.main([*given, "--rows", "50", "--head-dim", "4", "--tokens", "40", "--dtypes", "donor"])
    check_line(line, tmp_path, capsys)
    assert set(line["measured"]["by_backbone_dtype"]["float32"]) == WAYS
    assert line["sizes"]["tokens"] == 40


def test_hash_compares_one_token_and_a_text(given, tmp_path, capsys):
    small = ["--head-dim", "4", "--tokens", "40", "--rows", "1000", "--decoded", "8"]
    line = hash_benchmark.main([*given, *small])
    check_line(line, tmp_path, capsys)
    assert set(line["measured"]) == {"one_token", "long_text"}
    for entry in line["measured"].values():
        assert set(entry["microseconds"]) == {"demo", "ours"} and entry["share_of_forward"]["share"]["median"] > 0


def test_the_numpy_procedure_and_a_step_are_compared_before_they_are_timed(tiny_engram, monkeypatch):
    hasher = tiny_engram().memory.hashing
    ids = torch.randint(0, 4104, (2, 30))
    hash_benchmark.refuse_other_rows(hasher, NumpyHash(hasher), ids)
    wrong = NumpyHash(hasher)
    wrong.multipliers = {layer: values + 2 for layer, values in wrong.multipliers.items()}
    with pytest.raises(CannotMeasure, match="other hashes"):
        hash_benchmark.refuse_other_rows(hasher, wrong, ids)
    monkeypatch.setattr(NgramHasher, "living_texts", lambda self, ids, history: self.behind(ids, None))
    with pytest.raises(CannotMeasure, match="other rows than the text"):
        hash_benchmark.refuse_other_rows(hasher, NumpyHash(hasher), ids)


def test_one_token_is_hashed_with_the_two_before_it(tiny_engram):
    """What `hash` times as one token of decoding gives the rows that the whole text has there."""
    hasher: NgramHasher = tiny_engram().memory.hashing
    ids = torch.randint(0, 4104, (1, 3))
    decoded = torch.tensor(hash_benchmark.a_step(hasher, ids[:, 2:], hasher.compress(ids[:, :2]))())
    assert torch.equal(decoded, hash_benchmark.a_text(hasher, ids)()[:, :, 2].flatten(2))
    alone = hash_benchmark.a_text(hasher, ids[:, 2:])()
    assert not torch.equal(decoded, alone[:, 0].flatten(2)), "control: without the two before it the rows are others"


def test_scale_measures_every_size_in_every_place(given, tmp_path, capsys):
    line = scale.main([*given, "--sizes", "1000,5000", "--tokens", "8", "--text", "40"])
    check_line(line, tmp_path, capsys)
    places = {f"{size} rows, {place}" for size in ("1,000", "5,000") for place in ("resident", "on disk, warm")}
    assert set(line["measured"]["decode"]) == {"donor"} | places
    assert set(line["measured"]["reading_microseconds_a_token"]) == places
    assert {table["row_bytes"] for table in line["sizes"]["tables"].values()} == {16}
    smallest = line["measured"]["decode"]["1,000 rows, resident"]["times_the_smallest"]
    assert smallest["median"] == 1


def test_placements_measures_every_way_warm_and_cold(given, tmp_path, capsys):
    plain = given[: given.index("--layers")]
    line = placements.main([*plain, "--bytes", "2000000", "--reads", "8,64"])
    check_line(line, tmp_path, capsys)
    for states in line["measured"]["by_reads"].values():
        assert len(states["warm"]) == len(states["cold"]) == 7
    assert line["measured"]["shortened_file"] == {
        "mapped": "killed by SIGBUS",
        "positioned": "0 bytes of 160",
    }


def test_hooks_counts_the_whole_table_for_accelerate_and_rows_for_us(given, tmp_path, capsys):
    try:
        line = hooks.main([*given, "--rows", "300", "--head-dim", "4", "--tokens", "1,20"])
    except CannotMeasure as error:
        pytest.skip(str(error))
    check_line(line, tmp_path, capsys)
    table = line["sizes"]["table_bytes"]
    for tokens in (1, 20):
        entry = line["measured"][f"{tokens} tokens"]
        ways, unique = entry["ways"], entry["unique_row_bytes"]
        assert ways[hooks.CONTROL]["h2d_bytes_for_rows"] == 0
        for verb in ("cpu_offload", "dispatch_model to cpu", "dispatch_model to disk"):
            assert ways[f"{verb}, accelerate"]["h2d_bytes_for_rows"] == table
            # Rows that differ, and for each of the 32 reads of a token at most 8 bytes to say where they go.
            assert unique <= ways[f"{verb}, ours"]["h2d_bytes_for_rows"] <= unique + 8 * 32 * tokens < table


# Tables.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_filled_table_is_random_finite_and_never_zero(tmp_path, donor, dtype):
    folder = grafts.make_graft(donor, tmp_path / "graft", [1, 2], 300, 4, dtype)
    (path,) = grafts.memory_files(folder)
    before = load_file(path)
    assert not any(tensor.any() for name, tensor in before.items() if name.startswith(grafts.TABLES))  # a fresh graft
    written = grafts.fill(path)
    after = load_file(path)
    assert written == grafts.table_bytes([path]) == grafts.describe(folder)["table_bytes"]
    for name, tensor in after.items():
        if name.startswith(grafts.TABLES):
            values = tensor.float().abs()
            assert float(values.min()) >= 2**-7 and float(values.max()) < 2**-3
            assert len(torch.unique(tensor, dim=0)) > 0.9 * len(tensor)  # 4 values of 2**10 each: hardly a repeat
        else:
            assert torch.equal(tensor, before[name]), name
    assert AutoModelForCausalLM.from_pretrained(folder, engram_placement="device") is not None


def test_no_block_of_a_table_repeats_another(tmp_path, donor, monkeypatch):
    monkeypatch.setattr(grafts, "BLOCK", 4096)  # so that a tiny table has several
    folder = grafts.make_graft(donor, tmp_path / "graft", [1, 2], 300, 4, "bfloat16")
    (path,) = grafts.memory_files(folder)
    grafts.fill(path)
    tables = [t for name, t in load_file(path).items() if name.startswith(grafts.TABLES)]
    blocks = [b for t in tables for b in t.flatten().view(torch.uint8).split(4096) if len(b) == 4096]
    assert len(blocks) > 10
    assert len({bytes(block.numpy()) for block in blocks}) == len(blocks)


def test_a_file_with_holes_is_refused_and_a_filled_one_is_not(tmp_path):
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    with open(sparse, "wb") as file:
        file.truncate(1 << 22)
    with open(full, "wb") as file:
        grafts.write_all(file.fileno(), grafts.random_block(np.random.default_rng(0), 1 << 22, "BF16"), 0)
        grafts.write_out(file.fileno())
    grafts.refuse_holes(full)
    if sparse.stat().st_blocks * 512 >= 1 << 22:
        pytest.skip("this file system has no sparse files")
    with pytest.raises(OSError, match="it has holes"):
        grafts.refuse_holes(sparse)


# Refusals and interruptions.


def test_a_run_without_room_is_refused_before_anything_is_made(given, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "MOST_BYTES", 10_000)  # and a tiny run, which would do no harm if it were not refused
    with pytest.raises(room.NoRoomError, match=r"copy of the donor = .* GB, more than the"):
        decode.main([*given, "--rows", "50", "--head-dim", "4", "--tokens", "4", "--dtypes", "donor"])
    assert left_over(tmp_path) == []
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_interrupted_deletes_its_graft_and_records_nothing(given, tmp_path, monkeypatch, error):
    seen = []

    def interrupted(*args, **kwargs):
        seen.extend(left_over(tmp_path))
        raise error

    monkeypatch.setattr(decode, "interleave", interrupted)
    with pytest.raises(error):
        decode.main([*given, "--rows", "50", "--head-dim", "4"])
    assert len(seen) == 1, "control: there was a graft"
    assert left_over(tmp_path) == []
    assert not (tmp_path / "results").exists()


def test_a_folder_that_is_no_donor_is_refused(given, tmp_path):
    with pytest.raises(FileNotFoundError, match="make donor"):
        prefill.main([*given, "--donor", str(tmp_path)])


# The large one and the peer, as far as a test can go.


@pytest.fixture
def large(tmp_path, donor) -> argparse.Namespace:
    """Folders of a tiny `big`, its tables made and filled as it does it."""
    folder = tmp_path / "work" / "big"
    folder.mkdir(parents=True)
    asked = big.options(["--layers", "1,2", "--head-dim", "4", "--shard", "3KB", "--rounds", "2", "--threads", "1"])
    stages = big.Stages(folder, {})
    wanted = {folder / "on-disk": 20_000, folder / "resident": 2_000}
    assert stages.once("made", lambda: big.make(asked, donor, wanted))
    files = [path for made in wanted for path in grafts.memory_files(made)]
    big.fill(stages, files)
    assert len(stages.done["filled"]) == len(files) > 6
    places = {"donor": donor, "small": folder / "resident", "big": folder / "on-disk"}
    return argparse.Namespace(**places, tokens=40, decoded=10, rounds=2, threads=1)


def test_a_file_that_was_filled_is_not_filled_again(large, tmp_path):
    files = grafts.memory_files(large.big)
    before = {path: path.read_bytes() for path in files}
    big.fill(big.Stages(large.big.parent, {}), files)
    assert all(path.read_bytes() == before[path] for path in files)


def test_the_large_table_is_read_cold_and_warm_and_compared_with_the_resident_one(large):
    found = big_child.prefill(large)
    ways = {"donor", "resident", "on disk, warm", "on disk, cold"}
    assert set(found["speeds"]) == ways
    assert all(entry["seconds"]["rounds"] == 2 for entry in found["speeds"].values())
    assert set(found["against_resident"]) == {"on disk, warm", "on disk, cold"}
    assert 0 < found["held_bytes"]["anonymous"] <= found["held_bytes"]["peak"]
    decoded = big_child.decode(large)
    assert set(decoded["speeds"]) == ways - {"on disk, cold"}
    assert set(decoded["cold"]["speeds"]) == ways - {"on disk, warm"}


def test_a_fresh_process_reports_load_time_and_memory(large):
    found = memory_cap.run_child("benchmarks.big_child", ["load", "--folder", str(large.big), "--placement", "disk"])
    assert set(found) == {"load_seconds", "anonymous", "file", "peak"}
    assert found["load_seconds"] > 0
    with pytest.raises(CannotMeasure, match="unrecognized arguments"):
        memory_cap.run_child("benchmarks.publish", ["--nonsense"])


def test_our_side_of_the_peer_reads_rows_and_generates_the_donors_tokens(tiny_donor, tiny_tokenizer):
    job = {"layers": [1, 2], "rows": 200, "head_dim": 4, "prompt": 8, "generated": 6, "forward": list(range(5, 25))}
    model, about, rows = peer_side.ours(job, tiny_donor(), tiny_tokenizer)
    ids = torch.tensor([job["forward"]])
    assert torch.equal(peer_side.generate(model, ids, job), peer_side.generate(tiny_donor(), ids, job))
    assert peer_side.generate(model, ids, job).shape == (1, 14)
    assert all(bool(part.any()) for part in rows) and "engram-transformers" in about
    with torch.no_grad():
        model.memory.layers["1"].key_value.weight.normal_(0, 3)
        moved = model(input_ids=ids).logits
        with model.disable_memory():
            assert not torch.equal(moved, model(input_ids=ids).logits)  # control: the rows do reach the stream
