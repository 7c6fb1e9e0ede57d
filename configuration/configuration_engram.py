"""EngramConfig: everything that determines where a row of the memory is and how it is read.

Promises: field names follow the released DeepSeek-V4.1 checkpoint where it has one; an unknown `engram_*` name, a value
out of range and an impossible combination are refused with the value, what is needed and what to do; another model's
`config.json` is never read as an Engram with default values. Never imports a model or touches a weight file.
Source: Engram (arXiv 2601.07372), sections 2 and 4.1 and Table 5; the demo `engram_demo_v1.py` for what the paper
leaves open; config.json of deepseek-ai/DeepSeek-V4.1-Flash for the preset of that name.
"""

import difflib
import math
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Literal

from packaging.version import Version
from transformers import __version__ as transformers_version
from transformers.utils import logging


logger = logging.get_logger(__name__)

# As in setup.py, which a checkpoint's copy of this code does not have: the oldest tested version of Transformers, and
# the first one that is not tested.
TESTED_FROM, NOT_TESTED_FROM = "5.20.2", "5.25"
REMEDY = (
    f"install transformers>={TESTED_FROM},<{NOT_TESTED_FROM}, or a newer engram-transformers (on no index yet: `pip "
    "install .` in a clone of its repository, or a wheel that `make wheel` builds there) and `import "
    "engram_transformers` before the model is loaded."
)


def _warn_of_other_transformers(version: str) -> None:
    """Logs a warning if this Transformers is outside of the tested range."""
    first, end = Version(TESTED_FROM).release, Version(NOT_TESTED_FROM).release
    if not first <= Version(version).release < end:
        logger.warning(
            f"This code of engram-transformers was tested with transformers {TESTED_FROM} to before {NOT_TESTED_FROM}, "
            f"and this is {version}: if anything fails or changes, {REMEDY}"
        )


@contextmanager
def saying_what_to_install():
    """Turns a failed import of a name that another package has dropped into an error that says what to install."""
    try:
        yield
    except Exception as error:
        if REMEDY in str(error):
            raise
        raise ImportError(
            f"this code of engram-transformers cannot run under transformers {transformers_version} ({error}): {REMEDY}"
        ) from error


_warn_of_other_transformers(transformers_version)

with saying_what_to_install():
    from huggingface_hub.dataclasses import strict
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.configuration_utils import SubConfigSpec


FORMAT_VERSION = 1

# Types of rows. The last two are quantised.
TableDtype = Literal["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]

# Backbones whose residual stream has an unsupported shape, by the config field that shows it.
FOREIGN_STREAMS = {
    "altup_num_inputs": "AltUp keeps its streams in front of the batch (Gemma 3n)",
    "ngram": "streams that predict further tokens lie behind the text (ProphetNet)",
}


# Fields of a composite configuration that name tokens in place of an image, a video or sound, or at their borders.
PLACEHOLDER_FIELD = re.compile(r"(image|video|audio|vision|visual|frame|speech|bo[aiv]|eo[aiv]).*_token_(ids?|index)$")


class EngramFormatError(ValueError):
    """A checkpoint does not hold what its configuration and index say: damaged, incomplete or of another memory."""


class Presets(dict[str, Mapping[str, Any]]):
    """Sizes of known memories, fields of [`EngramConfig`] by name, which cannot be changed; `PRESETS` has them all.

    Which layers read is not among them, because it depends on the backbone's depth.

    Raises:
        `ValueError`: for another name.

    Example:

    ```python
    >>> from engram_transformers.configuration import PRESETS

    >>> PRESETS["engram-27b"]["engram_vocab_size"]
    2262400
    ```"""

    def __missing__(self, name: str):
        raise ValueError(f"there is no preset {name!r}: choose from {', '.join(self)}, or give sizes.")


def _sizes(rows: int, width: int, **others) -> Mapping[str, Any]:
    """Returns the fields of a memory with this many rows for each head, 8 heads, and orders 2 and 3 unless said."""
    usual = {"engram_max_ngram_size": 3, "engram_n_heads": 8, "engram_kernel_size": 4}
    return MappingProxyType({"engram_vocab_size": rows, "engram_head_dim": width} | usual | others)


PRESETS = Presets(
    {
        # The paper's Table 5: 5.79 and 18.53 billion values in two layers
        "engram-27b": _sizes(2_262_400, 80),
        "engram-40b": _sizes(7_239_680, 80),
        # What `engram_demo_v1.py` sets; its vocabulary is 129,280, of which it takes 5 rows each
        "demo": _sizes(646_400, 64, engram_projection_bias=True),
        # DeepSeek-V4.1-Flash as released: 384,006,168 and 384,016,682 rows in layers 1 and 14. Its type of rows, e4m3
        # with scales, is left to `engram_table_dtype`.
        "deepseek-v4.1": _sizes(16_000_000, 256, engram_max_ngram_size=4, engram_kernel_size=0, engram_norm_eps=1e-20),
        # Ours, to try things out: 128 KB a layer in float32
        "tiny": _sizes(1000, 8, engram_n_heads=2),
    }
)


# Names of fields before 0.1; files with them are still read.
OLD_NAMES = {"engram_train_mode": "engram_trainable", "engram_memory_pack": "engram_memory_delta"}


@strict
class EngramConfig(PreTrainedConfig):
    r"""Configuration of a causal language model with an Engram memory around any backbone of Transformers.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama configuration):
            Configuration of the backbone, any causal language model of Transformers; with `composite_config`, that of
            its language model.
        composite_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a whole composite backbone (image-text-to-text), whose language model reads the memory.
        engram_layer_ids (`list[int]`, *optional*, defaults to `[1, 14]`):
            Decoder layers that read the memory, counted from 0 (the paper's layers 2 and 15, counted from 1). The order
            is kept: the primes, and so every address, depend on it.
        engram_vocab_size (`int` or `list[int]`, *optional*, defaults to 2262400):
            Lower bound for the rows of one head; every head gets a different prime number of rows at or above it. One
            number, or one for each order (paper Table 5: 2262400 for 27B, 7239680 for 40B). The default applies to a
            configuration written by hand; `from_backbone` and `graft` derive a smaller one from the backbone.
        engram_max_ngram_size (`int`, *optional*, defaults to 3):
            Longest n-gram N; the orders are 2..N.
        engram_n_heads (`int`, *optional*, defaults to 8):
            Heads (hash functions) for each order.
        engram_head_dim (`int`, *optional*, defaults to 80):
            Width of a row in values. The memory vector has (N - 1) x heads x width values (paper: 1280).
        engram_compressed_vocab_size (`int`, *optional*):
            Classes of token ids after compression; the hash multipliers are derived from it. Defaults to the backbone's
            vocabulary, which means no compression.
        engram_pad_token_id (`int`, *optional*):
            Token id that stands for "nothing" where an n-gram begins before the text. Defaults to the backbone's pad,
            end or begin token, or 0. `engram_pad_id` is read too.
        engram_seed (`int`, *optional*, defaults to 0):
            Seed of the hash multipliers.
        engram_kernel_size (`int`, *optional*, defaults to 4):
            Kernel size of the short causal convolution, whose dilation is N; 0 leaves it out, as V4.1 does.
        engram_hc_mult (`int`, *optional*):
            Residual streams, each with its own key. Defaults to the backbone's (`hc_mult`, `hc_count` or 1) and must
            equal it.
        engram_gate (`"signed_sqrt"`, `"signed_sqrt_or_zero"` or `"sigmoid"`, *optional*, defaults to `"signed_sqrt"`):
            `sigmoid` is the paper's equation 4; `signed_sqrt` takes the signed square root before the sigmoid, as V4.1
            does, and `signed_sqrt_or_zero` leaves a score of exactly 0 as it is, as the demo and Qwen4-Exp do.
        engram_projection_bias (`bool`, *optional*, defaults to `False`):
            Whether key and value projections have biases. Only for imported demo weights: with a bias an n-gram that
            was never trained contributes something.
        engram_norm_eps (`float`, *optional*, defaults to 1.1920928955078125e-07):
            Epsilon of the key and query norms (demo: float32's machine epsilon; V4.1: 1e-20).
        engram_conv_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the norm before the convolution.
        engram_zero_centred_norms (`bool`, *optional*, defaults to `False`):
            Whether the weights of all norms are differences from 1, as Qwen4-Exp's.
        engram_conv_across_documents (`bool`, *optional*, defaults to `False`):
            Whether the convolution reads across the borders of documents, at which n-grams stop, as Qwen4-Exp's does.
        engram_initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of fresh key projections.
        engram_value_initializer_range (`float`, *optional*, defaults to 0.04):
            Standard deviation of fresh value projections. Larger than the keys' because the gradient of a zero table
            passes through it (measured, see docs/design.md).
        engram_table_dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the rows, in memory and on disk, whatever `dtype=` a model is loaded with: "float32", "bfloat16",
            "float16", or quantised "int8" (a scale for each row) or "float8_e4m3fn" (one for each 32 values). Quantised
            rows are not trained; `engram cast` makes them from trained ones.
        engram_table_parts (`int`, *optional*, defaults to 1):
            Parameters for each layer and order. Fixed at the graft: a part is the smallest unit that a file can hold.
        engram_hash_scheme (`"deepseek"`, `"qwen"` or `"one_row"`, *optional*, defaults to `"deepseek"`):
            `deepseek` is the paper's multiplicative-XOR hash. `qwen` is the same hash with Qwen4-Exp's multipliers and
            without compression. `one_row` gives every head a single row: a control with the memory's dense weights and
            no n-gram knowledge.
        engram_reset_token_ids (`list[int]`, *optional*):
            Tokens after which a new document begins: n-grams and convolution do not look back across them (an
            end-of-sequence token, as in Qwen4's memory). None, as in the paper, treats them like any text.
        engram_trainable (`"memory"`, `"tables"`, `"reader"`, `"memory+lora"` or `"all"`, *optional*):
            Which parameters are trained; set by `model.set_trainable(...)`, restored by `from_pretrained`. None: not
            chosen yet.
        engram_memory_delta (`str`, *optional*):
            In the `config.json` of a folder whose weights are another checkpoint's and a delta's: the delta's file
            name. Written by each save, never by hand.
        engram_format_version (`int`, *optional*, defaults to 1):
            Version of the checkpoint format (docs/format.md).
        engram_token_map_sha256 (`str`, *optional*):
            SHA-256 of the token map. None means that every id is its own class.
        engram_hash_sha256 (`str`, *optional*):
            SHA-256 of the hash constants, filled in when they are first derived.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from engram_transformers import EngramConfig, EngramForCausalLM

    >>> config = EngramConfig(text_config=LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=128),
    ...                       engram_layer_ids=[1], engram_vocab_size=1000, engram_head_dim=8)
    >>> model = EngramForCausalLM(config)
    ```"""

    model_type = "engram_lm"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        # The type is for a dictionary that names none.
        "composite_config": SubConfigSpec(config_class=AutoConfig, model_type="gemma3", optional=True),
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # since transformers 5.24, and before

    text_config: dict | PreTrainedConfig | None = None
    composite_config: dict | PreTrainedConfig | None = None
    engram_layer_ids: list[int] | tuple[int, ...] = (1, 14)
    engram_vocab_size: int | list[int] | tuple[int, ...] = 2_262_400
    engram_max_ngram_size: int = 3
    engram_n_heads: int = 8
    engram_head_dim: int = 80
    engram_compressed_vocab_size: int | None = None
    engram_pad_token_id: int | None = None
    engram_seed: int = 0
    engram_kernel_size: int = 4
    engram_hc_mult: int | None = None
    engram_gate: Literal["signed_sqrt", "signed_sqrt_or_zero", "sigmoid"] = "signed_sqrt"
    engram_projection_bias: bool = False
    engram_norm_eps: float = 1.1920928955078125e-07
    engram_conv_norm_eps: float = 1e-05
    engram_zero_centred_norms: bool = False
    engram_conv_across_documents: bool = False
    engram_initializer_range: float = 0.02
    engram_value_initializer_range: float = 0.04
    engram_table_dtype: TableDtype = "float32"
    engram_table_parts: int = 1
    engram_hash_scheme: Literal["deepseek", "qwen", "one_row"] = "deepseek"
    engram_reset_token_ids: list[int] | tuple[int, ...] | None = None
    engram_trainable: Literal["memory", "tables", "reader", "memory+lora", "all"] | None = None
    engram_memory_delta: str | None = None
    engram_format_version: int = FORMAT_VERSION
    engram_token_map_sha256: str | None = None
    engram_hash_sha256: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if (pad_id := kwargs.pop("engram_pad_id", None)) is not None:
            if self.engram_pad_token_id not in (None, pad_id):
                raise ValueError(
                    f"engram_pad_id={pad_id} and engram_pad_token_id={self.engram_pad_token_id} are two names of one "
                    "value and differ: give one of them."
                )
            self.engram_pad_token_id = pad_id
        super().__post_init__(**kwargs)
        if self.composite_config is not None:
            check_composite(self.composite_config)
            self.text_config = self.composite_config.get_text_config(decoder=True)
        text = self.text_config
        _refuse_parts(text)
        self.tie_word_embeddings = bool(getattr(self.whole_config, "tie_word_embeddings", False))
        self.engram_layer_ids = list(self.engram_layer_ids)
        if not isinstance(self.engram_vocab_size, int):
            self.engram_vocab_size = list(self.engram_vocab_size)
        if self.engram_reset_token_ids is not None:
            self.engram_reset_token_ids = list(self.engram_reset_token_ids)
        if self.engram_hc_mult is None:
            self.engram_hc_mult = _backbone_streams(text)
        if self.engram_compressed_vocab_size is None:
            self.engram_compressed_vocab_size = text.vocab_size
        if self.engram_pad_token_id is None:
            self.engram_pad_token_id = _default_pad_token_id(text)
        # Checked here too, because an error from `validate_architecture` reaches the user as StrictDataclassError,
        # which is not a ValueError (huggingface_hub 2.4).
        self.check_engram()

    def validate_architecture(self):
        """Part of `@strict` validation: runs at construction and before a config is saved."""
        super().validate_architecture()
        self.check_engram()

    def check_engram(self) -> None:
        """Raises ValueError for every combination of Engram fields that no checkpoint can have."""
        _refuse_unknown_names(vars(self))
        _check_layers(self)
        _check_sizes(self)
        _check_tokens(self)
        _check_streams(self)

    @classmethod
    def preset(cls, name: str, **fields) -> "EngramConfig":
        """Makes a configuration with the sizes of a known memory.

        Args:
            name (`str`): "engram-27b", "engram-40b", "demo", "deepseek-v4.1" or "tiny"; `PRESETS` has their fields.
            fields: other fields, such as `text_config`; those that a preset has too go before it.

        Raises:
            `ValueError`: for another name, or sizes that the backbone cannot take.

        Example:

        ```python
        >>> from engram_transformers import EngramConfig

        >>> EngramConfig.preset("engram-40b", engram_layer_ids=[1, 10]).engram_vocab_size
        7239680
        ```"""
        return cls(**{**PRESETS[name], **fields})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Reads a `config.json`, refusing one that belongs to another kind of model.

        Args:
            config_dict (`dict[str, Any]`): the parsed file.

        Raises:
            `ValueError`: if the file is a backbone's, or an adapter of another package that also says "engram".
        """
        _refuse_foreign_config(config_dict)
        config_dict = {OLD_NAMES.get(name, name): value for name, value in config_dict.items()}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        # Refused before Transformers warns that it reads another model's fields as ours.
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _refuse_foreign_config(config_dict)
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; of a composite backbone, the language model's part is stored once.

        Where the backbone was loaded from is left out, as Transformers leaves it out of a configuration that is not
        part of another one: it may be a path, and `config.json` is published.
        """
        output = super().to_dict()
        if self.composite_config is not None:
            del output["text_config"]
        for part in (output.get("text_config"), output.get("composite_config")):
            if isinstance(part, dict):
                part.pop("_name_or_path", None)
        return output

    def __getattr__(self, name: str):
        # `generate`, processors and trainers ask a model's configuration which ids are placeholders.
        composite = self.__dict__.get("composite_config")
        if composite is not None and PLACEHOLDER_FIELD.search(name):
            return getattr(composite, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @property
    def whole_config(self) -> PreTrainedConfig:
        """Configuration of the backbone: `composite_config`, or `text_config` if it has none."""
        return self.text_config if self.composite_config is None else self.composite_config

    @property
    def placeholder_ids(self) -> list[int]:
        """Token ids that are not text: they stand for an image, a video or sound, or at its borders."""
        return [] if self.composite_config is None else placeholder_ids(self.composite_config)

    # Derived sizes are here because shapes on disk depend on them.

    @property
    def engram_orders(self) -> list[int]:
        """Orders of the n-grams, 2..N."""
        return list(range(2, self.engram_max_ngram_size + 1))

    @property
    def engram_vocab_sizes(self) -> list[int]:
        """Lower bound for a head's rows, one for each order."""
        if isinstance(self.engram_vocab_size, int):
            return [self.engram_vocab_size] * len(self.engram_orders)
        return list(self.engram_vocab_size)

    @property
    def engram_memory_dim(self) -> int:
        """Values in the memory vector of one token: orders x heads x row width."""
        return len(self.engram_orders) * self.engram_n_heads * self.engram_head_dim


def _refuse_unknown_names(names: dict[str, Any]) -> None:
    """Raises ValueError for an unknown name that starts with `engram_`; `@strict` would keep it silently."""
    known = [field.name for field in fields(EngramConfig)]
    for name in names:
        if name.startswith("engram_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known names: {', '.join(sorted(_known_engram(known)))}."
            raise ValueError(f"EngramConfig has no field `{name}` (value {names[name]!r}): {hint}")


def _known_engram(known: list[str]) -> list[str]:
    """Returns the `engram_*` names among `known`."""
    return [name for name in known if name.startswith("engram_")]


def _backbone_streams(text_config: PreTrainedConfig) -> int:
    """Returns the backbone's number of residual streams (1 for everything but hyper-connections)."""
    return int(getattr(text_config, "hc_mult", None) or getattr(text_config, "hc_count", None) or 1)


def _default_pad_token_id(text_config: PreTrainedConfig) -> int:
    """Returns the default id for "nothing" in an n-gram: pad, else end, else begin, else 0."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(text_config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and 0 <= value < text_config.vocab_size:
            return value
    return 0


def _refuse_foreign_config(config_dict: dict[str, Any]) -> None:
    """Raises ValueError for another model's `config.json`, with what to do."""
    found = config_dict.get("model_type")
    if found != EngramConfig.model_type:
        raise ValueError(foreign_config_message(found, config_dict))


def foreign_config_message(found: str | None, config_dict: dict[str, Any]) -> str:
    """Returns the error message for another model's `config.json`."""
    if found == "engram":
        origin = (
            "engram-peft" if {"engram_version", "engine", "target_layers"} & set(config_dict) else "another package"
        )
        return (
            f"this folder says model_type 'engram', which is {origin}'s adapter format, not an engram_transformers "
            "checkpoint ('engram_lm'). Its rows lie at other addresses and cannot be copied: graft the base model with "
            "`engram graft DONOR OUT` and train the memory again."
        )
    if found is None:
        return "this config.json names no model_type; an Engram checkpoint says 'engram_lm'."
    return (
        f"this folder holds a '{found}' model without an Engram memory, and EngramConfig would have to make one up. "
        "Graft one with `engram graft DONOR OUT --layer-ids 1,10 --vocab-size 200000` or "
        "`EngramForCausalLM.from_backbone(DONOR, tokenizer, engram_layer_ids=[1, 10])`, or wrap the configuration with "
        "EngramConfig(text_config=AutoConfig.from_pretrained(DONOR), ...)."
    )


def _check_layers(config: EngramConfig) -> None:
    """Checks that layer ids exist in the backbone and are unique."""
    ids, depth = config.engram_layer_ids, config.text_config.num_hidden_layers
    if not ids:
        raise ValueError("engram_layer_ids is empty: name at least one decoder layer, counted from 0.")
    if len(set(ids)) != len(ids):
        raise ValueError(f"engram_layer_ids={ids} names a layer twice: a layer has one table, so name each layer once.")
    outside = [layer for layer in ids if isinstance(layer, bool) or not 0 <= layer < depth]
    if outside:
        raise ValueError(
            f"engram_layer_ids={ids} names layers {outside}, but the backbone ({config.text_config.model_type}) has "
            f"layers 0..{depth - 1} (counted from 0): choose from those."
        )


def _check_sizes(config: EngramConfig) -> None:
    """Checks that every size is possible."""
    for name, least in (
        ("engram_max_ngram_size", 2),
        ("engram_n_heads", 1),
        ("engram_head_dim", 1),
        ("engram_kernel_size", 0),
        ("engram_hc_mult", 1),
        ("engram_table_parts", 1),
        ("engram_seed", 0),
        ("engram_compressed_vocab_size", 1),
    ):
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{name}={value} is too small: it must be at least {least}.")
    if config.engram_table_dtype == "float8_e4m3fn" and config.engram_head_dim % 32:
        raise ValueError(
            f"engram_table_dtype='float8_e4m3fn' has a scale for each 32 values, and engram_head_dim="
            f"{config.engram_head_dim} is not divisible by 32: choose a multiple of 32, or engram_table_dtype='int8'."
        )
    sizes = config.engram_vocab_sizes
    if len(sizes) != len(config.engram_orders):
        raise ValueError(
            f"engram_vocab_size={config.engram_vocab_size} has {len(sizes)} entries, but "
            f"engram_max_ngram_size={config.engram_max_ngram_size} makes {len(config.engram_orders)} orders "
            f"({config.engram_orders}): give one number, or one for each order."
        )
    if min(sizes) < 1:
        raise ValueError(f"engram_vocab_size={config.engram_vocab_size}: a head needs at least 1 row.")
    for name in ("engram_norm_eps", "engram_conv_norm_eps", "engram_initializer_range"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be a number larger than 0.")
    if not 0 < config.engram_value_initializer_range < math.inf:
        raise ValueError(
            f"engram_value_initializer_range={config.engram_value_initializer_range} must be larger than 0: with zero "
            "tables and a zero value projection no gradient would ever reach the memory."
        )
    if config.engram_format_version != FORMAT_VERSION:
        raise ValueError(
            f"engram_format_version={config.engram_format_version}, but this package reads version {FORMAT_VERSION}: "
            "install the engram-transformers release that wrote the checkpoint (or a newer one)."
        )


def holds_other_models(config: PreTrainedConfig) -> bool:
    """Whether a configuration is composite: it holds other models as well as a text model."""
    return config.get_text_config(decoder=True) is not config


def _refuse_parts(text_config: PreTrainedConfig) -> None:
    """Raises ValueError for a configuration that holds other models as well as a text model, or only other models."""
    if holds_other_models(text_config):
        text = text_config.get_text_config(decoder=True)
        raise ValueError(
            f"the backbone {text_config.model_type} holds other models beside its text model ({text.model_type}): "
            "graft the whole model with EngramForConditionalGeneration.from_backbone or "
            "EngramConfig(composite_config=config), or its text model alone with from_backbone(name, text_only=True) "
            "or EngramConfig(text_config=config.get_text_config())."
        )
    missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(text_config, name)]
    if missing:
        raise ValueError(
            f"the configuration of the backbone {text_config.model_type} has no {' and no '.join(missing)}: Engram "
            "needs one stack of decoder layers with one width. Graft a model that has one."
        )


def placeholder_ids(composite: PreTrainedConfig) -> list[int]:
    """Returns the token ids that a composite configuration names for images, videos, sound and their borders."""
    found = set()
    for name in filter(PLACEHOLDER_FIELD.search, dir(composite)):
        value = getattr(composite, name)
        values = value if isinstance(value, (list, tuple)) else [value]
        found |= {token for token in values if isinstance(token, int) and token >= 0}
    return sorted(found)


def check_composite(composite: PreTrainedConfig) -> None:
    """Raises ValueError for a composite model in which a memory could not know which positions are text."""
    kind = composite.model_type
    if not holds_other_models(composite):
        raise ValueError(f"{kind} is a text model's configuration, not a composite one: pass it as text_config=.")
    if composite.is_encoder_decoder:
        raise ValueError(
            f"the backbone {kind} is an encoder-decoder model: its prompt is read by the encoder, and a memory in the "
            "decoder would never see it. Graft a decoder-only model."
        )
    text = composite.get_text_config(decoder=True)
    _refuse_foreign_streams(text)
    placeholders, vocabulary = placeholder_ids(composite), text.vocab_size
    outside = [token for token in placeholders if token >= vocabulary]
    if outside or not placeholders:
        what = f"names placeholders {outside} outside of the vocabulary of {vocabulary}" if outside else "names none"
        raise ValueError(
            f"the backbone {kind} must name the tokens that stand for its images (image_token_id or the like) inside "
            f"its text model's vocabulary, and {what}: positions without text could not be told from text. Graft its "
            "text model alone: text_only=True."
        )


def _check_tokens(config: EngramConfig) -> None:
    """Checks that token ids are in the vocabulary."""
    vocabulary = config.text_config.vocab_size
    if not 0 <= config.engram_pad_token_id < vocabulary:
        raise ValueError(
            f"engram_pad_token_id={config.engram_pad_token_id} is outside the vocabulary of {vocabulary} ids: name the "
            "tokenizer's pad or end token."
        )
    for token in config.engram_reset_token_ids or []:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"engram_reset_token_ids={config.engram_reset_token_ids}: {token} is outside the vocabulary of "
                f"{vocabulary} ids. Name the tokens that end a document, such as tokenizer.eos_token_id."
            )
    if config.engram_hash_scheme == "qwen" and (config.engram_token_map_sha256 or config.placeholder_ids):
        raise ValueError(
            "engram_hash_scheme='qwen' hashes token ids as they are, without a token map, and "
            f"{'the backbone has ids for images' if config.placeholder_ids else 'engram_token_map_sha256 names one'}: "
            "graft a text model, or choose engram_hash_scheme='deepseek'."
        )
    if config.engram_token_map_sha256 is None and config.engram_compressed_vocab_size > vocabulary:
        raise ValueError(
            f"engram_compressed_vocab_size={config.engram_compressed_vocab_size} is larger than the vocabulary of "
            f"{vocabulary} ids: compression can only merge ids."
        )


def _refuse_foreign_streams(text_config: PreTrainedConfig) -> None:
    """Raises ValueError for a backbone whose residual stream no memory fits."""
    for name, reason in FOREIGN_STREAMS.items():
        if getattr(text_config, name, None):
            raise ValueError(
                f"the backbone {text_config.model_type} has {name}={getattr(text_config, name)}: {reason}. Engram "
                "needs streams of batch x length x hidden, or batch x length x hc_mult x hidden."
            )


def _check_streams(config: EngramConfig) -> None:
    """Checks that the memory fits the backbone's residual stream."""
    _refuse_foreign_streams(config.text_config)
    streams = _backbone_streams(config.text_config)
    if config.engram_hc_mult != streams:
        raise ValueError(
            f"engram_hc_mult={config.engram_hc_mult}, but the backbone ({config.text_config.model_type}) carries "
            f"{streams} residual stream(s): leave engram_hc_mult out, or set it to {streams}."
        )
