"""Backbones for a graft, and the configuration that fits them.

Promises: a backbone is complete (no weight missing, none unknown) and its tokenizer is its own; the configuration
records the token map's digest. Never unpickles code, and never runs a backbone's custom code unless told to.
Source: docs/design.md, "Grafting".
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..adapters.peft_adapters import unwrapped_donor
from ..backbone_engram import find_decoder_layers, quantization_in_graft
from ..configuration_engram import EngramConfig, holds_other_models, placeholder_ids
from ..files_checkpoint_engram import HUB_ARGUMENTS
from ..hash_tokens_engram import TokenCompressor, token_map_sha256, without_placeholders
from ..modeling_engram import EngramForConditionalGeneration
from ..rows_accelerate_engram import computing_device
from ..rows_placement_engram import free_memory
from .sizes import count_parameters, default_rows, log_size


logger = logging.get_logger(__name__)


def load_donor(
    donor: PreTrainedModel | str, tokenizer, trust_remote_code: bool = False, text_only: bool | None = None, **kwargs
):
    """Loads a backbone and its tokenizer, or takes loaded ones.

    Args:
        donor (`PreTrainedModel` or `str`): a causal language model or a composite one, a folder or a Hub id.
        tokenizer (`PreTrainedTokenizerBase`, `str` or None): the backbone's tokenizer; None for a folder or id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): for tokenizers with custom code.
        text_only (`bool`, *optional*): see `takes_text_model`.
        kwargs: arguments of `from_pretrained`.

    Returns:
        `tuple` of model and tokenizer.

    Raises:
        `TypeError`: if the backbone is not a model, or a model comes without a tokenizer.
        `ValueError`: if the backbone has a memory already or custom code, its files do not hold every weight, or
            Transformers has no auto class that would load what is saved of it.
    """
    if isinstance(donor, PreTrainedModel):
        if tokenizer is None:
            raise TypeError("from_backbone(model) needs the model's tokenizer as well: pass tokenizer=...")
        if kwargs:
            raise TypeError(f"unexpected arguments for a donor that is loaded already: {sorted(kwargs)}.")
        refuse_own_code(donor.config.model_type, type(donor))
        cuts = bool(text_only)  # whoever loaded the whole wants it
    else:
        source = str(donor)
        found = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        loader = _loader_of(source, found)
        donor, info = loader.from_pretrained(source, output_loading_info=True, **kwargs)
        _refuse_incomplete_donor(source, info)
        cuts = takes_text_model(donor.config, text_only)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **found)
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    if donor.config.model_type == EngramConfig.model_type:
        raise ValueError(
            "the donor already has an Engram memory: load it with from_pretrained, or graft its own donor."
        )
    auto_class(donor.config)
    if cuts and holds_other_models(donor.config):
        whole, donor = donor.config, text_model_of(donor)
        lost = left_out(whole, donor)
        # A warning, because the default verbosity hides the rest, and images are then not understood.
        logger.warning(
            f"The text model of {whole.model_type} is grafted alone: {', '.join(lost['modules'])} ({lost['bytes']:,} "
            "bytes) are left out, so it reads no images. text_only=False (--whole) grafts the whole model."
        )
    return donor, tokenizer


def _loader_of(source: str, found: dict):
    """Returns the auto class that loads a folder or Hub id; refuses custom code."""
    try:
        model_type = PreTrainedConfig.get_config_dict(source, **found)[0].get("model_type")
    except OSError:  # adapters and GGUF files have none; from_pretrained reports missing files
        return AutoModelForCausalLM
    refuse_own_code(model_type)
    if model_type in (None, EngramConfig.model_type):
        return AutoModelForCausalLM
    return auto_class(AutoConfig.from_pretrained(source, **found))


def takes_text_model(config: PreTrainedConfig, text_only: bool | None) -> bool:
    """Whether a graft takes the text model of a composite donor, and not the whole.

    Args:
        config (`PreTrainedConfig`): the donor's, composite.
        text_only (`bool`, *optional*): if None, as AutoModelForCausalLM does: the text model for types whose text model
            it gives (qwen3_5, llama4), else the whole.
    """
    given = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    chosen = given is not None and given.config_class is type(config.get_text_config(decoder=True))
    return chosen if text_only is None else text_only


def auto_class(config: PreTrainedConfig):
    """Returns the auto class that loads a donor; of a composite one the whole.

    Raises:
        `ValueError`: if there is none.
    """
    composite = holds_other_models(config)
    known, loader = MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    if composite:
        known, loader = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText
    if type(config) not in known:
        raise ValueError(
            f"the donor is of the {'composite ' if composite else ''}type {config.model_type}, which "
            f"{loader.__name__} does not know: only causal language models, and models that read text and images, are "
            "grafted, because what is saved is loaded by its type. If it holds a causal language model, load that and "
            "pass it to from_backbone; if it is the text model of a composite one, graft the whole."
        )
    return loader


def text_class(composite: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the causal class of a composite model's language model.

    Raises:
        `ValueError`: if Transformers has none.
    """
    text_config = composite.get_text_config(decoder=True)
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    if found is None:
        raise ValueError(
            f"the language model of {composite.model_type} ({text_config.model_type}) has no class of its own in "
            "Transformers' AutoModelForCausalLM, so it cannot be cut out: graft the whole model (text_only=False)."
        )
    return found


def text_model_of(whole: PreTrainedModel) -> PreTrainedModel:
    """Returns the language model of a composite model, with the same modules; the rest is dropped.

    Raises:
        `ValueError`: if Transformers has no causal language model of this type, or the composite model is quantised.
    """
    reader, kind, made_by = whole.get_decoder(), whole.config.model_type, text_class(whole.config)
    if getattr(whole, "hf_quantizer", None) is not None:
        raise ValueError(f"text_only=True cannot cut a text model out of a quantised {kind}: load it unquantised.")
    embeddings, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    reader.config.tie_word_embeddings = head.weight is embeddings.weight
    with torch.device("meta"):
        text = made_by(reader.config)
    if isinstance(reader, made_by):  # llama4
        return reader.eval()
    if type(reader) is not type(text.base_model):
        raise ValueError(
            f"{made_by.__name__} is built on {type(text.base_model).__name__}, and {kind} holds a "
            f"{type(reader).__name__}: its text model cannot be cut out. Graft the whole model (text_only=False)."
        )
    setattr(text, text.base_model_prefix, reader)
    text.set_output_embeddings(head)
    text.generation_config = whole.generation_config
    return text.eval()


def left_out(whole: PreTrainedConfig, text: PreTrainedModel) -> dict:
    """Returns what a text model lacks of its composite model: names of modules, and bytes in the text model's type."""
    with torch.device("meta"):
        composite = AutoModelForImageTextToText.from_config(copy.deepcopy(whole))
    reader = composite.get_decoder()
    kept = sum(parameter.numel() for parameter in text.parameters())
    parameters = sum(parameter.numel() for parameter in composite.parameters()) - kept
    names = [name for name, module in composite.base_model.named_children() if module is not reader]
    return {"modules": names, "bytes": parameters * text.dtype.itemsize}


def refuse_own_code(model_type: str | None, model_class: type = PreTrainedModel) -> None:
    """Raises ValueError for a backbone with custom code: its saved graft could not be loaded.

    Args:
        model_type (`str`, *optional*): of its configuration.
        model_class (`type`, *optional*): the backbone's, if it is loaded already.
    """
    own = model_class.__module__.startswith("transformers_modules.")  # where `trust_remote_code=True` puts code
    if own or (model_type is not None and model_type not in CONFIG_MAPPING):
        raise ValueError(
            f"the donor (model_type {model_type!r}) brings code of its own, or is of a type that this Transformers "
            "does not know: a graft holds no code of donors, so what is saved of it could not be loaded. Use one that "
            "Transformers has a class for (a newer version may), or register yours with AutoConfig.register and "
            "AutoModelForCausalLM.register wherever the graft is loaded."
        )


def _refuse_incomplete_donor(source: str, info: dict) -> None:
    """Raises ValueError if a backbone's files have missing, unknown or misshapen weights."""
    problems = [
        f"{len(info[kind])} {label} ({', '.join(sorted(map(str, info[kind]))[:3])}, ...)"
        for kind, label in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unknown"),
            ("mismatched_keys", "misshapen"),
        )
        if info.get(kind)
    ]
    if problems:
        raise ValueError(
            f"the donor '{source}' does not load cleanly: {'; '.join(problems)}. A graft of it would be partly random: "
            "repair the donor (AutoModelForCausalLM.from_pretrained must report nothing) and graft again."
        )


def _default_layer_ids(text_config: PreTrainedConfig) -> list[int]:
    """The paper's choice at any depth: the second decoder layer and the one in the middle, counted from 0."""
    depth = getattr(text_config, "num_hidden_layers", 1)  # EngramConfig refuses a type without (blt)
    return sorted({min(1, depth - 1), max(0, depth // 2 - 1)})


@dataclass
class FreshMemory:
    """Configuration and token map of a memory that is to be made.

    Args:
        config ([`EngramConfig`]): has every size, also default ones.
        token_map (`torch.LongTensor` of shape `(vocab_size,)`): class of every id.
        parameters (`int`, *optional*): of the backbone, if the number of rows was derived from it.
    """

    config: EngramConfig
    token_map: torch.Tensor
    parameters: int | None


def fresh_memory(
    donor_config: PreTrainedConfig,
    tokenizer,
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    engram_layer_ids: list[int] | None = None,
    **fields,
) -> FreshMemory:
    """Works out a fresh memory; without `engram_vocab_size`, `default_rows` chooses its size.

    Args:
        donor_config (`PreTrainedConfig`): the backbone's; copied.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's.
        make (callable): makes a model of the backbone's configuration, to count its parameters.
        engram_layer_ids (`list[int]`, *optional*): layers that read; `_default_layer_ids` if None.
        fields: other fields of [`EngramConfig`].
    """
    donor_config = copy.deepcopy(donor_config)
    text_config, composite = donor_config.get_text_config(decoder=True), holds_other_models(donor_config)
    raw = fields.get("engram_hash_scheme") == "qwen"  # ids are not compressed, so that each is its own class
    if raw:
        token_map = torch.arange(text_config.vocab_size, device="cpu")  # (vocab_size,)
    else:
        token_map = TokenCompressor.from_tokenizer(tokenizer).token_map(text_config.vocab_size)  # (vocab_size,)
    classes = int(token_map.max()) + 1  # those of the text model alone, so that addresses are the same
    if composite:
        token_map = without_placeholders(token_map, placeholder_ids(donor_config))
    if fields.get("engram_pad_token_id") is None and fields.get("engram_pad_id") is None:
        named = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        fields["engram_pad_token_id"] = next((i for i in named if i is not None), None)
    rows = fields.pop("engram_vocab_size", None)
    config = EngramConfig(
        **{"composite_config" if composite else "text_config": donor_config},
        engram_layer_ids=engram_layer_ids or _default_layer_ids(text_config),
        engram_compressed_vocab_size=classes,
        engram_token_map_sha256=None if raw else token_map_sha256(token_map),
        dtype=donor_config.dtype,
        **({} if rows is None else {"engram_vocab_size": rows}),
        **fields,
    )
    parameters = None
    if rows is None:
        parameters = count_parameters(donor_config, make)
        config.engram_vocab_size = default_rows(config, parameters)
    if (quantization := getattr(donor_config, "quantization_config", None)) is not None:
        config.quantization_config = quantization_in_graft(quantization)
    return FreshMemory(config, token_map, parameters)


def graft_onto(
    model_class: type[PreTrainedModel],
    donor: PreTrainedModel | str,
    tokenizer,
    engram_layer_ids: list[int] | None,
    trust_remote_code: bool,
    text_only: bool | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Implements `EngramForCausalLM.from_backbone`."""
    if text_only is None and issubclass(model_class, EngramForConditionalGeneration):
        text_only = False
    engram = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("engram_")}
    if hasattr(donor, "peft_config"):
        donor = unwrapped_donor(donor)
    donor, tokenizer = load_donor(donor, tokenizer, trust_remote_code=trust_remote_code, text_only=text_only, **kwargs)
    made = fresh_memory(donor.config, tokenizer, type(donor), engram_layer_ids=engram_layer_ids, **engram)
    # Each memory layer and its table go to the device of the decoder layer.
    decoder_layers = find_decoder_layers(donor, made.config.text_config.num_hidden_layers)
    places = {str(layer): computing_device(decoder_layers[layer]) for layer in made.config.engram_layer_ids}
    # Tables are allocated in host memory and then moved; shared memory (a Mac's) is counted once.
    free = min(filter(None, free_memory(places)), default=0)
    log_size(made.config, free, "memory", made.parameters)
    model = model_class.class_for(made.config)(made.config, backbone=donor, token_map=made.token_map)
    model.generation_config = donor.generation_config
    model.memory.hashing.to(device=computing_device(donor.get_input_embeddings()))
    for layer, device in places.items():
        model.memory.layers[layer].to(device=device, dtype=donor.dtype)
        model.memory.tables[layer].to(device=device)
    return model.eval()
