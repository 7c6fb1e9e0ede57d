"""A checkpoint's own copy of the code, in a process without the package, keeps a memory with its adapter as well.

Run: pytest tests/integration/test_peft_remote.py
"""

import subprocess
import sys

import torch


SCRIPT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "engram_transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
graft, adapter = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(graft, trust_remote_code=True)
from peft import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(model, LoraConfig(init_lora_weights=False)).eval()
model.train_mode("memory+lora")
ids = torch.arange(3, 20)[None]
with torch.no_grad():
    for table in model.memory.tables.parameters():
        table += 1
    expected = model(ids).logits
    model.save_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(graft, trust_remote_code=True)
    assert not torch.equal(plain(ids).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(plain, adapter)(ids).logits, expected)
    native = AutoModelForCausalLM.from_pretrained(graft, trust_remote_code=True)
    native.load_adapter(adapter)
    assert torch.equal(native(ids).logits, expected)
    print(type(native).__module__, float(expected.double().abs().sum()))
"""


def test_remote_code_saves_and_loads_a_memory_with_its_adapter(tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    model.save_pretrained(tmp_path / "graft")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "graft"), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    module, size = done.stdout.split()[-2:]
    assert module.startswith("transformers_modules.")
    model.load_adapter(str(tmp_path / "adapter"))  # the package reads what the copy wrote
    with torch.no_grad():
        again = float(model(torch.arange(3, 20)[None]).logits.double().abs().sum())
    assert abs(again - float(size)) < 1e-9 * float(size)
