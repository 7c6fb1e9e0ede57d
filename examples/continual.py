"""Lets a memory learn something new without losing what it knows: select_rows, an l2_sp, and what they cost.

Shows a memory that has learned one text (general) and then learns another (new) in four ways, each with one guard more:
freely; with its projections left alone; only in rows that the general text does not read; and pulled back to its start.
Prints losses of the general text, of held-out text of its kind, and of the new text.

Run: python -m examples.continual --max-steps 6
"""

import argparse
import copy

import torch
from transformers import AutoTokenizer

from engram_transformers import EngramForCausalLM, EngramTrainer
from engram_transformers.training import EngramTrainingArguments, select_rows

from .texts import FACTBOOK, WORDNET, read_texts, windows


BATCH = 4
SAMPLE = 16  # windows of each text that are measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub model")
    parser.add_argument("--general", default=FACTBOOK, help="what is known first, and must stay")
    parser.add_argument("--new", default=WORDNET, help="what is learned then")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each of the memory's 32 heads")
    parser.add_argument("--max-steps", type=int, default=6, help="steps on either text")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--l2_sp", type=float, default=1.0, help="strength of the pull to the start")
    return parser.parse_args()


@torch.no_grad()
def losses(model, *texts: list[dict]) -> str:
    """Mean losses in nats a token."""
    model.eval()
    sizes = [len(text[:SAMPLE]) for text in texts]
    ids = [torch.tensor([window["input_ids"]]) for text in texts for window in text[:SAMPLE]]
    found = torch.tensor([float(model(one, labels=one, use_cache=False).loss) for one in ids])
    return "".join(f"{float(part.mean()):10.3f}" for part in found.split(sizes))


def teach(model, text: list[dict], args, l2_sp: float = 0.0) -> None:
    settings = {"max_steps": args.max_steps, "per_device_train_batch_size": BATCH, "learning_rate": 2e-3}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    given = EngramTrainingArguments("runs/continual", l2_sp=l2_sp, **settings, **quiet)
    EngramTrainer(model, given, train_dataset=text).train()


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = EngramForCausalLM.from_backbone(args.model, engram_vocab_size=args.rows, engram_head_dim=48)
    count = args.max_steps * BATCH
    general = windows(tokenizer, read_texts(args.general), args.length)
    general, held_out = general[:count], general[count : count + SAMPLE]
    new = windows(tokenizer, read_texts(args.new), args.length)[:count]

    table = [f"{'nats a token':22}{'general':>10}{'held out':>10}{'new':>10}"]
    table.append(f"{'at first':22}{losses(model, general, held_out, new)}")
    teach(model.set_trainable("memory"), general, args)
    table.append(f"{'knows the general text':22}{losses(model, general, held_out, new)}")
    selection = select_rows(model, new, reference_texts=general)
    for guard in ("free", "tables alone", "selected rows", "rows and l2_sp"):
        twin = copy.deepcopy(model).set_trainable("memory" if guard == "free" else "tables")
        if "rows" in guard:
            selection.apply(twin)
        teach(twin, new, args, args.l2_sp if "l2_sp" in guard else 0.0)
        table.append(f"{guard:22}{losses(twin, general, held_out, new)}")
    print(*table, selection, sep="\n")


if __name__ == "__main__":
    main()
