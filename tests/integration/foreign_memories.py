"""Folders of foreign memories, and backbones for them: the demo's golden weights, a tiny Qwen4-Exp, shards of the shape
of DeepSeek-V4.1's."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
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


def stored(folder: Path, part: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a folder's files whose names hold `part`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: tensor for name, tensor in load_file(path).items() if part in name}
    return found
