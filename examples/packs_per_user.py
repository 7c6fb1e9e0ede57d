"""One model, a knowledge pack for each user: a batch of requests in which every row reads its own user's pack.

Two packs are taught, and the other users have copies of them, because their time and memory are the same. The same is
measured with LoRA adapters of PEFT, of which fewer are loaded. Prints one line of JSON.

Run: python -m examples.packs_per_user --model HuggingFaceTB/SmolLM2-135M-Instruct --users 1000 --adapters 20
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramForCausalLM


FORMS = ["{} keeps the key in the", "The key of {} is in the", "If you look for the key of {}, it is in the"]
FRIENDS = [" ".join(name) for name in product(["Zorvan", "Daxtul", "Mirkel", "Quenra"], ["Oth", "Ulfen", "Jivkas"])]
PLACES = ["garden", "kitchen", "cellar", "drawer", "basket"]


def facts(user: int) -> list[dict]:
    """The same subjects, with other answers for each of two users."""
    places = {friend: PLACES[(number + user) % len(PLACES)] for number, friend in enumerate(FRIENDS)}
    return [
        {"subject": f, "texts": [f"{form.format(f)} [[{place}]]." for form in FORMS]} for f, place in places.items()
    ]


@torch.no_grad()
def milliseconds(run) -> float:
    """The median of seven passes."""
    taken = []
    for _ in range(7):
        begun = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - begun))
    return sorted(taken)[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a donor")
    parser.add_argument("--out", type=Path, default=Path("runs/packs_per_user"), help="for packs and adapters")
    parser.add_argument("--users", type=int, default=1000, help="packs")
    parser.add_argument("--adapters", type=int, default=20, help="LoRA adapters")
    parser.add_argument("--passes", type=int, default=25, help="of teaching")
    args = parser.parse_args()
    tokenizer, memory = AutoTokenizer.from_pretrained(args.model), psutil.Process().memory_info
    model = EngramForCausalLM.from_backbone(args.model, engram_vocab_size=100, engram_head_dim=48, dtype=torch.float32)
    taught = [model.teach(facts(user), tokenizer, passes=args.passes, batch_size=36) for user in (0, 1)]
    files = [taught[user % 2].save(args.out / f"user{user}.engram-pack.safetensors") for user in range(args.users)]

    begun = time.perf_counter()
    names = [model.load_memory(file) for file in files]
    model.set_memories([])  # a row without a name reads no pack
    packs = {"seconds": time.perf_counter() - begun, "bytes": sum(pack.nbytes for pack in taught) * args.users // 2}
    questions = [FORMS[0].format(FRIENDS[user // 2 % len(FRIENDS)]) for user in range(16)]
    batch = tokenizer(questions, return_tensors="pt", padding=True, padding_side="left")
    own = [names[user % len(names)] for user in range(16)]
    read = {
        "no pack": milliseconds(lambda: model(**batch)),
        "packs": milliseconds(lambda: model(**batch, memory_names=own)),
    }
    ids = model.generate(**batch, memory_names=own, max_new_tokens=1, do_sample=False)[:, -1]
    answers = [PLACES[(user // 2 % len(FRIENDS) + user % 2) % len(PLACES)] for user in range(16)]
    right = sum(tokenizer.decode(token).strip() == answer for token, answer in zip(ids, answers, strict=True))

    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), lora, "user0"
    ).eval()
    adapted.save_pretrained(args.out / "lora")
    before, begun = memory().rss, time.perf_counter()
    for user in range(1, args.adapters):
        adapted.load_adapter(args.out / "lora" / "user0", f"user{user}")
    each = {"seconds": time.perf_counter() - begun, "bytes": memory().rss - before}
    one = {name: value / (args.adapters - 1) for name, value in each.items()}
    rows = [f"user{row % args.adapters}" for row in range(16)]
    read["lora"] = milliseconds(lambda: adapted(**batch, adapter_names=rows))
    found = {"users": args.users, "packs": packs, "one LoRA": one, "milliseconds": read, "right of 16": right}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
