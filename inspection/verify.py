"""Verification of a checkpoint: its files, hash constants and tokenizer, and whether it generates exactly.

Promises: every section is checked even if an earlier one fails; constants are derived again and compared with the
stored ones; only the last section loads the model, the others need memory for the token map, whatever the size of the
tables. Never changes a file.
Source: docs/format.md, docs/generation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from ..configuration import EngramConfig
from ..files_checkpoint_engram import expected_shards
from ..files_safetensors_engram import check_folder, read_header, read_index
from ..hash_constants_engram import HashConstants, derive_constants
from ..hash_ngrams_engram import NgramHasher
from ..hash_tokens_engram import DEAD, check_token_map
from ..memory_engram import MEMORY_PREFIX
from ..modeling_engram import EngramForCausalLM
from .generation import GenerationReport, check_generation


@dataclass(frozen=True)
class Finding:
    """Result of one section.

    Args:
        section (`str`): "files", "constants", "tokenizer" or "generation".
        ok (`bool`): whether the section is right.
        detail (`str`): what was found, or what is wrong and what to do.
        report ([`GenerationReport`], *optional*): every mode of generating.
    """

    section: str
    ok: bool
    detail: str
    report: GenerationReport | None = None


def verify_checkpoint(
    folder: str | Path, tokenizer: str | Path | None = None, *, generation: bool = True
) -> list[Finding]:
    """Checks a local checkpoint.

    Args:
        folder (`str` or `Path`): the checkpoint.
        tokenizer (`str` or `Path`, *optional*): folder or id of a tokenizer to check instead of the checkpoint's own.
        generation (`bool`, *optional*, defaults to `True`):
            Load the model and run it in every mode of generating, see [`check_generation`].

    Returns:
        `list[Finding]`, one for each section.

    Raises:
        `FileNotFoundError`: if there is no configuration.
        `ValueError`: if the configuration is not an Engram's.

    Example:

    ```python
    >>> from engram_transformers.inspection import verify_checkpoint

    >>> all(finding.ok for finding in verify_checkpoint("runs/demo/graft"))
    True
    ```"""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"'{folder}' has no config.json: name the folder of an Engram checkpoint.")
    config = EngramConfig.from_pretrained(folder)
    findings = [
        look("files", lambda: _files_section(folder, config)),
        look("constants", lambda: _constants_section(folder, config)),
        look("tokenizer", lambda: _tokenizer_section(folder, config, tokenizer)),
    ]
    return [*findings, _generation_section(folder, tokenizer)] if generation else findings


def look(section: str, check: Callable[[], str]) -> Finding:
    """Runs one section; an error that a user can cause becomes its finding."""
    try:
        return Finding(section, True, check())
    except (ValueError, OSError, KeyError) as error:
        return Finding(section, False, str(error))


def _files_section(folder: Path, config: EngramConfig) -> str:
    """Checks headers and lengths of all files, and shapes of the memory's tensors."""
    expected = expected_shards(config)
    check_folder(folder, expected)
    files = sorted(set(read_index(folder).values()))
    size = sum((folder / name).stat().st_size for name in files)
    return f"{len(files)} files, {size:,} bytes, {len(expected)} memory tensors in the right shapes"


def _constants_section(folder: Path, config: EngramConfig) -> str:
    """Checks digests and rules of the stored constants, and whether they can be derived again."""
    hashing = stored_hashing(folder, config)
    hashing.check(config)
    derived = derive_constants(config, hashing.token_map).named()
    for name, stored in hashing.constants.named().items():
        if not torch.equal(stored, derived[name]):
            raise ValueError(
                f"stored {name} are lawful but not the ones that this configuration derives ({stored.flatten()[0]} "
                f"stored first, {derived[name].flatten()[0]} derived): the stored ones are used, but the checkpoint "
                "was written by another version or changed by hand."
            )
    heads = hashing.primes.numel()
    return f"{heads} heads, {int(hashing.primes.sum()):,} rows; digests match, constants derive again"


def _tokenizer_section(folder: Path, config: EngramConfig, tokenizer: str | Path | None) -> str:
    """Checks that the tokenizer gives the stored token map."""
    token_map = _read_tensors(folder, ["token_map"])["token_map"]
    tok = AutoTokenizer.from_pretrained(tokenizer or folder)
    check_token_map(token_map, tok, config.engram_compressed_vocab_size, config.placeholder_ids)
    dead = int((token_map == DEAD).sum())
    return f"{len(token_map)} ids in {int(token_map.max()) + 1} classes, {dead} without a tokenizer entry"


def _generation_section(folder: Path, tokenizer: str | Path | None) -> Finding:
    """Checks that the model generates exactly in every mode."""
    try:
        model = EngramForCausalLM.from_pretrained(folder)
        report = check_generation(model, AutoTokenizer.from_pretrained(tokenizer or folder))
    except (ValueError, OSError, KeyError) as error:
        return Finding("generation", False, str(error))
    named = ", ".join(result.mode for result in report.wrong)
    return Finding("generation", report.ok, report.summary() + (f": {named}" if named else ""), report)


def stored_hashing(folder: Path, config: EngramConfig) -> NgramHasher:
    """Returns the hasher that a checkpoint stores."""
    names = ["multipliers", "primes", "offsets", "pad_class", "token_map"]
    tensors = _read_tensors(folder, names)
    token_map = tensors.pop("token_map")
    return NgramHasher(config.engram_layer_ids, token_map, HashConstants(**tensors))


def _read_tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Reads hashing tensors by their short names."""
    weight_map = read_index(folder)
    tensors = {}
    for name in names:
        key = f"{MEMORY_PREFIX}hashing.{name}"
        if key not in weight_map:
            raise ValueError(f"the index does not name '{key}': restore the `model-*.safetensors` files.")
        read_header(folder / weight_map[key])
        with safe_open(folder / weight_map[key], framework="pt") as file:
            tensors[name] = file.get_tensor(key)
    return tensors
