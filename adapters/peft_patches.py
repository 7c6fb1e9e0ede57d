"""Patches applied to PEFT: its methods are wrapped where they would lose or damage a model's memory.

What it chooses: PEFT has no interface by which a model could declare its own state. A wrapper acts only on Engram
models and passes other calls through; each names the method that it replaces, and why. They are applied when both
`engram_transformers` and PEFT are imported, in any order.
Promises: `PeftModel.save_pretrained`, `from_pretrained` and `load_adapter` keep a memory that belongs to an adapter; an
adapter of the backbone loads under its own names or raises an error; what would copy a table, or does not work with a
memory, is refused when the adapter is made. Making a model patches nothing. Never imports PEFT unless asked to.
Source: docs/peft.md.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import re
import sys
import warnings
from pathlib import Path

from ..compat_engram import adapter_reaches, register_adapter_layer
from ..layer_engram import Projection
from ..memory_engram import MEMORY_PREFIX
from .peft_adapters import (
    find_delta,
    inside,
    memory_beside,
    other_layers,
    quiet_about_deltas,
    refuse_deltas,
    take_delta,
)


MODEL_TYPE = "engram_lm"
PROJECTION = "key_value"

# Methods that cannot work with a memory.
REFUSED = {
    "XLORA": "it runs every text twice and mixes adapters of one model each",
    "SHADOW": "its second network runs beside the backbone and has no memory",
}


def support_peft_when_imported() -> None:
    """Patches PEFT now if it is imported, else when it is."""
    if "peft" in sys.modules:
        support_peft()
    elif not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftFinder())


class PeftFinder(importlib.abc.MetaPathFinder):
    """Waits for PEFT's import, patches it, and removes itself.

    Python has no other hook after another package's import. Users import PEFT themselves, often after this package, and
    the first thing that they call may be a patched method.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):  # not run where somebody only asks whether PEFT is installed
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                support_peft()

            spec.loader.exec_module = exec_module
        return spec


def support_peft() -> None:
    """Patches PEFT, once; imports it if needed."""
    peft = importlib.import_module("peft")
    tuner = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    wrap(tuner, "get_model_config", _config_of_backbone)
    wrap(tuner, "inject_adapter", inject_adapter)
    for model in (peft.PeftModel, peft.PeftMixedModel):
        wrap(model, "load_adapter", load_adapter)
    wrap(peft.PeftModel, "from_pretrained", from_pretrained)
    wrap(peft.PeftModel, "save_pretrained", save_pretrained)
    wrap(peft.PeftModel, "add_adapter", add_adapter)


def wrap(owner: type, name: str, wrapper) -> None:
    """Replaces a method by `wrapper(original, *args, **kwargs)`, once."""
    held = inspect.getattr_static(owner, name)
    kind = type(held) if isinstance(held, (classmethod, staticmethod)) else None
    original = held.__func__ if kind else held
    step = original
    while step is not None:
        if getattr(step, "patched_by", None) == __name__:
            return
        step = getattr(step, "__wrapped__", None)

    @functools.wraps(original)
    def patched(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    patched.patched_by = __name__
    setattr(owner, name, kind(patched) if kind else patched)


def _config_of_backbone(original, model) -> dict:
    """Replaces `BaseTuner.get_model_config`: returns the backbone's configuration.

    PEFT uses it to choose the layers of a bare `LoraConfig()`, and to find tied embeddings.
    """
    config = original(model)
    if config.get("model_type") != MODEL_TYPE:
        return config
    return config.get("composite_config") or config.get("text_config") or config


def inject_adapter(original, tuner, model, adapter_name, *args, **kwargs):
    """Replaces `BaseTuner.inject_adapter`, which every method that adapts layers calls.

    It refuses what would copy or damage the memory, finds layers by their names in the backbone, and keeps the chosen
    `engram_trainable`.
    """
    if inside(model) is not model:
        return original(tuner, model, adapter_name, *args, **kwargs)
    config = tuner.peft_config[adapter_name]
    _refuse_method(config)
    _name_from_the_root(config, model)
    _refuse_memory(tuner, config, model)
    if model._tied_weights_keys is None:
        model._tied_weights_keys = {}  # PEFT then asks the backbone which layers are tied to its embeddings
    result = original(tuner, model, adapter_name, *args, **kwargs)
    if not config.inference_mode and getattr(model.config, "engram_trainable", None) == "memory+lora":
        model.set_trainable("memory+lora")
    return result


def add_adapter(original, model, adapter_name, peft_config, *args, **kwargs):
    """Replaces `PeftModel.add_adapter`: refuses prompt methods, which adapt no layer."""
    if inside(model) is not None:
        _refuse_method(peft_config)
    return original(model, adapter_name, peft_config, *args, **kwargs)


def _refuse_method(config) -> None:
    """Raises an error for methods that cannot work with a memory."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise NotImplementedError(
            f"{kind} puts virtual tokens in front of the text, which have no ids for the memory to read. Adapt layers "
            "instead (LoRA, IA3, ...)."
        )
    if kind in REFUSED:
        raise NotImplementedError(f"{kind} does not work with a memory: {REFUSED[kind]}. Use LoRA, IA3, ....")
    if getattr(config, "layer_replication", None):
        raise NotImplementedError(
            "layer_replication copies decoder layers, and the memory is made for those that there are: replicate the "
            "donor's layers, save it, and graft that."
        )


def _name_from_the_root(config, model) -> None:
    """Makes patterns that were written for the backbone find its layers under `backbone.`."""
    names = [name for name, _ in model.named_modules()]
    donors = [name.removeprefix("backbone.") for name in names if name.startswith("backbone.")]
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field, None)
        if not isinstance(pattern, str) or pattern.lower() == "all-linear":
            continue
        if not matches(pattern, names) and matches(pattern, donors):
            setattr(config, field, rf"backbone\.(?:{pattern})")


def matches(pattern: str, names: list[str]) -> bool:
    """Whether a pattern matches any whole name."""
    return any(re.fullmatch(pattern, name) for name in names)


def _refuse_memory(tuner, config, model) -> None:
    """Raises ValueError for settings that would copy, wrap or adapt parts of the memory other than its projections."""
    modules = [name for name, _ in model.named_modules() if f"{name}.".startswith(MEMORY_PREFIX)]
    weights = [name for name, _ in model.named_parameters() if name.startswith(MEMORY_PREFIX)]
    tokens = getattr(config, "trainable_token_indices", None)
    asked = {
        "modules_to_save": (list(getattr(config, "modules_to_save", None) or []), modules),
        "trainable_token_indices": (list(tokens) if isinstance(tokens, dict) else [], modules),
        "target_parameters": (list(getattr(config, "target_parameters", None) or []), weights),
    }
    for field, (wanted, names) in asked.items():
        found = next((name for name in names for end in wanted if name.endswith(end)), None)
        if found is not None:
            raise ValueError(
                f"{field}={wanted} reaches the memory ({found}), where PEFT would copy whole tables: leave it out, and "
                "train the memory itself: model.set_trainable('memory+lora')."
            )
    if getattr(config, "target_modules", None) is None or str(config.target_modules).lower() == "all-linear":
        return
    found = [name for name in modules if adapter_reaches(tuner, config, name)]
    others = [name for name in found if name.rpartition(".")[2] != PROJECTION]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if others or (found and kind != "LORA"):
        raise ValueError(
            f"target_modules={config.target_modules} of {kind} reaches the memory ({(others or found)[0]}): only its "
            f"projections ({PROJECTION!r}) can be adapted, by LoRA; set_trainable('memory+lora') trains all of it."
        )
    if found:
        register_adapter_layer(config, {Projection: _lora_for_projections()})


@functools.cache
def _lora_for_projections() -> type:
    """Returns PEFT's LoRA for linear layers, adapted to the memory's projection, which is not an `nn.Linear`."""
    linear = importlib.import_module("peft.tuners.lora.layer").Linear

    class ProjectionLora(linear):
        def __init__(self, base_layer, adapter_name, **kwargs):
            plain = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
            plain.out_features, plain.in_features = plain.weight.shape
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unsupported layer type")  # it computes what nn.Linear does
                super().__init__(base_layer, adapter_name, **kwargs)

    return ProjectionLora


def save_pretrained(original, model, *args, **kwargs):
    """Replaces `PeftModel.save_pretrained`: saves the memory with the adapter, if needed."""
    engram = inside(model)
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    folder = Path(given["save_directory"])
    if engram is None or not given.get("is_main_process", True) or folder.is_file():
        return original(model, *args, **kwargs)
    adapters = given.get("selected_adapters") or list(model.peft_config)
    folders = [folder if name == "default" else folder / name for name in adapters if name in model.peft_config]
    with memory_beside(engram, folders):
        return original(model, *args, **kwargs)


def from_pretrained(original, cls, model, model_id, adapter_name="default", *args, **kwargs):
    """Replaces `PeftModel.from_pretrained`: loads the memory that belongs to the adapter.

    It does so before `load_adapter`, so that a memory that does not fit is refused before layers are changed. A model
    without a memory refuses an adapter that was saved with one.
    """
    engram = inside(model)
    if engram is None:
        refuse_deltas(model, model_id, **kwargs)
        return original(cls, model, model_id, adapter_name, *args, **kwargs)
    take_delta(engram, adapter_name, find_delta(model_id, **kwargs))
    engram.delta_taken = adapter_name
    try:
        with quiet_about_deltas():
            return original(cls, model, model_id, adapter_name, *args, **kwargs)
    finally:
        engram.__dict__.pop("delta_taken", None)


def load_adapter(original, model, model_id, adapter_name, *args, **kwargs):
    """Replaces `load_adapter` of PeftModel and PeftMixedModel: as `from_pretrained`, for further adapters.

    It also loads an adapter that was made for the backbone, and refuses weights that fit nowhere, which PEFT would
    leave at their initial values.
    """
    engram = inside(model)
    if engram is None:
        refuse_deltas(model, model_id, **kwargs)
        return original(model, model_id, adapter_name, *args, **kwargs)
    known = adapter_name in model.peft_config
    if engram.__dict__.pop("delta_taken", None) != adapter_name:  # not loaded by `from_pretrained`
        take_delta(engram, adapter_name, find_delta(model_id, **kwargs))
    signature = inspect.signature(original)
    given = signature.bind(model, model_id, adapter_name, *args, **kwargs).arguments
    if "key_mapping" in signature.parameters and not given.get("key_mapping"):
        kwargs["key_mapping"] = _donors_names(engram)
    with quiet_about_deltas():
        result = original(model, model_id, adapter_name, *args, **kwargs)
    if result is not None and result.missing_keys and result.unexpected_keys:
        if not known:
            model.delete_adapter(adapter_name)
        raise other_layers(model_id, result.missing_keys, result.unexpected_keys)
    return result


def _donors_names(engram) -> dict[str, str]:
    """Returns PEFT's `key_mapping` from names in a backbone's adapter to the model's."""
    tops = "|".join(re.escape(name) for name, _ in engram.backbone.named_children())
    return {rf"^({tops})\.": r"backbone.\1."}
