"""Saves a graft with what it says, or checks that a saved one still says it: one run in each of two environments.

Run: python -m tests.versions.checkpoint save FOLDER, then python -m tests.versions.checkpoint load FOLDER
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import engram_transformers
from tests.integration.backbones import HEADS
from tests.tiny import engram_on


IDS = torch.arange(24).view(2, 12) * 7 + 5
TOLERANCE = 1e-5  # of logits in float32, whose sums may be taken in another order


@torch.no_grad()
def save(folder: Path):
    model = engram_on(LlamaConfig(**HEADS), (1, 2))
    model.save_pretrained(folder)
    save_file({"logits": model(IDS).logits}, folder / "said.safetensors")


@torch.no_grad()
def load(folder: Path):
    said = load_file(folder / "said.safetensors")["logits"]
    for load_class in (AutoModelForCausalLM, engram_transformers.EngramForCausalLM):
        model = load_class.from_pretrained(folder)
        difference = (model(IDS).logits - said).abs().max().item()
        assert difference < TOLERANCE, f"{load_class.__name__}: {difference} away from what was saved"
        with model.disable_memory():
            assert (model(IDS).logits - said).abs().max() > 100 * TOLERANCE, "the memory says nothing"  # the control


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
