"""Text models of multimodal configurations, and positions that are not text: image embeddings under ids of -1. Whole
multimodal models are in test_composites.py.

What a memory adds is taken from its layers by a hook. Compared with the same text without images, exactly in what the
memory adds, and to 1e-5 in float32 in logits that attention cannot have changed.

Run: pytest tests/integration/test_multimodal.py
"""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    Gemma3Config,
    LlavaConfig,
)

from engram_transformers import EngramConfig, EngramForCausalLM, compat_engram
from engram_transformers.compat_engram import CACHE

from .backbones import BACKBONES


TOLERANCE = 1e-5
FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL = {
    "gemma3": lambda: Gemma3Config(
        text_config=BACKBONES["gemma3"]().to_dict(),
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        boi_token_index=4100,
        eoi_token_index=4101,
        image_token_index=4102,
    ),
    "llava": lambda: LlavaConfig(
        text_config=BACKBONES["llama"]().to_dict(),
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        image_token_index=4102,
    ),
}
IMAGE = slice(5, 9)  # positions of an image in the tests' texts of 15
PLACEHOLDER = 4102
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
every_model = pytest.mark.parametrize("name", MULTIMODAL)


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@pytest.fixture
def absent(ids):
    """Ids for the memory: -1 where the image is."""
    absent = ids.clone()
    absent[:, IMAGE] = -1
    return absent


@pytest.fixture
def with_image(ids):
    """Factory of embeddings in which random vectors stand for an image; another seed is another image."""

    @torch.no_grad()
    def make(model, seed=0):
        embeds = model.get_input_embeddings()(ids).clone()
        generator = torch.Generator().manual_seed(seed)
        embeds[:, IMAGE] = torch.randn(2, IMAGE.stop - IMAGE.start, embeds.shape[-1], generator=generator)
        return embeds

    return make


@pytest.fixture(params=["llama", "gemma3"])
def model(request, tiny_donor, tiny_engram):
    return tiny_engram(trained=True, donor=tiny_donor(BACKBONES[request.param]()), layers=(0, 1))


def added_by(model, *args, **kwargs):
    """What the memory adds in a forward pass, by layer, and the pass's logits."""
    added, handles = {}, []
    for layer_id, layer in model.memory.layers.items():

        def keep(module, inputs, output, layer_id=layer_id):
            added[layer_id] = output

        handles.append(layer.register_forward_hook(keep))
    logits = model(*args, **kwargs).logits
    for handle in handles:
        handle.remove()
    return added, logits


# Configurations.


@torch.no_grad()
@every_model
def test_the_text_model_of_a_multimodal_model_is_grafted(name, ids, tiny_donor, tiny_tokenizer, fill_memory, tmp_path):
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(MULTIMODAL[name]()).eval()
    text_config = whole.config.get_text_config()
    text = tiny_donor(text_config)
    text.base_model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    model = EngramForCausalLM.from_backbone(text, tiny_tokenizer, [0, 1], **FIELDS)
    assert model.config.get_text_config() is model.config.text_config
    assert model.config.text_config.model_type == text_config.model_type
    assert torch.equal(model(ids).logits, whole(ids).logits), "a text is answered as by the multimodal model"
    fill_memory(model)
    assert not torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-2)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.generate(ids, **SETTINGS), loaded.generate(ids, use_cache=False, **SETTINGS))


@torch.no_grad()
@every_model
def test_a_multimodal_configuration_gives_its_text_part(name, ids, tmp_path):
    MULTIMODAL[name]().save_pretrained(tmp_path)
    text_config = AutoConfig.from_pretrained(tmp_path).get_text_config()
    model = EngramForCausalLM(EngramConfig(text_config=text_config, engram_layer_ids=[0, 1], **FIELDS)).eval()
    assert model.config.engram_compressed_vocab_size == 4104
    with model.disable_memory():
        donors = model(ids).logits
    assert torch.equal(model(ids).logits, donors)


@every_model
def test_a_whole_multimodal_configuration_is_no_text_model(name):
    config = MULTIMODAL[name]()
    with pytest.raises(ValueError, match=rf"{config.model_type} holds other models.*get_text_config\(\)"):
        EngramConfig(text_config=config, engram_layer_ids=[0, 1], **FIELDS)


def test_whole_models_are_refused_where_transformers_own_generate_wrongly(monkeypatch, tiny_tokenizer):
    monkeypatch.setattr(compat_engram, "transformers_version", "5.22.2")
    donor = AutoModelForImageTextToText.from_config(next(iter(MULTIMODAL.values()))())
    with pytest.raises(RuntimeError, match="need transformers 5.23 or newer, this is 5.22.2.*text_only=True"):
        EngramForCausalLM.from_backbone(donor, tiny_tokenizer, [0, 1], text_only=False, **FIELDS)


# Positions that are not text.


@torch.no_grad()
def test_an_image_gets_nothing_from_the_memory_and_hides_what_is_before_it(model, ids, absent, with_image):
    embeds = with_image(model)
    added, logits = added_by(model, inputs_embeds=embeds, engram_input_ids=absent)
    text, text_logits = added_by(model, ids)
    for layer_id in ("0", "1"):
        assert bool((added[layer_id][:, IMAGE] == 0).all())
        assert bool((text[layer_id][:, IMAGE] != 0).any()), "control: text there gets something"
        torch.testing.assert_close(added[layer_id][:, :5], text[layer_id][:, :5], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits[:, :5], text_logits[:, :5], rtol=0, atol=TOLERANCE)
    # Behind it the first layer reads as at the start of a text, apart from the convolution, which has taps 3 apart:
    # the image's inputs to it are 0, and those of the text before the image are out of reach from position 14 on.
    tail, _ = added_by(model, inputs_embeds=embeds[:, 9:], engram_input_ids=ids[:, 9:])
    torch.testing.assert_close(added["0"][:, 14:], tail["0"][:, 5:], rtol=0, atol=TOLERANCE)
    reads, alone = model.memory.read(absent, None), model.memory.read(absent[:, 9:], None)
    for layer in (0, 1):
        assert torch.equal(reads.vectors(layer)[:, 9:], alone.vectors(layer))


@torch.no_grad()
def test_the_memory_reads_the_same_rows_whatever_the_image_shows(model, absent, with_image):
    one, logits = added_by(model, inputs_embeds=with_image(model, seed=0), engram_input_ids=absent)
    other, other_logits = added_by(model, inputs_embeds=with_image(model, seed=1), engram_input_ids=absent)
    torch.testing.assert_close(logits[:, :5], other_logits[:, :5], rtol=0, atol=TOLERANCE)
    assert not torch.allclose(logits[:, IMAGE], other_logits[:, IMAGE], atol=1e-2), "control: the images differ"
    # In front of layer 0 a text position's stream is its own embedding, so what is added there is the same too.
    assert torch.equal(one["0"], other["0"])


@torch.no_grad()
def test_an_image_that_attention_may_not_see_leaves_the_text_as_it_is(model, ids, absent, with_image):
    mask = torch.ones_like(ids)
    mask[:, IMAGE] = 0
    positions = torch.arange(15).expand(2, 15)
    seen = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    unseen = model(inputs_embeds=with_image(model), engram_input_ids=absent, **seen).logits
    padded = model(ids, **seen).logits  # the same positions as pads of text
    live = mask.bool()
    torch.testing.assert_close(unseen[live], padded[live], rtol=0, atol=TOLERANCE)
    text = model(ids, position_ids=positions, use_cache=False).logits
    assert not torch.allclose(text[live], padded[live], atol=1e-2), "control: the gap must be seen"


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_reading_an_image_in_pieces_equals_reading_it_at_once(size, model, absent, with_image):
    embeds, cache, logits = with_image(model), DynamicCache(config=model.config.get_text_config()), []
    for first in range(0, 15, size):
        piece = {
            "inputs_embeds": embeds[:, first : first + size],
            "engram_input_ids": absent[:, first : first + size],
        }
        logits.append(model(**piece, **{CACHE: cache}, use_cache=True).logits)
    whole = model(inputs_embeds=embeds, engram_input_ids=absent).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_after_an_image_is_choosing_one_token_at_a_time(use_cache, model, absent, with_image):
    embeds = with_image(model)
    found = model.generate(inputs_embeds=embeds, engram_input_ids=absent, use_cache=use_cache, **SETTINGS)
    for _ in range(SETTINGS["max_new_tokens"]):
        best = model(inputs_embeds=embeds, engram_input_ids=absent).logits[:, -1:].argmax(-1)
        embeds = torch.cat([embeds, model.get_input_embeddings()(best)], dim=1)
        absent = torch.cat([absent, best], dim=1)
    assert torch.equal(found, absent[:, 15:])


@torch.no_grad()
def test_beams_after_an_image_are_the_same_with_a_cache_as_without(model, absent, with_image):
    settings = {"inputs_embeds": with_image(model), "engram_input_ids": absent, "num_beams": 3, **SETTINGS}
    assert torch.equal(model.generate(**settings), model.generate(use_cache=False, **settings))


@torch.no_grad()
@pytest.mark.parametrize("ways", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 3}], ids=str)
def test_placeholders_among_the_ids_are_no_text_where_the_memorys_ids_say_so(ways, model, ids, absent):
    placeholders = ids.clone()
    placeholders[:, IMAGE] = PLACEHOLDER
    embeds = model.get_input_embeddings()(placeholders)
    expected = model(inputs_embeds=embeds, engram_input_ids=absent).logits
    found = model(placeholders, engram_input_ids=absent).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(model(placeholders).logits[:, 9:], found[:, 9:], atol=1e-2), "control: they read as text"
    settings = {**SETTINGS, **ways, "return_dict_in_generate": True, "output_logits": True}
    generated = model.generate(placeholders, engram_input_ids=absent, **settings)
    first = generated.logits[0][:: ways.get("num_beams", 1)]
    torch.testing.assert_close(first, expected[:, -1], rtol=0, atol=TOLERANCE)
    by_embeds = {name: value for name, value in ways.items() if name != "prefill_chunk_size"}
    same = model.generate(inputs_embeds=embeds, engram_input_ids=absent, **SETTINGS, **by_embeds)
    assert torch.equal(generated.sequences[:, 15:], same)


def test_training_reads_no_row_at_an_image(model, ids, absent, with_image):
    labels = ids.masked_fill(absent < 0, -100)
    model(inputs_embeds=with_image(model), engram_input_ids=absent, labels=labels).loss.backward()
    rows = model.memory.hashing.rows_of_classes(
        model.memory.hashing.compress(absent)
    )  # (layers, batch, length, orders, heads)
    text = torch.ones(15, dtype=torch.bool)
    text[IMAGE] = False
    for place, layer in enumerate((0, 1)):
        for order in (2, 3):
            gradient = getattr(model.memory.tables[str(layer)], f"order{order}")[0].grad
            moved = set(gradient.rows[(gradient.row_values != 0).any(-1)].tolist())
            assert moved <= set(rows[place][:, text, order - 2].flatten().tolist())
            assert moved, "control: something is trained"


@torch.no_grad()
def test_ids_that_do_not_fit_the_embeddings_are_refused(model, ids, absent, with_image):
    embeds = with_image(model)
    with pytest.raises(ValueError, match="pass engram_input_ids beside it"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"shape \(2, 14\), the model's input has \(2, 15\)"):
        model(inputs_embeds=embeds, engram_input_ids=absent[:, :14])
    with pytest.raises(IndexError, match="token id -2 is outside"):
        model(inputs_embeds=embeds, engram_input_ids=absent.masked_fill(absent < 0, -2))
    with pytest.raises(IndexError, match="token id -1 is outside"):
        model(absent)
