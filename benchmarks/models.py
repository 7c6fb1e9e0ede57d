"""What is measured: a donor and its grafts, loaded in the same way.

Promises: all sides of a comparison have the donor's weights in one dtype; a graft's table is where it is said to be.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import engram_transformers  # noqa: F401 (registers the grafts' model type)

from .command import CannotMeasure


DTYPES = {"donor": "auto", "bfloat16": torch.bfloat16, "float32": torch.float32}


def load(folder: Path, dtype: str = "donor", placement: str | None = None) -> PreTrainedModel:
    """Loads a donor, or a graft with its table in a place.

    Args:
        folder (`Path`): the checkpoint.
        dtype (`str`, *optional*, defaults to `"donor"`): of the backbone; "donor" keeps the stored one.
        placement (`str`, *optional*): `engram_placement` of a graft.
    """
    placed = {} if placement is None else {"engram_placement": placement}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **placed).eval()
    if placement is not None and model.memory.placement != placement:
        raise CannotMeasure(f"the table of '{folder}' is on {model.memory.placement!r}, not on {placement!r}.")
    return model


def with_weights_of(model: PreTrainedModel, donor: PreTrainedModel) -> PreTrainedModel:
    """`model` with the very tensors of `donor`, which are equal to its own.

    Args:
        model (`PreTrainedModel`): the donor loaded again, or a graft of it.
        donor (`PreTrainedModel`): whose tensors are taken.

    Raises:
        [`CannotMeasure`]: if the two do not have the same weights.
    """
    own = dict(getattr(model, "backbone", model).named_parameters())
    for name, theirs in donor.named_parameters():
        if name not in own or not torch.equal(own[name], theirs):
            raise CannotMeasure(f"the weight '{name}' of the donor is not in the model that it is compared with.")
        own[name].data = theirs.data
    return model


def tokenizer_of(folder: Path):
    """The tokenizer of a donor."""
    return AutoTokenizer.from_pretrained(folder)


def read_rows(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hashes ids and reads their rows as a forward pass does, `(1, length, orders * heads * width)` for each layer."""
    memory = model.memory
    reads = memory.read(memory.hashing.compress(ids, None), None)
    try:
        return [reads.vectors(layer) for layer in memory.layer_ids]
    finally:
        reads.drop()


def dtype_of(model: PreTrainedModel) -> str:
    """Name of the dtype that a loaded backbone has."""
    return str(model.dtype).removeprefix("torch.")
