"""Recipes and plans: a recipe is the options of `engram graft`, and a plan is what the graft then is.

Run: pytest tests/integration/test_recipes.py
"""

import json

import pytest
from typer.testing import CliRunner

from engram_transformers import EngramConfig, graft
from engram_transformers.conversion import graft_arguments, plan_graft, read_recipe
from engram_transformers.conversion.cli import app
from engram_transformers.files_safetensors_engram import read_header


OPTIONS = ["--layer-ids", "1,2", "--vocab-size", "200,300", "--n-heads", "2", "--head-dim", "4"]
RECIPE = "donor: {}\nlayer_ids: [1, 2]\nvocab_size: [200, 300]\nn_heads: 2\nhead_dim: 4\n"


def engram(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def donor(tiny_donor, tiny_tokenizer, tmp_path):
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


@pytest.fixture
def recipe(tmp_path):
    def write(text: str):
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write


def stored_bytes(folder, memory: bool) -> int:
    """Bytes of the weights of a graft's tables, or of its other weights that the donor has not."""
    entries = {n: entry for path in folder.glob("*.safetensors") for n, entry in read_header(path).items()}
    wanted = [entries[n] for n in entries if n.startswith("memory.tables." if memory else "memory.layers.")]
    return sum(entry.end - entry.begin for entry in wanted)


def test_a_recipe_is_the_options_and_options_go_before_it(donor, recipe, tmp_path):
    file = recipe(RECIPE.format(donor))
    for out, arguments in {"flags": [donor, *OPTIONS], "file": [file], "seed": [file, "--seed", "7"]}.items():
        done = engram("graft", arguments[0], tmp_path / out, *arguments[1:])
        assert done.exit_code == 0, done.output
    made = ("flags", "file", "seed")
    receipts = {out: json.loads((tmp_path / out / "engram_graft.json").read_text()) for out in made}
    assert receipts["flags"] == receipts["file"] and receipts["seed"]["recipe"]["engram_seed"] == 7
    assert receipts["file"]["donor"] == "donor", "a path of this machine in what is published"
    for described in (tmp_path / "file").glob("*.json"):
        assert str(tmp_path) not in described.read_text(), described
    assert EngramConfig.from_pretrained(tmp_path / "file").engram_vocab_size == [200, 300]


def test_a_plan_is_what_the_graft_is_and_needs_no_weights(donor, tmp_path):
    sizes = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
    out = graft(donor, tmp_path / "out", [1, 2], **sizes)
    planned = plan_graft(donor, [1, 2], **sizes)
    assert (planned.table_bytes, planned.dense_bytes) == (stored_bytes(out, True), stored_bytes(out, False))
    weights = donor / "model.safetensors"
    assert planned.donor_bytes == weights.stat().st_size
    parameters = planned.parameters
    weights.unlink()
    bare = plan_graft(donor, [1, 2], **sizes)
    assert bare.parameters == parameters and bare.donor_bytes == parameters * 4 and bare.warnings == []
    warned = plan_graft(donor, [1, 2], engram_vocab_size=10**8).warnings
    assert len(warned) == 3 and "larger than the donor" in warned[0] and "free disk" in warned[2]


def test_a_preset_gives_way_to_what_stands_beside_it():
    arguments = graft_arguments({"donor": "me/model", "preset": "engram-27b", "n_heads": 2, "text_only": None})
    assert arguments["donor"] == "me/model" and "text_only" not in arguments
    assert (arguments["engram_n_heads"], arguments["engram_vocab_size"]) == (2, 2_262_400)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layer_ids: [1]", "must be a mapping with a 'donor'"),
        ("- donor", "must be a mapping with a 'donor'"),
        ("donor: {}\nlayer_id: [1]", "unknown name 'layer_id': did you mean 'layer_ids'"),
        ("donor: {}\ntoken: hf_secret", "unknown name 'token'"),
        ("donor: {}\ntrust_remote_code: true", "unknown name 'trust_remote_code'"),
        ("donor: {}\nn_heads: 2\nn_heads: 4", "'n_heads' is given twice"),
        ("donor: !!python/object/apply:os.getcwd []", "is not YAML that can be read"),
        ("donor: [", "is not YAML that can be read"),
        ("donor: {}\npreset: engram-1b", "there is no preset 'engram-1b'"),
        ("donor: {}\nlayer_ids: [9]", "layers 0..3"),
        ("donor: {}\nn_heads: two", "n_heads"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(text, says, donor, recipe, tmp_path):
    file = recipe(text.replace("{}", str(donor)))
    for verb in (["plan", file], ["graft", file, tmp_path / "out"]):
        done = engram(*verb)
        assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_missing_is_one_message(tmp_path):
    done = engram("plan", tmp_path / "absent.yaml")
    assert done.exit_code == 2 and "absent.yaml" in done.output.replace("\n", "")
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "absent.yaml")
