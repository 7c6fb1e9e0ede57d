"""Every kind of backbone with a trained memory: saved and loaded, read in pieces, without its head; and who is refused.

Fresh memories are in test_identity.py, ways of generating in test_matrix.py. The control of a cached reading is the
plain backbone, read in the same way: it must differ from itself by less than 1e-4, and Engram from itself by less than
twice that or 1e-5 (measured: 3.3e-6 both).
Run: pytest tests/integration/test_backbones.py
"""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from engram_transformers.compat_engram import CACHE

from .backbones import BACKBONES, FURTHER, READS_PADS, REFUSED, unmapped


ALL = BACKBONES | READS_PADS | FURTHER
TOLERANCE = 1e-5
LENGTH = 15

# Caches without the configuration hold keys and values alone: these backbones keep more, and fail with them.
NEEDS_ITS_OWN_CACHE = (
    *("lfm2", "falcon_h1", "deepseek_v4", "deepseek_v4_compressed", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
    *("nemotron_h", "granitemoehybrid", "kimi_linear", "qwen4_exp_text"),
)
CACHES = {
    "configured": lambda model: DynamicCache(config=model.config.get_text_config()),
    "bare": lambda model: DynamicCache(),
}


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (1, LENGTH))


@pytest.fixture
def trained(tiny_donor, tiny_engram):
    """Factory of trained memories: `trained(backbone)`."""
    return lambda backbone: tiny_engram(trained=True, donor=tiny_donor(ALL[backbone]()), layers=(0, 1))


def read_in_chunks(model, ids, size, cache):
    """Logits `(1, length, vocabulary)` of a text that is read piece by piece into one cache."""
    pieces = [model(piece, **{CACHE: cache}, use_cache=True).logits for piece in ids.split(size, dim=1)]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ALL)
@pytest.mark.parametrize("cache", CACHES)
def test_reading_in_chunks_into_any_cache_equals_reading_at_once(backbone, cache, ids, trained):
    model = trained(backbone)
    plain = model.backbone  # by itself it reads no memory
    whole, plain_whole = model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits
    assert not torch.allclose(whole, plain_whole, atol=1e-2), "control: the memory must be seen"
    for size in (1, 2, 3, 7):
        if cache == "bare" and backbone in NEEDS_ITS_OWN_CACHE:
            for reader in (plain, model):
                with pytest.raises((AttributeError, IndexError, ValueError)):
                    read_in_chunks(reader, ids, size, CACHES[cache](model))
            continue
        own = (read_in_chunks(plain, ids, size, CACHES[cache](model)) - plain_whole).abs().max().item()
        difference = (read_in_chunks(model, ids, size, CACHES[cache](model)) - whole).abs().max().item()
        assert own < 1e-4, "control: else nothing would be shown"
        assert difference <= max(TOLERANCE, 2 * own), f"{backbone} in chunks of {size}: plain differs by {own}"


@torch.no_grad()
@pytest.mark.parametrize("backbone", ALL)
def test_a_trained_memory_is_the_same_after_saving_and_loading(backbone, ids, trained, tmp_path):
    model = unmapped(trained(backbone))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    saved, read = model.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    assert [name for name in saved if not torch.equal(saved[name], read[name])] == []
    assert torch.equal(unmapped(loaded)(ids).logits, model(ids).logits)
    with loaded.disable_memory():
        assert torch.equal(loaded(ids).logits, model.backbone(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ALL)
def test_the_model_without_head_gives_the_hidden_states_of_the_whole_model(backbone, ids, trained, tmp_path):
    model = unmapped(trained(backbone))
    model.save_pretrained(tmp_path)
    headless = unmapped(AutoModel.from_pretrained(tmp_path))
    read, expected = headless(ids, output_hidden_states=True), model(ids, output_hidden_states=True)
    for state, same in zip(read.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(state, same)
    assert torch.equal(read.last_hidden_state, expected.hidden_states[-1])
    plain = model.backbone.base_model(ids).last_hidden_state
    assert not torch.allclose(read.last_hidden_state, plain, atol=1e-2), "control: the memory must be seen"


@pytest.mark.parametrize("backbone", REFUSED)
def test_a_backbone_that_cannot_carry_a_memory_is_refused(backbone, tiny_donor, tiny_engram):
    configuration, words = REFUSED[backbone]
    donor = tiny_donor(configuration())
    with torch.no_grad():
        assert torch.isfinite(donor(torch.tensor([[5, 6, 7]])).logits).all(), "control: the donor itself runs"
    with pytest.raises(ValueError, match=words):
        tiny_engram(donor=donor)
