"""A part of a table is a parameter wherever its rows are: what walks parameters finds it, and nothing moves its rows.

The same laws for rows on the device (the control), in host memory and on disk. Exact.
Run: pytest tests/integration/test_table_parts.py
"""

import copy
import pickle

import pytest
import torch
from accelerate.utils import check_device_map, infer_auto_device_map
from torch import nn

from engram_transformers.rows_table_engram import TablePart

from .placed import loaded, logits, repeating_texts


pytestmark = pytest.mark.core
PLACES = ["device", "cpu", "disk"]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return repeating_texts()


def tables(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith("memory.tables.")}


@pytest.mark.parametrize("place", PLACES)
def test_names_types_and_shapes_of_parts(place, saved, control):
    model = loaded(saved, place)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in control.named_parameters()]
    for name, part in tables(model).items():
        whole = dict(control.named_parameters())[name]
        assert type(part) is TablePart and part.table_shape == whole.shape and part.dtype == whole.dtype
        assert len(part) == (len(whole) if place == "device" else 0)
        rows = torch.tensor([0, len(whole) - 1])
        assert torch.equal(part.read(rows), whole.detach()[rows])
    rest = sum(p.numel() for name, p in control.named_parameters() if name not in tables(control))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert (model.num_parameters() == rest) == (place != "device"), "what is elsewhere takes no room in the model"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("walk", ["model", "memory", "tables", "order"])
def test_freezing_reaches_parts_from_everywhere(walk, place, saved):
    model = loaded(saved, place)
    ways = {"model": model, "memory": model.memory, "tables": model.memory.tables}
    ways["order"] = model.memory.tables["1"].order2
    ways[walk].requires_grad_(False)
    frozen = {name for name, part in tables(model).items() if not part.requires_grad}
    assert frozen == {name for name in tables(model) if walk != "order" or ".1.order2." in name}


@pytest.mark.parametrize("place", PLACES)
def test_conversions_leave_rows_where_and_what_they_are(place, saved, control):
    model = loaded(saved, place)
    before = {name: id(part) for name, part in tables(model).items()}
    model.bfloat16().half().float().to("cpu", torch.float64).float()
    assert {name: id(part) for name, part in tables(model).items()} == before, "what an optimizer holds"
    assert all(part.dtype == torch.float32 for part in tables(model).values())
    state, kept = control.state_dict(), model.state_dict()
    assert all(torch.equal(kept[name], state[name]) for name in tables(control))


@pytest.mark.parametrize("place", PLACES)
def test_empty_parts_stay_on_the_host_when_a_model_moves(place, device, saved):
    model = loaded(saved, place)
    model.memory.tables["1"].order2.requires_grad_(False)
    before = {name: id(part) for name, part in tables(model).items()}
    model.to("counting")
    if place != "device":
        assert {name: id(part) for name, part in tables(model).items()} == before, "what an optimizer holds"
    assert {part.device.type for part in tables(model).values()} == {"counting" if place == "device" else "cpu"}
    model.place_memory("cpu").place_memory("device")
    assert [part.requires_grad for part in tables(model).values()] == [False, True, True, True]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_parts_and_rows_of_their_own(twin, place, saved, control, ids):
    model = loaded(saved, place)
    model.memory.tables["1"].order2.requires_grad_(False)
    other = twin(model)
    for name, part in tables(other).items():
        assert type(part) is TablePart and part is not tables(model)[name]
        assert part.requires_grad == tables(model)[name].requires_grad
        part.write(torch.tensor([0]), torch.full((1, part.shape[1]), 7.0))
    assert torch.equal(logits(model, ids), logits(control, ids)), "the model's own rows are as they were"
    changed = torch.full((part.shape[1],), 7.0)
    assert all(torch.equal(part.read(torch.tensor([0]))[0], changed) for part in tables(other).values())


@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_measured_clipped_and_dropped_with_the_model(place, saved, ids):
    model = loaded(saved, place).train()
    model(input_ids=ids, labels=ids).loss.backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert total > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-3)
    assert all(len(part.grad.rows) for part in tables(model).values())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_maps_of_accelerate_have_a_place_for_every_part(place, saved):
    model = loaded(saved, place)
    device_map = infer_auto_device_map(model, {"cpu": 10**9}, no_split_module_classes=model._no_split_modules)
    check_device_map(model, device_map)
    with pytest.raises(ValueError, match="does not give any device"):  # control
        check_device_map(model, {"backbone": "cpu"})


def test_a_plain_parameter_that_somebody_sets_becomes_a_part(control):
    order = copy.deepcopy(control).memory.tables["1"].order2
    rows = torch.ones_like(order.parts[0])
    setattr(order, "0", nn.Parameter(rows, requires_grad=False))
    assert type(order.parts[0]) is TablePart and not order.parts[0].requires_grad
    assert torch.equal(order.parts[0].read(torch.tensor([3]))[0], rows[3])
    order._parameters["0"] = nn.Parameter(rows.half())  # past the module, as loaders do
    assert type(order.tensors()[0]) is TablePart and order.tensors()[0].dtype == rows.dtype
