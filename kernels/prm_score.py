"""Scores from hidden states, a row at a time: its step's last token found, normed, and read by one dot product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability


@triton.jit
def _prm_score(x, at, norm, direction, scores, epsilon, offset,
               STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, NORM: tl.constexpr,
               RELU: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(at + row) if GATHER else row
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    hidden = tl.load(x + source * STRIDE + column, mask=inside, other=0.0)
    if NORM:
        wide = hidden.to(tl.float32)
        wide *= 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / WIDTH + epsilon)
        weight = tl.load(norm + column, mask=inside, other=0.0)
        # Rounded where the decoder's norm rounds: the quotient, then the product.
        hidden = (wide.to(hidden.dtype).to(tl.float32) * weight.to(tl.float32)).to(hidden.dtype)
    wide = hidden.to(tl.float32)
    if RELU:
        wide = tl.maximum(wide, 0.0)
    score = tl.sum(wide * tl.load(direction + column, mask=inside, other=0.0), 0) + offset
    tl.store(scores + row, 1.0 / (1.0 + tl.exp(-score)))


def prepare(x: Tensor, at: Tensor | None, direction: Tensor, scores: Tensor, *, norm: Tensor | None, epsilon: float, offset: float,
            relu: bool, capability: int) -> Launch:  # fmt: skip
    block = triton.next_power_of_2(x.shape[1])
    return Launch(
        kernel=_prm_score,
        grid=(len(scores),),
        arguments=dict(x=x, at=scores if at is None else at, norm=direction if norm is None else norm, direction=direction,
                       scores=scores, epsilon=epsilon, offset=offset, STRIDE=x.stride(0), WIDTH=x.shape[1], BLOCK=block,
                       GATHER=at is not None, NORM=norm is not None, RELU=relu),
        capability=capability,
        num_warps=8 if block > 2048 else 4,
    )  # fmt: skip


def prm_score(x: Tensor, at: Tensor | None, direction: Tensor, *, norm: Tensor | None = None, epsilon: float = 0.0,
              offset: float = 0.0, relu: bool = False) -> Tensor:  # fmt: skip
    """sigmoid(h . direction + offset), float32 [R], for h the rows at int64 [R] of x [T, d], all of them where it is None;
    direction float32 [d].

    With `norm` [d], in x's dtype, h is the RMSNorm of its row; with `relu` what is below 0 counts as 0. `direction` is the
    difference of two vocabulary rows, a value head's weight or, with `relu` behind a hidden layer, the difference of two classes.
    """
    assert x.stride(1) == 1 and direction.dtype == torch.float32 and direction.is_contiguous()
    scores = torch.empty(len(x if at is None else at), dtype=torch.float32, device=x.device)
    if len(scores):
        prepare(x, at, direction, scores, norm=norm, epsilon=epsilon, offset=offset, relu=relu,
                capability=capability(x.device)).run()  # fmt: skip
    return scores
