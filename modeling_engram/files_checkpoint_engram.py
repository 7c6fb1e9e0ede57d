"""Loading and saving: one checkpoint of ordinary Transformers files, with the memory in its own shards.

Promises: `save_pretrained` replaces a folder's checkpoint whole or not at all and removes what an earlier save left;
`from_pretrained` checks files before and constants after loading, and never fills a memory with random rows; on a CPU,
tables in their stored dtype are mapped from the file, not copied. Never writes into files of another checkpoint.
Source: docs/format.md.
"""

import copy
import math
import os
import re
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

from .backbone_engram import only_state, quantization_in_graft
from .compat_engram import carries_adapters
from .configuration_engram import EngramFormatError
from .files_atomic_engram import (
    CONFIG_NAME,
    DELTA_NAME,
    INDEX_NAME,
    MEMORY_STEM,
    MODEL_STEM,
    OLD_DELTA_NAME,
    SINGLE_NAME,
    WITHOUT_TABLES_NAME,
    checkpoint_in,
    delta_file,
    named_delta,
    read_undisturbed,
    whole_save,
)
from .files_safetensors_engram import (
    DTYPE_NAMES,
    MAX_MEMORY_SHARD_SIZE,
    check_folder,
    parse_size,
    read_header,
    read_index,
    shard_name,
    total_size,
    write_index,
    write_shards,
)
from .guard_engram import (
    HUB_ARGUMENTS,
    full_package,
    refuse_adapter,
    refuse_adapters_of_peft,
    registered,
    saving_adapters,
    where_of_adapter,
)
from .memory_engram import FIXED_PREFIXES, MEMORY_PREFIX, EngramMemory
from .rows_placement_engram import (
    TABLES_PREFIX,
    check_placement,
    choose_placement,
    free_memory,
    mapped_place,
    reread_tables,
    without_tables,
)
from .rows_storage_engram import CheckpointTables


logger = logging.get_logger(__name__)

# Fields of a configuration that are equal where rows mean the same n-grams.
DIGESTS = ("engram_hash_sha256", "engram_token_map_sha256")

# Fields of a configuration that are arguments of `from_pretrained` with another meaning.
LOADERS_OWN = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config")

# Classes that a checkpoint's copy of the code offers to `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_engram.EngramConfig",
    "AutoModel": "modeling_engram.EngramModel",
    "AutoModelForCausalLM": "modeling_engram.EngramForCausalLM",
}
COMPOSITE = "modeling_engram.EngramForConditionalGeneration"


def auto_map(config) -> dict[str, str]:
    """Returns the `auto_map` of a checkpoint with this [`EngramConfig`]."""
    if config.composite_config is None:
        return dict(AUTO_MAP)
    return {**AUTO_MAP, "AutoModelForCausalLM": COMPOSITE, "AutoModelForImageTextToText": COMPOSITE}


class EngramCheckpointMixin:
    """`from_pretrained`, `load_adapter`, `save_pretrained` and `push_to_hub` for models with a memory."""

    # SHA-256 of the delta of each loaded adapter.
    adapter_deltas: dict[str, str] = {}
    # Delta of an adapter that was loaded before the tables.
    due_delta: Path | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, engram_placement: str = "auto", **kwargs):
        """As in Transformers; refuses a checkpoint whose memory is incomplete or belongs to another one.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub id, also of an adapter.
            engram_placement (`str`, *optional*, defaults to `"auto"`):
                Where tables are: "device" (with the other weights), "cpu" (host memory; rows are sent to the device),
                "disk" (rows are read from the checkpoint's files), "none" (neither loaded nor downloaded), or "auto"
                (the first of "device", "cpu" and "disk" with room to spare, or what `device_map` says about
                "memory.tables").
            kwargs: arguments of `PreTrainedModel.from_pretrained`. `dtype` does not change the tables' dtype.

        Raises:
            `FileNotFoundError`: if a file is missing.
            `BlockingIOError`: if saves replaced the folder's files again and again while they were read.
            `ImportError`: if it is a delta, or an adapter with a memory, and this is a checkpoint's copy of the code.
            `ValueError`: for an unknown placement, or one that `device_map` contradicts.
            [`EngramFormatError`]: if a file is truncated, misshapen or of another memory.
        """
        check_placement(engram_placement)
        path, folder = pretrained_model_name_or_path, None
        if kwargs.get("state_dict") is None:
            folder = _local_checkpoint(path, kwargs.get("subfolder", ""))

        def load():
            delta = _delta_in(path, folder, kwargs)
            if delta is not None:
                package = full_package(f"'{path}' holds what training changed in another checkpoint, and loading it")
                found = package.from_delta(cls, delta, *model_args, engram_placement=engram_placement, **kwargs)
                model = found[0] if isinstance(found, tuple) else found
                model.config.name_or_path = path  # not the base's: the model is loaded again by this name
                return found
            return cls.from_whole(path, *model_args, engram_placement=engram_placement, **kwargs)

        loaded = load() if folder is None else read_undisturbed(folder, load)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.bring_due_memory()  # only now are the tables placed
        return loaded

    @classmethod
    def class_for(cls, config) -> type:
        """Returns the class that loads a checkpoint with this [`EngramConfig`] (None if it is unknown)."""
        return cls

    @classmethod
    def from_whole(cls, pretrained_model_name_or_path, *model_args, engram_placement: str, **kwargs):
        """As `from_pretrained`, for a whole checkpoint."""
        files = CheckpointFiles(cls.config_class, pretrained_model_name_or_path, kwargs)
        chosen = cls.class_for(files.config or kwargs.get("config"))
        if chosen is not cls:
            return chosen.from_whole(
                pretrained_model_name_or_path, *model_args, engram_placement=engram_placement, **kwargs
            )
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantization_in_graft(kwargs["quantization_config"])
        if files.revision is not None:
            kwargs["revision"] = files.revision  # unaffected by pushes meanwhile
        said = engram_placement == "auto" and files.config is not None
        placement = files.placement(engram_placement)
        if placement != "device":
            kwargs["config"], kwargs["hold_tables"] = files.config_without_tables(), False
            kwargs["device_map"] = without_tables(kwargs.get("device_map"))
        files.check(placement)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise EngramFormatError(
                f"a weight file of '{pretrained_model_name_or_path}' cannot be read ({error}): it is truncated or "
                "damaged, or larger than this machine's RAM and swap can map. Download it again, graft with smaller "
                "files (max_memory_shard_size), or leave the memory on disk (engram_placement='disk')."
            ) from error
        _refuse_incomplete_checkpoint(pretrained_model_name_or_path, info)
        if model.memory.hashing.token_map.device.type != "meta":
            model.memory.hashing.check(model.config)
        model.checkpoint_tables = files.tables(placement)
        if placement != "device":
            del model.config.transformers_weights  # only for this load
            model.place_memory(placement)
        if model.config.engram_trainable is not None and registered() is not None:
            registered().apply_trainable(model, model.config.engram_trainable, adapters_must_be_there=False)
        if said:
            # A warning, because the default verbosity hides the rest, and it decides about speed and memory.
            logger.warning(model.describe_placement())
        return (model, info) if wants_info else model

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """As in Transformers; a memory that was saved with the adapter is loaded with it.

        Raises:
            `ValueError`: if the adapter was made for a model with other layers, or with another memory than the loaded
                one.
            `ImportError`: if it has a memory, and this is a checkpoint's copy of the code.
            [`EngramFormatError`]: if its memory is of another token map, other constants or another checkpoint.
        """
        load = super().load_adapter
        if registered() is not None:
            return registered().load_adapter(load, self, peft_model_id, adapter_name, *args, **kwargs)
        if peft_model_id is not None:
            refuse_adapter(peft_model_id, **where_of_adapter(kwargs))
        return load(peft_model_id, adapter_name, *args, **kwargs)

    def bring_due_memory(self) -> None:
        """Applies the delta of an adapter that was loaded before the tables."""
        if self.due_delta is not None and self.memory.placement != "none":
            delta, self.due_delta = self.due_delta, None
            full_package("a delta").load_memory_delta(self, delta)

    def _load_from_state_dict(self, *args, **kwargs):
        refuse_adapters_of_peft(self)  # PEFT loads an adapter's weights by it
        super()._load_from_state_dict(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        max_memory_shard_size: int | str = MAX_MEMORY_SHARD_SIZE,
        **kwargs,
    ) -> None:
        """Saves the model, with the tables in separate files `engram-memory-*.safetensors`.

        A model that carries adapters saves only the active one, with its memory.

        Args:
            save_directory (`str` or `os.PathLike`): a folder; an older checkpoint in it is replaced.
            is_main_process (`bool`, *optional*, defaults to `True`): other processes write nothing.
            state_dict (`dict[str, torch.Tensor]`, *optional*): what to save; `self.state_dict()` if None.
            push_to_hub (`bool`, *optional*, defaults to `False`): also upload (`repo_id`, `token`, ... in kwargs).
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): for files of the backbone.
            max_memory_shard_size (`int` or `str`, *optional*, defaults to `"8GB"`): for memory shards.
            kwargs: further arguments of `PreTrainedModel.save_pretrained`.

        Raises:
            `ValueError`: for arguments that the format does not support.
            `ImportError`: if adapters are saved with a trainable memory, by a checkpoint's copy of the code.
        """
        if carries_adapters(self):
            with saving_adapters(self, [Path(save_directory)] if is_main_process else []):
                super().save_pretrained(
                    save_directory, is_main_process, state_dict, push_to_hub, max_shard_size=max_shard_size, **kwargs
                )
            return
        if self.memory.placement == "none":
            raise ValueError(
                "the memory was not loaded (engram_placement='none'), and a save would lose it: "
                "model.place_memory('disk') first, or save model.backbone alone."
            )
        for name in ("variant", "distributed_checkpoint"):
            if kwargs.pop(name, None):
                raise ValueError(f"save_pretrained({name}=...) is not supported for a model with memory shards.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"'{folder}' is a file: name a folder to save into.")
        hub = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "create_pr", "private") if name in kwargs
        }
        state = self.state_dict() if state_dict is None else state_dict
        shards = {name: tensor for name, tensor in state.items() if name.startswith(TABLES_PREFIX)}
        rest = {name: tensor for name, tensor in state.items() if name not in shards}
        self.config.auto_map, self.config.engram_memory_delta = auto_map(self.config), None
        # Backbone weights keep their modules' names; Transformers would restore older names of some models.
        kwargs.setdefault("save_original_format", False)
        with whole_save(folder) as draft, only_state(self, rest):
            super().save_pretrained(draft, state_dict=rest, max_shard_size=max_shard_size, **kwargs)
            weight_map = number_rest_files(draft)
            weight_map |= write_shards(draft, MEMORY_STEM, shards, parse_size(max_memory_shard_size))
            # Tied weights are in the files once.
            total = sum(tensor.nbytes for name, tensor in state.items() if name in weight_map)
            write_index(draft, weight_map, total, shards)
        self.read_on_from(folder, own_state=state_dict is None)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.name), token=kwargs.get("token"), **hub)

    def read_on_from(self, folder: Path, own_state: bool) -> None:
        """After a save: lets tables on disk read from the new files, if these hold the model's state."""
        before = self.checkpoint_tables
        if own_state and (before is None or before.folder.resolve() == folder.resolve()):
            self.checkpoint_tables = CheckpointTables(folder)
            if self.memory.placement == "disk":
                reread_tables(self.memory.tables, self.checkpoint_tables)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        sizes = {path.name: path.stat().st_size for path in Path(working_dir).iterdir() if path.is_file()}
        memory = sum(size for name, size in sizes.items() if name.startswith(MEMORY_STEM))
        # A warning, because the default verbosity hides the rest, and an upload may take hours.
        logger.warning(
            f"Uploading {sum(sizes.values()):,} bytes in {len(sizes)} files to {repo_id}, {memory:,} of them memory "
            "shards (zeros of a sparse file are sent as bytes)."
        )
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class CheckpointFiles:
    """What is known of a checkpoint before it is loaded, from the arguments of `from_pretrained`."""

    def __init__(self, config_class, path, kwargs: dict):
        self.path, self.kwargs = path, kwargs
        self.hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        self.folder = _local_checkpoint(path, kwargs.get("subfolder", ""))
        given = kwargs.get("config")
        self.config = given if isinstance(given, PreTrainedConfig) else None
        is_adapter = path is not None and self.folder is None and Path(path).is_dir()
        elsewhere = kwargs.get("state_dict") is not None or path is None or is_adapter
        self.revision = None
        if self.folder is None and not elsewhere:
            self.revision = commit_of(self.locate(CONFIG_NAME).parent)
        if self.revision is not None:  # the configuration is of the same commit
            self.hub["revision"] = self.revision
        if elsewhere:
            self.config = None  # the tables are not in this checkpoint's files
        elif self.config is None:
            self.config = config_class.from_pretrained(given or path, **self.hub)

    def placement(self, wanted: str) -> str:
        """Resolves where the tables are to be.

        Raises:
            `ValueError`: if the files are not known, or the device map contradicts `wanted`.
        """
        if self.config is None:
            if wanted not in ("auto", "device"):
                raise ValueError(f"engram_placement={wanted!r} needs the files of an Engram checkpoint: load that.")
            return "device"
        device_map = self.kwargs.get("device_map")
        mapped = mapped_place(device_map, TABLES_PREFIX.rstrip("."))
        if mapped is not None:
            mapped = str(mapped) if str(mapped) in ("cpu", "disk") else "device"
            if mapped == "cpu" and {str(place) for place in device_map.values()} <= {"cpu", "disk"}:
                mapped = "device"  # the device is the CPU
            if wanted in ("auto", mapped):
                return mapped
            if wanted == "device":
                raise ValueError(
                    f"engram_placement='device' contradicts device_map, which puts memory.tables on {mapped!r}: leave "
                    "one of them out."
                )
        if wanted != "auto":
            return wanted
        shapes = [shape for name, (shape, _) in self.expected.items() if name.startswith(TABLES_PREFIX)]
        table_bytes = sum(map(math.prod, shapes)) * getattr(torch, self.config.engram_table_dtype).itemsize
        total = total_size(self.index_folder()) or table_bytes
        place = torch.get_default_device() if device_map is None else device_map  # as Transformers takes it
        free = free_memory(place, self.kwargs.get("max_memory"))
        return choose_placement(table_bytes, max(0, total - table_bytes), *free)

    def check(self, placement: str) -> None:
        """Checks the headers of the files that will be read."""
        if self.folder is None or self.config is None:
            return
        if placement != "device":
            read_index(self.folder, WITHOUT_TABLES_NAME)
        expected = self.expected
        if placement == "none":
            expected = {name: entry for name, entry in expected.items() if not name.startswith(TABLES_PREFIX)}
        check_folder(self.folder, expected, WITHOUT_TABLES_NAME if placement == "none" else INDEX_NAME)

    @cached_property
    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `expected_shards`."""
        return expected_shards(self.config)

    def config_without_tables(self):
        """Returns a configuration under which Transformers reads, and downloads, no tables.

        As in Transformers, arguments of `from_pretrained` that are its fields are moved into it.
        """
        config = copy.deepcopy(self.config)
        if not isinstance(self.kwargs.get("config"), PreTrainedConfig):
            for name in [name for name in self.kwargs if name not in LOADERS_OWN and hasattr(config, name)]:
                setattr(config, name, self.kwargs.pop(name))
        config.transformers_weights = WITHOUT_TABLES_NAME
        return config

    def tables(self, placement: str) -> CheckpointTables | None:
        """Returns the tables' files; from the Hub, downloads those that a placement reads while the token is known."""
        if self.config is None:
            return None
        if self.folder is not None:
            return CheckpointTables(self.folder)
        folder = self.index_folder()
        tables = CheckpointTables(folder, HubFiles(str(self.path), folder, **self.hub))
        if placement in ("cpu", "disk"):
            for file_name in {file for name, file in tables.weight_map.items() if name.startswith(TABLES_PREFIX)}:
                self.locate(file_name)
        return tables

    def index_folder(self) -> Path:
        """The local folder of the index."""
        return self.folder if self.folder is not None else self.locate(INDEX_NAME).parent

    def locate(self, file_name: str) -> Path:
        """Returns a file of the checkpoint, downloaded if needed."""
        return Path(cached_file(self.path, file_name, **self.hub))


class HubFiles:
    """Files of one commit of a Hub repository, downloaded when they are not in the cache.

    A model keeps it through copies and pickles, so it stores the commit and no token (`others` are not stored).

    Args:
        repository (`str`): its id.
        folder (`Path`): the commit's folder in the cache.
        cache_dir, subfolder (*optional*): as for `from_pretrained`.
    """

    def __init__(self, repository: str, folder: Path, cache_dir=None, subfolder: str = "", **others):
        self.repository, self.folder, self.cache_dir, self.subfolder = repository, folder, cache_dir, subfolder
        self.revision = commit_of(folder)

    def __call__(self, file_name: str) -> Path:
        """Returns the path of a file.

        Raises:
            `FileNotFoundError`: if it is not cached and cannot be downloaded.
        """
        path = self.folder / file_name
        if path.is_file():
            return path
        where = {"revision": self.revision, "cache_dir": self.cache_dir, "subfolder": self.subfolder}
        try:
            return Path(cached_file(self.repository, file_name, **where))
        except OSError as error:
            raise FileNotFoundError(
                f"'{file_name}' of '{self.repository}' (revision {self.revision}) is not on this machine and could not "
                f"be fetched: {error} A model does not keep the token that it was loaded with. Log in (`hf auth login` "
                "or the environment variable HF_TOKEN), or load the model again with token=... and a placement that "
                "reads the tables."
            ) from error


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a folder in the Hub's cache (`.../snapshots/COMMIT/...`); None for other folders."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", folder.as_posix())
    return found and found[1]


def _delta_in(path, folder: Path | None, kwargs: dict) -> Path | None:
    """Returns the delta that a checkpoint's configuration names; None if its weights are whole, or not in it.

    Raises the errors of `checkpoint_in`. `folder` is that of a local checkpoint, `kwargs` are those of
    `from_pretrained`.
    """
    if folder is not None:
        return delta_file(folder) if checkpoint_in(folder) == "delta" else None
    if path is None or kwargs.get("state_dict") is not None or Path(path).is_dir():
        return None
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    settings = cached_file(path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if settings is None or not named_delta(Path(settings)):
        return None
    hub["revision"] = commit_of(Path(settings).parent) or hub.get("revision")
    found = cached_file(path, DELTA_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    return Path(found or cached_file(path, OLD_DELTA_NAME, **hub))


def _local_checkpoint(path, subfolder: str) -> Path | None:
    """Returns the folder of a local checkpoint; None for a Hub id, an adapter's folder or no path."""
    if path is None:
        return None
    folder = Path(path) / (subfolder or "")
    return folder if (folder / "config.json").is_file() else None


def expected_shards(config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and safetensors type of the tables, token map and hash constants of a configuration."""
    with torch.device("meta"):
        memory = EngramMemory(config)
    named = {MEMORY_PREFIX + name: tensor for name, tensor in memory.state_dict().items()}
    return {
        name: (tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
        for name, tensor in named.items()
        if name.startswith(FIXED_PREFIXES)
    }


def _refuse_incomplete_checkpoint(path, info: dict) -> None:
    """Raises EngramFormatError if loading left a weight unset: Transformers would fill it with random values."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key) for key in info["mismatched_keys"] if MEMORY_PREFIX in str(key))
    if mismatched:
        raise EngramFormatError(
            f"'{path}' holds parts of the memory in other shapes than its config.json: {', '.join(mismatched[:3])}. "
            "Load the config.json that was saved beside the shards."
        )
    if any(name.startswith(MEMORY_PREFIX) for name in missing):
        raise EngramFormatError(
            f"'{path}' has no or not the whole memory ({len(missing)} tensors missing, first {missing[0]}), and a "
            "memory is never filled with random rows. Graft one with `engram graft DONOR OUT` or from_backbone."
        )
    if missing:
        raise EngramFormatError(
            f"'{path}' lacks {len(missing)} backbone weights, first {missing[0]}. If it was saved by EngramModel it "
            "has no language-model head: load it with AutoModel."
        )


def number_rest_files(draft: Path) -> dict[str, str]:
    """Renames the files that Transformers wrote for the common index; returns the file of each tensor.

    A single `model.safetensors` would be read instead of the index.
    """
    if (draft / SINGLE_NAME).exists():
        os.rename(draft / SINGLE_NAME, draft / shard_name(MODEL_STEM, 1, 1))
    (draft / INDEX_NAME).unlink(missing_ok=True)
    files = sorted(draft.glob(f"{MODEL_STEM}-*.safetensors"))
    return {name: path.name for path in files for name in read_header(path)}
