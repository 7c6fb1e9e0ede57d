"""Folders of foreign memories, and backbones for them: the demo's golden weights, a tiny Qwen4-Exp, shards of the shape
of DeepSeek-V4.1's."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV4Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen4ExpTextConfig,
)

from ..tiny import GOLDEN
from .backbones import deepseek_v4, qwen4_exp


def save_backbone(config: PreTrainedConfig, folder: Path) -> Path:
    """A backbone with the golden tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    return folder


def demo_backbone(name: str) -> PreTrainedConfig:
    """A configuration of the width, streams and depth that the demo's golden memory of this name needs."""
    if name == "B_bigram_1head":
        return LlamaConfig(
            vocab_size=4104, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    made_of_depth = ("layer_types", "mlp_layer_types")
    sizes = {name: value for name, value in deepseek_v4().to_dict().items() if name not in made_of_depth}
    return DeepseekV4Config(**{**sizes, "hidden_size": 24, "num_hidden_layers": 16})


def demo_folder(name: str, folder: Path) -> Path:
    """The demo's golden weights of this name, as a user saves them, and the fields of its configuration."""
    folder.mkdir(parents=True)
    arrays = np.load(GOLDEN / f"forward_{name}.npz")
    weights = {key: torch.from_numpy(arrays[key]) for key in arrays if "/w/" in key}
    named = {"layers." + key[1:].replace("/w/", ".engram."): tensor for key, tensor in weights.items()}
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((GOLDEN / f"hash_{name}.json").read_text())["config"]))
    return folder


def qwen_config(**fields) -> Qwen4ExpTextConfig:
    """Qwen4-Exp with memories in its first and third layer."""
    config = qwen4_exp().to_dict()
    del config["number_of_conv_states"]  # a memory needs more of them
    sizes = {"ple_layer_ids": [1, 3], "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 100}
    shards = {"split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 64}
    return Qwen4ExpTextConfig(**{**config, **sizes, **shards, **fields})


@torch.no_grad()
def qwen_model(**fields):
    """A model of `qwen_config` in which every weight of the memories is random."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(qwen_config(**fields)).eval()
    for name, parameter in model.named_parameters():
        if ".ple." in name:
            parameter.normal_(0.0, 1.0 if "embedding" in name else 0.3)
    return model


# The memory of the tiny DeepSeek-V4.1: `text_config` as released, with smaller numbers.
V41 = {
    "engram_layer_ids": [1, 2],
    "engram_num_embeddings": [1362, 1552],
    "engram_vocab_size": 200,
    "engram_max_ngram_size": 4,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_compressed_vocab_size": 2763,
    "engram_pad_id": 2,
    "hidden_size": 32,
    "hc_mult": 4,
    "rms_norm_eps": 1e-20,
}


def v41_folder(folder: Path) -> Path:
    """Two shards as the released ones: float8 of all values but NaN in the first, scales of 2 ** -17 to 2 ** 3."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": V41}))
    numbers = np.random.default_rng(0)
    for file, layer, rows in zip((47, 48), V41["engram_layer_ids"], V41["engram_num_embeddings"], strict=True):
        shapes = {"embed": ((rows, 64), (rows, 2)), "wkv": ((160, 384), (5, 12))}
        tensors = {}
        for name, (values, scales) in shapes.items():
            signs = numbers.integers(0, 2, values, dtype=np.uint8) << 7
            # The scales of layer 2 are larger than its values need, so that an export cannot find them out.
            codes = numbers.integers(0, 127 if layer == 1 else 96, values, dtype=np.uint8) | signs
            tensors[f"{name}.weight"] = ("F8_E4M3", values, codes.tobytes())
            exponents = numbers.integers(110, 131, scales, dtype=np.uint8)
            tensors[f"{name}.scale"] = ("F8_E8M0", scales, exponents.tobytes())
        for name in ("q_weight", "k_weight"):
            norm = torch.randn(4, 32, generator=torch.Generator().manual_seed(layer)).bfloat16()
            tensors[name] = ("BF16", (4, 32), norm.view(torch.uint8).numpy().tobytes())
        named = {f"layers.{layer}.engram.{name}": tensor for name, tensor in tensors.items()}
        write_raw(folder / f"model-{file:05d}-of-00048.safetensors", named)
    return folder


def write_raw(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Writes a safetensors file from types, shapes and bytes."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end := end + len(data)]}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(data for _, _, data in tensors.values()))


def raw(folder: Path, *parts: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Types, shapes and bytes of all tensors of a folder's files whose names hold one of `parts`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        whole = path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if any(part in name for part in parts):
                first, last = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], tuple(entry["shape"]), whole[first:last])
    return found
