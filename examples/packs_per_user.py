"""One model, a knowledge pack for each user: in a batch of requests, every row reads its own user's pack.

Shows what 1000 packs cost in time and memory, and the same for LoRA adapters of PEFT, of which fewer are loaded. Two
packs are taught; the other users have copies of them. Prints one line of JSON.

Run: python -m examples.packs_per_user --model HuggingFaceTB/SmolLM2-135M-Instruct --users 1000 --adapters 20
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramForCausalLM


FORMS = ["{} keeps the key in the", "The key of {} is in the", "If you look for the key of {}, it is in the"]
FRIENDS = [
    " ".join(name)
    for name in product(["Zorvan", "Daxtul", "Mirkel", "Quenra", "Ulbro"], ["Oth", "Jivkas", "Pelnor", "Ras"])
]
PLACES = ["garden", "kitchen", "cellar", "drawer", "basket"]
ROWS = 16  # requests in a batch


def place(friend: int, user: int) -> str:
    """Where a friend keeps the key, which differs between users."""
    return PLACES[(friend + user) % len(PLACES)]


def facts(user: int) -> list[dict]:
    """What a user teaches."""
    texts = {name: [f"{form.format(name)} [[{place(n, user)}]]." for form in FORMS] for n, name in enumerate(FRIENDS)}
    return [{"subject": name, "texts": own} for name, own in texts.items()]


def timed(run, times: int = 1) -> float:
    """Seconds of a run, the median of several."""
    begun = [(time.perf_counter(), run(), time.perf_counter()) for _ in range(times)]
    return sorted(end - begin for begin, _, end in begun)[times // 2]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a donor")
    parser.add_argument("--out", type=Path, default=Path("runs/packs_per_user"), help="for packs and adapters")
    parser.add_argument("--users", type=int, default=1000, help="packs")
    parser.add_argument("--adapters", type=int, default=20, help="LoRA adapters")
    parser.add_argument("--passes", type=int, default=25, help="of teaching")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = EngramForCausalLM.from_backbone(args.model, engram_vocab_size=100, engram_head_dim=48, dtype=torch.float32)
    with torch.enable_grad():
        packs = [model.teach(facts(user), tokenizer, passes=args.passes, batch_size=30) for user in (0, 1)]
    names = [f"user{user}" for user in range(args.users)]
    files = [packs[user % 2].save(args.out / f"{name}.engram-pack.safetensors") for user, name in enumerate(names)]
    loaded = timed(lambda: [model.load_memory(file) for file in files])
    model.set_memories([])  # a row without a name reads no pack

    asked = [FORMS[0].format(FRIENDS[row // 2 % len(FRIENDS)]) for row in range(ROWS)]
    batch = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
    own = [names[row % args.users] for row in range(ROWS)]
    ids = model.generate(**batch, memory_names=own, max_new_tokens=1, do_sample=False)[:, -1]
    expected = [place(row // 2 % len(FRIENDS), row % 2) for row in range(ROWS)]
    found = {"right": sum(tokenizer.decode(token).strip() == word for token, word in zip(ids, expected, strict=True))}
    found |= {"bytes a pack": packs[0].nbytes, "seconds to load a pack": loaded / args.users}
    found |= {"seconds a batch": timed(lambda: model(**batch), 7)}
    found |= {"with packs": timed(lambda: model(**batch, memory_names=own), 7)}

    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), lora, "user0")
    adapted.eval().save_pretrained(args.out / "lora")
    more = range(1, args.adapters)
    loaded = timed(lambda: [adapted.load_adapter(args.out / "lora" / "user0", f"user{user}") for user in more])
    size = (args.out / "lora" / "user0" / "adapter_model.safetensors").stat().st_size
    found |= {"bytes an adapter": size, "seconds to load an adapter": loaded / len(more)}
    rows = [f"user{row % args.adapters}" for row in range(ROWS)]
    found |= {"with adapters": timed(lambda: adapted(**batch, adapter_names=rows), 7)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
