"""Stochastic rounding: rounds up or down at random, so that the expected value is exact.

What it chooses: the probability of the upper neighbour is the relative distance from the lower one. Rounding to nearest
would lose every step below half the spacing (2**-9 for bfloat16), however often it is taken.
Promises: representable values are unchanged; float32 is returned as it is and draws no random number. Never infinite:
values beyond the largest number become the largest number.
"""

import torch


def rounded(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 stochastically.

    Args:
        values (`torch.FloatTensor`): float32, finite.
        dtype (`torch.dtype`): float32, bfloat16 or float16.
        generator (`torch.Generator`): on the device of the values.

    Returns:
        `torch.Tensor` of the same shape in `dtype`; `values` itself for float32.
    """
    if dtype == torch.float32:
        return values
    random_bits = _random_bits(values, generator)
    if dtype == torch.bfloat16:
        # The upper half of a float32 is a bfloat16: adding 16 random bits below it carries with the right probability.
        largest = torch.finfo(dtype).max
        bits = values.clamp(-largest, largest).contiguous().view(torch.int32)
        return random_bits.add_(bits).bitwise_and_(-65536).view(torch.float32).to(dtype)
    exponent = values.abs().clamp_(min=2.0**-14).view(torch.int32).bitwise_and_(0x7F800000)
    step = (exponent - (10 << 23)).view(torch.float32)  # spacing: 10 bits follow the leading one
    # 13 random bits, as many as a float32 has below a float16; sums of 24 bits are exact.
    up = (random_bits >> 3).float().mul_(2.0**-13)
    largest = torch.finfo(dtype).max
    return (values / step).add_(up).floor_().mul_(step).clamp_(-largest, largest).to(dtype)


def _random_bits(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns 16 random bits for each value, as int32."""
    # 64 bits at once, because drawing is the slow part.
    drawn = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    drawn.random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)[: like.numel()].view(like.shape).to(torch.int32).bitwise_and_(0xFFFF)
