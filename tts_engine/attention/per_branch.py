"""Paged attention blind to sharing: every row gathers its whole context, however many rows share it. PyTorch, any device.

Rows are cut into items of at most MAX_QUERIES tokens and items of like size are computed together, so that neither decode rows
pad prefill rows nor short contexts pad long ones by much.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kv.cache import KVCache
from .base import BatchLayout

MAX_QUERIES = 64
# Gathered keys of a chunk should stay in a core's second-level cache: 4,096 slots of 64 floats are 1 MiB.
MAX_SLOTS = 4096
FILL = 0.65  # the shortest context of a chunk is at least this part of its longest


@dataclass(frozen=True, slots=True)
class _Chunk:
    """N items of up to Q queries over up to C slots each."""

    tokens: Tensor  # int64 [N * Q], which new token each query is; padding repeats an item's last
    slots: Tensor  # int64 [N, 1, C], padding repeats an item's first, whose key and value are finite
    bias: Tensor  # float32 [N, 1, Q, 1, C], 0 where the query sees the slot, -inf elsewhere
    real: Tensor | None  # int64, the queries that are not padding; None: all of them


@dataclass(frozen=True, slots=True)
class _Plan:
    write_slots: Tensor  # int64 [W]
    chunks: list[_Chunk]


class PerBranchAttention:
    name = "per_branch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    batch_invariant = False
    has_windows = False

    def __init__(self, device: torch.device | str = "cpu", *, deterministic: bool = False) -> None:
        self._device = device

    def plan(self, layout: BatchLayout) -> _Plan:
        items = _Items(layout)
        chunks = [self._chunk(layout, items, ids) for ids in items.alike()]
        return _Plan(torch.from_numpy(layout.write_slots).to(self._device), chunks)

    def _chunk(self, layout: BatchLayout, items: "_Items", ids: np.ndarray) -> _Chunk:
        counts, lens = items.counts[ids, None], items.lens[ids, None]
        query, place = np.arange(counts.max())[None], np.arange(lens.max())[None]
        slots = layout.context_slots[items.rows[ids], : lens.max()]
        slots = np.where(place < lens, slots, slots[:, :1]).astype(np.int64)
        within = np.minimum(query, counts - 1)
        hidden = place[:, None] >= (lens - counts + within + 1)[:, :, None]
        bias = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), -torch.inf)
        real = None if counts.min() == counts.max() else torch.from_numpy(np.flatnonzero(query < counts)).to(self._device)
        return _Chunk(
            tokens=torch.from_numpy((items.firsts[ids, None] + within).ravel()).to(self._device),
            slots=torch.from_numpy(slots[:, None]).to(self._device),
            bias=bias[:, None, :, None].to(self._device),
            real=real,
        )

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, layer: int, plan: _Plan,
            window: int | None = None) -> Tensor:  # fmt: skip
        assert window is None, f"{self.name} has no sliding window"
        if k is not None and v is not None:
            cache.write(layer, plan.write_slots, k, v)
        keys, values = cache.k[layer].flatten(0, 1), cache.v[layer].flatten(0, 1)  # [slots * K, D]
        out = torch.empty_like(q)
        for chunk in plan.chunks:
            attended = _attend(q.index_select(0, chunk.tokens), keys, values, cache.num_kv_heads, chunk)
            tokens = chunk.tokens
            if chunk.real is not None:
                attended, tokens = attended.index_select(0, chunk.real), tokens.index_select(0, chunk.real)
            out.index_copy_(0, tokens, attended.to(out.dtype))
        return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, kv_heads: int, chunk: _Chunk) -> Tensor:
    """q [N Q, H, D] -> float32 [N Q, H, D]. The G queries that share a KV head become rows of one matrix product with it."""
    num_items, _, num_queries, _, context = chunk.bias.shape
    heads, dim = q.shape[1:]
    group, batch = heads // kv_heads, num_items * kv_heads
    folded = (num_items, num_queries, kv_heads, group, dim)
    q = (q.float() * dim**-0.5).view(folded).transpose(1, 2).reshape(batch, num_queries * group, dim)
    # Gathering head by head lays each head's context out as one matrix; gathering whole slots would make the product copy it.
    index = (chunk.slots * kv_heads + torch.arange(kv_heads, device=q.device)[:, None]).view(-1)
    k = keys.index_select(0, index).view(batch, context, dim).float()
    scores = torch.bmm(q, k.transpose(1, 2)).view(num_items, kv_heads, num_queries, group, context).add_(chunk.bias)
    v = values.index_select(0, index).view(batch, context, dim).float()
    out = torch.bmm(torch.softmax(scores, dim=-1).view(batch, -1, context), v)
    return out.view(num_items, kv_heads, num_queries, group, dim).transpose(1, 2).reshape(-1, heads, dim)


class _Items:
    """The rows of a layout cut into runs of at most MAX_QUERIES new tokens."""

    def __init__(self, layout: BatchLayout) -> None:
        starts, lens = layout.row_starts.astype(np.int64), layout.context_lens.astype(np.int64)
        counts = np.diff(starts)
        pieces = -(-counts // MAX_QUERIES)
        self.rows = np.repeat(np.arange(len(counts)), pieces)
        offsets = MAX_QUERIES * (np.arange(len(self.rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        self.firsts = starts[self.rows] + offsets  # index of the item's first new token
        self.counts = np.minimum(counts[self.rows] - offsets, MAX_QUERIES)
        self.lens = (lens - counts)[self.rows] + offsets + self.counts  # slots its last token sees

    def alike(self) -> list[np.ndarray]:
        """Item ids by chunk: query counts within one power of two (single ones apart), contexts at most 1 / FILL apart."""
        octave = np.ceil(np.log2(self.counts))
        order = np.lexsort((-self.lens, octave))
        octave, lens = octave[order], self.lens[order]
        chunks = []
        start = 0
        while start < len(order):
            end = min(start + max(1, MAX_SLOTS // lens[start]), len(order))
            fits = (octave[start:end] == octave[start]) & (lens[start:end] >= FILL * lens[start])
            end = start + (len(fits) if fits.all() else int(fits.argmin()))
            chunks.append(order[start:end])
            start = end
        return chunks
