"""Whole composite models with a memory in their language model, and their text models.

Every image is random and takes four positions. Tokens and logits of a model with its memory disabled are compared with
the plain backbone's bit for bit. With a filled memory, what `generate` chose and its logits are compared with reading
the same text and image at once, alone and without a cache: to 1e-5 in float32, or twice what the plain backbone differs
from itself in the same way.
Run: pytest tests/integration/test_composites.py
"""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LlavaConfig,
    T5GemmaConfig,
)

from engram_transformers import (
    EngramConfig,
    EngramForCausalLM,
    EngramForConditionalGeneration,
    check_generation,
)
from engram_transformers.compat_engram import CACHE
from engram_transformers.conversion import graft

from .backbones import BACKBONES, REFUSED, unmapped
from .composites import BEGIN, COMPOSITES, END, IMAGE, composite_donor, images_for, with_image


TOLERANCE = 1e-5
FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "disable_compile": True}
FIRST = 5  # position of the image's border in `ids`
every_type = pytest.mark.parametrize("name", COMPOSITES)

# Type of the text model inside, where Transformers has a causal class for it.
TEXT_MODELS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "mistral3": "mistral",
    "llama4": "llama4_text",
    "smolvlm": "llama",
    "internvl": "qwen3",
}
GIVEN_BY_CAUSAL = {"qwen3_5", "qwen3_5_moe", "llama4"}


@pytest.fixture
def ids():
    return with_image(torch.randint(3, 4000, (2, 17)), FIRST)


@pytest.fixture
def composite(tiny_tokenizer, fill_memory):
    """Factory of grafts on whole models: `composite(name, trained=True)`."""

    def make(name: str, trained: bool = True, **fields) -> EngramForConditionalGeneration:
        model = EngramForConditionalGeneration.from_backbone(
            composite_donor(name), tiny_tokenizer, [0, 1], **{**FIELDS, **fields}
        )
        return fill_memory(model) if trained else model

    return make


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    """Factory of the folder of a donor: `folder(name)`."""

    def make(name: str):
        composite_donor(name).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


# Generation.


NO_PIECES = ("llama4",)
WAYS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
}


# Transformers' own model fails: it takes no image in pieces, or not one image for several beams.
BACKBONE_FAILS = {
    *((name, "chunks") for name in NO_PIECES),
    ("llama4", "beams"),
}
# An image's positions see each other, and pieces of it do not: the backbone itself reads something else.
SPLITS_IMAGES = {("gemma3", "chunks"), ("gemma4", "chunks")}


def prompts() -> list[torch.Tensor]:
    """Texts of different lengths with the image at different places."""
    return [with_image(torch.randint(3, 4000, (length,)), first) for length, first in ((17, 5), (12, 1))]


def write(model, name: str, rows: list[torch.Tensor], **way):
    """Generates from a batch, padded on the left; sequences `(batch, length)`, and logits of greedy choices."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((longest - len(row),), 2), row]) for row in rows])  # (batch, length)
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()  # (batch, length)
    given = {"attention_mask": mask, **images_for(name, ids), **SETTINGS, **way}
    out = model.generate(ids, **given, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, dim=1)


def own_rounding(model, name: str, rows: list[torch.Tensor], way: dict) -> float:
    """The largest difference of a logit between generating in a way and reading at once."""
    sequences, logits = write(model, name, rows, **way)
    new, differences = SETTINGS["max_new_tokens"], []
    for number, row in enumerate(rows):
        text = torch.cat([row, sequences[number, -new:]])[None]  # (1, length)
        at_once = model(text, **images_for(name, text, [number]), use_cache=False).logits[0, -new - 1 : -1]
        differences.append((logits[number] - at_once).abs().max().item())
    return max(differences)


def tried(act):
    """What an action returns, or the type of its error."""
    try:
        return act()
    except (ValueError, KeyError) as error:
        return type(error)


@torch.no_grad()
@every_type
def test_without_its_memory_a_model_generates_as_its_backbone(name, composite):
    model, rows = composite(name), prompts()
    for label, way in WAYS.items():
        expected = tried(lambda way=way: write(model.backbone, name, rows, **way))
        with model.disable_memory():
            found = tried(lambda way=way: write(model, name, rows, **way))
        if isinstance(expected, type):
            assert (name, label) in BACKBONE_FAILS and found is expected
            continue
        assert (name, label) not in BACKBONE_FAILS
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), label


@torch.no_grad()
@every_type
def test_with_its_memory_a_model_generates_what_it_reads_at_once(name, composite):
    model, rows = composite(name), prompts()
    plain, _ = write(model.backbone, name, rows)
    alone, _ = write(model, name, rows[:1], use_cache=False)
    for label, way in WAYS.items():
        if (name, label) in BACKBONE_FAILS | SPLITS_IMAGES or label == "beams":
            continue
        sequences, _ = write(model, name, rows, **way)
        assert not torch.equal(sequences, plain), "control: the memory must be seen"
        assert torch.equal(sequences[:1], alone), label
        own = own_rounding(model.backbone, name, rows, way)
        assert own < 1e-4, "control: else nothing would be shown"
        assert own_rounding(model, name, rows, way) <= max(TOLERANCE, 2 * own), label
    if (name, "beams") not in BACKBONE_FAILS:
        cached, uncached = (write(model, name, rows, num_beams=3, use_cache=use)[0] for use in (True, False))
        assert torch.equal(cached, uncached)


@torch.no_grad()
@every_type
def test_a_conversation_about_an_image_goes_on_in_its_cache(name, composite):
    model, row, more = composite(name), prompts()[0][None], torch.randint(3, 4000, (1, 4))

    def talk(speaker):
        cache = DynamicCache(config=model.config.get_text_config())
        begun = speaker.generate(row, **images_for(name, row), **SETTINGS, **{CACHE: cache})
        return speaker.generate(torch.cat([begun, more], dim=1), **SETTINGS, **{CACHE: cache})

    plain, found = talk(model.backbone), talk(model)
    with model.disable_memory():
        assert torch.equal(talk(model), plain)
    turn = found[:, :-5]
    expected = model.generate(turn, **images_for(name, turn), **SETTINGS, use_cache=False)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain), "control: the memory must be seen"


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_every_way_of_generating_from_text_is_exact_or_the_backbones(name, composite, tiny_tokenizer):
    report = check_generation(composite(name), tiny_tokenizer)
    assert report.ok, report
    assert len([result for result in report.results if result.status == "exact"]) > 20
