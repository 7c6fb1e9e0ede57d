"""What tests of PEFT share: an adapter whose weights are not at their start, and what a model says."""

import torch
from peft import LoraConfig, get_peft_model


TOLERANCE = 1e-5  # float32; a merged weight is rounded once where an adapter's product is rounded twice


def lora(**settings) -> LoraConfig:
    """LoRA of rank 4, at the layers that PEFT chooses."""
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings})


@torch.no_grad()
def stir(model, seed: int = 0, adapter: str = "default"):
    """Gives an adapter's weights, which begin with a product of zero, values that are seen in the logits."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: p for name, p in model.named_parameters() if f".{adapter}" in name}
    for name in sorted(found, key=lambda name: name.replace("backbone.", "")):
        found[name].copy_(0.3 * torch.randn(found[name].shape, generator=generator))
    assert found
    return model


def adapted(model, seed: int = 0, config=None):
    """A PeftModel with a stirred adapter, LoRA if no configuration is given."""
    return stir(get_peft_model(model, lora() if config is None else config).eval(), seed)


def ids() -> torch.Tensor:
    """Two texts, `(2, 15)`."""
    return torch.randint(3, 4000, (2, 15), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, texts: torch.Tensor | None = None) -> torch.Tensor:
    """What a model says."""
    return model(input_ids=ids() if texts is None else texts).logits


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same to `TOLERANCE`."""
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE)
