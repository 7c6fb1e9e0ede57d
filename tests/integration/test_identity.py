"""A fresh graft is its donor: bit for bit, on every kind of backbone, in memory and through files.

Run: pytest tests/integration/test_identity.py
"""

import copy
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, OPTConfig

from engram_transformers import EngramForCausalLM
from engram_transformers.compat_engram import CACHE
from engram_transformers.conversion import graft

from .backbones import BACKBONES, READS_PADS, unmapped


pytestmark = pytest.mark.core

ALL = BACKBONES | READS_PADS
FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ALL)
def test_fresh_graft_gives_the_donors_logits_bit_for_bit(backbone, ids, tiny_donor, tiny_engram, fill_memory):
    donor = tiny_donor(ALL[backbone]())
    expected = donor(ids).logits
    model = tiny_engram(donor=donor, layers=(0, 1))
    assert torch.equal(model(ids).logits, expected)
    fill_memory(model)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3), "control: a filled memory must be seen"


@torch.no_grad()
@pytest.mark.parametrize("backbone", ALL)
def test_grafted_folder_gives_the_donors_logits_bit_for_bit(backbone, ids, tiny_donor, tiny_tokenizer, tmp_path):
    donor = tiny_donor(ALL[backbone]())
    donor.save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")  # beside qwen2's weights it would get a token more
    folder = graft(tmp_path / "donor", tmp_path / "graft", [0, 1], tokenizer=tmp_path / "tokenizer", **FIELDS)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")  # control: the donor through its own files
    weights, expected = model.backbone.state_dict(), reloaded.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert torch.equal(unmapped(model)(ids).logits, unmapped(reloaded)(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "mixtral", "falcon_h1"])
def test_auto_model_reads_fresh_and_saved_grafts_and_gives_the_donors_last_hidden_state(
    backbone, ids, tiny_donor, tiny_tokenizer, tmp_path
):
    donor = tiny_donor(ALL[backbone]())
    expected = donor.base_model(ids).last_hidden_state
    donor.save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    fresh = graft(tmp_path / "donor", tmp_path / "fresh", [0, 1], **FIELDS)
    AutoModelForCausalLM.from_pretrained(fresh).save_pretrained(tmp_path / "saved")
    tied = donor.config.tie_word_embeddings
    for folder in (fresh, tmp_path / "saved"):
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert len(info["unexpected_keys"]) == (0 if tied else 1), info
        assert all(key.endswith("lm_head.weight") for key in info["unexpected_keys"])
        assert torch.allclose(model(ids).last_hidden_state, expected, atol=1e-6)
        model.save_pretrained(tmp_path / "headless")
        again = AutoModel.from_pretrained(tmp_path / "headless")
        torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_memory(copied, ids, tiny_engram):
    model = tiny_engram(trained=True)
    expected = model(ids).logits
    twin = copied(model)
    assert torch.equal(twin(ids).logits, expected)
    for parameter in twin.memory.parameters():
        parameter.zero_()
    assert not torch.equal(twin(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_the_backbone_alone_is_the_donor_where_its_class_passes_its_base_model_by(ids, tiny_donor, tiny_engram):
    config = OPTConfig(vocab_size=4104, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4)
    expected = tiny_donor(config)(ids).logits
    model = tiny_engram(trained=True, donor=tiny_donor(config))
    assert torch.equal(model.backbone(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2), "control: the memory must be seen"
    assert torch.equal(model.backbone(ids).logits, expected), "and nothing of the pass is left"


@torch.no_grad()
def test_without_memory_is_the_donor_and_only_inside_the_block(ids, tiny_donor, tiny_engram):
    expected = tiny_donor()(ids).logits
    model = tiny_engram(trained=True)
    trained = model(ids).logits
    with model.disable_memory():
        assert torch.equal(model(ids).logits, expected)
        cache = model(ids, use_cache=True)[CACHE]
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(model(ids).logits, trained)
    plain = tiny_donor().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(greedy, plain)
    with pytest.raises(ValueError, match="read without the memory"):
        model(ids, **{CACHE: cache})
    begun_with = model(ids, use_cache=True)[CACHE]
    with model.disable_memory(), pytest.raises(ValueError, match="begun with the memory on"):
        model(ids, **{CACHE: begun_with})


def test_donor_is_taken_over_once(tiny_donor, tiny_engram):
    donor = tiny_donor()
    model = tiny_engram(donor=donor)
    assert model.backbone is donor
    with pytest.raises(ValueError, match="already carries an Engram memory"):
        tiny_engram(donor=donor)
    with pytest.raises(ValueError, match="already has an Engram memory"):
        tiny_engram(donor=model)


def test_from_donor_says_what_it_lacks(tiny_donor, tiny_tokenizer):
    with pytest.raises(TypeError, match="needs the model's tokenizer"):
        EngramForCausalLM.from_backbone(tiny_donor())
    with pytest.raises(TypeError, match="unexpected arguments.*revision"):
        EngramForCausalLM.from_backbone(tiny_donor(), tiny_tokenizer, revision="main")


def test_memory_parameters_are_all_that_is_not_under_backbone(tiny_engram):
    model = tiny_engram()
    prefixes = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert prefixes == {"backbone", "memory"}
    assert {name for name, _ in model.backbone.named_parameters()} == {
        name.removeprefix("backbone.") for name, _ in model.named_parameters() if name.startswith("backbone.")
    }
