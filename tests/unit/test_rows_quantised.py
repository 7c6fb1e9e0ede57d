"""Quantised rows: what a record holds, how far it is from the row, and that reading it is exact.

Run: pytest tests/unit/test_rows_quantised.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.rows_quantised_engram import (
    LARGEST,
    QUANTISED,
    dequantise,
    quantise,
    row_bytes,
    stored_as,
    vectors_of,
)

from ..faults import same


every_type = pytest.mark.parametrize("dtype", QUANTISED)


@st.composite
def rows(draw):
    """Rows of one size or of very different ones, with zeros among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(1, 32), (7, 64), (3, 5, 96)]))
    sizes = 10.0 ** draw(st.sampled_from([-40, -30, -6, 0, 6, 37])) * torch.rand(*shape[:-1], 1, generator=generator)
    values = torch.randn(shape, generator=generator) * sizes
    return values * (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 1.0])))


@every_type
@given(values=rows())
def test_a_record_has_its_size_and_its_values_are_near(dtype, values):
    records = quantise(values, dtype)
    assert records.dtype == torch.uint8 and records.shape == (*values.shape[:-1], row_bytes(dtype, values.shape[-1]))
    error = (dequantise(records, dtype) - values).abs()
    if dtype == torch.int8:
        scale = records[..., -2:].contiguous().view(torch.bfloat16).float()
        assert bool((scale <= (values.abs().amax(-1, keepdim=True) / 127 * 1.004).clamp(min=2.0**-126)).all())
        assert bool((error <= scale / 2 * 1.0001).all())
        return
    largest = values.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(*values.shape[:-1], -1, 32)
    # e4m3 has 3 bits behind the leading one, and steps of 2 ** -9 below 2 ** -6; the scale is at most largest / 224.
    steps = torch.maximum(values.abs() / 16, largest.flatten(-2) / 224 * 2.0**-10).clamp(min=2.0**-137)
    assert bool((error <= steps).all())


@every_type
@given(values=rows())
def test_values_that_were_read_are_kept(dtype, values):
    records = quantise(values, dtype)
    read = dequantise(records, dtype)
    again = quantise(read, dtype)
    assert torch.equal(dequantise(again, dtype), read)
    if dtype == torch.int8:
        large = read.abs().amax(-1) > 2.0**-118  # below it, the scale is the least one
        assert torch.equal(again[large], records[large])
        assert bool((records[large][..., :-2].view(torch.int8).int().abs().amax(-1) == 127).all())


@every_type
def test_reading_an_int8_or_fp8_record_is_exact(dtype):
    """Against float64, for every byte under every scale that is finite."""
    steps = torch.arange(256, dtype=torch.uint8)
    if dtype == torch.int8:
        scales = torch.arange(0, 0x7B80, 97, dtype=torch.int16).view(torch.bfloat16)
        records = torch.cat([steps.expand(len(scales), -1), scales[:, None].view(torch.uint8)], dim=-1)
        expected = steps.view(torch.int8).double() * scales.double()[:, None]
    else:
        exponents = torch.arange(246, dtype=torch.uint8)[:, None].expand(-1, 8)
        records = torch.cat([steps.expand(246, -1), exponents], dim=-1)
        expected = steps.view(dtype).double() * 2.0 ** (exponents[:, :1].double() - 127)
    read = dequantise(records, dtype)
    assert read.dtype == torch.float32 and torch.equal(read.double().nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no e8m0")
def test_fp8_agrees_with_torchs_own_types_bit_for_bit():
    scales = torch.arange(256, dtype=torch.uint8)  # among them 0, 2 ** -127, and 255, which is NaN
    record = torch.arange(32, dtype=torch.uint8).repeat(256, 1)
    theirs = record.view(torch.float8_e4m3fn).float() * scales.view(torch.float8_e8m0fnu).float()[:, None]
    ours = dequantise(torch.cat([record, scales[:, None]], dim=-1), torch.float8_e4m3fn)
    assert same(ours[:255], theirs[:255]) and bool(ours[255].isnan().all() and theirs[255].isnan().all())
    values = torch.randn(50, 32)
    values[:, 0] = 448.0  # so that the scale is 1
    records = quantise(values.clamp(-448, 448), torch.float8_e4m3fn)
    assert records[:, 32].tolist() == [127] * 50
    assert torch.equal(records[:, :32], values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize(("largest", "exponent"), [(448.0, 127), (448.0001, 128), (224.0, 126), (1.0, 119), (0.0, 0)])
def test_the_scale_of_fp8_is_the_least_that_holds_the_largest_value(largest, exponent):
    values = torch.zeros(1, 32)
    values[0, 5] = -largest
    records = quantise(values, torch.float8_e4m3fn)
    assert records[0, 32] == exponent
    assert dequantise(records, torch.float8_e4m3fn)[0, 5] == -round(largest)


@every_type
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_records_of_zeros_and_read_as_zeros(dtype, source):
    records = quantise(torch.zeros(4, 32, dtype=source), dtype)
    assert not bool(records.any())
    assert same(dequantise(torch.zeros_like(records), dtype), torch.zeros(4, 32))


@every_type
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.5 * LARGEST])
def test_a_value_without_a_scale_is_refused(dtype, bad):
    values = torch.ones(3, 32)
    values[1, 4] = bad
    with pytest.raises(ValueError, match="infinite, NaN or above"):
        quantise(values, dtype)
    values[1, 4] = LARGEST
    assert bool(dequantise(quantise(values, dtype), dtype).isfinite().all())


def test_other_types_and_widths_are_refused():
    with pytest.raises(ValueError, match="torch.int16: take torch.int8"):
        quantise(torch.ones(2, 32), torch.int16)
    with pytest.raises(ValueError, match="rows of 48 values.*multiple of 32"):
        quantise(torch.ones(2, 48), torch.float8_e4m3fn)
    assert quantise(torch.ones(2, 3), torch.int8).shape == (2, 5)


def test_rows_side_by_side_become_values_and_others_stay():
    values = torch.randn(2, 3, 4, 32)  # (B, L, H, W)
    plain = values.bfloat16().flatten(-2)
    assert vectors_of(plain, torch.bfloat16, 32) is plain
    assert stored_as(torch.bfloat16, 32) == (torch.bfloat16, 32)
    for dtype in QUANTISED:
        records = quantise(values, dtype)
        assert stored_as(dtype, 32) == (torch.uint8, records.shape[-1])
        assert torch.equal(vectors_of(records.flatten(-2), dtype, 32), dequantise(records, dtype).flatten(-2))


@pytest.mark.slow
@every_type
def test_a_compiler_reads_the_same_values(dtype):
    records = quantise(torch.randn(2, 5, 3, 64), dtype).flatten(-2)
    torch.compiler.reset()
    compiled = torch.compile(vectors_of, fullgraph=True)
    assert same(compiled(records, dtype, 64), vectors_of(records, dtype, 64))
