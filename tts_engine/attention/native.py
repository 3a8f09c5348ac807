"""Tree attention in C++ for the CPU: what rows share is read once for all of them, whatever the tree's shape."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]
from ..kv.cache import KVCache
from .base import BatchLayout

MAX_QUERIES = 32  # of one work item: enough rows to keep packed keys in use, few enough that its sums stay in a core's cache
SPLIT = 4096  # tokens of depth after which a path is another item
RESERVE = 64  # tokens that rows may grow by before their plan is made anew
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(slots=True)
class _Plan:
    tree: "_C.TreePlan"
    write_slots: np.ndarray  # int64 [W]
    rows: np.ndarray
    ends: np.ndarray  # int32 [B], own tokens of each row, this batch's among them
    version: int  # of the cache


class NativeAttention:
    """Serves one model: a plan is kept, and grows while the same rows decode on.

    A token's bits never depend on the number of threads. Steps on which no two rows part are read as one, which is faster where
    steps are short; only with `deterministic` is every step read by itself, whatever other rows there are.
    """

    name = "native"
    devices: tuple[str, ...] = ("cpu",)
    batch_invariant = True
    has_windows = False

    def __init__(self, device: torch.device | str = "cpu", *, deterministic: bool = False) -> None:
        self.instruction_set = _C.instruction_sets()[0]
        self._deterministic = deterministic
        self._last: _Plan | None = None

    def plan(self, layout: BatchLayout) -> _Plan:
        ends, last = layout.ends, self._last
        if last is not None and layout.continues(last.rows, last.ends, last.version) and last.tree.grow(layout.write_slots):
            last.write_slots, last.ends = layout.write_slots, ends
            return last
        tree = _C.TreePlan(layout.paths.forest, layout.starts, layout.row_starts, max_queries=MAX_QUERIES, split=SPLIT,
                           reserve=RESERVE, compress=not self._deterministic)  # fmt: skip
        self._last = _Plan(tree, layout.write_slots, layout.rows, ends, layout.version)
        return self._last

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, layer: int, plan: _Plan,
            window: int | None = None) -> Tensor:  # fmt: skip
        assert window is None, f"{self.name} has no sliding window"
        assert q.dtype == cache.dtype and q.dtype in DTYPES, f"{self.name} computes in {DTYPES}"
        heads, dim = q.shape[1:]
        keys, values, size = cache.k[layer], cache.v[layer], q.element_size()
        for new, table in ((k, keys), (v, values)):
            if new is None:
                continue
            new = new if new.stride()[1:] == (dim, 1) else new.contiguous()
            _C.store_rows(new.data_ptr(), new.stride(0) * size, table.data_ptr(), table.stride(0) * size, plan.write_slots)
        q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
        out = q.new_empty(q.shape)
        _C.tree_attention(plan.tree, q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
                          num_heads=heads, num_kv_heads=keys.shape[1], head_dim=dim, bfloat16=q.dtype == torch.bfloat16,
                          instruction_set=self.instruction_set, num_threads=torch.get_num_threads())  # fmt: skip
        return out
