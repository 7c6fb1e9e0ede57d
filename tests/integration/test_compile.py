"""torch.compile with fullgraph=True: forward pass, training, decoding with a static cache, and no copy of a table.

Logits and gradients equal those without a compiler to 1e-5 in float32, tokens exactly.
Run: pytest tests/integration/test_compile.py
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from engram_transformers.compat_engram import CACHE
from engram_transformers.rows_gradient_engram import RowGradient

from .backbones import BACKBONES


TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of another test, in memory or on disk."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def ids():
    return torch.randint(3, 4000, (2, 15))


@pytest.fixture
def small(tiny_llama_config, tiny_donor, tiny_engram):
    """Factory of trained grafts with two decoder layers: compiling costs by the layer."""

    def make(**fields):
        tiny_llama_config.num_hidden_layers = 2
        return tiny_engram(trained=True, donor=tiny_donor(tiny_llama_config), layers=(0, 1), **fields)

    return make


@torch.no_grad()
def test_a_forward_pass_compiles_whole(ids, small):
    model = small(engram_table_parts=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in ({}, {"attention_mask": mask}):
        expected = model(ids, use_cache=False, **inputs).logits
        torch.testing.assert_close(compiled(ids, use_cache=False, **inputs).logits, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_packed_documents_compile_whole(ids, small):
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    inputs = {"position_ids": positions.expand(2, -1), "use_cache": False}
    expected = model(ids, **inputs).logits
    torch.testing.assert_close(compiled(ids, **inputs).logits, expected, rtol=0, atol=TOLERANCE)
    assert (model(ids, use_cache=False).logits - expected).abs().max() > 0.1  # the control


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_compiles_whole_and_leaves_the_same_row_gradients(backend, ids, small):
    plain, model = small().train(), small().train()
    plain(ids, labels=ids, use_cache=False).loss.backward()
    torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids, use_cache=False).loss.backward()
    touched = 0
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        if isinstance(one.grad, RowGradient):
            touched += 1
            assert torch.equal(one.grad.rows, other.grad.rows), name
            torch.testing.assert_close(one.grad.row_values, other.grad.row_values, rtol=0, atol=TOLERANCE)
        elif one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=TOLERANCE)
    assert touched == 4  # two layers, two orders


@pytest.mark.parametrize(("backend", "pads"), [("aot_eager", 0), pytest.param("inductor", 4, marks=pytest.mark.slow)])
def test_decoding_with_a_static_cache_compiles_whole(backend, pads, ids, small):
    model = small()
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    compiling = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiling._compile_all_devices = True  # Transformers compiles on accelerators only unless it is told
    torch._dynamo.utils.counters.clear()
    compiled = model.generate(ids, cache_implementation="static", compile_config=compiling, **settings)
    assert torch.equal(compiled, model.generate(ids, use_cache=False, **settings))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    again = model.generate(ids, cache_implementation="static", compile_config=compiling, **settings)
    assert torch.equal(again, compiled)


@torch.no_grad()
def test_a_cache_goes_on_with_and_without_a_compiler(ids, small):
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = DynamicCache(config=model.config.text_config)
    pieces = [
        run(piece, **{CACHE: cache}, use_cache=True).logits
        for run, piece in zip((model, compiled, compiled, model), ids.split([5, 1, 1, 8], dim=1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gemma3", "mixtral", "lfm2"])
def test_other_backbones_compile_whole(backbone, ids, tiny_donor, tiny_engram):
    model = tiny_engram(trained=True, donor=tiny_donor(BACKBONES[backbone]()), layers=(0, 1))
    expected = model(ids, use_cache=False).logits
    try:
        control = torch.compile(model.backbone, fullgraph=True, backend="aot_eager")(ids, use_cache=False)
    except torch._dynamo.exc.Unsupported:
        control = None
    if control is None:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False)
        return
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False)
    torch.testing.assert_close(compiled.logits, expected, rtol=0, atol=TOLERANCE)


MEASURE = """
import json, torch
from transformers import LlamaConfig
from engram_transformers import EngramConfig, EngramForCausalLM
from engram_transformers.rows_gradient_engram import RowGradient

def peak():  # not ru_maxrss, which begins with what the process that started this one has held
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

text = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
config = EngramConfig(text_config=text, engram_layer_ids=[0], engram_n_heads=1, engram_max_ngram_size=2,
                      engram_vocab_size=2_000_000, engram_head_dim=64)
model = EngramForCausalLM(config).eval()
table = sum(p.nbytes for p in model.memory.tables.parameters())
for p in model.memory.tables.parameters():
    p.data.fill_(0.01)
ids = torch.randint(0, 100, (1, 16))
run = torch.compile(model, fullgraph=True)
tiny = torch.compile(torch.nn.Linear(4, 4))(torch.ones(1, 4)).sum().backward()  # the compiler's own memory
before = peak()
run(ids, labels=ids, use_cache=False).loss.backward()
with torch.no_grad():
    run(ids, use_cache=False)
    copied = peak() - before
    keep = [p.clone() for p in model.memory.tables.parameters()]  # the control: what one copy would cost
print(json.dumps({"table": table, "compiled": copied, "control": peak() - before}))
"""


@pytest.mark.slow
def test_no_table_is_copied_by_the_compiler():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["table"] > 500_000_000
    assert sizes["control"] > 0.5 * sizes["table"], sizes  # a copy would be seen
    assert sizes["compiled"] < 0.5 * sizes["table"], sizes
