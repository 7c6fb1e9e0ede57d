"""examples/finetune_peft.py runs from its command line on a tiny donor, and what it leaves is what it says.

Run: pytest tests/integration/test_examples_peft.py
"""

import re
import runpy
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from .adapted import ids, logits


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Sentences that are easy to learn by heart."""
    path = tmp_path_factory.mktemp("texts") / "notes.txt"
    path.write_text("\n".join(f"The tower of town {n % 7} was built in {1000 + n % 7}." for n in range(60)))
    return path


@pytest.mark.native_peft
@pytest.mark.parametrize("start", ["donor", "graft"])
def test_the_example_teaches_memory_and_lora_and_leaves_both(
    start, tiny_donor, tiny_engram, tiny_tokenizer, texts, tmp_path, monkeypatch, capsys
):
    model = tiny_donor() if start == "donor" else tiny_engram()
    model.save_pretrained(tmp_path / "start")
    tiny_tokenizer.save_pretrained(tmp_path / "start")
    options = f"--model {tmp_path / 'start'} --text {texts} --out {tmp_path} --rows 200 --length 16 --max-steps 12"
    monkeypatch.setattr(sys, "argv", ["finetune_peft", *options.split(), "--lr", "0.01"])
    runpy.run_module("examples.finetune_peft", run_name="__main__")
    said = re.search(r"donor ([\d.]+), LoRA ([\d.]+), memory ([\d.]+), both ([\d.]+) nats", capsys.readouterr().out)
    donor, lora, memory, both = map(float, said.groups())
    assert both < min(lora, memory) < donor
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} >= {"adapter_model.safetensors", "memory_delta.safetensors"}
    assert (tmp_path / "graft").exists() == (start == "donor")
    graft = AutoModelForCausalLM.from_pretrained(tmp_path / ("graft" if start == "donor" else "start"))
    plain = logits(graft)
    loaded = PeftModel.from_pretrained(graft, folder)
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert not torch.equal(logits(loaded, ids()), plain), "control"
