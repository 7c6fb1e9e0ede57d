"""What a forward pass gives back is what the backbone gives back: the same fields, counts, shapes and scaling.

Compared with the plain backbone in the same test, bit for bit where nothing was added to the stream; losses to 1e-5.

Run: pytest tests/integration/test_outputs.py
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM

from .backbones import BACKBONES


OUTPUTS = {"output_hidden_states": True, "output_attentions": True}
some_backbones = pytest.mark.parametrize(
    "backbone", ["llama", "gemma3", "gpt2", "mixtral", "deepseek_v4", "lfm2", "falcon_h1"]
)


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@pytest.fixture
def pair(tiny_donor, tiny_engram):
    """Factory of a plain backbone and a model with memory, both attending eagerly."""

    def make(backbone="llama", trained=True, layers=(1, 2)):
        plain, donor = tiny_donor(BACKBONES[backbone]()), tiny_donor(BACKBONES[backbone]())
        model = tiny_engram(trained=trained, donor=donor, layers=layers)
        plain.set_attn_implementation("eager")
        model.set_attn_implementation("eager")
        return plain, model

    return make


def shapes(outputs):
    """Names and shapes of everything in an output that is made of tensors."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            found[name] = tuple(value.shape)
        elif isinstance(value, tuple):
            found[name] = [tuple(part.shape) for part in value if part is not None]
    return found


@torch.no_grad()
@some_backbones
@pytest.mark.parametrize("first", [0, 1, 2])
def test_hidden_states_and_attentions_are_the_backbones_up_to_the_first_engram_layer(backbone, first, ids, pair):
    plain, model = pair(backbone, layers=(first,))
    expected, found = plain(ids, **OUTPUTS), model(ids, **OUTPUTS)
    assert found.keys() == expected.keys()
    assert shapes(found) == shapes(expected)
    assert len(found.hidden_states) == 1 + model.config.text_config.num_hidden_layers
    # States are taken before the memory is added, but that of layer 0 from what the layer is given: after it.
    same = [torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True)]
    assert same == [first > 0 and index <= first for index in range(len(same))]
    with model.disable_memory():
        off = model(ids, **OUTPUTS)
    assert all(torch.equal(a, b) for a, b in zip(off.hidden_states, expected.hidden_states, strict=True))


@torch.no_grad()
def test_attentions_change_from_the_first_engram_layer_on(ids, pair):
    plain, model = pair(layers=(1,))
    attentions = zip(model(ids, **OUTPUTS).attentions, plain(ids, **OUTPUTS).attentions, strict=True)
    assert [torch.equal(found, expected) for found, expected in attentions] == [True, False, False]


@torch.no_grad()
@some_backbones
def test_what_is_not_asked_for_is_not_there(backbone, ids, pair):
    plain, model = pair(backbone)
    assert model(ids).keys() == plain(ids).keys()
    assert model(ids, use_cache=False).keys() == plain(ids, use_cache=False).keys()


@torch.no_grad()
@some_backbones
def test_a_tuple_holds_what_the_backbones_tuple_holds(backbone, ids, pair):
    plain, model = pair(backbone)
    settings = {"labels": ids, "use_cache": False, "return_dict": False, "output_hidden_states": True}
    expected, found = plain(ids, **settings), model(ids, **settings)
    assert type(found) is tuple
    assert [type(part) for part in found] == [type(part) for part in expected]
    named = model(ids, **{**settings, "return_dict": True})
    assert torch.equal(found[0], named.loss)
    assert torch.equal(found[1], named.logits)


@torch.no_grad()
def test_the_configuration_asks_for_outputs_too(ids, pair, tmp_path):
    plain, model = pair()
    for name in OUTPUTS:
        field = name.removeprefix("output_")
        assert field not in model(ids)
        for either in (plain, model):
            setattr(either.config, name, True)
        assert len(model(ids)[field]) == len(plain(ids)[field])
        assert field not in model(ids, **{name: False})
    model.config.return_dict = False  # a plain Llama of transformers 5.23 fails with it
    assert type(model(ids)) is tuple
    assert model(ids, return_dict=True).logits is not None
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_hidden_states=True, return_dict=True)
    assert len(loaded(ids).hidden_states) == 4


@torch.no_grad()
def test_the_model_without_its_head_gives_the_same_states(ids, pair, tmp_path):
    _, model = pair()
    model.save_pretrained(tmp_path / "saved")
    headless = AutoModel.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    found, expected = headless(ids, **OUTPUTS), model(ids, **OUTPUTS)
    assert torch.equal(found.last_hidden_state, expected.hidden_states[-1])
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.attentions, expected.attentions, strict=True))
    assert torch.equal(headless(ids, use_cache=False, return_dict=False)[0], found.last_hidden_state)


@torch.no_grad()
@some_backbones
@pytest.mark.parametrize("items", [None, 7, 29, torch.tensor(11)])
def test_a_loss_is_scaled_as_the_backbone_scales_it(backbone, items, ids, pair):
    plain, model = pair(backbone)
    labels = ids.clone()
    labels[0, 3:9] = -100
    settings = {"labels": labels} if items is None else {"labels": labels, "num_items_in_batch": items}
    outputs = model(ids, **settings)
    total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    counted = int((labels[:, 1:] != -100).sum()) if items is None else int(items)
    torch.testing.assert_close(outputs.loss, total / counted, rtol=1e-5, atol=0)
    with model.disable_memory():
        assert torch.equal(model(ids, **settings).loss, plain(ids, **settings).loss)
    assert not torch.equal(outputs.loss, plain(ids, **settings).loss), "control: the memory must be seen"


@torch.no_grad()
@some_backbones
def test_only_the_logits_that_are_kept_are_computed(backbone, ids, pair):
    plain, model = pair(backbone)
    whole = model(ids).logits
    places = torch.tensor([0, 4, 14])
    for keep, expected in ((1, whole[:, -1:]), (3, whole[:, -3:]), (0, whole), (places, whole[:, places])):
        found = model(ids, logits_to_keep=keep).logits
        assert found.shape == plain(ids, logits_to_keep=keep).logits.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_arguments_of_one_backbone_alone_reach_it(ids, pair):
    plain, model = pair("mixtral", trained=False)
    settings = {"labels": ids, "output_router_logits": True}
    expected, found = plain(ids, **settings), model(ids, **settings)
    assert found.keys() == expected.keys()
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert torch.equal(found.loss, expected.loss)
    assert len(found.router_logits) == 3


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_generating_gives_back_what_the_backbone_gives_back(beams, ids, pair):
    plain, model = pair()
    settings = {
        **OUTPUTS,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 3,
        "num_beams": beams,
        "do_sample": False,
        "pad_token_id": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected, found = plain.generate(ids, **settings), model.generate(ids, **settings)
    assert found.keys() == expected.keys()
    for name in ("hidden_states", "attentions"):
        assert [[part.shape for part in step] for step in found[name]] == [
            [part.shape for part in step] for step in expected[name]
        ]
    for name in ("scores", "logits"):
        assert [part.shape for part in found[name]] == [part.shape for part in expected[name]]
    torch.testing.assert_close(found.logits[0][::beams], model(ids).logits[:, -1], rtol=0, atol=1e-5)
