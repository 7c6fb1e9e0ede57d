"""Grafts that were killed: the same call goes on and gives the bytes of an unbroken run; drafts are never mixed.

Run: pytest tests/integration/test_graft_resume.py
"""

import hashlib
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from engram_transformers import graft
from engram_transformers.conversion.receipt import Receipt
from engram_transformers.files_atomic_engram import locked
from engram_transformers.files_safetensors_engram import start_of_data

from ..deaths import dies_at, operations


# Eight files of tables.
FIELDS = {"engram_vocab_size": 300, "engram_n_heads": 2, "engram_head_dim": 4, "max_memory_shard_size": 6000}


@pytest.fixture
def donor(tiny_donor, tiny_tokenizer, tmp_path):
    tiny_donor().save_pretrained(tmp_path / "donor", max_shard_size=200_000)
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    (tmp_path / "text.txt").write_text("The harbour was closed, and the harbour was open again on Monday.\n" * 3)
    return tmp_path / "donor"


def make(donor: Path, name: str = "out", init: str = "normal", **more) -> Path:
    texts = {} if init in ("zero", "normal") else {"init_text": donor.parent / "text.txt"}
    return graft(donor, donor.parent / name, [1, 2], init=init, **texts, **{**FIELDS, **more})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drafts(donor: Path) -> list[Path]:
    return sorted(donor.parent.glob(".*.grafting-*"))


def interrupted(monkeypatch, donor: Path, after: int, **more) -> Path:
    """The draft of a run that ends, as by Ctrl-C, when some tables are finished."""
    with monkeypatch.context() as patched:
        finish = Receipt.finish

        def stopping(receipt, *given):
            if len(receipt.outputs) == after:
                raise KeyboardInterrupt
            finish(receipt, *given)

        patched.setattr(Receipt, "finish", stopping)
        with pytest.raises(KeyboardInterrupt):
            make(donor, **more)
    (draft,) = drafts(donor)
    return draft


@pytest.mark.parametrize("init", ["normal", "embeddings"])
@pytest.mark.parametrize("digests", [True, False])
def test_a_run_goes_on_where_it_was_and_writes_no_finished_table_again(init, digests, donor, monkeypatch):
    whole = contents(make(donor, "whole", init=init, digests=digests))
    draft = interrupted(monkeypatch, donor, after=3, init=init, digests=digests)
    tables = sorted(draft.glob("engram-memory-*"))
    before = {path.name: path.stat() for path in tables[:3]}
    assert len(tables) == 8
    out = make(donor, init=init, digests=digests)
    assert contents(out) == whole and drafts(donor) == []
    for name, status in before.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


@pytest.mark.parametrize("damage", ["a byte", "the end"])
def test_a_finished_table_that_was_damaged_is_written_again(damage, donor, monkeypatch):
    whole = contents(make(donor, "whole"))
    path = sorted(interrupted(monkeypatch, donor, after=3).glob("engram-memory-*"))[0]
    if damage == "the end":
        os.truncate(path, path.stat().st_size - 4)
    else:
        with open(path, "r+b") as file:
            file.seek(start_of_data(path) + 100)
            file.write(b"x")
    assert path.read_bytes() != whole[path.name]
    assert contents(make(donor)) == whole


@pytest.mark.parametrize("change", ["seed", "donor", "text"])
def test_a_draft_of_something_else_is_not_gone_on_with_and_is_removed(change, donor, tiny_donor, monkeypatch):
    init = "normal" if change == "seed" else "embeddings"
    draft = interrupted(monkeypatch, donor, after=3, init=init)
    more = {"engram_seed": 7} if change == "seed" else {}
    if change == "donor":
        tiny_donor(seed=1).save_pretrained(donor, max_shard_size=200_000)  # of the same sizes
    elif change == "text":
        (donor.parent / "text.txt").write_text("Another text, of other words.\n")
    out = make(donor, init=init, **more)
    assert not draft.exists() and drafts(donor) == []
    whole = contents(make(donor, "whole", init=init, **more))
    assert contents(out) == whole


def test_a_run_that_is_alive_is_left_alone(donor, monkeypatch):
    draft = interrupted(monkeypatch, donor, after=3)
    finished = contents(draft)
    with locked(draft):
        with pytest.raises(BlockingIOError, match="another process makes the same graft"):
            make(donor)
        make(donor, engram_seed=7)
    assert contents(draft) == finished


def test_a_run_that_dies_at_an_operation_on_a_file_is_gone_on_with(donor):
    whole = contents(make(donor, "whole", init="embeddings"))
    count = operations(lambda: make(donor, "counted", init="embeddings"))
    assert dies_at(count * 3 // 4, lambda: make(donor, init="embeddings")) and len(drafts(donor)) == 1
    assert contents(make(donor, init="embeddings")) == whole and drafts(donor) == []


@pytest.mark.slow
@pytest.mark.parametrize("init", ["zero", "normal", "corpus"])
def test_a_run_that_dies_anywhere_is_gone_on_with(init, donor):
    whole = contents(make(donor, "whole", init=init))
    count = operations(lambda: make(donor, "counted", init=init))
    for place in range(0, count, max(1, count // 12)):
        assert dies_at(place, partial(make, donor, f"at{place}", init=init))
        assert contents(make(donor, f"at{place}", init=init)) == whole, f"killed at {place} of {count}"
    assert drafts(donor) == []


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bytes(donor):
    begun = time.monotonic()
    whole = contents(make(donor, "whole"))
    seconds, moments = time.monotonic() - begun, random.Random(0)
    killed = 0
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                make(donor)
            finally:
                os._exit(0)
        time.sleep(seconds * moments.uniform(0.1, 1.0))
        os.kill(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        killed += ended == -signal.SIGKILL
        if (donor.parent / "out").exists():
            assert contents(donor.parent / "out") == whole
            os.rename(donor.parent / "out", donor.parent / f"done{killed}")
    assert killed > 3
    assert contents(make(donor)) == whole and drafts(donor) == []


def test_the_receipt_has_the_digest_of_every_file_and_no_path(donor, tmp_path):
    for init in ("zero", "embeddings"):
        out = make(donor, init, init=init, tokenizer=donor)
        text = (out / "engram_graft.json").read_text()
        receipt = json.loads(text)
        assert str(tmp_path) not in text and os.sep + "tmp" not in text and receipt["donor"] == "donor"
        assert receipt["versions"].keys() >= {"torch", "transformers", "engram-transformers"}
        assert receipt["outputs"].keys() == contents(out).keys() - {"engram_graft.json"}
        wanted = {
            "config.json",
            "tokenizer.json",
            "tokenizer/tokenizer.json",
            *(p.name for p in donor.glob("*.safetensors")),
        }
        assert receipt["inputs"].keys() >= wanted | ({"init_text/text.txt"} if init == "embeddings" else set())
        for name, said in receipt["outputs"].items():
            data = (out / name).read_bytes()
            zeros = said.get("data") == "zeros"
            assert zeros == (init == "zero" and name.startswith("engram-memory-"))
            hashed = data[: start_of_data(out / name)] if zeros else data
            assert said["bytes"] == len(data)
            assert said["header_sha256" if zeros else "sha256"] == hashlib.sha256(hashed).hexdigest()
        for name, said in receipt["inputs"].items():
            source = tmp_path / "text.txt" if name.startswith("init_text/") else donor / name.removeprefix("tokenizer/")
            assert said["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    bare = json.loads((make(donor, "bare", digests=False) / "engram_graft.json").read_text())
    assert {tuple(said) for said in (*bare["inputs"].values(), *bare["outputs"].values())} == {("bytes",)}
