"""A memory whose tables are elsewhere, on a CUDA device: the same logits as with tables on it, rows from pinned
memory, and a device that never holds a table.

Without a GPU these tests are skipped: nobody has run them yet. Logits are compared with those of tables on the same
device to 1e-5 in float32; memory is torch's own count of the device's bytes.
Run: pytest tests/gpu/test_offload_gpu.py
"""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM, LlamaConfig

from engram_transformers import EngramForCausalLM

from ..tiny import engram_on


TOLERANCE = 1e-5  # float32, one device: rows come by another way and are the same bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a filled memory; tests only read it."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    engram_on(LlamaConfig(vocab_size=4104, initializer_range=0.2, **sizes), (1, 2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """More than 256 reads of an order, so that a thread fetches them."""
    return torch.randint(3, 4104, (4, 100), generator=torch.Generator().manual_seed(3)).to("cuda")


def loaded(folder, place: str = "device") -> EngramForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, engram_placement=place)


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def expected(saved, ids) -> torch.Tensor:
    """Logits with tables on the device; the memory has a part in them."""
    control = loaded(saved).to("cuda")
    found = logits(control, ids)
    with control.disable_memory():
        assert not torch.allclose(logits(control, ids), found, atol=1e-2)
    return found


def close(found, expected) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_logits_are_the_same_wherever_tables_are(place, saved, ids, expected):
    model = loaded(saved, place).to("cuda")
    for _ in range(20):  # a copy that nobody waits for is late only now and then
        assert close(logits(model, ids), expected)
    model.place_memory("device")
    assert {p.device.type for name, p in model.named_parameters() if "tables" in name} == {"cuda"}
    assert close(logits(model, ids), expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_every_prefetched_row_is_the_table_s(place, saved, ids, expected):
    model = loaded(saved, "none").place_memory(place, verify=True).to("cuda")
    assert close(logits(model, ids), expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_generation_is_the_same_wherever_tables_are(place, saved, ids):
    settings = {"max_new_tokens": 16, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    control, model = loaded(saved).to("cuda"), loaded(saved, place).to("cuda")
    assert torch.equal(model.generate(ids, **settings), control.generate(ids, **settings))


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_a_table_takes_device_memory_only_where_it_is_placed(place, saved):
    model = loaded(saved, place)
    table = sum(table.nbytes for table in model.memory.tables.values())
    rest = sum(t.nbytes for name, t in [*model.named_parameters(), *model.named_buffers()] if "tables" not in name)
    before = torch.cuda.memory_allocated()
    model.to("cuda")
    taken = torch.cuda.memory_allocated() - before
    wanted = rest + (table if place == "device" else 0)
    count = sum(1 for _ in [*model.parameters(), *model.buffers()])
    assert wanted <= taken <= wanted + 512 * count  # blocks are multiples of 512 bytes


def test_rows_come_from_pinned_memory(saved, ids):
    model = loaded(saved, "cpu").to("cuda")
    logits(model, ids)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        logits(model, ids)
        torch.cuda.synchronize()
    copies = [event for event in profile.events() if "Memcpy HtoD" in event.name]
    assert copies
    assert all("Pinned" in event.name for event in copies)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_dispatched_and_offloaded_models_give_the_same_logits(place, saved, ids, expected):
    dispatched = loaded(saved).place_memory(place)
    dispatch_model(dispatched, {"": 0}, force_hooks=True)
    assert close(logits(dispatched, ids), expected)
    dispatched.place_memory("device")
    assert close(logits(dispatched, ids), expected)
    offloaded = loaded(saved, place)
    cpu_offload(offloaded, "cuda:0")
    assert close(logits(offloaded, ids), expected)
    mapped = AutoModelForCausalLM.from_pretrained(saved, device_map="auto", engram_placement=place)
    assert close(logits(mapped, ids), expected)


def test_auto_keeps_a_small_table_on_the_device(saved, ids, expected):
    model = AutoModelForCausalLM.from_pretrained(saved, device_map="cuda")
    assert model.memory.placement == "device"
    assert close(logits(model, ids), expected)
    small = AutoModelForCausalLM.from_pretrained(saved, device_map="auto", max_memory={0: 1, "cpu": 1 << 30})
    assert small.memory.placement == "cpu"


def test_gradients_of_rows_come_back_to_the_host(saved, ids):
    models = [loaded(saved, place).train().to("cuda") for place in ("device", "cpu")]
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    parts = dict(models[1].memory.named_parts().items())
    assert len(parts) == 4
    for name, part in parts.items():
        assert part.device.type == "cpu"
        control = dict(models[0].named_parameters())[name].grad
        assert torch.equal(part.grad.rows, control.rows.cpu())
        assert torch.allclose(part.grad.row_values, control.row_values.cpu(), rtol=0, atol=TOLERANCE)
