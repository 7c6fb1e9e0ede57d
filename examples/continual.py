"""Lets a memory learn something new without losing what it knows: select_rows, an anchor, and what they cost.

Shows a memory that has learned one text (general) and then learns another (new) in four ways: freely, only in rows that
the general text does not read, pulled back to its start, and both. With the guard, projections are left alone as well:
train_mode("tables"). Losses are of held-out windows of the general text, and of the new text itself.

Run: python -m examples.continual --max-steps 12
"""

import argparse
import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramConfig, EngramForCausalLM, EngramTrainer
from engram_transformers.training import EngramTrainingArguments, select_rows

from .texts import FACTBOOK, WORDNET, read_texts, windows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub model")
    parser.add_argument("--general", default=FACTBOOK, help="what is known first, and must stay")
    parser.add_argument("--new", default=WORDNET, help="what is learned then")
    parser.add_argument("--out", default="runs/continual")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each of the memory's 32 heads")
    parser.add_argument("--max-steps", type=int, default=12, help="steps on either text")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--anchor", type=float, default=1.0, help="strength of the pull to the start")
    return parser.parse_args()


@torch.no_grad()
def loss_of(model, entries: list[dict]) -> float:
    """Mean loss in nats a token."""
    ids = [torch.tensor([entry["input_ids"]]) for entry in entries]
    return sum(float(model.eval()(text, labels=text, use_cache=False).loss) for text in ids) / len(ids)


def teach(model, entries: list[dict], args, anchor: float = 0.0) -> None:
    settings = EngramTrainingArguments(
        args.out,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch,
        learning_rate=2e-3,
        anchor=anchor,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    EngramTrainer(model, settings, train_dataset=entries).train()


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    count = args.max_steps * args.batch
    general = windows(tokenizer, read_texts(args.general), args.length)
    general, held_out = general[:count], general[count : count + 16]
    new = windows(tokenizer, read_texts(args.new), args.length)[:count]
    if isinstance(AutoConfig.from_pretrained(args.model), EngramConfig):
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        model = EngramForCausalLM.from_donor(args.model, engram_vocab_size=args.rows, engram_head_dim=48)

    def report(name: str, model) -> None:
        print(
            f"{name:20} {loss_of(model, general[:16]):8.3f} {loss_of(model, held_out):9.3f} {loss_of(model, new[:16]):8.3f}"
        )

    print(f"{'nats a token':20} {'general':>8} {'held out':>9} {'new':>8}")
    report("at first", model)
    teach(model.train_mode("memory"), general, args)
    report("knows general text", model)
    for name, guarded, anchor in (
        ("free", False, 0),
        ("rows", True, 0),
        ("anchor", False, args.anchor),
        ("both", True, args.anchor),
    ):
        twin = copy.deepcopy(model)
        if guarded:
            selection = select_rows(twin, new, against=general).apply(twin.train_mode("tables"))
        teach(twin, new, args, anchor)
        report(name, twin)
    print(selection)


if __name__ == "__main__":
    main()
