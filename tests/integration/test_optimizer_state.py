"""The state of the one optimizer: restored whole, or refused whole with an error that says what to do.

Proves that for each kind of damage, for states of another model, of an older version or of other settings, and that
nothing has changed then; that the undamaged state is taken.

Run: pytest tests/integration/test_optimizer_state.py
"""

import copy

import pytest
import torch

from engram_transformers.rows_gradient_engram import row_gradient
from engram_transformers.training import create_optimizer

from .stepping import backward, equal, run


def first_rows(state):
    return next(entry for entry in state["state"].values() if "rows" in entry)


def dense_entry(state):
    return next(entry for entry in state["state"].values() if "rows" not in entry)


def tables_group(state):
    return next(group for group in state["param_groups"] if group["name"] == "tables")


# Each with what the error says of it: another model, another version, other settings, or damage.
DAMAGES = {
    "unsorted": (lambda s: first_rows(s).update(rows=first_rows(s)["rows"].flip(0)), "damaged"),
    "twice": (lambda s: first_rows(s)["rows"].__setitem__(1, first_rows(s)["rows"][0]), "damaged"),
    "beyond": (lambda s: first_rows(s)["rows"].__setitem__(-1, 10**9), "damaged"),
    "negative": (lambda s: first_rows(s)["rows"].__setitem__(0, -1), "damaged"),
    "fractions": (lambda s: first_rows(s).update(rows=first_rows(s)["rows"].float()), "int64"),
    "height": (lambda s: first_rows(s).update(height=77), "another model"),
    "width": (lambda s: first_rows(s).update(exp_avg=torch.zeros(3, 9)), "another model"),
    "type": (lambda s: first_rows(s).update(step=first_rows(s)["step"].float()), "another model"),
    "older": (lambda s: first_rows(s).pop("height"), "another version"),
    "part": (lambda s: first_rows(s).pop("exp_avg_sq"), "another version"),
    "old group": (lambda s: tables_group(s).pop("table_optimizer"), "table_optimizer"),
    "rule": (lambda s: tables_group(s).update(table_optimizer="adagrad"), "table_optimizer='adagrad'"),
    "precision": (lambda s: tables_group(s).update(table_state_dtype="bfloat16"), "table_state_dtype='bfloat16'"),
    "l2_sp": (lambda s: tables_group(s).update(l2_sp=0.5), "l2_sp=0.5"),
    "no numbers": (lambda s: s.pop("engram"), "engram"),
    "dense shape": (lambda s: dense_entry(s).update(exp_avg=torch.zeros(7)), "another model"),
    "dense kind": (lambda s: dense_entry(s).pop("exp_avg_sq"), "another optimizer"),
    "number": (lambda s: s["state"].update({99: {}}), "99"),
    "groups": (lambda s: s["param_groups"].pop(), "trained"),
    "name": (lambda s: tables_group(s).update(name="rows"), "rows"),
    "nothing": (lambda s: s.clear(), "not an optimizer state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_is_refused_whole(damage, memory, batches):
    model = memory()
    optimizer = create_optimizer(model)
    run(model, optimizer, batches[:1])
    good, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, batches[1:2])
    now = copy.deepcopy(optimizer.state_dict())
    spoil, message = DAMAGES[damage]
    spoil(other)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other)
    assert equal(optimizer.state_dict(), now)
    optimizer.load_state_dict(good)
    assert equal(optimizer.state_dict(), good), "control: the undamaged one is taken"


@pytest.mark.parametrize("fields", [{"engram_vocab_size": 300}, {"engram_head_dim": 8}])
def test_the_state_of_another_model_is_refused(fields, memory, batches):
    model, other = memory(), memory(**fields)
    optimizer = create_optimizer(other)
    run(other, optimizer, batches[:1])
    with pytest.raises(ValueError, match="belongs to another model"):
        create_optimizer(model).load_state_dict(optimizer.state_dict())


def test_a_loaded_state_is_no_part_of_the_dict_it_came_from(memory, batches):
    model = memory()
    optimizer = create_optimizer(model)
    run(model, optimizer, batches[:1])
    state = optimizer.state_dict()
    rows = {index: copy.deepcopy(entry) for index, entry in state["state"].items() if "rows" in entry}
    twin = create_optimizer(model)
    twin.load_state_dict(state)
    run(model, twin, batches[:1])  # the rows of before: nothing grows, and numbers are written in place
    assert all(equal(state["state"][index], entry) for index, entry in rows.items())
    assert len(rows) == 4


def test_a_selection_of_rows_travels_with_the_state(memory, batches):
    model = memory()
    optimizer = create_optimizer(model)
    part = optimizer.row_groups()[0]["params"][0]
    part.selected = torch.tensor([2, 7])
    state = optimizer.state_dict()
    part.selected = None
    optimizer.load_state_dict(state)
    assert part.selected.tolist() == [2, 7] and not optimizer.row_states
    backward(model, batches[0])
    gradient = row_gradient(part)
    assert gradient is None or set(gradient.rows.tolist()) <= {2, 7}
