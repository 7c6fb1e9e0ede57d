"""Teaches a model with TRL's SFTTrainer: LoRA in the backbone and the memory, in one run.

Shows what a memory adds to a script of TRL: the mixin, and the word that says what is trained. Documents are packed
into full rows, and n-grams stop at their borders. What is saved is the adapter and the memory's changes, not the model.

Run: pip install "engram-transformers[trl]" && python -m examples.finetune_trl --text notes.txt --max-steps 60
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
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
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_trl"))
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each of the memory's 32 heads")
    parser.add_argument("--max-steps", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    base, adapter = args.out / "graft", args.out / "adapter"
    if not base.exists():
        graft(args.model, base, engram_vocab_size=args.rows, engram_head_dim=48)
    settings = MemorySFTConfig(
        str(args.out / "trainer"),
        max_steps=args.max_steps,
        packing=True,
        max_length=256,
        per_device_train_batch_size=4,
        learning_rate=5e-4,  # of LoRA and of the projections
        table_lr_multiplier=100.0,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),  # TRL wants to be told
    )
    trainer = MemorySFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        settings,
        train_dataset=Dataset.from_dict({"text": read_texts(args.text)}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=16, lora_alpha=32),
        trainable="memory+lora",
    )
    loss = trainer.train().training_loss
    trainer.save_model(str(adapter))

    files = [f"{path.name} ({path.stat().st_size:,} bytes)" for path in sorted(adapter.glob("*.safetensors"))]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).state_dict()
    same = all(torch.equal(loaded[name], value) for name, value in trainer.model.state_dict().items())
    print(f"mean loss {loss:.3f}; saved {', '.join(files)}; the same when loaded again: {same}")


if __name__ == "__main__":
    main()
