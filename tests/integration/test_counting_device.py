"""What every test that counts bytes relies on: the counting device counts each copy and nothing else, it is a device of
its own with the CPU's operators, and its streams and pinned memory tell a program that waits from one that does not.

Run: pytest tests/integration/test_counting_device.py
"""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from ..counting_device import NoCompiler, build, counted


CPU_TABLE = torch.arange(24.0).reshape(4, 6)  # 96 bytes


@pytest.fixture
def table(device) -> torch.Tensor:
    return CPU_TABLE.to("counting")


COPIES = {
    "up": (lambda t: CPU_TABLE.to("counting"), {"h2d": (96, 1)}),
    "up, into a row": (lambda t: t[1].copy_(CPU_TABLE[0]), {"h2d": (24, 1)}),
    "up, every second column": (lambda t: CPU_TABLE[:, ::2].to("counting"), {"h2d": (48, 1)}),
    "up, narrowed": (lambda t: CPU_TABLE.to("counting", torch.bfloat16), {"h2d": (48, 1)}),
    "up, from a list": (lambda t: torch.tensor([1, 2, 3], device="counting"), {"h2d": (24, 1)}),
    "up, an index": (lambda t: t[torch.tensor([3, 1])], {"h2d": (16, 1)}),
    "up, a module": (lambda t: nn.Linear(6, 4).to("counting"), {"h2d": (112, 2)}),
    "down": (lambda t: t.cpu(), {"d2h": (96, 1)}),
    "down, one column": (lambda t: t[:, 2].cpu(), {"d2h": (16, 1)}),
    "down, an item": (lambda t: t[0, 0].item(), {"d2h": (4, 1)}),
    "down, a list": (lambda t: t[:2].tolist(), {"d2h": (48, 1)}),
    "on the device": (lambda t: t.clone(), {"d2d": (96, 1)}),
    "to where it is": (lambda t: t.to("counting"), {}),
}


@pytest.mark.parametrize(("action", "expected"), COPIES.values(), ids=COPIES)
def test_every_byte_that_crosses_is_counted(table, action, expected):
    with counted() as block:
        action(table)
    found = {kind: (getattr(block, kind), getattr(block, f"{kind}_copies")) for kind in ("h2d", "d2h", "d2d")}
    assert {kind: numbers for kind, numbers in found.items() if numbers != (0, 0)} == expected
    steps = [step.what for step in block.steps if step.what in found]
    assert {kind: steps.count(kind) for kind in steps} == {kind: copies for kind, (_, copies) in expected.items()}


def rows(t: torch.Tensor) -> torch.Tensor:
    """Row numbers that are made on the tensor's device."""
    return (t[:3, 0] % 4).long()


def test_operators_are_the_cpus_carry_no_byte_and_refuse_what_was_left_on_the_cpu(table):
    operators = [lambda t: t @ t.t(), lambda t: functional.embedding(rows(t), t), lambda t: t[1:, ::2].t().softmax(-1)]
    for operator in operators:
        with counted() as block:
            result = operator(table)
        assert (block.h2d, block.d2h, result.device) == (0, 0, torch.device("counting", 0))
        torch.testing.assert_close(result.cpu(), operator(CPU_TABLE))
    for refused in (lambda: table + CPU_TABLE, lambda: functional.embedding(rows(table), CPU_TABLE)):
        with pytest.raises(RuntimeError, match="on the same device"):
            refused()


def test_a_block_counts_what_is_in_it_in_every_thread_and_memory_while_it_is_held(device, table):
    with counted() as outer:
        with counted() as inner:
            thread = threading.Thread(target=lambda: table[:2].cpu())
            thread.start()
            thread.join()
            held = torch.empty(1000, dtype=torch.uint8, device="counting")[10:]  # a view holds all of it
            assert (inner.allocated, inner.peak) == (1000, 1000)
        del held
        table[1].cpu()
    table.cpu()
    assert (inner.d2h, inner.d2h_copies, outer.d2h, outer.d2h_copies) == (48, 1, 72, 2)
    assert (outer.allocated, outer.peak) == (0, 1000)
    with device.total_memory(device.memory_allocated() + 1000), pytest.raises(torch.OutOfMemoryError):
        torch.empty(1001, dtype=torch.uint8, device="counting")


def test_pinned_memory_is_told_from_other_memory_and_may_be_had_or_not(device):
    with counted() as block:
        pinned = CPU_TABLE.pin_memory()
        assert pinned.is_pinned() and not CPU_TABLE.is_pinned() and block.pinned == 96
        pinned.to("counting", non_blocking=True), CPU_TABLE.to("counting", non_blocking=True)
        del pinned
    assert (block.pinned, block.pinned_peak, [step.pinned for step in block.steps]) == (0, 96, [True, False])
    with device.pinning_fails(), pytest.raises(RuntimeError, match="no pinned memory to be had"):
        CPU_TABLE.pin_memory()


WAITS = {
    "nothing": (lambda device, side: None, False),
    "an event": (lambda device, side: device.current_stream().wait_event(side.record_event()), True),
    "the stream": (lambda device, side: device.current_stream().wait_stream(side), True),
    "the host": (lambda device, side: side.synchronize(), True),
    "another stream": (lambda device, side: device.current_stream().wait_stream(device.Stream()), False),
    "the wrong way round": (lambda device, side: side.wait_stream(device.current_stream()), False),
}


@pytest.mark.parametrize(("wait", "waited"), WAITS.values(), ids=WAITS)
def test_a_use_comes_after_a_late_copy_if_somebody_waited_for_it(device, wait, waited):
    source, other, side = CPU_TABLE.pin_memory(), CPU_TABLE.pin_memory(), device.Stream()
    with counted() as block, device.late_copies():
        with device.stream(side):
            there, spoiled = (own.to("counting", non_blocking=True) for own in (source, other))
        other.zero_()
        wait(device, side)
        used = there + 1
    step, use = block.steps[0], next(step for step in block.steps if step.what == "op")
    assert (step.stream, use.stream) == (side.stream_id, 0) and block.comes_after(use, step) == waited
    assert torch.equal(used.cpu(), CPU_TABLE + 1) == waited and used.isnan().all().item() != waited
    assert torch.equal(there.cpu(), CPU_TABLE), "once the block is left, all have come"
    assert not spoiled.cpu().any(), "it sends what its source then held"


def test_a_process_that_has_trained_before_can_load_the_device_and_one_without_a_compiler_says_so(
    counting_device, tmp_path, monkeypatch
):
    code = (
        "import torch; torch.ones(2, requires_grad=True).sum().backward()\n"
        "from tests.counting_device import load; load()\n"
        "x = torch.ones(2, device='counting', requires_grad=True); x.square().sum().backward(); print(x.grad.tolist())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[2.0, 2.0]\n", done.stderr
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompiler, match="needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        build.built()
