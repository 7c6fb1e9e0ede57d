"""Initial tables: rows are what they are said to be, and only zeros leave the donor's answers exactly as they are.

Run: pytest tests/integration/test_initial_tables.py
"""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engram_transformers import graft
from engram_transformers.conversion import initial_tables, plan_graft
from engram_transformers.conversion.cli import app
from engram_transformers.conversion.initial_tables import generator
from engram_transformers.hash_ngrams_engram import naive_hash_ids

from .backbones import BACKBONES


FIELDS = {"engram_vocab_size": 53, "engram_n_heads": 2, "engram_head_dim": 4}  # few rows: n-grams share them
STD = 0.5
TEXT = "The harbour was closed. The harbour was open again on Monday, and the ships came back.\n" * 3


@pytest.fixture
def donor(tiny_donor, tiny_tokenizer, tmp_path):
    def make(config=None):
        made = tiny_donor(config)
        made.save_pretrained(tmp_path / "donor")
        tiny_tokenizer.save_pretrained(tmp_path / "donor")
        return tmp_path / "donor", made

    return make


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Several blocks, windows and pieces in a small table and a short text."""
    for name, value in {"_BLOCK": 100, "_WINDOW": 16, "_CHUNK": 7, "_CHARACTERS": 100}.items():
        monkeypatch.setattr(initial_tables, name, value)
    (tmp_path / "text.txt").write_text(TEXT)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.arange(3, 40)[None]).logits


def given(init: str, tmp_path) -> dict:
    texts = {} if init in ("zero", "normal") else {"init_text": tmp_path / "text.txt"}
    return {"init": init, **texts, **({} if init == "zero" else {"init_std": STD})}


def test_every_block_of_normal_numbers_has_a_seed_of_its_own(donor, tmp_path):
    folder, _ = donor()
    more = {"engram_table_dtype": "bfloat16", "engram_table_parts": 2, "engram_seed": 5}
    model = AutoModelForCausalLM.from_pretrained(
        graft(folder, tmp_path / "out", [1, 2], init="normal", **FIELDS, **more)
    )
    seen = []
    for name, part in model.memory.tables.named_parameters():
        values = part.detach().flatten()
        for block, first in enumerate(range(0, len(values), 100)):
            expected = generator(5, f"memory.tables.{name}", block).standard_normal(100, dtype=np.float32)
            expected = (torch.from_numpy(expected) * 0.02).bfloat16()[: len(values) - first]
            assert torch.equal(values[first : first + 100], expected)
            seen.append(values[first : first + 9].tolist())
    assert len(seen) > 20 and len({tuple(values) for values in seen}) == len(seen)
    assert 0.018 < torch.cat([part.flatten() for part in model.memory.tables.parameters()]).std() < 0.022


def states_of(init: str, backbone, ids: torch.Tensor, layer: int, order: int) -> torch.Tensor:
    """A state of each position of a text, `(tokens, D)`, of root mean square 1."""
    with torch.no_grad():
        if init == "embeddings":
            weight = backbone.get_input_embeddings().weight
            none = torch.zeros(1, weight.shape[1])
            found = [none] * (order - 1) + [weight[i][None] for i in ids.tolist()]
            states = torch.cat([sum(found[t : t + order]) for t in range(len(ids))])
        else:
            windows = [backbone(window[None], output_hidden_states=True).hidden_states for window in ids.split(16)]
            states = torch.cat([hidden[layer][0] for hidden in windows])
    states = states.mean(1) if states.ndim == 3 else states  # of several streams
    return states / states.pow(2).mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("init", "kind"), [("embeddings", None), ("corpus", None), ("corpus", "deepseek_v4")])
def test_rows_have_the_mean_of_what_the_text_has_for_them(init, kind, donor, tiny_tokenizer, tmp_path):
    folder, backbone = donor(kind and BACKBONES[kind]())
    parts = {"engram_table_parts": 3}
    out = graft(folder, tmp_path / "out", [1, 2], **given(init, tmp_path), **FIELDS, **parts)
    model = AutoModelForCausalLM.from_pretrained(out)
    hashing = model.memory.hashing
    ids = torch.tensor(tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    classes = hashing.compress(ids[None])[0].tolist()
    for index, layer in enumerate([1, 2]):
        multipliers, primes = hashing.multipliers[index].tolist(), hashing.primes[index].tolist()
        hashes = naive_hash_ids(classes, multipliers, primes, int(hashing.pad_class))
        for order in (2, 3):
            states = states_of(init, backbone, ids, layer, order)
            table = torch.cat(list(model.memory.tables[str(layer)].get_submodule(f"order{order}").parameters()))
            for head in range(2):
                drawn = generator(0, layer, order, head).standard_normal((states.shape[1], 4), dtype=np.float32)
                projected = states @ torch.from_numpy(drawn) * (STD / math.sqrt(states.shape[1]))
                read = defaultdict(list)
                for t in range(len(ids)):
                    read[hashes[t][(order - 2) * 2 + head]].append(projected[t])
                rows = table[sum(primes[order - 2][:head]) :][: primes[order - 2][head]]
                for row, values in enumerate(rows):
                    expected = torch.stack(read[row]).mean(0) if row in read else torch.zeros(4)
                    torch.testing.assert_close(values, expected, atol=2e-3, rtol=0)  # states are stored in 16 bits
                assert 10 < len(read) < len(rows) and max(map(len, read.values())) > 3


@pytest.mark.parametrize("init", initial_tables.INITS)
def test_only_a_graft_of_zeros_is_its_donor_exactly_and_a_plan_says_so(init, donor, tmp_path):
    folder, backbone = donor()
    options = given(init, tmp_path) if init == "zero" else {**given(init, tmp_path), "init_std": None}
    model = AutoModelForCausalLM.from_pretrained(graft(folder, tmp_path / "out", [1], **options, **FIELDS))
    change = (logits(model) - logits(backbone)).abs().max()
    assert (change == 0) == (init == "zero") and change < 0.25 * logits(backbone).std()
    with model.disable_memory():
        assert torch.equal(logits(model), logits(backbone))
    said = "\n".join(plan_graft(folder, [1], **options, **FIELDS).lines())
    assert ("the donor, because" in said, "nearly, not exactly" in said) == (init == "zero", init != "zero")
    assert ("take no disk" in said, "tables included" in said) == (init == "zero", init != "zero")


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"init": "random"}, ValueError, "init='random' is unknown: choose one of zero, normal"),
        ({"init": "corpus"}, ValueError, "init='corpus' needs init_text"),
        ({"init": "normal", "init_text": "text.txt"}, ValueError, "init='normal' reads no text"),
        ({"init": "corpus", "init_text": "absent.txt"}, FileNotFoundError, "absent.txt' is missing"),
        ({"init": "corpus", "init_text": "empty.txt"}, ValueError, "empty.txt' is empty"),
        ({"init": "embeddings", "init_text": "latin.txt"}, ValueError, "latin.txt' is not text in UTF-8"),
        ({"init_std": 0.1}, ValueError, "init_std=0.1 is for other tables"),
        ({"init": "normal", "init_std": -1.0}, ValueError, "init_std=-1.0 must be a number above 0"),
        ({"init": "normal", "engram_vocab_size": 10**12}, OSError, "bytes of tables, and .* are free"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(fields, error, says, donor, tmp_path, monkeypatch):
    folder, _ = donor()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=says):
        graft(folder, tmp_path / "out", [1], **{**FIELDS, **fields})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_command_and_a_recipe_take_what_tables_start_from(donor, tmp_path):
    folder, _ = donor()
    text = tmp_path / "text.txt"
    sizes = "layer_ids: [1]\nvocab_size: 53\nn_heads: 2\nhead_dim: 4\n"
    (tmp_path / "recipe.yaml").write_text(f"donor: {folder}\n{sizes}init: embeddings\ninit_text: {text}\n")
    arguments = ["graft", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--init-std", "0.5", "--no-digests"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'out'}\n", done.output
    receipt = json.loads((tmp_path / "out" / "engram_graft.json").read_text())
    assert {"init": "embeddings", "init_std": 0.5, "init_text": "text.txt"}.items() <= receipt["recipe"].items()
    assert "sha256" not in receipt["outputs"]["config.json"]
    made = graft(folder, tmp_path / "made", [1], **given("embeddings", tmp_path), **FIELDS)
    tables = [next(out.glob("engram-memory-*")).read_bytes() for out in (made, tmp_path / "out")]
    assert tables[0] == tables[1]
    wrong = CliRunner().invoke(app, ["graft", str(folder), str(tmp_path / "wrong"), "--init", "corpus"])
    assert wrong.exit_code == 2 and "needs init_text" in wrong.output and not (tmp_path / "wrong").exists()
