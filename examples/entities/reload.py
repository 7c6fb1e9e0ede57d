"""The last step, run as a process of its own: load the saved folder by its path alone, and answer.

Usage: python -m examples.entities.reload CHECKPOINT < prompts.json > answers.json
"""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import engram_transformers  # noqa: F401  (registers the model with the Auto classes)

from .measure import completions


def main(checkpoint: str) -> None:
    """Reads a list of prompts from stdin and writes the list of completions to stdout."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model.check_tokenizer(tokenizer)
    json.dump(completions(model, tokenizer, json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
