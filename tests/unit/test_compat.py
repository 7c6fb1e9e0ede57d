"""What differs between versions of Transformers: the name of the cache, what `Cache` asks of a layer, checkpointing.

Run: pytest tests/unit/test_compat.py
"""

import ast
import inspect
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from engram_transformers import compat_engram
from engram_transformers.cache_engram import EngramCacheLayer
from engram_transformers.compat_engram import CACHE, CHECKPOINTS_RUN_HOOKS, NEW_NAME, OLD_NAME, is_checkpointing


pytestmark = pytest.mark.core

IDS = torch.arange(24, device="cpu").view(2, 12) * 7 + 5
LEFT = torch.ones_like(IDS)
TOLERANCE = 1e-5  # of logits in float32, read with a cache and without

old_name_warns = pytest.mark.skipif(CACHE == OLD_NAME, reason="here `past_key_values` is the name that models have")


@torch.no_grad()
def test_forward_takes_a_cache_by_its_new_name_and_by_its_old_one(tiny_engram):
    model = tiny_engram(trained=True)
    whole = model(IDS, use_cache=False).logits
    for name in (NEW_NAME, OLD_NAME):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            model(IDS[:, :8], **{name: cache}, use_cache=True)
            rest = model(IDS[:, 8:], **{name: cache}).logits
            assert rest.sub(whole[:, 8:]).abs().max() < TOLERANCE, name
            base = model.base_model(IDS, **{name: None}, use_cache=False)[0]
        assert base.shape == (2, 12, 32)


@old_name_warns
@torch.no_grad()
def test_the_old_name_gives_transformers_own_warning(tiny_engram, tiny_donor):
    for model in (tiny_engram(), tiny_donor()):
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            model(IDS, **{OLD_NAME: None})


@torch.no_grad()
def test_neither_generation_nor_a_forward_pass_of_ours_uses_an_old_name(tiny_engram):
    model = tiny_engram(trained=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is deprecated and will be removed", FutureWarning)
        cache = model(IDS, use_cache=True)[CACHE]
        model.generate(IDS, attention_mask=LEFT, max_new_tokens=3)
        written = model.generate(torch.cat([IDS, IDS[:, :1]], dim=1), **{CACHE: cache}, max_new_tokens=3)
    assert written.shape == (2, 16)


def asked_of_layers() -> set[str]:
    """Names of the attributes that `Cache` looks up on its layers, read from its source."""
    tree = ast.parse(inspect.getsource(Cache))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == "layer")
            or (isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value).endswith("layers"))
        )
    }


# Asked of other kinds of layers alone: of attention (lengths), of states of a model, or behind `hasattr`.
OF_OTHER_LAYERS = {"batch_size", "get_mask_sizes", "get_seq_length", "recurrent_states", "update_indexer"}


def test_the_cache_layer_answers_by_itself_whatever_a_cache_asks_of_a_layer():
    asked = asked_of_layers()
    assert {"reset", "crop", "is_compileable"} <= asked, "the scan finds nothing"
    layer = EngramCacheLayer(convolutions=1, context_length=2)
    own = vars(EngramCacheLayer).keys() | vars(layer).keys()
    # The parent defines states that are none of ours: what is asked and inherited would change its answer with it.
    inherited = vars(type(layer).__mro__[1]).keys() - {"__init__", "__repr__"}
    assert asked - OF_OTHER_LAYERS <= own
    assert {name for name in inherited if not name.startswith("_")} <= own


@pytest.mark.parametrize("recording", [False, True])
def test_compiling_and_cropping_are_answered_alike_before_and_after_tokens(recording):
    layer = EngramCacheLayer(convolutions=1, context_length=2)
    if recording:
        layer.activate_past_recording()
    assert (layer.is_compileable, layer.is_croppable, layer.is_initialized) == (True, True, False)
    layer.remember_classes(IDS)
    assert (layer.is_compileable, layer.is_croppable, layer.is_initialized) == (True, True, True)
    with pytest.raises(TypeError, match="nothing but the memory"):
        layer.update_conv_state(IDS)


@torch.no_grad()
def test_a_static_cache_that_records_the_past_gets_masks(tiny_engram):
    """Masks of static keys hide places that are not filled; without one, attention reads zeros as tokens."""
    model = tiny_engram(trained=True)
    whole = model(IDS, use_cache=False).logits
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=20)
    model(IDS[:, :8], **{CACHE: cache}, use_cache=True)
    cache.activate_past_recording()  # now that the memory has its layer, as assisted decoding does
    inputs = model.prepare_inputs_for_generation(IDS[:, :9], next_sequence_length=1, **{CACHE: cache}, use_cache=True)
    assert inputs["attention_mask"].ndim == 4
    assert model(**inputs).logits[:, 0].sub(whole[:, 8]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_cache_begun_under_inference_mode_goes_on_without_it(tiny_engram, tiny_donor):
    for model in (tiny_engram(trained=True), tiny_donor()):  # the donor is the control
        whole = model(IDS, use_cache=False).logits
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with torch.inference_mode():
            model(IDS[:, :8], **{CACHE: cache}, use_cache=True)
        rest = [model(IDS[:, place : place + 1], **{CACHE: cache}).logits for place in range(8, 12)]
        assert torch.cat(rest, dim=1).sub(whole[:, 8:]).abs().max() < TOLERANCE
        cache.reset()
        assert model(IDS[:, :8], **{CACHE: cache}).logits.sub(whole[:, :8]).abs().max() < TOLERANCE


def test_checkpoints_are_refused_before_the_transformers_that_runs_hooks_once():
    """Up to 5.22 a layer's call is what is run again, hooks and all; from 5.23 on it is its forward."""
    assert ("__call__" in vars(GradientCheckpointingLayer)) == CHECKPOINTS_RUN_HOOKS
    assert (Version(transformers.__version__) < Version("5.23")) == CHECKPOINTS_RUN_HOOKS


@pytest.mark.skipif(CHECKPOINTS_RUN_HOOKS, reason="refused under this Transformers: the next test")
def test_generation_from_a_model_in_training_with_checkpointing_is_that_of_evaluation(tiny_engram):
    model = tiny_engram(trained=True)
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    wanted = model.generate(IDS, **settings)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert torch.equal(model.generate(IDS, **settings), wanted)
    assert is_checkpointing(model), "the flags of the layers were not put back"
    trained = model(IDS, use_cache=True, labels=IDS)  # with gradients, the cache is dropped as Transformers drops it
    assert trained.logits.sub(model.eval()(IDS).logits).abs().max() < TOLERANCE
    with torch.no_grad():
        cache = model(IDS, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="holds 12 tokens, and gradient checkpointing"):
        model.train()(IDS[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_checkpointing_is_refused_where_hooks_would_run_twice(name, tiny_engram, monkeypatch):
    model = tiny_engram().train()
    if not hasattr(model, name):
        pytest.skip("this Transformers has the other name alone")
    if not CHECKPOINTS_RUN_HOOKS:
        getattr(model, name)()  # the control: this Transformers keeps hooks outside of what is run again
        monkeypatch.setattr(compat_engram, "CHECKPOINTS_RUN_HOOKS", True)
    with pytest.raises(RuntimeError, match="needs transformers 5.23 or newer"):
        getattr(model, name)()
