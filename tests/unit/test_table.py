"""EngramTable: rows come out as they were put in, and the gradient of a table is the rows that were read.

Run with `pytest tests/unit/test_table.py`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers import rows_table_engram
from engram_transformers.rows_gradient_engram import (
    RowGradient,
    add_row_gradient,
    row_gradient,
    sum_rows,
    with_row_gradients,
)
from engram_transformers.rows_table_engram import EngramTable

from ..counting_device import counted


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def filled(order_rows: list[int], width: int, parts: int, dtype=torch.float32, seed: int = 0) -> EngramTable:
    """A table in which no two values are alike (as far as the dtype can tell)."""
    table, generator = EngramTable(order_rows, width, parts, dtype), torch.Generator().manual_seed(seed)
    for parameter in table.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return table


def whole(table: EngramTable) -> list[torch.Tensor]:
    """Each order as one tensor."""
    return [torch.cat([part.detach() for part in parts]) for parts in table.orders()]


@st.composite
def reads(draw):
    """Sizes of a table and rows to read from it, `(batch, length, orders, heads)`, with repeats."""
    parts = draw(st.integers(1, 4))
    order_rows = draw(st.lists(st.integers(parts, 40), min_size=1, max_size=3))
    batch, length, heads = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    columns = [torch.randint(0, rows, (batch, length, heads), generator=generator) for rows in order_rows]
    return order_rows, draw(st.integers(1, 5)), parts, torch.stack(columns, dim=2)


held = row_gradient


def dense_gradients(table: EngramTable) -> list[torch.Tensor]:
    """Row gradients of each order as one dense tensor."""
    dense = []
    for parts in table.orders():
        pieces = []
        for part in parts:
            piece = torch.zeros(part.shape)
            if held(part) is not None:
                piece[held(part).rows] = held(part).row_values
            pieces.append(piece)
        dense.append(torch.cat(pieces))
    return dense


@given(case=reads(), dtype=st.sampled_from(DTYPES), grad=st.booleans())
def test_a_gather_copies_exactly_the_rows_it_was_asked_for(case, dtype, grad):
    order_rows, width, parts, rows = case
    table = filled(order_rows, width, parts, dtype)
    with torch.set_grad_enabled(grad):
        vectors = table(rows)
    expected = torch.cat([F.embedding(rows[:, :, i], order).flatten(-2) for i, order in enumerate(whole(table))], -1)
    assert vectors.dtype == dtype
    assert torch.equal(vectors, expected)


@given(parts=st.integers(1, 8), more=st.integers(0, 60))
def test_an_order_has_as_many_parts_as_were_asked_for(parts, more):
    table = EngramTable([parts + more], 2, parts, torch.float32)
    heights = [len(piece) for piece in table.order2]
    assert len(heights) == parts
    assert sum(heights) == parts + more
    assert set(heights[:-1]) <= set(table.part_heights)  # only the last may differ


@given(parts=st.integers(2, 8), data=st.data())
def test_more_parts_than_rows_are_refused(parts, data):
    rows = data.draw(st.integers(1, parts - 1))
    with pytest.raises(ValueError, match=f"engram_table_parts={parts} is more than the {rows} rows of order 3"):
        EngramTable([100, rows], 2, parts, torch.float32)


def test_parameters_are_named_by_order_and_part():
    table = EngramTable([8, 9], 3, 2, torch.float32)
    assert {name: tuple(p.shape) for name, p in table.named_parameters()} == {
        "order2.0": (4, 3),
        "order2.1": (4, 3),
        "order3.0": (4, 3),
        "order3.1": (5, 3),
    }


def test_a_table_starts_at_zero():
    table = EngramTable([7, 11], 3, 2, torch.bfloat16)
    assert all(not parameter.any() for parameter in table.parameters())
    assert not table(torch.randint(0, 7, (2, 5, 2, 3))).any()


@given(case=reads(), calls=st.integers(1, 3))
def test_row_gradients_equal_the_dense_gradient_of_a_plain_embedding(case, calls):
    order_rows, width, parts, rows = case
    table = filled(order_rows, width, parts)
    plain = [order.clone().requires_grad_() for order in whole(table)]
    for call in range(calls):  # more than one call accumulates, as autograd does
        shifted = torch.stack([(rows[:, :, i] + call) % size for i, size in enumerate(order_rows)], dim=2)
        weights = torch.randn(*rows.shape[:2], len(order_rows) * rows.shape[3] * width)
        (table(shifted) * weights).sum().backward()
        vectors = [F.embedding(shifted[:, :, i], order).flatten(-2) for i, order in enumerate(plain)]
        (torch.cat(vectors, dim=-1) * weights).sum().backward()
    for found, order in zip(dense_gradients(table), plain, strict=True):
        torch.testing.assert_close(found, order.grad, rtol=0, atol=1e-6 * (1 + order.grad.abs().max().item()))


@given(case=reads(), calls=st.integers(1, 3))
def test_rows_of_a_gradient_ascend_and_are_those_that_were_read(case, calls):
    order_rows, width, parts, rows = case
    table = filled(order_rows, width, parts)
    for _ in range(calls):
        table(rows).square().sum().backward()
    for index, order in enumerate(table.orders()):
        read, first = set(rows[:, :, index].flatten().tolist()), 0
        for part in order:
            inside = sorted(row - first for row in read if first <= row < first + len(part))
            first += len(part)
            assert (held(part).rows.tolist() if held(part) is not None else []) == inside
            assert held(part) is None or held(part).row_values.dtype == torch.float32


@given(case=reads(), data=st.data())
def test_frozen_parts_get_no_gradient(case, data):
    order_rows, width, parts, rows = case
    table = filled(order_rows, width, parts)
    free = filled(order_rows, width, parts)
    for parameter in table.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    vectors = table(rows)
    assert vectors.requires_grad == any(parameter.requires_grad for parameter in table.parameters())
    free(rows).sum().backward()
    if vectors.requires_grad:
        vectors.sum().backward()
    for part, control in zip(table.parameters(), free.parameters(), strict=True):
        if part.requires_grad and held(control) is not None:
            assert torch.equal(held(part).rows, held(control).rows)
            assert torch.equal(held(part).row_values, held(control).row_values)
        else:
            assert held(part) is None


def test_a_low_precision_table_gets_float32_gradients():
    # 256 reads of one row by 1 + 2**-7: the sum 258 is exact in float32 and would be 256 in bfloat16 steps.
    table = filled([5], 1, 1, torch.bfloat16)
    vectors = table(torch.full((1, 256, 1, 1), 3))
    vectors.backward(torch.full_like(vectors, 1 + 2**-7))
    gradient = table.order2[0].grad
    assert (gradient.rows.tolist(), gradient.row_values.tolist()) == ([3], [[258.0]])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_an_optimizer_that_knows_nothing_of_rows_raises_and_changes_nothing(kind):
    table = filled([20, 30], 3, 2)
    before = whole(table)
    optimizer = kind(table.parameters(), lr=0.1)
    table(torch.randint(0, 20, (2, 5, 2, 3))).sum().backward()
    with pytest.raises(TypeError, match=r"rows alone.*create_optimizer\(model\)"):
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(whole(table), before, strict=True))


def test_sums_of_equal_rows():
    rows, values = sum_rows(torch.tensor([5, 2, 5, 5]), torch.tensor([[1.0], [10.0], [2.0], [4.0]]))
    assert (rows.tolist(), values.tolist()) == ([2, 5], [[10.0], [7.0]])


def test_gradients_add_up_and_count_as_not_applied():
    parameter = torch.nn.Parameter(torch.zeros(9, 1))
    add_row_gradient(parameter, torch.tensor([1, 4]), torch.tensor([[1.0], [2.0]]))
    parameter.grad.applied = True
    add_row_gradient(parameter, torch.tensor([0, 4]), torch.tensor([[8.0], [16.0]]))
    gradient = parameter.grad
    assert (gradient.rows.tolist(), gradient.row_values.tolist()) == ([0, 1, 4], [[8.0], [1.0], [18.0]])
    assert not gradient.applied


def test_torchs_zero_grad_drops_every_row_gradient():
    table = filled([20, 30], 3, 1)
    table(torch.randint(0, 20, (2, 5, 2, 3))).sum().backward()
    assert len(list(with_row_gradients(table.parameters()))) == 2
    table.zero_grad(set_to_none=False)
    assert [float(part.grad.row_values.abs().sum()) for part in table.parameters()] == [0.0, 0.0]
    table.zero_grad()
    assert list(with_row_gradients(table.parameters())) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_clipping_and_scaler_reach_rows(dtype):
    table = filled([20, 30], 3, 1, dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    vectors = table(torch.randint(0, 20, (2, 5, 2, 3))).float().square().sum()
    vectors.backward()
    expected = [part.grad.row_values.clone() for part in table.parameters()]
    table.zero_grad()
    scaler.scale(table(torch.randint(0, 20, (2, 5, 2, 3))).float().square().sum())  # makes the scale
    for part, gradient in zip(table.parameters(), expected, strict=True):
        part.grad = RowGradient(part, torch.arange(len(gradient)), gradient * 2.0**10)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    scaler.unscale_(optimizer)
    for part, gradient in zip(table.parameters(), expected, strict=True):
        assert torch.equal(part.grad.row_values, gradient)
    norm = torch.nn.utils.clip_grad_norm_(table.parameters(), 1.0)
    torch.testing.assert_close(norm, torch.cat(expected).norm(), rtol=1e-5, atol=0)
    clipped = torch.cat([part.grad.row_values for part in table.parameters()])
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_gradients_move_with_their_table():
    table = filled([20, 30], 3, 2)
    table(torch.randint(0, 20, (2, 5, 2, 3))).sum().backward()
    before = {name: part.grad.row_values.clone() for name, part in table.named_parameters() if part.grad is not None}
    table.to(torch.float64)  # a table keeps its type, and so do its gradients
    assert before
    for name, part in table.named_parameters():
        assert (part.grad is None) == (name not in before)
        assert name not in before or torch.equal(part.grad.row_values, before[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [
        torch.nn.Module.half,
        torch.nn.Module.float,
        torch.nn.Module.double,
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.to("cpu"),
        lambda module: [own.to(torch.bfloat16) for own in module.modules() if not list(own.children())][-1],
    ],
    ids=["half", "float", "double", "to_bfloat16", "to_device_and_float16", "to_device", "each_module_by_itself"],
)
def test_no_change_of_type_reaches_a_table(change, dtype):
    module = torch.nn.ModuleDict(
        {"table": filled([20, 30], 3, 2, dtype), "control": torch.nn.Linear(2, 2, dtype=dtype)}
    )
    before = [parameter.detach().clone() for parameter in module["table"].parameters()]
    control = change(torch.nn.Linear(2, 2, dtype=dtype)).weight.dtype
    change(module)
    for parameter, old in zip(module["table"].parameters(), before, strict=True):
        assert parameter.dtype == dtype
        assert torch.equal(parameter, old)
    assert module["control"].weight.dtype == control


def test_a_table_moves_between_devices():
    table = filled([20], 3, 2, torch.bfloat16)
    assert table.order2[0].device.type == "cpu"
    table.to("meta", torch.float32)
    assert table.order2[0].device.type == "meta"
    assert {parameter.dtype for parameter in table.parameters()} == {torch.bfloat16}
    table.to_empty(device="cpu")
    assert table.order2[0].device.type == "cpu"
    assert [tuple(parameter.shape) for parameter in table.parameters()] == [(10, 3), (10, 3)]


@pytest.mark.parametrize(("parts", "waits"), [(1, 0), (2, 2)])
def test_a_gradient_of_one_part_is_left_without_waiting_for_the_device(parts, waits, counting_device):
    table, control = (filled([10], 2, parts) for _ in range(2))
    rows = torch.tensor([[[[1, 7, 1]]]])
    read, there = table.to("counting")(rows.to("counting")), control(rows)
    with counted() as crossed:
        read.sum().backward()
    there.sum().backward()
    assert crossed.d2h_copies == waits, "each part of several is asked whether it was read"
    for part, expected in zip(table.parameters(), control.parameters(), strict=True):
        assert torch.equal(part.grad.rows.cpu(), expected.grad.rows)
        assert torch.equal(part.grad.row_values.cpu(), expected.grad.row_values)


def test_gradients_pass_to_what_reads_a_table_with_all_its_neighbours():
    table, scale = filled([10], 2, 1), torch.tensor(3.0, requires_grad=True)
    rows = torch.tensor([[[[1]], [[2]]]])
    (table(rows) * scale).sum().backward()
    assert math.isclose(scale.grad.item(), whole(table)[0][[1, 2]].sum().item(), rel_tol=1e-6)
    assert table.order2[0].grad.row_values.tolist() == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
@pytest.mark.parametrize("name", ["gather_rows_2", "leave_row_gradients_2"])
def test_operators_that_look_for_rows_say_that_cuda_graphs_cannot_capture_them(name):
    operators = getattr(torch.ops, rows_table_engram.OPERATORS)
    assert torch.Tag.cudagraph_unsafe in getattr(operators, name).default.tags
