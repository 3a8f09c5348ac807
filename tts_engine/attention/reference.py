"""What attention over the KV tree means: one token at a time, its own path, float32. Slow and obvious; the others are held to it.

Every shape depends on the token's own context length alone, so its bits do not depend on what else is in the forward.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.cache import KVCache
from .base import BatchLayout


@dataclass(frozen=True, slots=True)
class _Plan:
    write_slots: Tensor  # int64 [W]
    seen: list[Tensor]  # for each token int64, the slots it sees, oldest first, its own last


class ReferenceAttention:
    name = "reference"
    devices: tuple[str, ...] = ("cpu", "cuda")
    batch_invariant = True
    has_windows = True

    def __init__(self, device: torch.device | str = "cpu", *, deterministic: bool = False) -> None:
        self._device = device

    def plan(self, layout: BatchLayout) -> _Plan:
        slots = torch.from_numpy(layout.context_slots).to(self._device, torch.int64)
        starts, lens = layout.row_starts.tolist(), layout.context_lens.tolist()
        seen = []
        for b, length in enumerate(lens):
            count = starts[b + 1] - starts[b]
            seen += [slots[b, : length - count + i + 1] for i in range(count)]
        return _Plan(torch.from_numpy(layout.write_slots).to(self._device), seen)

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, layer: int, plan: _Plan,
            window: int | None = None) -> Tensor:  # fmt: skip
        if k is not None and v is not None:
            cache.write(layer, plan.write_slots, k, v)
        out = torch.empty_like(q)
        for token, path in enumerate(plan.seen):
            slots = path if window is None else path[-window:]
            out[token] = _attend(q[token], cache.k[layer][slots], cache.v[layer][slots])
        return out


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [H, D] of one token over keys, values [C, K, D] -> [H, D]: softmax(q k / sqrt(D)) v; H / K query heads share a KV head.

    Products and sums rather than a matrix product, whose order of additions is the library's secret.
    """
    heads, dim = q.shape
    kv_heads = keys.shape[1]
    q = q.float().reshape(kv_heads, heads // kv_heads, 1, dim)
    keys, values = keys.float().transpose(0, 1).unsqueeze(1), values.float().transpose(0, 1).unsqueeze(1)  # [K, 1, C, D]
    weights = torch.softmax((q * keys).sum(-1) / math.sqrt(dim), dim=-1)  # [K, G, C]
    return (weights.unsqueeze(-1) * values).sum(2).reshape(heads, dim)
