"""Fixtures that all test folders share. Nothing is downloaded: tokenizer and vectors lie in `tests/parity/golden`.

| fixture | what it gives |
|---|---|
| `tiny_tokenizer` | byte-level BPE with 4104 ids; 0 begin, 1 end, 2 pad (one for the session: never change it) |
| `tiny_llama_config` | a fresh Llama configuration for that tokenizer: vocabulary 4104, hidden size 32, 4 layers |
| `tiny_donor(config=None, seed=0)` | a new model with seeded weights in evaluation mode; Llama if `config` is None |
| `tiny_engram(trained=False, donor=None, layers=(1, 2), seed=0, **fields)` | a graft on such a donor (see below) |
| `fill_memory(model, seed=0)` | gives a memory non-zero tables, projections, norms and convolution; returns the model |

`tiny_engram` calls `EngramForCausalLM.from_donor` with heads small enough for a test (2 heads of at least 200 rows, 4
values wide); any `engram_*` field may be given instead. A graft is fresh (its logits are the donor's) unless
`trained=True`, which calls `fill_memory`: without it nothing that the memory does can be seen.

Hypothesis runs few examples, always the same ones; `--hypothesis-profile=wide` looks for new ones.

Run everything with `pytest`, one floor with `pytest tests/unit`.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from engram_transformers import EngramForCausalLM


GOLDEN = Path(__file__).parent / "parity" / "golden"

# Factories are safe to share between examples; a deadline would be an assertion about time.
HYPOTHESIS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("house", max_examples=25, derandomize=True, **HYPOTHESIS)
settings.register_profile("wide", max_examples=1000, print_blob=True, **HYPOTHESIS)
settings.load_profile("house")


def pytest_configure():
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The golden tokenizer."""
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture
def tiny_llama_config() -> LlamaConfig:
    """A Llama for the golden tokenizer; its weights are large enough for changes of the stream to reach the logits."""
    return LlamaConfig(
        vocab_size=4104,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


@pytest.fixture
def tiny_donor(tiny_llama_config) -> Callable[..., PreTrainedModel]:
    """Factory of donors: `tiny_donor(config=None, seed=0)`."""

    def make(config: PreTrainedConfig | None = None, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_llama_config if config is None else config).eval()

    return make


@pytest.fixture
def fill_memory() -> Callable[..., PreTrainedModel]:
    """Stands for training: `fill_memory(model, seed=0)`."""

    @torch.no_grad()
    def fill(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.memory.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                values = 1 + values.clamp(-2, 2) / 4
            elif name.startswith("layers."):
                values = 0.3 * values
            parameter.copy_(values)
        return model

    return fill


@pytest.fixture
def tiny_engram(tiny_donor, tiny_tokenizer, fill_memory) -> Callable[..., EngramForCausalLM]:
    """Factory of grafts: `tiny_engram(trained=False, donor=None, layers=(1, 2), seed=0, **fields)`."""

    def make(
        trained: bool = False,
        donor: PreTrainedModel | None = None,
        layers: tuple[int, ...] = (1, 2),
        seed: int = 0,
        **fields,
    ) -> EngramForCausalLM:
        fields = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4, **fields}
        donor = tiny_donor(seed=seed) if donor is None else donor
        model = EngramForCausalLM.from_donor(donor, tiny_tokenizer, list(layers), **fields)
        return fill_memory(model, seed) if trained else model

    return make
