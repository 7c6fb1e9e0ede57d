"""A memory in host memory learns what it learns among the parameters, bit for bit: accumulated, clipped, checkpointed,
resumed, frozen. It stays mapped from its file until an optimizer is made; a large one, until its rows are written.

Run: pytest tests/integration/test_placement_training.py
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from engram_transformers import EngramForCausalLM, EngramTrainer
from engram_transformers.compat_engram import CHECKPOINTS_RUN_HOOKS
from engram_transformers.conversion import graft
from engram_transformers.training import create_optimizer


needs_523 = pytest.mark.skipif(CHECKPOINTS_RUN_HOOKS, reason="checkpointing is refused before transformers 5.23")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 4104, (3, 11), generator=torch.Generator().manual_seed(3))


def load(folder, place: str = "device") -> EngramForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, engram_placement=place)


def rows_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "memory.tables." in name}


@pytest.fixture(scope="module")
def dataset():
    texts = torch.randint(3, 300, (24, 20), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": text, "labels": text} for text in texts]


def train(model, dataset, folder, resume=None, **changes) -> dict[str, torch.Tensor]:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    EngramTrainer(model, TrainingArguments(str(folder), **settings), train_dataset=dataset).train(resume)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.core
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=needs_523)], ids=["plain", "checkpointing"])
def test_training_in_host_memory_is_training_on_the_device(checkpointing, saved, dataset, tmp_path):
    """Accumulated, clipped, saved half-way and resumed."""
    settings = {"gradient_checkpointing": checkpointing}
    expected = train(load(saved), dataset, tmp_path / "device", **settings)
    trained = train(load(saved, "cpu"), dataset, tmp_path / "cpu", save_strategy="steps", save_steps=2, **settings)
    for name, before in load(saved).state_dict().items():
        assert torch.equal(trained[name], expected[name]), name
        assert torch.equal(expected[name], before) == name.startswith(("backbone.", "memory.hashing.")), name
    resumed = load(saved, "cpu")
    halfway = str(tmp_path / "cpu" / "checkpoint-2")
    again = train(resumed, dataset, tmp_path / "again", resume=halfway, **settings)
    assert resumed.memory.placement == "cpu"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())


@pytest.mark.core
def test_a_memory_that_was_not_loaded_is_not_trained(saved, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"'none'.*place_memory\('disk'\)"):
        train(load(saved, "none"), dataset, tmp_path)


@pytest.mark.core
@pytest.mark.parametrize("frozen", ["model", "memory"])
@pytest.mark.parametrize("place", ["device", "cpu"])
def test_frozen_tables_stay_frozen_wherever_they_go(place, frozen, saved, ids):
    model = load(saved, place)
    (model if frozen == "model" else model.memory).requires_grad_(False)
    before = rows_of(load(saved))
    for move in ("cpu", "disk", "cpu", "device", place):
        model.place_memory(move)
        held = {**dict(model.named_parameters()), **model.memory.named_parts()}
        assert not any(held[name].requires_grad for name in before if name in held), move
    model.memory.layers.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = create_optimizer(model)
    assert {group["name"] for group in optimizer.param_groups}.isdisjoint({"tables"})
    optimizer.step()
    assert all(torch.equal(part, before[name]) for name, part in rows_of(model).items())
    model.memory.requires_grad_(True)  # control: they can be thawed
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = create_optimizer(model)
    optimizer.step()
    assert not any(torch.equal(part, before[name]) for name, part in rows_of(model).items())


@pytest.mark.core
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_an_optimizer_that_cannot_write_rows_is_an_error_and_not_silence(place, saved, dataset, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), **settings)

    def plain(model, **more):
        Trainer(model, args, train_dataset=dataset, **more).train()
        return rows_of(model)

    before = rows_of(load(saved))
    with pytest.raises(TypeError, match=r"rows alone.* use EngramTrainer, or .*create_optimizer"):
        plain(load(saved, place))
    model = load(saved, place)
    trained = plain(model, optimizers=(create_optimizer(model), None))
    assert not any(torch.equal(part, before[name]) for name, part in trained.items())
    model = load(saved, place)
    model.memory.tables.requires_grad_(False)  # as the message says
    assert all(torch.equal(part, before[name]) for name, part in plain(model).items())
    model = load(saved, place).eval()  # who looks at gradients without training is left alone
    model(input_ids=dataset[0]["input_ids"][None], labels=dataset[0]["labels"][None]).loss.backward()
    assert all(part.grad is not None for part in model.memory.named_parts().values())
    model.zero_grad()
    assert all(part.grad is None for part in model.memory.named_parts().values())


@pytest.mark.core
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_plain_loop_with_an_optimizer_of_torch_ends_at_its_first_step(place, kind, saved, ids):
    model = load(saved, place).set_trainable("memory")
    optimizer, before = kind(model.parameters(), lr=0.1), rows_of(model)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(TypeError, match=r"rows alone.* use EngramTrainer, or .*create_optimizer"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(part.grad is None for part in model.memory.named_parts().values())
    assert all(torch.equal(part, before[name]) for name, part in rows_of(model).items())
    model.memory.tables.requires_grad_(False)  # as the message says
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.core
@pytest.mark.parametrize("found", [1.0, float("inf")], ids=["finite", "inf"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_scaler_on_a_device_reaches_rows_on_the_host(place, found, saved, ids, device):
    """It copies its numbers to the host without waiting, because torch has no gradients there beside a device's."""

    def unscaled(copies) -> list[torch.Tensor]:
        model = load(saved, place).to("counting").set_trainable("memory")
        optimizer = create_optimizer(model)
        scaler = torch.amp.GradScaler("counting", init_scale=1024.0)
        ids_there = ids.to("counting")
        scaler.scale(model(input_ids=ids_there, labels=ids_there).loss).backward()
        parts = list(model.memory.named_parts().values())
        parts[0].grad.row_values[0, 0] *= found
        before = {name: part.clone() for name, part in rows_of(model).items()}
        with copies():
            scaler.unscale_(optimizer)
            values = [part.grad.row_values.clone() for part in parts]
            scaler.step(optimizer)
        learned = not all(torch.equal(part, before[name]) for name, part in rows_of(model).items())
        assert learned == (found == 1.0), "a step with inf is left out"
        return values

    for late, right in zip(unscaled(device.late_copies), unscaled(contextlib.nullcontext), strict=True):
        assert torch.equal(late, right) or found != 1.0


@pytest.mark.core
def test_gradients_are_measured_in_the_same_order_wherever_tables_are(saved):
    """Norms of many gradients are added up in their order: another one clips by another last bit."""
    names = {place: [name for name, _ in load(saved, place).named_parameters()] for place in ("device", "cpu", "disk")}
    assert names["device"] == names["cpu"] == names["disk"]


@pytest.mark.core
@pytest.mark.parametrize("parts", [1, 3])
def test_an_optimizer_reads_no_row_from_a_file_that_its_pass_has_read(parts, tiny_engram, tmp_path, monkeypatch):
    tiny_engram(trained=True, engram_table_parts=parts).save_pretrained(tmp_path)
    texts = torch.randint(3, 4104, (3, 4, 70), generator=torch.Generator().manual_seed(4))  # 560 reads of each order
    reads, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(1) or preadv(*args))

    def steps(place: str, forget: bool = False) -> tuple[dict, int]:
        model = load(tmp_path, place).set_trainable("tables")
        optimizer, counted = create_optimizer(model, lr=1e-2, l2_sp=0.1), 0
        for ids in texts:
            for piece in ids.split(2):  # accumulated: the first piece's rows are seen no more
                model(input_ids=piece, labels=piece).loss.backward()
            for part in model.memory.named_parts().values() if forget else ():
                part.store.seen = None
            reads.clear()
            optimizer.step()
            counted += len(reads)
            optimizer.zero_grad()
        return rows_of(model), counted

    expected, _ = steps("device")
    rows, some = steps("disk")
    control, all_of_them = steps("disk", forget=True)
    for name, part in expected.items():
        assert torch.equal(rows[name], part) and torch.equal(control[name], part), name
    texts = texts[:, :2]  # one pass a step
    assert 0 == steps("disk")[1] < some <= all_of_them
    assert steps("disk", forget=True)[1] > 0


TABLE_BYTES = 64 << 20
# Each case in a fork: imports are paid for once.
CHILD = """
import hashlib, itertools, json, os, sys, torch, engram_transformers
from transformers import AutoModelForCausalLM
from engram_transformers import rows_placement_engram
from engram_transformers.training import create_optimizer

torch.set_num_threads(1)
for place, at_once in itertools.product(("device", "cpu"), (True, False)):
    child = os.fork()
    if not child:
        break
    assert os.waitpid(child, 0)[1] == 0
if child:
    sys.exit()
if not at_once:
    rows_placement_engram.COPIED_AT_ONCE = 0
graft = sys.argv[1]

def private():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10

ids = torch.arange(3, 35)[None]
donor = AutoModelForCausalLM.from_pretrained(graft, engram_placement="none")
donor(input_ids=ids, labels=ids).loss.backward()  # what the first passes of a process cost
seen = {"before": private()}
model = AutoModelForCausalLM.from_pretrained(graft, engram_placement=place)
def parts():
    return [rows for table in model.memory.tables.values() for order in table.orders() for rows in order.tensors()]

seen["loaded"] = private()
model(input_ids=ids, labels=ids).loss.backward()
seen["run"] = private()
optimizer = create_optimizer(model)
seen["optimizer"] = private()
optimizer.step()
seen["stepped"] = private()
touched = sum(int(part.detach().any(1).sum()) for part in parts())
copied = [part.detach().clone() for part in parts()]
seen["copied"] = private()
digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in copied)).hexdigest()
found = {"seen": seen, "touched": touched, "bytes": sum(part.nbytes for part in parts()), "digest": digest}
print(json.dumps([place, at_once, found]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is read from /proc")
def test_a_table_is_mapped_until_an_optimizer_is_made_and_a_large_one_until_its_rows_are_written(
    tiny_donor, tiny_tokenizer, tmp_path
):
    tiny_donor().save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    sizes = {"engram_n_heads": 2, "engram_head_dim": 16, "engram_vocab_size": TABLE_BYTES // (8 * 16 * 4)}
    graft(tmp_path / "donor", tmp_path / "graft", [1, 2], **sizes)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "graft")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    found = {(place, at_once): of for place, at_once, of in lines}
    assert len(found) == 4
    assert len({of["digest"] for of in found.values()}) == 1
    megabyte = 1 << 20
    for (_, at_once), of in found.items():
        seen, nbytes, touched = of["seen"], of["bytes"], of["touched"]
        assert nbytes >= 0.9 * TABLE_BYTES
        assert 100 < touched <= 32 * 2 * 2 * 2
        assert seen["loaded"] - seen["before"] < 20 * megabyte
        assert seen["run"] - seen["before"] < 20 * megabyte, "nothing of the table was copied"
        made = seen["optimizer"] - seen["run"]
        assert made > 0.9 * nbytes if at_once else made < 20 * megabyte
        # Moments, and as much again; a page for every row of a large table; 16 MB for whatever else a step makes.
        pages = 0 if at_once else touched * 4096
        assert seen["stepped"] - seen["optimizer"] < pages + touched * 16 * 4 * 8 + 16 * megabyte
        assert seen["copied"] - seen["stepped"] > 0.9 * nbytes, "control: a copy would be seen"
