"""Tree attention checked on random trees: every tile class, the plans that backends choose, one captured graph for many trees."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tts_engine.attention.triton_tree import Cut, TableBuffers, TritonBlindAttention, TritonTreeAttention, tables_of
from tts_engine.kv.cache import KVCache

from .race import captured
from .setting import Bench, most_off, near
from .trees import BLOCK, GROWTH, Grove, growing_grove, random_grove

LONG_NEW = 150  # tokens of a row in a prefill, at most
STOPPED = -(1 << 30)  # what a row has grown by once it is to cost nothing


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated meanwhile is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Case:
    """A grove with keys and values, NaN where it has none, and queries."""

    def __init__(self, bench: Bench, grove: Grove, heads: tuple[int, int, int], dtype: torch.dtype, *, seed: int = 0,
                 num_slots: int = 0) -> None:  # fmt: skip
        num_heads, kv_heads, dim = heads
        gen = bench.generator(seed)
        self.grove, self.layout = grove, grove.layout()
        self.cache = KVCache(num_layers=1, num_blocks=-(-(num_slots or grove.num_slots) // BLOCK), block_size=BLOCK,
                             num_kv_heads=kv_heads, head_dim=dim, dtype=dtype, device=bench.device)  # fmt: skip
        live = torch.from_numpy(np.concatenate(grove.runs).astype(np.int64)).to(bench.device)
        for table in self.cache.tables:
            table.fill_(torch.nan)
            table[live] = torch.randn(len(live), kv_heads, dim, generator=gen, device=bench.device).to(dtype)
        self.q = torch.randn(sum(grove.new), num_heads, dim, generator=gen, device=bench.device).to(dtype)

    def judged(self, got: Tensor, without: int | None = None) -> dict[str, Any]:
        """How near to float64 attention is, that of token `without` left out; AssertionError where it is not near enough."""
        k, v = self.cache.k[0], self.cache.v[0]
        exact = self.grove.exact(self.q, k, v)
        plain = self.grove.exact(self.q, k, v, torch.float32).to(self.q.dtype)
        kept = [token for token in range(len(got)) if token != without]
        return near(got[kept], exact[kept], plain[kept], most_off(self.q.dtype))


CLASSES = ((16, 16), (64, 64), (64, 16), (128, 128))  # of tiles, and of tails


def tiles(bench: Bench, dtype: str) -> None:
    """Each tile class with and without tails; then what backends make of random layouts themselves."""
    kind = getattr(torch, dtype)
    for name, shape in bench.sizes.heads.items() if kind in bench.sizes.checked else ():
        for rows, tail_rows in CLASSES:
            bench.check(f"{name}, {rows} rows, tails of {tail_rows}", partial(_tiles, bench, shape, kind, rows, tail_rows))
        bench.check(f"{name}, backends", partial(_backends, bench, shape, kind))
    for heads, kv_heads, dim in bench.sizes.odd_heads if kind == bench.sizes.dtype else ():
        bench.check(f"{heads}/{kv_heads} of {dim}, backends", partial(_backends, bench, (heads, kv_heads, dim), kind))
    bench.settle()


def _tiles(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, rows: int, tail_rows: int) -> dict[str, Any]:
    told, group = {}, shape[0] // shape[1]
    for seed in range(bench.sizes.trees):
        most_new = LONG_NEW if rows == 128 and bench.on_gpu else 9
        case = Case(bench, random_grove(seed + rows, bench.sizes.nodes, bench.sizes.longest, most_new), shape, dtype, seed=seed)
        tails = {"tail_queries": max(1, tail_rows // group), "tail": 1} if tail_rows < rows else {}
        cut = Cut(rows=rows, tail_rows=tail_rows, max_queries=rows // group, split=(4096, 100)[seed % 2], compress=seed % 3 > 0,
                  tile=(0, 40)[seed % 2], **tails)  # fmt: skip
        backend = TritonTreeAttention(bench.device)
        tables = tables_of(backend.tree(case.layout, cut), bench.device)
        with poisoned():
            told = case.judged(backend.attend(case.q, case.cache, 0, tables, cut))
    return told


def _backends(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Plans of their own; the deterministic one gives a row alone the bits that it has among others."""
    told = {}
    for seed in range(bench.sizes.trees):
        grove = random_grove(seed, bench.sizes.nodes, bench.sizes.longest, (9, LONG_NEW)[seed % 2])
        case = Case(bench, grove, shape, dtype, seed=seed)
        outs = []
        for backend in (TritonTreeAttention(bench.device), TritonBlindAttention(bench.device),
                        TritonTreeAttention(bench.device, deterministic=True)):  # fmt: skip
            with poisoned():
                outs.append(backend.run(case.q, None, None, case.cache, 0, backend.plan(case.layout)))
            told = case.judged(outs[-1])
        ends = np.cumsum(grove.new)
        for row in range(0, len(grove.rows), max(1, len(grove.rows) // 3)):
            backend = TritonTreeAttention(bench.device, deterministic=True)
            own = slice(int(ends[row]) - grove.new[row], int(ends[row]))
            got = backend.run(case.q[own], None, None, case.cache, 0, backend.plan(grove.only(row).layout()))
            assert torch.equal(got, outs[-1][own]), f"row {row} of tree {seed} has other bits alone than among others"
    return told


def replay(bench: Bench) -> None:
    """One graph of the kernels, captured over one tree and replayed over others, whose rows then grow on the device."""
    for name, shape in bench.sizes.heads.items():
        bench.check(name, partial(_replayed, bench, shape, bench.sizes.dtype))
    bench.settle()


def _replayed(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    group, rows = shape[0] // shape[1], bench.sizes.nodes
    cut = Cut(rows=64, tail_rows=16, max_queries=64 // group, split=128, compress=True, tile=40, tail_queries=max(1, 16 // group),
              tail=64)  # fmt: skip
    backend = TritonTreeAttention(bench.device)
    groves = [growing_grove(seed, bench.sizes.longest, rows) for seed in range(bench.sizes.replays)]
    plans = [_reserved(backend, grove, seed % (GROWTH + 1), cut) for seed, grove in enumerate(groves)]
    sizes = [TableBuffers.sizes(plan) for plan in plans]
    buffers = TableBuffers(bench.device, {name: 7 + max(size[name] for size in sizes) for name in sizes[0]})
    most = max(grove.num_slots for grove in groves)
    still = Case(bench, groves[0], shape, dtype, num_slots=most)  # where the graph finds its queries, keys and values
    buffers.load(plans[0])
    out = torch.empty_like(still.q)
    again = captured(bench, lambda _: out.copy_(backend.attend(still.q, still.cache, 0, buffers.tables, cut)), 1)
    told: dict[str, Any] = {}
    for seed, (grove, plan) in enumerate(zip(groves, plans, strict=True)):
        case = Case(bench, grove, shape, dtype, num_slots=most)
        still.q.copy_(case.q)
        for mine, drawn in zip(still.cache.tables, case.cache.tables, strict=True):
            mine.copy_(drawn)
        _spoil(buffers)
        buffers.load(plan)
        buffers.tables.grown[:rows] += seed % (GROWTH + 1)
        buffers.tables.grown[seed % rows] = STOPPED
        out.fill_(torch.nan)
        again()
        assert bool(out.isfinite().all()), f"tree {seed} has outputs that are not finite"
        told = case.judged(out, without=seed % rows)
    return told | {"trees": len(groves)}


def _reserved(backend: TritonTreeAttention, grove: Grove, tokens: int, cut: Cut) -> Any:
    """The plan of a grove so many tokens ago, with the slots of those that came since."""
    plan = backend.tree(grove.before(tokens).layout(), cut)
    if tokens:
        slots = np.stack([grove.runs[node][len(grove.runs[node]) - tokens :] for node in grove.rows], axis=1)
        assert plan.reserve(slots.astype(np.int64)), "a plan has no room to grow"
    return plan


def _spoil(buffers: TableBuffers) -> None:
    """What lies behind a plan's entries may be anything."""
    tables = buffers.tables
    for table in (tables.order, tables.slots, tables.items, tables.segments, tables.merges, tables.merge_slots):
        table.fill_(-(1 << 30))
