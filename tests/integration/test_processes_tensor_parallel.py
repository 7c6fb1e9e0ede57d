"""A backbone over tensor-parallel ranks (Transformers' `tp_plan="auto"`): the memory adds what it adds in one process.

The control is one process; another is the plain backbone over the same ranks.
Run: pytest tests/integration/test_processes_tensor_parallel.py
"""

import pytest
import torch

from engram_transformers import EngramForCausalLM
from engram_transformers.training import shard_tables

from .process_models import texts


CLOSE = 1e-5  # sums over two ranks: 2e-6 here, and 2e-6 for the plain backbone


@torch.no_grad()
def answers(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, logits without memory, and what is generated."""
    model.eval()
    logits = model(texts()).logits
    with model.disable_memory():
        plain = model(texts()).logits
    tokens = model.generate(texts(), max_new_tokens=6, do_sample=False, pad_token_id=2)
    return logits, plain, tokens


def parallel_answers(graft: str, placement: str, by_row: bool):
    model = EngramForCausalLM.from_pretrained(graft, tp_plan="auto", engram_placement=placement)
    if by_row:
        shard_tables(model)
    cut = sorted(name for name, p in model.named_parameters() if hasattr(p, "full_tensor"))
    return *answers(model), cut


@pytest.mark.parametrize(
    ("placement", "by_row"), [("device", False), ("cpu", False), ("disk", False), ("device", True), ("disk", True)]
)
def test_logits_and_texts_are_those_of_one_process(pair, graft, placement, by_row):
    logits, plain, tokens = answers(EngramForCausalLM.from_pretrained(graft))
    assert float((logits - plain).abs().max()) > 100 * CLOSE, "control: the memory adds something"
    for own, own_plain, own_tokens, cut in pair.run(parallel_answers, graft, placement, by_row):
        assert any("q_proj" in name for name in cut), "control: the backbone is over two ranks"
        assert not any(name.startswith("memory.") for name in cut)
        torch.testing.assert_close(own, logits, rtol=0, atol=CLOSE)
        torch.testing.assert_close(own_plain, plain, rtol=0, atol=CLOSE)
        assert torch.equal(own_tokens, tokens)
