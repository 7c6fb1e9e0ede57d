"""Faults of a memory whose rows are read from files or host memory: an error that says what to do, or the right logits.

Every fault is put to a loaded model: its logits before and after are the original's, bit for bit, with the plain
backbone beside it. Proves too that no thread or descriptor stays, and that what does not end is not waited for. Files
that are replaced or deleted under a model are in tests/integration/test_placement.py, saves in
tests/integration/test_save_faults.py, rows by themselves in tests/unit/test_row_stores.py, and threads that fail in
tests/unit/test_prefetch.py.

Run: pytest tests/integration/test_offload_faults.py
"""

import copy
import errno
import gc
import os
import select
import threading
import time
import weakref

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DynamicCache

from engram_transformers import EngramFormatError
from engram_transformers.compat_engram import CACHE
from engram_transformers.files_atomic_engram import INDEX_NAME

from ..faults import (
    Child,
    absent,
    ctrl_c_heard,
    disk,
    failing,
    fetch_threads,
    logits,
    open_files,
    placed_at,
    plain,
    shard_of,
    soon,
)
from ..tiny import fill_memory


placed = pytest.mark.parametrize("placement", ["disk", "cpu"])


@pytest.fixture
def ids():
    """560 reads of each order: too many to be read without a thread."""
    return torch.randint(3, 4000, (4, 70))


@pytest.fixture
def expected(original, ids):
    return logits(original, ids)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert soon(lambda: not fetch_threads()), "a thread is left"


def in_our_threads(act):
    """A disk that holds nothing in memory, and does something in our threads before it reads."""

    def read(real, descriptor, buffers, offset, flags=0):
        if not flags and threading.current_thread() in fetch_threads():
            act()
        return absent(real, descriptor, buffers, offset, flags)

    return read


CHANGES = {
    "cut": lambda path: os.truncate(path, 4096),
    "written anew": lambda path: path.write_bytes(path.read_bytes()[::-1]),
}


@placed
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_shard_that_changes_in_use_is_refused_and_never_read(change, placement, folder, ids, expected, tmp_path):
    model, whole = placed_at(placement, folder), shard_of(folder).read_bytes()
    assert torch.equal(logits(model, ids), expected)
    without = plain(model, ids)
    change(shard_of(folder))

    def ask_all():  # in a process of its own: a mapping of a file that was cut kills it
        for ask in (
            lambda: logits(model, ids),
            lambda: logits(model, ids[:1, :9]),
            lambda: model.generate(ids, max_new_tokens=2),
            model.state_dict,
            lambda: model.save_pretrained(tmp_path / "elsewhere"),
            lambda: model.save_pretrained(folder),
            lambda: model.place_memory("device"),
        ):
            with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
                ask()
        return torch.equal(plain(model, ids), without) and model.memory.placement == placement

    assert Child(ask_all).result()
    assert not (tmp_path / "elsewhere" / INDEX_NAME).exists()
    (folder / "restored").write_bytes(whole)
    os.replace(folder / "restored", shard_of(folder))
    with pytest.raises(EngramFormatError, match="load the model"):
        logits(model, ids)
    assert torch.equal(logits(placed_at(placement, folder), ids), expected)


@placed
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_shard_that_is_replaced_or_deleted_is_read_on(change, placement, folder, ids, expected):
    model = placed_at(placement, folder)
    assert torch.equal(logits(model, ids), expected)
    if change == "deleted":
        shard_of(folder).unlink()
        with pytest.raises(FileNotFoundError, match="engram-memory-"):
            placed_at(placement, folder)
    else:
        other = fill_memory(placed_at("device", folder), seed=1)
        other.save_pretrained(folder)
        assert torch.equal(logits(placed_at(placement, folder), ids), logits(other, ids))
        assert not torch.equal(logits(other, ids), expected)
    for asked in (logits(model, ids), logits(copy.deepcopy(model), ids)):
        assert torch.equal(asked, expected)


@pytest.mark.parametrize("length", [9, 70], ids=["at once", "in the background"])
def test_a_disk_that_fails_is_an_error_with_file_and_place_and_may_come_back(length, folder, ids, original):
    model, ids = placed_at("disk", folder), ids[:, :length]
    with disk(failing(errno.EIO)), pytest.raises(OSError, match="Input/output error.*check the disk") as caught:
        logits(model, ids)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(shard_of(folder)))
    assert torch.equal(plain(model, ids), plain(original, ids))
    assert torch.equal(logits(model, ids), logits(original, ids))


def test_ctrl_c_in_the_middle_of_a_prefetch_ends_the_pass_and_leaves_the_model_working(folder, ids, expected):
    model, (reached, says) = placed_at("disk", folder), os.pipe()

    def interrupted():
        gate = threading.Event()

        def slow():
            os.write(says, b"!")
            gate.wait(20)

        with ctrl_c_heard(), disk(in_our_threads(slow)):
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                logits(model, ids)
            at_once = time.monotonic() - began < 10  # not when the disk has answered
            gate.set()
            ended = soon(lambda: not fetch_threads())
        idle = model.reads_in_flight.current is None
        return at_once, ended, idle, torch.equal(logits(model, ids), expected), len(fetch_threads())

    child = Child(interrupted)
    assert select.select([reached], [], [], 20)[0], "the prefetch did not begin"
    child.interrupt()
    assert child.result() == (True, True, True, True, 0)
    os.close(reached), os.close(says)
    assert torch.equal(logits(model, ids), expected)


@placed
def test_a_generation_that_is_stopped_between_two_tokens_leaves_nothing_behind(placement, folder, ids):
    model, settings = placed_at(placement, folder), {"max_new_tokens": 4, "do_sample": False}
    wanted, passes = model.generate(ids, **settings), []

    def stop(*arguments):
        passes.append(arguments)
        if len(passes) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop)
    with disk(absent), pytest.raises(KeyboardInterrupt):
        model.generate(ids, **settings)
    handle.remove()
    assert soon(lambda: not fetch_threads())
    assert torch.equal(model.generate(ids, **settings), wanted)
    assert len(passes) == 3 and model.reads_in_flight.current is None


def train_rows(model, inputs):
    for order in (order for table in model.memory.tables.values() for order in table.orders()):
        for part in order.tensors():
            part.data.add_(1.0)


LATE = {
    "nothing": lambda model, inputs: None,
    "ids": lambda model, inputs: inputs["input_ids"][:, -1:].fill_(7),
    "mask": lambda model, inputs: inputs["attention_mask"][:, -2:].zero_(),
    "cache": lambda model, inputs: inputs[CACHE].reorder_cache(torch.tensor([1, 0, 2, 3])),
    "rows": train_rows,
}


@torch.no_grad()
@pytest.mark.parametrize("change", LATE.values(), ids=LATE)
def test_what_changes_between_the_inputs_of_a_pass_and_the_pass_is_seen_by_it(change, folder, ids):
    found = []
    for placement in ("device", "cpu"):
        model, cache, asked = placed_at(placement, folder), DynamicCache(), ids.clone()
        model(asked[:, :-4], **{CACHE: cache})
        given = {"attention_mask": torch.ones_like(ids), CACHE: cache, "use_cache": True}
        inputs = model.prepare_inputs_for_generation(asked, **given, next_sequence_length=4, is_first_iteration=False)
        change(model, inputs)
        found.append(model(**inputs).logits)
    assert torch.equal(*found)


class InWorker(torch.utils.data.Dataset):
    """Logits that are computed where a batch is made."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return logits(self.model, self.ids)


@placed
def test_a_worker_of_a_data_loader_reads_the_same_rows(placement, folder, ids, expected):
    data = InWorker(placed_at(placement, folder), ids)
    worker = iter(DataLoader(data, None, num_workers=1, multiprocessing_context="fork", timeout=30))
    assert torch.equal(logits(data.model, ids), expected)  # at the same time
    assert all(torch.equal(found, expected) for found in worker)


@placed
def test_of_two_models_on_one_file_either_may_go_or_save(placement, folder, ids, expected):
    first, second = placed_at(placement, folder), placed_at("disk", folder)
    assert torch.equal(logits(first, ids), expected) and torch.equal(logits(second, ids), expected)
    first.save_pretrained(folder)
    del first
    gc.collect()
    assert torch.equal(logits(second, ids), expected)
    assert open_files(folder) > 0
    del second
    gc.collect()
    assert open_files(folder) == 0
    assert torch.equal(logits(placed_at(placement, folder), ids), expected)


def test_a_model_that_is_dropped_during_a_fetch_takes_thread_and_descriptors_with_it(folder, ids, expected):
    reached, gate, begun = threading.Event(), threading.Event(), []

    def slow():
        begun.append(threading.current_thread())
        reached.set()
        gate.wait(20)

    def stop(*arguments):
        assert reached.wait(10)
        raise ZeroDivisionError  # in a layer before those that wait for rows

    model = placed_at("disk", folder)
    layer = model.backbone.model.layers[0]
    layer.register_forward_pre_hook(stop)
    with disk(in_our_threads(slow)):
        with pytest.raises(ZeroDivisionError):
            logits(model, ids)
        gone = weakref.ref(model)
        del model, layer
        gc.collect()
        assert gone() is None and len(fetch_threads()) == 1, "the thread holds rows, not the model"
        gate.set()
        assert soon(lambda: not fetch_threads())
    assert len(begun) == 1, "what nobody will ask for is not read"
    assert soon(lambda: open_files(folder) == 0)
    with disk(in_our_threads(slow)):
        assert torch.equal(logits(placed_at("disk", folder), ids), expected)
    assert len(begun) == 1 + 4, "the control: 2 layers of 2 orders"
