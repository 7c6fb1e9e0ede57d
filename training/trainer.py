"""EngramTrainer: transformers' Trainer for a model with memory.

What it chooses: what Trainer does is left to Trainer. This adds an optimizer that updates rows, the exchange of row
gradients between processes, and checkpoints that hold only changes. Promises: what `model.set_trainable` chose is
trained, by default only the memory; a checkpoint of a run that trains only the memory holds its changes and names its
base; a run that was killed during a save resumes from the last complete checkpoint. Never trains wrongly in silence.
"""

import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from ..adapters import load_memory_delta, save_changes
from ..adapters.peft_adapters import inside, same_memory
from ..adapters.trainable import adapter_parameters
from ..compat_engram import check_parent, left_out_of_ddp
from ..files_atomic_engram import (
    ADAPTER_NAME,
    DELTA_NAME,
    OLD_DELTA_NAME,
    WITHOUT_TABLES_NAME,
    checkpoint_in,
    remove_checkpoint,
)
from ..memory_engram import refuse_copied_code
from ..rows_placement_engram import TABLES_PREFIX, reread_tables
from ..rows_storage_engram import CheckpointTables
from .distributed import RankPart, refuse_deepspeed, sync_row_gradients
from .optimizer import LEARNING_RATE, TABLE_LR_MULTIPLIER, EngramOptimizer, create_optimizer


logger = logging.get_logger(__name__)


@dataclass
class EngramTrainingArguments(TrainingArguments):
    """`TrainingArguments` with settings for a memory; see [`create_optimizer`].

    Args:
        learning_rate (`float`, *optional*, defaults to 2e-3): learning rate of the dense weights.
        table_lr_multiplier (`float`, *optional*, defaults to 50): times `learning_rate`, the learning rate of tables.
        table_optimizer (`str`, *optional*, defaults to `"adam"`): "adam", "adagrad" or "sinkhorn".
        table_state_dtype (`str`, *optional*, defaults to `"float32"`): "float32" or "bfloat16".
        l2_sp (`float`, *optional*, defaults to 0): strength of the pull of rows towards their initial values.
        trainable (`str`, *optional*):
            "memory", "tables", "reader", "memory+lora" or "all"; the argument of [`EngramTrainer`] takes precedence.

    Example:

    ```python
    >>> from engram_transformers import EngramTrainer, EngramTrainingArguments

    >>> trainer = EngramTrainer(model, EngramTrainingArguments("runs/train"), train_dataset=dataset)
    ```"""

    learning_rate: float = field(
        default=LEARNING_RATE, metadata={"help": "The learning rate of the dense weights at the first step."}
    )
    table_lr_multiplier: float = field(default=TABLE_LR_MULTIPLIER)
    table_optimizer: str = field(default="adam")
    table_state_dtype: str = field(default="float32")
    l2_sp: float = field(default=0.0)
    trainable: str | None = field(default=None)


check_parent(Trainer, "transformers.Trainer")


class EngramTrainerMixin:
    """Adds the training of a memory to any subclass of Trainer: `class MyTrainer(EngramTrainerMixin, SFTTrainer)`.

    Raises:
        `TypeError`: for a model without memory, `model_init`, a name instead of a model (but TRL's trainers load it),
            or an optimizer that does not support row gradients.
        `ValueError`: for DeepSpeed, tables that are not loaded, another `optim` than AdamW, or tokens without rows.
    """

    # Whether a push to the Hub is under way, which arguments may not say.
    is_pushing = False

    def __init__(self, model=None, args=None, *, trainable: str | None = None, **kwargs):
        if kwargs.get("model_init") is not None:
            raise TypeError(
                "EngramTrainer takes the model itself, and not model_init: a table is not made anew for each trial. "
                "Make the model first and pass it as model=."
            )
        named = isinstance(model, str) and _loads_by_name(type(self))
        if not named:
            _check_model(model)
        refuse_deepspeed(args)
        trainable = trainable or getattr(args, "trainable", None)
        # Trainer demands an adapter on a quantised model; the memory serves as one, in full precision.
        quantised = getattr(model, "is_quantized", False) and trainable != "all"
        if quantised:
            model.is_quantized = False
        super().__init__(model, args=args, **kwargs)  # by name: TRL's trainers have another second argument
        if quantised:
            model.is_quantized = True
        if named:
            _check_model(self.model)
        if self.optimizer is not None and not isinstance(self.optimizer, EngramOptimizer):
            raise TypeError(
                f"{type(self.optimizer).__name__} cannot write rows, the tables would stay as they are: pass "
                "engram_transformers.training.create_optimizer(model), or no optimizer."
            )
        if self.optimizer is None:
            _check_optimizer_arguments(self.args, self.optimizer_cls_and_kwargs)
            _warn_of_foreign_rate(self.args)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)  # a processor's, or itself
        if isinstance(tokenizer, PreTrainedTokenizerBase) and self.engram.config.engram_token_map_sha256 is not None:
            self.engram.check_tokenizer(tokenizer)
        chosen = trainable or self.engram.config.engram_trainable
        if chosen is None and self.optimizer is None:
            adapted = next(adapter_parameters(self.engram), None) is not None
            chosen = "memory+lora" if adapted else "memory"
            what = "the memory and its adapters" if adapted else "the memory"
            logger.warning(f"training {what} alone (trainable={chosen!r}).")
        if chosen is not None:
            self.engram.set_trainable(chosen)
        _refuse_moving_reference(self)
        _refuse_other_reference(self, given=kwargs.get("ref_model") is not None)

    @property
    def engram(self):
        """The model with the memory, without the wrappers of PEFT, DDP and compilers."""
        return inside(self.model)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            args = self.args
            own = {name: getattr(args, name) for name in OWN_ARGUMENTS if hasattr(args, name)}
            self.optimizer = create_optimizer(
                self.model,
                lr=args.learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                seed=args.seed,
                **own,
            )
        return self.optimizer

    def _get_learning_rate(self) -> float:
        # For logs: Trainer would take the first group's rate, that of the tables.
        groups = self.optimizer.param_groups
        group = next((group for group in groups if not group.get("rows")), groups[0])
        return float(group["lr"]) / (group.get("lr_multiplier") or 1)

    def _wrap_model(self, model, training=True, dataloader=None):
        left_out = left_out_of_ddp(self.engram)
        dense = any(p.requires_grad for name, p in self.model.named_parameters() if name not in left_out)
        if training and self.args.world_size > 1 and not dense:  # DDP refuses a model without trainable parameters
            prepare = partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = prepare
        return super()._wrap_model(model, training, dataloader)

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            sync_row_gradients(self.model)
        return loss

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"'{self.args.output_dir}' holds no whole checkpoint: train from the start.")
        elif isinstance(resume_from_checkpoint, (str, os.PathLike)) and not _is_whole(Path(resume_from_checkpoint)):
            if not Path(resume_from_checkpoint).is_dir():
                raise FileNotFoundError(
                    f"'{resume_from_checkpoint}' is not a folder: name a checkpoint, or True for the last whole one."
                )
            raise ValueError(
                f"'{resume_from_checkpoint}' is not a whole checkpoint (no readable {TRAINER_STATE_NAME}): its save "
                "was interrupted. resume_from_checkpoint=True takes the last whole one."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        sets_aside = self.args.should_save and not self.reads_from(folder)
        if self.args.should_save and not sets_aside:  # written last, it marks the folder as complete
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with _older_set_aside(folder) if sets_aside else nullcontext():
            self.accelerator.wait_for_everyone()  # other ranks write into the folder too
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save or not self.saves_changes(output_dir):
            super()._save(output_dir, state_dict)
            return
        save_changes(self.engram, output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def saves_changes(self, output_dir: str | os.PathLike) -> bool:
        """Whether a folder needs to hold only a delta.

        This is so if only the memory is trained, and its base stays available outside of this run.
        """
        files = self.engram.checkpoint_tables
        alone = (
            self.engram.config.engram_trainable in ("memory", "tables", "reader")
            and self.engram is self.accelerator_model
        )
        if not alone or files is None:
            return False
        if files.locate is not None:  # on the Hub
            return True
        if self.args.push_to_hub or self.is_pushing:  # users of the Hub cannot read a local base
            return False
        # The base must not be replaced by this save or run, nor be a checkpoint that Trainer deletes.
        own, run = files.folder.resolve(), Path(self.args.output_dir).resolve()
        of_this_run = own.parent == run and own.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        return not (self.reads_from(run) or self.reads_from(output_dir) or of_this_run)

    def reads_from(self, folder: str | os.PathLike) -> bool:
        """Whether the model's tables came from the files of a folder."""
        files = self.engram.checkpoint_tables
        return files is not None and files.folder.resolve() == Path(folder).resolve()

    def push_to_hub(self, *args, **kwargs):
        self.is_pushing = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self.is_pushing = False

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        # Trainer copies the files that it knows from the checkpoint to `output_dir`, and uploads that.
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushes and under_way and not self.args.hub_always_push:
            return
        if pushes:
            self._finish_current_push()  # it reads the files that are replaced now
            bring_unknown_files(Path(checkpoint_folder), Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    @property
    def accelerator_model(self):
        """The model without Accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if not self.load_own_checkpoint(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if not self.load_own_checkpoint(best):
            super()._load_best_model()
            return
        logger.info(f"Loaded the best memory from {best} (score: {self.state.best_metric}).")

    def load_own_checkpoint(self, folder: Path) -> bool:
        """Loads a checkpoint that Trainer cannot load by itself; returns whether this was one."""
        kind = None if (folder / ADAPTER_NAME).exists() else checkpoint_in(folder)
        if kind == "delta":
            load_memory_delta(self.engram, folder)
        elif kind == "whole" and self.engram.memory.placement == "disk":
            load_around_tables(self.engram, folder)
        else:
            return False
        return True


class EngramTrainer(EngramTrainerMixin, Trainer):
    """Trains a memory.

    Args:
        model ([`EngramForCausalLM`]): the model, or a PEFT model around it.
        args ([`EngramTrainingArguments`] or `TrainingArguments`):
            As for Trainer; `learning_rate` is that of the dense weights, also in logs.
        trainable (`str`, *optional*):
            "memory", "tables", "reader", "memory+lora" or "all" (`model.set_trainable`). The choice in the model's
            configuration if None, or "memory" without one.
        kwargs: further arguments of Trainer.

    Raises:
        `TypeError`: for a model without memory, a name or `model_init` instead of a model, or an optimizer that does
            not support row gradients.
        `ValueError`: for tables that are not loaded, another `optim` than AdamW, or tokens without rows.

    Example:

    ```python
    >>> from engram_transformers import EngramTrainer, EngramTrainingArguments

    >>> trainer = EngramTrainer(model, EngramTrainingArguments("runs/train"), train_dataset=dataset)
    >>> trainer.train()
    ```"""


# Our arguments for the optimizer.
OWN_ARGUMENTS = ("table_lr_multiplier", "table_optimizer", "table_state_dtype", "l2_sp")

# Values of `optim` that EngramOptimizer implements; one of them is Trainer's default.
ADAMW = ("adamw_torch", "adamw_torch_fused")


def _check_optimizer_arguments(args: TrainingArguments, optimizer_class: tuple | None) -> None:
    """Raises ValueError for arguments that choose another optimizer: the memory needs one that updates rows."""
    what = {
        f"optim={str(args.optim.value)!r}": args.optim not in ADAMW,
        "optim_args": bool(args.optim_args),
        "optim_target_modules": bool(args.optim_target_modules),
        "optimizer_cls_and_kwargs": optimizer_class is not None,
    }
    asked = [name for name, chosen in what.items() if chosen]
    if asked:
        raise ValueError(
            f"{', '.join(asked)} would not be used: a memory is trained by EngramOptimizer, which is AdamW for dense "
            "weights. Leave it out; EngramTrainingArguments(table_optimizer='adam' | 'adagrad' | 'sinkhorn', "
            "table_state_dtype=...) chooses what tables are trained by."
        )


def _warn_of_foreign_rate(args: TrainingArguments) -> None:
    """Logs a warning if the learning rate is the default of arguments that were not made for a memory."""
    default = next(own.default for own in fields(args) if own.name == "learning_rate")
    if args.learning_rate == default != LEARNING_RATE:
        logger.warning(
            f"learning_rate={args.learning_rate:g} is the default of {type(args).__name__}; a memory was measured with "
            f"{LEARNING_RATE:g} and learns little at less: use engram_transformers.EngramTrainingArguments, whose "
            f"default that is, or pass learning_rate={LEARNING_RATE:g}."
        )


def _loads_by_name(kind: type) -> bool:
    """Whether a class of trainers loads a model by its name: TRL's do, and Trainer does not."""
    return any(parent.__module__.startswith("trl.") for parent in kind.__mro__)


def _check_model(model) -> None:
    """Raises TypeError for a model without memory, ValueError for one whose tables are not loaded."""
    held = inside(model) if isinstance(model, torch.nn.Module) else None
    if isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"EngramTrainer takes the model itself, got its name {str(model)!r}: load it with "
            f"AutoModelForCausalLM.from_pretrained({str(model)!r}) and pass what that gives."
        )
    if held is None:
        if isinstance(model, torch.nn.Module):
            refuse_copied_code(model)
        raise TypeError(
            f"EngramTrainer trains models with a memory, got {type(model).__name__}: make one with "
            "EngramForCausalLM.from_backbone(model, tokenizer)."
        )
    if held.memory.placement == "none":
        raise ValueError("the memory was not loaded (engram_placement='none'): model.place_memory('disk') first.")
    if any(isinstance(part, RankPart) for part in held.memory.tables.parameters()):
        raise ValueError(
            "tables sharded by row are saved by all ranks together, which Trainer does not do: train them in a loop of "
            "your own, and save with save_sharded(model, folder)."
        )


def _is_whole(folder: Path) -> bool:
    """Whether a Trainer checkpoint is complete."""
    try:
        return bool(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Returns a run's last complete checkpoint; logs incomplete ones after it.

    Args:
        output_dir (`str` or `os.PathLike`): the run's folder.
    """
    numbered = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit() and path.is_dir()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning(f"'{path}' was not written to its end and is passed over.")
    return None


@contextmanager
def _older_set_aside(folder: Path):
    """Empties a checkpoint's folder for the block; its content, of an earlier run, is restored if the block fails."""
    older = folder.with_name(f"_older-{folder.name}")  # Trainer does not upload such names
    if older.exists() and not _is_whole(folder):  # left by a run that was killed while writing this checkpoint
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        shutil.rmtree(older, ignore_errors=True)
        folder.rename(older)
    try:
        yield
    except BaseException:
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if older.exists():
                older.rename(folder)
        raise
    finally:
        if _is_whole(folder):
            shutil.rmtree(older, ignore_errors=True)


def _refuse_moving_reference(trainer) -> None:
    """Refuses TRL's preference trainers if the reference would be trained with the model.

    With a PEFT model they use the model without its adapters as the reference; the memory stays on in it.

    Raises:
        `ValueError`: naming the alternatives.
    """
    if getattr(trainer, "ref_model", trainer) is not None or not hasattr(trainer.model, "peft_config"):
        return
    precomputed = getattr(trainer.args, "precompute_ref_log_probs", False)
    memory = trainer.engram.memory
    learns = any(part.requires_grad for part in [*memory.named_parts().values(), *memory.layers.parameters()])
    if learns and not precomputed and getattr(trainer.args, "beta", 0):
        raise ValueError(
            f"{type(trainer).__name__} has no ref_model and takes the PEFT model with its adapters off for one, where "
            "the memory that is trained stays on: the reference would move with the model. Pass ref_model= (the graft, "
            "loaded again), set precompute_ref_log_probs=True, or freeze the memory (train the adapters alone with "
            "TRL's own trainer)."
        )


def _refuse_other_reference(trainer, given: bool) -> None:
    """Refuses a wrong reference model of TRL's trainers.

    Args:
        trainer ([`EngramTrainerMixin`]): an initialised trainer.
        given (`bool`): whether the reference was given, and not loaded by the name in the model's configuration.

    Raises:
        `ValueError`: for a reference with another memory than the model's, or one that would follow the model
            (`sync_ref_model=True`) without its tables.
    """
    if getattr(trainer, "ref_model", None) is None:
        return
    model, reference = trainer.engram, inside(trainer.ref_model)
    if not given and (reference is None or not same_memory(model, reference)):
        raise ValueError(
            f"{type(trainer).__name__} loaded its reference from '{model.config.name_or_path}', and that is not the "
            "model: its memory was trained, or a delta loaded, since. Save the model (model.save_pretrained(folder)) "
            "and train what from_pretrained(folder) loads."
        )
    if not getattr(trainer.args, "sync_ref_model", False):
        return
    places = [model.memory.placement, reference.memory.placement if reference is not None else "none"]
    if places != ["device", "device"]:
        raise ValueError(
            "sync_ref_model=True mixes the model's parameters into the reference's, and tables in host memory or in "
            f"files are none: the model's are on {places[0]!r}, the reference's on {places[1]!r}. Load both with "
            "engram_placement='device' (the reference by model_init_kwargs={'engram_placement': 'device'}), or leave "
            "sync_ref_model out."
        )


def bring_unknown_files(checkpoint: Path, folder: Path) -> None:
    """Copies the files of a checkpoint that Trainer does not know into a folder, and removes earlier ones there."""
    if (checkpoint / ADAPTER_NAME).exists() or checkpoint_in(checkpoint) is None:
        for name in (DELTA_NAME, OLD_DELTA_NAME):
            (folder / name).unlink(missing_ok=True)  # nothing else: the folder may be that of the adapters' base
    else:
        remove_checkpoint(folder)
    code = [path.name for path in checkpoint.glob("*_engram.py")]
    for name in (DELTA_NAME, WITHOUT_TABLES_NAME, *code):
        if (checkpoint / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint / name, folder / name)


def load_around_tables(model, folder: Path) -> None:
    """Loads a whole checkpoint into a model with tables on disk, which are then read from the checkpoint's files."""
    tables = CheckpointTables(folder)
    parts = {name: tables.part(name) for name in tables.weight_map if not name.startswith(TABLES_PREFIX)}
    mappings = {file: file.map() for file in {part.file for part in parts.values()}}  # each takes a descriptor
    rest = {name: part.within(mappings[part.file]) for name, part in parts.items()}
    result = model.load_state_dict(rest, strict=False)
    # A tensor with several names (tied embeddings) is stored under one of them.
    held = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(held[name]) for name in rest if name in held}
    missing = [name for name in result.missing_keys if id(held.get(name)) not in loaded]
    lost = [name for name in missing if not name.startswith(TABLES_PREFIX)]
    if lost or result.unexpected_keys:
        raise ValueError(
            f"'{folder}' does not fit the model: {lost[:3]} missing, {result.unexpected_keys[:3]} unknown."
        )
    reread_tables(model.memory.tables, tables)
    model.checkpoint_tables = tables
