"""The recipes that come with the package, each run on a tiny donor of its family that has as many layers as it needs.

Run: pytest tests/integration/test_family_recipes.py
"""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from engram_transformers.conversion import family_recipes, read_recipe
from engram_transformers.conversion.cli import app
from engram_transformers.inspection import verify_checkpoint

from .backbones import BACKBONES
from .composites import COMPOSITES, needs_whole_composites


RECIPES = family_recipes()
FAMILIES = [
    *("deepseek_v3", "deepseek_v4", "gemma3", "gemma4", "gpt2", "llama"),
    *("mixtral", "qwen3", "qwen3_5", "qwen3_moe", "smollm3"),
]
READ_IMAGES = ("gemma3", "gemma4", "qwen3_5")


def tiny_donor(family: str, depth: int):
    """A random model of a family, with layers of the same kinds up to this depth."""
    config = (COMPOSITES if family in READ_IMAGES else BACKBONES)[family]()
    text = config.get_text_config(decoder=True)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        kinds = getattr(text, name, None)
        if kinds is not None:
            setattr(text, name, [kinds[layer % len(kinds)] for layer in range(depth)])
    text.num_hidden_layers = depth
    torch.manual_seed(0)
    loader = AutoModelForImageTextToText if family in READ_IMAGES else AutoModelForCausalLM
    return loader.from_config(config).eval()


def engram(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_there_is_a_recipe_for_each_family_and_the_command_prints_it():
    assert list(RECIPES) == FAMILIES
    listed = engram("recipes").stdout.splitlines()
    assert [line.split()[0] for line in listed] == FAMILIES and "Qwen/Qwen3-4B, layers 1, 17" in listed[7]
    assert engram("recipes", "qwen3").stdout == RECIPES["qwen3"].read_text()
    done = engram("recipes", "qwen2")
    assert done.exit_code == 2 and "no recipe for 'qwen2': choose from deepseek_v3" in " ".join(done.output.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_names_the_layers_that_its_comment_says(family):
    text = " ".join(RECIPES[family].read_text().replace("#", "").split())
    depth = re.search(r"[Tt]he second of (\d+) layers.* the one in the middle", text)
    assert read_recipe(RECIPES[family])["layer_ids"] == ([1, int(depth[1]) // 2 - 1] if depth else [1, 14])
    assert depth or family == "deepseek_v4", "which has the layers of V4.1"


@needs_whole_composites
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_grafts_a_model_of_its_family(family, tiny_tokenizer, tmp_path):
    recipe = read_recipe(RECIPES[family])
    tiny_donor(family, max(recipe["layer_ids"]) + 2).save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")  # beside a qwen3_5 it would get a token of Qwen's
    text = RECIPES[family].read_text()
    assert text.startswith("# ") and text.count(recipe["donor"]) == 1
    (tmp_path / "recipe.yaml").write_text(text.replace(recipe["donor"], str(tmp_path / "donor")))
    options = ["--vocab-size", "200", "--tokenizer", tmp_path / "tokenizer"]
    done = engram("graft", tmp_path / "recipe.yaml", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert all(finding.ok for finding in verify_checkpoint(tmp_path / "out", generation=False))
    whole = recipe.get("text_only") is False
    loader = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    grafted, donor = (loader.from_pretrained(tmp_path / folder) for folder in ("out", "donor"))
    config = grafted.config
    usual = {"table_dtype": "float32", "kernel_size": 4}
    for name, value in {**usual, **recipe}.items():
        assert name in ("donor", "text_only") or getattr(config, f"engram_{name}") == value, name
    assert (config.composite_config is not None) == whole
    ids = torch.randint(3, 4000, (2, 9))
    assert torch.equal(grafted(ids).logits, donor(ids).logits)
    for table in grafted.memory.parameters():
        table.normal_()
    assert not torch.equal(grafted(ids).logits, donor(ids).logits), "control: a memory with values is read"
