"""Attention of new tokens over a shared tree of keys and values: what neighbouring queries share is read once for all of them.

A program takes a work item (some queries, the segments of keys that they see) with one KV head. Its rows are the item's queries
times the query heads of that KV head, packed flat, so any group size fills a tile. It walks the item's segments key tile by key
tile in one loop, so that loads run ahead across segments as short as a reasoning step. Tiles begin where segments begin: tiles
that a row does not see change no bit of it, and so a row's bits do not depend on its neighbours.

The grid is fixed and the number of items is read on the device: a captured graph serves any tree. Items come costliest first and
programs take them in turn, by stride rather than from a counter that would have to be reset before every layer.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability
from .merge import merge

HEAD_DIMS = (16, 32, 64, 128)
ROWS = (16, 64, 128)  # tile classes: private tails and lone queries; shared paths; prefill
SEGMENT_BATCH = tl.constexpr(32)  # segments whose lengths are read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A plan on the device: int32, each table aligned to 16 bytes. Tables may be longer than `counts` says."""

    order: Tensor  # [T], the token behind each query
    slots: Tensor
    items: Tensor  # [I, 5]: query, num_queries, first, count, place of the first partial result or -1
    segments: Tensor  # [S, 5], item by item, and two rows of zeros: offset, len, lo, hi, start; of slots[offset : offset + len]
    # query i sees the one at offset + j if lo + max(0, j - start) <= i < hi
    merges: Tensor  # [M, 4], as kernels/merge.py says
    merge_slots: Tensor
    counts: Tensor  # [2]: items, merges
    num_partials: int


@triton.jit
def _segment(segments, index):
    at = segments + index * 5
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def _tree_attention(q, k, v, out, partial, lse, order, slots, segments, items, counts,
                    Q_STRIDE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                    ROWS: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row, key, dims = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, HEAD_DIM)
    for work in range(tl.program_id(0), tl.load(counts) * KV_HEADS, tl.num_programs(0)):
        item = items + work // KV_HEADS * 5
        kv_head = work % KV_HEADS
        first, count, place = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
        live = row < tl.load(item + 1) * GROUP
        query = tl.load(item) + row // GROUP
        head = kv_head * GROUP + row % GROUP
        token = tl.load(order + query, mask=live, other=0).to(tl.int64)
        queries = tl.load(q + (token * Q_STRIDE + head * HEAD_DIM)[:, None] + dims[None, :], mask=live[:, None], other=0.0)

        num_tiles = 0
        for i in range(0, count, SEGMENT_BATCH):
            index = i + tl.arange(0, SEGMENT_BATCH)
            sizes = tl.load(segments + (first + index) * 5 + 1, mask=index < count, other=0)
            num_tiles += tl.sum((sizes + KEYS - 1) // KEYS)

        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        # What a tile needs was asked for a turn before: its slots, and before those the segment that names them.
        offset, size, lo, hi, start = _segment(segments, first)
        next_offset, next_size, next_lo, next_hi, next_start = _segment(segments, first + 1)
        done = 0  # keys of the segment that are behind us
        slot = tl.load(slots + offset + key, mask=key < size, other=0)
        for _ in range(num_tiles):
            within = done + key
            inside = within < size
            at = (slot.to(tl.int64) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
            keys = tl.load(k + at, mask=inside[:, None], other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
            sees = (query[:, None] >= (lo + tl.maximum(within - start, 0))[None, :]) & (query[:, None] < hi) & inside[None, :]
            scores = tl.where(sees, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade, weights = tl.exp2(top - base), tl.exp2(scores - base[:, None])
            mass = mass * fade + tl.sum(weights, 1)
            values = tl.load(v + at, mask=inside[:, None], other=0.0)
            total = tl.dot(weights.to(values.dtype), values, total * fade[:, None], input_precision="ieee")
            top = new_top

            done += KEYS
            ended = done >= size
            first += ended.to(tl.int32)
            done = tl.where(ended, 0, done)
            offset, size = tl.where(ended, next_offset, offset), tl.where(ended, next_size, size)
            lo, hi, start = tl.where(ended, next_lo, lo), tl.where(ended, next_hi, hi), tl.where(ended, next_start, start)
            slot = tl.load(slots + offset + done + key, mask=done + key < size, other=0)
            next_offset, next_size, next_lo, next_hi, next_start = _segment(segments, first + 1)

        seen = mass > 0.0
        mass = tl.where(seen, mass, 1.0)
        total = total / mass[:, None]
        if place < 0:
            written = (token * HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(out + written, total.to(out.dtype.element_ty), mask=live[:, None])
        else:
            part = (place + row // GROUP).to(tl.int64) * HEADS + head
            tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], total, mask=live[:, None])
            tl.store(lse + part, tl.where(seen, top + tl.log2(mass), float("-inf")), mask=live)


def prepare(q: Tensor, k: Tensor, v: Tensor, out: Tensor, partial: Tensor, lse: Tensor, tables: Tables, *, rows: int,
            num_programs: int, capability: int) -> Launch:  # fmt: skip
    heads, dim = q.shape[1:]
    t = tables
    # A wide tile of 64 keys needs more registers than warps without Hopper's matrix instructions have.
    keys = 32 if capability < 90 and rows * dim >= 64 * 128 else 64
    return Launch(
        kernel=_tree_attention,
        grid=(num_programs,),
        arguments=dict(q=q, k=k, v=v, out=out, partial=partial, lse=lse, order=t.order, slots=t.slots, segments=t.segments,
                       items=t.items, counts=t.counts, Q_STRIDE=q.stride(0), HEADS=heads,
                       KV_HEADS=k.shape[1], HEAD_DIM=dim, ROWS=rows, KEYS=keys, SCALE=dim**-0.5 * math.log2(math.e)),
        capability=capability,
        num_warps=8 if rows == 128 else 4,
        num_stages=3,
    )  # fmt: skip


def tree_attention(q: Tensor, k: Tensor, v: Tensor, tables: Tables, *, rows: int, num_programs: int) -> Tensor:
    """q [T, H, D] over k, v [slots, K, D] -> [T, H, D]: softmax(q k / sqrt(D)) v, H / K query heads to a KV head.

    `rows` is the tile class, of ROWS; no item may have more than rows // (H / K) queries. `num_programs` of each kernel share the
    work; their number changes no bit. A query that sees no key becomes 0. Softmax and sums are float32.
    """
    heads, dim = q.shape[1:]
    assert dim in HEAD_DIMS and rows in ROWS and heads // k.shape[1] <= rows and q.dtype == k.dtype == v.dtype
    assert q.stride()[1:] == (dim, 1) and k.is_contiguous() and v.is_contiguous()
    out = q.new_empty(q.shape)
    partial = q.new_empty((tables.num_partials, heads, dim), dtype=torch.float32)
    lse = q.new_empty((tables.num_partials, heads), dtype=torch.float32)
    prepare(q, k, v, out, partial, lse, tables, rows=rows, num_programs=num_programs, capability=capability(q.device)).run()
    if tables.num_partials:
        merge(partial, lse, out, tables.order, tables.merges, tables.merge_slots, tables.counts,
              max_queries=rows // (heads // k.shape[1]), num_programs=num_programs)  # fmt: skip
    return out
