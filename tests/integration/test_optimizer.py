"""The one optimizer of a model with memory: groups, rates, schedulers, saving, resuming, and what it refuses.

Proves for each rule, type and place of tables that a resumed run is the uninterrupted one bit for bit; that gradients
which are not finite change nothing, and are counted and said. States that do not fit are in test_optimizer_state.py,
the rules themselves in tests/unit/test_row_optimizers.py.

Run: pytest tests/integration/test_optimizer.py
"""

import copy
import logging
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import get_scheduler

from engram_transformers.rows_gradient_engram import RowGradient
from engram_transformers.training import create_optimizer
from engram_transformers.training.optimizer import EngramOptimizer, group_of

from .placed import loaded
from .stepping import backward, equal, rows_of, run


PLACES = ["device", "cpu", "disk"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where checkpoints of this module are kept, by the type of their tables."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def placed(kept, memory):
    """Factory of the same filled model, its tables in a place and of a type."""

    def make(place="device", dtype="float32"):
        if not (kept / dtype).exists():
            memory(engram_table_dtype=dtype).save_pretrained(kept / dtype)
        model = loaded(kept / dtype, place)
        model.set_trainable("memory")
        return model

    return make


def test_tables_have_their_own_rate_and_no_decay(tiny_engram):
    model = tiny_engram()
    model.set_trainable("all")
    groups = {g["name"]: g for g in create_optimizer(model, 1e-3, table_lr_multiplier=7, weight_decay=0.1).param_groups}
    assert groups["tables"]["lr"] == pytest.approx(7e-3)
    assert groups["projections"]["lr"] == 1e-3
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {"tables": 0, "vectors": 0, "projections": 0.1, "backbone": 0.1}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "group"),
    [
        ("memory.tables.1.order2.0", (9, 4), "tables"),
        ("base_model.model.memory.tables.1.order2.0", (9, 4), "tables"),
        ("memory.layers.1.key_value.weight", (8, 8), "projections"),
        ("base_model.model.memory.layers.1.key_value.base_layer.weight", (8, 8), "projections"),
        ("base_model.model.memory.layers.1.key_value.modules_to_save.default.weight", (8, 8), "projections"),
        ("base_model.model.memory.layers.1.key_value.lora_A.default.weight", (2, 8), "backbone"),
        ("memory.layers.1.key_value.bias", (8,), "vectors"),
        ("memory.layers.1.conv", (4, 8), "vectors"),
        ("memory.layers.1.key_norm", (1, 8), "vectors"),
        ("backbone.model.layers.0.mlp.up_proj.weight", (8, 8), "backbone"),
        ("backbone.model.layers.0.mlp.up_proj.lora_B.default.weight", (8, 2), "backbone"),
        ("backbone.model.norm.weight", (8,), "vectors"),
    ],
)
def test_a_parameters_name_decides_its_group(name, shape, group):
    assert group_of(name, torch.zeros(shape)) == group


def test_where_nothing_was_chosen_the_memory_alone_learns_and_it_says_so(tiny_engram, caplog):
    model = tiny_engram()
    assert all(p.requires_grad for p in model.parameters())
    with caplog.at_level(logging.WARNING, "engram_transformers"):
        optimizer = create_optimizer(model)
    assert {group["name"] for group in optimizer.param_groups} == {"tables", "projections", "vectors"}
    assert "memory alone" in caplog.text and "set_trainable" in caplog.text
    assert model.config.engram_trainable == "memory"
    caplog.clear()
    model.set_trainable("all")
    with caplog.at_level(logging.WARNING, "engram_transformers"):
        chosen = create_optimizer(model)
    assert "backbone" in {group["name"] for group in chosen.param_groups} and not caplog.text


def test_what_was_frozen_by_hand_stays_chosen(tiny_engram):
    model = tiny_engram()
    model.memory.layers.requires_grad_(False)
    assert {g["name"] for g in create_optimizer(model).param_groups} == {"tables", "backbone", "vectors"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        create_optimizer(model)


@pytest.mark.parametrize("place", PLACES)
def test_tables_are_clipped_with_the_model_wherever_they_are(place, placed, batches):
    model = placed(place)
    backward(model, batches[0])
    parts = list(model.memory.named_parts().values())
    before = [part.grad.row_values.clone() for part in parts]
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
    for part, own in zip(parts, before, strict=True):
        torch.testing.assert_close(part.grad.row_values, own * (1e-4 / total), rtol=1e-4, atol=0)


def test_schedulers_move_all_rates_alike(memory, batches):
    model = memory()
    optimizer = create_optimizer(model, lr=1e-2)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=8)
    seen = []
    for batch in batches:
        run(model, optimizer, [batch])
        scheduler.step()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["tables"] == pytest.approx(50 * rates["projections"])
        seen.append(rates["projections"])
    assert seen[0] < seen[1] > seen[3] > 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("rule", "kind", "dtype"),
    [
        ("adam", "float32", "float32"),
        ("adam", "bfloat16", "bfloat16"),
        ("adagrad", "float32", "float16"),
        ("sinkhorn", "bfloat16", "float32"),
        ("sinkhorn", "float32", "bfloat16"),
    ],
)
def test_a_run_that_is_resumed_is_the_uninterrupted_one_bit_for_bit(
    rule, kind, dtype, place, placed, batches, tmp_path
):
    settings = {"lr": 1e-3, "table_optimizer": rule, "table_state_dtype": kind, "l2_sp": 0.1, "seed": 5}
    whole, halved = placed(place, dtype), placed(place, dtype)
    start = rows_of(whole)
    run(whole, create_optimizer(whole, **settings), batches)
    first = create_optimizer(halved, **settings)
    run(halved, first, batches[:2])
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = create_optimizer(halved, **{**settings, "seed": 6})
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert equal(second.state_dict(), first.state_dict())
    run(halved, second, batches[2:])
    assert equal(rows_of(halved), rows_of(whole))
    assert not equal(rows_of(whole), start), "control: something was trained"


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sinkhorn"])
def test_a_table_learns_the_same_wherever_it_is(rule, placed, batches):
    results = []
    for place in PLACES:
        model = placed(place)
        run(model, create_optimizer(model, lr=1e-3, table_optimizer=rule), batches)
        results.append(rows_of(model))
    for other in results[1:]:
        for name, rows in results[0].items():
            torch.testing.assert_close(other[name], rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sinkhorn"])
def test_each_rule_teaches_a_memory(rule, tiny_engram, batches):
    model = tiny_engram()
    model.set_trainable("memory")
    with torch.no_grad():
        before = float(model(**batches[0]).loss)
    run(model, create_optimizer(model, lr=1e-2, table_optimizer=rule), batches[:1] * 12)
    with torch.no_grad():
        assert float(model(**batches[0]).loss) < before - 0.1
        with model.disable_memory():
            assert float(model(**batches[0]).loss) == pytest.approx(before, abs=1e-5), "control: the backbone stays"


def test_copies_and_pickles_go_on_as_the_optimizer_does(memory, batches):
    model = memory(engram_table_dtype="bfloat16")
    optimizer = create_optimizer(model)
    run(model, optimizer, batches[:1])
    twins = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer), optimizer]
    parts = [twin.row_groups()[0]["params"][0] for twin in twins]
    for twin, part in zip(twins, parts, strict=True):
        part.grad = RowGradient(part, torch.tensor([1, 5]), torch.ones(2, 4))
        twin.step()
    assert len({id(part) for part in parts}) == 3
    assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[2])
    assert equal(twins[0].state_dict(), twins[2].state_dict()) and equal(twins[1].state_dict(), twins[2].state_dict())
    assert twins[0].names[parts[0]] == twins[2].names[parts[2]]


def test_accelerate_takes_it(memory, batches):
    models = [memory(), memory()]
    run(models[0], create_optimizer(models[0], lr=1e-3), batches)
    AcceleratorState._reset_state(reset_partial_state=True)  # one for the process, with an earlier Trainer's precision
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(models[1], create_optimizer(models[1], lr=1e-3))
    for batch in batches:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
        assert not optimizer.step_was_skipped
    assert equal(rows_of(models[1]), rows_of(models[0]))


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["tables", "projections"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(where, value, place, placed, batches, caplog):
    model = placed(place)
    optimizer = create_optimizer(model, l2_sp=0.1)
    run(model, optimizer, batches[:1])
    rows, state = rows_of(model), copy.deepcopy(optimizer.state_dict())
    for count in (1, 2):
        backward(model, batches[1])
        broken = next(group for group in optimizer.param_groups if group["name"] == where)["params"][0]
        (broken.grad.row_values if where == "tables" else broken.grad)[0, 0] = value
        with caplog.at_level(logging.WARNING, "engram_transformers"):
            optimizer.step()
            model.zero_grad()  # says so if a row gradient was not used
        assert optimizer.skipped_steps == count
        assert f"{optimizer.names[broken]} (group '{where}')" in caplog.text
        assert f"({count} skipped so far)" in caplog.text
    assert "dropped without being applied" not in caplog.text
    assert equal(rows_of(model), rows)
    state["engram"]["skipped_steps"] = 2
    assert equal(optimizer.state_dict(), state)
    run(model, optimizer, batches[1:2])
    assert optimizer.skipped_steps == 2 and not equal(rows_of(model), rows), "control: the next step is taken"
    twin = create_optimizer(model, l2_sp=0.1)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.skipped_steps == 2


def test_a_scaler_skips_by_itself_and_scales_nothing_away(memory, batches):
    plain, scaled = memory(), memory()
    optimizer = create_optimizer(scaled, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    before = rows_of(scaled)
    scaler.scale(scaled(**batches[0]).loss).backward()
    optimizer.row_groups()[0]["params"][0].grad.row_values[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert equal(rows_of(scaled), before) and optimizer.skipped_steps == 0
    assert scaler.get_scale() == 2.0**9
    run(plain, create_optimizer(plain, lr=1e-3), batches)
    for batch in batches:
        scaler.scale(scaled(**batch).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for name, rows in rows_of(plain).items():
        torch.testing.assert_close(rows_of(scaled)[name], rows, rtol=0, atol=1e-5)


def test_hooks_run_once_for_a_step_and_closures_are_called(memory, batches):
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # which puts a wrapper around AdamW.step
    model = memory()
    optimizer, calls = create_optimizer(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    before = rows_of(model)

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(**batches[0]).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == ["before", "closure", "after"]
    assert not equal(rows_of(model), before)


def test_dense_groups_can_be_added(memory, batches):
    model = memory()
    optimizer = create_optimizer(model)
    head = torch.nn.Linear(4, 1)
    optimizer.add_param_group({"params": head.parameters(), "name": "head", "lr": 0.5})
    before = head.weight.detach().clone()
    head(torch.ones(1, 4)).sum().backward()
    run(model, optimizer, batches[:1])
    torch.testing.assert_close(head.weight, before - 0.5, rtol=0, atol=1e-5)  # Adam's first step is the rate
    again = create_optimizer(model)
    again.add_param_group({"params": head.parameters(), "name": "head"})
    again.load_state_dict(optimizer.state_dict())
    assert equal(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("to", ["device", "cpu", "disk"])
@pytest.mark.parametrize("place", PLACES)
def test_an_optimizer_does_not_outlive_the_tables_that_it_was_made_for(place, to, placed, batches):
    model = placed(place)
    optimizer = create_optimizer(model)
    held = {id(part) for part in model.memory.named_parts().values()}
    model.place_memory(to)
    backward(model, batches[0])
    before = rows_of(model)
    if held == {id(part) for part in model.memory.named_parts().values()}:
        optimizer.step()  # the same parts, elsewhere
        assert not equal(rows_of(model), before)
        return
    assert place != to
    with pytest.raises(RuntimeError, match=r"tables were moved after this optimizer was made .*place_memory"):
        optimizer.step()
    assert equal(rows_of(model), before)
    create_optimizer(model).step()  # control
    assert not equal(rows_of(model), before)


def test_settings_that_are_none_are_refused(memory):
    model = memory()
    with pytest.raises(ValueError, match="table_optimizer='lion' must be one of 'adam', 'adagrad', 'sinkhorn'"):
        create_optimizer(model, table_optimizer="lion")
    with pytest.raises(ValueError, match="table_state_dtype='float16' must be one of 'float32', 'bfloat16'"):
        create_optimizer(model, table_state_dtype=torch.float16)
    for l2_sp in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"l2_sp=.* must be 0 \(off\) or positive"):
            create_optimizer(model, l2_sp=l2_sp)
    for multiplier in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="table_lr_multiplier=.* must be 0 or positive"):
            create_optimizer(model, table_lr_multiplier=multiplier)
    for word in ("maximize", "amsgrad"):
        with pytest.raises(ValueError, match="neither maximize nor amsgrad"):
            EngramOptimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], word: True}])


def test_gradients_of_the_wrong_kind_are_refused_before_anything_changes(memory, batches):
    model = memory()
    parts = list(model.memory.tables.parameters())
    before = rows_of(model)
    for params in ([{"params": parts}], [{"params": parts[0]}, {"params": model.memory.layers.parameters()}]):
        optimizer = EngramOptimizer(params)
        backward(model, batches[0])
        with pytest.raises(TypeError, match="is rows alone: it belongs into a parameter group with rows=True"):
            optimizer.step()
        model.zero_grad()
    optimizer = create_optimizer(model)
    parts[0].square().sum().backward()
    with pytest.raises(TypeError, match=r"tables.* is dense: it belongs .*no rows=True.*l2_sp="):
        optimizer.step()
    assert equal(rows_of(model), before)
