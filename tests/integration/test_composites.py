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
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    Emu3Config,
    Gemma3nConfig,
    Gemma3Processor,
    Qwen2AudioConfig,
    T5GemmaConfig,
    ViTConfig,
)

from engram_transformers import (
    EngramConfig,
    EngramForCausalLM,
    EngramForConditionalGeneration,
    EngramTrainer,
    EngramTrainingArguments,
    check_generation,
)
from engram_transformers.compat_engram import CACHE, LEFT_TO_BACKBONE
from engram_transformers.configuration.configuration_engram import holds_other_models
from engram_transformers.conversion import graft
from engram_transformers.inspection.modes import MODES

from ..packs import pack_of
from ..tiny import GOLDEN
from .backbones import BACKBONES, GROUPED, REFUSED, unmapped
from .composites import (
    COMPOSITES,
    END,
    FURTHER,
    IMAGE,
    TAKES,
    VIDEO,
    composite_donor,
    images_for,
    needs_whole_composites,
    with_image,
)


TOLERANCE = 1e-5
SIZES = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
# The tokenizer is named, because those of the Qwens' own classes add tokens to a folder's.
FIELDS = {**SIZES, "tokenizer": str(GOLDEN / "tokenizer")}
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "disable_compile": True}
FIRST = 5  # position of the image's border in `ids`
installed = Version(transformers.__version__)
pytestmark = needs_whole_composites


# One of each kind: a projector, positions of several dimensions, a recurrent state, pieces of images.
FAST = {"gemma3", "qwen2_5_vl", "qwen3_5", "smolvlm"}


def types(names):
    """A parameter for each type; without llama4 where Transformers' own model fails."""
    fails = pytest.mark.skipif(installed >= Version("5.24"), reason="Transformers' own llama4 fails")
    marks = {name: [] if name in FAST else [pytest.mark.slow] for name in names}
    marks["llama4"] = [pytest.mark.slow, fails]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


every_type = types(COMPOSITES)

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
def composite(fill_memory):
    """Factory of grafts on whole models: `composite(name, trained=True)`."""

    def make(name: str, trained: bool = True, **fields) -> EngramForConditionalGeneration:
        model = EngramForConditionalGeneration.from_backbone(
            composite_donor(name), engram_layer_ids=[0, 1], **{**FIELDS, **fields}
        )
        return fill_memory(model) if trained else model

    return make


@pytest.fixture
def folder(tmp_path):
    """Factory of the folder of a donor: `folder(name)`."""

    def make(name: str):
        composite_donor(name).save_pretrained(tmp_path / name)
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
@types(COMPOSITES | FURTHER)
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
@types([name for name in COMPOSITES | FURTHER if name != "paligemma"])
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


@torch.no_grad()
def test_what_a_type_may_override_of_generate_is_left_to_it(composite):
    model, rows, called = composite("qwen2_5_vl"), prompts(), set()
    kind = type(model.backbone)

    def noting(name):
        return lambda self, *args, **kwargs: (called.add(name), getattr(kind, name)(self, *args, **kwargs))[1]

    own = {name: noting(name) for name in LEFT_TO_BACKBONE}
    model.backbone.__class__ = type("Noting", (kind,), own)
    write(model, "qwen2_5_vl", rows, num_beams=2)
    assert called == own.keys()


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_every_way_of_generating_from_text_is_exact_or_the_backbones(name, composite, tiny_tokenizer):
    modes = [mode.name for mode in MODES if mode.name != "compiled layers"]  # which takes as long as all others
    report = check_generation(composite(name), tiny_tokenizer, modes=modes)
    assert report.ok, report
    assert len([result for result in report.results if result.status == "exact"]) > 20


# Positions that are not text.


def added_by(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    """What the memory adds in a forward pass, by layer."""
    added = {}
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, number=number: added.update({number: output}))
        for number, layer in model.memory.layers.items()
    ]
    model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return added


@torch.no_grad()
@every_type
def test_an_image_gets_nothing_and_no_n_gram_reaches_across_it(name, composite, ids):
    model, image = composite(name), slice(FIRST, FIRST + 6)
    named = set(model.config.placeholder_ids)
    shown = torch.isin(ids, torch.tensor(sorted(named)))  # (batch, length)
    assert IMAGE in named and bool(shown[:, image].any()) and not bool(shown[:, : image.start].any())
    added = added_by(model, ids, **images_for(name, ids))
    for output in added.values():
        assert bool((output[shown] == 0).all())
        assert bool((output[~shown] != 0).any(-1).all()), "control: text gets something"
    behind = ids[:, FIRST + 1 + TAKES :]  # with the image's end, where that is text
    reads, alone = model.memory.read(ids, None), model.memory.read(behind, None)
    assert torch.equal(reads.vectors(0)[:, FIRST + 1 + TAKES :], alone.vectors(0))
    other = added_by(model, ids, **images_for(name, ids, [7, 8]))
    assert torch.equal(added["0"][~shown], other["0"][~shown]), "the same whatever the image shows"


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_a_pack_is_read_behind_an_image_by_the_rows_that_name_it(name, composite, ids):
    model, images = composite(name), images_for(name, ids)
    end = tuple(model.memory.hashing.compress(ids[:1])[0, -3:].tolist())
    before, written = model(ids, **images).logits, model.generate(ids, **images, **SETTINGS)
    model.load_memory(pack_of(model, {end, end[1:]}), "words")
    try:
        after = model(ids, **images, memory_names=["words", None]).logits
        assert torch.equal(after[1], before[1]) and torch.equal(after[0, :-1], before[0, :-1])
        assert not torch.allclose(after[0, -1], before[0, -1], atol=1e-3)
        read = model.generate(ids, **images, memory_names=[None, "words"], **SETTINGS)
        assert torch.equal(read[0], written[0])
    finally:
        model.unload_memory("words")


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_ids_of_the_memory_override_what_the_configuration_says(name, composite, ids):
    model, images = composite(name), images_for(name, ids)
    absent = ids.masked_fill(torch.isin(ids, torch.tensor(model.config.placeholder_ids)), -1)
    told = ids.masked_fill(ids == END, 50)
    logits = model(ids, **images).logits
    assert torch.equal(model(ids, **images, engram_input_ids=absent).logits, logits)
    assert not torch.allclose(model(ids, **images, engram_input_ids=told).logits, logits, atol=1e-2)
    written = model.generate(ids, **images, **SETTINGS)
    assert torch.equal(model.generate(ids, **images, engram_input_ids=absent, **SETTINGS), written)
    assert [row["records"] for row in model.memory_trace(ids[0])] == [[]] * 17


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_positions_of_several_dimensions_part_no_documents(name, composite, ids):
    model, images = composite(name), images_for(name, ids)
    positions, _ = model.backbone.model.get_rope_index(ids, **{k: v for k, v in images.items() if k != "pixel_values"})
    assert positions.shape == (3, 2, 17)
    assert bool((positions.diff(dim=-1) != 1).any()), "control: positions do not rise by one"
    of_text = torch.arange(17).expand(1, 2, 17)
    expected = model(ids, **images).logits
    for given in (positions, torch.cat([of_text, positions])):
        for use_cache in (True, False):
            found = model(ids, **images, position_ids=given, use_cache=use_cache).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])  # whose image ids are in the middle, and at the end
def test_a_resized_vocabulary_leaves_images_without_text(name, composite, ids, tmp_path):
    model, images = composite(name), images_for(name, ids)
    placeholders, logits = model.config.placeholder_ids, model(ids, **images).logits
    model.resize_token_embeddings(4112)
    assert bool((model.memory.hashing.token_map[placeholders] == -1).all())
    assert bool((model.memory.hashing.token_map[4104:] >= model.config.engram_compressed_vocab_size).all())
    assert model.backbone.config.get_text_config().vocab_size == model.config.text_config.vocab_size == 4112
    torch.testing.assert_close(model(ids, **images).logits[..., :4104], logits, rtol=0, atol=TOLERANCE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded.memory.hashing.token_map, model.memory.hashing.token_map)
    model.check_tokenizer(AutoTokenizer.from_pretrained(GOLDEN / "tokenizer"))


def test_training_reads_no_row_at_an_image(composite, ids):
    model = composite("gemma3").set_trainable("memory")
    labels = ids.masked_fill(ids >= 4000, -100)
    model.train()
    model(ids, **images_for("gemma3", ids), labels=labels).loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    rows = model.memory.hashing.rows_of_classes(
        model.memory.hashing.compress(ids)
    )  # (layers, batch, length, orders, heads)
    for place, layer in enumerate(("0", "1")):
        gradient = model.memory.tables[layer].order2[0].grad
        moved = set(gradient.rows[(gradient.row_values != 0).any(-1)].tolist())
        assert moved and moved <= set(rows[place][:, labels[0] >= 0, 0].flatten().tolist())


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_video_is_no_text_either(name, composite, ids):
    model, ids = composite(name), ids.masked_fill(ids == IMAGE, VIDEO)
    film = images_for(name, ids)
    film = {"pixel_values_videos": film["pixel_values"], "video_grid_thw": film["image_grid_thw"]}
    film["mm_token_type_ids"] = 2 * (ids == VIDEO)
    for output in added_by(model, ids, **film).values():
        assert bool((output[ids == VIDEO] == 0).all()) and bool((output[ids < 4000] != 0).any(-1).all())
    expected = model.backbone.generate(ids, **film, **SETTINGS)
    with model.disable_memory():
        assert torch.equal(model.generate(ids, **film, **SETTINGS), expected)
    cached, uncached = (model.generate(ids, **film, **SETTINGS, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached) and not torch.equal(cached, expected)


@torch.no_grad()
def test_a_model_made_from_its_configuration_knows_what_is_no_text(ids, fill_memory):
    config = EngramConfig(composite_config=COMPOSITES["smolvlm"](), engram_layer_ids=[0, 1], **SIZES)
    model = fill_memory(EngramForConditionalGeneration(config)).eval()
    assert model.memory.hashing.token_map.tolist() == [-1 if token == IMAGE else token for token in range(4104)]
    images = images_for("smolvlm", ids)
    absent = ids.masked_fill(ids == IMAGE, -1)
    assert torch.equal(model(ids, **images).logits, model(ids, **images, engram_input_ids=absent).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_the_language_model_called_by_itself_runs_without_memory(name, composite, ids):
    model = composite(name)
    with model.disable_memory():
        expected = model.backbone.get_decoder()(ids)[0]
    assert torch.equal(model.backbone.get_decoder()(ids)[0], expected)


# Checkpoints.


@torch.no_grad()
@every_type
def test_a_whole_model_is_the_same_after_saving_and_loading(name, composite, ids, tmp_path):
    model, images = unmapped(composite(name)), images_for(name, ids)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" not in stored and stored["composite_config"]["text_config"]["vocab_size"] == 4104
    for loader in (AutoModelForImageTextToText, AutoModelForCausalLM):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is EngramForConditionalGeneration and not any(info.values())
    saved, read = model.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    assert [key for key in saved if not torch.equal(saved[key], read[key])] == []
    assert torch.equal(unmapped(loaded)(ids, **images).logits, model(ids, **images).logits)
    assert loaded.input_modalities == loaded.backbone.input_modalities != "text"
    assert loaded.config.text_config is loaded.backbone.config.get_text_config(decoder=True)
    assert loaded.config.image_token_id if name != "llama4" else loaded.config.image_token_index == IMAGE
    on_disk = EngramForConditionalGeneration.from_pretrained(tmp_path, engram_placement="disk")
    written = on_disk.generate(ids, **images, **SETTINGS)
    assert torch.equal(written, model.generate(ids, **images, **SETTINGS))


@torch.no_grad()
@every_type
def test_the_model_without_head_gives_the_hidden_states_of_the_whole_model(name, composite, ids, tmp_path):
    model, images = unmapped(composite(name)), images_for(name, ids)
    model.save_pretrained(tmp_path)
    headless = unmapped(AutoModel.from_pretrained(tmp_path))
    if name == "llama4":  # Transformers has it only with its head
        for without in (headless, model.base_model):
            with pytest.raises(TypeError, match="has no model without its head"):
                without(ids, **images)
        return
    expected = model(ids, **images, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(headless(ids, **images, output_hidden_states=True).hidden_states[-1], expected)
    assert torch.equal(model.base_model(ids, **images).last_hidden_state, expected)


@torch.no_grad()
@every_type
def test_a_graft_of_a_whole_folder_answers_as_its_donor(name, folder, ids, tmp_path):
    donor = folder(name)
    (donor / "processor_config.json").write_text('{"processor_class": "SmolVLMProcessor"}')
    (donor / "chat_template.jinja").write_text("{{ messages }}")
    out = graft(donor, tmp_path / "graft", [0, 1], text_only=False, **FIELDS)
    for file in ("processor_config.json", "chat_template.jinja"):
        assert (out / file).read_text() == (donor / file).read_text()
    stored = json.loads((out / "config.json").read_text())
    assert stored["auto_map"]["AutoModelForImageTextToText"] == "modeling_engram.EngramForConditionalGeneration"
    assert "left_out" not in json.loads((out / "engram_graft.json").read_text())
    model, plain = (unmapped(AutoModelForImageTextToText.from_pretrained(path)).eval() for path in (out, donor))
    assert type(model) is EngramForConditionalGeneration
    images = images_for(name, ids)
    assert torch.equal(model(ids, **images).logits, plain(ids, **images).logits)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_donor_with_the_names_of_the_hub_is_written_again(name, composite, folder, tmp_path):
    donor = folder(name)  # saved with the names of LLaVA's first checkpoints
    receipt = graft(donor, tmp_path / "graft", [0, 1], **FIELDS) / "engram_graft.json"
    assert json.loads(receipt.read_text())["donor_files"].startswith("rewritten")


@torch.no_grad()
def test_a_processor_travels_with_a_graft_and_feeds_it(tmp_path):
    words = {"boi_token": "<|begin|>", "eoi_token": "<|end|>", "image_token": "<|image|>"}
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer", extra_special_tokens=words)
    config = COMPOSITES["gemma3"]()
    begin, end, image = tokenizer.convert_tokens_to_ids(list(words.values()))
    config.boi_token_index, config.eoi_token_index, config.image_token_index = begin, end, image
    config.text_config.vocab_size = len(tokenizer)
    donor = AutoModelForImageTextToText.from_config(config).eval()
    donor.save_pretrained(tmp_path / "donor")
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    Gemma3Processor(pixels, tokenizer, image_seq_length=TAKES).save_pretrained(tmp_path / "donor")
    out = graft(tmp_path / "donor", tmp_path / "graft", [0, 1], **SIZES)
    processor, model = AutoProcessor.from_pretrained(out), AutoModelForImageTextToText.from_pretrained(out)
    assert type(processor) is Gemma3Processor
    picture = Image.new("RGB", (40, 30), "red")
    inputs = processor(text=["<|begin|> a red picture", "what is <|begin|>"], images=[[picture]] * 2, padding=True)
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    assert (inputs["input_ids"] == image).sum() == 2 * TAKES and begin in model.config.placeholder_ids
    assert torch.equal(model.generate(**inputs, **SETTINGS), donor.generate(**inputs, **SETTINGS))
    model.check_tokenizer(processor.tokenizer)


def test_trainer_trains_on_images_and_its_checkpoint_is_found(composite, ids, tmp_path):
    composite("gemma3").save_pretrained(tmp_path / "graft")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "graft")
    rows = [{"row": number} for number in range(2)]

    def collate(rows):
        chosen = ids[[row["row"] for row in rows]]
        return {"input_ids": chosen, "labels": chosen, **images_for("gemma3", chosen)}

    settings = {"max_steps": 1, "save_steps": 1, "report_to": [], "remove_unused_columns": False, "use_cpu": True}
    args = EngramTrainingArguments(tmp_path / "run", **settings)
    EngramTrainer(model, args, train_dataset=rows, data_collator=collate).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert "AutoModelForImageTextToText" in json.loads((checkpoint / "config.json").read_text())["auto_map"]
    loaded, images = AutoModelForImageTextToText.from_pretrained(checkpoint), images_for("gemma3", ids)
    with torch.no_grad():
        trained = unmapped(model).eval()(ids, **images).logits
        assert torch.equal(unmapped(loaded)(ids, **images).logits, trained)
        before = AutoModelForImageTextToText.from_pretrained(tmp_path / "graft")(ids, **images).logits
    assert not torch.allclose(trained, before, atol=1e-3), "control: something was learned"


def test_peft_finds_its_own_layers_in_a_whole_model(composite):
    plain = get_peft_model(composite_donor("llama4"), LoraConfig(task_type="CAUSAL_LM"))
    adapted = get_peft_model(composite("llama4", trained=False), LoraConfig(task_type="CAUSAL_LM"))
    found, expected = ({name for name, _ in m.named_parameters() if "lora_" in name} for m in (adapted, plain))
    assert {name.replace(".backbone.", ".") for name in found} == expected and expected


# Text models.


@torch.no_grad()
@types(TEXT_MODELS)
def test_the_text_model_alone_answers_texts_as_the_whole(name, folder, fill_memory, tmp_path, caplog):
    donor, text = folder(name), torch.randint(3, 4000, (2, 12))
    whole = unmapped(AutoModelForImageTextToText.from_pretrained(donor))
    expected = whole(text).logits
    out = graft(donor, tmp_path / "graft", [0, 1], text_only=None if name in GIVEN_BY_CAUSAL else True, **FIELDS)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    made = EngramForCausalLM.from_backbone(donor, engram_layer_ids=[0, 1], text_only=True, **FIELDS)
    made.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for model in (loaded, made, again):
        assert type(model) is EngramForCausalLM and model.config.composite_config is None
        assert model.config.text_config.model_type == TEXT_MODELS[name]
        torch.testing.assert_close(model(text).logits, expected, rtol=0, atol=TOLERANCE)
    lost = json.loads((out / "engram_graft.json").read_text())["left_out"]
    kept = sum(parameter.numel() for parameter in made.backbone.parameters())
    assert lost["bytes"] == 4 * (sum(parameter.numel() for parameter in whole.parameters()) - kept) > 0
    assert any("vis" in module for module in lost["modules"])
    assert f"{lost['bytes']:,} bytes) are left out" in caplog.text
    fill_memory(loaded)
    cached, uncached = (loaded.generate(text, use_cache=use, **SETTINGS) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_a_text_reads_the_same_rows_in_the_whole_model_as_in_its_text_model(tiny_tokenizer):
    made = [
        EngramForCausalLM.from_backbone(composite_donor("qwen3_5"), tokenizer=tiny_tokenizer, text_only=only, **SIZES)
        for only in (True, False)
    ]
    text, whole = (model.memory for model in made)
    assert made[0].config.engram_hash_sha256 == made[1].config.engram_hash_sha256
    some = torch.randint(3, 4000, (2, 17))
    assert torch.equal(text.hashing(some)[1], whole.hashing(some)[1])


def test_without_being_told_a_graft_takes_what_the_causal_class_of_transformers_gives(folder, tmp_path):
    for name in ("gemma3", "smolvlm", "qwen3_5"):
        out = graft(folder(name), tmp_path / f"graft-{name}", [0, 1], **FIELDS)
        config = AutoConfig.from_pretrained(out)
        assert (config.composite_config is None) == (name in GIVEN_BY_CAUSAL)
    donor = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma3")
    assert holds_other_models(donor.config), "Transformers gives the whole as well"


# Who is refused.


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_text_model_without_a_causal_class_is_refused(name, folder, tmp_path):
    donor = folder(name)
    for act in (
        lambda: graft(donor, tmp_path / "graft", [0, 1], text_only=True, **FIELDS),
        lambda: EngramForCausalLM.from_backbone(donor, engram_layer_ids=[0, 1], text_only=True, **FIELDS),
    ):
        with pytest.raises(ValueError, match=rf"the language model of {name} \({name}_text\) has no class of its own"):
            act()
    assert not (tmp_path / "graft").exists()


def test_the_wrong_class_is_refused_with_the_right_one(composite, tiny_engram, tmp_path):
    whole, text = composite("smolvlm"), tiny_engram()
    with pytest.raises(ValueError, match="make it with EngramForConditionalGeneration"):
        EngramForCausalLM(whole.config)
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="is of a text model .llama., which EngramForCausalLM makes"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="holds other models.*composite_config=config"):
        EngramConfig(text_config=COMPOSITES["smolvlm"](), engram_layer_ids=[0])
    with pytest.raises(ValueError, match="is a text model's configuration, not a composite one"):
        EngramConfig(composite_config=BACKBONES["llama"](), engram_layer_ids=[0])


UNFIT = {
    "no placeholder": (lambda: with_ids(image_token_id=-1), "and names none: positions without text"),
    "outside": (lambda: with_ids(image_token_id=4104), r"names placeholders \[4104\] outside of the vocabulary"),
    "streams": (lambda: Gemma3nConfig(text_config=REFUSED["gemma3n"][0]().to_dict()), "AltUp keeps its streams"),
    "encoder": (lambda: T5GemmaConfig(), "is an encoder-decoder model"),
}


def with_ids(**fields):
    return type(COMPOSITES["smolvlm"]()).from_dict(COMPOSITES["smolvlm"]().to_dict() | fields)


@pytest.mark.parametrize("reason", UNFIT)
def test_a_composite_model_that_cannot_take_a_memory_is_refused(reason):
    config, words = UNFIT[reason]
    with pytest.raises(ValueError, match=words):
        EngramConfig(composite_config=config(), engram_layer_ids=[0])


def test_positions_that_begin_at_1_are_refused_in_generate(composite):
    model, row = composite("paligemma"), prompts()[0][None]
    with pytest.raises(ValueError, match="position_ids have 1 at token 0 of row 0"):
        model.generate(row, **images_for("paligemma", row), token_type_ids=torch.zeros_like(row), **SETTINGS)


def test_a_backbone_with_its_own_generate_is_refused():
    donor = composite_donor("smolvlm")
    own = type("OwnGenerate", (type(donor),), {"_prefill": lambda self, *args, **kwargs: None})
    donor.__class__ = own
    with pytest.raises(ValueError, match="OwnGenerate has its own _prefill in place of GenerationMixin's"):
        EngramForConditionalGeneration.from_backbone(donor, engram_layer_ids=[0, 1], **FIELDS)


@pytest.mark.parametrize("config", [ViTConfig, Qwen2AudioConfig])
def test_a_donor_of_another_kind_is_refused(config, tmp_path):
    config().save_pretrained(tmp_path / "donor")
    with pytest.raises(ValueError, match=f"type {config.model_type}, which AutoModelFor.* does not know: only causal"):
        graft(tmp_path / "donor", tmp_path / "graft", [0], **FIELDS)


def test_a_text_model_that_could_not_be_loaded_again_is_refused(tiny_tokenizer):
    """AutoModelForCausalLM makes it of the whole configuration, and of its own it does not."""
    donor = AutoModelForCausalLM.from_config(Emu3Config(text_config=GROUPED))
    assert torch.isfinite(donor(prompts()[0][None]).logits).all(), "control: it runs"
    with pytest.raises(ValueError, match="type emu3_text_model, which AutoModelForCausalLM does not know.*the whole"):
        EngramForCausalLM.from_backbone(donor, tiny_tokenizer, [0], **SIZES)
