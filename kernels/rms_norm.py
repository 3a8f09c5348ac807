"""RMSNorm, a token at a time: of its hidden state, or of each of its heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

WIDE = 2048  # elements of a token from which on eight warps share them


@triton.jit
def _rms_norm(x, weight, out, epsilon, STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, ALL)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (column < WIDTH)
    at = head * WIDTH + column
    row = tl.load(x + token * STRIDE + at, mask=inside, other=0.0)
    wide = row.to(tl.float32)
    wide *= 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1, keep_dims=True) / WIDTH + epsilon)
    by = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * (HEADS * WIDTH) + at, (wide.to(row.dtype).to(tl.float32) * by).to(row.dtype), mask=inside)


def prepare(x: Tensor, weight: Tensor, out: Tensor, epsilon: float, *, capability: int) -> Launch:
    heads, width = (1, *x.shape[1:])[-2:]
    padded, block = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    return Launch(
        kernel=_rms_norm,
        grid=(len(x),),
        arguments=dict(x=x, weight=weight, out=out, epsilon=epsilon, STRIDE=x.stride(0), HEADS=heads, WIDTH=width, ALL=padded,
                       BLOCK=block),
        capability=capability,
        num_warps=8 if padded * block > WIDE else 4,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [T, D] by weight [D], or [T, N, D] by [N, D]: the mean of squares in float32, the quotient rounded to x's dtype, then its
    product with the weight."""
    assert x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2]) and weight.shape == x.shape[1:]
    assert weight.is_contiguous() and weight.dtype == x.dtype
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        prepare(x, weight, out, epsilon, capability=capability(x.device)).run()
    return out
