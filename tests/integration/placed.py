"""What tests of placed tables ask a model, and how near its answer must be."""

import torch
from transformers import AutoModelForCausalLM

from engram_transformers import EngramForCausalLM


TOLERANCE = 1e-5  # float32; kernels round by where a tensor begins


def loaded(folder, place: str = "device") -> EngramForCausalLM:
    """A checkpoint, with its tables in a place."""
    return AutoModelForCausalLM.from_pretrained(folder, engram_placement=place)


def repeating_texts() -> torch.Tensor:
    """Ids of two texts, `(2, 20)`, the second of which repeats itself."""
    texts = torch.randint(3, 4104, (2, 20), generator=torch.Generator().manual_seed(3))
    texts[1, 10:] = texts[1, :10]
    return texts


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    """What a model says, brought to the CPU."""
    return model(input_ids=ids).logits.cpu()


def same(found, expected) -> bool:
    """Whether logits are the same to `TOLERANCE`."""
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE)
