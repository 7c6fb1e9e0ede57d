"""Rounding by chance: right in the mean, so that small steps into bfloat16 and float16 add up and moments do not stall.

Run: pytest tests/unit/test_rounding.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.rows_gradient_engram import RowGradient
from engram_transformers.rows_table_engram import TablePart
from engram_transformers.training.optimizer import EngramOptimizer
from engram_transformers.training.stochastic_rounding import rounded


NARROW = [torch.bfloat16, torch.float16]


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", NARROW)
@given(value=st.floats(-60000, 60000, width=32), seed=st.integers(0, 2**16))
def test_a_number_becomes_one_of_its_two_neighbours(dtype, value, seed):
    exact = torch.full((64,), value)
    got = rounded(exact, dtype, chance(seed)).float()
    nearest = exact[:1].to(dtype)
    step = float(torch.nextafter(nearest.abs(), torch.full_like(nearest, torch.inf)).float() - nearest.abs().float())
    assert float((got - exact).abs().max()) < step * 1.0001
    assert len(got.unique()) <= 2
    held = nearest.float().expand(64)
    assert torch.equal(rounded(held, dtype, chance(seed)).float(), held), "what the type can hold stays"


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -1.001, 3.1e-5, -0.3333, 1e-7, 1234.5])
def test_the_mean_of_many_is_the_number(dtype, value):
    exact = torch.full((200_000,), value)
    got = rounded(exact, dtype, chance()).double()
    low, high = float(got.min()), float(got.max())
    # Standard error of the mean of 2e5 draws of two values: at most 0.5 / sqrt(2e5) = 0.0011 of their distance.
    assert abs(float(got.mean()) - float(exact[0])) <= 0.006 * (high - low)
    assert low < float(exact[0]) < high, "control: between two neighbours"
    nearest = float(exact[0].to(dtype)) - float(exact[0])
    assert abs(nearest) > 0.006 * (high - low), "control: rounding to the nearest is off"


@pytest.mark.parametrize("dtype", NARROW)
def test_beyond_the_largest_number_is_the_largest(dtype):
    largest = torch.finfo(dtype).max
    got = rounded(torch.tensor([3.4e38, -3.4e38, float(largest)]).expand(100, 3).contiguous(), dtype, chance())
    assert torch.equal(got.float(), torch.tensor([largest, -largest, largest]).expand(100, 3))


def test_float32_is_not_touched_and_takes_no_random_number():
    values, generator = torch.randn(10), chance()
    before = generator.get_state()
    assert rounded(values, torch.float32, generator) is values
    assert torch.equal(generator.get_state(), before)


def table_and_optimizer(dtype, seed=0, **settings):
    table = TablePart(torch.ones(512, 8, dtype=dtype))
    groups = [{"params": [table], "rows": True, **settings}]
    return table, EngramOptimizer(groups, lr=1e-4, seed=seed)


@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_into_a_narrow_table_add_up(dtype):
    table, optimizer = table_and_optimizer(dtype)
    plain = table.detach().clone()
    for _ in range(100):
        table.grad = RowGradient(table, torch.arange(512), torch.ones(512, 8))
        optimizer.step()
        plain -= 1e-4
    # 100 steps of 1e-4; the standard error of 4096 values is below 1e-4 for steps of 2**-8 between neighbours.
    assert abs(float(1 - table.detach().double().mean()) - 0.01) < 5e-4
    assert (plain == 1).all(), "control: rounded to the nearest, no step arrives"


def test_second_moments_in_bfloat16_follow_those_in_float32():
    means = {}
    for kind in ("float32", "bfloat16"):
        table, optimizer = table_and_optimizer(torch.float32, table_state_dtype=kind)
        for step in range(300):
            # Gradients that grow: the second moment has to rise by less than 2**-9 of itself at a time.
            table.grad = RowGradient(table, torch.arange(512), torch.full((512, 8), 1.0 if step < 50 else 1.2))
            optimizer.step()
        means[kind] = float(optimizer.state_dict()["state"][0]["exp_avg_sq"].double().mean())
        assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == getattr(torch, kind)
    square = torch.zeros((), dtype=torch.bfloat16)
    for step in range(300):
        square = (square.float() * 0.999 + 0.001 * (1.0 if step < 50 else 1.44)).bfloat16()
    assert means["bfloat16"] == pytest.approx(means["float32"], rel=0.01)
    assert abs(float(square) / means["float32"] - 1) > 0.05, "control: rounded to the nearest, it stalls"


def test_the_seed_decides_the_chances():
    tables = []
    for seed in (0, 0, 1):
        table, optimizer = table_and_optimizer(torch.bfloat16, seed)
        table.grad = RowGradient(table, torch.arange(512), torch.ones(512, 8))
        optimizer.step()
        tables.append(table.detach())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
