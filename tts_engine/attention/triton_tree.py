"""Tree attention in Triton for a GPU: the CPU's plans, cut for the device, and the kernels that read them."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
LONG_RUN = 16  # tokens of a row from which on a forward is a prefill
DETERMINISTIC_ROWS = 64  # the one tile class of plans by which no bit depends on the batch, and where they cut every path
DETERMINISTIC_SPLIT = 4096
SPLITS = (256, 512, 1024, 2048, 4096)  # tokens of depth after which a path may go on in another item
KEYS = 64  # of one step of a tile

# What things take on an H200, in clocks of one multiprocessor. Every choice below comes of these: correct them by measurement.
BYTES = 17.8  # a clock, to and from memory, of elements of two bytes
PRODUCTS = 2400  # floating-point operations a clock of the matrix units, as kernels reach them
EXPONENTIALS = 16  # a clock
HIDDEN = 0.75  # how much of the shorter of moving and computing the longer one hides
ITEM = 500  # for an item to begin and to end, beside others that go on
UNEVEN = 0.5  # of the longest item: how far apart programs end


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a batch is cut into items, and the kernel that reads them: tile classes `rows` and, for items of few queries,
    `tail_rows`; the rest are the planner's options (csrc/tree_plan.h)."""

    rows: int
    tail_rows: int
    max_queries: int
    split: int
    compress: bool
    tile: int
    tail_queries: int = 0
    tail: int = 0


@dataclass(slots=True)
class _Plan:
    layout: BatchLayout
    write_slots: Tensor  # int64 [W]
    ends: np.ndarray  # int32 [B], own tokens of each row, this batch's among them
    tree: "_C.TreePlan | None" = None  # made with the first layer, which says how many heads there are
    cut: Cut | None = None
    tables: Any = None
    ahead: Tensor | None = None  # int64 [B], where the table of slots has room for each row's next token


class TritonTreeAttention:
    """Serves one model: a plan is kept, and grows on the device while the same rows decode on.

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

    @torch.inference_mode()  # as `run` is, within which the tables were made that grow here
    def plan(self, layout: BatchLayout) -> _Plan:
        plan = _Plan(layout, torch.from_numpy(layout.write_slots).to(self._device, non_blocking=True), layout.ends)
        last = self._last
        if (
            last is not None
            and last.tree is not None
            and layout.continues(last.layout.rows, last.ends, last.layout.version)
            and last.tree.grow(layout.write_slots)
        ):
            plan.tree, plan.cut, plan.tables, plan.ahead = last.tree, last.cut, last.tables, last.ahead
            plan.tables.slots.index_copy_(0, plan.ahead, plan.write_slots.to(torch.int32))
            plan.tables.grown.add_(1)
            plan.ahead.add_(1)  # type: ignore[union-attr]
        self._last = plan
        return plan

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, layer: int, plan: _Plan,
            window: int | None = None) -> Tensor:  # fmt: skip
        assert window is None, f"{self.name} has no sliding window"
        if plan.cut is None:
            plan.cut = self.cut(plan.layout, q.shape[1], cache.num_kv_heads, q.shape[2])
            plan.tree = self.tree(plan.layout, plan.cut)
            plan.tables = tables_of(plan.tree, self._device)
            leaves = plan.tree.segments[plan.tree.leaf]
            plan.ahead = torch.from_numpy((leaves[:, 0] + leaves[:, 1]).astype(np.int64)).to(self._device, non_blocking=True)
        if k is not None and v is not None:
            cache.write(layer, plan.write_slots, k, v)
        return self.attend(q, cache, layer, plan.tables, plan.cut)

    # The parts of it, for those who keep tables of their own

    def cut(self, layout: BatchLayout, heads: int, kv_heads: int, dim: int) -> Cut:
        """How a model with such heads had best read this batch. Raises EngineError where there is no kernel for it."""
        if dim not in self._kernels.HEAD_DIMS or heads // kv_heads > self._kernels.ROWS[-1]:
            known = ", ".join(map(str, self._kernels.HEAD_DIMS))
            raise EngineError(f"attention backend {self.name!r} has kernels for head_dim {known}, not for {dim}: use per_branch")
        group = heads // kv_heads
        load = self._load(layout, group, kv_heads, dim)
        able = [rows for rows in self._kernels.ROWS if rows >= group]
        options: Iterable[tuple[int, int, int]]
        if self._deterministic:
            rows = max(able[0], DETERMINISTIC_ROWS)
            widths = itertools.takewhile(bool, (rows // group >> halvings for halvings in itertools.count()))
            options = ((rows, width, DETERMINISTIC_SPLIT) for width in widths)  # of a tile's queries none changes another's bits
        else:
            long = load.queries >= LONG_RUN * len(layout.rows)
            classes = [rows for rows in able if rows >= 64] if long else [rows for rows in able if rows <= 64] or able[:1]
            options = ((rows, self._width(layout, rows // group), split) for rows in classes for split in SPLITS)
            if not long:
                return self._with_tails(min(options, key=lambda option: load.clocks(option, able[0])), load, able[0])
        rows, width, split = min(options, key=load.clocks)
        return Cut(rows=rows, tail_rows=rows, max_queries=width, split=split, compress=not self._deterministic,
                   tile=load.keys_worth(ITEM, rows))  # fmt: skip

    def tree(self, layout: BatchLayout, cut: Cut) -> "_C.TreePlan":
        options = asdict(cut)
        del options["rows"], options["tail_rows"]
        forest, starts = self._forest(layout)
        return _C.TreePlan(forest, starts, layout.row_starts, reserve=RESERVE, **options)

    def attend(self, q: Tensor, cache: KVCache, layer: int, tables: Any, cut: Cut) -> Tensor:
        q = q if q.stride()[1:] == (q.shape[2], 1) else q.contiguous()
        return self._kernels.tree_attention(q, cache.k[layer], cache.v[layer], tables, rows=cut.rows, tail_rows=cut.tail_rows)

    def _with_tails(self, option: tuple[int, int, int], load: "_Load", tail_rows: int) -> Cut:
        rows, width, split = option
        # A tail of its own costs its items, and two partial results of every query; it saves the masked work of a wide tile. Where
        # tiles are too few for the device it costs nothing.
        saved = key_clocks(rows, load.dim) - key_clocks(tail_rows, load.dim)
        tail, tiles = KEYS, load.kv_heads * load.queries // width
        if tiles >= load.multiprocessors:
            tail = min(DETERMINISTIC_SPLIT, round((2 * partial_clocks(load.group, load.dim) + ITEM) / max(saved, 1e-3)))
        return Cut(rows=rows, tail_rows=tail_rows, max_queries=width, split=split, compress=True,
                   tile=load.keys_worth(ITEM, rows), tail_queries=min(width, tail_rows // load.group), tail=tail)  # fmt: skip

    def _load(self, layout: BatchLayout, group: int, kv_heads: int, dim: int) -> "_Load":
        return _Load(layout, int(layout.paths.forest.len.sum()), group, kv_heads, dim, self._multiprocessors)

    def _width(self, layout: BatchLayout, most: int) -> int:
        """Queries of a tile that has room for so many."""
        return most

    def _forest(self, layout: BatchLayout) -> tuple["_C.Forest", np.ndarray]:
        """The nodes that rows stand on, and int32 [B] how many tokens of its node come before each row's first."""
        return layout.paths.forest, layout.starts

    @cached_property
    def _multiprocessors(self) -> int:
        return self._kernels.multiprocessors(self._device)


class TritonBlindAttention(TritonTreeAttention):
    """The same kernels with plans that share nothing: every row reads its whole path. What sharing is measured against."""

    name = "triton_blind"
    batch_invariant = False

    def _load(self, layout: BatchLayout, group: int, kv_heads: int, dim: int) -> "_Load":
        return _Load(layout, int(layout.context_lens.sum()), group, kv_heads, dim, self._multiprocessors)

    def _width(self, layout: BatchLayout, most: int) -> int:
        """Lone tokens get an item each."""
        return max(1, min(most, int(np.diff(layout.row_starts).max(initial=1))))

    def _forest(self, layout: BatchLayout) -> tuple["_C.Forest", np.ndarray]:
        slots, lens = layout.context_slots, layout.context_lens
        listed = slots[np.arange(slots.shape[1]) < lens[:, None]]
        rows = np.arange(len(lens), dtype=np.int32)
        forest = _C.Forest(np.full_like(rows, -1), (np.cumsum(lens) - lens).astype(np.int32), lens, rows, listed)
        return forest, (lens - np.diff(layout.row_starts)).astype(np.int32)


# --- what a batch costs by how it is cut ----------------------------------------------------------------------------------


def key_clocks(rows: int, dim: int) -> float:
    """Of one key and its value in a tile of so many rows."""
    moving, computing = 4 * dim / BYTES, 4 * dim * rows / PRODUCTS + rows / EXPONENTIALS
    return max(moving, computing) + (1 - HIDDEN) * min(moving, computing)


def partial_clocks(group: int, dim: int) -> float:
    """Of one query's partial result with one KV head, float32, written and read."""
    return 2 * 4 * group * (dim + 1) / BYTES


class _Load:
    """A batch by its averages: `queries` that see `context` keys each, of which `own` are nobody else's."""

    def __init__(self, layout: BatchLayout, distinct: int, group: int, kv_heads: int, dim: int, multiprocessors: int) -> None:
        self.group, self.kv_heads, self.dim, self.multiprocessors = group, kv_heads, dim, multiprocessors
        self.queries = int(layout.row_starts[-1])
        counts, contexts = np.diff(layout.row_starts), layout.context_lens.astype(np.int64)
        self.context = float(counts @ contexts) / max(1, self.queries)
        self.own = min(self.context, distinct / max(1, self.queries))

    def clocks(self, option: tuple[int, int, int], tail_rows: int | None = None) -> float:
        """Until tiles of a class, of so many queries, are done with paths cut every so many tokens; tails apart or not."""
        rows, width, split = option
        tiles = -(-self.queries // width)
        shared, tails = self.context - self.own, min(width, self.queries) * self.own
        clocks = shared * key_clocks(rows, self.dim) + tails * key_clocks(tail_rows or rows, self.dim)
        pieces = max(1.0, self.context / split)
        longest = min(clocks, split * key_clocks(rows, self.dim)) if tail_rows else clocks / pieces
        partials = self.queries * pieces * partial_clocks(self.group, self.dim) if pieces > 1 else 0.0
        items = tiles * (pieces + (tails / split if tail_rows else 0))
        return self.kv_heads * (tiles * clocks + partials + items * ITEM) / self.multiprocessors + UNEVEN * longest

    def keys_worth(self, clocks: float, rows: int) -> int:
        return max(1, round(clocks / key_clocks(rows, self.dim)))


# --- plans on the device --------------------------------------------------------------------------------------------------


_WIDTHS = {"counts": 1, "grown": 1, "order": 1, "items": 5, "merges": 4, "merge_slots": 1, "segments": 6, "slots": 1}


def _columns(plan: "_C.TreePlan") -> dict[str, np.ndarray]:
    """A plan as int32 tables, the longest last: what tts_kernels.tree_attention.Tables says of each."""
    rows = np.full(len(plan.segments), -1, np.int32)
    rows[plan.leaf] = np.arange(len(plan.leaf))
    beyond = np.array([[0, 0, 0, 0, 0, -1]] * 2, np.int32)
    query, counts, first, number = plan.merges.T
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    merges = np.column_stack([query.repeat(counts) + within, within, first.repeat(counts), number.repeat(counts)])
    return {
        "counts": np.array([len(plan.items), len(merges)], np.int32),
        "grown": np.zeros(len(plan.leaf), np.int32),
        "order": plan.order,
        "items": plan.items,
        "merges": merges.astype(np.int32),
        "merge_slots": plan.merge_slots,
        "segments": np.concatenate([np.column_stack([plan.segments, rows])[plan.item_segments], beyond]),
        "slots": plan.slots,
    }


class TableBuffers:
    """Tables that stay where they are while one plan after another is loaded into them, as a captured graph needs it.

    `capacity` is what `TableBuffers.sizes` counts of plans: entries of each table, and partial results. Behind the entries that
    a plan has, anything may lie.
    """

    def __init__(self, device: torch.device | str, capacity: dict[str, int]) -> None:
        from tts_kernels.tree_attention import Tables

        self.capacity, self._device = capacity, torch.device(device)
        on_gpu = self._device.type == "cuda"
        lens = {name: width * capacity[name] for name, width in _WIDTHS.items()}
        starts = np.cumsum([0, *(-(-size // 4) * 4 for size in lens.values())]).tolist()  # aligned to 16 bytes
        self._host = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=on_gpu)
        self._buffer = torch.empty(starts[-1], dtype=torch.int32, device=self._device)
        self._starts = dict(zip(lens, starts, strict=False))
        self._copied = torch.cuda.Event() if on_gpu else None
        tables = {name: self._buffer[start : start + lens[name]] for name, start in self._starts.items()}
        tables |= {name: tables[name].view(-1, width) for name, width in _WIDTHS.items() if width > 1}
        self.tables = Tables(**tables, num_partials=capacity["partials"])

    @staticmethod
    def sizes(plan: "_C.TreePlan") -> dict[str, int]:
        return {name: len(column) for name, column in _columns(plan).items()} | {"partials": plan.num_partials}

    def fits(self, plan: "_C.TreePlan") -> bool:
        return all(size <= self.capacity[name] for name, size in self.sizes(plan).items())

    def load(self, plan: "_C.TreePlan") -> Any:
        """The tables, once what is queued on the device is done with those before. Raises EngineError for a plan that does not fit.

        No row has grown then; slots that the plan has reserved are among those loaded.
        """
        columns = _columns(plan)
        for name, size in ({name: len(column) for name, column in columns.items()} | {"partials": plan.num_partials}).items():
            if size > self.capacity[name]:
                raise EngineError(f"a plan of {size} {name} does not fit tables made for {self.capacity[name]}")
        if self._copied is not None:
            self._copied.synchronize()  # the host's side may still be on its way to the device
        host = self._host.numpy()
        for name, column in columns.items():
            host[self._starts[name] : self._starts[name] + column.size] = column.ravel()
        used = self._starts["slots"] + len(columns["slots"])  # the longest table is the last: its unused end is not copied
        self._buffer[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return self.tables


def tables_of(plan: "_C.TreePlan", device: torch.device | str) -> Any:
    """A plan as the kernels read it, in tables of its own: tts_kernels.tree_attention.Tables."""
    return TableBuffers(device, TableBuffers.sizes(plan)).load(plan)
