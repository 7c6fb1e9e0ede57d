"""Kinds of attention: a memory reads the same whichever kernel its backbone attends with.

Logits are compared to 1e-5 in float32 (the plain backbone's own difference between kinds is up to 5e-6), at positions
that are not pads; tokens exactly. Flex attention runs in its eager form: the C++ that torch 2.13 makes of it for a CPU
does not compile, with the plain backbone either.

Run: pytest tests/integration/test_attention_kinds.py
"""

from contextlib import nullcontext

import pytest
import torch
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from engram_transformers import EngramForCausalLM
from engram_transformers.compat_engram import CACHE

from .backbones import BACKBONES
from .composites import composite_donor, needs_whole_composites


TOLERANCE = 1e-5
KINDS = ["eager", "sdpa", "flex_attention"]
FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
backbones = pytest.mark.parametrize("backbone", ["llama", "gemma3", "olmo2", "mixtral"])

# What transformers 5.23 does with flex attention and torch 2.13 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),
]


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@pytest.fixture
def mask():
    """Left pads in the first text."""
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[0, :5] = 0
    return mask


@pytest.fixture(params=KINDS)
def kind(request):
    """A kind of attention; flex attention uncompiled while the test runs."""
    uncompiled = request.param == "flex_attention"
    with torch.compiler.set_stance("force_eager") if uncompiled else nullcontext():
        yield request.param


def in_chunks(model, ids, mask, size):
    """Logits of a text that is read piece by piece into one cache."""
    cache, logits = DynamicCache(config=model.config.get_text_config()), []
    for first in range(0, ids.shape[1], size):
        piece = ids[:, first : first + size]
        seen = mask[:, : first + piece.shape[1]]
        logits.append(model(piece, attention_mask=seen, **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(logits, dim=1)  # (batch, length, vocabulary)


def assert_same(logits, expected, mask):
    live = mask.bool()
    torch.testing.assert_close(logits[live], expected[live], rtol=0, atol=TOLERANCE)


def kinds_in_use(model):
    """What the wrapper, the backbone and the backbone's base model say that they attend with."""
    backbone = model.backbone
    return {part.config._attn_implementation for part in (model, backbone, backbone.base_model)}


@torch.no_grad()
@backbones
def test_every_kind_gives_the_same_logits(backbone, kind, ids, mask, tiny_donor, tiny_engram):
    donors = [tiny_donor(BACKBONES[backbone]()) for _ in range(3)]
    donors[0].set_attn_implementation("eager")
    donors[1].set_attn_implementation(kind)
    assert_same(donors[1](ids, attention_mask=mask).logits, donors[0](ids, attention_mask=mask).logits, mask)  # control
    model = tiny_engram(trained=True, donor=donors[2], layers=(0, 1))
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(kind)
    assert kinds_in_use(model) == {kind}
    assert_same(model(ids, attention_mask=mask).logits, expected, mask)
    with model.disable_memory():
        off = model(ids, attention_mask=mask).logits
    assert_same(off, donors[1](ids, attention_mask=mask).logits, mask)
    assert not torch.allclose(off, expected, atol=1e-2), "control: the memory must be seen"


@torch.no_grad()
@backbones
@pytest.mark.parametrize("size", [1, 4])
def test_every_kind_decodes_with_a_cache_as_without(backbone, size, kind, ids, mask, tiny_donor, tiny_engram):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES[backbone]()), layers=(0, 1))
    model.set_attn_implementation(kind)
    assert_same(in_chunks(model, ids, mask, size), model(ids, attention_mask=mask).logits, mask)


@torch.no_grad()
def test_every_kind_generates_the_same(kind, ids, mask, tiny_engram):
    model = tiny_engram(trained=True)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **settings)
    model.set_attn_implementation(kind)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)
    alone = model.generate(ids[:1, 5:], **{**settings, "attention_mask": mask[:1, 5:]})
    assert torch.equal(alone[0, 10:], expected[0, 15:]), "left pads were read"


@pytest.mark.parametrize("kind", ["sdpa"], indirect=True)  # flex attention has no backward pass on a CPU
def test_every_kind_gives_the_memory_the_same_gradients(kind, ids, mask, tiny_engram):
    models = [tiny_engram(trained=True) for _ in range(2)]
    labels = ids.masked_fill(mask.cumsum(-1) < 2, -100)  # a text's first token would be predicted from a pad
    for model, wanted in zip(models, ("eager", kind), strict=True):
        model.set_attn_implementation(wanted)
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    pairs = zip(models[0].memory.named_parameters(), models[1].memory.parameters(), strict=True)
    for (name, one), other in pairs:
        if name.startswith("tables."):
            assert torch.equal(one.grad.rows, other.grad.rows)
            one, other = one.grad.row_values, other.grad.row_values
        else:
            one, other = one.grad, other.grad
        assert bool((one != 0).any()), name
        torch.testing.assert_close(other, one, rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_a_kind_given_when_loading_reaches_the_backbone(kind, ids, tiny_donor, tiny_tokenizer, tiny_engram, tmp_path):
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    tiny_engram(trained=True).save_pretrained(tmp_path / "saved")
    for loader in (AutoModelForCausalLM, AutoModel):
        loaded = loader.from_pretrained(tmp_path / "saved", attn_implementation=kind)
        assert kinds_in_use(loaded) == {kind}
    model = EngramForCausalLM.from_backbone(
        str(tmp_path / "donor"), engram_layer_ids=[1, 2], attn_implementation=kind, **FIELDS
    )
    assert kinds_in_use(model) == {kind}
    donor = AutoModelForCausalLM.from_pretrained(tmp_path / "donor", attn_implementation=kind)
    assert torch.equal(model(ids).logits, donor(ids).logits)


@pytest.fixture
def counted():
    """A kind of attention of the user's own, registered while the test runs; a list with an entry for each call."""
    calls = []

    def attend(*args, **kwargs):
        calls.append(kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("counted", attend)
    AttentionMaskInterface.register("counted", sdpa_mask)
    yield calls
    del AttentionInterface._global_mapping["counted"], AttentionMaskInterface._global_mapping["counted"]


@torch.no_grad()
def test_a_kind_set_on_the_wrapper_is_what_runs(counted, ids, mask, tiny_engram):
    model = tiny_engram(trained=True)
    expected = model(ids, attention_mask=mask).logits
    assert counted == []
    model.set_attn_implementation("counted")
    assert kinds_in_use(model) == {"counted"}
    assert_same(model(ids, attention_mask=mask).logits, expected, mask)
    assert len(counted) == model.config.text_config.num_hidden_layers
    model.set_attn_implementation("eager")
    model(ids, attention_mask=mask)
    assert len(counted) == model.config.text_config.num_hidden_layers, "the old kind still runs"


def test_an_unknown_kind_is_refused_and_changes_nothing(tiny_engram):
    model = tiny_engram()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match='attn_implementation="nonsense"'):
        model.set_attn_implementation("nonsense")
    assert kinds_in_use(model) == {"eager"}


def test_a_kind_that_the_backbone_lacks_is_refused_and_changes_nothing(tiny_donor, tiny_engram):
    model = tiny_engram(donor=tiny_donor(BACKBONES["gpt2"]()), layers=(0, 1))
    before = kinds_in_use(model)
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex_attention"):
        model.set_attn_implementation("flex_attention")
    assert kinds_in_use(model) == before


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_mask_of_four_dimensions_goes_with_one_of_two_for_the_memory(kind, ids, mask, tiny_engram):
    model = tiny_engram(trained=True)
    model.set_attn_implementation(kind)
    causal = torch.ones(15, 15, dtype=torch.bool).tril() & mask[:, None, None, :].bool()  # (batch, 1, length, length)
    causal |= torch.eye(15, dtype=torch.bool)  # a pad attends to itself: a row without any would be nan
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    # Positions from the first token that is not a pad, as the model counts them for a mask of two dimensions.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    found = model(ids, attention_mask=additive, engram_attention_mask=mask, position_ids=positions).logits
    assert_same(found, expected, mask)
    with pytest.raises(ValueError, match="engram_attention_mask"):
        model(ids, attention_mask=additive, position_ids=positions)


@needs_whole_composites
def test_each_part_of_a_composite_backbone_keeps_its_kind(tiny_tokenizer):
    donor = composite_donor("smolvlm")
    donor.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    model = EngramForCausalLM.from_backbone(donor, tiny_tokenizer, [0], **FIELDS)
    config = model.backbone.config
    kinds = [part._attn_implementation for part in (model.config, config, config.text_config, config.vision_config)]
    assert kinds == ["eager", "eager", "sdpa", "eager"]
