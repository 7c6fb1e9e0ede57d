"""Grafting: gives an existing checkpoint an Engram memory and reuses its weight files.

Promises: the graft's folder appears whole or not at all; it is loaded once, strictly, before it appears; the backbone's
folder is only read (files are copied by reference where the file system supports it, never hard-linked, because a later
save would write into the original); a zero table takes neither disk nor memory. Never unpickles code, and never runs
custom code unless told to.
Source: docs/design.md, "Grafting"; docs/format.md.
"""

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PROCESSOR_MAPPING, AutoConfig, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

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
from ..rows_quantised_engram import row_bytes
from .backbone import left_out, load_donor
from .donor import RECEIPT_NAME, donor_folder, donor_weight_files, read_donor
from .new_checkpoint import dry_load
from .reference_copy import copy_by_reference
from .sizes import log_size
from .transplant import transplant


# Files of a composite model's processor, but for its tokenizer.
PROCESSOR_FILES = ["*processor_config.json", "chat_template.json", "chat_template.jinja"]


def graft(
    donor: str | os.PathLike,
    out: str | os.PathLike,
    engram_layer_ids: list[int] | None = None,
    *,
    tokenizer: str | os.PathLike | None = None,
    text_only: bool | None = None,
    max_memory_shard_size: int | str = MAX_MEMORY_SHARD_SIZE,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    cache_dir: str | os.PathLike | None = None,
    init_from: str | os.PathLike | None = None,
    init_text: str | os.PathLike | None = None,
    init_reader: bool = False,
    **engram_fields,
) -> Path:
    """Writes a checkpoint of `donor` with a fresh memory; its logits are the backbone's.

    Args:
        donor (`str` or `os.PathLike`): a folder or a Hub id of any causal language model of Transformers, or of a
            composite model that reads text and images.
        out (`str` or `os.PathLike`): the new folder; must not exist, or be empty.
        engram_layer_ids (`list[int]`, *optional*): layers that read, counted from 0; the second and the middle if None.
        tokenizer (`str` or `os.PathLike`, *optional*): folder or id of the tokenizer, if the backbone has none.
        text_only (`bool`, *optional*): of a composite model, whether to take its text model alone (`True`) or the whole
            (`False`). If None, the text model where AutoModelForCausalLM gives that (qwen3_5, llama4), else the whole.
        max_memory_shard_size (`int` or `str`, *optional*, defaults to `"8GB"`): largest memory file.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the tokenizer's custom code; a backbone with
            custom code is refused.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): for a private or gated repository; that of your login if None.
        subfolder (`str`, *optional*, defaults to `""`): subfolder of the folder or repository.
        cache_dir (`str` or `os.PathLike`, *optional*): where downloads are stored; the Hub's cache if None.
        init_from (`str` or `os.PathLike`, *optional*):
            Folder of another memory, whose table the graft begins with; sizes that are not given are that memory's.
        init_text (`str` or `os.PathLike`, *optional*):
            Text file over which that table is re-addressed, if tokenizer or sizes differ.
        init_reader (`bool`, *optional*, defaults to `False`):
            Also take that memory's projections, norms and convolution; else they are fresh.
        engram_fields: fields of [`EngramConfig`], such as `engram_vocab_size=200_000` or `engram_head_dim=48`, or
            `**PRESETS["engram-27b"]`. Without `engram_vocab_size`, all tables together take at most 2 bytes for each
            parameter of the backbone, in whole thousands of rows a head: at least 1,000, at most 200,000.

    Returns:
        `Path` of the new folder.

    Raises:
        `FileExistsError`: if `out` is in use.
        `ValueError`: if the backbone has a memory already, does not load cleanly, or cannot take one, if tables of
            the default size would take more than half of the free disk, or if the memory of `init_from` does not fit.

    Example:

    ```python
    >>> from engram_transformers.conversion import graft

    >>> graft("runs/donor", "runs/graft", [1, 10], engram_vocab_size=200_000, engram_head_dim=48)
    ```"""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"'{out}' exists and is not empty: a graft never overwrites. Name another folder.")
    hub = {"token": token, "cache_dir": cache_dir}
    folder = donor_folder(donor, subfolder, revision=revision, **hub)
    read = read_donor(folder, tokenizer, text_only, trust_remote_code, **hub)
    other = transplant(init_from, init_text, init_reader)
    if other is None:
        made = read.fresh_memory(engram_layer_ids, **engram_fields)
    else:
        made = other.fresh_memory(read, engram_layer_ids, engram_fields)
    config, token_map = made.config, made.token_map
    # Zero tables take no disk: what needs room is a save of trained rows.
    log_size(config, shutil.disk_usage(existing(out)).free, "disk once they are trained and saved", made.parameters)
    shard_bytes = parse_size(max_memory_shard_size)
    if "engram_table_parts" not in engram_fields:
        config.engram_table_parts = parts_for(config, shard_bytes)
    with torch.device("meta"):
        empty = EngramForCausalLM.class_for(config)(config)
    config.engram_hash_sha256 = derive_constants(config, token_map).sha256()

    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.grafting-", dir=out.parent))
    draft.chmod(0o755)
    try:
        _write_description(draft, empty, config, read.tokenizer, folder)
        problem = "its text model alone" if read.cuts else None
        if problem is None:
            reused = _reuse_donor_files(draft, folder)
            _write_weights(draft, empty, config, token_map, shard_bytes)
            problem = dry_load(draft) if reused else "the donor has no safetensors files"
        if problem:
            text_only = read.cuts if holds_other_models(read.whole) else None
            lost = _rewrite_donor_files(draft, folder, read.tokenizer, text_only)
            _write_weights(draft, empty, config, token_map, shard_bytes)
            problem_left = dry_load(draft)
            if problem_left:
                raise ValueError(f"the graft of '{donor}' does not load cleanly: {problem_left}.")
        if other is not None:
            other.fill(draft)
        # Of a local folder only the name: receipts are published, and paths hold names of users and machines.
        name = Path(donor).resolve().name if Path(donor).is_dir() else os.fspath(donor)
        source = {"donor": name, "subfolder": subfolder, "revision": commit_of(folder)}
        source |= {"left_out": lost} if read.cuts else {}
        source |= other.told() if other is not None else {}
        _write_receipt(draft, source, config, engram_fields, "rewritten: " + problem if problem else "reused")
        if out.exists():
            out.rmdir()
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def existing(folder: Path) -> Path:
    """Returns the folder, or the nearest existing one above it."""
    return next(above for above in (folder, *folder.absolute().parents) if above.is_dir())


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


def _reuse_donor_files(draft: Path, folder: Path) -> bool:
    """Copies the backbone's weight files under the checkpoint's names; False if it has no safetensors."""
    files = donor_weight_files(folder)
    for number, path in enumerate(files, start=1):
        read_header(path)
        copy_by_reference(path, draft / shard_name(MODEL_STEM, number, len(files) + 1))
    return bool(files)


def _rewrite_donor_files(draft: Path, folder: Path, tok, text_only: bool | None) -> dict | None:
    """Loads the backbone strictly and saves it in the present form of Transformers, file by file.

    Returns:
        `dict`: what was left out of a composite model, if only its text model is wanted.
    """
    for path in [*draft.glob("*.safetensors"), draft / INDEX_NAME]:
        path.unlink(missing_ok=True)
    model, _ = load_donor(str(folder), tok, text_only=text_only)
    with tempfile.TemporaryDirectory(dir=draft) as rewritten:
        model.save_pretrained(rewritten, save_original_format=False)  # the names that the modules have
        number_rest_files(Path(rewritten))
        files = sorted(Path(rewritten).glob("*.safetensors"))
        for number, path in enumerate(files, start=1):
            os.replace(path, draft / shard_name(MODEL_STEM, number, len(files) + 1))
    return left_out(AutoConfig.from_pretrained(folder), model) if text_only else None


def _write_weights(
    draft: Path, empty: EngramForCausalLM, config: EngramConfig, token_map: torch.Tensor, shard_bytes: int
) -> None:
    """Writes the memory's other weights, its tables, and the indexes."""
    donor_files = sorted(draft.glob(f"{MODEL_STEM}-*.safetensors"))
    dense = draft / shard_name(MODEL_STEM, len(donor_files) + 1, len(donor_files) + 1)
    if not any(path.name == dense.name for path in donor_files):
        write_shard(dense, _fresh_layers(empty, config) | _fresh_hashing(config, token_map))
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


def _write_receipt(draft: Path, source: dict, config: EngramConfig, fields: dict, donor_files: str) -> None:
    """Writes how the graft was made, so that it can be made again."""
    receipt = {
        **{name: value for name, value in source.items() if value},
        "donor_files": donor_files,
        "recipe": {name: getattr(config, name) for name in ("engram_layer_ids", "engram_vocab_size")} | fields,
        "token_map_sha256": config.engram_token_map_sha256,
        "hash_sha256": config.engram_hash_sha256,
        "versions": {name: version(name) for name in ("engram-transformers", "transformers", "torch", "tokenizers")},
    }
    (draft / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
