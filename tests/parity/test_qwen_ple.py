"""An imported memory of Qwen4-Exp against Transformers' own `Qwen4ExpTextPLELayer`: the same rows, and outputs to 1e-5
absolute in float32, at once and in chunks with a cache.

Run with `pytest tests/parity/test_qwen_ple.py`.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.qwen4_exp.modeling_qwen4_exp import _build_layer_multipliers, _find_nth_prime_after

from engram_transformers import EngramForCausalLM
from engram_transformers.cache_engram import EngramCacheLayer
from engram_transformers.conversion import import_memory
from engram_transformers.hash_constants_engram import derive_primes, derive_qwen_multipliers

from ..integration.backbones import deepseek_v4
from ..integration.foreign_memories import qwen_config, qwen_model, save_backbone
from ..tiny import GOLDEN


END = 1
TOLERANCE = {"rtol": 0, "atol": 1e-5}
# Ends of documents one after another, at the beginning and at the end.
TEXTS = torch.tensor(
    [
        [20, 30, 20, 30, 40, END, 50, 60, END, END, 70, 20, 30, 40, 50, 21, 22, 23, 24, END],
        [END, 9, 8, 7, 6, 5, 4, 3, 2, 0, 4103, 4102, 4101, END, 20, 30, 40, 50, 60, 70],
    ]
)


@pytest.fixture(scope="module")
def qwen():
    return qwen_model()


@pytest.fixture(scope="module")
def memory(qwen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    qwen.save_pretrained(folder / "qwen")
    backbone = save_backbone(deepseek_v4(), folder / "backbone")
    graft = import_memory("qwen-ple", folder / "qwen", backbone, folder / "graft", max_memory_shard_size="5KB")
    return EngramForCausalLM.from_pretrained(graft, engram_placement="disk").memory


@pytest.fixture
def stream():
    return torch.randn(2, TEXTS.shape[1], 4, 32)


def added(memory, layer: int, ids, stream, cache=None):
    """What the memory adds, `(B, L, M * D)`."""
    reads = memory.read(ids, cache, memory.resets(ids), torch.ones_like(ids, dtype=torch.bool))
    output = memory.layers[str(layer)](stream, reads.vectors(layer), reads.alive, cache, reads.segments)
    reads.remember()
    return output.flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_outputs_are_those_of_transformers(layer, qwen, memory, stream):
    expected = qwen.model.layers[layer].ple(stream.flatten(2), TEXTS, None)
    output = added(memory, layer, TEXTS, stream)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    assert output.abs().max() > 0.1  # the tolerance is small beside what is compared
    without_ends = memory.layers[str(layer)](stream, memory.read(TEXTS, None).vectors(layer)).flatten(2)
    assert (without_ends - expected).abs().max() > 0.1  # texts and weights show whether n-grams stop at ends


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("cuts", [[1], [2, 3], [5, 6, 9, 10], list(range(1, 20))], ids=str)
def test_chunks_give_what_transformers_computes(cuts, layer, qwen, memory, stream):
    theirs, pairs = DynamicCache(config=qwen.config), []
    ours = EngramCacheLayer(memory.convolutions, memory.hashing.context_length, memory.lookback)
    for first, last in zip([0, *cuts], [*cuts, 20], strict=True):
        ids, chunk = TEXTS[:, first:last], stream[:, first:last]
        expected = qwen.model.layers[layer].ple(chunk.flatten(2), ids, theirs)
        pairs.append((added(memory, layer, ids, chunk, ours), expected))
    output, expected = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
    torch.testing.assert_close(output, expected, **TOLERANCE)
    torch.testing.assert_close(output, added(memory, layer, TEXTS, stream), **TOLERANCE)


@torch.no_grad()
def test_vectors_are_exactly_those_of_transformers(qwen, memory):
    for layer in (0, 2):
        vectors = memory.read(TEXTS, None, memory.resets(TEXTS)).vectors(layer)
        assert torch.equal(vectors, qwen.model.layers[layer].ple.ple_embedding(TEXTS, None))


@torch.no_grad()
def test_a_whole_model_is_the_same_with_an_imported_memory_in_the_place_of_its_own(qwen, tmp_path):
    """Logits to 1e-5, and the same generated tokens with a cache; the control is the model without a memory."""
    qwen.save_pretrained(tmp_path / "qwen")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", config=qwen_config(ple_layer_ids=None)).eval()
    plain.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(tmp_path / "plain")
    graft = import_memory("qwen-ple", tmp_path / "qwen", tmp_path / "plain", tmp_path / "graft")
    model = EngramForCausalLM.from_pretrained(graft)
    expected = qwen(TEXTS).logits
    torch.testing.assert_close(model(TEXTS).logits, expected, **TOLERANCE)
    assert (plain(TEXTS).logits - expected).abs().max() > 0.1
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    texts = [one.generate(TEXTS, **options) for one in (qwen, model, plain)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_constants_are_those_of_transformers_at_every_size():
    """Also at the released ones: 20,000,000 rows a head, 16 heads, 248,320 ids. No table is made."""
    for vocabulary, base, seed in ((248_320, 20_000_000, 1234), (7, 11, 0), (2**40, 2, 2**63)):
        own = derive_qwen_multipliers(3, 4, vocabulary, seed)
        assert own.tolist() == [_build_layer_multipliers(vocabulary, 4, index, seed).tolist() for index in range(3)]
        primes = derive_primes(2, [base, base], 8).flatten().tolist()
        assert primes == [_find_nth_prime_after(base - 1, count) for count in range(1, 33)]
    assert derive_primes(1, [20_000_000] * 2, 8).sum() == 320_001_446
