"""DeepSeek-V4.1's memory: what an imported layer adds, against its shards read by hand; the released numbers.

Run with `pytest tests/parity/test_deepseek_v4_1.py`.
"""

import math

import numpy as np
import pytest
import torch
from transformers import DeepseekV4Config

from engram_transformers import EngramConfig, EngramForCausalLM
from engram_transformers.conversion import export_memory, import_memory
from engram_transformers.conversion.foreign_deepseek_v4_1 import LAYOUT
from engram_transformers.conversion.foreign_layouts import SIZES
from engram_transformers.conversion.foreign_weights import from_blocks, to_blocks
from engram_transformers.hash_constants_engram import derive_constants

from ..integration.backbones import deepseek_v4
from ..integration.foreign_memories import V41, raw, save_backbone, v41_folder


RELEASED = {
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384_006_168, 384_016_682],
    "engram_vocab_size": 16_000_000,
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_compressed_vocab_size": 99_092,
    "engram_pad_token_id": 2,
    "hidden_size": 5120,
    "hc_mult": 4,
    "rms_norm_eps": 1e-20,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Shards, and the graft that was made of them; tests only read them."""
    folder = tmp_path_factory.mktemp("v41")
    backbone = save_backbone(deepseek_v4(), folder / "backbone")
    source = v41_folder(folder / "shards")
    return source, import_memory("deepseek-v4.1", source, backbone, folder / "graft")


def values_by_hand(tensors, name: str, across: int, down: int) -> np.ndarray:
    """Float8 values times the power of two of each block of `down` x `across` of them, bit by bit."""
    _, shape, codes = tensors[f"{name}.weight"]
    _, blocks, exponents = tensors[f"{name}.scale"]
    code = np.frombuffer(codes, dtype=np.uint8).reshape(shape).astype(np.int64)
    exponent, fraction = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    scale = 2.0 ** (np.frombuffer(exponents, dtype=np.uint8).reshape(blocks).astype(np.float64) - 127)
    return np.where(code >> 7, -size, size) * scale.repeat(down, 0).repeat(across, 1)


@torch.no_grad()
@pytest.mark.parametrize("placement", ["device", "disk"])
@pytest.mark.parametrize("layer", [1, 2])
def test_what_a_layer_adds_is_what_its_shards_say(layer, placement, folders):
    source, graft = folders
    memory = EngramForCausalLM.from_pretrained(graft, engram_placement=placement).memory
    start = f"layers.{layer}.engram."
    tensors = {name.removeprefix(start): tensor for name, tensor in raw(source, start).items()}
    ids, stream = torch.tensor([[20, 30, 20, 30, 40, 50, 60]]), torch.randn(1, 7, 4, 32)
    added = memory.layers[str(layer)](stream, memory.read(ids, None).vectors(layer))

    table, wkv = values_by_hand(tensors, "embed", 32, 1), values_by_hand(tensors, "wkv", 32, 32)
    vectors = torch.from_numpy(table)[memory.hashing.rows(ids, layer)].flatten(2)  # (B, L, E)
    rounded = vectors.bfloat16().double() @ torch.from_numpy(wkv).T  # (B, L, (M + 1) * D)
    keys, value = rounded[..., :128].unflatten(-1, (4, 32)), rounded[..., None, 128:]
    q, k = (
        torch.frombuffer(bytearray(tensors[n][2]), dtype=torch.bfloat16).view(4, 32) for n in ("q_weight", "k_weight")
    )
    keys = keys / keys.pow(2).mean(-1, keepdim=True).sqrt()
    query = stream.double() / stream.double().pow(2).mean(-1, keepdim=True).sqrt()
    score = (keys * query * (q.double() * k.double())).sum(-1, keepdim=True) / math.sqrt(32)
    expected = torch.sigmoid(torch.copysign(score.abs().clamp(min=1e-6).sqrt(), score)) * value
    error = ((added.double() - expected).abs() / expected.abs().amax()).max()
    assert error < 0.02  # products are in bfloat16 here
    exact = torch.nn.functional.linear(vectors.float(), memory.layers[str(layer)].key_value.weight.float())
    assert torch.allclose(exact.double(), vectors @ torch.from_numpy(wkv).T, rtol=1e-4, atol=1e-3 * exact.abs().max())


def test_released_numbers():
    """Primes, multipliers, heights, types and bytes of the released shards; no table is made."""
    memory = LAYOUT.read({"text_config": RELEASED}, {})
    backbone = DeepseekV4Config(hidden_size=5120, num_hidden_layers=40, vocab_size=129_280)
    classes = memory.backbone["engram_compressed_vocab_size"]
    fields = {**memory.fields, **LAYOUT.fixed, "engram_compressed_vocab_size": classes}
    config = EngramConfig(text_config=backbone, engram_layer_ids=memory.layer_ids, **fields)
    constants = derive_constants(config, None)
    assert constants.multipliers.tolist() == [
        [76632096046245, 4839876093313, 35959672319349, 73987337458391],
        [67716810739261, 51510806800915, 30921347202721, 82619226485591],
    ]
    primes = constants.primes.flatten(1)
    assert primes[:, [0, -1]].tolist() == [[16_000_057, 16_000_463], [16_000_477, 16_000_889]]
    assert primes.sum(1).tolist() == RELEASED["engram_num_embeddings"] == memory.rows
    data = []
    for number, rows in enumerate(memory.rows):
        places = LAYOUT.weight_map(config, number, {"rows": memory.rows})
        assert {name: place.shape for name, place in places.items()} == {
            "embed.weight": (rows, 256),
            "embed.scale": (rows, 8),
            "wkv.weight": (25_600, 6_144),
            "wkv.scale": (800, 192),
            "q_weight": (4, 5_120),
            "k_weight": (4, 5_120),
        }
        data.append(sum(math.prod(place.shape) * SIZES[place.dtype] for place in places.values()))
    assert data == [101_535_150_272, 101_537_925_968]  # the released files, less their headers of 664 and 672 bytes


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("engram_num_embeddings", [1362, 1553], "tables have .1362, 1553. rows"),
        ("engram_compressed_vocab_size", 2764, "engram_compressed_vocab_size=2764"),
        ("engram_vocab_size", 212, "tables have"),
    ],
)
def test_a_configuration_of_another_hash_is_refused(name, value, said, folders, tmp_path):
    source = v41_folder(tmp_path / "shards")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace(f'"{name}": {V41[name]}', f'"{name}": {value}'))
    with pytest.raises(ValueError, match=said):
        import_memory("deepseek-v4.1", source, folders[0].parent / "backbone", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_values_that_bfloat16_does_not_hold_are_refused(folders, tmp_path):
    source = v41_folder(tmp_path / "shards")
    path = source / "model-00047-of-00048.safetensors"
    content = bytearray(path.read_bytes())
    place = content.index(raw(source, "1.engram.wkv.weight")["layers.1.engram.wkv.weight"][2])
    content[place + 5] = 0x7F  # NaN
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'wkv.weight' holds values that are NaN"):
        import_memory("deepseek-v4.1", source, folders[0].parent / "backbone", tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == ["shards"]


def test_blocks_without_their_scales_are_exported_with_the_same_values(folders, tmp_path):
    """What training saved elsewhere has no kept scales: values are the same, bytes need not be."""
    source, graft = folders
    EngramForCausalLM.from_pretrained(graft).save_pretrained(tmp_path / "saved")
    exported = raw(export_memory("deepseek-v4.1", tmp_path / "saved", tmp_path / "out"), "")
    expected = raw(source, "")
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        if "wkv" not in name:
            assert tensor == expected[name]
    for layer in ("layers.1.engram.", "layers.2.engram."):
        found, own = (
            values_by_hand({name.removeprefix(layer): t for name, t in tensors.items()}, "wkv", 32, 32)
            for tensors in (exported, expected)
        )
        assert (found == own).mean() > 0.99  # a scale may round the smallest values of a block away
        assert np.abs(found - own).max() <= 2.0**-9 * 8  # the step of a block whose scale is 2 ** 3


def test_blocks_that_changed_get_a_scale_that_holds_them():
    values, scales = torch.randn(40, 70), torch.full((2, 3), 127, dtype=torch.uint8)
    codes, kept = to_blocks(values, scales)
    exact = from_blocks(codes, kept)
    assert not torch.equal(kept, scales) and (exact - values).abs().max() < 0.07 * values.abs().max()
    again, same = to_blocks(exact, kept)
    assert torch.equal(again, codes) and torch.equal(same, kept)
    changed = exact.clone()
    changed[0, 0] = 4096.0
    _, other = to_blocks(changed, kept)
    assert (other != kept).sum() == 1 and other[0, 0] == 127 + 4  # 4096 / 448 is between 2 ** 3 and 2 ** 4
    assert torch.equal(to_blocks(torch.tensor([[448.0]]))[1], torch.tensor([[127]], dtype=torch.uint8))
    assert not to_blocks(torch.zeros(3, 3))[0].any()
