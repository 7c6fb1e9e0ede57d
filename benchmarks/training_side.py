"""One way of training, in a process of its own, which takes a step when it is told to.

Promises: every way gets the same tokens, the same precision and the same clipping (engram-peft's aside, whose sparse
gradients torch cannot measure); the rows of a step are read once before it is timed, so that all tables are warm. The
way "theirs" imports nothing of ours.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .peer_side import theirs as their_model


LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLIP = 1.0
LEARNING_RATE = 1e-4
LOOK_EVERY_S = 0.02


def anonymous() -> int:
    """Bytes of private memory that this process holds now."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


class Peak:
    """The most private memory that this process has held while the block ran, looked at every 20 ms."""

    def __init__(self):
        self.bytes, self.over = 0, threading.Event()

    def __enter__(self) -> "Peak":
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Looks until the block is over."""
        while not self.over.wait(LOOK_EVERY_S):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *exception) -> None:
        self.over.set()
        self.thread.join()
        self.bytes = max(self.bytes, anonymous())


def full(job: dict):
    """All weights of the donor."""
    model = AutoModelForCausalLM.from_pretrained(job["donor"], dtype=torch.float32)
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def lora_config(job: dict):
    """LoRA on every matrix of the decoder layers."""
    from peft import LoraConfig

    rank = job["lora_rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")


def lora(job: dict):
    """LoRA on the donor."""
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(job["donor"], dtype=torch.float32), lora_config(job))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def memory(job: dict, adapter: bool = False):
    """The memory of a graft."""
    from engram_transformers.training import create_optimizer

    model = AutoModelForCausalLM.from_pretrained(job["graft"], dtype=torch.float32, engram_placement=job["placement"])
    if adapter:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(lora_config(job), model.backbone)
    model.set_trainable("memory+lora" if adapter else "memory")
    return model, create_optimizer(model, lr=LEARNING_RATE)


def both(job: dict):
    """The memory of a graft, and LoRA on its backbone."""
    return memory(job, adapter=True)


def theirs(job: dict):
    """engram-peft's memory and optimizer with its defaults, but for the sizes of the table and hc_mult 1."""
    tokenizer = AutoTokenizer.from_pretrained(job["donor"])
    donor = AutoModelForCausalLM.from_pretrained(job["donor"], dtype=torch.float32)
    model, _, _ = their_model(job, donor, tokenizer)
    from engram_peft import get_optimizer

    return model, get_optimizer(model)


WAYS = {"full": full, "lora": lora, "memory": memory, "both": both, "theirs": theirs}


class Trainee:
    """A model, its optimizer and the text.

    Args:
        way (`str`): a key of `WAYS`.
        job (`dict`): what to load, and how.
    """

    def __init__(self, way: str, job: dict):
        self.way, self.job = way, job
        self.model, self.optimizer = WAYS[way](job)
        self.model.train()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.batches = torch.tensor(job["ids"]).view(-1, job["batch"], job["length"])  # (steps, batch, length)
        self.taken, self.peak = 0, 0

    def step(self) -> dict:
        """One step of training; its seconds and its loss."""
        ids = self.batches[self.taken % len(self.batches)]  # (batch, length)
        self.taken += 1
        if self.way in ("memory", "both"):
            warm_rows(self.model, ids)
        with Peak() as peak:
            begun = time.perf_counter()
            loss = self.backward(ids)
            self.update()
            seconds = time.perf_counter() - begun
        self.peak = max(self.peak, peak.bytes)
        return {"seconds": seconds, "loss": loss}

    def backward(self, ids: torch.Tensor) -> float:
        """Gradients of one batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.job["bf16"]):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        """Clips and steps."""
        if self.way != "theirs":
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first_step(self) -> dict:
        """Private memory before and after the first update of the optimizer, and the values in the rows it touched."""
        ids = self.batches[0]
        self.backward(ids)
        touched = sum(p.grad.row_values.numel() for p in self.parameters if hasattr(p.grad, "row_values"))
        before = anonymous()
        with Peak() as peak:
            self.optimizer.step()
        return {"more": anonymous() - before, "most": peak.bytes - before, "touched_values": touched}

    def about(self) -> dict:
        """What the process holds after its steps."""
        return {
            "peak_anonymous": self.peak,
            "anonymous": anonymous(),
            "state_bytes": sum(tensor.nbytes for tensor in tensors_of(self.optimizer.state_dict())),
            "steps": self.taken,
            "loads": self.way,
        }


@torch.no_grad()
def warm_rows(model, ids: torch.Tensor) -> None:
    """Reads the rows of a batch, so that they are in the page cache."""
    memory = model.memory
    reads = memory.read(memory.hashing.compress(ids, None), None)
    try:
        for layer in memory.layer_ids:
            reads.vectors(layer)
    finally:
        reads.drop()


def tensors_of(state) -> Iterator[torch.Tensor]:
    """Every tensor in a nest of dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_of(value)


def main() -> None:
    """Loads, then answers line by line."""
    way, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # packages print lines of their own
        trainee = Trainee(way, job)
    print(json.dumps({"ready": way}), flush=True)
    answers: dict[str, Callable[[], dict]] = {name: getattr(trainee, name) for name in ("step", "first_step", "about")}
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            answer = answers[json.loads(line)]()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
