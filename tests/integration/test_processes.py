"""Training in several processes equals one process with all their texts, and ranks that would go apart are stopped.

Every case runs in real processes with gloo between them (`ranks.py`); the control is one process with the whole batch.
Run: pytest tests/integration/test_processes.py
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from engram_transformers import EngramForCausalLM
from engram_transformers.rows_gradient_engram import RowGradient, row_gradient
from engram_transformers.rows_table_engram import TablePart
from engram_transformers.training import create_optimizer
from engram_transformers.training.distributed import clip_grad_norm_, shard_backbone, sync_row_gradients, table_parts

from ..conftest import examples
from .process_models import assert_close, assert_same, loss_of, own_texts, small_model, texts, weights, written_out
from .ranks import Ranks


# Sums of float32 in another order: the differences are about 1e-8.
CLOSE = 1e-6
STEPS, PIECES, MAX_NORM = 3, 2, 0.05


def model_at(placement: str, graft: str):
    if placement == "device":
        return small_model()
    return EngramForCausalLM.from_pretrained(graft, engram_placement=placement).train()


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Gradients by number: dense ones, then those of tables as rows and values."""
    held = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "tables" not in name}
    for number, part in enumerate(table_parts(model)):
        held[f"rows {number}"], held[f"values {number}"] = part.grad.rows, part.grad.row_values
    return held


def train(placement: str, graft: str, ranks: int, exchange: bool = True, freeze: bool = False):
    """A few steps of two batches each, clipped; weights and norms."""
    rank = dist.get_rank() if ranks > 1 else 0
    model = model_at(placement, graft).set_trainable("all")
    if freeze:
        for part in table_parts(model):
            part.requires_grad_(False)
    optimizer = create_optimizer(model, lr=1e-2, table_lr_multiplier=5, eps=1e-2)
    trained = DistributedDataParallel(model) if ranks > 1 else model
    norms = []
    for step in range(STEPS):
        for piece in range(PIECES):
            last = piece == PIECES - 1
            with nullcontext() if last or ranks == 1 else trained.no_sync():
                (loss_of(trained, own_texts(PIECES * step + piece, rank, ranks)) / PIECES).backward()
        if exchange:
            sync_row_gradients(trained)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), norms


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_two_ranks_train_as_one_process_does_with_the_doubled_batch(pair, graft, placement):
    alone, norms = train(placement, graft, 1)
    (first, first_norms), (second, second_norms) = pair.run(train, placement, graft, 2)
    assert_same(first, second)
    assert_close(first, alone, CLOSE)
    assert first_norms == second_norms
    assert first_norms == pytest.approx(norms, rel=1e-5)  # torch rounds norms
    assert min(norms) > MAX_NORM, "control: gradients were clipped"
    before = weights(model_at(placement, graft))
    moved = {name for name in alone if not torch.equal(alone[name], before[name])}
    assert {name.split(".")[1] for name in moved} >= {"tables", "layers", "model"}, "control: all of it was trained"


def test_tables_that_are_frozen_on_purpose_need_no_exchange(pair, graft):
    alone, _ = train("device", graft, 1, freeze=True)
    (first, _), (second, _) = pair.run(train, "device", graft, 2, True, True)
    assert_same(first, second)
    assert_close(first, alone, CLOSE)
    before = weights(small_model())
    assert all(torch.equal(alone[name], before[name]) for name in before if ".tables." in name)


def step_without_exchange() -> str:
    with pytest.raises(RuntimeError) as error:
        train("device", "", 2, exchange=False)
    return str(error.value)


def test_a_step_without_an_exchange_is_refused(pair):
    for said in pair.run(step_without_exchange):
        assert "not exchanged between the 2 processes: call" in said
        assert "sync_row_gradients(model)" in said


def uneven(counts: list[int]) -> tuple[dict, dict]:
    """Gradients of a batch of another size on each rank: before DDP and the exchange, and after."""
    rank = dist.get_rank()
    own = texts(0, sum(counts)).split(counts)[rank]
    alone, model = small_model(), small_model()
    loss_of(alone, own).backward()
    trained = DistributedDataParallel(model)
    loss_of(trained, own).backward()
    sync_row_gradients(model)
    return (
        {name: written_out(p.grad) for name, p in alone.named_parameters()},
        {name: written_out(p.grad) for name, p in model.named_parameters()},
    )


def test_uneven_batches_weigh_rows_as_ddp_weighs_dense_gradients(pair):
    (first, both), (second, same) = pair.run(uneven, [3, 1])
    assert_same(both, same)
    assert_close(both, {name: (first[name] + second[name]) / 2 for name in first}, CLOSE)
    assert any(not torch.equal(first[name], second[name]) for name in first if "tables" in name), "control"


def exchange_given(given: list[list[list[int] | None]], dtypes: list[torch.dtype]) -> list:
    """An exchange of made-up gradients; rows and values of each part, or None, and whether the step would be let go."""
    rank, height = dist.get_rank(), 10
    parts = [TablePart(torch.zeros(height, 2 + n, dtype=dtype)) for n, dtype in enumerate(dtypes)]
    for part, rows in zip(parts, given[rank], strict=True):
        if rows is not None:
            part.grad = RowGradient(part, torch.tensor(rows, dtype=torch.int64), made_up(rows, part.shape[1], rank))
    sync_row_gradients(SimpleNamespace(param_groups=[{"rows": True, "params": parts}]))
    return [None if p.grad is None else (p.grad.rows, p.grad.row_values, p.grad.exchanged) for p in parts]


def made_up(rows: list[int], width: int, rank: int) -> torch.Tensor:
    return torch.tensor([[(row + 1) * (rank + 1) + column / 8 for column in range(width)] for row in rows]).view(
        len(rows), width
    )


ROWS = st.none() | st.sets(st.integers(0, 9)).map(sorted)


@examples(20)
@given(given=st.lists(st.lists(ROWS, min_size=3, max_size=3), min_size=2, max_size=2))
def test_an_exchange_gives_every_rank_the_mean_over_ranks_of_all_rows(pair, given):
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    first, second = pair.run(exchange_given, given, dtypes)
    for number in range(len(dtypes)):
        union = sorted({row for rank in range(2) for row in given[rank][number] or []})
        if not union:
            assert first[number] is second[number] is None
            continue
        dense = torch.zeros(10, 2 + number)
        for rank in range(2):
            rows = given[rank][number] or []
            dense[rows] += made_up(rows, 2 + number, rank)
        for rows, values, exchanged in (first[number], second[number]):
            assert rows.tolist() == union
            assert values.dtype == torch.float32
            assert torch.equal(values, dense[union] / 2)  # eighths: exact
            assert exchanged


def exchange_of_three() -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's own values for the same rows, whose sum depends on the order of additions; and what comes out."""
    values = 1000 ** torch.rand(50, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    part = TablePart(torch.zeros(50, 4))
    part.grad = RowGradient(part, torch.arange(50), values.clone())
    sync_row_gradients(SimpleNamespace(param_groups=[{"rows": True, "params": [part]}]))
    return values, part.grad.row_values


def test_sums_are_made_in_the_order_of_the_ranks_on_every_rank(trio):
    (a, first), (b, second), (c, third) = trio.run(exchange_of_three)
    assert torch.equal(first, (a + b + c) / 3)
    assert torch.equal(second, first)
    assert torch.equal(third, first)
    assert not torch.equal((b + c + a) / 3, first), "control: another order has other sums"


def exchange_after(change: str) -> str:
    """The error of an exchange on ranks that are not alike."""
    model, rank = small_model(), dist.get_rank()
    part = table_parts(model)[0]
    with torch.no_grad():
        if change == "frozen" and rank:
            part.requires_grad_(False)
        if change == "rows" and rank:
            part += 1
        DistributedDataParallel(model)  # its first broadcast would hide the difference if it took tables along
    loss_of(model, texts(0)).backward()
    with pytest.raises(ValueError) as error:
        sync_row_gradients(model)
    assert not any(p.grad.exchanged for p in table_parts(model) if row_gradient(p) is not None)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [("frozen", "rank 1 trains 3 parts of tables, rank 0 4"), ("rows", "rank 1 holds other rows in part 0")],
)
def test_ranks_that_are_not_alike_are_stopped_on_both_sides(pair, change, said):
    assert all(said in error for error in pair.run(exchange_after, change))


def left_to_ddp(wrap: bool) -> tuple[int, int, list[str]]:
    """Values of parameters that DDP takes, of those that are not a table's, and the names of its buffers."""
    model = small_model()
    wrapped = model
    if wrap:
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
        model.memory.requires_grad_(True)
    trained = DistributedDataParallel(wrapped)
    taken = sum(p.numel() for p in trained._module_parameters)
    loss_of(trained, texts(0)).backward()
    sync_row_gradients(wrapped)
    assert all(part.grad.exchanged for part in table_parts(model))
    return (
        taken,
        sum(p.numel() for name, p in wrapped.named_parameters() if "memory.tables" not in name),
        [name for name, _ in wrapped.named_buffers() if name not in trained.parameters_to_ignore],
    )


@pytest.mark.parametrize("wrap", [False, True])
def test_ddp_takes_no_table_and_no_hash_constant(pair, wrap):
    for taken, without_tables, buffers in pair.run(left_to_ddp, wrap):
        assert taken == without_tables
        assert buffers
        assert not any("memory" in name for name in buffers)


def train_sharded(ranks: int):
    """As `train`, with the backbone sharded by FSDP; whole weights and norms."""
    rank = dist.get_rank() if ranks > 1 else 0
    model = small_model().set_trainable("all")
    if ranks > 1:
        shard_backbone(model)
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    optimizer = create_optimizer(model, lr=1e-2, table_lr_multiplier=5, eps=1e-2)
    norms = []
    for step in range(STEPS):
        loss_of(model, own_texts(step, rank, ranks)).backward()
        sync_row_gradients(model)
        norms.append(float(clip_grad_norm_(model, MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    state = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return state, norms, sharded


def test_fully_sharded_ranks_with_whole_tables_train_as_one_process(pair):
    alone, norms, none = train_sharded(1)
    (first, first_norms, sharded), (second, second_norms, _) = pair.run(train_sharded, 2)
    assert none == []
    assert {name for name in alone if "tables" in name} == set(alone) - set(sharded)
    assert_same(first, second)
    assert_close(first, alone, CLOSE)
    assert first_norms == second_norms
    assert first_norms == pytest.approx(norms, rel=1e-4)  # torch's norm of 65,664 values rounds by 4e-6
    assert min(norms) > MAX_NORM, "control: gradients were clipped"


def train_apart() -> tuple[dict, dict]:
    """Each rank trains on texts of its own; its weights, and those that it gets without any exchange."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank, results = dist.get_rank(), []
    for exchange in (True, False):
        model = small_model()
        optimizer = create_optimizer(model)
        loss_of(model, texts(rank)).backward()
        if exchange:
            sync_row_gradients(optimizer, group=groups[rank])
        else:
            for part in table_parts(model):
                part.grad.exchanged = True
        optimizer.step()
        results.append(weights(model))
    return tuple(results)


def test_processes_that_train_apart_exchange_with_themselves(pair):
    (first, alone), (second, also_alone) = pair.run(train_apart)
    assert_same(first, alone)
    assert_same(second, also_alone)
    assert any(not torch.equal(first[name], second[name]) for name in first), "control: they trained on other texts"


def shard_tables_as_well() -> str:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(small_model())
    with pytest.raises(TypeError) as error:
        sync_row_gradients(model)
    return str(error.value)


def test_tables_that_fsdp_has_cut_up_are_refused(pair):
    assert all("shard_backbone" in said and "ignored_params" in said for said in pair.run(shard_tables_as_well))


def fail_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_ranks_end_with_the_first_that_fails_and_new_ones_take_over():
    with Ranks(2) as ranks:
        assert ranks.run(dist.get_rank) == [0, 1]
        before = ranks.processes[:]
        with pytest.raises(RuntimeError, match="(?s)rank 1: .*on purpose"):
            ranks.run(fail_on_one_rank)
        assert not any(process.is_alive() for process in before)
        assert ranks.run(dist.get_rank) == [0, 1]
        after = ranks.processes[:]
    assert not any(process.is_alive() for process in after)


def test_one_process_without_a_group_needs_nothing():
    model = small_model()
    loss_of(model, texts(0)).backward()
    before = gradients_of(model)
    sync_row_gradients(model)
    assert_same(gradients_of(model), before)
    assert all(part.grad.exchanged for part in table_parts(model))


@pytest.mark.parametrize("max_norm", [0.01, 1e9])
def test_clip_gradients_is_torchs_own_where_nothing_is_sharded(max_norm):
    models = [small_model() for _ in range(2)]
    for model in models:
        loss_of(model, texts(0)).backward()
    theirs = torch.nn.utils.clip_grad_norm_(models[0].parameters(), max_norm)
    ours = clip_grad_norm_(models[1], max_norm)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert_close(gradients_of(models[1]), gradients_of(models[0]), CLOSE)
