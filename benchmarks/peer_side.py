"""One side of `peer`, in a process of its own: a plain donor and a model with a memory, timed on request.

Promises: both models have one donor's weights in float32; the memory's rows are random and its values zero, so that
both generate the same tokens, which is looked at before anything is timed. The side "theirs" imports nothing of ours.
"""

import json
import sys
import time
import typing
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def ours(job: dict, donor, tokenizer):
    """A memory of this package."""
    from engram_transformers import EngramForCausalLM, __version__

    model = EngramForCausalLM.from_backbone(
        donor,
        tokenizer,
        job["layers"],
        engram_vocab_size=job["rows"],
        engram_head_dim=job["head_dim"],
        engram_n_heads=8,
        engram_table_dtype="float32",
    ).eval()
    with torch.no_grad():
        for table in model.memory.tables.parameters():
            table.normal_(0, 0.02)
        for layer in model.memory.layers.values():
            layer.key_value.weight[-layer.hidden_size :] = 0
    rows = list(model.memory.tables.parameters())
    return model, f"engram-transformers {__version__}", rows


def theirs(job: dict, donor, tokenizer):
    """A memory of engram-peft, with its defaults but for the sizes; one gate a layer, as a plain stream needs."""
    if not hasattr(typing, "override"):  # it imports what Python has from 3.12 on
        import typing_extensions

        typing.override = typing_extensions.override
    from engram_peft import EngramConfig, get_engram_model

    config = EngramConfig(
        engram_vocab_size_per_ngram=[8 * job["rows"]] * 2,  # buckets of all 8 heads
        embedding_dim=16 * job["head_dim"],
        n_head_per_ngram=8,
        target_layers=job["layers"],
        hc_mult=1,
        tokenizer_name_or_path=job["donor"],
    )
    model = get_engram_model(donor, config, tokenizer).eval()
    known = {id(parameter) for parameter in donor.parameters()}
    rows = [p for p in model.parameters() if id(p) not in known and p.ndim == 2 and p.shape[1] == job["head_dim"]]
    return model, f"engram-peft {version_of('engram-peft')}, hc_mult=1", rows


def version_of(name: str) -> str:
    """Version of an installed package."""
    from importlib.metadata import version

    return version(name)


def seconds_of(model, work: str, job: dict) -> float:
    """Seconds of one forward pass over a text, or of generating."""
    ids = torch.tensor([job["forward"]])
    begin = time.perf_counter()
    if work == "forward":
        model(input_ids=ids, use_cache=True)
    else:
        generate(model, ids, job)
    return time.perf_counter() - begin


def generate(model, ids: torch.Tensor, job: dict) -> torch.Tensor:
    """Greedy tokens after the prompt, always as many."""
    given = ids[:, : job["prompt"]]
    count = {"max_new_tokens": job["generated"], "min_new_tokens": job["generated"]}
    return model.generate(input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, **count)


@torch.no_grad()
def main() -> None:
    """Loads, says what was loaded, then answers line by line."""
    side, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["donor"])
    plain, wrapped = (AutoModelForCausalLM.from_pretrained(job["donor"], dtype=torch.float32).eval() for _ in range(2))
    model, about, rows = {"ours": ours, "theirs": theirs}[side](job, wrapped, tokenizer)
    ids = torch.tensor([job["forward"]])
    same = torch.equal(generate(plain, ids, job), generate(model, ids, job))
    table = sum(part.nbytes for part in rows)
    print(json.dumps({"is": about, "table_bytes": table, "generates_the_donors_tokens": same}), flush=True)
    for line in sys.stdin:
        work, donor_first = json.loads(line)
        order = [("donor", plain), ("memory", model)]
        timed = {name: seconds_of(one, work, job) for name, one in (order if donor_first else order[::-1])}
        print(json.dumps(timed), flush=True)


if __name__ == "__main__":
    main()
