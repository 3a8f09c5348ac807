"""Rows made 8-bit floats against the definition, bit for bit."""

import pytest
import torch

from tts_engine.models.ops import LEAST_PEAK, TorchOps
from tts_kernels import fp8_rows as room
from tts_kernels.fp8_rows import fp8_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 2 * room.BLOCK + 3])
def test_bytes_and_scales_are_the_definitions(width, dtype):
    """Of every size, subnormal ones among them, and a row of nothing."""
    x = torch.randn(7, width + 3, generator=torch.Generator().manual_seed(width))
    x[1:6] *= torch.tensor([1e-3, 300.0, 0.0, 1e-6, 1.0])[:, None]
    x[5] *= torch.logspace(-7, 0, width + 3)
    x = x.to(dtype)[:, :width]
    (out, scales), (ref, ref_scales) = fp8_rows(x, LEAST_PEAK), TorchOps().fp8_rows(x)
    assert out.dtype == torch.float8_e4m3fn and torch.equal(scales, ref_scales)
    assert torch.equal(out.view(torch.uint8), ref.view(torch.uint8))


def test_every_byte_and_every_half_between_two_is_made_as_defined():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])])[None]
    x = torch.cat([x, -x])
    out, scales = fp8_rows(x, LEAST_PEAK)
    assert (scales == 1).all() and torch.equal(out.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_told_by_its_scale(value):
    x = torch.ones(3, 40)
    x[1, 17] = value
    assert fp8_rows(x, LEAST_PEAK)[1].isnan().tolist() == [False, True, False]
    assert fp8_rows(x[:0], LEAST_PEAK)[0].shape == (0, 40)
