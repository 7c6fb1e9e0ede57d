"""Casts of a checkpoint's tables: what is kept, what changes and by how much, and what is refused.

Run: pytest tests/integration/test_cast.py
"""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engram_transformers import EngramFormatError
from engram_transformers.conversion import cast, graft, table_cast
from engram_transformers.conversion.cli import app
from engram_transformers.inspection import verify_checkpoint
from engram_transformers.rows_quantised_engram import dequantise, quantise

from ..faults import Child, shard_of


TYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
QUANTISED = ("int8", "float8_e4m3fn")
TEXT = "The bridge over the river was built in the year of the flood."


@pytest.fixture
def saved(tiny_engram, tiny_tokenizer, tmp_path):
    """Factory of checkpoints, in tmp_path / dtype."""

    def make(dtype="float32", **fields):
        model = tiny_engram(trained=True, **{"engram_table_dtype": dtype, "engram_head_dim": 32, **fields})
        model.save_pretrained(tmp_path / dtype)
        tiny_tokenizer.save_pretrained(tmp_path / dtype)
        return tmp_path / dtype

    return make


def tables(folder) -> dict[str, torch.Tensor]:
    return {name: rows for path in folder.glob("engram-memory-*") for name, rows in load_file(path).items()}


def values(folder) -> dict[str, torch.Tensor]:
    """The rows in float32."""
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["engram_table_dtype"])
    read = dequantise if dtype in (torch.int8, torch.float8_e4m3fn) else lambda rows, _: rows.float()
    return {name: read(rows, dtype) for name, rows in tables(folder).items()}


def files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def engram(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("before", TYPES)
def test_a_cast_gives_every_other_type_and_says_its_error(before, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(table_cast, "BLOCK_VALUES", 32 * 77)  # several blocks, and a last one
    folder = saved(before, engram_table_parts=2)
    held, kept = values(folder), files(folder)
    for after in set(TYPES) - {before}:
        report = cast(folder, tmp_path / f"to {after}", after)
        found = values(report.folder)
        for name, rows in tables(report.folder).items():
            quick = quantise(held[name], getattr(torch, after)) if after in QUANTISED else held[name].to(rows.dtype)
            assert torch.equal(rows, quick), name
        old, new = (torch.cat([each[name].flatten() for name in held]) for each in (held, found))
        assert report.max_error == (new - old).abs().max() and report.largest == old.abs().max()
        assert report.rms_error == pytest.approx(float((new - old).square().mean().sqrt()), rel=1e-4)
        assert report.rms == pytest.approx(float(old.square().mean().sqrt()), rel=1e-4)
        assert report.bytes_after == sum(rows.nbytes for rows in tables(report.folder).values())
        assert all(finding.ok for finding in verify_checkpoint(report.folder, generation=False))
    assert files(folder) == kept, "the checkpoint was changed"


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_not_a_table_is_kept_and_a_model_of_it_works(kind, saved, tmp_path):
    folder = saved()
    (folder / "README.md").write_text("A card.")
    report = cast(folder, tmp_path / "out", kind)
    before, after = files(folder), files(report.folder)
    differ = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    indexes = {"model.safetensors.index.json", "without_tables/model.safetensors.index.json"}
    shards = {name for name in before.keys() | after.keys() if name.startswith("engram-memory-")}
    assert differ == {"config.json", "engram_graft.json"} | indexes | shards
    old, new = (json.loads(each["config.json"]) for each in (before, after))
    assert {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} == {"engram_table_dtype"}
    index = json.loads(after["model.safetensors.index.json"])
    total = sum(rows.nbytes for path in report.folder.glob("*.safetensors") for rows in load_file(path).values())
    assert index["metadata"]["total_size"] == total
    assert json.loads(after["engram_graft.json"])["surgery"][0]["after"] == kind
    model = AutoModelForCausalLM.from_pretrained(report.folder, engram_placement="disk")
    twin = AutoModelForCausalLM.from_pretrained(folder)
    twin.load_state_dict({**twin.state_dict(), **values(report.folder)})
    ids = torch.randint(3, 4000, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)


@pytest.mark.parametrize("kind", QUANTISED)
def test_there_and_back_gives_the_same_records(kind, saved, tmp_path):
    folder = saved(kind)
    back = cast(cast(folder, tmp_path / "wide", "float32").folder, tmp_path / "back", kind)
    assert back.max_error == 0.0
    if kind == "int8":
        assert shard_of(back.folder).read_bytes() == shard_of(folder).read_bytes()
    casts = json.loads((back.folder / "engram_graft.json").read_text())["surgery"]
    assert [(told["before"], told["after"]) for told in casts] == [(kind, "float32"), ("float32", kind)]


def test_zeros_take_no_disk(tiny_donor, tiny_tokenizer, tmp_path):
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    fields = {"engram_vocab_size": 60_000, "engram_head_dim": 32}
    folder = graft(tmp_path / "donor", tmp_path / "fresh", [1], **fields)
    report = cast(folder, tmp_path / "out", "int8")
    assert report.max_error == report.rms == 0.0 and "0.000% of the largest" in report.lines()[1]
    status = shard_of(report.folder).stat()
    assert status.st_size > 30_000_000 > 10_000_000 > status.st_blocks * 512
    assert json.loads((report.folder / "engram_graft.json").read_text())["donor"] == "donor"


def test_a_choice_of_what_is_trained_does_not_outlive_its_rows(tiny_engram, tmp_path):
    tiny_engram(trained=True).set_trainable("memory").save_pretrained(tmp_path / "in")
    cast(tmp_path / "in", tmp_path / "half", "bfloat16")
    cast(tmp_path / "in", tmp_path / "int8", "int8")
    found = [AutoModelForCausalLM.from_pretrained(tmp_path / name).config.engram_trainable for name in ("half", "int8")]
    assert found == ["memory", None]


def test_the_loss_on_a_text_is_measured_before_and_after(saved, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(table_cast, "TEXT_WINDOW", 7)  # several windows, and one of a single token
    folder, text = saved(), TEXT
    while len(tiny_tokenizer(text).input_ids) % 7 != 1:
        text += " a"
    report = cast(folder, tmp_path / "out", "int8", text=text)
    windows = torch.tensor(tiny_tokenizer(text).input_ids).split(7)[:-1]
    for loss, name in ((report.loss_before, "float32"), (report.loss_after, "out")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            expected = torch.stack([model(each[None], labels=each[None]).loss for each in windows]).mean()
        assert loss == pytest.approx(float(expected), abs=1e-5)
    assert report.loss_before != report.loss_after
    assert (
        json.loads((report.folder / "engram_graft.json").read_text())["surgery"][0]["loss_after"] == report.loss_after
    )


def spoilt(folder, value: float) -> None:
    """One value of a table is another."""
    rows = load_file(shard_of(folder))
    rows["memory.tables.1.order3.0"][5, 2] = value
    save_file(rows, shard_of(folder), {"format": "pt"})


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), "int8", r"'memory.tables.1.order3.0' cannot be cast, in rows 0\.\.\d+: .*NaN"),
        (float("inf"), "bfloat16", "do not fit"),
        (1e6, "float16", r"values up to 1e\+06 do not fit torch.float16"),
    ],
)
def test_rows_that_the_type_cannot_hold_are_refused_and_nothing_is_left(value, dtype, words, saved, tmp_path):
    folder = saved()
    spoilt(folder, value)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=words):
        cast(folder, tmp_path / "out", dtype)
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_mistakes_are_refused_before_anything_is_written(saved, tiny_engram, tmp_path):
    folder = saved()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    narrow = tiny_engram()
    narrow.save_pretrained(tmp_path / "narrow")
    narrow.memory.layers["1"].key_norm.data.add_(1)
    narrow.save_memory_delta(tmp_path / "delta")
    narrow.config.save_pretrained(tmp_path / "delta")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((folder / "config.json").read_bytes())
    before = files(tmp_path)
    for source, out, dtype, error, words in (
        (folder, "used", "int8", FileExistsError, "used' exists and is not empty"),
        (folder, "out", "int4", ValueError, "'int4' of a table must be one of 'float32'"),
        (folder, "out", "float32", ValueError, "are 'float32' already"),
        (tmp_path / "nowhere", "out", "int8", FileNotFoundError, "nowhere' has no config.json"),
        (tmp_path / "narrow", "out", "float8_e4m3fn", ValueError, "engram_head_dim=4 is not divisible by 32"),
        (tmp_path / "delta", "out", "int8", ValueError, "holds a memory delta"),
        (tmp_path / "broken", "out", "int8", (FileNotFoundError, EngramFormatError), "has no model.safetensors.index"),
    ):
        with pytest.raises(error, match=words):
            cast(source, tmp_path / out, dtype)
    with pytest.raises(ValueError, match="has 0 tokens.*longer text"):
        cast(folder, tmp_path / "out", "int8", text="")
    with pytest.raises(ValueError, match="more than max_memory_shard_size"):
        cast(folder, tmp_path / "out", "bfloat16", max_memory_shard_size=1000)
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_cast_that_is_killed_leaves_no_checkpoint_and_the_next_one_is_whole(saved, tmp_path, monkeypatch):
    folder = saved()
    whole = cast(folder, tmp_path / "whole", "int8").folder

    def killed():
        monkeypatch.setattr(table_cast, "_write_receipt", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        cast(folder, tmp_path / "out", "int8")

    with pytest.raises(AssertionError):
        Child(killed).result()
    assert not (tmp_path / "out").exists()
    assert files(cast(folder, tmp_path / "out", "int8").folder) == files(whole)


def test_the_command_prints_the_folder_and_the_report(saved, tmp_path):
    folder = saved()
    (tmp_path / "text.txt").write_text(TEXT)
    done = engram("cast", folder, tmp_path / "out", "--dtype", "int8", "--text", tmp_path / "text.txt")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "out")
    assert "largest error" in done.stderr and "loss on the text" in done.stderr
    for arguments in (
        ("--dtype", "int4"),
        ("--dtype", "int8", "--text", tmp_path / "none.txt"),
        ("--dtype", "int8", "--max-memory-shard-size", "much"),
    ):
        refused = engram("cast", folder, tmp_path / "again", *arguments)
        assert refused.exit_code == 2 and refused.stdout == "" and "error:" in refused.stderr
        assert "Traceback" not in refused.output and not (tmp_path / "again").exists()
    assert "Example: engram cast" in " ".join(engram("cast", "--help").output.split())
