"""A whole Engram layer against the public demo's forward pass: rows exactly, values to 1e-5 absolute in float32.

The memory is imported from the demo's tensors (conversion/foreign_january_demo.py).
Run with `pytest tests/parity/test_forward_golden.py`.
"""

import copy
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from engram_transformers import EngramConfig, EngramForCausalLM
from engram_transformers.cache_engram import EngramCacheLayer
from engram_transformers.conversion import import_memory
from engram_transformers.hash_ngrams_engram import NgramHasher
from engram_transformers.layer_engram import EngramLayer
from engram_transformers.rows_table_engram import EngramTable

from ..integration.foreign_memories import demo_backbone, demo_folder, save_backbone


FOLDER = Path(__file__).parent / "golden"
TOKEN_MAP = torch.tensor(json.loads((FOLDER / "compressed_tokenizer.json").read_text(encoding="utf-8"))["lookup_table"])
LAYERS = [("A_default_like", 1), ("A_default_like", 15), ("B_bigram_1head", 0)]
INPUTS = ["T1", "T2", "B2T19", "text"]
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@dataclass
class Demo:
    """One layer of the demo in this package's parts, and its golden arrays."""

    config: EngramConfig
    hasher: NgramHasher
    table: EngramTable
    layer: EngramLayer
    layer_id: int
    arrays: dict[str, np.ndarray]

    def golden(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[f"L{self.layer_id}/{name}"])

    def inputs(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids `(B, L)` and the residual stream `(B, L, M, D)`."""
        return self.golden(f"{name}/input_ids"), self.golden(f"{name}/hidden_states")

    def read(self, ids: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
        """Memory vectors `(B, L, E)`, by the fast path."""
        rows = self.hasher(ids, alive)[1]
        return self.table(rows[self.hasher.layer_index(self.layer_id)])


def demo_config(name: str, **changes) -> EngramConfig:
    demo = json.loads((FOLDER / f"hash_{name}.json").read_text())["config"]
    text_config = LlamaConfig(
        vocab_size=len(TOKEN_MAP), hidden_size=demo["hidden_size"], num_attention_heads=2, num_hidden_layers=30
    )
    text_config.hc_mult = demo["hc_mult"]
    fields = {
        "engram_layer_ids": demo["layer_ids"],
        "engram_vocab_size": demo["engram_vocab_size"],
        "engram_max_ngram_size": demo["max_ngram_size"],
        "engram_n_heads": demo["n_head_per_ngram"],
        "engram_head_dim": demo["n_embed_per_ngram"] // demo["n_head_per_ngram"],
        "engram_pad_token_id": demo["pad_id"],
        "engram_seed": demo["seed"],
        "engram_kernel_size": demo["kernel_size"],
        "engram_projection_bias": True,
        "engram_gate": "signed_sqrt_or_zero",
        "engram_compressed_vocab_size": int(TOKEN_MAP.max()) + 1,
    }
    return EngramConfig(text_config=text_config, **{**fields, **changes})


@functools.cache
def imported(name: str) -> EngramForCausalLM:
    """A graft with the demo's memory, imported from its files; tests only read it."""
    with tempfile.TemporaryDirectory() as folder:
        source = demo_folder(name, Path(folder, "demo"))
        backbone = save_backbone(demo_backbone(name), Path(folder, "backbone"))
        graft = import_memory("january-demo", source, backbone, Path(folder, "graft"))
        return EngramForCausalLM.from_pretrained(graft, engram_placement="device")


def demo_layer(name: str, layer_id: int, **changes) -> Demo:
    config, memory = demo_config(name, **changes), copy.deepcopy(imported(name).memory)
    arrays = dict(np.load(FOLDER / f"forward_{name}.npz"))
    layer = EngramLayer(config, layer_id).eval()
    layer.load_state_dict(memory.layers[str(layer_id)].state_dict())
    return Demo(config, memory.hashing, memory.tables[str(layer_id)], layer, layer_id, arrays)


@pytest.fixture(params=LAYERS, ids=lambda pair: f"{pair[0]}-layer{pair[1]}")
def named_layer(request) -> tuple[str, int]:
    return request.param


@pytest.fixture
def demo(named_layer) -> Demo:
    return demo_layer(*named_layer)


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS)
def test_the_output_is_the_demos(inputs, demo):
    ids, stream = demo.inputs(inputs)
    output = demo.layer(stream, demo.read(ids))
    torch.testing.assert_close(output, demo.golden(f"{inputs}/output"), **TOLERANCE)
    torch.testing.assert_close(output.double(), demo.golden(f"{inputs}/output_float64"), **TOLERANCE)
    assert output.abs().max() > 0.1  # the tolerance is small beside what is compared


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS)
def test_rows_and_vectors_are_exactly_the_demos(inputs, demo):
    ids, _ = demo.inputs(inputs)
    assert torch.equal(demo.hasher.hash_ids(ids, demo.layer_id), demo.golden(f"{inputs}/hash_ids"))
    assert torch.equal(demo.read(ids), demo.golden(f"{inputs}/emb").flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS)
def test_intermediates_are_the_demos(inputs, demo, named_layer):
    ids, stream = demo.inputs(inputs)
    projected = demo.layer.key_value(demo.read(ids))
    hidden = stream.shape[-1]
    keys, value = projected[..., :-hidden].view(stream.shape), projected[..., None, -hidden:]
    gates = demo.layer.open_gate(stream, keys)
    gated = gates * value
    torch.testing.assert_close(gates[..., 0], demo.golden(f"{inputs}/gates"), **TOLERANCE)
    torch.testing.assert_close(gated, demo.golden(f"{inputs}/value"), **TOLERANCE)
    torch.testing.assert_close(demo.layer.convolve(gated, None, None), demo.golden(f"{inputs}/conv"), **TOLERANCE)
    # The golden score is the one before the square root: what the paper's gate takes the sigmoid of.
    plain = demo_layer(*named_layer, engram_gate="sigmoid").layer.open_gate(stream, keys)[..., 0]
    torch.testing.assert_close(plain, torch.sigmoid(demo.golden(f"{inputs}/score")), **TOLERANCE)


@torch.no_grad()
def test_the_papers_gate_is_a_setting(demo, named_layer):
    ids, stream = demo.inputs("text")
    paper = demo_layer(*named_layer, engram_gate="sigmoid")
    output = paper.layer(stream, paper.read(ids))
    torch.testing.assert_close(output, demo.golden("text/output_papergate"), **TOLERANCE)
    assert not torch.allclose(output, demo.golden("text/output"), atol=1e-3)


@torch.no_grad()
def test_a_convolution_of_zeros_is_no_convolution(demo, named_layer):
    ids, stream = demo.inputs("text")
    golden = demo.golden("text/output_zeroconv")
    assert not torch.allclose(demo.layer(stream, demo.read(ids)), golden, atol=1e-3)
    demo.layer.conv.zero_()
    torch.testing.assert_close(demo.layer(stream, demo.read(ids)), golden, **TOLERANCE)
    without = EngramLayer(demo_config(named_layer[0], engram_kernel_size=0), demo.layer_id)
    without.load_state_dict({k: v for k, v in demo.layer.state_dict().items() if not k.startswith("conv")})
    assert torch.equal(without(stream, demo.read(ids)), demo.layer(stream, demo.read(ids)))


@torch.no_grad()
@pytest.mark.parametrize("parts", [2, 3])
def test_a_table_in_parts_gives_the_demos_vectors(parts, demo):
    whole = demo.table
    heights = [len(order[0]) for order in whole.orders()]
    demo.table = EngramTable(heights, demo.config.engram_head_dim, parts, torch.float32)
    for order, source in zip(demo.table.orders(), whole.orders(), strict=True):
        for part, rows in zip(order, source[0].split([len(p) for p in order]), strict=True):
            part.copy_(rows)
    ids, _ = demo.inputs("B2T19")
    assert torch.equal(demo.read(ids), demo.golden("B2T19/emb").flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1], [10], [3, 4, 11], list(range(1, 19))], ids=str)
def test_decoding_in_chunks_gives_the_demos_output(cuts, demo):
    """The demo has no cache; with one, any chunks give what it computes at once."""
    ids, stream = demo.inputs("B2T19")
    cache = EngramCacheLayer(len(demo.hasher.layer_ids), demo.hasher.context_length)
    index, outputs = demo.hasher.layer_index(demo.layer_id), []
    for first, last in zip([0, *cuts], [*cuts, 19], strict=True):
        classes = demo.hasher.compress(ids[:, first:last])
        vectors = demo.table(demo.hasher.rows_of_classes(classes, cache.recent_classes())[index])
        outputs.append(demo.layer(stream[:, first:last], vectors, cache=cache))
        cache.remember_classes(classes)
    torch.testing.assert_close(torch.cat(outputs, dim=1), demo.golden("B2T19/output"), **TOLERANCE)


@torch.no_grad()
def test_left_pads_leak_in_the_demo_and_not_here(demo):
    """In the demo five left pads change outputs by up to 0.93 through the convolution; dead positions give nothing."""
    ids, stream = demo.inputs("text")
    pad_ids = torch.full((1, 5), demo.config.engram_pad_token_id)
    padded_ids = torch.cat([pad_ids, ids], dim=1)
    padded = torch.cat([torch.randn(1, 5, *stream.shape[2:]), stream], dim=1)
    alive = torch.arange(5 + ids.shape[1])[None] >= 5
    golden = demo.golden("text/output")
    output = demo.layer(padded, demo.read(padded_ids, alive), alive)
    torch.testing.assert_close(output[:, 5:], golden, **TOLERANCE)
    assert not output[:, :5].any()
    leaking = demo.layer(padded, demo.read(padded_ids))[:, 5:]
    assert (leaking - golden).abs().max() > 0.05
