"""Activations made 8-bit floats, each row with a scale of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

LARGEST = 448  # that an e4m3 float can be
BLOCK = 2048  # elements of a row at a time


@triton.jit
def _fp8_rows(x, out, scales, least, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    peaks, sound = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], 1, tl.int32)
    for start in range(0, WIDTH, BLOCK):
        size = tl.abs(tl.load(x + row * STRIDE + start + column, mask=start + column < WIDTH, other=0.0).to(tl.float32))
        peaks = tl.maximum(peaks, size)
        sound &= (size < float("inf")).to(tl.int32)  # which NaN is not either
    scale = tl.div_rn(tl.maximum(tl.max(peaks, 0), least), tl.full([], LARGEST, tl.float32))
    scale = tl.where(tl.min(sound, 0) == 1, scale, float("nan"))
    tl.store(scales + row, scale)
    for start in range(0, WIDTH, BLOCK):
        part = tl.load(x + row * STRIDE + start + column, mask=start + column < WIDTH, other=0.0).to(tl.float32)
        steps = tl.div_rn(part, tl.zeros([BLOCK], tl.float32) + scale)
        # The byte of the nearest e4m3 float, ties to even, which neither old GPUs nor the interpreter know how to make: from 2^-6
        # on four bits of exponent, their bias 120 less than float32's, and three bits behind; below, how often 2^-9 goes into it,
        # which are the last bits of a sum with 2^14.
        size = tl.abs(steps)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (size + 16384.0).to(tl.int32, bitcast=True) & 15
        sign = (steps.to(tl.int32, bitcast=True) >> 24) & 128
        code = tl.where(size < 0.015625, small, normal) & 127
        tl.store(out + row * WIDTH + start + column, (code | sign).to(tl.uint8), mask=start + column < WIDTH)


def prepare(x: Tensor, out: Tensor, scales: Tensor, least: float, *, capability: int) -> Launch:
    return Launch(
        kernel=_fp8_rows,
        grid=(len(x),),
        arguments=dict(x=x, out=out.view(torch.uint8), scales=scales, least=least, STRIDE=x.stride(0), WIDTH=x.shape[1],
                       BLOCK=min(BLOCK, triton.next_power_of_2(x.shape[1])), LARGEST=LARGEST),
        capability=capability,
        num_warps=8 if x.shape[1] >= BLOCK else 4,
    )  # fmt: skip


def fp8_rows(x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """x [T, D] -> float8_e4m3fn [T, D], and float32 [T] each row's peak, or `least`, / 448: x is about the one times the other.

    The scale of a row that is not finite is NaN.
    """
    assert x.stride(1) == 1
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        prepare(x, out, scales, least, capability=capability(x.device)).run()
    return out, scales
