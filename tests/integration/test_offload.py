"""What travels to a device and back when tables are elsewhere, byte by byte: the rows that are read, small numbers
that say where each goes, and nothing of the table, whatever moves, dispatches, wraps or broadcasts the model.

Bytes are counted on the device of tests/counting_device and must be equal; logits on it differ from the CPU's by at
most 1e-5 (float32). Controls are tables among the parameters, which travel whole.
Run: pytest tests/integration/test_offload.py
"""

import contextlib
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import remove_hook_from_module
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations.accelerate import _get_device_map

from engram_transformers import EngramConfig, EngramForCausalLM, EngramTrainer

from ..conftest import examples
from ..counting_device import counted, crossing
from .placed import TOLERANCE, loaded, logits, repeating_texts, same


pytestmark = pytest.mark.core

ONE = {"": "counting:0"}
BY_PARTS = {"backbone": "counting:0", "memory.hashing": "counting:0", "memory.layers": "counting:0"}
TABLES_ON_HOST = {**BY_PARTS, "memory.tables": "cpu"}
TABLES_ON_DISK = {**BY_PARTS, "memory.tables": "disk"}
FACTBOOK = Path(__file__).parents[2] / "examples" / "data" / "factbook.jsonl.gz"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return repeating_texts()


def size(named, tables: bool) -> int:
    """Bytes of a model's tables, or of everything else."""
    return sum(tensor.nbytes for name, tensor in named if ("memory.tables." in name) == tables)


def wide(count: int) -> int:
    """Bytes of a number below `count`."""
    return 1 if count <= 1 << 8 else 2 if count <= 1 << 15 else 4


def travel(control, ids, start: int = 0) -> tuple[int, int]:
    """Bytes to the device and back when positions from `start` on are read.

    Up go unique rows and a number for each read. Where those numbers are more than 3 % of the rows, the different
    lists of them and one number for each position may go instead. Down go the rows' own numbers: the device hashes.
    """
    hashing = control.memory.hashing
    rows = hashing(ids)[1][:, :, start:]  # (layers, batch, length, orders, heads)
    up = 0
    for layer, table in enumerate(control.memory.tables.values()):
        for number, order in enumerate(table.orders()):
            read = rows[layer][:, :, number].flatten(0, 1).tolist()  # (positions, heads)
            unique, lists = len({row for heads in read for row in heads}), len(set(map(tuple, read)))
            row_bytes = unique * order.width * order.dtype.itemsize
            each, heads = wide(unique), len(read[0])
            numbers = len(read) * heads * each
            if numbers > 0.03 * row_bytes:
                numbers = min(numbers, lists * heads * each + len(read) * wide(lists))
            up += row_bytes + numbers
    return up, rows.numel() * 8


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_move_carries_everything_but_the_table(place, device, saved, control, ids, tmp_path):
    rest, table = size(control.state_dict().items(), False), size(control.state_dict().items(), True)
    rest += sum(b.nbytes for n, b in control.named_buffers() if n not in control.state_dict())
    expected = rest + (table if place == "device" else 0)
    model, trained = loaded(saved, place), loaded(saved, "device" if place == "disk" else place)
    assert crossing(lambda: model.to("counting")) == (expected, 0)
    trainer = EngramTrainer(trained, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    wanted = rest + (0 if place == "cpu" else table)
    assert crossing(lambda: trainer._move_model_to_device(trained, torch.device("counting"))) == (wanted, 0)
    for way in (lambda: model.cpu(), lambda: model.to("counting"), lambda: model.float()):
        way()
    assert same(logits(model, ids.to("counting")), logits(control, ids))


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("length", [20, 90], ids=["few", "by a thread"])  # 256 reads of an order are few
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_forward_pass_carries_the_rows_that_it_reads(place, length, late, device, saved, control):
    texts = torch.randint(3, 4104, (2, length), generator=torch.Generator().manual_seed(length))
    model, there = loaded(saved, place).to("counting"), texts.to("counting")
    expected = (0, 0) if place == "device" else travel(control, texts)
    with device.late_copies() if late else contextlib.nullcontext():
        with counted() as block, torch.no_grad():
            result = model(input_ids=there).logits
        assert (block.h2d, block.d2h) == expected
        assert same(result.cpu(), logits(control, texts))
    with model.disable_memory():
        assert crossing(lambda: model(input_ids=there)) == (0, 0)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_generation_carries_each_token_s_rows_once(place, late, device, saved, control, ids):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    plain, model, there = loaded(saved).to("counting"), loaded(saved, place).to("counting"), ids.to("counting")
    with counted() as without:
        plain.generate(there, **settings)
    with device.late_copies() if late else contextlib.nullcontext(), counted() as block:
        found = model.generate(there, **settings)
    found = found.cpu()
    assert torch.equal(found, control.generate(ids, **settings))
    steps = [travel(control, ids)] + [travel(control, found[:, : end + 1], start=end) for end in range(20, 24)]
    assert block.h2d - without.h2d == sum(up for up, _ in steps)
    assert block.d2h - without.d2h == sum(down for _, down in steps)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_rows_go_from_pinned_buffers_of_their_size_on_a_stream_beside_the_layers(place, device, saved, control, ids):
    model, there = loaded(saved, place).to("counting"), ids.to("counting")
    model(input_ids=there)
    with counted() as block, torch.no_grad():
        model(input_ids=there)
    copies = [step for step in block.steps if step.what == "h2d"]
    # What is there at once goes together; an order of a layer that waits for a disk by itself.
    assert len(copies) == 1 if place == "cpu" else len(copies) <= 2 * 2
    assert sum(step.bytes for step in copies) == travel(control, ids)[0] == block.h2d
    assert all(step.pinned and step.non_blocking and step.stream != 0 for step in copies)
    assert len({step.stream for step in copies}) == 1
    assert block.pinned == 0
    assert max(step.bytes for step in copies) <= block.pinned_peak <= block.h2d
    products = [number for number, step in enumerate(block.steps) if step.name in ("aten::mm", "aten::addmm")]
    assert products
    assert max(block.steps.index(step) for step in copies) < products[0], "fetched while no layer had begun"
    last = block.steps[products[-1]]
    assert all(block.comes_after(last, step) for step in copies)


def test_without_pinned_memory_rows_travel_all_the_same(device, saved, control, ids):
    model, there = loaded(saved, "cpu").to("counting"), ids.to("counting")
    with device.pinning_fails():
        assert crossing(lambda: model(input_ids=there)) == travel(control, ids)
        assert same(logits(model, there), logits(control, ids))


@given(texts=st.lists(st.lists(st.integers(3, 9), min_size=6, max_size=6), min_size=1, max_size=12))
@examples(10)
def test_a_row_travels_once_however_often_it_is_read(texts, device, saved, control):
    model = loaded(saved, "cpu").to("counting")
    texts = torch.tensor(texts)
    there = texts.to("counting")
    assert crossing(lambda: model(input_ids=there)) == travel(control, texts)
    assert same(logits(model, there), logits(control, texts))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_at_the_paper_s_row_shape_bytes_are_within_a_twentieth_of_the_rows(dtype, device, tiny_engram, tiny_tokenizer):
    with gzip.open(FACTBOOK, "rt", encoding="utf-8") as lines:
        text = " ".join(json.loads(line)["text"] for _, line in zip(range(120), lines, strict=False))
    tokens = torch.tensor(tiny_tokenizer(text)["input_ids"][: 8 * 128]).view(8, 128)
    sizes = {"engram_vocab_size": 20_000, "engram_n_heads": 8, "engram_head_dim": 80, "engram_table_dtype": dtype}
    model = tiny_engram(layers=(1,), **sizes)
    rows = model.memory.hashing(tokens)[1][0]
    used = sum(rows[:, :, order].unique().numel() for order in (0, 1)) * 80 * getattr(torch, dtype).itemsize
    expected = travel(model, tokens)
    model.place_memory("cpu").to("counting")
    there = tokens.to("counting")
    up, down = crossing(lambda: model(input_ids=there))
    assert (up, down) == expected
    assert used < up <= 1.05 * used
    assert used < 0.9 * rows.numel() * 80 * getattr(torch, dtype).itemsize, "control: rows do repeat"


def test_a_training_step_carries_rows_up_and_their_gradients_down(device, saved, control, ids):
    models, crossed = {}, {}
    for place in ("device", "cpu"):
        model, there = loaded(saved, place).train().to("counting"), ids.to("counting")
        crossed[place] = crossing(lambda m=model, x=there: m(input_ids=x, labels=x).loss.backward())
        models[place] = model
    parts = models["cpu"].memory.named_parts()
    gradients = sum(part.grad.rows.nbytes + part.grad.row_values.nbytes for part in parts.values())
    rows_up, numbers_down = travel(control, ids)
    assert crossed["cpu"] == (rows_up, numbers_down + gradients)
    assert crossed["device"] == (0, 0), "control: where the table learns on the device, nothing crosses"
    for name, parameter in models["device"].named_parameters():
        if name in parts:
            assert torch.equal(parts[name].grad.rows, parameter.grad.rows.cpu())
            assert same(parts[name].grad.row_values, parameter.grad.row_values.cpu())


# How tables leave the model, and which maps may then dispatch it.
WAYS = {
    "placed on cpu": lambda saved: loaded(saved, "cpu"),
    "placed on disk": lambda saved: loaded(saved, "disk"),
    "moved to cpu": lambda saved: loaded(saved).place_memory("cpu"),
    "moved to disk": lambda saved: loaded(saved).place_memory("disk"),
    "left to the map": loaded,
}
MAPS = {"one": ONE, "by parts": TABLES_ON_HOST, "by parts, disk": TABLES_ON_DISK}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("way", WAYS)
def test_a_dispatched_table_stays_and_its_rows_travel(way, device_map, device, saved, control, ids, tmp_path):
    model, there = WAYS[way](saved), ids.to("counting")
    places = {"main_device": "counting:0", "offload_dir": str(tmp_path), "force_hooks": True}
    stays = way != "left to the map" or device_map is not ONE
    rest = size([*control.named_parameters(), *control.named_buffers()], False)
    table = size(control.named_parameters(), True)
    assert crossing(lambda: dispatch_model(model, device_map, **places)) == (rest + (0 if stays else table), 0)
    for _ in range(2):
        assert crossing(lambda: model(input_ids=there)) == (travel(control, ids) if stays else (0, 0))
        assert same(logits(model, there), logits(control, ids))
    state = model.state_dict()
    assert all(torch.equal(tensor.cpu(), state[name].cpu()) for name, tensor in control.state_dict().items())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_table_is_taken_back_from_a_dispatched_model(place, device, saved, control, ids):
    model, there = loaded(saved), ids.to("counting")
    dispatch_model(model, ONE, main_device="counting:0", force_hooks=True)
    with counted() as block:
        model.place_memory(place)
    assert block.h2d == 0
    assert crossing(lambda: model(input_ids=there)) == travel(control, ids)
    assert same(logits(model, there), logits(control, ids))
    model.place_memory("device")
    assert {p.device.type for n, p in model.named_parameters() if "tables" in n} == {"counting"}
    assert crossing(lambda: model(input_ids=there)) == (0, 0)


OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, "counting:0"),
    "disk_offload": lambda model, folder: disk_offload(model, str(folder), "counting:0"),
}


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_an_offloaded_model_fetches_its_weights_and_of_the_table_the_rows(
    offload, place, device, saved, control, ids, tmp_path
):
    weights, table = size(control.named_parameters(), False), size(control.named_parameters(), True)
    there = ids.to("counting")
    model = loaded(saved, place)
    offload(model, tmp_path / "ours")
    for _ in range(2):
        up, down = travel(control, ids)
        assert crossing(lambda: model(input_ids=there)) == (weights + up, down)
        assert same(logits(model, there), logits(control, ids))
    plain = loaded(saved)
    plain.memory.take_back_tables = lambda: None  # what accelerate does when nobody takes tables back
    offload(plain, tmp_path / "theirs")
    assert crossing(lambda: plain(input_ids=there))[0] >= weights + table
    remove_hook_from_module(plain, recurse=True)


def test_a_checkpoint_is_loaded_and_dispatched_without_its_tables(device, saved, control, ids):
    config, token_map = EngramConfig.from_pretrained(saved), control.memory.hashing.token_map
    with init_empty_weights():
        empty = EngramForCausalLM(config, token_map=token_map, hold_tables=False).eval()
    model = load_checkpoint_and_dispatch(empty, saved, device_map="auto")
    assert size(model.state_dict().items(), True) == 0
    with control.disable_memory():
        assert torch.equal(logits(model, ids), logits(control, ids))
    model.place_memory("disk", folder=saved)
    assert torch.equal(logits(model, ids), logits(control, ids))
    rest = size([*control.named_parameters(), *control.named_buffers()], False)
    assert crossing(lambda: dispatch_model(model, ONE, main_device="counting:0")) == (rest, 0)
    assert same(logits(model, ids.to("counting")), logits(control, ids))


@pytest.mark.parametrize("word", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_computed_map_has_no_entry_and_no_budget_for_tables(word, saved, control):
    """Maps for two devices that are not here; the table alone is larger than both."""
    config = EngramConfig.from_pretrained(saved, engram_vocab_size=2_000_003)
    config.engram_hash_sha256 = None
    mapped = {}
    for hold in (False, True):
        with torch.device("meta"):
            model = EngramForCausalLM(config, hold_tables=hold)
        rest, table = size(model.named_parameters(), False), size(model.named_parameters(), True)
        memory = {0: 2 * rest, 1: 2 * rest, "cpu": 4 * rest}
        mapped[hold] = _get_device_map(model, word, memory, None)
        assert table > 8 * rest or not hold
    assert not any(name.startswith("memory.tables") for name in mapped[False])
    assert set(mapped[False].values()) <= {0, 1}
    assert "disk" in mapped[True].values(), "control: among the parameters it leaves no room"
    on_cpu = AutoModelForCausalLM.from_pretrained(saved, device_map=word, engram_placement="disk")
    assert on_cpu.memory.placement == "disk"


TWO_PROCESSES = """
import json, os, sys, tempfile, torch, engram_transformers
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
ids, found = torch.arange(3, 25)[None], {}
store = "file://" + tempfile.mkdtemp() + "/store"
child = os.fork()  # imports are paid for once
dist.init_process_group("gloo", init_method=store, rank=0 if child else 1, world_size=2)
sent = []
broadcast = dist._broadcast_coalesced
def counting(group, states, size, source):
    sent.append(sum(state.nbytes for state in states))
    return broadcast(group, states, size, source)
dist._broadcast_coalesced = counting

with torch.no_grad():
    for place in ("control", "device", "cpu", "disk"):
        where = "device" if place == "control" else place
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], engram_placement=where)
        expected = model(ids).logits
        if place == "control":
            model._ddp_params_and_buffers_to_ignore = []
        sent.clear()
        wrapped = DistributedDataParallel(model)
        found[place] = {"broadcast": sum(sent), "same": torch.equal(wrapped(ids).logits, expected)}
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], engram_placement=where)
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
        held = dict(model.named_parameters())
        found[place]["sharded"] = sum(p.nbytes for p in held.values())
        found[place]["tables"] = sum("tables" in name and p.numel() > 0 for name, p in held.items())
        if where != "device":
            found[place]["close"] = float((model(ids).logits - expected).abs().max())
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(torch.distributed, "_broadcast_coalesced"), reason="this torch has no gloo")
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="torch 2.6 has no fully_shard on a CPU (Stream.record_event)",
)
def test_neither_broadcast_nor_sharding_reaches_a_table(saved, control):
    command = [sys.executable, "-c", TWO_PROCESSES, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    named = [*control.named_parameters(), *control.named_buffers()]
    rest, table = size(named, False), size(named, True)
    weights = size(control.named_parameters(), False)
    constants = sum(buffer.nbytes for buffer in control.memory.hashing.buffers())
    assert found["control"]["broadcast"] == rest + table, "control: a parameter is broadcast"
    assert (found["control"]["sharded"], found["control"]["tables"]) == (weights + table, 4)
    assert found["device"]["broadcast"] == rest - constants
    for place in ("cpu", "disk"):
        assert found[place]["broadcast"] == rest - constants
        assert (found[place]["sharded"], found[place]["tables"]) == (weights, 0)
        assert found[place]["close"] <= TOLERANCE
    assert all(entry["same"] for entry in found.values())
