"""The counting device counts what it says: every byte that crosses to it or back, and none that does not; its operators
are the CPU's, its streams and pinned memory tell a program that waits from one that does not.

Whatever else counts bytes with it rests on these tests. Run: pytest tests/integration/test_counting_device.py
"""

import copy
import io
import threading

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn import functional

from ..counting_device import counted
from ..counting_device.counters import numbers


CPU_TABLE = torch.arange(24.0).reshape(4, 6)  # 96 bytes
TOLERANCE = 1e-5  # float32


@pytest.fixture
def table(device) -> torch.Tensor:
    return CPU_TABLE.to("counting")


def crossed(action) -> dict[str, tuple[int, int]]:
    """Bytes and copies by direction, without those that saw none."""
    with counted() as block:
        action()
    found = {kind: (getattr(block, kind), getattr(block, f"{kind}_copies")) for kind in ("h2d", "d2h", "d2d")}
    return {kind: numbers for kind, numbers in found.items() if numbers != (0, 0)}


COPIES = {
    "to": (lambda t: CPU_TABLE.to("counting"), {"h2d": (96, 1)}),
    "to, not blocking": (lambda t: CPU_TABLE.to("counting:0", non_blocking=True), {"h2d": (96, 1)}),
    "to where it is": (lambda t: t.to("counting"), {}),
    "copy_ up": (lambda t: t.copy_(CPU_TABLE), {"h2d": (96, 1)}),
    "copy_ up of one row": (lambda t: t.copy_(CPU_TABLE[0]), {"h2d": (96, 1)}),  # CUDA repeats it on the host
    "copy_ into a row": (lambda t: t[1].copy_(CPU_TABLE[0]), {"h2d": (24, 1)}),
    "copy_ down": (lambda t: torch.empty(4, 6).copy_(t), {"d2h": (96, 1)}),
    "copy_ on the device": (lambda t: torch.empty_like(t).copy_(t), {"d2d": (96, 1)}),
    "cpu": (lambda t: t.cpu(), {"d2h": (96, 1)}),
    "rows up": (lambda t: CPU_TABLE[1:3].to("counting"), {"h2d": (48, 1)}),
    "every second column up": (lambda t: CPU_TABLE[:, ::2].to("counting"), {"h2d": (48, 1)}),
    "transposed up": (lambda t: CPU_TABLE.t().to("counting"), {"h2d": (96, 1)}),
    "one column down": (lambda t: t[:, 2].cpu(), {"d2h": (16, 1)}),
    "expanded up": (lambda t: CPU_TABLE[:, :1].expand(4, 6).to("counting"), {"h2d": (96, 1)}),
    "narrowed up": (lambda t: CPU_TABLE.to("counting", torch.bfloat16), {"h2d": (48, 1)}),
    "widened up": (lambda t: CPU_TABLE.to("counting", torch.float64), {"h2d": (192, 1)}),
    "narrowed down": (lambda t: torch.empty(4, 6, dtype=torch.int16).copy_(t), {"d2h": (96, 1)}),
    "narrowed, then down": (lambda t: t.half().cpu(), {"d2d": (48, 1), "d2h": (48, 1)}),
    "clone": (lambda t: t.clone(), {"d2d": (96, 1)}),
    "made from a list": (lambda t: torch.tensor([1, 2, 3], device="counting"), {"h2d": (24, 1)}),
    "item": (lambda t: t[0, 0].item(), {"d2h": (4, 1)}),
    "a comparison as bool": (lambda t: bool((t > 3).any()), {"d2h": (1, 1)}),
    "tolist": (lambda t: t[:2].tolist(), {"d2h": (48, 1)}),
    "index from the CPU": (lambda t: t[torch.tensor([3, 1])], {"h2d": (16, 1)}),
    "write at an index from the CPU": (lambda t: t.__setitem__(torch.tensor([3, 1]), t[0, 0]), {"h2d": (16, 1)}),
    "nothing at all": (lambda t: CPU_TABLE[:0].to("counting"), {}),
    "two of them": (lambda t: (t.cpu(), CPU_TABLE[0].to("counting")), {"h2d": (24, 1), "d2h": (96, 1)}),
    "parameters of a module": (lambda t: nn.Linear(6, 4).to("counting"), {"h2d": (112, 2)}),
}


@pytest.mark.parametrize(("action", "expected"), COPIES.values(), ids=COPIES)
def test_every_byte_that_crosses_is_counted(table, action, expected):
    assert crossed(lambda: action(table)) == expected


def conv_and_gradients(t: torch.Tensor) -> torch.Tensor:
    """A grouped, dilated convolution, and the gradients of all that goes in."""
    series, weight, bias = (x.detach().clone().requires_grad_() for x in (t[None], t[:, :2, None].mT, t[:, 0]))
    functional.conv1d(series, weight, bias, padding=2, dilation=2, groups=4).square().sum().backward()
    return torch.cat([x.grad.flatten() for x in (series, weight, bias)])


def ids(t: torch.Tensor) -> torch.Tensor:
    """Row numbers that are made on the tensor's device."""
    return (t[:3, 0] % 4).long()


OPERATORS = {
    "arithmetic": lambda t: 2 * t + 1 - t.square().mean(-1, keepdim=True) / torch.tensor(3.0),
    "matrix product": lambda t: t @ t.t(),
    "softmax": lambda t: (t / 9).softmax(-1),
    "reductions": lambda t: torch.stack([t.sum(), t.amax(), t.argmax().float(), t.norm()]),
    "embedding": lambda t: functional.embedding(ids(t), t),
    "index_select": lambda t: t.index_select(0, ids(t)),
    "index": lambda t: t[ids(t), 1:],
    "unique": lambda t: torch.cat(torch.unique(ids(t), return_inverse=True, return_counts=True)),
    "gather": lambda t: t.gather(0, ids(t)[:, None].expand(3, 6)),
    "scatter_add": lambda t: torch.zeros_like(t).scatter_add(0, ids(t)[:, None].expand(3, 6), t[:3]),
    "index_add": lambda t: torch.zeros_like(t).index_add(0, ids(t), t[1:]),
    "where": lambda t: torch.where(t > 5, 0.0, t),
    "boolean mask": lambda t: t[t > 5],
    "sort": lambda t: t.sort(descending=True).indices,
    "concatenation": lambda t: torch.cat([t, t[1:]]),
    "layer norm": lambda t: functional.layer_norm(t, (6,)),
    "attention": lambda t: functional.scaled_dot_product_attention(t[None] / 9, t[None] / 9, t[None], is_causal=True),
    "convolution and its gradients": conv_and_gradients,
    "views": lambda t: t[1:, ::2].t().unsqueeze(0).expand(2, -1, -1).flatten(1).unfold(1, 3, 2).movedim(0, 1) + 0,
    "view of other type": lambda t: t.view(torch.int32) + 0,
    "complex view": lambda t: torch.view_as_real(torch.view_as_complex(t.view(4, 3, 2)) * 2),
    "output given": lambda t: torch.add(t, t, out=torch.empty(0, device=t.device)),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_an_operator_is_the_cpu_s_and_no_byte_crosses(table, operator):
    with counted() as block:
        result = operator(table)
    assert (block.h2d, block.d2h) == (0, 0)
    assert result.device == torch.device("counting", 0)
    torch.testing.assert_close(result.cpu(), operator(CPU_TABLE), atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(table.cpu(), CPU_TABLE)  # and it left its input alone


TYPES = ["int64", "int32", "int16", "int8", "uint8", "bool", "bfloat16", "float16", "float64", "complex64"]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_comes_back_as_it_went(device, name):
    there = CPU_TABLE.to(getattr(torch, name))
    assert crossed(lambda: there.to("counting")) == {"h2d": (there.nbytes, 1)}
    assert torch.equal(there.to("counting").cpu(), there)
    assert torch.equal(there.to("counting")[ids(CPU_TABLE).to("counting")].cpu(), there[ids(CPU_TABLE)])


def test_what_is_written_through_a_view_is_written(table):
    table[1:, ::2].zero_()
    table.view(-1)[:2].add_(5)
    expected = CPU_TABLE.clone()
    expected[1:, ::2] = 0
    expected.view(-1)[:2] += 5
    assert torch.equal(table.cpu(), expected)


REFUSED = {
    "rows left on the CPU": lambda t: functional.embedding(ids(t), CPU_TABLE),
    "ids left on the CPU": lambda t: functional.embedding(ids(CPU_TABLE), t),
    "sum": lambda t: t + CPU_TABLE,
    "product": lambda t: CPU_TABLE @ t.t(),
    "concatenation": lambda t: torch.cat([t, CPU_TABLE]),
    "a mask on the CPU": lambda t: t.masked_fill(CPU_TABLE > 3, 0),
    "an index on the device": lambda t: CPU_TABLE[ids(t)],
    "an output on the CPU": lambda t: torch.add(t, t, out=torch.empty(4, 6)),
}


@pytest.mark.parametrize("action", REFUSED.values(), ids=REFUSED)
def test_what_was_left_on_the_cpu_is_refused_as_on_cuda(table, action):
    with pytest.raises(RuntimeError, match="on the same device"):
        action(table)


def test_a_block_counts_what_is_in_it_and_in_every_thread(table):
    table.cpu()
    with counted() as outer:
        table[0].cpu()
        with counted() as inner:
            thread = threading.Thread(target=lambda: table[:2].cpu())
            thread.start()
            thread.join()
            assert (inner.d2h, len(inner.steps)) == (48, 1)
        table[1].cpu()
    table.cpu()
    assert (inner.d2h, inner.d2h_copies, len(inner.steps)) == (48, 1, 1)
    assert (outer.d2h, outer.d2h_copies, len(outer.steps)) == (96, 3, 3)
    with counted() as later:
        pass
    assert (later.d2h, later.steps) == (0, [])
    table.cpu()
    assert numbers().steps == 0  # a step that nobody wants to see is not kept


def test_memory_is_counted_while_it_is_held(device):
    with counted() as block:
        first = torch.empty(1000, dtype=torch.uint8, device="counting")
        assert (block.allocated, block.peak) == (1000, 1000)
        view = first[10:]
        with counted() as inner:
            torch.empty(500, device="counting")
        assert (inner.allocated, inner.peak, block.peak) == (0, 2000, 3000)
        del first
        assert block.allocated == 1000  # a view holds all of it
        with counted() as inner:
            assert (inner.peak, block.allocated) == (0, 1000)
        del view
    assert (block.allocated, block.peak) == (0, 3000)


def test_a_small_device_is_soon_full(device):
    used = device.memory_allocated()
    with device.total_memory(used + 1000):
        assert device.mem_get_info() == (1000, used + 1000)
        kept = torch.empty(900, dtype=torch.uint8, device="counting")
        with pytest.raises(torch.OutOfMemoryError, match="101 bytes wanted"):
            torch.empty(101, dtype=torch.uint8, device="counting")
        assert device.mem_get_info()[0] == 1000 - kept.nbytes
    assert device.mem_get_info()[1] == 8 << 30


def test_pinned_memory_is_told_from_other_memory_and_counted(device):
    with counted() as block:
        copied, made = CPU_TABLE.pin_memory(), torch.empty(5, dtype=torch.int16, pin_memory=True)
        assert (block.pinned, block.allocated, block.h2d) == (96 + 10, 0, 0)
        assert copied.is_pinned() and copied[2:, 1].is_pinned() and made.is_pinned()
        between = [(torch.ones(9), torch.ones(9, pin_memory=True)) for _ in range(9)]  # wherever blocks come to lie
        assert [(plain.is_pinned(), pinned.is_pinned()) for plain, pinned in between] == [(False, True)] * 9
        del between
        assert torch.equal(copied, CPU_TABLE) and copied.device.type == "cpu"
        copied.to("counting", non_blocking=True)
        CPU_TABLE.to("counting", non_blocking=True)
        del copied
        assert block.pinned == 10
    assert block.pinned_peak == 106 + 9 * 36
    assert [(step.bytes, step.pinned) for step in block.steps] == [(96, True), (96, False)]


def test_pinned_memory_can_be_had_or_not(device):
    with device.pinning_fails():
        for ask in (CPU_TABLE.pin_memory, lambda: torch.empty(5, pin_memory=True)):
            with pytest.raises(RuntimeError, match="no pinned memory to be had"):
                ask()
    assert CPU_TABLE.pin_memory().is_pinned()


def wait_for_an_event_that_was_recorded_again(device, side: torch.Stream) -> None:
    event = side.record_event()
    event.record(device.Stream())  # it stands for this one only
    device.current_stream().wait_event(event)


WAITS = {
    "nothing": (lambda device, side: None, False),
    "an event": (lambda device, side: device.current_stream().wait_event(side.record_event()), True),
    "an event's own wait": (lambda device, side: side.record_event().wait(device.current_stream()), True),
    "the stream": (lambda device, side: device.current_stream().wait_stream(side), True),
    "the host, for the stream": (lambda device, side: side.synchronize(), True),
    "the host, for an event": (lambda device, side: side.record_event().synchronize(), True),
    "the host, for everything": (lambda device, side: device.synchronize(), True),
    "an event of another stream": (
        lambda device, side: device.current_stream().wait_event(device.Stream().record_event()),
        False,
    ),
    "an event that was recorded again": (wait_for_an_event_that_was_recorded_again, False),
    "a third stream only": (lambda device, side: device.Stream().wait_stream(side), False),
    "the wrong way round": (lambda device, side: side.wait_stream(device.current_stream()), False),
    "the host, for another stream": (lambda device, side: device.Stream().synchronize(), False),
}


@pytest.mark.parametrize(("wait", "waited"), WAITS.values(), ids=WAITS)
def test_a_use_comes_after_a_copy_if_somebody_waited_for_it(device, wait, waited):
    source, side = CPU_TABLE.pin_memory(), device.Stream()
    with counted() as block, device.late_copies():
        with device.stream(side), device.stream(None):
            there = source.to("counting", non_blocking=True)
            assert device.current_stream() == side
        wait(device, side)
        used = there + 1
        there.record_stream(side)
    step, use = block.steps[0], next(step for step in block.steps if step.what == "op")
    assert (step.what, step.bytes, step.non_blocking, step.pinned) == ("h2d", 96, True, True)
    assert (step.stream, use.stream) == (side.stream_id, 0) and side.stream_id > 0
    assert ("record_stream", side.stream_id, 96) in {(s.what, s.stream, s.bytes) for s in block.steps}
    assert block.comes_after(use, step) == waited
    assert torch.equal(used.cpu(), CPU_TABLE + 1) == waited
    assert used.isnan().all().item() != waited
    assert torch.equal(there.cpu(), CPU_TABLE)  # once the block is left, all have come


def pinned() -> torch.Tensor:
    return CPU_TABLE.pin_memory()


SENT = {
    "pinned": (pinned, {"non_blocking": True}, True),
    "pinned, blocking": (pinned, {}, False),
    "not pinned": (CPU_TABLE.clone, {"non_blocking": True}, False),
    "pinned, in pieces": (lambda: pinned()[:, ::2], {"non_blocking": True}, False),
    "pinned, converted": (pinned, {"non_blocking": True, "dtype": torch.float64}, False),
}


@pytest.mark.parametrize(("make", "fields", "is_late"), SENT.values(), ids=SENT)
def test_a_late_copy_takes_what_its_source_then_holds(device, make, fields, is_late):
    """CUDA lets go of all other sources when the call returns: it has staged them."""
    source = make()
    expected = torch.zeros_like(source) if is_late else source.clone()
    with device.late_copies():
        there = source.to("counting", **fields)
        source.zero_()
    assert torch.equal(there.cpu().float(), expected)


def test_an_event_stands_for_what_its_stream_was_given_before(device):
    side = device.Stream()
    with device.late_copies(), device.stream(side):
        before = pinned().to("counting", non_blocking=True)
        event = side.record_event()
        after = pinned().to("counting", non_blocking=True)
        with device.stream(device.Stream()):
            device.current_stream().wait_event(event)
            assert (before[3, 5].item(), after.isnan().all().item()) == (23, True)
        assert after[3, 5].item() == 23  # an item waits for its own stream


def test_a_late_copy_to_the_host_is_there_when_it_was_waited_for(device, table):
    with device.late_copies():
        back = table.to("cpu", non_blocking=True)
        assert back.is_pinned() and back.isnan().all()
        device.current_stream().synchronize()
        assert torch.equal(back, CPU_TABLE)
        there = pinned().to("counting", non_blocking=True)
        assert torch.equal(there.cpu(), CPU_TABLE)  # a copy comes after those on its stream


@pytest.fixture
def llama(tiny_llama_config, tiny_donor) -> nn.Module:
    tiny_llama_config.num_hidden_layers = 2
    return tiny_donor(tiny_llama_config)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two texts of 9 and 6 tokens, pads on the left."""
    tokens, mask = torch.randint(3, 4104, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def test_a_llama_is_the_same_on_the_device_as_on_the_cpu(device, llama, batch):
    there = copy.deepcopy(llama).to("counting")
    batch_there = {name: tensor.to("counting") for name, tensor in batch.items()}

    with counted() as block:
        logits = there(**batch_there).logits
    assert block.h2d == 0 and {step.name for step in block.steps if step.what == "d2h"} == {"item"}  # are there pads?
    torch.testing.assert_close(logits.cpu(), llama(**batch).logits, atol=TOLERANCE, rtol=0)

    texts = there.generate(**batch_there, max_new_tokens=8, do_sample=False)
    assert torch.equal(texts.cpu(), llama.generate(**batch, max_new_tokens=8, do_sample=False))

    for model, inputs in ((llama, batch), (there, batch_there)):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, mine), its in zip(llama.named_parameters(), there.parameters(), strict=True):
        assert its.grad.device.type == "counting" and mine.grad.abs().max() > 0, name
        torch.testing.assert_close(its.grad.cpu(), mine.grad, atol=TOLERANCE, rtol=0)


def test_a_module_is_moved_copied_and_saved(device):
    layer = nn.Linear(6, 4)
    there = copy.deepcopy(layer).to("counting")
    with counted() as block:
        twin = copy.deepcopy(there)
    assert (block.h2d, block.d2h, block.d2d, block.allocated) == (0, 0, 112, 112)
    file = io.BytesIO()
    torch.save([twin.weight, {name: tensor.cpu() for name, tensor in twin.state_dict().items()}], file)
    file.seek(0)
    its_own, saved = torch.load(file)
    assert torch.equal(its_own.cpu(), layer.weight) and its_own.device.type == "counting"
    assert torch.equal(saved["weight"], layer.weight) and saved["weight"].device.type == "cpu"
    there.weight.data.zero_()
    assert crossed(lambda: there.load_state_dict(saved)) == {"h2d": (112, 2)}
    assert torch.equal(there.weight.cpu(), layer.weight)


ROWS, WIDTH, TOKENS = 1000, 16, 10
TABLE_BYTES, IDS_BYTES, READ_BYTES = ROWS * WIDTH * 4, TOKENS * 8, TOKENS * WIDTH * 4


OFFLOADED = {
    "cpu_offload": lambda table: cpu_offload(table, execution_device=torch.device("counting:0")),
    "its hook": lambda table: add_hook_to_module(
        table, AlignDevicesHook("counting", offload=True, io_same_device=True)
    ),
    "dispatch_model": lambda table: dispatch_model(
        nn.Sequential(table, nn.Identity()), {"0": "cpu", "1": "counting:0"}, main_device="counting:0"
    ),
}


@pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)
@torch.no_grad()
def test_accelerate_brings_a_whole_table_over_for_every_pass(device, offload):
    embedding, tokens = nn.Embedding(ROWS, WIDTH), torch.randint(0, ROWS, (2, TOKENS // 2))
    expected = embedding(tokens)
    model = offload(embedding)
    for _ in range(2):
        with counted() as block:
            assert torch.equal(model(tokens), expected)
        assert (block.h2d, block.h2d_copies) == (TABLE_BYTES + IDS_BYTES, 2)
        assert (block.d2h, block.d2h_copies) == (READ_BYTES, 1)
        assert (block.peak, block.allocated) == (TABLE_BYTES + IDS_BYTES + READ_BYTES, 0)


@torch.no_grad()
def test_a_table_that_is_on_the_device_stays_there(device):
    """The control of the test above."""
    embedding, tokens = nn.Embedding(ROWS, WIDTH), torch.randint(0, ROWS, (2, TOKENS // 2))
    expected = embedding(tokens)
    model = dispatch_model(nn.Sequential(embedding), {"": "counting"}, force_hooks=True)
    with counted() as block:
        assert torch.equal(model(tokens), expected)
    assert (block.h2d, block.h2d_copies, block.d2h) == (IDS_BYTES, 1, READ_BYTES)
    with pytest.raises(RuntimeError, match="on the same device"):
        dispatch_model(nn.Sequential(nn.Embedding(ROWS, WIDTH)), {"": "counting"})(tokens)  # no hooks: ids stay
