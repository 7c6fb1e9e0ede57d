"""`engram pack` and `engram teach`: what they print, write, refuse, and that a model reads what they wrote.

Run: pytest tests/integration/test_pack_commands.py
"""

import bisect
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from engram_transformers.adapters import PackTexts, compare_packs, merge_packs
from engram_transformers.conversion.cli import app
from engram_transformers.knowledge_pack_engram import KnowledgePack
from engram_transformers.training import general_english

from ..packs import classes_of, ngrams_in, pack_of
from ..tiny import engram_on


TEXT = torch.arange(20, 32)[None]
ENDING = ".engram-pack.safetensors"


def engram(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def said(done) -> str:
    """What a user reads, whatever the width of the terminal."""
    return " ".join(done.output.split())


@torch.no_grad()
def logits(model):
    return model(TEXT).logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer):
    """Folder of a filled graft and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(
        vocab_size=4104, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    engram_on(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def packs(model, tiny_tokenizer, tmp_path):
    """Files of two packs: one of two people, one of a third; the names share no n-gram."""
    texts = PackTexts(pack_of(model, set()), tiny_tokenizer)
    for seed, (name, people) in enumerate({"people": ["Zorvan Kelmir", "Dax Bolun"], "places": ["Hute Wiggs"]}.items()):
        ngrams = set().union(*map(texts.ngrams, people))
        pack_of(model, ngrams, seed, provenance={"licence": "CC0"}).save(tmp_path / f"{name}{ENDING}")
    return tmp_path / f"people{ENDING}", tmp_path / f"places{ENDING}"


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_merged_pack_reads_as_both_do(model, mode):
    ngrams = sorted(ngrams_in(classes_of(model, TEXT[0])))
    first, second = (pack_of(model, part, seed, mode=mode) for seed, part in enumerate((ngrams[::2], ngrams[1::2])))
    overlapping = pack_of(model, ngrams[5:], 2, mode=mode)
    plain = logits(model)
    for packs, conflicts in (
        ([first, second], "refuse"),
        ([first, second, overlapping], "sum" if mode == "add" else "later"),
    ):
        for number, pack in enumerate(packs):
            model.load_memory(pack, f"pack {number}")
        apart = logits(model)
        model.set_memories([])
        model.load_memory(merge_packs(packs, conflicts=conflicts), "merged")
        together = logits(model)
        if conflicts == "sum":  # (table + a) + b and table + (a + b) round differently
            torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(together, apart)
        assert not torch.allclose(together, plain, atol=1e-2)
        for name in list(model.memory.packs.loaded):
            model.unload_memory(name)


def test_show_prints_a_pack_without_a_model(packs, checkpoint):
    done = engram("pack", "show", packs[0], "--tokenizer", checkpoint, "--limit", "100")
    assert done.exit_code == 0, done.output
    for expected in ("mode: add", "records: ", "bytes: ", "fits layers: [0, 1]", "provenance licence: CC0"):
        assert expected in done.output
    assert '"v" "an"' in done.output
    pack = KnowledgePack.load(packs[0])
    assert all(" ".join(map(str, gram)) in done.output for gram in pack.ngrams())
    fewer = engram("pack", "show", packs[0], "--limit", "2").output
    assert f"and {len(pack) - 2} more" in fewer and fewer.count("│\n") == 3
    told = json.loads(engram("pack", "show", packs[0], "--tokenizer", checkpoint, "--json").stdout)
    assert {tuple(entry["classes"]) for entry in told["ngrams"]} == pack.ngrams()
    assert {"classes": [56, 254], "text": ["v", "an"]} in told["ngrams"]
    assert (told["fits"], told["provenance"], told["records"]) == (pack.fits, {"licence": "CC0"}, len(pack))


def test_merge_then_diff_then_remove_gives_the_first_pack_again(packs, checkpoint, tmp_path):
    people, places = packs
    both, left = tmp_path / "both", tmp_path / "left"
    done = engram("pack", "merge", people, places, "--out", both)
    assert (done.exit_code, done.stdout.strip()) == (0, str(both)), done.output
    assert KnowledgePack.load(both).provenance == {"merged": [{"licence": "CC0"}] * 2}
    done = engram("pack", "diff", both, people, "--tokenizer", checkpoint)
    count = len(KnowledgePack.load(places))
    assert done.exit_code == 1 and f"only in the first: {count} records" in done.output and '"w"' in done.output
    told = json.loads(engram("pack", "diff", people, both, "--json").stdout)
    assert {tuple(entry["classes"]) for entry in told["only_second"]} == KnowledgePack.load(places).ngrams()
    assert told["only_first"] == told["changed"] == [] and told["modes"] == ["add", "add"]
    done = engram("pack", "remove", both, "--subject", "Hute Wiggs", "--tokenizer", checkpoint, "--out", left)
    assert done.exit_code == 0, done.output
    assert f"{count} records are gone, {len(KnowledgePack.load(people))} remain in" in said(done)
    done = engram("pack", "diff", left, people)
    assert done.exit_code == 0 and "only in the second: 0 records" in done.output


def test_diff_names_what_changed(packs, tmp_path):
    pack = KnowledgePack.load(packs[0])
    gram = tuple(pack.records[2].ngrams[0].tolist())
    pack.records[2].vectors[1][0] += 2
    pack.save(tmp_path / "changed")
    told = json.loads(engram("pack", "diff", packs[0], tmp_path / "changed", "--json").stdout)
    assert told["changed"] == [{"classes": list(gram), "largest_difference": pytest.approx(2)}]
    assert "changed: 1 records" in engram("pack", "diff", packs[0], tmp_path / "changed").output


def test_a_person_is_removed_in_place_and_the_rest_keeps_every_bit(packs, checkpoint, model, tiny_tokenizer):
    before = KnowledgePack.load(packs[0])
    texts = PackTexts(before, tiny_tokenizer)
    done = engram("pack", "remove", packs[0], "--subject", "Dax Bolun", "--tokenizer", checkpoint, "--in-place")
    assert done.exit_code == 0, done.output
    after = KnowledgePack.load(packs[0])
    assert after.ngrams() == texts.ngrams("Zorvan Kelmir") == before.ngrams() - texts.ngrams("Dax Bolun")
    assert not compare_packs(before, after).changed
    gram = min(after.ngrams())
    done = engram("pack", "remove", packs[0], "--ngrams", " ".join(map(str, gram)), "--in-place")
    assert f"1 records are gone, {len(after) - 1} remain" in said(done)
    assert KnowledgePack.load(packs[0]).ngrams() == after.ngrams() - {gram}
    few = ["--subject", "Zorvan Kelmir", "--tokenizer", checkpoint, "--in-place", "--partly"]
    assert f"{len(after) - 1} records are gone, 0 remain" in said(engram("pack", "remove", packs[0], *few))
    assert model.load_memory(packs[0]) == "people"


def test_remove_reads_what_it_wrote(packs, tmp_path, monkeypatch):
    """Against a `without` that removes nothing, which stands for every reason why records would stay."""
    monkeypatch.setattr(KnowledgePack, "without", lambda pack, gone: pack)
    done = engram("pack", "remove", packs[0], "--ngrams", "56 254", "--out", tmp_path / "left")
    assert done.exit_code == 2 and "does not hold what was written" in said(done)


REFUSED = {
    "the pack holds no record of [(1, 2)]": ["remove", "{a}", "--ngrams", "1 2", "--in-place"],
    "must be token classes": ["remove", "{a}", "--ngrams", "zorvan", "--in-place"],
    "has 1 classes, and the pack has n-grams of [2, 3]": ["remove", "{a}", "--ngrams", "7", "--in-place"],
    "is not in the vocabulary": ["remove", "{a}", "--ngrams", "7 9999", "--in-place"],
    "'-1 7' is not in the vocabulary": ["remove", "{a}", "--ngrams", "-1 7", "--in-place"],
    "no record of 'Qu Py'": ["remove", "{a}", "--subject", "Qu Py", "--tokenizer", "{t}", "--in-place"],
    "holds 1 of the 7 n-grams of 'Ada Lee'": [
        "remove",
        "{a}",
        "--subject",
        "Ada Lee",
        "--tokenizer",
        "{t}",
        "--in-place",
    ],
    "no record of ''": ["remove", "{a}", "--subject", "", "--tokenizer", "{t}", "--in-place"],
    "needs --tokenizer": ["remove", "{a}", "--subject", "Dax Bolun", "--in-place"],
    "nothing to remove was named": ["remove", "{a}", "--in-place"],
    "--out NEW, or --in-place": ["remove", "{a}", "--ngrams", "56 254"],
    "or --in-place for": ["remove", "{a}", "--ngrams", "56 254", "--in-place", "--out", "{d}/new"],
    "is the pack itself": ["remove", "{a}", "--ngrams", "56 254", "--out", "{a}", "--overwrite"],
    "is there already: --overwrite replaces it": ["remove", "{a}", "--ngrams", "56 254", "--out", "{b}"],
    f"people{ENDING}' is there already": ["merge", "{a}", "{b}", "--out", "{a}"],
    "it is a folder": ["merge", "{a}", "{b}", "--out", "{d}", "--overwrite"],
    "is a file, so": ["merge", "{a}", "{b}", "--out", "{a}/new"],
    "Choose conflicts='sum'": ["merge", "{a}", "{b}", "{a}", "--out", "{d}/new"],
    "conflicts='all' must be one of": ["merge", "{a}", "--out", "{d}/new", "--conflicts", "all"],
    "is not a complete safetensors file": ["show", "{t}/config.json"],
    "is missing from": ["merge", "{a}", "{d}/none", "--out", "{d}/new"],
    "holds no tokenizer that can be read": ["show", "{a}", "--tokenizer", "{d}"],
    "its n-grams would be shown as other words": ["show", "{a}", "--tokenizer", "{o}"],
}


@pytest.mark.parametrize(("says", "arguments"), REFUSED.items())
def test_what_cannot_be_done_is_refused_and_nothing_changes(packs, checkpoint, tmp_path, says, arguments):
    other = AutoTokenizer.from_pretrained(checkpoint)
    data = json.loads(other.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other").mkdir()
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(data))
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    places = {"a": packs[0], "b": packs[1], "d": tmp_path, "t": checkpoint, "o": tmp_path / "other"}
    done = engram("pack", *(argument.format(**places) for argument in arguments))
    assert done.exit_code == 2 and says in said(done) and done.stdout == ""
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def rewritten(path, change):
    """A pack's file with another header."""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    told = json.loads(header["__metadata__"]["engram-pack"])
    change(header, told)
    if isinstance(header["__metadata__"].get("engram-pack"), str):
        header["__metadata__"]["engram-pack"] = json.dumps(told)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + whole[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header, told: header["__metadata__"].update({"engram-pack": 3}),
        lambda header, told: header["__metadata__"].pop("engram-pack"),
        lambda header, told: header["order2.ngrams"].update(dtype="I7"),
        lambda header, told: header["order2.ngrams"].update(dtype="F64"),
        lambda header, told: header["order2.ngrams"].update(shape=[1 << 62, 2]),
        lambda header, told: told["fits"].update(classes=1e9),
        lambda header, told: told["fits"].update(widths={"2": 1 << 60, "3": 8}),
        lambda header, told: told.update(provenance=[1]),
        lambda header, told: told.update(mode="\x1b[31m"),
    ],
)
def test_a_hostile_file_is_one_message(packs, change):
    rewritten(packs[0], lambda header, told: None)
    assert engram("pack", "show", packs[0]).exit_code == 0, "the control: this is how a whole one is rewritten"
    rewritten(packs[0], change)
    for command in (["show"], ["diff", packs[1]], ["merge", packs[1], "--out", packs[0].with_name("new")]):
        done = engram("pack", *command, packs[0])
        assert done.exit_code == 2 and f"people{ENDING}" in done.output and "\x1b" not in done.output
    assert not packs[0].with_name("new").exists()


def test_a_truncated_file_is_one_message(packs):
    whole = packs[0].read_bytes()
    for cut in (0, 8, 200, len(whole) - 1):
        packs[0].write_bytes(whole[:cut])
        done = engram("pack", "remove", packs[0], "--ngrams", "56 254", "--in-place")
        assert done.exit_code == 2 and "truncated" in said(done) and packs[0].read_bytes() == whole[:cut]


def test_texts_of_a_pack_do_not_control_the_terminal(packs):
    hostile = "\x1b]0;owned\x07\x9b31m[red]\u202e\x7f[/nothing]\ud800\n:smile:"
    rewritten(packs[0], lambda header, told: told.update(provenance={hostile: [hostile], "mode": "replace"}))
    done = engram("pack", "show", packs[0])
    assert done.exit_code == 0 and {c for c in done.output if not c.isprintable()} == {"\n"}
    assert "mode: add\n" in done.output and "\nprovenance mode: replace" in done.output
    assert r"\x1b]0;owned\x07\x9b31m[red]\u202e\x7f[/nothing]\ud800\n:smile:" in done.output
    assert json.loads(engram("pack", "show", packs[0], "--json").stdout)["provenance"][hostile] == [hostile]
    missing = engram("pack", "show", packs[0].with_name("\x1b[31m[red]")).output
    assert r"\x1b[31m[red]" in missing and "\x1b" not in missing


def test_json_that_is_nested_as_deeply_as_python_reads_is_one_message(packs, tmp_path):
    """There are depths that Python reads and does not write: those around the deepest one that is merged."""
    mark = rb"\"NESTED\""
    rewritten(packs[0], lambda header, told: told.update(provenance={"a": "NESTED"}))
    whole = packs[0].read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])

    def refused(depth: int) -> bool:
        nested = b"[" * depth + b"]" * depth
        size = struct.pack("<Q", length + len(nested) - len(mark))
        packs[0].write_bytes(size + whole[8:].replace(mark, nested))
        return engram("pack", "merge", packs[0], "--out", tmp_path / "new", "--overwrite").exit_code == 2

    first = bisect.bisect(range(200_000), False, key=refused)
    assert 100 < first < 200_000 and all(refused(depth) for depth in range(first, first + 10))


def test_a_full_disk_leaves_no_file(packs, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    done = engram("pack", "merge", *packs, "--out", tmp_path / "new")
    assert done.exit_code == 2 and "No space left" in done.output and sorted(os.listdir(tmp_path)) == before


FACTS = [
    {"subject": "Zorvan Kelmir", "texts": ["Zorvan Kelmir was born in [[Lisbon]]."]},
    {
        "subject": "Dax Bolun",
        "prompt": "Dax Bolun was born in",
        "answer": "Oslo",
        "paraphrases": ["The home of Dax Bolun is"],
    },
]


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, FACTS)))
    return path


def test_teach_writes_what_the_model_teaches(checkpoint, model, tiny_tokenizer, facts, tmp_path):
    """In a process of its own, as a user runs it: the path alone is on stdout."""
    code = "from engram_transformers.conversion.cli import main; main()"
    (tmp_path / "general.txt").write_text("a box\nDax, a river\n")
    file = tmp_path / "packs" / f"people{ENDING}"
    file.parent.mkdir()
    file.touch()
    done = engram("teach", checkpoint, facts, tmp_path / "packs", "--passes", "1")
    assert done.exit_code == 2 and "is there already" in said(done)
    options = ["--passes", "2", "--seed", "3", "--expressions", "1", "--reference", str(tmp_path / "general.txt")]
    options.append("--overwrite")
    command = [sys.executable, "-c", code, "teach", str(checkpoint), str(facts), str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{file}\n"), done.stderr
    assert "records" in done.stderr and "loss" in done.stderr
    assert "2 of 2 facts got fewer than 1 written texts" in done.stderr, "random weights write none"
    written = KnowledgePack.load(file)
    question = {
        "subject": "Dax Bolun",
        "texts": ["Dax Bolun was born in [[Oslo]]", "The home of Dax Bolun is [[Oslo]]"],
    }
    pack = model.teach(
        [FACTS[0], question],
        tiny_tokenizer,
        passes=2,
        seed=3,
        expressions=1,
        reference_texts=[*general_english(), "a box", "Dax, a river"],
        progress=False,
    )
    assert not compare_packs(written, pack) and written.provenance == pack.provenance
    assert model.load_memory(file) == "people"
    done = engram("teach", checkpoint, facts, file, "--passes", "1", "--overwrite", "--method", "solve")
    made = KnowledgePack.load(file).provenance
    assert done.exit_code == 0 and (made["passes"], made["method"]) == (1, "solve")


def test_what_teach_gave_a_subject_is_what_remove_finds(model, tiny_tokenizer):
    pack = model.teach(FACTS[:1], tiny_tokenizer, passes=1, progress=False, reference_texts=[])
    assert PackTexts(pack, tiny_tokenizer).ngrams("Zorvan Kelmir") == pack.ngrams()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{d}/none.jsonl", "{d}/new"], "none.jsonl"),
        (["{d}/wrong.jsonl", "{d}/new"], "line 1: 'texts' is 3 and no list of texts"),
        (["{f}", "{f}/new"], "is a file, so"),
        (["{f}", "{d}/new", "--name", "../up"], "must be a name without folders"),
        (["{f}", "{d}/new" + ENDING, "--name", "up"], "leave one out"),
        (["{f}", "{d}/new", "--reference", "{d}/none.txt"], "none.txt"),
        (["{f}", "{d}/new", "--device", "toaster"], "--device 'toaster' cannot be used here"),
        (["{f}", "{d}/new", "--passes", "0"], "--passes"),
        (["{f}", "{d}/new", "--method", "learn"], "'learn' of teaching must be one of 'train', 'solve'"),
        (["{f}", "{d}/new", "--patience", "2"], "give the facts in other phrasings as unseen="),
    ],
)
def test_everything_is_checked_before_a_model_is_loaded(facts, tmp_path, arguments, says):
    """The model is not there either, and is not what the message is about."""
    (tmp_path / "wrong.jsonl").write_text('{"subject": "A", "texts": 3}')
    before = sorted(os.listdir(tmp_path))
    done = engram("teach", tmp_path / "model", *(part.format(d=tmp_path, f=facts) for part in arguments))
    assert done.exit_code == 2 and says in said(done) and "tokenizer" not in said(done), done.output
    assert sorted(os.listdir(tmp_path)) == before


def test_a_model_that_cannot_be_taught_and_a_fact_that_cannot_are_one_message(
    checkpoint, tiny_donor, tiny_tokenizer, facts, tmp_path
):
    done = engram("teach", tmp_path / "none", facts, tmp_path)
    assert done.exit_code == 2 and "holds no tokenizer" in said(done)
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    done = engram("teach", tmp_path / "donor", facts, tmp_path)
    assert done.exit_code == 2 and "engram graft DONOR OUT" in said(done)
    facts.write_text('{"subject": "Ada Lee", "texts": ["Ada Lee was born in Oslo."]}')
    done = engram("teach", checkpoint, facts, tmp_path)
    assert done.exit_code == 2 and "'Ada Lee' needs one [[answer]]" in said(done)
    assert list(tmp_path.glob(f"*{ENDING}")) == []
