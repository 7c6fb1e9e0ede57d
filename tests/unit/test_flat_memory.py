"""vLLM's plugin without vLLM: a flattened batch reads and adds what the model reads and adds for each text alone.

Run: pytest tests/unit/test_flat_memory.py
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from engram_vllm.configuration_engram import ServedConfig
from engram_vllm.flat_memory import FlatMemory, windows
from engram_vllm.refusals import check_engine, check_served
from engram_vllm.slot_ids import IdsBySlot

from ..packs import classes_of, ngrams_in, pack_of
from ..tiny import engram_on


CONFIG = LlamaConfig(vocab_size=4108, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
PACK = "town.engram-pack.safetensors"
DEAD_ID = 4104  # the tokenizer ends before it
TEXTS = [
    torch.tensor([100, 101, 102, 103, 104, 105, DEAD_ID, 107, 108]),
    torch.arange(100, 101),
    torch.arange(240, 254),
]


@pytest.fixture(scope="module")
def graft(tmp_path_factory):
    """A filled graft without convolution, its folder, and a pack that its texts read."""
    folder = tmp_path_factory.mktemp("graft")
    model = engram_on(CONFIG, engram_kernel_size=0, engram_max_ngram_size=4, engram_reset_token_ids=[244]).eval()
    model.save_pretrained(folder)
    pack = pack_of(model, ngrams_in(classes_of(model, TEXTS[2])), seed=1)
    pack.save(folder / PACK)
    return model, folder, pack


def served(folder, **changes) -> ServedConfig:
    given, _ = ServedConfig.get_config_dict(folder)
    return ServedConfig(**{**given, **changes})


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=5), st.integers(1, 4))
@settings(deadline=None)
def test_windows_are_those_of_each_request_alone(requests, reach):
    """`requests` are (tokens computed before, tokens scheduled)."""
    whole = [[100 * number + place + 1 for place in range(done + new)] for number, (done, new) in enumerate(requests)]
    ids = torch.tensor([token for text, (done, _) in zip(whole, requests, strict=True) for token in text[done:]])
    starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0)
    padded_texts = [[-1] * reach + text for text in whole]
    before = torch.tensor([text[done : done + reach] for text, (done, _) in zip(padded_texts, requests, strict=True)])
    expected = []
    for padded, (done, new) in zip(padded_texts, requests, strict=True):
        expected += [padded[place : place + reach + 1] for place in range(done, done + new)]
    assert windows(ids, starts, before).tolist() == expected


def test_tokens_after_the_last_request_are_not_text():
    seen = windows(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 2]), torch.tensor([[3, 4]]))
    assert seen.tolist() == [[3, 4, 5], [4, 5, 6], [-1, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize("placement", ["cpu", "disk"])
@pytest.mark.parametrize("packs", [0, 1])
@torch.no_grad()
def test_a_flat_batch_adds_what_the_model_adds(graft, placement, packs):
    model, folder, pack = graft
    memory = FlatMemory(served(folder), folder, placement, [folder / PACK] * packs)
    done = [4, 0, 6]  # tokens of each text that earlier passes have read
    ids = torch.cat([text[read:] for text, read in zip(TEXTS, done, strict=True)])
    starts = torch.tensor([0, *(len(text) - read for text, read in zip(TEXTS, done, strict=True))]).cumsum(0)
    before = torch.tensor([([-1] * 3 + text[:read].tolist())[-3:] for text, read in zip(TEXTS, done, strict=True)])
    stream = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(0))
    reads = memory.read(ids, starts, before)
    if packs:
        model.load_memory(pack, "town")
    expected = []
    for number, (text, read) in enumerate(zip(TEXTS, done, strict=True)):
        own = model.memory.read(text[None], None, model.memory.resets(text[None]))
        part = torch.zeros(1, len(text), 32)
        part[0, read:] = stream[starts[number] : starts[number + 1]]
        added = [model.memory.layers[str(layer)](part, own.vectors(layer), own.alive) for layer in (0, 1)]
        expected.append(torch.stack([part + one for one in added])[:, 0, read:])
    if packs:
        model.unload_memory("town")
    found = torch.stack([reads.added(layer, stream) for layer in (0, 1)])
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=0, atol=1e-6)
    assert (found - stream).abs().max() > 0.1, "the memory says nothing"


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@torch.no_grad()
def test_quantised_rows_are_read_as_the_model_reads_them(dtype, tmp_path):
    fields = {"engram_kernel_size": 0, "engram_head_dim": 32, "engram_table_dtype": dtype}
    model = engram_on(CONFIG, **fields).eval()
    model.save_pretrained(tmp_path)
    text = TEXTS[2]
    reads = FlatMemory(served(tmp_path), tmp_path).read(text, torch.tensor([0, len(text)]), torch.full((1, 2), -1))
    own = model.memory.read(text[None], None)
    for layer in (0, 1):
        assert torch.equal(reads.vectors[layer].squeeze(1), own.vectors(layer)[0])
        assert reads.vectors[layer].dtype == torch.float32 and bool(reads.vectors[layer].any())


def test_a_pack_changes_only_texts_that_hold_its_ngrams(graft):
    _, folder, _ = graft
    plain, packed = FlatMemory(served(folder), folder), FlatMemory(served(folder), folder, packs=[folder / PACK])
    starts, before = torch.tensor([0, 9, 23]), torch.full((2, 3), -1)
    ids = torch.cat([TEXTS[0], TEXTS[2]])
    stream = torch.ones(len(ids), 32)
    one, other = (memory.read(ids, starts, before).added(0, stream) for memory in (plain, packed))
    assert torch.equal(one[:9], other[:9]) and not torch.equal(one[9:], other[9:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engram_kernel_size": 4}, "--kernel-size 0"),
        ({"engram_hc_mult": 4}, "one stream"),
        ({"engram_memory_delta": "memory_delta.safetensors"}, "save_pretrained"),
        ({"composite_config": {"model_type": "gemma3"}}, "--text-only"),
    ],
)
def test_a_graft_that_cannot_be_served_is_refused(graft, changes, words):
    check_served(served(graft[1]))
    with pytest.raises(ValueError, match=words):
        check_served(served(graft[1], **changes))


def engine(**changes) -> SimpleNamespace:
    """Settings of vLLM with which a graft is served, on a CPU by model runner V1."""
    settings = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1, use_ubatching=False),
        model_config=SimpleNamespace(enforce_eager=True, enable_prompt_embeds=False),
        device_config=SimpleNamespace(device_type="cpu"),
        use_v2_model_runner=False,
        speculative_config=None,
        kv_transfer_config=None,
        additional_config={},
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(getattr(settings, path[0]) if path else settings, last, value)
    return settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_config__enforce_eager": False}, "--enforce-eager"),
        ({"parallel_config__world_size": 2}, "world size 2"),
        ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"model_config__enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"device_config__device_type": "cuda"}, "VLLM_USE_V2_MODEL_RUNNER"),
        ({"additional_config": {"engram_pack": "a"}}, r"\['engram_pack'\]"),
    ],
)
def test_settings_that_were_not_tested_are_refused(changes, words):
    check_engine(engine())
    check_engine(engine(device_config__device_type="cuda", use_v2_model_runner=True, kv_transfer_config=object()))
    with pytest.raises(ValueError, match=words):
        check_engine(engine(**changes))


def test_wrong_options_are_refused(graft):
    _, folder, _ = graft
    with pytest.raises(ValueError, match="engram_placement='gpu'"):
        FlatMemory(served(folder), folder, "gpu")
    with pytest.raises(FileNotFoundError, match="hf download"):
        FlatMemory(served(folder), "someone/my-graft")
    with pytest.raises(ValueError, match="loaded already"):
        FlatMemory(served(folder), folder, packs=[folder / PACK] * 2)


def attention_metadata(blocks: list[list[int]], done: list[int], new: list[int], size: int = 4) -> SimpleNamespace:
    """What vLLM says of a batch: blocks of each request, tokens computed before, tokens scheduled."""
    slots = [
        own[place // size] * size + place % size
        for own, first, count in zip(blocks, done, new, strict=True)
        for place in range(first, first + count)
    ]
    width = max(len(own) for own in blocks)
    return SimpleNamespace(
        query_start_loc=torch.tensor([0, *new]).cumsum(0),
        seq_lens=torch.tensor(done) + torch.tensor(new),
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor([own + [0] * (width - len(own)) for own in blocks]),
    )


def test_earlier_ids_are_found_in_chunks_shared_blocks_and_another_order():
    slots = IdsBySlot(reach=2, block_size=4)
    text = list(range(10, 22))
    _, before = slots.history(torch.tensor([*text[:3], 90, 91]), attention_metadata([[5], [2]], [0, 0], [3, 2]))
    assert before.tolist() == [[-1, -1], [-1, -1]]
    # The next chunk crosses a block, and the other request comes first.
    both = torch.tensor([92, *text[3:8]])
    starts, before = slots.history(both, attention_metadata([[2], [5, 1]], [2, 3], [1, 5]))
    assert starts.tolist() == [0, 1, 6] and before.tolist() == [[90, 91], [11, 12]]
    # A third request found both blocks of the first one in the prefix cache.
    _, before = slots.history(torch.tensor([70]), attention_metadata([[5, 1, 7]], [8], [1]))
    assert before.tolist() == [text[6:8]]
    # A preempted request begins anew in blocks that others had; padding has slot -1.
    metadata = attention_metadata([[2, 0]], [0], [6])
    metadata.slot_mapping = torch.cat([metadata.slot_mapping, torch.tensor([-1])])
    _, before = slots.history(torch.tensor([*text[:6], 0]), metadata)
    assert before.tolist() == [[-1, -1]]
    _, before = slots.history(torch.tensor([16]), attention_metadata([[2, 0]], [6], [1]))
    assert before.tolist() == [[14, 15]]


def test_another_layout_of_the_cache_is_refused():
    slots = IdsBySlot(reach=2, block_size=8)
    with pytest.raises(RuntimeError, match="blocks of 8"):
        slots.history(torch.tensor([1]), attention_metadata([[5, 3]], [5], [1], size=4))


IMPORTED = """
import sys
import transformers.configuration_utils as names
vars(names).pop("SubConfigSpec", None)  # as before transformers 5.20
import engram_vllm.flat_memory
ours = {name for name in sys.modules if name.startswith("engram")}
assert ours.isdisjoint({"engram_transformers", "engram_vllm.modeling_engram", "engram_vllm.rows_accelerate_engram"})
try:
    import engram_transformers
except ImportError as error:
    assert "SubConfigSpec" in str(error)
else:
    raise AssertionError("the package itself is imported too: this test blocks nothing")
"""


@pytest.mark.slow  # it imports Transformers anew
def test_the_plugin_is_imported_without_the_package_and_under_older_transformers():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
