"""Attention of new tokens over a shared tree of keys and values: what neighbouring queries share is read once for all of them.

A program takes a work item (some queries, the segments of keys that they see) with one KV head. Its rows are the item's queries
times the query heads of that KV head, packed flat, so any group size fills a tile. It walks the item's segments key tile by key
tile in one loop, so that loads run ahead across segments as short as a reasoning step. Tiles begin where segments begin: tiles
that a row does not see change no bit of it, and so a row's bits do not depend on its neighbours.

The grid is fixed and the number of items is read on the device: a captured graph serves any tree. So are the tokens by which rows
have grown since their plan was made. Items come costliest first and programs take them in turn, there and back, by stride rather
than from a counter that would have to be reset before every layer. Items of few rows are computed in tiles of a class of their own.
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
    segments: Tensor  # [S, 6], item by item, and then two more: offset, len, lo, hi, start, row; of slots[offset : offset + len]
    # query i sees the one at offset + j if lo + max(0, j - start) <= i < hi; row -1, or the row of `grown` that it grows with
    grown: Tensor  # [B], tokens to add to len and start of a row's segments; where len is then less than 1 there is none of it
    merges: Tensor  # [M, 4], as kernels/merge.py says
    merge_slots: Tensor
    counts: Tensor  # [2]: items, merges
    num_partials: int


@triton.jit
def _segment(segments, index):
    at = segments + index * 6
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def _growth(grown, row):
    return tl.load(grown + row, mask=row >= 0, other=0)


@triton.jit
def _attend(q, k, v, out, partial, lse, order, slots, segments, grown, item, kv_head,
            Q_STRIDE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
            ROWS: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row, key, dims = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, HEAD_DIM)
    first, count, place = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    live = row < tl.load(item + 1) * GROUP
    query = tl.load(item) + row // GROUP
    head = kv_head * GROUP + row % GROUP
    token = tl.load(order + query, mask=live, other=0).to(tl.int64)
    queries = tl.load(q + (token * Q_STRIDE + head * HEAD_DIM)[:, None] + dims[None, :], mask=live[:, None], other=0.0)

    # A segment of no keys among others is a tile that nobody sees; where there are no others it is none.
    num_tiles, num_keys = 0, 0
    for i in range(0, count, SEGMENT_BATCH):
        index = i + tl.arange(0, SEGMENT_BATCH)
        at = segments + (first + index) * 6
        rows = tl.load(at + 5, mask=index < count, other=-1)
        sizes = tl.load(at + 1, mask=index < count, other=0) + tl.load(grown + rows, mask=rows >= 0, other=0)
        sizes = tl.maximum(sizes, 0)
        num_keys += tl.sum(sizes)
        num_tiles += tl.sum(tl.where(index < count, tl.maximum((sizes + KEYS - 1) // KEYS, 1), 0))
    num_tiles = tl.where(num_keys > 0, num_tiles, 0)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    # What a tile needs was asked for a turn before: its slots, and before those the segment that names them.
    offset, size, lo, hi, start, grows = _segment(segments, first)
    size, start = tl.maximum(size + _growth(grown, grows), 0), start + _growth(grown, grows)
    next_offset, next_size, next_lo, next_hi, next_start, next_grows = _segment(segments, first + 1)
    done = 0  # keys of the segment that are behind us
    slot = tl.load(slots + offset + key, mask=key < size, other=0)
    for _ in range(num_tiles):
        growth = _growth(grown, next_grows)
        within = done + key
        inside = within < size
        at = (slot.to(tl.int64) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        keys = tl.load(k + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
        since = tl.where(inside, lo + tl.maximum(within - start, 0), 0x7FFFFFFF)  # the first query that sees each key
        scores = tl.where((query[:, None] >= since[None, :]) & (query[:, None] < hi), scores, float("-inf"))
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
        offset, size = tl.where(ended, next_offset, offset), tl.where(ended, tl.maximum(next_size + growth, 0), size)
        lo, hi, start = tl.where(ended, next_lo, lo), tl.where(ended, next_hi, hi), tl.where(ended, next_start + growth, start)
        slot = tl.load(slots + offset + done + key, mask=done + key < size, other=0)
        next_offset, next_size, next_lo, next_hi, next_start, next_grows = _segment(segments, first + 1)

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


@triton.jit
def _tree_attention(q, k, v, out, partial, lse, order, slots, segments, grown, items, counts,
                    Q_STRIDE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                    ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_work = tl.load(counts) * KV_HEADS
    rest = num_work % programs  # who takes part in the last, partial turn
    turns = num_work // programs
    turns += (tl.where(turns % 2 == 0, program, programs - 1 - program) < rest).to(tl.int32)
    for turn in range(turns):
        work = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
        item, kv_head = items + work // KV_HEADS * 5, work % KV_HEADS
        if TAIL_ROWS == ROWS:
            _attend(q, k, v, out, partial, lse, order, slots, segments, grown, item, kv_head,
                    Q_STRIDE, HEADS, KV_HEADS, HEAD_DIM, ROWS, KEYS, SCALE)  # fmt: skip
        elif tl.load(item + 1) * (HEADS // KV_HEADS) <= TAIL_ROWS:
            _attend(q, k, v, out, partial, lse, order, slots, segments, grown, item, kv_head,
                    Q_STRIDE, HEADS, KV_HEADS, HEAD_DIM, TAIL_ROWS, KEYS, SCALE)  # fmt: skip
        else:
            _attend(q, k, v, out, partial, lse, order, slots, segments, grown, item, kv_head,
                    Q_STRIDE, HEADS, KV_HEADS, HEAD_DIM, ROWS, KEYS, SCALE)  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    """Of that GPU; one for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def resident(rows: int, dim: int, capability: int) -> int:
    """Programs of that tile class that one multiprocessor holds at a time, by their registers."""
    if rows == 128 or _tight(rows, dim, capability):
        return 1
    return 2 if rows == 64 else (4 if dim < 128 else 3) - (capability < 90)


def _tight(rows: int, dim: int, capability: int) -> bool:
    """Whether a tile needs more registers than four warps without Hopper's matrix instructions have."""
    return capability < 90 and rows * dim >= 64 * 128


def prepare(q: Tensor, k: Tensor, v: Tensor, out: Tensor, partial: Tensor, lse: Tensor, tables: Tables, *, rows: int,
            num_programs: int, capability: int, tail_rows: int | None = None) -> Launch:  # fmt: skip
    heads, dim = q.shape[1:]
    t = tables
    tight = _tight(rows, dim, capability)
    return Launch(
        kernel=_tree_attention,
        grid=(num_programs,),
        arguments=dict(q=q, k=k, v=v, out=out, partial=partial, lse=lse, order=t.order, slots=t.slots, segments=t.segments,
                       grown=t.grown, items=t.items, counts=t.counts, Q_STRIDE=q.stride(0), HEADS=heads, KV_HEADS=k.shape[1],
                       HEAD_DIM=dim, ROWS=rows, TAIL_ROWS=tail_rows or rows,
                       KEYS=32 if tight else 64, SCALE=dim**-0.5 * math.log2(math.e)),
        capability=capability,
        num_warps=8 if rows == 128 or tight else 4,
        num_stages=3,
    )  # fmt: skip


def tree_attention(q: Tensor, k: Tensor, v: Tensor, tables: Tables, *, rows: int, tail_rows: int | None = None,
                   num_programs: int | None = None) -> Tensor:  # fmt: skip
    """q [T, H, D] over k, v [slots, K, D] -> [T, H, D]: softmax(q k / sqrt(D)) v, H / K query heads to a KV head.

    `rows` is the tile class, of ROWS; no item may have more than rows // (H / K) queries. Items of at most `tail_rows` rows are
    computed in tiles of that class, where it is given. `num_programs` share the work, by default as many as the device holds at a
    time; their number changes no bit. A query that sees no key becomes 0. Softmax and sums are float32.
    """
    heads, dim = q.shape[1:]
    assert dim in HEAD_DIMS and rows in ROWS and heads // k.shape[1] <= rows and q.dtype == k.dtype == v.dtype
    assert q.stride()[1:] == (dim, 1) and k.is_contiguous() and v.is_contiguous()
    able = capability(q.device)
    num_programs = num_programs or resident(rows, dim, able) * multiprocessors(q.device)
    out = q.new_empty(q.shape)
    partial = q.new_empty((tables.num_partials, heads, dim), dtype=torch.float32)
    lse = q.new_empty((tables.num_partials, heads), dtype=torch.float32)
    prepare(q, k, v, out, partial, lse, tables, rows=rows, tail_rows=tail_rows, num_programs=num_programs, capability=able).run()
    if tables.num_partials:
        merge(partial, lse, out, tables.order, tables.merges, tables.merge_slots, tables.counts, num_programs=4 * num_programs)
    return out
