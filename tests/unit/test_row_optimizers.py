"""Rules by which rows learn: each equals a readable reference, at the rows of a step and at no others.

Proves that lazy Adam, Adagrad and the balanced momentum are their dense selves where every row is read, and count each
row's own reads where they are not; that a step in pieces is the step, makes no tensor of the gradient's size but its
state and none of the table's; the pull of the l2_sp; the index of slots against a dictionary.

Run: pytest tests/unit/test_row_optimizers.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engram_transformers import rows_overlay_engram
from engram_transformers.rows_gradient_engram import RowGradient
from engram_transformers.rows_overlay_engram import RowIndex
from engram_transformers.rows_table_engram import TablePart
from engram_transformers.training import row_state
from engram_transformers.training.optimizer import EngramOptimizer
from engram_transformers.training.row_rules import _bias_correction

from ..conftest import examples


RULES = ["adam", "adagrad", "sinkhorn"]
VISITS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**16)


def optimizer_of(table, rule="adam", lr=0.1, **settings):
    return EngramOptimizer([{"params": [table], "rows": True, "table_optimizer": rule, **settings}], lr=lr)


def learn(optimizer, table, read, gradient):
    table.grad = RowGradient(table, torch.as_tensor(read), gradient.clone())
    optimizer.step()


def adam(seen, betas=(0.9, 0.999), eps=1e-8):
    """Direction after the gradients that one row has seen, in float64."""
    mean = square = torch.zeros_like(seen[0]).double()
    for g in seen:
        mean, square = betas[0] * mean + (1 - betas[0]) * g, betas[1] * square + (1 - betas[1]) * g.double() ** 2
    corrected = mean / (1 - betas[0] ** len(seen))
    return corrected / ((square / (1 - betas[1] ** len(seen))).sqrt() + eps)


def adagrad(seen, eps=1e-8):
    return seen[-1] / (sum(g.double().square().mean() for g in seen).sqrt() + eps)


def balanced(momentum, gradient, beta=0.95, tau=1e-3, gamma=0.18, rounds=11):
    """The balanced update as it is described, on a whole matrix in float64; `momentum` has the gradient taken in."""
    ahead = beta * momentum + (1 - beta) * gradient
    norms = ahead.norm(dim=1)
    ahead[norms <= tau * norms.mean()] = 0
    for turn in range(rounds):
        ahead = ahead / ahead.norm(dim=1 - turn % 2, keepdim=True).clamp_min(1e-20)
    return gamma * ahead.shape[1] ** 0.5 * ahead


@given(steps=st.integers(1, 5), seed=SEEDS, decay=st.sampled_from([0.0, 0.1]), eps=st.sampled_from([1e-8, 0.1]))
def test_row_adam_is_torchs_adam_where_every_row_is_read(steps, seed, decay, eps):
    torch.manual_seed(seed)
    dense = torch.nn.Parameter(torch.randn(6, 3))
    table = TablePart(dense.detach().clone())
    reference = torch.optim.AdamW([dense], lr=0.1, weight_decay=decay, eps=eps)
    ours = optimizer_of(table, weight_decay=decay, eps=eps)
    for _ in range(steps):
        dense.grad = torch.randn(6, 3)
        learn(ours, table, range(6), dense.grad)
        reference.step()
    torch.testing.assert_close(table, dense, rtol=1e-5, atol=1e-5)  # torch orders the same operations differently


@given(visits=VISITS, seed=SEEDS, rule=st.sampled_from(["adam", "adagrad"]))
def test_a_rows_state_counts_its_own_updates(visits, seed, rule):
    torch.manual_seed(seed)
    table = TablePart(torch.zeros(41, 3))
    expected, optimizer = torch.zeros(41, 3, dtype=torch.float64), optimizer_of(table, rule, eps=0.1)
    history: dict[int, list[torch.Tensor]] = {}
    for visit in visits:
        read = sorted(set(visit))
        gradient = torch.randn(len(read), 3)
        learn(optimizer, table, read, gradient)
        for row, own in zip(read, gradient, strict=True):
            history.setdefault(row, []).append(own)
            expected[row] -= 0.1 * (adam if rule == "adam" else adagrad)(history[row], eps=0.1)
        torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)
    state = optimizer.state_dict()["state"][0]
    assert state["rows"].tolist() == sorted(history)
    if rule == "adam":
        assert state["step"].tolist() == [len(history[row]) for row in sorted(history)]


@given(visits=VISITS, seed=SEEDS)
def test_the_balanced_update_is_its_reference_over_the_rows_of_each_step(visits, seed):
    torch.manual_seed(seed)
    table = TablePart(torch.zeros(41, 4))
    expected, momentum = torch.zeros(41, 4, dtype=torch.float64), torch.zeros(41, 4, dtype=torch.float64)
    optimizer = optimizer_of(table, "sinkhorn")
    for visit in [*visits, range(41)]:  # the last one is dense
        read = torch.tensor(sorted(set(visit)))
        gradient = torch.randn(len(read), 4)
        gradient[0] *= 1e-6 if len(read) > 1 else 1  # a row that may be quiet
        learn(optimizer, table, read, gradient)
        momentum[read] = 0.95 * momentum[read] + 0.05 * gradient
        expected[read] -= 0.1 * balanced(momentum[read], gradient)
        torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)


def test_balanced_rows_move_equally_far_and_quiet_ones_not_at_all():
    table = TablePart(torch.zeros(50, 16))
    gradient = torch.randn(50, 16) * torch.logspace(-1, 1, 50)[:, None]  # rows of very different size
    gradient[7] *= 1e-6
    gradient[:, 3] *= 30
    learn(optimizer_of(table, "sinkhorn"), table, range(50), gradient)
    moved = table.detach().square().mean(1).sqrt()
    assert moved[7] == 0
    others = torch.arange(50) != 7
    torch.testing.assert_close(moved[others], torch.full((49,), 0.1 * 0.18), rtol=1e-5, atol=0)
    columns = table.detach()[others].square().mean(0).sqrt()
    assert columns.max() / columns.min() < 1.05, "columns are balanced as well, up to the last round of rows"
    plain = gradient[others].square().mean(0).sqrt()
    assert plain.max() / plain.min() > 10, "control: the gradient's are not"


@pytest.mark.parametrize("rule", RULES)
def test_a_step_in_pieces_is_the_step(rule, monkeypatch):
    results = []
    for values in (1 << 18, 15):  # all at once; 3 rows at a time
        monkeypatch.setattr(row_state, "PIECE_VALUES", values)
        torch.manual_seed(0)
        table = TablePart(torch.randn(100, 5))
        optimizer = optimizer_of(table, rule, l2_sp=0.3)
        for _ in range(3):
            read = torch.randint(0, 100, (40,)).unique()
            learn(optimizer, table, read, torch.randn(len(read), 5))
        results.append([table.detach(), *optimizer.state_dict()["state"][0].values()])
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(cut), torch.as_tensor(whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_were_not_read_stay_and_have_no_state(rule):
    table = TablePart(torch.randn(1000, 4))
    before, optimizer = table.detach().clone(), optimizer_of(table, rule, weight_decay=0.1, l2_sp=0.1)
    for read in ([3, 500], [500, 999]):
        learn(optimizer, table, read, torch.randn(2, 4))
    moved = (table.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 500, 999]
    assert optimizer.state_dict()["state"][0]["rows"].tolist() == moved


class Sizes(TorchDispatchMode):
    """Notes the shape and the type of what each operation makes."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, tuple]] = []
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        fresh = not func.is_view and "_." not in str(func) and isinstance(result, torch.Tensor)
        if fresh:
            self.made.append((str(func), tuple(result.shape)))
            self.types.add(result.dtype)
        return result


@pytest.mark.parametrize(("rule", "full"), [("adam", 2), ("adagrad", 0), ("sinkhorn", 2)])
def test_the_first_step_makes_its_state_and_nothing_else_of_the_gradients_size(rule, full, monkeypatch):
    monkeypatch.setattr(row_state, "PIECE_VALUES", 64)
    table = TablePart(torch.zeros(3000, 8))
    optimizer = optimizer_of(table, rule)
    read = torch.arange(0, 3000, 3)  # 1000 rows, 8000 values
    table.grad = RowGradient(table, read, torch.randn(1000, 8))
    with Sizes() as sizes:
        optimizer.step()
    # Adam's two moments; the momentum, and one matrix that balancing needs and drops.
    wide = [shape for _, shape in sizes.made if len(shape) == 2 and shape[1] > 1]
    assert [shape for shape in wide if shape[0] > 8] == [(1000, 8)] * full
    assert (8, 8) in wide, "control: pieces were noted"
    assert all(len(column) == 1000 for column in optimizer.row_states[table].columns.values())


@pytest.mark.parametrize("rule", RULES)
def test_no_operation_depends_on_the_tables_height(rule):
    made = []
    for height in (100, 100_000):
        table = TablePart(torch.zeros(height, 2))
        optimizer = optimizer_of(table, rule, l2_sp=0.1)
        for read in ([3, 50], [50, 99]):
            table.grad = RowGradient(table, torch.tensor(read), torch.ones(2, 2))
            with Sizes() as sizes:
                optimizer.step()
            made.append(sizes.made)
        assert torch.float64 not in sizes.types and torch.float32 in sizes.types, "Apple's GPUs have no float64"
    assert made[:2] == made[2:]
    assert made[0], "control: operations were noted"


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_the_bias_correction_is_right_to_float32s_last_digits(decay):
    steps = torch.tensor([1, 2, 3, 10, 1000, 10**6], dtype=torch.int32)
    exact = 1 - decay ** steps.double()
    torch.testing.assert_close(_bias_correction(decay, steps).double(), exact, rtol=3e-7, atol=0)
    assert decay != 0.999 or float(((1 - decay ** steps.float()) / exact - 1).abs().max()) > 1e-6, "control: plain"


def test_state_grows_by_halves():
    table = TablePart(torch.zeros(1000, 1))
    optimizer = optimizer_of(table)
    rooms = []
    for first in range(0, 400, 40):
        learn(optimizer, table, range(first, first + 40), torch.ones(40, 1))
        rooms.append(len(optimizer.row_states[table].columns["exp_avg"]))
    assert rooms == [40, 80, 120, 180, 270, 270, 405, 405, 405, 405]
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (400, 1)


@given(visits=VISITS, seed=SEEDS, l2_sp=st.sampled_from([0.0, 0.5]))
def test_the_anchor_pulls_a_row_to_what_it_was_when_first_touched(visits, seed, l2_sp):
    torch.manual_seed(seed)
    table = TablePart(torch.randn(41, 2))
    start, expected = table.detach().clone(), table.detach().clone()
    free = TablePart(table.detach().clone())
    optimizer, control = optimizer_of(table, "adagrad", l2_sp=l2_sp), optimizer_of(free, "adagrad")
    for visit in visits:
        read = torch.tensor(sorted(set(visit)))
        gradient, before = torch.randn(len(read), 2), free.detach()[read]
        learn(optimizer, table, read, gradient)
        learn(control, free, read, gradient)
        # Adagrad's direction does not ask where the row is, so the control shows it.
        expected[read] += free.detach()[read] - before - 0.1 * l2_sp * (expected[read] - start[read])
        torch.testing.assert_close(table.detach(), expected, rtol=1e-5, atol=1e-5)
    state = optimizer.state_dict()["state"][0]
    assert ("start" in state) == (l2_sp > 0)
    if l2_sp:
        assert torch.equal(state["start"], start[state["rows"]])


def test_an_anchored_row_comes_home_when_its_gradients_end():
    table = TablePart(torch.ones(4, 2))
    optimizer = optimizer_of(table, "adagrad", l2_sp=1.0)
    learn(optimizer, table, [1, 2], torch.ones(2, 2))
    away = (table.detach() - 1).abs()
    assert (away[1:3] > 0.05).all() and (away[[0, 3]] == 0).all()
    for _ in range(80):
        learn(optimizer, table, [1], torch.zeros(1, 2))
    left = (table.detach() - 1).abs()
    assert (left[1] < 1e-4).all(), "0.9**80 of the way is left"
    assert torch.equal(left[2], away[2]), "control: a row that is not read is not pulled"


@examples(50)
@given(visits=st.lists(st.sets(st.integers(0, 2**32 - 1) | st.integers(0, 30), max_size=9), max_size=12))
def test_the_index_is_a_dictionary(visits):
    longest, rows_overlay_engram.LONGEST_RECENT = rows_overlay_engram.LONGEST_RECENT, 4
    try:
        index, known = RowIndex(), {}
        for visit in visits:
            asked = torch.tensor(sorted(visit), dtype=torch.int64)
            slots, found = index.find(asked.flip(0))
            assert found.tolist() == [row in known for row in reversed(asked.tolist())]
            assert [int(s) for s, f in zip(slots, found, strict=True) if f] == [
                known[row] for row in reversed(asked.tolist()) if row in known
            ]
            for row in asked.tolist():
                known.setdefault(row, len(known))
            assert index.slots(asked).tolist() == [known[row] for row in asked.tolist()]
            assert len(index) == len(known)
        assert index.rows.tolist() == sorted(known)
        assert index.places.tolist() == [known[row] for row in sorted(known)]
    finally:
        rows_overlay_engram.LONGEST_RECENT = longest


def test_known_rows_cost_no_merge_and_new_ones_are_merged_into_the_short_list(monkeypatch):
    monkeypatch.setattr(rows_overlay_engram, "LONGEST_RECENT", 4)
    index = RowIndex()
    index.slots(torch.arange(0, 400_000, 2))
    with Sizes() as sizes:
        index.slots(torch.arange(0, 4000, 2))
        index.slots(torch.arange(1, 4000, 2))
    assert max(shape[0] for _, shape in sizes.made) == 2000
    assert len(index.recent) == 2000
