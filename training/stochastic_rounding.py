"""Rounding to a narrower type, up or down by chance, so that the mean is right.

What it chooses: a number between two neighbours becomes the upper one as often as it is near to it. Rounded to the
nearest, a step below half of the distance of neighbours (2**-9 of a bfloat16) is lost however often it is taken.
Promises: what the type can hold stays as it is; float32 is not touched and takes no random number. Never infinite:
beyond the largest number is the largest number.
"""

import torch


def rounded(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 by chance.

    Args:
        values (`torch.FloatTensor`): float32, finite.
        dtype (`torch.dtype`): float32, bfloat16 or float16.
        generator (`torch.Generator`): on the device of the values.

    Returns:
        `torch.Tensor` of the same shape in `dtype`; `values` itself for float32.
    """
    if dtype == torch.float32:
        return values
    chance = _random_bits(values, generator)
    if dtype == torch.bfloat16:
        # The upper half of a float32 is a bfloat16: adding 16 random bits below carries as often as it should.
        largest = torch.finfo(dtype).max
        bits = values.clamp(-largest, largest).contiguous().view(torch.int32)
        return chance.add_(bits).bitwise_and_(-65536).view(torch.float32).to(dtype)
    exponent = values.abs().clamp_(min=2.0**-14).view(torch.int32).bitwise_and_(0x7F800000)
    step = (exponent - (10 << 23)).view(torch.float32)  # distance of neighbours: 10 bits follow the leading one
    # 13 random bits: as many as a float32 has below a float16, and sums of 24 bits are exact.
    up = (chance >> 3).float().mul_(2.0**-13)
    largest = torch.finfo(dtype).max
    return (values / step).add_(up).floor_().mul_(step).clamp_(-largest, largest).to(dtype)


def _random_bits(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """16 random bits for each value, as int32."""
    # 64 bits at once: drawing takes most of the time.
    drawn = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    drawn.random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)[: like.numel()].view(like.shape).to(torch.int32).bitwise_and_(0xFFFF)
