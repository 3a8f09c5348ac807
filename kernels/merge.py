"""Partial results of attention put together: one softmax over keys that several work items have read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

ROWS = 16  # heads of one program at a time


@triton.jit
def _merge(partial, lse, out, order, merges, merge_slots, counts,
           HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    dims = tl.arange(0, HEAD_DIM)
    for work in range(tl.program_id(0), tl.load(counts + 1) * PIECES, tl.num_programs(0)):
        merge = merges + work // PIECES * 4
        query, offset, first, count = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2), tl.load(merge + 3)
        head = work % PIECES * ROWS + tl.arange(0, ROWS)
        live = head < HEADS
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        for i in range(count):
            at = (tl.load(merge_slots + first + i) + offset).to(tl.int64) * HEADS + head
            scale = tl.load(lse + at, mask=live, other=float("-inf"))
            part = tl.load(partial + at[:, None] * HEAD_DIM + dims[None, :], mask=live[:, None], other=0.0)
            new_top = tl.maximum(top, scale)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade, weight = tl.exp2(top - base), tl.exp2(scale - base)
            # A part that saw no key changes no bit: its weight is 0 and `fade` is 1.
            mass = mass * fade + weight
            total = total * fade[:, None] + part * weight[:, None]
            top = new_top
        total = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
        at = (tl.load(order + query).to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=live[:, None])


def prepare(partial: Tensor, lse: Tensor, out: Tensor, order: Tensor, merges: Tensor, merge_slots: Tensor, counts: Tensor, *,
            num_programs: int, capability: int) -> Launch:  # fmt: skip
    heads, dim = out.shape[1:]
    return Launch(
        kernel=_merge,
        grid=(num_programs,),
        arguments=dict(partial=partial, lse=lse, out=out, order=order, merges=merges, merge_slots=merge_slots, counts=counts,
                       HEADS=heads, HEAD_DIM=dim, PIECES=triton.cdiv(heads, ROWS), ROWS=ROWS),
        capability=capability,
    )  # fmt: skip


def merge(partial: Tensor, lse: Tensor, out: Tensor, order: Tensor, merges: Tensor, merge_slots: Tensor, counts: Tensor, *,
          num_programs: int) -> None:  # fmt: skip
    """Write out [T, H, D] where partial results are merged, and nothing else.

    partial float32 [P, H, D]: softmaxes over some of a query's keys; lse float32 [P, H]: the base-2 logarithms of their
    denominators, -inf where no key was seen. merges int32 [M, 4]: query, offset, first, count: token order[query] is the sum over
    j in range(first, first + count), in that order, of the parts at merge_slots[j] + offset. counts int32 [2]: counts[1] merges
    are real, the table may be longer. A query that saw no key becomes 0.
    """
    assert partial.dtype == lse.dtype == torch.float32 and out.is_contiguous()
    prepare(partial, lse, out, order, merges, merge_slots, counts, num_programs=num_programs,
            capability=capability(out.device)).run()  # fmt: skip
