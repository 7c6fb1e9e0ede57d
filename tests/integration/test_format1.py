"""Checkpoints of format 1: what commit eff79cb saved loads today and gives what it gave then, wherever its tables are.

tests/fixtures/format1/make.py says how the files were made. Addresses and rows must be equal to the last bit. Logits in
float32 may differ by 1e-5, as in the golden forward passes, since kernels of the CPU round differently; logits in
bfloat16 by 0.05, of numbers up to 4.

Run: pytest tests/integration/test_format1.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engram_transformers import EngramTrainer, EngramTrainingArguments
from engram_transformers.conversion import graft
from engram_transformers.inspection import verify_checkpoint


FORMAT1 = Path(__file__).parents[1] / "fixtures" / "format1"
BASE_THEN = "/tmp/format1/float32"
OLD_NAME = "memory_pack.safetensors"  # of what training changed
PLACES = ("device", "cpu", "disk")
EXPECTED = load_file(FORMAT1 / "expected.safetensors")

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]


@pytest.fixture
def format1(tmp_path) -> Path:
    """A copy of the folders, in which the pack and the adapter name the base where it is now."""
    folder = tmp_path / "format1"
    shutil.copytree(FORMAT1, folder)
    pack = folder / "pack" / OLD_NAME
    with safe_open(pack, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["base"] == BASE_THEN
    save_file(load_file(pack), pack, metadata | {"base": str(folder / "float32")})
    settings = folder / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(BASE_THEN, str(folder / "float32")))
    return folder


def load(folder: Path, place: str = "device", **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, engram_placement=place, **kwargs).eval()


@torch.no_grad()
def check(model, name: str, tolerance: float = 1e-5) -> None:
    """Compares addresses, rows, logits and a generated text with those of that time."""
    ids, mask = EXPECTED["input_ids"], EXPECTED["attention_mask"]
    state = model.state_dict()
    for layer_id in model.config.engram_layer_ids:
        addresses = model.memory.hashing.rows(torch.where(mask == 1, ids, -1), layer_id)
        assert torch.equal(addresses, EXPECTED[f"{name}.addresses.{layer_id}"])
        # Names sort by order and part, which is the order of the rows.
        parts = [state[key] for key in sorted(state) if key.startswith(f"memory.tables.{layer_id}.")]
        assert torch.equal(torch.cat(parts)[addresses], EXPECTED[f"{name}.rows.{layer_id}"])
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected, alive = EXPECTED[f"{name}.logits"], mask == 1
    assert logits.dtype == expected.dtype
    assert (logits - expected)[alive].abs().max() <= tolerance
    without = EXPECTED[f"{name}.logits_without_memory"]
    assert (without - expected)[alive].abs().max() > 1, "control: the memory changes the logits"
    if logits.dtype == torch.float32:  # in bfloat16 two tokens may be as likely
        generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(generated, EXPECTED[f"{name}.generated"])


@pytest.mark.parametrize("place", PLACES)
def test_a_graft_in_float32_gives_what_it_gave(format1, place):
    model = load(format1 / "float32", place)
    assert model.memory.placement == place
    check(model, "float32")


@pytest.mark.parametrize("place", PLACES)
def test_a_graft_in_bfloat16_with_tables_in_parts_gives_what_it_gave(format1, place):
    check(load(format1 / "bfloat16", place), "bfloat16", tolerance=0.05)
    check(load(format1 / "bfloat16", place, dtype=torch.float32), "bfloat16_in_float32")


@pytest.mark.parametrize("place", PLACES)
def test_what_a_trainer_saved_brings_its_base_with_it(format1, place):
    check(load(format1 / "pack", place), "pack")


@pytest.mark.parametrize("place", PLACES)
def test_what_a_trainer_saved_is_loaded_into_its_base(format1, place):
    model = load(format1 / "float32", place)
    model.load_memory_delta(FORMAT1 / "pack")  # as it was written: the folder that it names is not there
    check(model, "pack")


def test_a_run_goes_on_from_what_a_trainer_saved(format1, tmp_path):
    model = load(format1 / "float32")
    arguments = EngramTrainingArguments(str(tmp_path / "run"), max_steps=3, report_to=[], use_cpu=True)
    data = [{"input_ids": ids, "labels": ids} for ids in EXPECTED["input_ids"]]
    trainer = EngramTrainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(format1 / "pack"))
    assert trainer.state.global_step == 3, "all of its steps were made"
    check(model.eval(), "pack")


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_brings_its_memory_by_pefts_own_loading(format1, place):
    model = PeftModel.from_pretrained(load(format1 / "float32", place), format1 / "adapter")
    check(model.get_base_model(), "adapter")


@pytest.mark.native_peft
@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_brings_its_memory_by_loading_of_transformers(format1, place):
    check(load(format1 / "adapter", place), "adapter")
    model = load(format1 / "float32", place)
    model.load_adapter(str(format1 / "adapter"))
    check(model.eval(), "adapter")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "pack"])
def test_what_was_trained_is_what_learns(format1, name):
    model = load(format1 / name)
    assert '"engram_train_mode": "memory"' in (format1 / name / "config.json").read_text()
    learning = {parameter.requires_grad for parameter in model.memory.parameters()}
    assert learning == {True}
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_checkpoint_passes_its_verification(format1, name):
    findings = verify_checkpoint(format1 / name)
    assert [finding.section for finding in findings] == ["files", "constants", "tokenizer", "generation"]
    assert [finding.detail for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_receipt_gives_the_same_graft_again(format1, tmp_path, name):
    receipt = json.loads((format1 / name / "engram_graft.json").read_text())
    config = json.loads((format1 / name / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**config["text_config"])).save_pretrained(tmp_path / "donor")
    AutoTokenizer.from_pretrained(format1 / name).save_pretrained(tmp_path / "donor")
    made = load(graft(tmp_path / "donor", tmp_path / "again", **receipt["recipe"]))
    assert made.config.engram_token_map_sha256 == receipt["token_map_sha256"] == config["engram_token_map_sha256"]
    assert made.config.engram_hash_sha256 == receipt["hash_sha256"] == config["engram_hash_sha256"]
    again = json.loads((tmp_path / "again" / "engram_graft.json").read_text())
    assert receipt.keys() - {"donor_files"} <= again.keys() and again["recipe"] == receipt["recipe"]


def memories(folder: Path) -> set[str]:
    """Files of a memory's changes, under any name."""
    return {path.name for path in folder.glob("memory*.safetensors")}


def test_a_whole_save_replaces_what_a_trainer_saved(format1):
    model = load(format1 / "pack", "cpu")
    model.save_pretrained(format1 / "pack")
    assert memories(format1 / "pack") == set()
    check(load(format1 / "pack"), "pack")


def test_a_save_of_an_adapter_replaces_its_memory(format1):
    model = PeftModel.from_pretrained(load(format1 / "float32"), format1 / "adapter")
    model.save_pretrained(format1 / "adapter")
    assert len(memories(format1 / "adapter")) == 1
    check(PeftModel.from_pretrained(load(format1 / "float32"), format1 / "adapter").get_base_model(), "adapter")


def test_a_save_of_an_adapter_alone_removes_the_memory_of_the_last_one(format1):
    assert memories(format1 / "adapter") == {OLD_NAME}, "control"
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(format1 / "float32"), lora).save_pretrained(format1 / "adapter")
    assert memories(format1 / "adapter") == set()
    assert OLD_NAME not in (format1 / "adapter" / "adapter_config.json").read_text()
