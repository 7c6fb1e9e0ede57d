"""LoRA over a quantised backbone, with a memory in full precision that learns beside it, as in QLoRA.

Compared bit for bit with the plain donor, quantised and adapted in the same way. A quantiser that is not installed is
skipped.

Run: pytest tests/integration/test_peft_quantised.py
"""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig, TrainingArguments

from engram_transformers import EngramTrainer

from .adapted import adapted, logits, lora, near
from .backbones import HEADS


pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes(**bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes cannot be imported", exc_type=ImportError)
    return BitsAndBytesConfig(**bits)


QUANTISERS = {
    "torchao int8": torchao_int8,
    "bitsandbytes 8 bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4 bit": lambda: bitsandbytes(load_in_4bit=True),
}


@pytest.mark.parametrize("name", QUANTISERS)
def test_lora_and_memory_learn_over_a_quantised_backbone(name, tiny_donor, tiny_engram, tmp_path):
    QUANTISERS[name]()  # skips before anything is made
    donor = tiny_donor(LlamaConfig(**{**HEADS, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}))
    donor.save_pretrained(tmp_path / "donor")
    tiny_engram(trained=True, donor=donor).save_pretrained(tmp_path / "graft")

    def loaded(kind):
        return AutoModelForCausalLM.from_pretrained(tmp_path / kind, quantization_config=QUANTISERS[name]())

    model = adapted(loaded("graft"), config=lora(target_modules=["q_proj", "v_proj"]))
    with model.disable_memory():
        expected = logits(adapted(loaded("donor"), config=lora(target_modules=["q_proj", "v_proj"])))
        assert torch.equal(logits(model), expected)
    assert not near(logits(model), expected), "control: the memory is seen"

    # Anew: on a CPU bitsandbytes packs 4-bit weights for inference when they are first used without gradients, and
    # gives none from then on.
    model = adapted(loaded("graft"), config=lora(target_modules=["q_proj", "v_proj"]))
    texts = torch.randint(3, 300, (8, 20), generator=torch.Generator().manual_seed(1))
    plain = {n: p for n, p in model.named_parameters() if type(p) is torch.nn.Parameter}  # quantised ones cannot learn
    before = {n: p.detach().clone() for n, p in plain.items()}
    model.set_trainable("memory+lora")
    settings = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
    )
    dataset = [{"input_ids": text, "labels": text} for text in texts]
    EngramTrainer(model, settings, train_dataset=dataset).train()
    changed = {n for n, p in plain.items() if not torch.equal(p.detach(), before[n])}
    assert changed and all("lora_" in n or ".memory." in n for n in changed)
    assert {"lora_A" in n for n in changed} == {True, False}

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded("graft"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))
