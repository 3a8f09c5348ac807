"""Tree attention in Triton for a GPU: the CPU's plans, cut for the device, and the kernels that read them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]
from ..errors import EngineError
from ..kv.cache import KVCache
from .base import BatchLayout

RESERVE = 64  # tokens that rows may grow by before their plan is made anew
PROGRAMS = 2  # of one multiprocessor
LONG_RUN = 16  # tokens of a row from which on a forward is a prefill
SHARING = 1.5  # keys seen by a batch's rows over distinct ones, from which on a tile is for many branches
SHORTEST_SPLIT, SPLIT = 256, 4096  # tokens of depth after which a path is another item


@dataclass(slots=True)
class _Plan:
    layout: BatchLayout
    write_slots: Tensor  # int64 [W]
    ends: np.ndarray  # int32 [B], own tokens of each row, this batch's among them
    tree: "_C.TreePlan | None" = None  # made with the first layer, which says how many heads there are
    tables: Any = None
    rows: int = 0  # tile class


class TritonTreeAttention:
    """Serves one model: a plan is kept, and grows while the same rows decode on.

    With `deterministic` tiles are of one class and paths are cut at fixed depths, so a token's bits do not depend on its batch.
    """

    name = "triton_tree"
    devices: tuple[str, ...] = ("cuda",)
    batch_invariant = True
    has_windows = False

    def __init__(self, device: torch.device | str = "cuda", *, deterministic: bool = False) -> None:
        """Raises EngineError where Triton is missing."""
        try:
            from tts_kernels import tree_attention
        except ImportError as error:
            raise EngineError(f"attention backend {self.name!r} needs Triton: pip install 'tts-engine[gpu]' ({error})") from error
        self._kernels = tree_attention
        self._device = torch.device(device)
        self._deterministic = deterministic
        self._last: _Plan | None = None

    def plan(self, layout: BatchLayout) -> _Plan:
        ends = layout.ends
        plan = _Plan(layout, torch.from_numpy(layout.write_slots).to(self._device, non_blocking=True), ends)
        last = self._last
        if (
            last is not None
            and last.tree is not None
            and layout.continues(last.layout.rows, last.ends)
            and last.tree.grow(layout.write_slots)
        ):
            plan.tree, plan.rows = last.tree, last.rows
            plan.tables = tables_of(last.tree, self._device)
        self._last = plan
        return plan

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, layer: int, plan: _Plan,
            window: int | None = None) -> Tensor:  # fmt: skip
        assert window is None, f"{self.name} has no sliding window"
        (heads, dim), kv_heads = q.shape[1:], cache.k.shape[2]
        if plan.tree is None:
            self._refuse_unless_able(heads, kv_heads, dim)
            plan.rows, max_queries, split = self._cut(plan.layout, heads // kv_heads, kv_heads)
            forest, starts = self._forest(plan.layout)
            plan.tree = _C.TreePlan(forest, starts, plan.layout.row_starts, max_queries=max_queries, split=split, reserve=RESERVE,
                                    compress=not self._deterministic)  # fmt: skip
            plan.tables = tables_of(plan.tree, self._device)
        if k is not None and v is not None:
            cache.write(layer, plan.write_slots, k, v)
        q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
        return self._kernels.tree_attention(q, cache.k[layer], cache.v[layer], plan.tables, rows=plan.rows,
                                            num_programs=PROGRAMS * self._multiprocessors)  # fmt: skip

    def _forest(self, layout: BatchLayout) -> tuple["_C.Forest", np.ndarray]:
        """The nodes that rows stand on, and int32 [B] how many tokens of its node come before each row's first."""
        return layout.paths.forest, layout.starts

    def _cut(self, layout: BatchLayout, group: int, kv_heads: int) -> tuple[int, int, int]:
        """The tile class, the queries of an item, and the depth at which paths are cut so that every multiprocessor has some."""
        able = [rows for rows in self._kernels.ROWS if rows >= group]
        if self._deterministic:
            rows = max(able[0], 64)
            return rows, rows // group, SPLIT
        queries, contexts = int(layout.row_starts[-1]), layout.context_lens.astype(np.int64)
        if queries >= LONG_RUN * len(contexts):
            wanted = 128
        elif queries * group <= 16 or contexts.sum() < SHARING * len(layout.paths.forest.slots):
            wanted = 16
        else:
            wanted = 64
        rows = next(size for size in able if size >= wanted)
        return rows, rows // group, self._split(layout, kv_heads * -(-queries // (rows // group)))

    def _split(self, layout: BatchLayout, items: int) -> int:
        """For so many items, were no path cut: a power of two, so that it changes seldom."""
        zones = -(-PROGRAMS * self._multiprocessors // max(1, items))
        depth = int(layout.context_lens.max(initial=1)) // zones
        return min(SPLIT, max(SHORTEST_SPLIT, 1 << max(0, depth - 1).bit_length()))

    def _refuse_unless_able(self, heads: int, kv_heads: int, dim: int) -> None:
        if dim not in self._kernels.HEAD_DIMS or heads // kv_heads > self._kernels.ROWS[-1]:
            known = ", ".join(map(str, self._kernels.HEAD_DIMS))
            raise EngineError(f"attention backend {self.name!r} has kernels for head_dim {known}, not for {dim}: use per_branch")

    @cached_property
    def _multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self._device).multi_processor_count if self._device.type == "cuda" else 1


class TritonBlindAttention(TritonTreeAttention):
    """The same kernels with plans that share nothing: every row reads its whole path. What sharing is measured against."""

    name = "triton_blind"
    batch_invariant = False

    def _forest(self, layout: BatchLayout) -> tuple["_C.Forest", np.ndarray]:
        slots, lens = layout.context_slots, layout.context_lens
        listed = slots[np.arange(slots.shape[1]) < lens[:, None]]
        rows = np.arange(len(lens), dtype=np.int32)
        forest = _C.Forest(np.full_like(rows, -1), (np.cumsum(lens) - lens).astype(np.int32), lens, rows, listed)
        return forest, (lens - np.diff(layout.row_starts)).astype(np.int32)

    def _cut(self, layout: BatchLayout, group: int, kv_heads: int) -> tuple[int, int, int]:
        """Lone tokens get an item each."""
        longest = int(np.diff(layout.row_starts).max(initial=1))
        rows = next(size for size in self._kernels.ROWS if size >= group and (size >= longest * group or size >= 64))
        return rows, max(1, min(longest, rows // group)), self._split(layout, kv_heads * len(layout.rows))


def tables_of(plan: "_C.TreePlan", device: torch.device | str) -> Any:
    """A plan as the kernels read it, in one copy to the device: tts_kernels.tree_attention.Tables."""
    from tts_kernels.tree_attention import Tables

    columns = {name: getattr(plan, name) for name in ("order", "slots", "items", "merges", "merge_slots")}
    columns["segments"] = np.concatenate([plan.segments[plan.item_segments], np.zeros((2, 5), np.int32)])
    columns["counts"] = np.array([len(plan.items), len(plan.merges)], np.int32)
    starts = np.cumsum([0, *(-(-column.size // 4) * 4 for column in columns.values())])  # 16 bytes each
    buffer = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
    for start, column in zip(starts, columns.values(), strict=False):
        buffer.numpy()[start : start + column.size] = column.ravel()
    buffer = buffer.to(device, non_blocking=True)
    tables = {
        name: buffer[start : start + column.size].view(column.shape)
        for start, (name, column) in zip(starts, columns.items(), strict=False)
    }
    return Tables(**tables, num_partials=plan.num_partials)
