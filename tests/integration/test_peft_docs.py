"""The code blocks of docs/peft.md run, in order, and say what the page says.

Run: pytest tests/integration/test_peft_docs.py
"""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engram_transformers import EngramForCausalLM


PAGE = Path(__file__).parents[2] / "docs" / "peft.md"


@pytest.mark.native_peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_the_code_of_the_page_runs(tiny_donor, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_donor().save_pretrained("my-donor")
    tiny_tokenizer.save_pretrained("my-donor")
    texts = torch.randint(3, 300, (24, 20), generator=torch.Generator().manual_seed(1))
    names = {"dataset": [{"input_ids": text, "labels": text} for text in texts]}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    plain = tiny_donor()
    for number, block in enumerate(blocks):
        exec(compile(block, str(PAGE), "exec"), names)
        if number == 0:
            saved = {path.name for path in Path("my-adapter").iterdir()}
            assert saved >= {"adapter_model.safetensors", "memory_delta.safetensors"}
        if number == 2:
            expected = plain(**names["inputs"]).logits
            assert torch.equal(names["donor"], expected)
            assert not torch.equal(names["memory_alone"], expected)
            assert isinstance(names["merged"], EngramForCausalLM)
        if number == 5:
            assert isinstance(names["model"], EngramForCausalLM)
            assert names["model"].active_adapters() == ["default"]
    renamed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("my-donor"), "plain-adapter")
    assert torch.equal(renamed(**names["inputs"]).logits, names["adapter_alone"])
