"""Shared paths level by level: one launch for all nodes of a depth, then their results put together with what other levels gave.

The shape of cascades in serving engines: a launch a level over the rows under its nodes, its output in the queries' dtype and the
logarithm of its denominator, and a merge of two such states in place behind every level but the first. The launches are our own
micro-kernel's; what differs from ours is the plan. A node has its tiles to itself, so that no level needs another's results, and
none of them is cut: with some hundred rows every level has work for every multiprocessor.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tts_kernels import tree_attention
from tts_kernels.launch import Launch, capability

ROWS = 16  # (query, head) pairs of one program of a merge
SHARED, PRIVATE = 64, 16  # tile classes: of levels whose nodes have several rows, and of the last one


@triton.jit
def _merge_pair(out, lse, other, other_lse, num_pairs, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = pair < num_pairs
    mine = tl.load(lse + pair, mask=live, other=float("-inf"))
    theirs = tl.load(other_lse + pair, mask=live, other=float("-inf"))
    top = tl.maximum(mine, theirs)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight, other_weight = tl.exp2(mine - base), tl.exp2(theirs - base)
    mass = weight + other_weight
    whole = tl.where(mass > 0.0, mass, 1.0)
    at = pair[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    here = tl.load(out + at, mask=live[:, None], other=0.0).to(tl.float32)
    there = tl.load(other + at, mask=live[:, None], other=0.0).to(tl.float32)
    mixed = here * (weight / whole)[:, None] + there * (other_weight / whole)[:, None]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse + pair, tl.where(mass > 0.0, top + tl.log2(whole), float("-inf")), mask=live)


class Cascade:
    """Attention of rows, one new token each, over paths given node by node; rows that share a node follow each other."""

    def __init__(self, paths: Sequence[Sequence[int]], runs: Sequence[np.ndarray], heads: int, kv_heads: int, dim: int,
                 dtype: torch.dtype, device: torch.device) -> None:  # fmt: skip
        """paths: of each row its nodes, as many for every row; runs: the slots of each node."""
        group, rows, depth = heads // kv_heads, len(paths), len(paths[0])
        self._cc, self._multiprocessors = capability(device), tree_attention.multiprocessors(device)
        self._order = torch.arange(rows, dtype=torch.int32, device=device)
        self._levels = []
        for level in range(depth):
            nodes = [path[level] for path in paths]
            tile = PRIVATE if len(set(nodes)) == rows and group <= PRIVATE else SHARED
            self._levels.append((tile, self._tables(nodes, runs, tile // group, device)))
        self._states = [torch.empty(rows, heads, dim, dtype=dtype, device=device) for _ in range(depth)]
        self._lse = [torch.empty(rows, heads, device=device) for _ in range(depth)]

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, D] over k, v [slots, K, D] -> [B, H, D]."""
        out, lse = self._states[-1], self._lse[-1]
        pairs, dim = lse.numel(), q.shape[2]
        for level in reversed(range(len(self._levels))):
            tile, tables = self._levels[level]
            programs = tree_attention.resident(tile, dim, self._cc) * self._multiprocessors
            tree_attention.prepare(q, k, v, out, self._states[level], self._lse[level], tables, rows=tile, num_programs=programs,
                                   capability=self._cc).run()  # fmt: skip
            if level < len(self._levels) - 1:
                merge = dict(out=out, lse=lse, other=self._states[level], other_lse=self._lse[level], num_pairs=pairs,
                             HEAD_DIM=dim, ROWS=ROWS)  # fmt: skip
                Launch(kernel=_merge_pair, grid=(triton.cdiv(pairs, ROWS),), arguments=merge, capability=self._cc).run()
        return out

    def _tables(self, nodes: Sequence[int], runs: Sequence[np.ndarray], max_queries: int, device: torch.device):
        """One level: its nodes under runs of rows, each in tiles of at most so many, the costliest first."""
        items, segments, slots = list[tuple[int, ...]](), list[tuple[int, ...]](), list[np.ndarray]()
        offset = first = 0
        for node, members in itertools.groupby(range(len(nodes)), key=lambda row: nodes[row]):
            count, run = len(list(members)), runs[node]
            for start in range(first, first + count, max_queries):
                size = min(max_queries, first + count - start)
                items.append((start, size, len(segments), 1, start))
            segments.append((offset, len(run), first, first + count, len(run), -1))  # every row sees all of it, and none grows
            slots.append(run)
            offset += len(run)
            first += count
        items.sort(key=lambda item: -segments[item[2]][1])

        def ints(values) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)

        return tree_attention.Tables(
            order=self._order, slots=ints(np.concatenate(slots)), items=ints(items),
            segments=ints([*segments, (0, 0, 0, 0, 0, -1), (0, 0, 0, 0, 0, -1)]), grown=ints(np.zeros(len(nodes))),
            merges=ints(np.zeros((1, 4))), merge_slots=ints([0]),
            counts=ints([len(items), 0]), num_partials=len(nodes),
        )  # fmt: skip
