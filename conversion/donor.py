"""Donors: found, downloaded, and read as far as a graft can be planned without their weights.

Promises: everything that refuses a donor by its configuration refuses it here, before weights are downloaded; of a
repository on the Hub one format of weights is fetched. Never writes anything but the Hub's cache.
Source: docs/design.md, "Grafting".
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import EngramConfig
from ..configuration.configuration_engram import foreign_config_message, holds_other_models
from ..files_atomic_engram import INDEX_NAME, SINGLE_NAME
from ..files_safetensors_engram import read_header
from .backbone import FreshMemory, auto_class, fresh_memory, refuse_own_code, takes_text_model, text_class


RECEIPT_NAME = "engram_graft.json"

# Files of a backbone on the Hub other than weights, which are chosen by name.
DONOR_FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]

# Names of weight files and indexes, in the order in which Transformers looks for them.
WEIGHT_FILES = [SINGLE_NAME, INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json"]

# Files that describe a model and its tokenizer, besides those that the tokenizer's class names.
_DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass
class DonorRead:
    """What is known of a donor before its weights are read.

    Args:
        whole (`PreTrainedConfig`): its configuration.
        config (`PreTrainedConfig`): that of the model that is grafted: the whole, or its text model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        make (`Callable`): makes a model of `config`.
        cuts (`bool`): whether the text model is cut out of a composite donor.
    """

    whole: PreTrainedConfig
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    make: Callable[[PreTrainedConfig], PreTrainedModel]
    cuts: bool

    def fresh_memory(self, engram_layer_ids: list[int] | None, **engram_fields) -> FreshMemory:
        """Works out the memory; see `conversion.backbone.fresh_memory`."""
        return fresh_memory(self.config, self.tokenizer, self.make, engram_layer_ids=engram_layer_ids, **engram_fields)


def read_donor(
    folder: Path, tokenizer: str | os.PathLike | None, text_only: bool | None, trust_remote_code: bool, **hub
) -> DonorRead:
    """Reads a donor's configuration and tokenizer; arguments as for [`graft`]."""
    whole = _read_donor_config(folder)
    cuts = holds_other_models(whole) and takes_text_model(whole, text_only)
    config, make = whole, auto_class(whole).from_config
    if cuts:
        config, make = whole.get_text_config(decoder=True), text_class(whole)
        config.tie_word_embeddings = whole.tie_word_embeddings
    elsewhere = {} if tokenizer is None else hub
    tok = AutoTokenizer.from_pretrained(tokenizer or folder, trust_remote_code=trust_remote_code, **elsewhere)
    config.dtype = config.dtype or whole.dtype or _stored_dtype(folder)
    return DonorRead(whole, config, tok, make, cuts)


def donor_folder(
    donor: str | os.PathLike, subfolder: str = "", revision: str | None = None, weights: bool = True, **hub
) -> Path:
    """Returns the local folder of the backbone's files, downloaded from the Hub if needed.

    Args:
        donor (`str` or `os.PathLike`): a folder or a Hub id.
        subfolder (`str`, *optional*, defaults to `""`): subfolder of the folder or repository.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        weights (`bool`, *optional*, defaults to `True`): whether weights are downloaded as well.
        hub: `token` and `cache_dir` of `snapshot_download`.
    """
    if Path(donor).is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for donors on the Hub, and '{donor}' is a folder: leave it out."
            )
        return Path(donor, subfolder)
    if os.sep in str(donor) and str(donor).count("/") != 1 or str(donor).startswith("."):
        raise FileNotFoundError(f"donor '{donor}' is neither a folder nor a Hub id of the form 'owner/name'.")
    inside = subfolder.strip("/") + "/" if subfolder.strip("/") else ""

    def fetch(names: list[str], revision: str | None) -> Path:
        """The snapshot, with files of these names in it."""
        # In the Hub's patterns a star stands for slashes as well: files of deeper folders are left out by name.
        wanted = {"allow_patterns": [inside + name for name in names], "ignore_patterns": [f"{inside}*/*"]}
        return Path(snapshot_download(str(donor), revision=revision, **wanted, **hub))

    snapshot = fetch(DONOR_FILES, revision)
    folder = snapshot / inside
    for name in WEIGHT_FILES if weights else ():  # the first kind that the donor has, and no other
        names = [name]
        if name.endswith(".index.json"):
            names = _indexed_files(folder / name) if (folder / name).is_file() else []
        if names and fetch(names, revision=snapshot.name) and (folder / names[0]).is_file():
            break
    return folder


def _indexed_files(index: Path) -> list[str]:
    """Returns the names of the weight files that an index lists."""
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _read_donor_config(folder: Path):
    """Reads the backbone's configuration; refuses models with a memory, and other packages' adapters."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' has no config.json: name a folder saved by Transformers, or a Hub id.")
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("model_type") == "engram":
        raise ValueError(foreign_config_message("engram", raw))
    if raw.get("model_type") == EngramConfig.model_type:
        raise ValueError(
            f"'{folder}' already has an Engram memory: load it with from_pretrained, or graft the donor that it "
            f"was made from (see its {RECEIPT_NAME})."
        )
    if (raw.get("quantization_config") or {}).get("quant_method") == "torchao":
        raise ValueError(
            f"'{folder}' is quantised by torchao, whose files name their tensors a second time and cannot be taken "
            "over: graft the donor that it was made from, and pass quantization_config to from_pretrained."
        )
    refuse_own_code(raw.get("model_type"))
    return AutoConfig.from_pretrained(folder)


def donor_weight_files(folder: Path) -> list[Path]:
    """Returns the backbone's safetensors files as Transformers would choose them: a single file before an index."""
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        return [folder / name for name in _indexed_files(folder / INDEX_NAME)]
    return []


def input_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """Returns the files of a donor, or of a tokenizer's folder, that a graft reads."""
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    indexed = [] if weights is None or weights.suffix != ".json" else _indexed_files(weights)
    names = {
        *_DESCRIPTIONS,
        *tokenizer.vocab_files_names.values(),
        *([] if weights is None else [weights.name]),
        *indexed,
    }
    return sorted(folder / name for name in names if (folder / name).is_file())


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Returns the type of the first floating-point tensor, for configurations without `dtype`."""
    for path in donor_weight_files(folder):
        for entry in read_header(path).values():
            if entry.dtype in FLOAT_DTYPES:
                return FLOAT_DTYPES[entry.dtype]
    return None
