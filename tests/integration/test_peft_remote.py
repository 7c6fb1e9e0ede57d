"""A checkpoint's own copy of the code, in a process where the package cannot be imported: it patches nothing, loads
adapters without a memory, and refuses the rest with what to install.

One process asks everything. The same folders load where the package is (tests/integration/test_peft_memory.py), and an
adapter without a memory is the control.

Run: pytest tests/integration/test_peft_remote.py
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from engram_transformers.adapters import save_changes

from .adapted import adapted, ids, logits, near
from .placed import loaded
from .test_peft_memory import train


SCRIPT = """
import json, sys, types
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "engram_transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
graft, plain, adapter, changes, cache, out = sys.argv[1:]
ids = torch.tensor(json.loads(sys.stdin.read()))

def load(folder=graft):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits.tolist()

finders = list(sys.meta_path)
model = load()
said = {"module": type(model).__module__, "graft": logits(model)}
said["finders"] = sys.meta_path == finders
said["peft"] = "peft" in sys.modules

import peft
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
load()
said["functions"] = sorted({
    held.__code__.co_filename
    for owner in (PeftModel, peft.PeftMixedModel, BaseTuner)
    for held in (getattr(held, "__func__", held) for held in vars(owner).values())
    if isinstance(held, types.FunctionType)
})
said["by peft"] = logits(PeftModel.from_pretrained(load(), plain))
native = load()
native.load_adapter(plain)
said["by transformers"] = logits(native)
try:
    native.save_pretrained(out)
    said["saved again"] = logits(PeftModel.from_pretrained(load(), out))
except ValueError as error:  # Transformers wants a newer PEFT
    said["saved again"] = str(error)

def refuse_saving():
    for parameter in native.memory.layers.parameters():
        parameter.requires_grad_(True)
    native.save_pretrained(out + "/learning")

token_map = model.memory.hashing.token_map

def donor():
    return get_peft_model(AutoModelForCausalLM.from_config(model.config.text_config), LoraConfig())

refusals = {
    "load_adapter": lambda: load().load_adapter(adapter),
    "load_adapter of a repository": lambda: load().load_adapter("some/adapter", adapter_kwargs={"cache_dir": cache}),
    "from_pretrained of an adapter": lambda: load(adapter),
    "from_pretrained of PEFT": lambda: PeftModel.from_pretrained(load(), adapter),
    "load_adapter of PEFT": lambda: PeftModel.from_pretrained(load(), plain).load_adapter(adapter, "second"),
    "from_pretrained of PEFT, mixed": lambda: peft.PeftMixedModel.from_pretrained(load(), adapter),
    "from_pretrained of changes": lambda: load(changes),
    "set_trainable": lambda: load().set_trainable("memory"),
    "save_pretrained of a memory that learns": refuse_saving,
    "from_backbone of a donor with adapters": lambda: type(model).from_backbone(donor(), "no tokenizer"),
    "a backbone with adapters": lambda: type(model)(load().config, donor().get_base_model(), token_map),
}
for name, act in refusals.items():
    try:
        act()
        said[name] = "nothing"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""
REFUSALS = [line.split('"')[1] for line in SCRIPT.splitlines() if line.startswith('    "')]


@pytest.fixture(scope="module")
def said(saved, tmp_path_factory):
    """What the process without the package said, and what adapter and graft say where the package is."""
    folder = tmp_path_factory.mktemp("remote")
    model = adapted(loaded(saved))
    model.save_pretrained(folder / "plain")
    expected = {"plain": logits(model), "graft": logits(loaded(saved))}
    train(model.get_base_model())
    model.save_pretrained(folder / "adapter")
    save_changes(train(loaded(saved)), folder / "changes")
    repository = folder / "models--some--adapter"
    shutil.copytree(folder / "adapter", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    folders = [saved, folder / "plain", folder / "adapter", folder / "changes", folder, folder / "again"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        input=json.dumps(ids().tolist()),
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), expected


def test_it_runs_the_checkpoints_own_code(said):
    found, expected = said
    assert found["module"].startswith("transformers_modules.")
    assert near(torch.tensor(found["graft"]), expected["graft"])


def test_making_and_loading_a_model_installs_no_import_hook_and_patches_nothing(said):
    found, _ = said
    assert found["finders"] and not found["peft"]
    assert found["functions"], "control: there are functions to look at"
    assert [path for path in found["functions"] if "/peft/" not in path and not path.endswith("contextlib.py")] == []


@pytest.mark.native_peft
@pytest.mark.parametrize("way", ["by peft", "by transformers", "saved again"])
def test_an_adapter_without_a_memory_is_loaded(way, said):
    found, expected = said
    if isinstance(found[way], str):
        raise ValueError(found[way])
    assert near(torch.tensor(found[way]), expected["plain"])
    assert not near(expected["plain"], expected["graft"]), "control: the adapter is seen"


@pytest.mark.parametrize("way", REFUSALS)
def test_what_would_lose_a_memory_or_train_it_is_refused_with_what_to_install(way, said):
    found, _ = said
    assert found[way].startswith("ImportError: ")
    assert "pip install engram-transformers" in found[way] and "import engram_transformers" in found[way]
