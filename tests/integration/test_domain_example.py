"""The experiment on a domain runs from end to end at tiny size, keeps its runs, and fills its tables.

Not run here: apt's download. Run: pytest tests/integration/test_domain_example.py
"""

import gzip
import json

from examples.domain import __main__ as domain
from examples.domain import publish, text


def digits(number: int) -> str:
    """A number as dictd's index writes it."""
    rest, last = divmod(number, 64)
    return (digits(rest) if rest else "") + text.DIGITS[last]


def make_texts(folder) -> None:
    """The two packages as they are unpacked: a dictionary of 300 entries, and a FAQ of 8 pages."""
    entries = [
        f"word {n}\n\n   The {n}th {{word}} of a small\n   dictionary, {'which says little ' * 9}.\n\n"
        for n in range(300)
    ]
    dictionary = folder / "unpacked" / f"{text.FOLDOC}.dict.dz"
    dictionary.parent.mkdir(parents=True)
    dictionary.write_bytes(gzip.compress("".join(entries).encode()))
    index, place = [], 0
    for entry in entries:
        index.append(f"{entry.partition(chr(10))[0]}\t{digits(place)}\t{digits(len(entry))}\n")
        place += len(entry)
    dictionary.with_name("foldoc.index").write_text("".join(index))
    pages = folder / "unpacked" / text.FAQ
    pages.mkdir(parents=True)
    for page in range(8):
        (pages / f"secA{page}.html").write_text(f"<p>Page {page} has <b>prose</b> &amp; little else.</p>\n" * 40)


def test_every_run_is_made_once_and_the_tables_have_every_way(tmp_path, donor, monkeypatch):
    make_texts(tmp_path / "texts")
    assert next(text.foldoc_entries(tmp_path / "texts" / "unpacked"))[1].startswith("word 0: The 0th word of a small d")
    monkeypatch.setattr(domain, "DOSES", (domain.RECIPE.table_lr, 0.5))
    monkeypatch.setattr(domain, "LORA_RATES", (5e-4, 1e-3))
    memory = {"engram_layer_ids": [1, 2], "engram_vocab_size": 60, "engram_n_heads": 2, "engram_head_dim": 4}
    given = ["--donor", str(donor), "--results", str(tmp_path / "lines"), "--texts", str(tmp_path / "texts")]
    given += ["--threads", "1", "--tokens", "1024", "--sample", "512", "--seeds", "0,1"]
    given += ["--memory", json.dumps(memory), "--recipe", json.dumps({"batch": 2, "length": 64, "passes": 1})]
    lines = domain.main(given)
    written = (tmp_path / "lines").read_text()
    # donor, 2 x (memory, one_row, both), two rates of LoRA and the best one's second seed, and one more dose.
    assert len(written.splitlines()) == 1 + 2 * 3 + 2 + 1 + 1
    assert domain.main(given) == lines and (tmp_path / "lines").read_text() == written
    runs = publish.Runs(lines)
    shown = publish.whole(runs)
    for way in ("donor", "memory", "control: its rows shuffled", "control: one row a head", "LoRA at 0.0005"):
        assert f"| {way} |" in shown
    assert f"memory + LoRA at {runs.best:g}" in shown and "| 0.5 | 250 |" in shown
