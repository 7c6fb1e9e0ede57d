"""The page, the picture and the verbs that show what a memory reads; hostile texts, in a real browser.

Run: pytest tests/integration/test_inspect_page.py
"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engram_transformers.conversion.cli import app
from engram_transformers.inspection import CorpusNgrams, read_text, reads_page, sharers


HOSTILE = (
    "</script><img src=x onerror=\"document.title='caught'\"><!-- \x1b[31m &amp; \u2028 {{ script }} ${1} caf\u00e9"
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def reads(tiny_engram, tiny_tokenizer):
    return read_text(tiny_engram(trained=True), tiny_tokenizer, HOSTILE)


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.data, self._inside = [], "", False

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self._inside = ("id", "data") in attrs

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.data += data if self._inside else ""


def test_a_hostile_text_makes_no_element(reads):
    page = reads_page(reads, {(1, 2, 3): [HOSTILE]})
    parsed = Elements()
    parsed.feed(page)
    assert parsed.found.count("script") == 2 and "img" not in parsed.found
    assert not set("<>&") & set(parsed.data), "no text can end the element, begin a comment or a script in it"
    data = json.loads(parsed.data)
    assert "".join(data["tokens"]) == HOSTILE and data["ngrams"] == [HOSTILE]
    assert re.search(r"default-src 'none'; style-src 'sha256-[^ ]+'; script-src 'sha256-[^ ]+'", page)


def opened(page, tmp_path, token: int) -> tuple[str, str]:
    """The page's elements after its script has run with a token chosen, and what the browser said."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"file://{tmp_path}/page.html#{token}"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: apt install chromium")
def test_a_browser_shows_it_without_an_error(reads, tmp_path):
    row = int(reads.rows[0, 1, 0, 0])
    page = reads_page(reads, {(reads.layer_ids[0], 2, row): ["<b>a neighbour</b>"]})
    shown, console = opened(page, tmp_path, 1)
    assert console == ""
    assert "<title>What the memory read</title>" in shown and "<img" not in shown
    assert len(re.findall("<span [^>]*style=", shown)) == len(reads.tokens)
    assert len(re.findall('class="[^"]*chosen', shown)) == 1
    assert "&lt;b&gt;a neighbour&lt;/b&gt;" in shown and f'<td class="number">{row}</td>' in shown
    assert "no corpus given" in opened(reads_page(reads), tmp_path, 1)[0]
    # The control: a page whose script is not the one that its policy names.
    shown, console = opened(page.replace("let chosen = -1", "let chosen = -2"), tmp_path, 1)
    assert "Content Security Policy" in console and "neighbour&lt;/b&gt;" not in shown


@pytest.mark.slow
def test_two_thousand_tokens_with_their_sharers_stay_below_two_megabytes(tiny_engram, tiny_tokenizer):
    """Eight heads, three orders' rows, and a corpus in which every row has several readers."""
    model = tiny_engram(trained=True, engram_n_heads=8)
    words = [tiny_tokenizer.decode([token]) for token in range(300, 2300)]
    text = tiny_tokenizer.decode(range(300, 2300))
    reads = read_text(model, tiny_tokenizer, text[: 2000 * len(text) // len(tiny_tokenizer(text)["input_ids"])])
    shared = sharers(CorpusNgrams(model, tiny_tokenizer, [" ".join(words)]), reads)
    assert 1500 < len(reads.tokens) <= 2300 and len(shared) > 1000
    assert len(reads_page(reads, shared).encode()) < 2_000_000


@pytest.fixture
def checkpoint(tiny_engram, tiny_tokenizer, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "graft")
    tiny_tokenizer.save_pretrained(tmp_path / "graft")
    return tmp_path / "graft"


def engram(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_prints_and_writes(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    done = engram("inspect", checkpoint, "--text", HOSTILE)
    assert done.exit_code == 0, done.output
    assert "\x1b[31m" not in done.stdout and "\\x1b" in done.stdout and "16/16" not in done.stdout
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "a caf\u00e9"}) + "\n", encoding="utf-8")
    files = ["--html", tmp_path / "a.html", "--png", tmp_path / "a.png"]
    done = engram("inspect", checkpoint, "--text", "a caf\u00e9 $5$", "--corpus", tmp_path / "corpus.jsonl", *files)
    assert done.exit_code == 0 and done.stdout.split() == [str(tmp_path / "a.html"), str(tmp_path / "a.png")]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and '"has_corpus":true' in (
        tmp_path / "a.html"
    ).read_text(encoding="utf-8")
    told = json.loads(engram("inspect", checkpoint, "--text", "a", "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert told["layer_ids"] == model.config.engram_layer_ids and told["sharers"] == {}


def test_occupancy_and_ablate(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "texts.txt").write_text("It rained all day.\n\nThe sun came out.\n", encoding="utf-8")
    done = engram("occupancy", checkpoint, tmp_path / "texts.txt", "--png", tmp_path / "use.png", "--hot", 1)
    assert done.exit_code == 0 and str(tmp_path / "use.png") in done.stdout and "reads:" in done.stdout, done.output
    use = json.loads(engram("occupancy", checkpoint, tmp_path / "texts.txt", "--json").stdout)
    assert [(one["layer"], one["order"]) for one in use] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    done = engram("lookup", checkpoint, "rained all", "--corpus", tmp_path / "texts.txt")
    assert done.exit_code == 0 and "next token without these rows" in done.stdout, done.output
    assert len(json.loads(engram("lookup", checkpoint, "rained all", "--json").stdout)["rows"]) == 8
    done = engram("ablate", checkpoint, tmp_path / "texts.txt")
    assert done.exit_code == 0 and "| memory off |" in done.stdout, done.output
    assert json.loads(engram("ablate", checkpoint, tmp_path / "texts.txt", "--json").stdout)["one row"]["tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "CHECKPOINT"], "either --text or --file"),
        (["inspect", "CHECKPOINT", "--text", "a", "--html", "THERE"], "is there already"),
        (["inspect", "CHECKPOINT", "--text", "", "--json"], "no tokens"),
        (["occupancy", "CHECKPOINT", "EMPTY"], "holds no text"),
        (["ablate", "CHECKPOINT", "BAD.jsonl"], 'an object with a "text"'),
        (["ablate", "CHECKPOINT", "MISSING"], "MISSING"),
        (["inspect", "no/such-model", "--text", "a"], "no tokenizer"),
    ],
)
def test_mistakes_are_one_sentence(checkpoint, tmp_path, arguments, message):
    for name, content in {"THERE": "mine", "EMPTY": "\n", "BAD.jsonl": "[1]\n"}.items():
        (tmp_path / name).write_text(content)
    places = {"CHECKPOINT": checkpoint, **{name: tmp_path / name for name in ("THERE", "EMPTY", "BAD.jsonl")}}
    done = engram(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()) and "Traceback" not in done.output
    assert (tmp_path / "THERE").read_text() == "mine"
