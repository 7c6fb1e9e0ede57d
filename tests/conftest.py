"""Fixtures that all test folders share. Nothing is downloaded: tokenizer and vectors lie in `tests/parity/golden`.

| fixture | what it gives |
|---|---|
| `tiny_tokenizer` | byte-level BPE with 4104 ids; 0 begin, 1 end, 2 pad (one for the session: never change it) |
| `tiny_llama_config` | a fresh Llama configuration for that tokenizer: vocabulary 4104, hidden size 32, 4 layers |
| `tiny_donor(config=None, seed=0)` | a new model with seeded weights in evaluation mode; Llama if `config` is None |
| `tiny_engram(trained=False, donor=None, layers=(1, 2), seed=0, **fields)` | a graft on such a donor (see below) |
| `fill_memory(model, seed=0)` | gives a memory non-zero tables, projections, norms and convolution; returns the model |

`tiny_engram` calls `EngramForCausalLM.from_backbone` with heads small enough for a test (2 of at least 200 rows, 4
values wide); any `engram_*` field may be given instead. A graft is fresh (its logits are the donor's) unless
`trained=True`, which calls `fill_memory`: without it nothing that the memory does can be seen.

Hypothesis runs 25 examples of a property, always the same ones; `--hypothesis-profile=wide` (`make test-all`) looks for
new ones, 40 times as many. A property that needs more or fewer says `@examples(count)`, which the profile multiplies.

Tests pass in any order and beside each other: `--order-seed N` shuffles them, the same way for the same N, and
`make test` deals them out to two workers.

Run everything with `pytest`, one floor with `pytest tests/unit`.
"""

import os
import random
from collections.abc import Callable


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # one thread for each worker, and for the processes that tests start
os.environ["OMP_WAIT_POLICY"] = "passive"  # where a test does use two threads, waiting ones leave the core to others

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from engram_transformers import EngramForCausalLM

from . import tiny
from .counting_device import NoCompiler, load


# Factories are safe to share between examples; a deadline would be an assertion about time.
HYPOTHESIS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
HOUSE_EXAMPLES = 25
settings.register_profile("house", max_examples=HOUSE_EXAMPLES, derandomize=True, **HYPOTHESIS)
settings.register_profile("wide", max_examples=40 * HOUSE_EXAMPLES, print_blob=True, **HYPOTHESIS)
settings.load_profile("house")


def examples(count: int) -> settings:
    """Decorator of a property that runs `count` examples in the house profile and 40 times as many in the wide one.

    `@settings(max_examples=...)` would fix the number whatever the profile says.
    """
    return settings(max_examples=count * settings().max_examples // HOUSE_EXAMPLES)


def pytest_addoption(parser):
    parser.addoption("--order-seed", type=int, help="shuffle the tests; the same seed gives the same order")


def pytest_configure():
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.hookimpl(trylast=True)  # after pytest has put tests together that share a fixture
def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--order-seed")
    if seed is not None:
        random.Random(seed).shuffle(items)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, and warnings that are given once, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    logging.warning_once.cache_clear()


@pytest.fixture(scope="session")
def counting_device():
    """`torch.counting`, an accelerator that counts bytes; skipped where it cannot be built."""
    try:
        return load()
    except NoCompiler as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The golden tokenizer."""
    return AutoTokenizer.from_pretrained(tiny.GOLDEN / "tokenizer")


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
    return tiny.fill_memory


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
        model = EngramForCausalLM.from_backbone(donor, tiny_tokenizer, list(layers), **fields)
        return fill_memory(model, seed) if trained else model

    return make
