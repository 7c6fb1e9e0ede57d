"""Tables sharded by row over ranks: the same reads, the same training, the same files as a table that is whole.

The control is one process with the whole table.
Run: pytest tests/integration/test_processes_sharded.py
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from engram_transformers import EngramForCausalLM
from engram_transformers.rows_placement_engram import named_orders
from engram_transformers.rows_table_engram import OrderRows
from engram_transformers.training import create_optimizer
from engram_transformers.training.distributed import RankPart, sync_row_gradients
from engram_transformers.training.sharded_tables import RankRows, row_bounds, save_sharded, shard_tables

from ..conftest import examples
from .process_models import assert_close, assert_same, loss_of, own_texts, small_model, texts, weights


CLOSE = 1e-6  # sums of float32 in another order: the differences are about 1e-8
STEPS, MAX_NORM = 3, 0.05


def group_of(ranks: int):
    """The first `ranks` processes; made once, since all must make it together."""
    if ranks not in GROUPS:
        GROUPS[ranks] = dist.new_group(list(range(ranks)))
    return GROUPS[ranks]


GROUPS: dict = {}


def rows_of(heights: list[int], dtype: torch.dtype) -> OrderRows:
    order = OrderRows(heights, 3, dtype)
    for number, part in enumerate(order.tensors()):
        part.data.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(number)))
    return order


def read_over(ranks: int, heights: list[int], requests: list[list[int]], dtype: torch.dtype, repeats: int):
    """A rank's reads of a made-up table, and the gradient that came to its rows."""
    group = group_of(ranks)
    rank = dist.get_rank()
    if rank >= ranks:
        return None
    whole = rows_of(heights, dtype)
    bounds = row_bounds(sum(heights), ranks)
    mine = torch.cat([part.detach() for part in whole.tensors()])[bounds[rank] : bounds[rank + 1]].clone()
    order = RankRows(whole, mine, True, group)
    rows = torch.tensor(requests[rank], dtype=torch.int64)
    for _ in range(repeats):  # gradients of accumulated batches
        values = order(rows)
        (values.float() * weights_of(rows, rank)).sum().backward()
    return values.detach(), order.part.grad.rows + order.first, order.part.grad.row_values


def weights_of(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """What each read's gradient is: a few bits, so that sums are exact."""
    return ((torch.arange(len(rows)) % 5 + 1) * (rank + 1)).float()[:, None].expand(-1, 3)


@st.composite
def tables_and_requests(draw):
    ranks = draw(st.integers(2, 3))
    part = draw(st.integers(1, 9))
    heights = [part] * draw(st.integers(0, 2)) + [draw(st.integers(part, 12))]
    ids = st.lists(st.integers(0, sum(heights) - 1), max_size=12)
    return ranks, heights, [draw(ids) for _ in range(ranks)]


@examples(25)
@given(case=tables_and_requests(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), repeats=st.integers(1, 2))
def test_rows_and_gradients_travel_to_whom_they_belong(trio, case, dtype, repeats):
    ranks, heights, requests = case
    table = torch.cat([part.detach() for part in rows_of(heights, dtype).tensors()])
    expected = torch.zeros(sum(heights), 3)
    for rank in range(ranks):
        rows = torch.tensor(requests[rank], dtype=torch.int64)
        expected.index_add_(0, rows, weights_of(rows, rank))
    expected *= repeats
    got = torch.zeros(sum(heights), 3)
    bounds = row_bounds(sum(heights), ranks)
    for rank, answer in enumerate(trio.run(read_over, ranks, heights, requests, dtype, repeats)[:ranks]):
        values, rows, gradient = answer
        assert torch.equal(values, table[requests[rank]])
        assert all(bounds[rank] <= row < bounds[rank + 1] for row in rows.tolist())
        got[rows] += gradient
    torch.testing.assert_close(got, expected / ranks, rtol=1e-6, atol=0)  # a third is not a binary number
    asked = {row for own in requests for row in own}
    assert {row for row, values in enumerate(got) if bool(values.any())} == asked


def logits_over(graft: str, placement: str) -> tuple[torch.Tensor, torch.Tensor, list[int], int]:
    if placement == "resident":
        model = small_model()
    else:
        model = EngramForCausalLM.from_pretrained(graft, engram_placement=placement)
    shard_tables(model.eval())
    with torch.no_grad():
        different = model(texts(dist.get_rank())).logits  # another text on each rank
        with model.disable_memory():
            off = model(texts(dist.get_rank())).logits
    return (
        different,
        off,
        [len(order.part) for _, order in named_orders(model.memory.tables)],
        model.memory.tables["0"].nbytes,
    )


@torch.no_grad()
@pytest.mark.parametrize("placement", ["resident", "device", "cpu", "disk", "none"])
def test_logits_are_bit_equal_to_those_of_whole_tables(trio, graft, placement):
    model = small_model().eval()
    loaded = EngramForCausalLM.from_pretrained(graft, engram_placement="device") if placement != "resident" else model
    heights = [sum(order.heights) for _, order in named_orders(model.memory.tables)]
    answers = trio.run(logits_over, graft, placement)
    assert [sum(held) for held in zip(*(held for _, _, held, _ in answers), strict=True)] == heights
    for rank, (logits, off, held, nbytes) in enumerate(answers):
        assert torch.equal(logits, loaded(texts(rank)).logits)
        assert not torch.equal(logits, off), "control: the memory adds something"
        assert max(h - w / 3 for h, w in zip(held, heights, strict=True)) <= 1
        assert nbytes == model.memory.tables["0"].nbytes


def train(graft: str, ranks: int, folder: str | None = None):
    """A few clipped steps; norms, the weights of this rank, and where the model was saved."""
    rank = dist.get_rank() if ranks > 1 else 0
    model = EngramForCausalLM.from_pretrained(graft, engram_placement="disk" if ranks > 1 else "device").train()
    if ranks > 1:
        shard_tables(model)
    optimizer = create_optimizer(model.set_trainable("all"), lr=1e-2, table_lr_multiplier=5, eps=1e-2)
    trained = DistributedDataParallel(model) if ranks > 1 else model
    norms = []
    for step in range(STEPS):
        loss_of(trained, own_texts(step, rank, ranks, 6)).backward()
        sync_row_gradients(trained)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    if folder is not None:
        save_sharded(model, folder)
    if ranks == 1:
        return weights(model), norms
    dense = {name: p.detach().clone() for name, p in model.named_parameters() if not isinstance(p, RankPart)}
    touched = [state["rows"] for index, state in optimizer.state_dict()["state"].items() if "rows" in state]
    return dense, norms, touched


def test_training_saving_and_loading_equal_one_process(trio, graft, tmp_path):
    alone, norms = train(graft, 1)
    (first, first_norms, _), *others = trio.run(train, graft, 3, str(tmp_path / "saved"))
    for dense, own_norms, _ in others:
        assert_same(dense, first)
        assert own_norms == first_norms
    assert first_norms == pytest.approx(norms, rel=1e-5)  # torch rounds norms
    assert min(norms) > MAX_NORM, "control: gradients were clipped"
    saved = EngramForCausalLM.from_pretrained(tmp_path / "saved", engram_placement="device")
    assert_close(weights(saved), alone, CLOSE)
    start = weights(small_model())
    assert all(not torch.equal(alone[name], start[name]) for name in start if ".tables." in name), "control"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "no draft is left"
    # The same files over other ranks.
    with torch.no_grad():
        expected = [saved.eval()(texts(rank)).logits for rank in range(3)]
    for rank, (logits, *_) in enumerate(trio.run(logits_over, str(tmp_path / "saved"), "disk")):
        assert torch.equal(logits, expected[rank])


def resumed(graft: str, folder: str) -> tuple[bool, bool, list[tuple[int, int, int]]]:
    """Whether two steps equal a step, a save, a new model with the rank's optimizer state, and a step; and whether they
    do without the state. Last row, rows with a state, and rows held, for each part."""

    def fresh(path, state=None):
        model = shard_tables(EngramForCausalLM.from_pretrained(path, engram_placement="disk").train())
        optimizer = create_optimizer(model.set_trainable("memory"))
        if state is not None:
            optimizer.load_state_dict(state)
        return model, optimizer

    def step(model, optimizer, number):
        loss_of(model, texts(3 * number + dist.get_rank())).backward()
        for parameter in model.memory.layers.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    model, optimizer = fresh(graft)
    step(model, optimizer, 0)
    save_sharded(model, folder)
    state = copy.deepcopy(optimizer.state_dict())
    whole = step(model, optimizer, 1)
    held = [
        (int(state["state"][index]["rows"].max()), len(state["state"][index]["rows"]), len(part))
        for index, part in optimizer.numbered()
        if isinstance(part, RankPart)
    ]
    equal = all(map(torch.equal, step(*fresh(folder, state), 1), whole))
    without = all(map(torch.equal, step(*fresh(folder), 1), whole))
    return equal, without, held


def test_a_rank_resumes_bit_for_bit_with_a_state_of_its_own_rows(trio, graft, tmp_path):
    for equal, without, parts in trio.run(resumed, graft, str(tmp_path / "saved")):
        assert equal
        assert not without, "control: the state matters"
        assert len(parts) == 4
        for last, touched, held in parts:
            assert last < held
            assert 0 < touched < held


def refusals(graft: str) -> list[str]:
    model = shard_tables(EngramForCausalLM.from_pretrained(graft, engram_placement="disk"))
    said = []
    for attempt in (
        model.state_dict,
        lambda: model.place_memory("cpu"),
        lambda: model.place_memory("disk"),
        lambda: model.load_state_dict({}),
        lambda: shard_tables(model),
    ):
        with pytest.raises((RuntimeError, ValueError)) as error:
            attempt()
        said.append(str(error.value))
    return said


def test_what_needs_a_whole_table_is_refused(trio, graft):
    for *whole, again in trio.run(refusals, graft):
        assert all("sharded by row" in said and "save_sharded" in said for said in whole)
        assert "already" in again


def save_onto_a_file(graft: str, path: str) -> str:
    model = shard_tables(EngramForCausalLM.from_pretrained(graft, engram_placement="disk"))
    with pytest.raises((RuntimeError, OSError)) as error:
        save_sharded(model, path)
    return f"{type(error.value).__name__} {error.value}"


def test_a_save_that_fails_on_rank_0_fails_on_all(trio, graft, tmp_path):
    path = tmp_path / "file"
    path.write_text("in the way")
    first, second, third = trio.run(save_onto_a_file, graft, str(path))
    assert "Error" in first
    assert "rank 0 could not save" in second == third
    assert path.read_text() == "in the way"
    assert list(Path(tmp_path).iterdir()) == [path]


def broken_gradient(graft: str) -> tuple[int, bool]:
    """A NaN in rows that one rank holds: steps that were left out, and whether anything changed."""
    model = shard_tables(EngramForCausalLM.from_pretrained(graft, engram_placement="disk").train())
    optimizer = create_optimizer(model)
    loss_of(model, texts(dist.get_rank())).backward()
    part = model.memory.tables["0"].order2.part
    if dist.get_rank() == 1:
        part.grad.row_values[0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return optimizer.skipped_steps, all(map(torch.equal, before, model.parameters()))


def test_a_broken_gradient_on_one_rank_holds_all_of_them_back(trio, graft):
    assert trio.run(broken_gradient, graft) == [(1, True)] * 3


def bytes_sent(graft: str) -> tuple[int, int]:
    """Bytes of ids, rows and gradients that a rank sends and gets in a step, and the unique rows that it reads."""
    model = shard_tables(EngramForCausalLM.from_pretrained(graft, engram_placement="disk").train())
    counted, asked, plain, ask = [], [], dist.all_to_all_single, RankRows.ask
    dist.all_to_all_single = lambda got, given, *a, **k: (counted.append(given.nbytes), plain(got, given, *a, **k))
    RankRows.ask = lambda order, rows: (asked.append(len(rows)), ask(order, rows))[1]
    try:
        loss_of(model, texts(dist.get_rank())).backward()
    finally:
        dist.all_to_all_single, RankRows.ask = plain, ask
    return sum(counted), sum(asked)


def test_only_unique_rows_travel(trio, graft):
    answers = trio.run(bytes_sent, graft)
    rows = sum(asked for _, asked in answers)
    counts = 3 * 4 * 3 * 8  # three ranks tell each of three how many rows of four orders they want
    # Every row once: its id, its values of 4 float32, and their gradient.
    assert sum(sent for sent, _ in answers) == counts + rows * (8 + 4 * 4 + 4 * 4)
    assert rows < 3 * 4 * texts().numel() * 2, "control: some rows are read more than once"
