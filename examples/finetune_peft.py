"""Memory and LoRA learn a text together: graft, get_peft_model, EngramTrainer, an adapter folder that holds both.

Shows that the folder is small (LoRA, and the rows of the memory that changed), that AutoModelForCausalLM loads it, and
what each part has learned: the loss of the donor, with the LoRA alone, the memory alone, and both.

Run: python -m examples.finetune_peft --model HuggingFaceTB/SmolLM2-135M-Instruct --text notes.txt --max-steps 60
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from engram_transformers import EngramConfig, EngramForCausalLM, EngramTrainer

from .texts import WORDNET, read_texts, windows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a donor, or a graft's folder")
    parser.add_argument("--text", default=WORDNET, help="a text a line, or JSON lines")
    parser.add_argument("--out", default="runs/finetune_peft", help="for the graft and the adapter")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each of the memory's 32 heads")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument(
        "--lr", type=float, default=5e-4, help="of LoRA and dense weights; tables have a multiple of it"
    )
    return parser.parse_args()


@torch.no_grad()
def loss(model, dataset) -> float:
    """Mean loss over the first windows, in nats a token."""
    batch = {name: torch.tensor([entry[name] for entry in dataset[:8]]) for name in ("input_ids", "labels")}
    return float(model.eval()(**batch).loss)


def main() -> None:
    args = arguments()
    out = Path(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dataset = windows(tokenizer, read_texts(args.text), args.length)

    if isinstance(AutoConfig.from_pretrained(args.model), EngramConfig):
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        model = EngramForCausalLM.from_backbone(args.model, engram_vocab_size=args.rows, engram_head_dim=48)
        model.save_pretrained(out / "graft")  # first: the adapter's folder names it, and holds only what changed
        tokenizer.save_pretrained(out / "graft")

    model = get_peft_model(model, LoraConfig(r=args.rank, task_type="CAUSAL_LM"))
    model.set_trainable("memory+lora")  # PEFT froze the memory
    options = {"max_steps": args.max_steps, "learning_rate": args.lr, "save_strategy": "no", "report_to": []}
    settings = TrainingArguments(str(out / "run"), per_device_train_batch_size=4, **options)
    EngramTrainer(model, settings, train_dataset=dataset).train()
    model.save_pretrained(out / "adapter")

    model = AutoModelForCausalLM.from_pretrained(out / "adapter")
    both = loss(model, dataset)
    with model.disable_memory():
        lora = loss(model, dataset)
    model.disable_adapters()
    memory = loss(model, dataset)
    with model.disable_memory():
        donor = loss(model, dataset)
    print(f"donor {donor:.3f}, LoRA {lora:.3f}, memory {memory:.3f}, both {both:.3f} nats a token")
    print(f"saved in {out / 'adapter'}; AutoModelForCausalLM.from_pretrained loads it")


if __name__ == "__main__":
    main()
