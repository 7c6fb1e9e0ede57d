"""A small model, its texts and what is compared between ranks: shared by the tests of several processes."""

import torch
from transformers import LlamaConfig

from engram_transformers.rows_gradient_engram import RowGradient

from ..tiny import engram_on


TEXTS, LENGTH = 4, 16


def small_config() -> LlamaConfig:
    """A Llama of two layers for the golden tokenizer."""
    return LlamaConfig(
        vocab_size=4104,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def small_model():
    """The same filled memory on the same backbone in every process; in training mode."""
    return engram_on(small_config()).train()


def texts(step: int = 0, count: int = TEXTS) -> torch.Tensor:
    """Ids of a step's texts, `(count, LENGTH)`: few ids, so that ranks read some rows in common."""
    return torch.randint(3, 60, (count, LENGTH), generator=torch.Generator().manual_seed(100 + step))


def own_texts(step: int, rank: int, ranks: int, count: int = TEXTS) -> torch.Tensor:
    """A rank's texts of a step."""
    return texts(step, count).chunk(ranks)[rank]


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def written_out(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as an ordinary tensor."""
    if isinstance(gradient, RowGradient):
        return torch.zeros(gradient.shape).index_add_(0, gradient.rows, gradient.row_values)
    return gradient.clone()


def weights(model) -> dict[str, torch.Tensor]:
    """What a model holds, tables in host memory and on disk included."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(left[name], tensor, rtol=0, atol=atol, msg=lambda t, name=name: f"{name}: {t}")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name, tensor in right.items() if not torch.equal(left[name], tensor)] == []
