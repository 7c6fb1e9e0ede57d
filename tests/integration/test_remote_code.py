"""The door: a saved folder carries its own code, and loads with `trust_remote_code=True` where nothing is installed.

Each case is a process that has imported Transformers alone. Run: pytest tests/integration/test_remote_code.py
"""

import ast
import json
import shutil

import pytest
import torch

from engram_transformers import EngramForCausalLM

from ..packs import classes_of, ngrams_in, pack_of
from .composites import composite_donor, needs_whole_composites
from .forked import Forked


pytestmark = pytest.mark.core

SCRIPT = """
import json, sys
folder, block, trust, code = sys.argv[1], sys.argv[2] == "block", sys.argv[3] == "trust", sys.argv[4]
if block:
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "engram_transformers":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModel, AutoModelForCausalLM
exec(code)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
ids = torch.arange(3, 20)[None]
with torch.no_grad():
    logits = model(ids).logits
again = sys.argv[5]
if again:
    model.save_pretrained(again)
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=trust)
        assert torch.equal(other(ids).logits, logits)
        headless = AutoModel.from_pretrained(again, trust_remote_code=trust)
        assert headless(ids).last_hidden_state.shape == (1, 17, 32)
print(json.dumps({"module": type(model).__module__, "sum": float(logits.double().abs().sum())}))
"""


@pytest.fixture
def saved(tiny_engram, tmp_path):
    model = tiny_engram(trained=True).set_trainable("memory")
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = float(model(torch.arange(3, 20)[None]).logits.double().abs().sum())
    return tmp_path / "saved", expected


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with Forked("import torch, transformers.modeling_utils", HF_HOME=home, HF_HUB_OFFLINE="1") as forked:
        yield forked, home


@pytest.fixture
def run(process, tmp_path):
    """`run(folder, block, trust, code="", again="", script=SCRIPT)`: in a process whose cache of code is empty."""

    def run_script(folder, block, trust, code="", again="", script=SCRIPT):
        shutil.rmtree(process[1], ignore_errors=True)
        return process[0].run(script, folder, block, trust, code, again, cwd=tmp_path)

    return run_script


def test_the_folder_holds_the_real_configuration_and_no_import_of_the_package(saved):
    folder, _ = saved
    for path in folder.glob("*.py"):
        imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any((node.module or "").startswith("engram_transformers") for node in imported), path.name
    assert "class EngramConfig" in (folder / "configuration_engram.py").read_text()
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }


def test_without_the_package_the_folders_own_code_is_used(run, saved, tmp_path):
    folder, expected = saved
    done = run(folder, "block", "trust", again=tmp_path / "again")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["module"].startswith("transformers_modules.")
    assert result["sum"] == pytest.approx(expected, rel=1e-9)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["engram_trainable"] == "memory", "kept for whoever trains it, though nothing is trained here"
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in (tmp_path / "again").glob("*.py")}


PACK_SCRIPT = """
import json, sys
folder, pack = sys.argv[1], sys.argv[4]
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(3, 20).repeat(2, 1)
name = model.load_memory(pack)
with torch.no_grad():
    read = model(ids, memory_names=[name, None]).logits.double().abs().sum((1, 2)).tolist()
try:
    model.teach([], None)
except ImportError as error:
    print(json.dumps({"read": read, "active": model.active_memories, "error": str(error)}))
"""


def test_the_folders_own_code_reads_a_pack(run, tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    model.save_pretrained(tmp_path / "saved")
    ids = torch.arange(3, 20)
    pack = pack_of(model, ngrams_in(classes_of(model, ids))).save(tmp_path / "people.engram-pack.safetensors")
    done = run(tmp_path / "saved", "block", "trust", str(pack), script=PACK_SCRIPT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    model.load_memory(pack)
    with torch.no_grad():
        here = model(ids.repeat(2, 1), memory_names=["people", None]).logits.double().abs().sum((1, 2))
    assert result["active"] == ["people"] and result["read"] == pytest.approx(here.tolist(), rel=1e-9)
    assert abs(result["read"][0] - result["read"][1]) > 1
    assert "teaching facts" in result["error"]


@needs_whole_composites
def test_a_whole_composite_model_runs_on_the_folders_own_code(run, fill_memory, tiny_tokenizer, tmp_path):
    donor = composite_donor("smolvlm")
    model = fill_memory(EngramForCausalLM.from_backbone(donor, tiny_tokenizer, [0, 1], engram_vocab_size=200))
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = float(model(torch.arange(3, 20)[None]).logits.double().abs().sum())
    done = run(tmp_path / "saved", "block", "trust", again=tmp_path / "again")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["sum"] == pytest.approx(expected, rel=1e-9)


def test_with_the_package_installed_but_not_imported_remote_code_still_works(run, saved, tmp_path):
    folder, expected = saved
    done = run(folder, "open", "trust")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["sum"] == pytest.approx(expected, rel=1e-9)


def test_with_the_package_imported_no_trust_is_needed_and_its_code_wins(run, saved, tmp_path):
    folder, expected = saved
    done = run(folder, "open", "no", "import engram_transformers", again=tmp_path / "again")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["module"] == "engram_transformers.modeling_engram"
    assert result["sum"] == pytest.approx(expected, rel=1e-9)


def test_without_package_and_without_trust_nothing_is_run(run, saved, tmp_path):
    done = run(saved[0], "block", "no")
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


LATER = "import transformers\ntransformers.__version__ = '5.31.0'\n"
# What our copies of the code build on, in the file that is read first and in one behind it.
DROPPED = {
    "a name of the configuration": "import transformers.configuration_utils as m\ndel m.SubConfigSpec\n",
    "a name of a module behind it": "import transformers.cache_utils as m\ndel m.LinearAttentionCacheLayerMixin\n",
}
WHAT_TO_DO = ("install transformers>=5.20.2,<5.25, or a newer engram-transformers", "pip install .", "make wheel")


def test_a_copy_of_the_code_under_a_later_transformers_says_which_package_to_install(run, saved, tmp_path):
    folder, expected = saved
    done = run(folder, "block", "trust", LATER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["sum"] == pytest.approx(expected, rel=1e-9)
    said = " ".join(done.stderr.split())
    assert "this is 5.31.0" in said and all(text in said for text in WHAT_TO_DO)
    control = run(folder, "block", "trust")
    assert control.returncode == 0 and "engram-transformers" not in control.stderr


@pytest.mark.parametrize("dropped", DROPPED)
def test_a_copy_of_the_code_that_misses_a_name_says_which_package_to_install(run, dropped, saved, tmp_path):
    done = run(saved[0], "block", "trust", LATER + DROPPED[dropped])
    assert done.returncode != 0
    error = done.stderr[done.stderr.rindex("\nImportError: ") :]  # the last one, which ends the program
    assert "cannot run under transformers 5.31.0" in error and all(text in error for text in WHAT_TO_DO)


TRAINED = """
import engram_transformers
from engram_transformers import EngramTrainer
from engram_transformers.training import create_optimizer
from peft import PeftModel
for make in (EngramTrainer, create_optimizer, lambda model: PeftModel.from_pretrained(model, sys.argv[5])):
    try:
        make(model)
    except TypeError as error:
        print(error)
again = AutoModelForCausalLM.from_pretrained(folder)
print(type(create_optimizer(again)).__name__)
"""


def test_a_model_with_its_own_copy_of_the_code_is_refused_where_the_package_must_know_it(run, saved, tmp_path):
    folder, _ = saved
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"engram_memory_delta": "memory_delta.safetensors"}))
    script = SCRIPT.split("model.save_pretrained")[0].rsplit("again = ", 1)[0] + TRAINED
    done = run(folder, "", "trust", again=adapter, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    *refused, control = done.stdout.splitlines()
    assert len(refused) == 3 and control == "EngramOptimizer"
    for line in refused:
        assert "transformers_modules" in line and "import engram_transformers" in line and "from_pretrained" in line
