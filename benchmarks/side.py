"""One side of a comparison in its own process: a model that trains, reads or generates on request.

Promises: every side gets the same tokens in the same precision, and the same clipping (except engram-peft, whose
sparse gradients torch cannot measure); a batch is read once before its step is timed, so that all tables are warm. The
side "theirs" imports nothing of this package.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .command import CannotMeasure
from .compare import interleave, seconds_of
from .record import ROOT


LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLIP, LEARNING_RATE, LOOK_EVERY_S = 1.0, 1e-4, 0.02

# glibc's allocator: it keeps large blocks, as the Makefile sets it, which makes training on a CPU faster; or it gives
# free blocks back, where memory is counted, because what it kept would hide what is taken.
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
KEEP_BLOCKS = dict(zip(MALLOC, (str(1 << 32), str(1 << 33), str(1 << 28)), strict=True))
GIVE_BACK = dict(zip(MALLOC, (str(1 << 16), str(1 << 16), "0"), strict=True))

# Threads that wait give their core away: processes that wait for their turn must not disturb the one that has it.
QUIET = {"OMP_WAIT_POLICY": "passive"}


class Side:
    """A process that answers questions; `way` is "full", "lora", "memory", "both" or "theirs"."""

    def __init__(self, way: str, job: dict, place: Path, python=sys.executable, allocator: dict = KEEP_BLOCKS):
        name = f"{way}-{len(list(place.glob('*.job')))}"
        path, self.errors, self.way = place / f"{name}.job", place / f"{name}.log", way
        path.write_text(json.dumps(job), encoding="utf-8")
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", "benchmarks.side", way, str(path)],
                cwd=ROOT,
                env={**os.environ, **QUIET, **allocator},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, what: str) -> dict:
        """The answer to one question; a process that ends instead is a [`CannotMeasure`] with its last words."""
        with contextlib.suppress(BrokenPipeError):  # the log says why
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise CannotMeasure(f"{self.way} failed:\n{self.errors.read_text()[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def take_turns(
    sides: Mapping[str, Side], what: str, value: Callable[[dict], float], rounds: int, limit_s: float
) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Asks all sides the same question round by round; one number for each round, and what each holds after them."""
    try:
        for side in sides.values():
            side.ask("about")  # it has loaded
        ways = {name: (lambda s=side: value(s.ask(what))) for name, side in sides.items()}
        return interleave(ways, rounds, limit_s=limit_s), {name: side.ask("about") for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.end()


def anonymous() -> int:
    """Bytes of private memory that this process holds now."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """The private memory of this process while the block runs, looked at every 20 ms."""
    seen, over = [anonymous()], threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_EVERY_S):
            seen.append(anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen.append(anonymous())


def plain(job: dict):
    """The backbone alone."""
    return AutoModelForCausalLM.from_pretrained(job["donor"], dtype=torch.float32)


def ours(job: dict, way: str):
    """The backbone, with LoRA on every matrix of its layers, with the memory of a graft, or with both."""
    from peft import LoraConfig, inject_adapter_in_model

    from engram_transformers.training import create_optimizer

    has_memory = way in ("memory", "both")
    placed = {"engram_placement": job["placement"]} if has_memory else {}
    model = AutoModelForCausalLM.from_pretrained(job["graft" if has_memory else "donor"], dtype=torch.float32, **placed)
    if way in ("lora", "both"):
        rank = job["lora_rank"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
        inject_adapter_in_model(config, model.backbone if has_memory else model)
    if has_memory:
        model.set_trainable("memory+lora" if way == "both" else "memory")
        return model, lambda: create_optimizer(model, lr=LEARNING_RATE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, lambda: torch.optim.AdamW(trained, lr=LEARNING_RATE)


def theirs(job: dict):
    """engram-peft's memory with its defaults but for the sizes; one gate a layer, as a plain residual stream needs."""
    if not hasattr(typing, "override"):  # it imports what Python has from 3.12 on
        import typing_extensions

        typing.override = typing_extensions.override
    from engram_peft import EngramConfig, get_engram_model, get_optimizer

    config = EngramConfig(
        engram_vocab_size_per_ngram=[8 * job["rows"]] * 2,  # buckets of all 8 heads
        embedding_dim=16 * job["head_dim"],
        n_head_per_ngram=8,
        target_layers=job["layers"],
        hc_mult=1,
        tokenizer_name_or_path=job["donor"],
    )
    model = get_engram_model(plain(job), config, AutoTokenizer.from_pretrained(job["donor"]))
    return model, lambda: get_optimizer(model)


class Worker:
    """The process itself: a model, its text, and an optimizer once it is asked for a step."""

    def __init__(self, way: str, job: dict):
        self.way, self.job = way, job
        self.model, self.make_optimizer = theirs(job) if way == "theirs" else ours(job, way)
        self.batches = torch.tensor(job["ids"]).view(-1, job["batch"], job["length"])  # (steps, batch, length)
        self.plain = self.optimizer = None
        self.taken = self.peak = self.asked = 0

    def prepare(self) -> None:
        """Makes the optimizer."""
        if self.optimizer is None:
            self.optimizer = self.make_optimizer()
            self.model.train()
            self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self) -> dict:
        """One step of training; its seconds."""
        self.prepare()
        ids = self.batches[self.taken % len(self.batches)]  # (batch, length)
        self.taken += 1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            self.model(input_ids=ids, use_cache=False)
        with peak() as seen:
            seconds = seconds_of(lambda: (self.backward(ids), self.update()))
        self.peak = max(self.peak, *seen)
        return {"seconds": seconds}

    def backward(self, ids: torch.Tensor) -> None:
        """Gradients of one batch."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    def update(self) -> None:
        """Clips and steps."""
        if self.way != "theirs":
            torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first_step(self) -> dict:
        """Private memory that the first update of the optimizer takes, and the values in the rows it touches."""
        self.prepare()
        self.backward(self.batches[0])
        touched = sum(p.grad.row_values.numel() for p in self.trained if hasattr(p.grad, "row_values"))
        before = anonymous()
        with peak() as seen:
            self.optimizer.step()
        return {"more": seen[-1] - before, "most": max(seen) - before, "touched_values": touched}

    def forward(self) -> dict:
        """Seconds of one forward pass, the backbone's and the memory's."""
        return self.compared(lambda model: model(input_ids=self.batches[0], use_cache=True).logits)

    def generate(self) -> dict:
        """Seconds of greedy generation, always as many tokens; the memory adds nothing, so both generate the same."""
        ids, count = self.batches[0][:1, : self.job["prompt"]], self.job["generated"]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
        return self.compared(lambda model: model.generate(**given, max_new_tokens=count, min_new_tokens=count))

    @torch.no_grad()
    def compared(self, work: Callable) -> dict:
        """Seconds of the plain backbone and of the memory, each first in turn, and whether they gave the same."""
        self.plain = plain(self.job).eval() if self.plain is None else self.plain
        self.model.eval()
        self.asked += 1
        sides = [("donor", self.plain), ("memory", self.model)]
        out: dict[str, torch.Tensor] = {}
        seconds = {}
        for name, model in sides if self.asked % 2 else sides[::-1]:
            seconds[name] = seconds_of(lambda n=name, m=model: out.update({n: work(m)}))
        return {**seconds, "same": torch.allclose(out["donor"], out["memory"], atol=1e-3)}

    def about(self) -> dict:
        """What the process holds."""
        state = {} if self.optimizer is None else self.optimizer.state_dict()
        return {"peak_anonymous": self.peak, "state_bytes": bytes_of(state), "steps": self.taken}


def bytes_of(state) -> int:
    """Bytes of every tensor in a nest of dictionaries and lists."""
    if isinstance(state, (dict, list, tuple)):
        return sum(map(bytes_of, state.values() if isinstance(state, dict) else state))
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def main() -> None:
    """Loads, then answers line by line."""
    way, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # packages print lines as well
        worker = Worker(way, job)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            answer = getattr(worker, line.strip())()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
