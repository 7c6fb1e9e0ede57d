"""Grafting: gives an existing checkpoint an Engram memory and reuses its weight files.

Promises: the graft's folder appears whole or not at all; it is loaded once, strictly, before it appears; the backbone's
folder is only read (files are copied by reference where the file system supports it, never hard-linked, because a later
save would write into the original); a zero table takes neither disk nor memory. Never unpickles code, and never runs
custom code unless told to.
Source: docs/design.md, "Grafting"; docs/format.md.
"""

import errno
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PROCESSOR_MAPPING, AutoConfig, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.logging import tqdm

from ..configuration import EngramConfig, EngramFormatError
from ..configuration.configuration_engram import holds_other_models
from ..files_atomic_engram import INDEX_NAME, MEMORY_STEM, MODEL_STEM
from ..files_checkpoint_engram import auto_map, commit_of, number_rest_files
from ..files_safetensors_engram import (
    MAX_MEMORY_SHARD_SIZE,
    ZeroTensor,
    parse_size,
    read_header,
    shard_name,
    write_index,
    write_shard,
    write_shards,
)
from ..hash_constants_engram import derive_constants
from ..memory_engram import MEMORY_PREFIX
from ..modeling_engram import EngramForCausalLM
from ..rows_placement_engram import TABLES_PREFIX
from ..rows_quantised_engram import QUANTISED, row_bytes
from .backbone import FreshMemory, left_out, load_donor
from .donor import DonorRead, donor_folder, donor_weight_files, input_files, read_donor
from .draft import draft_for
from .initial_tables import Init, fill_tables, table_files, text_ids
from .new_checkpoint import dry_load
from .receipt import VERSIONS, Receipt
from .reference_copy import copy_by_reference
from .sizes import log_size, table_bytes
from .transplant import Transplant, transplant


# Files of a composite model's processor, but for its tokenizer.
PROCESSOR_FILES = ["*processor_config.json", "chat_template.json", "chat_template.jinja"]


def graft(
    donor: str | os.PathLike,
    out: str | os.PathLike,
    engram_layer_ids: list[int] | None = None,
    *,
    tokenizer: str | os.PathLike | None = None,
    text_only: bool | None = None,
    init: str = "zero",
    init_text: str | os.PathLike | None = None,
    init_std: float | None = None,
    init_from: str | os.PathLike | None = None,
    init_reader: bool = False,
    max_memory_shard_size: int | str = MAX_MEMORY_SHARD_SIZE,
    digests: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    cache_dir: str | os.PathLike | None = None,
    **engram_fields,
) -> Path:
    """Writes a checkpoint of `donor` with a fresh memory; with tables of zeros its logits are the backbone's.

    A run that was killed is continued by the same call: tables that it finished are not written again.

    Args:
        donor (`str` or `os.PathLike`): a folder or a Hub id of any causal language model of Transformers, or of a
            composite model that reads text and images.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        engram_layer_ids (`list[int]`, *optional*): layers that read, counted from 0; the second and the middle if None.
        tokenizer (`str` or `os.PathLike`, *optional*): folder or id of the tokenizer, if the backbone has none.
        text_only (`bool`, *optional*): of a composite model, whether to take its text model alone (`True`) or the whole
            (`False`). If None, the text model where AutoModelForCausalLM gives that (qwen3_5, llama4), else the whole.
        init (`str`, *optional*, defaults to `"zero"`): what rows start from: "zero", "normal" numbers, or, for the
            n-grams of a text, means of their tokens' "embeddings", or of what the backbone computes where they end
            ("corpus"). With other tables than those of zeros the logits are nearly, but not exactly, the backbone's.
        init_text (`str` or `os.PathLike`, *optional*): the text, in UTF-8, for "embeddings" and "corpus"; with
            `init_from` the text over which that memory is re-addressed, if tokenizer or sizes differ.
        init_std (`float`, *optional*): size of the rows' values; if None, 0.02 for "normal" numbers and 0.1 for a text.
        init_from (`str` or `os.PathLike`, *optional*): folder of another memory, whose table the graft begins with;
            sizes that are not given are that memory's.
        init_reader (`bool`, *optional*, defaults to `False`): also take that memory's projections, norms and
            convolution; else they are fresh.
        max_memory_shard_size (`int` or `str`, *optional*, defaults to `"8GB"`): largest memory file.
        digests (`bool`, *optional*, defaults to `True`): whether the receipt holds SHA-256 of all files.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the tokenizer's custom code; a backbone with
            custom code is refused.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): for a private or gated repository; that of your login if None.
        subfolder (`str`, *optional*, defaults to `""`): subfolder of the folder or repository.
        cache_dir (`str` or `os.PathLike`, *optional*): where downloads are stored; the Hub's cache if None.
        engram_fields: fields of [`EngramConfig`], such as `engram_vocab_size=200_000` or `engram_head_dim=48`, or
            `**PRESETS["engram-27b"]`. Without `engram_vocab_size`, all tables together take at most 2 bytes for each
            parameter of the backbone, in whole thousands of rows a head: at least 1,000, at most 200,000.

    Returns:
        `Path` of the new folder.

    Raises:
        `FileExistsError`: if `out` is in use.
        `BlockingIOError`: if another process makes the same graft.
        `FileNotFoundError`: if donor or text are missing.
        `ValueError`: if the backbone has a memory already, does not load cleanly, or cannot take one, if tables of
            the default size would take more than half of the free disk, if the memory of `init_from` does not fit, or
            for arguments that contradict each other.
        `OSError`: if tables that are not zeros do not fit on the disk.

    Example:

    ```python
    >>> from engram_transformers.conversion import graft

    >>> graft("runs/donor", "runs/graft", [1, 10], engram_vocab_size=200_000, engram_head_dim=48)
    ```"""
    out, start = Path(out), checked_start(init, init_text, init_std, init_from)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"'{out}' exists and is not empty: a graft never overwrites. Name another folder.")
    hub = {"token": token, "cache_dir": cache_dir}
    folder = donor_folder(donor, subfolder, revision=revision, **hub)
    read = read_donor(folder, tokenizer, text_only, trust_remote_code, **hub)
    other = transplant(init_from, None if start.text else init_text, init_reader)
    made = fresh_memory_of(read, other, engram_layer_ids, engram_fields)
    check_start(made.config, start)
    _check_room(made, out, start)
    ids = None if start.text is None else text_ids(start.text, read.tokenizer)
    shard_bytes = parse_size(max_memory_shard_size)
    if "engram_table_parts" not in engram_fields:
        made.config.engram_table_parts = parts_for(made.config, shard_bytes)
    made.config.engram_hash_sha256 = derive_constants(made.config, made.token_map).sha256()

    given = {"tokenizer": tokenizer, "text_only": text_only, "init_text": init_text, "init_std": init_std}
    given |= {"init": None if init == "zero" else init, "init_from": init_from, "init_reader": init_reader or None}
    given |= {"max_memory_shard_size": None if max_memory_shard_size == MAX_MEMORY_SHARD_SIZE else shard_bytes}
    recipe = {name: getattr(made.config, name) for name in ("engram_layer_ids", "engram_vocab_size")} | engram_fields
    recipe |= {name: _without_path(value) for name, value in given.items() if value is not None}
    inputs = {"": input_files(folder, read.tokenizer), "init_text/": [Path(init_text)] if init_text else []}
    inputs["init_from/"] = [] if other is None else other.input_files()
    if tokenizer is not None and Path(tokenizer).is_dir():
        inputs["tokenizer/"] = input_files(Path(tokenizer), read.tokenizer)
    with draft_for(out, _made_of(made.config, recipe, digests, inputs)) as draft:
        receipt = Receipt(draft, digests)
        receipt.keep_finished()
        told = {"donor": _without_path(donor), "subfolder": subfolder, "revision": commit_of(folder)}
        told |= _write_zero_graft(draft, folder, read, made, shard_bytes)
        if start.kind != "zero":
            fill_tables(draft, start, made.config, ids, receipt)
        if other is not None:
            other.fill(draft)
            told |= other.told()
        for prefix, paths in inputs.items():
            receipt.read(paths, prefix)
        if told["donor_files"] == "reused":
            receipt.copied({path.name: name for name, path in _donor_copies(folder).items()})
        told |= {"recipe": recipe, "token_map_sha256": made.config.engram_token_map_sha256}
        told |= {"hash_sha256": made.config.engram_hash_sha256}
        zeros = [path.name for path in table_files(draft)] if start.kind == "zero" and other is None else []
        receipt.write({name: value for name, value in told.items() if value}, zeros)
    return out


def checked_start(
    init: str, init_text: str | os.PathLike | None, init_std: float | None, init_from: str | os.PathLike | None
) -> Init:
    """Returns what tables start from; with `init_from` zeros, into which another memory's rows are written.

    Raises:
        `ValueError` or `FileNotFoundError`: as [`Init`], or if rows would start from two things.
    """
    if init_from is None:
        return Init(init, init_text and Path(init_text), init_std)
    if init != "zero":
        raise ValueError(f"init={init!r} and init_from are two starts of the same rows: leave one of them out.")
    return Init(init, None, init_std)


def fresh_memory_of(
    read: DonorRead, other: Transplant | None, engram_layer_ids: list[int] | None, fields: dict
) -> FreshMemory:
    """Works out the memory; sizes that are not given are those of a memory that is transplanted."""
    if other is None:
        return read.fresh_memory(engram_layer_ids, **fields)
    return other.fresh_memory(read, engram_layer_ids, fields)


def check_start(config: EngramConfig, start: Init) -> None:
    """Raises ValueError for rows of a quantised table that would not start as zeros."""
    if start.kind != "zero" and getattr(torch, config.engram_table_dtype) in QUANTISED:
        raise ValueError(
            f"init={start.kind!r} writes values, and engram_table_dtype={config.engram_table_dtype!r} is quantised: "
            "graft with 'bfloat16', and make the quantised checkpoint with `engram cast`."
        )


def existing(folder: Path) -> Path:
    """Returns the folder, or the nearest existing one above it."""
    return next(above for above in (folder, *folder.absolute().parents) if above.is_dir())


def _without_path(value):
    """Returns of a local folder or file its name alone: receipts are published, and paths name users and machines."""
    is_local = isinstance(value, str | os.PathLike) and Path(value).exists()
    return Path(value).resolve().name if is_local else os.fspath(value) if isinstance(value, os.PathLike) else value


def _made_of(config: EngramConfig, recipe: dict, digests: bool, inputs: dict[str, list[Path]]) -> str:
    """Returns a text that says all that decides about a graft's bytes; files by path, size and time of their change."""
    files = [path.resolve() for paths in inputs.values() for path in paths]
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    versions = {name: version(name) for name in VERSIONS}
    return json.dumps([config.to_json_string(), recipe, digests, states, versions], sort_keys=True, default=str)


def _check_room(made: FreshMemory, out: Path, start: Init) -> None:
    """Logs the size of the tables; refuses normal numbers that do not fit on the disk."""
    free = shutil.disk_usage(existing(out)).free
    where = "disk" if start.kind == "normal" else "disk once they are trained and saved"
    log_size(made.config, free, where, made.parameters)
    if start.kind == "normal" and table_bytes(made.config) > free:
        raise OSError(
            errno.ENOSPC,
            f"init='normal' writes {table_bytes(made.config):,} bytes of tables, and {free:,} are free: give fewer "
            "rows, init='zero', or a folder on a larger disk",
            os.fspath(out),
        )


def parts_for(config: EngramConfig, shard_bytes: int) -> int:
    """Returns the least number of parts with which every part of a table fits into a memory file."""
    most = shard_bytes // row_bytes(getattr(torch, config.engram_table_dtype), config.engram_head_dim)
    orders = {rows for layer in derive_constants(config, None).order_rows() for rows in layer}
    if most < 1:
        raise ValueError(f"max_memory_shard_size={shard_bytes:,} is smaller than one row: allow larger files.")
    parts = -(-max(orders) // most)
    # The last part also has the remaining rows.
    while any(rows - (parts - 1) * (rows // parts) > most for rows in orders):
        parts += 1
    return parts


def _write_zero_graft(draft: Path, folder: Path, read: DonorRead, made: FreshMemory, shard_bytes: int) -> dict:
    """Writes a graft with zeros in tables that are not there yet; returns what the receipt says of the donor."""
    with torch.device("meta"):
        empty = EngramForCausalLM.class_for(made.config)(made.config)
    _write_description(draft, empty, made.config, read.tokenizer, folder)
    problem, told = "its text model alone" if read.cuts else None, {}
    if problem is None:
        reused = _reuse_donor_files(draft, folder)
        _write_weights(draft, empty, made, shard_bytes)
        problem = dry_load(draft) if reused else "the donor has no safetensors files"
    if problem:
        text_only = read.cuts if holds_other_models(read.whole) else None
        lost = _rewrite_donor_files(draft, folder, read.tokenizer, text_only)
        _write_weights(draft, empty, made, shard_bytes)
        if problem_left := dry_load(draft):
            raise ValueError(f"the graft of '{folder}' does not load cleanly: {problem_left}.")
        told = {"left_out": lost} if read.cuts else {}
    return told | {"donor_files": "rewritten: " + problem if problem else "reused"}


def _write_description(draft: Path, empty: EngramForCausalLM, config: EngramConfig, tok, folder: Path) -> None:
    """Writes everything but weights: configuration, code, tokenizer, generation settings."""
    config.architectures = [type(empty).__name__]
    config.auto_map = auto_map(config)
    # The configuration's copy comes second: it replaces the re-export of the same name.
    custom_object_save(empty, draft, config=config)
    config.auto_map = auto_map(config)
    if config.composite_config is not None:
        _write_processor(draft, config, folder)
    config.save_pretrained(draft)
    tok.save_pretrained(draft)
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(config.whole_config)
    generation.save_pretrained(draft)


def _write_processor(draft: Path, config: EngramConfig, folder: Path) -> None:
    """Copies the files of a composite model's processor; names its class for those whose files do not."""
    for path in [path for pattern in PROCESSOR_FILES for path in folder.glob(pattern)]:
        shutil.copyfile(path, draft / path.name)
    processor = PROCESSOR_MAPPING.get(type(config.composite_config), None)
    if processor is not None:
        config.processor_class = processor.__name__


def _donor_copies(folder: Path) -> dict[str, Path]:
    """Returns the backbone's weight files by their names in a graft; none if it has no safetensors."""
    files = donor_weight_files(folder)
    return {shard_name(MODEL_STEM, number, len(files) + 1): path for number, path in enumerate(files, start=1)}


def _reuse_donor_files(draft: Path, folder: Path) -> bool:
    """Copies the backbone's weight files under the checkpoint's names; False if it has no safetensors."""
    copies = _donor_copies(folder)
    total = sum(path.stat().st_size for path in copies.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="copying the donor", leave=False, delay=1) as bar:
        for name, path in copies.items():
            read_header(path)
            copy_by_reference(path, draft / name)
            bar.update(path.stat().st_size)
    return bool(copies)


def _rewrite_donor_files(draft: Path, folder: Path, tok, text_only: bool | None) -> dict | None:
    """Loads the backbone strictly and saves it in the present form of Transformers, file by file.

    Returns:
        `dict`: what was left out of a composite model, if only its text model is wanted.
    """
    for path in [*draft.glob(f"{MODEL_STEM}-*.safetensors"), draft / INDEX_NAME]:
        path.unlink(missing_ok=True)
    model, _ = load_donor(str(folder), tok, text_only=text_only)
    with tempfile.TemporaryDirectory(dir=draft) as rewritten:
        model.save_pretrained(rewritten, save_original_format=False)  # the names that the modules have
        number_rest_files(Path(rewritten))
        files = sorted(Path(rewritten).glob("*.safetensors"))
        for number, path in enumerate(files, start=1):
            os.replace(path, draft / shard_name(MODEL_STEM, number, len(files) + 1))
    return left_out(AutoConfig.from_pretrained(folder), model) if text_only else None


def _write_weights(draft: Path, empty: EngramForCausalLM, made: FreshMemory, shard_bytes: int) -> None:
    """Writes the memory's other weights, its tables unless they are there, and the indexes."""
    donor_files = sorted(draft.glob(f"{MODEL_STEM}-*.safetensors"))
    dense = draft / shard_name(MODEL_STEM, len(donor_files) + 1, len(donor_files) + 1)
    if not any(path.name == dense.name for path in donor_files):
        write_shard(dense, _fresh_layers(empty, made.config) | _fresh_hashing(made.config, made.token_map))
    names = [(name, path.name) for path in (*donor_files, dense) for name in read_header(path)]
    weight_map = dict(names)
    if len(weight_map) != len(names):
        raise EngramFormatError(f"the donor's files hold a tensor twice ({len(names) - len(weight_map)} repeats).")
    tables = _fresh_tables(empty)
    weight_map |= write_shards(draft, MEMORY_STEM, tables, shard_bytes)
    total = sum(entry.end - entry.begin for path in draft.glob("*.safetensors") for entry in read_header(path).values())
    write_index(draft, weight_map, total, tables)


def _fresh_layers(empty: EngramForCausalLM, config: EngramConfig) -> dict[str, torch.Tensor]:
    """Returns initial dense weights of the memory, the same for the same seed."""
    layers = empty.memory.layers.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.engram_seed)
        for layer in layers.values():
            empty.init_engram_layer(layer)
    return {f"{MEMORY_PREFIX}layers.{name}": tensor.to(config.dtype) for name, tensor in layers.state_dict().items()}


def _fresh_hashing(config: EngramConfig, token_map: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns token map and hash constants."""
    constants = derive_constants(config, token_map).named() | {"token_map": token_map}
    return {f"{MEMORY_PREFIX}hashing.{name}": tensor for name, tensor in constants.items()}


def _fresh_tables(empty: EngramForCausalLM) -> dict[str, ZeroTensor]:
    """Returns tables of zeros."""
    return {
        MEMORY_PREFIX + name: ZeroTensor(tuple(tensor.shape), tensor.dtype)
        for name, tensor in empty.memory.state_dict().items()
        if (MEMORY_PREFIX + name).startswith(TABLES_PREFIX)
    }
