"""The benchmark of a domain runs from end to end at tiny size: every way trains what it says on the same text, runs
that are there are not made again, and rows are shuffled among those that were trained.

Nothing is asserted of a time. Not run here: engram-peft's side, which pip has to install, and apt's download.
Run: pytest tests/integration/test_training_benchmarks.py
"""

import dataclasses
import gzip
import json

import pytest
import torch

from benchmarks import domain, domain_text, domain_train, publish, record
from benchmarks.command import CannotMeasure
from benchmarks.domain_train import Recipe


MEMORY = {"engram_layer_ids": [1, 2], "engram_vocab_size": 60, "engram_n_heads": 2, "engram_head_dim": 4}
SMALL = {"batch": 2, "length": 64}


def digits(number: int) -> str:
    """A number as dictd's index writes it."""
    text = ""
    while True:
        number, digit = divmod(number, 64)
        text = domain_text.DIGITS[digit] + text
        if not number:
            return text


@pytest.fixture
def texts(tmp_path):
    """A work folder in which the packages are unpacked, with a dictionary of 300 entries of our own."""
    unpacked = tmp_path / "texts" / "unpacked"
    entries = [
        f"word {n}\n\n   <jargon> The {n}th {{word}} of a small\n   dictionary, which says little and says it in "
        f"{n + 7} words.\n\n   It has a second paragraph.\n\n   (1999-12-{n % 30 + 1:02d})\n\n"
        for n in range(300)
    ]
    entries.append("tiny\n\n   See {word}.\n\n")  # too short to be kept
    dictionary = unpacked / f"{domain_text.FOLDOC}.dict.dz"
    dictionary.parent.mkdir(parents=True)
    head = "00-database-short\n     a dictionary\n"
    dictionary.write_bytes(gzip.compress((head + "".join(entries)).encode()))
    index, place = [f"00-database-short\tA\t{digits(len(head))}"], len(head)
    for entry in entries:
        word = entry.partition("\n")[0]
        index += [f"{name}\t{digits(place)}\t{digits(len(entry))}" for name in (word, word.upper())]  # and an alias
        place += len(entry)
    (unpacked / f"{domain_text.FOLDOC}.index").write_text("\n".join(index) + "\n")
    pages = unpacked / domain_text.FAQ
    pages.mkdir(parents=True)
    for page in range(8):
        prose = f"<p>Page {page} has <b>prose</b> &amp; little else to say about the matter.</p>\n" * 40
        (pages / f"secA{page}.html").write_text(f"<title>left out</title>{prose}")
    return tmp_path / "texts"


# The texts.


def test_entries_are_read_once_each_without_marks_and_dates(texts):
    entries = list(domain_text.foldoc_entries(domain_text.fetch(texts)))
    assert len(entries) == 300, "aliases name an entry again, and the short one is left out"
    assert entries[4] == (
        "word 4",
        "word 4: <jargon> The 4th word of a small dictionary, which says little and says it in 11 words.\n"
        "It has a second paragraph.",
    )


def test_a_number_of_the_index_is_base_64():
    assert [domain_text.place_of(text) for text in ("A", "B", "/", "BA", "DdjQ")] == [0, 1, 63, 64, 0o003354320 + 0o0]
    assert all(domain_text.place_of(digits(number)) == number for number in (0, 63, 64, 5_578_681))


def test_the_faq_is_paragraphs_without_tags(texts):
    pages = domain_text.faq_texts(domain_text.fetch(texts))
    assert len(pages) == 8
    assert pages[3].splitlines() == ["Page 3 has prose & little else to say about the matter."] * 40


def test_the_windows_are_the_same_every_time_and_recall_is_a_sample_of_what_is_taught(texts, tiny_tokenizer):
    first, again = (domain_text.load(tiny_tokenizer, domain_text.fetch(texts), 4096, 1024) for _ in range(2))
    for name in ("train", *domain_text.SAMPLES):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    taught = {tuple(window.tolist()) for window in first.train}
    assert first.train.shape == (8, 512) and first.recall.shape == (2, 512)
    assert all(tuple(window.tolist()) in taught for window in first.recall)
    assert not any(tuple(window.tolist()) in taught for window in first.held_out)


def test_without_apt_the_texts_are_not_to_be_had_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotMeasure, match=r"Debian packages.*dict-foldoc and anarchism"):
        domain_text.fetch(tmp_path / "texts")


# One run of the domain.


def text_of(tokenizer, texts) -> domain_text.DomainText:
    return domain_text.load(tokenizer, domain_text.fetch(texts), 2048, 512)


def changed(before: dict, model) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def learn(model, text, recipe: Recipe) -> set[str]:
    """Names of what a run changes."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    domain_train.train(model, text.train, recipe, 0, lambda *progress: None)
    return changed(before, model)


@pytest.mark.parametrize("kind", ["memory", "lora", "both"])
def test_a_run_trains_what_it_says_and_nothing_of_the_donor(kind, donor, texts, tiny_tokenizer):
    recipe = Recipe(
        memory=None if kind == "lora" else MEMORY, lora_lr=None if kind == "memory" else 1e-2, lora_rank=2, **SMALL
    )
    model = domain_train.build(donor, recipe, 0)
    names = learn(model, text_of(tiny_tokenizer, texts), recipe)
    assert names
    assert any("memory.tables." in name for name in names) == (kind != "lora")
    assert any("lora_" in name for name in names) == (kind != "memory")
    assert all("memory." in name or "lora_" in name for name in names), "control: the donor's own weights"


def test_all_ways_read_the_same_sequences_in_the_same_order(donor, texts, tiny_tokenizer):
    text = text_of(tiny_tokenizer, texts)
    seen: dict[str, list] = {}
    for kind, recipe in (("memory", Recipe(memory=MEMORY, **SMALL)), ("lora", Recipe(lora_lr=1e-3, **SMALL))):
        model = domain_train.build(donor, recipe, 0)
        read = seen.setdefault(kind, [])
        model.get_input_embeddings().register_forward_pre_hook(lambda module, args, read=read: read.append(args[0]))
        told = domain_train.train(model, text.train, recipe, 7, lambda *progress: None)
        assert told["tokens"] == 2048 and told["steps"] == len(read) == 16
    assert all(torch.equal(one, other) for one, other in zip(seen["memory"], seen["lora"], strict=True))


def test_each_kind_of_weight_learns_at_its_own_rate(donor):
    recipe = Recipe(memory=MEMORY, table_lr=0.3, dense_lr=0.1, lora_lr=0.02, table_eps=1e-5, beta2=0.9)
    recipe = dataclasses.replace(recipe, table_optimizer="adagrad")
    optimizer = domain_train.optimizer_for(domain_train.build(donor, recipe, 0), recipe)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: round(group["lr"], 9) for name, group in groups.items()} == {
        "tables": 0.3,
        "projections": 0.1,
        "vectors": 0.1,
        "backbone": 0.02,
    }
    assert groups["tables"]["eps"] == 1e-5 and groups["projections"]["eps"] != 1e-5
    assert groups["tables"]["table_optimizer"] == "adagrad"
    assert all(group["betas"] == (0.9, 0.9) for group in groups.values())


def test_shuffled_rows_are_the_trained_ones_in_other_places(donor, texts, tiny_tokenizer):
    recipe = Recipe(memory=MEMORY, table_lr=0.5, **SMALL)
    model, text = domain_train.build(donor, recipe, 0), text_of(tiny_tokenizer, texts)
    learn(model, text, recipe)
    before = [part.detach().clone() for part in model.memory.tables.parameters()]
    learnt = domain_train.losses_of(model, text)
    moved = domain_train.shuffle_rows(model)
    parts = list(model.memory.tables.parameters())
    assert moved == sum(int(part.any(1).sum()) for part in before) > 10
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part.any(1), old.any(1)), "rows that nothing has learnt stay zero"
        assert not torch.equal(part, old)
        assert torch.equal(part.detach().sort(0).values, old.sort(0).values)
    assert domain_train.losses_of(model, text)["recall"] != learnt["recall"]
    with model.disable_memory():
        assert domain_train.losses_of(model, text) == domain_train.losses_of(
            domain_train.build(donor, Recipe(), 0), text
        ), "control: the donor is where it was"


# The whole benchmark.


@pytest.fixture
def asked(donor, texts, tmp_path) -> list[str]:
    """Arguments of a tiny run."""
    places = {"donor": donor, "work": tmp_path / "work", "results": tmp_path / "results", "texts": texts}
    return [
        *(text for name, path in places.items() for text in (f"--{name}", str(path))),
        *("--threads", "1", "--tokens", "1024", "--sample", "512", "--seeds", "0,1"),
        *("--memory", json.dumps(MEMORY), "--recipe", json.dumps({**SMALL, "passes": 1})),
    ]


def test_the_domain_is_measured_once_and_its_page_has_every_way(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(domain, "DOSES", (domain.LEARNT.table_lr, 0.5))
    monkeypatch.setattr(domain, "LORA_RATES", (5e-4, 1e-3))
    runs = ["--runs", "donor,memory,one_row,lora,both,dose"]
    lines = domain.main([*asked, *runs])
    file = tmp_path / "results" / "domain.jsonl"
    written = file.read_text().splitlines()
    # donor, 2 x (memory, one_row, both), two rates of LoRA and the best one's second seed, and two doses: one is the
    # memory's own.
    assert len(written) == 1 + 2 * 3 + 2 + 1 + 1
    assert all(set(line["measured"]["loss"]) == set(domain_text.SAMPLES) for line in lines)
    assert "there" in capsys.readouterr().err
    assert domain.main([*asked, *runs]) == lines
    assert file.read_text().splitlines() == written, "a run that is there is not made again"
    one = domain.main([*asked, "--runs", "memory", "--seeds", "2"])
    assert len(file.read_text().splitlines()) == len(written) + len(one) == len(written) + 1
    page = "".join(f"{publish.FIRST.format(name=n)}{publish.LAST.format(name=n)}" for n in publish.FIGURES)
    text, missing = publish.with_figures(page, tmp_path / "results")
    assert missing == ["training"]
    for way in (
        "| donor |",
        "| memory |",
        "rows shuffled |",
        "one row a head |",
        "| LoRA at 0.0005 |",
        "memory + LoRA",
    ):
        assert way in text, way
    assert publish.with_figures(text, tmp_path / "results")[0] == text


def test_a_run_of_another_commit_is_made_again_if_that_is_asked_for(asked, tmp_path, monkeypatch):
    domain.main([*asked, "--runs", "donor"])
    monkeypatch.setattr(record, "commit", lambda *folder: "another")
    domain.main([*asked, "--runs", "donor"])
    assert len(record.results_of("domain", tmp_path / "results")) == 1
    domain.main([*asked, "--runs", "donor", "--again"])
    commits = [line["commit"] for line in record.results_of("domain", tmp_path / "results")]
    assert len(commits) == 2 and commits[1] == "another" != commits[0]


def test_an_interrupted_run_keeps_those_before_it(asked, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(domain_train, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        domain.main([*asked, "--runs", "donor,memory"])
    lines = record.results_of("domain", tmp_path / "results")
    assert [line["sizes"]["run"] for line in lines] == ["donor"]


def test_a_run_that_nobody_knows_is_refused_before_anything_is_loaded(asked, tmp_path):
    with pytest.raises(ValueError, match="no run is called qlora"):
        domain.main([*asked, "--runs", "memory,qlora"])
    assert not (tmp_path / "results").exists()
