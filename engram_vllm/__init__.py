"""Plugin for vLLM: serves a graft with vLLM's own class of the backbone.

It is a package of its own, because vLLM asks for an older Transformers than `engram_transformers` imports. The files
about hashing, rows, packs and the layer are the package's: they are imported from its folder, without the package.
Promises: importing it needs neither vLLM nor a Transformers of a certain version. Never imports `engram_transformers`.
Source: docs/serving.md; vLLM 0.32, `vllm.plugins`.
"""

from importlib.util import find_spec


# This folder comes first: its `configuration_engram` is the one that the package's files import here.
__path__ += find_spec("engram_transformers").submodule_search_locations


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: vLLM calls it in each of its processes."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm import ModelRegistry

    from .configuration_engram import ServedConfig

    if ServedConfig.model_type not in CONFIG_MAPPING:  # else `engram_transformers` is imported, whose own serves too
        AutoConfig.register(ServedConfig.model_type, ServedConfig)
    ModelRegistry.register_model("EngramForCausalLM", "engram_vllm.served_model:EngramForCausalLM")
