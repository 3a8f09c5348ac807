"""Tree attention timed: against the same kernels with plans that share nothing, level by level, and where it has little to win."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tts_engine.attention.triton_tree import TritonBlindAttention, TritonTreeAttention
from tts_engine.kv.cache import KVCache

from ..baselines.cascade import Cascade
from .race import Times, Turn, copy_bandwidth, race
from .setting import Bench, Tree
from .trees import BLOCK, Grove, beam, unrelated

OURS, BLIND, LEVELS = "tree", "sharing-blind", "level by level"


class Layers:
    """A grove's keys and values in as many layers as keep one layer's from being found in a cache when its turn comes again."""

    def __init__(self, bench: Bench, grove: Grove, heads: tuple[int, int, int]) -> None:
        self.bench, self.grove, self.heads, dtype = bench, grove, heads, bench.sizes.dtype
        num_heads, kv_heads, dim = heads
        self.bytes = 2 * grove.distinct * kv_heads * dim * dtype.itemsize  # of one layer that somebody reads
        self.turns = 1 + math.ceil(bench.sizes.cold / self.bytes)
        self.cache = KVCache(num_layers=self.turns, num_blocks=-(-grove.num_slots // BLOCK), block_size=BLOCK,
                             num_kv_heads=kv_heads, head_dim=dim, dtype=dtype, device=bench.device)  # fmt: skip
        gen = bench.generator()
        for table in self.cache.tables:
            table.normal_(generator=gen)
        self.q = torch.randn(sum(grove.new), num_heads, dim, generator=gen, device=bench.device).to(dtype)

    def of(self, kind: type[TritonTreeAttention]) -> Turn:
        """That backend's own plan and kernels; there are no new keys to be written."""
        backend = kind(self.bench.device)
        plan = backend.plan(self.grove.layout())
        return lambda turn: backend.run(self.q, None, None, self.cache, turn % self.turns, plan)

    def by_level(self) -> Turn:
        grove, device = self.grove, self.bench.device
        paths = [grove.path(row) for row in range(len(grove.rows))]
        cascade = Cascade(paths, grove.runs, *self.heads, self.q.dtype, device)
        return lambda turn: cascade.run(self.q, self.cache.k[turn % self.turns], self.cache.v[turn % self.turns])

    def contenders(self, **others: Callable[[], Turn]) -> dict[str, Turn]:
        """Ours and others, found to say the same before anybody is timed."""
        turns = {OURS: self.of(TritonTreeAttention)} | {name: make() for name, make in others.items()}
        expected: Any = turns[OURS](0)
        for name, turn in turns.items():
            got = turn(0)
            assert isinstance(got, Tensor) and isinstance(expected, Tensor)
            error = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
            assert error < 0.03, f"{name} says something else than {OURS}: off by {error:.3g} of the largest"
        return turns

    def timed(self, case: str, turns: dict[str, Turn], copy: float) -> Times:
        times = race(self.bench, turns, turns=self.turns)
        for name, seconds in times.seconds.items():
            read = self.bytes / seconds / copy
            self.bench.row(case, contender=name, us=1e6 * seconds, times_ours=times.ratio(name), distinct_share_of_copy=read,
                           noise=times.noise, rounds=times.rounds)  # fmt: skip
        return times


def attention(bench: Bench) -> None:
    """Figures of a wide tree, of sequences that share nothing, and of few branches."""
    copy = copy_bandwidth(bench)
    for name, heads in bench.sizes.heads.items():
        tree = bench.sizes.tree
        # First what makes the ratios mean anything: whether the one that shares nothing reads as fast as memory lets it.
        alone = Layers(bench, unrelated(tree.branches, tree.prompt + tree.shared + tree.private), heads)
        times = alone.timed(f"{name}, {tree.branches} unshared", alone.contenders(**{BLIND: _blind(alone)}), copy)
        share = 100 * alone.bytes / times.seconds[BLIND] / copy
        bench.figure("blind", name, share, noise=times.noise)
        del alone

        wide = Layers(bench, beam(tree), heads)
        case = f"{name}, {tree.branches} branches, {wide.grove.logical / wide.grove.distinct:.2g} reads a token"
        times = wide.timed(case, wide.contenders(**{BLIND: _blind(wide)}), copy)
        bench.figure("sharing", case, times.ratio(BLIND), noise=times.noise, meaningful=share >= 80)
        bench.figure("bandwidth", case, 100 * wide.bytes / times.seconds[OURS] / copy, noise=times.noise)
        del wide

        few = Layers(bench, unrelated(*bench.sizes.unrelated), heads)
        case = f"{name}, {bench.sizes.unrelated[0]} unrelated of {bench.sizes.unrelated[1]}"
        times = few.timed(case, few.contenders(**{BLIND: _blind(few)}), copy)
        bench.figure("unrelated", case, 100 * (1 / times.ratio(BLIND) - 1), noise=times.noise)
        for tree in bench.sizes.few:
            small = Layers(bench, beam(tree), heads)
            case = f"{name}, {tree.branches} branches on {tree.prompt}, {tree.private} each"
            small.timed(case, small.contenders(**{BLIND: _blind(small)}), copy)


def levels(bench: Bench) -> None:
    """Against a launch and a merge a level, on trees of few levels and of many."""
    copy = copy_bandwidth(bench)
    for (name, heads), count in itertools.product(bench.sizes.heads.items(), bench.sizes.levels):
        wide = bench.sizes.tree
        tree = Tree(branches=wide.branches, prompt=wide.prompt, shared=wide.shared, private=wide.private, levels=count)
        layers = Layers(bench, beam(tree), heads)
        case = f"{name}, {tree.branches} branches, {count} levels"
        times = layers.timed(case, layers.contenders(**{LEVELS: layers.by_level}), copy)
        bench.figure("cascade", case, times.ratio(LEVELS), noise=times.noise)


def _blind(layers: Layers) -> Callable[[], Turn]:
    return lambda: layers.of(TritonBlindAttention)
