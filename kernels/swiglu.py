"""The gate of a decoder's inner layer."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

BLOCK = 1024  # elements of one program


@triton.jit
def _swiglu(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up + token * (2 * WIDTH) + column
    gate, up = tl.load(at, mask=inside, other=0.0), tl.load(at + WIDTH, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + token * WIDTH + column, (opened.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


def prepare(gate_up: Tensor, out: Tensor, *, capability: int) -> Launch:
    return Launch(
        kernel=_swiglu,
        grid=(len(out), triton.cdiv(out.shape[1], BLOCK)),
        arguments=dict(gate_up=gate_up, out=out, WIDTH=out.shape[1], BLOCK=BLOCK),
        capability=capability,
    )


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> silu(gate) * up [T, I]: the gate in float32 and rounded, then its product with the rest."""
    assert gate_up.is_contiguous() and gate_up.shape[1] % 2 == 0
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    if len(out):
        prepare(gate_up, out, capability=capability(gate_up.device)).run()
    return out
