"""Small models that tests and the writer of docs/generation.md share."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from engram_transformers import EngramForCausalLM
from engram_transformers.rows_quantised_engram import quantise


GOLDEN = Path(__file__).parent / "parity" / "golden"


@torch.no_grad()
def fill_memory(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Stands for training: non-zero tables, projections, norms and convolution. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.memory.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dtype == torch.uint8:  # records of a quantised table
            values = torch.randn(len(parameter), model.config.engram_head_dim, generator=generator)
            values = quantise(values, getattr(torch, model.config.engram_table_dtype))
        if "norm" in name:
            values = 1 + values.clamp(-2, 2) / 4
        elif name.startswith("layers."):
            values = 0.3 * values
        parameter.copy_(values)
    return model


def engram_on(config: PreTrainedConfig, layers: tuple[int, ...] = (0, 1), seed: int = 0, **fields) -> EngramForCausalLM:
    """A filled memory on a backbone of random weights, for the golden tokenizer."""
    torch.manual_seed(seed)
    donor = AutoModelForCausalLM.from_config(config).eval()
    sizes = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4, **fields}
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    return fill_memory(EngramForCausalLM.from_backbone(donor, tokenizer, list(layers), **sizes), seed)
