"""Quantised rows: a byte for each value, and the scales beside them in the same record.

What it chooses: a quantised table is a table of uint8 records, so that whatever stores, reads, copies or indexes rows
works with it as it is. Records become values in one place, after the gather and the transfer to the device.

- "int8": W bytes, then the row's scale in bfloat16. That type has the range of float32, and its product with an int8 is
  exact in float32. Rounding the scale changes it by less than 1/255, so the largest value of a row is always 127
  scales, and values that were read from a record give the same record again.
- "float8_e4m3fn": W bytes, then W / 32 bytes of e8m0: a power of two for each 32 values.

Promises: a record of zeros is a row of zeros; reading is exact in float32, so every device reads the same values; what
was read and is quantised again gives the same values. Never rounds a value by more than half a step of its scale, and
never quantises a value that is not finite.
Source: OCP Microscaling Formats 1.0 (e4m3, e8m0, blocks of 32), as in the rows of DeepSeek-V4.1; docs/format.md.
"""

import torch


QUANTISED = (torch.int8, torch.float8_e4m3fn)

# Values that share a scale in float8_e4m3fn.
BLOCK = 32

# Beyond it, the largest value of a record might not be finite in float32.
LARGEST = 2.0**127

# Value of each byte: on a CPU, looking values up is several times faster than torch's conversion.
_E4M3 = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()

# The least scale of int8: below it bfloat16 has fewer bits.
_LEAST = 2.0**-126


def stored_as(dtype: torch.dtype, width: int) -> tuple[torch.dtype, int]:
    """Returns type and width in which rows of `width` values are stored: uint8 and the bytes of a record, if quantised.

    Example:

    ```python
    >>> stored_as(torch.bfloat16, 64), stored_as(torch.int8, 64), stored_as(torch.float8_e4m3fn, 64)
    ((torch.bfloat16, 64), (torch.uint8, 66), (torch.uint8, 66))
    ```"""
    if dtype == torch.int8:
        return torch.uint8, width + 2
    if dtype == torch.float8_e4m3fn:
        return torch.uint8, width + width // BLOCK
    return dtype, width


def row_bytes(dtype: torch.dtype, width: int) -> int:
    """Returns the bytes of a row of `width` values in a table of this type, scales included."""
    stored, length = stored_as(dtype, width)
    return length * stored.itemsize


def quantise(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the records of rows.

    Args:
        values (`torch.Tensor` of shape `(..., width)`): rows, in a floating-point type.
        dtype (`torch.dtype`): `torch.int8`, or `torch.float8_e4m3fn` for widths that 32 divides.

    Returns:
        `torch.Tensor` of shape `(..., record)`, uint8.

    Raises:
        `ValueError`: for another type or width, or values that are not finite or above 2 ** 127.

    Example:

    ```python
    >>> records = quantise(torch.tensor([[0.5, -1.0, 0.0]]), torch.int8)
    >>> dequantise(records, torch.int8)
    tensor([[ 0.5000, -1.0000,  0.0000]])
    ```"""
    if dtype not in QUANTISED or (dtype == torch.float8_e4m3fn and values.shape[-1] % BLOCK):
        raise ValueError(
            f"rows of {values.shape[-1]} values cannot be quantised to {dtype}: take torch.int8, or "
            f"torch.float8_e4m3fn for a multiple of {BLOCK} values."
        )
    values = values.float()
    blocks = values if dtype == torch.int8 else values.unflatten(-1, (-1, BLOCK))  # (..., width / 32, 32)
    largest = blocks.abs().amax(-1, keepdim=True)  # (..., 1) or (..., width / 32, 1)
    if not bool((largest <= LARGEST).all()):  # also False for NaN
        raise ValueError("rows hold a value that is infinite, NaN or above 2 ** 127, which has no scale: repair them.")
    if dtype == torch.int8:
        scales = torch.where(largest > 0, (largest / 127).clamp(min=_LEAST), 0).to(torch.bfloat16)  # (..., 1)
        steps = (values / scales.float().clamp(min=_LEAST)).round_().to(torch.int8)  # (..., width)
        return torch.cat([steps.view(torch.uint8), scales.view(torch.uint8)], dim=-1)  # (..., width + 2)
    # The least power of two with which no value is above 448, from the bits of the largest: 448 = 1.75 * 2 ** 8.
    bits = largest.view(torch.int32) + 0x1FFFFF  # (..., width / 32, 1)
    exponents = ((bits >> 23) - 8).clamp_(min=0)
    inverse = ((254 - exponents) << 23).view(torch.float32)  # 2 ** (127 - exponent)
    steps = (blocks * inverse).to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)  # (..., width)
    return torch.cat([steps, exponents.squeeze(-1).to(torch.uint8)], dim=-1)  # (..., width + width / 32)


def dequantise(records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the rows of records, exactly: `(..., record)` in uint8 to `(..., width)` in float32.

    `dtype` is `torch.int8` or `torch.float8_e4m3fn`, as the records were made. An e8m0 byte of 255 gives NaN, as in
    torch.
    """
    if dtype == torch.int8:
        scales = records[..., -2:].contiguous().view(torch.bfloat16)  # (..., 1)
        return records[..., :-2].view(torch.int8).float() * scales.float()  # (..., width)
    width = records.shape[-1] * BLOCK // (BLOCK + 1)
    exponents = records[..., width:].int()  # (..., width / 32)
    # By bits, because torch 2.6 has no type for them: 0 is 2 ** -127, a subnormal number.
    bits = torch.where(exponents == 0, 0x400000, exponents << 23).masked_fill(exponents == 255, 0x7FC00000)
    steps = records[..., :width].unflatten(-1, (-1, BLOCK))  # (..., width / 32, 32)
    if records.is_cpu:
        steps = _E4M3.index_select(0, steps.int().flatten()).view(steps.shape)
    else:
        steps = steps.view(torch.float8_e4m3fn).float()
    return (steps * bits.int().view(torch.float32)[..., None]).flatten(-2)  # (..., width)


def vectors_of(read: torch.Tensor, dtype: torch.dtype, width: int) -> torch.Tensor:
    """Returns the values of rows that were read side by side.

    Args:
        read (`torch.Tensor` of shape `(..., heads * stored width)`): rows of a table as they are stored.
        dtype (`torch.dtype`): the table's type.
        width (`int`): values in a row.

    Returns:
        `torch.Tensor` of shape `(..., heads * width)`: float32 of quantised rows; others as they are.
    """
    if dtype not in QUANTISED:
        return read
    records = read.unflatten(-1, (-1, row_bytes(dtype, width)))  # (..., heads, record)
    return dequantise(records, dtype).flatten(-2)  # (..., heads * width)
