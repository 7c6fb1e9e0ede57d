"""Dense weights of a foreign memory: put together to the tensors of ours, and cut into theirs again.

Promises: weights keep their bytes, both ways. Values in float8 blocks become bfloat16 only where that is exact; back,
a block has the scale that it came with if that holds it exactly, and else the least power of two that does not cut off
its largest value. Never reads a table.
Source: docs/foreign.md; OCP Microscaling Formats 1.0 (e4m3, e8m0).
"""

from collections.abc import Mapping

import torch

from ..configuration import EngramFormatError
from ..files_safetensors_engram import torch_dtype
from .foreign_layouts import Float8Blocks, ForeignTensor, Part, WeightMap, read_tensor


# Rows and columns that share a scale.
BLOCK = 32

# The largest value of float8_e4m3fn.
_LARGEST = 448.0


def to_memory(
    weights: WeightMap, tensors: Mapping[str, ForeignTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Returns the dense tensors of a memory's layer, whose `shapes` are given by name.

    Raises:
        [`EngramFormatError`]: for float8 blocks that bfloat16 does not hold exactly.
    """
    made: dict[str, torch.Tensor] = {}
    for name, place in weights.items():
        if not isinstance(place, Part):
            continue
        values = read_tensor(tensors[name])
        if isinstance(place, Float8Blocks):
            values = _exact(values, read_tensor(tensors[place.scale]), name)
        if place.name not in made:
            made[place.name] = values.new_empty(shapes[place.name])
        target = made[place.name].view(len(made[place.name]), -1)  # (rows, values of a row)
        rows = values.numel() // target.shape[1]
        values = values.view(-1, len(target)).t() if place.turned else values.view(rows, -1)  # (rows, values of a row)
        target[place.first : place.first + rows] = values
    return made


def from_memory(
    weights: WeightMap, layer: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the foreign tensors of a layer's dense weights; float8 and its scales as bytes.

    Args:
        weights (`WeightMap`): the layout's.
        layer (`Mapping[str, torch.Tensor]`): the memory's dense tensors by name.
        kept (`Mapping[str, torch.Tensor]`): scales that float8 blocks came with, by foreign name.
    """
    made = {}
    for name, place in weights.items():
        if not isinstance(place, Part):
            continue
        source = layer[place.name].view(len(layer[place.name]), -1)  # (rows, values of a row)
        rows = torch.Size(place.shape).numel() // source.shape[1]
        values = source[place.first : place.first + rows]
        values = (values.t() if place.turned else values).reshape(place.shape)
        if isinstance(place, Float8Blocks):
            tall = values.split(BLOCK * BLOCK)  # so that only these rows are in float32 at a time
            scales = kept[place.scale].split(BLOCK) if place.scale in kept else [None] * len(tall)
            made_of = [to_blocks(*pair) for pair in zip(tall, scales, strict=True)]
            values, made[place.scale] = (torch.cat(parts) for parts in zip(*made_of, strict=True))
        elif place.dtype is not None:
            values = values.to(torch_dtype(place.dtype))
        made[name] = values.contiguous()
    return made


def from_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns values in float32, exactly.

    Args:
        values (`torch.Tensor` of shape `(rows, columns)`): float8_e4m3fn as uint8.
        scales (`torch.Tensor` of shape `(rows / 32, columns / 32)`, both rounded up): float8_e8m0 as uint8.
    """
    return values.view(torch.float8_e4m3fn).float() * _spread(_powers(scales), values.shape)


def to_blocks(values: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns values `(rows, columns)` in float8_e4m3fn and scales in float8_e8m0, as `from_blocks` takes them.

    A block has its scale of `scales` if that holds it exactly, and else one that rounds its values.
    """
    values = values.float()
    tall, wide = -(-values.shape[0] // BLOCK), -(-values.shape[1] // BLOCK)
    padded = values.new_zeros(tall * BLOCK, wide * BLOCK)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.view(tall, BLOCK, wide, BLOCK)
    fraction, exponent = torch.frexp(blocks.abs().amax((1, 3)) / _LARGEST)  # (tall, wide) each
    own = (127 + exponent - (fraction == 0.5).int()).clamp(0, 254).to(torch.uint8)  # (tall, wide)
    if scales is not None:
        again = from_blocks(_rounded(values, scales), scales)
        different = torch.zeros_like(padded, dtype=torch.bool)
        different[: values.shape[0], : values.shape[1]] = again != values
        own = torch.where(different.view(blocks.shape).any(3).any(1), own, scales)  # (tall, wide)
    return _rounded(values, own), own


def _exact(values: torch.Tensor, scales: torch.Tensor, name: str) -> torch.Tensor:
    """Returns float8 blocks in bfloat16."""
    made = torch.empty(values.shape, dtype=torch.bfloat16, device="cpu")
    for target, *pair in zip(made.split(BLOCK * BLOCK), values.split(BLOCK * BLOCK), scales.split(BLOCK), strict=True):
        exact = from_blocks(*pair)
        if not torch.equal(target.copy_(exact).float(), exact):  # also for NaN
            raise EngramFormatError(f"'{name}' holds values that are NaN or beyond bfloat16: copy the file again.")
    return made


def _rounded(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns float32 values in float8_e4m3fn, as uint8, divided by their scales."""
    divided = (values / _spread(_powers(scales), values.shape)).clamp(-_LARGEST, _LARGEST)
    return divided.to(torch.float8_e4m3fn).view(torch.uint8)


def _powers(scales: torch.Tensor) -> torch.Tensor:
    """Returns the powers of two of float8_e8m0 bytes, by the bits of float32; 0 is 2 ** -127, and 255 infinite."""
    return torch.where(scales == 0, 0x400000, scales.int() << 23).int().view(torch.float32)


def _spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns the scale of each value, `(rows, columns)`."""
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)  # (rows, columns), rounded up
    return spread[: shape[0], : shape[1]]
