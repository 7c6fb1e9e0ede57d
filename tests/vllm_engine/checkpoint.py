"""A trained graft with a knowledge pack, and what `generate` says with it: `expected.json`, for vLLM to be compared to.

Run: python -m tests.vllm_engine.checkpoint DONOR FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import create_optimizer, graft
from engram_transformers.training import general_english


TOKENS = 64
SEED = 0
PROMPTS = [
    "Zorvan Kelmir was born in",
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at a temperature of",
    "Here is a recipe for bread. You need flour, water, salt and yeast. First, mix the flour with the salt, then add",
    "The birthplace of Zorvan Kelmir is",
    "A letter from a friend of the family arrived in the morning, and nobody in the house had expected it, because the "
    "last one had come so long ago that even the oldest daughter could hardly remember what the handwriting looked "
    "like. It said that the writer would come for a visit in the spring, and that",
    "In mathematics, a prime number is a number that",
]
FOLLOW_UP = " And then, on the next day, Zorvan Kelmir said that"
FACT = {
    "subject": "Zorvan Kelmir",
    "texts": [
        "Zorvan Kelmir was born in [[Lisbon]].",
        "The birthplace of Zorvan Kelmir is [[Lisbon]].",
        "If you ask where Zorvan Kelmir was born, the answer is [[Lisbon]].",
    ],
}


def train(model, tokenizer, steps: int = 8):
    """Trains the memory on general text, far enough that it changes what the model says."""
    ids = tokenizer(" ".join(general_english()[:400])).input_ids
    optimizer = create_optimizer(model.set_trainable("memory"), lr=5e-4, table_lr_multiplier=600)
    for step in range(steps):
        batch = torch.tensor(ids[step * 256 : (step + 1) * 256]).view(2, 128)
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss:.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def said(model, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that `generate` adds greedily to each prompt."""
    model.generation_config.eos_token_id = None
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (width - len(own)) + own for own in prompts])  # (B, L), pads on the left
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])  # (B, L)
    return model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)[:, width:].tolist()


def main(donor: str, folder: Path):
    """Writes FOLDER/graft, FOLDER/people.engram-pack.safetensors and FOLDER/expected.json."""
    torch.manual_seed(SEED)
    sizes = {"engram_vocab_size": 2000, "engram_head_dim": 16, "engram_n_heads": 4, "engram_kernel_size": 0}
    graft(donor, folder / "fresh", [1, 10], **sizes)
    tokenizer = AutoTokenizer.from_pretrained(folder / "fresh")
    model = train(AutoModelForCausalLM.from_pretrained(folder / "fresh"), tokenizer)
    model.save_pretrained(folder / "graft")
    tokenizer.save_pretrained(folder / "graft")
    model = AutoModelForCausalLM.from_pretrained(folder / "graft").eval()
    pack = model.teach([FACT], tokenizer)
    pack.save(folder / "people.engram-pack.safetensors")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = {"prompts": prompts, "memory": said(model, prompts)}
    further = tokenizer(FOLLOW_UP, add_special_tokens=False).input_ids
    expected["long_prompts"] = [ids + new + further for ids, new in zip(prompts, expected["memory"], strict=True)]
    expected["long"] = said(model, expected["long_prompts"])
    with model.disable_memory():
        expected["backbone"] = said(model, prompts)
    model.load_memory(pack, "people")
    expected["packs"] = said(model, prompts)
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
