"""Teaches a model a text through its memory alone: graft, EngramTrainer, save, load again, ask.

Shows that the donor's own weights stay as they are, that what was learned lies in the memory, and that the saved folder
is an ordinary checkpoint of Transformers. A model that has a memory already is trained further.

Run: python -m examples.finetune_trainer --model HuggingFaceTB/SmolLM2-135M-Instruct --text notes.txt --max-steps 60
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from engram_transformers import EngramConfig, EngramForCausalLM, EngramTrainer

from .texts import WORDNET, read_texts, windows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub model")
    parser.add_argument("--text", default=WORDNET, help="a text a line, or JSON lines")
    parser.add_argument("--prompt", help="what to ask; the first words of the text by default")
    parser.add_argument("--out", default="runs/finetune_trainer")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each of the memory's 32 heads")
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=2e-3, help="of dense weights; tables have a multiple of it")
    return parser.parse_args()


@torch.no_grad()
def answer(model, tokenizer, prompt: str) -> str:
    """A greedy completion."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args.text)
    dataset = windows(tokenizer, texts, args.length)
    prompt = args.prompt or " ".join(texts[0].split()[:3])

    if isinstance(AutoConfig.from_pretrained(args.model), EngramConfig):
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        model = EngramForCausalLM.from_backbone(args.model, engram_vocab_size=args.rows, engram_head_dim=48)
    before = answer(model, tokenizer, prompt)

    settings = TrainingArguments(
        args.out,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        report_to=[],
    )
    trainer = EngramTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    model = AutoModelForCausalLM.from_pretrained(args.out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of the first steps {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    print(f"before: {prompt} {before}\nafter:  {prompt} {answer(model, tokenizer, prompt)}")
    print(f"saved in {args.out}; AutoModelForCausalLM.from_pretrained loads it")


if __name__ == "__main__":
    main()
