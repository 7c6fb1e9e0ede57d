"""Teaches a model with TRL's SFTTrainer: LoRA in the backbone and the memory, in one run.

Shows what a memory adds to a script of TRL: the mixin, and the word that says what is trained. Documents are packed into
full rows, and n-grams stop at their borders. What is saved is the adapter with the memory's changes, not the model.

Run: pip install "engram-transformers[trl]" && python -m examples.finetune_trl --text notes.txt --max-steps 60
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from engram_transformers.conversion import graft
from engram_transformers.training import EngramTrainerMixin, EngramTrainingArguments

from .texts import WORDNET, read_texts


class MemorySFTTrainer(EngramTrainerMixin, SFTTrainer):
    """SFTTrainer that trains rows, clips them and saves them."""


@dataclass
class MemorySFTConfig(SFTConfig, EngramTrainingArguments):
    """SFTConfig with the memory's settings beside."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub model")
    parser.add_argument("--text", default=WORDNET, help="a text a line, or JSON lines")
    parser.add_argument("--out", default="runs/finetune_trl")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each of the memory's 32 heads")
    parser.add_argument("--max-steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=256, help="tokens that documents are packed into")
    return parser.parse_args()


def main() -> None:
    args, out = arguments(), Path(arguments().out)
    base = out / "graft"
    if not base.exists():
        graft(args.model, base, engram_vocab_size=args.rows, engram_head_dim=48)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)

    settings = MemorySFTConfig(
        str(out / "trainer"),
        max_steps=args.max_steps,
        packing=True,
        max_length=args.length,
        per_device_train_batch_size=4,
        learning_rate=5e-4,  # LoRA's and the projections'
        table_lr_multiplier=100.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = MemorySFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_dict({"text": read_texts(args.text)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32),
        train_mode="memory+lora",
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    for path in sorted((out / "adapter").glob("*.safetensors")):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    kept = all((loaded.state_dict()[name] == value).all() for name, value in trainer.model.state_dict().items())
    print(f"loaded again: {'every weight is the same' if kept else 'weights differ'}")


if __name__ == "__main__":
    main()
