"""Trains a small language model with a memory from nothing, beside the same model without one.

Shows the paper's settings: tables by Adam at 5 times the learning rate and without weight decay, a convolution that
starts at zero, everything trained: backbone and memory grow together.

Run: python -m examples.pretrain_from_scratch --max-steps 200
"""

import argparse
import copy

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments, set_seed

from engram_transformers import EngramForCausalLM, EngramTrainer
from engram_transformers.training import EngramTrainingArguments

from .texts import WORDNET, read_texts, windows


HELD_OUT = 64  # sequences


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub model")
    parser.add_argument("--text", default=WORDNET, help="a text a line, or JSON lines")
    parser.add_argument("--out", default="runs/pretrain_from_scratch")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of each of the memory's 32 heads")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    data = windows(tokenizer, read_texts(args.text), args.length)
    data = {"train_dataset": data[HELD_OUT:], "eval_dataset": data[:HELD_OUT]}
    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
    )

    set_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    memory = {"engram_layer_ids": [1, 3], "engram_vocab_size": args.rows, "engram_head_dim": 16}
    model = EngramForCausalLM.from_backbone(copy.deepcopy(plain), tokenizer, **memory)

    settings = {
        "max_steps": args.max_steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,  # of matrices; never of tables
        "save_strategy": "no",
        "report_to": [],
    }
    five_times = EngramTrainingArguments(args.out, table_lr_multiplier=5.0, **settings)
    trainers = {
        "without memory": Trainer(plain, TrainingArguments(args.out, **settings), **data),
        "with memory": EngramTrainer(model, five_times, trainable="all", **data),
    }
    for name, trainer in trainers.items():
        trainer.train()
        print(f"{name}: {trainer.evaluate()['eval_loss']:.3f} nats a token on held-out text")
    tables = list(model.memory.tables.parameters())
    written = sum(int(table.any(dim=1).sum()) for table in tables)
    print(f"{written:,} of {sum(map(len, tables)):,} rows written")
    model.save_pretrained(args.out)
    print(f"saved in {args.out}; AutoModelForCausalLM.from_pretrained loads it")


if __name__ == "__main__":
    main()
