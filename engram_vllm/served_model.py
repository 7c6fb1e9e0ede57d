"""EngramForCausalLM for vLLM: vLLM's own class of the backbone, with the memory added to its residual stream.

What it chooses: hooks before the decoder layers, so that the backbone's names, loaders and kernels stay vLLM's.
Promises: what it does not serve exactly is refused before a weight is loaded. Never imports a model of Transformers.
Source: vLLM 0.32, `vllm/model_executor/models`.
"""

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from .flat_memory import FlatMemory
from .model_state import EngramModelState
from .refusals import check_engine, check_served
from .slot_ids import IdsBySlot


class AddMemory:
    """Forward pre-hook of a decoder layer: adds the memory to what it reads.

    Args:
        model ([`EngramForCausalLM`]): holds the reads of the pass that is running.
        layer (`int`): number of the decoder layer.
    """

    def __init__(self, model: "EngramForCausalLM", layer: int):
        self.model, self.layer = model, layer

    def __call__(self, decoder_layer: nn.Module, args: tuple, kwargs: dict):
        bound = inspect.signature(decoder_layer.forward).bind(*args, **kwargs)
        given = bound.arguments
        stream, residual = given["hidden_states"], given.get("residual")
        if residual is not None:
            stream = stream + residual  # (T, D)
            given["residual"] = None  # as in the first layer: the whole stream is in `hidden_states`
        given["hidden_states"] = self.model.reads.added(self.layer, stream)
        return bound.args, bound.kwargs


class EngramForCausalLM(nn.Module):
    """A graft in vLLM.

    Args:
        vllm_config (`VllmConfig`): vLLM's settings. `additional_config` may hold `engram_packs` (files of knowledge
            packs, read in this order by every request) and `engram_placement` ("cpu" or "disk").
        prefix (`str`, *optional*): of the names of modules.

    Raises:
        `ValueError`: for a graft, a backbone or settings that are not served.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config, given = vllm_config.model_config.hf_config, vllm_config.additional_config
        check_engine(vllm_config)
        check_served(config)
        folder, packs = vllm_config.model_config.model, given.get("engram_packs", [])
        self.memory = FlatMemory(config, folder, given.get("engram_placement", "cpu"), packs)
        self.memory.to(vllm_config.device_config.device)
        self.backbone = init_vllm_registered_model(
            vllm_config, prefix=maybe_prefix(prefix, "backbone"), hf_config=config.text_config
        )
        found = decoder_layers(self.backbone, config.text_config.num_hidden_layers)
        for layer in config.engram_layer_ids:
            found[layer].register_forward_pre_hook(AddMemory(self, layer), with_kwargs=True)
        self.slots = None
        if not vllm_config.use_v2_model_runner:
            self.slots = IdsBySlot(self.memory.reach, vllm_config.cache_config.block_size)
        self.reads = None

    @staticmethod
    def get_model_state_cls() -> type[EngramModelState]:
        """The state that model runner V2 makes."""
        return EngramModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the backbone's embeddings `(T, D)` of ids `(T,)`."""
        return self.backbone.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, engram_history=None):
        """Returns hidden states `(T, D)` of ids `(T,)` at positions `(T,)`.

        `engram_history` is what `EngramModelState` hands over; None in model runner V1, and in runs without requests.
        """
        if engram_history is None:
            engram_history = self.history(input_ids.long())
        self.reads = self.memory.read(input_ids.long(), *engram_history)
        try:
            return self.backbone(input_ids, positions, intermediate_tensors, inputs_embeds)
        finally:
            self.reads = None

    def history(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns where requests begin and the ids before them; one text without a past in runs without requests."""
        metadata = get_forward_context().attn_metadata
        if self.slots is not None and metadata:
            return self.slots.history(ids, next(iter(metadata.values())))
        return torch.tensor([0, len(ids)], device=ids.device), ids.new_full((1, self.memory.reach), -1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Returns logits `(T, vocabulary)` of hidden states `(T, D)`."""
        return self.backbone.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Hands the backbone's weights to its own loader; the memory's are loaded already. Returns loaded names."""
        own = ((name.removeprefix("backbone."), tensor) for name, tensor in weights if not name.startswith("memory."))
        loaded = {f"backbone.{name}" for name in self.backbone.load_weights(own)}
        return loaded | {f"memory.{name}" for name, _ in self.memory.named_parameters()}


def decoder_layers(backbone: nn.Module, depth: int) -> nn.ModuleList:
    """Returns the decoder layers of one of vLLM's models.

    Raises:
        `ValueError`: if they cannot be told from other modules, or do not take the residual stream by its usual name.
    """
    lists = [own for own in backbone.modules() if isinstance(own, nn.ModuleList) and len(own) == depth]
    lists = [own for own in lists if "hidden_states" in inspect.signature(own[0].forward).parameters]
    if len(lists) != 1 or getattr(backbone, "is_hybrid", False):
        raise ValueError(
            f"vLLM's {type(backbone).__name__} is not made of one list of {depth} decoder layers of attention that "
            "take `hidden_states`: a memory cannot be added to it. `engram serve` serves this graft."
        )
    return lists[0]
