"""triton_tree, interpreted, against the definition over a KV tree that grows, forks and is read in part."""

import sys

import numpy as np
import pytest
import torch

from tts_engine.attention import make_backend
from tts_engine.attention.triton_tree import SPLITS, TableBuffers, TritonBlindAttention, TritonTreeAttention
from tts_engine.errors import EngineError
from tts_engine.kv.cache import KVCache
from tts_engine.testing import flat_layout

triton = pytest.importorskip("triton")


def drawn(gen, tokens, heads, kv_heads, dim):
    return [torch.randn(tokens, n, dim, generator=gen) for n in (heads + kv_heads, kv_heads, kv_heads)]


def test_it_is_known_by_name_and_runs_on_a_gpu_only():
    assert make_backend("triton_tree", "cuda").name == "triton_tree"
    with pytest.raises(EngineError, match="'triton_tree' runs on cuda only, not on cpu"):
        make_backend("triton_tree", "cpu")


def test_where_triton_is_missing_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tts_kernels", None)
    with pytest.raises(EngineError, match=r"'triton_tree' needs Triton: pip install 'tts-engine\[gpu\]'"):
        TritonTreeAttention("cuda")


def test_a_head_dim_without_a_kernel_is_refused():
    layout, backend = flat_layout([[1, 2]], [2]), TritonTreeAttention("cpu")
    cache = KVCache(num_layers=1, num_blocks=1, block_size=4, num_kv_heads=1, head_dim=80, dtype=torch.float32)
    with pytest.raises(EngineError, match="head_dim 16, 32, 64, 128, not for 80"):
        backend.run(*(torch.zeros(2, 1, 80) for _ in "qkv"), cache, 0, backend.plan(layout))


@pytest.mark.parametrize(
    ("backend", "deterministic"), [(TritonTreeAttention, False), (TritonTreeAttention, True), (TritonBlindAttention, False)]
)
def test_it_agrees_with_the_definition_from_prefill_through_growth_to_a_fork(backend, deterministic):
    """Three branches of a prompt, read as a run of tokens, then decoded token by token; q is a slice, as the decoder's is."""
    gen = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = 7, 1, 16
    caches = [KVCache(num_layers=2, num_blocks=300, block_size=1, num_kv_heads=kv_heads, head_dim=dim, dtype=torch.float32)
              for _ in "ab"]  # fmt: skip
    backends = [backend("cpu", deterministic=deterministic), make_backend("reference")]
    for cache in caches:
        for table in cache.tables:
            table.fill_(torch.nan)
    paths, free, plans = [list(range(20))], iter(range(20, 300)), []
    for new in (20, 1, 1, 1, 17, 1, 1):
        if len(paths) == 1 and plans:
            paths = [[*paths[0], next(free)] for _ in range(3)]
        elif plans:
            paths = [[*path, *(next(free) for _ in range(new))] for path in paths]
        layout = flat_layout(paths, [new] * len(paths))
        layout.rows[:] = np.arange(len(paths))
        q, k, v = drawn(gen, len(layout.positions), heads, kv_heads, dim)
        outs = []
        for attention, cache in zip(backends, caches, strict=True):
            plan = attention.plan(layout)
            with torch.inference_mode():  # as a decoder does
                outs.append([attention.run(q[:, :heads], k, v, cache, layer, plan) for layer in (0, 1)][1])
            if attention is backends[0]:
                plans.append(plan.tree)
        torch.testing.assert_close(*outs, rtol=1e-5, atol=2e-6)
    assert [plan is plans[max(0, i - 1)] for i, plan in enumerate(plans)] == [True, False, True, True, False, False, True]


def branches(rows, shared, own):
    """Paths of a tree whose rows share so many tokens and have so many each."""
    return [[*range(shared), *range(10_000 * (row + 1), 10_000 * (row + 1) + own)] for row in range(rows)]


@pytest.mark.parametrize(
    ("rows", "new", "shared", "own", "tiles"),
    [
        (16, 1, 300, 100, (64, 16)),  # branches of a prompt
        (16, 1, 0, 400, (16, 16)),  # that share nothing
        (1, 1, 300, 100, (16, 16)),
        (16, 30, 300, 100, (128, 128)),  # a prefill
    ],
)
def test_tiles_are_chosen_by_what_is_shared_and_paths_are_cut_for_the_device(rows, new, shared, own, tiles, monkeypatch):
    monkeypatch.setattr(TritonTreeAttention, "_multiprocessors", 132)
    backend, layout = TritonTreeAttention("cpu"), flat_layout(branches(rows, shared, own), [new] * rows)
    cut = backend.cut(layout, heads=28, kv_heads=4, dim=128)
    assert (cut.rows, cut.tail_rows) == tiles and cut.max_queries == cut.rows // 7 and cut.split in SPLITS
    plan = backend.tree(layout, cut)
    tails = plan.items[:, 1] * 7 <= cut.tail_rows
    assert tails.any() if new == 1 else cut.tail_queries == 0
    monkeypatch.setattr(TritonTreeAttention, "_multiprocessors", 1)
    alone = TritonTreeAttention("cpu").cut(layout, heads=28, kv_heads=4, dim=128)
    assert alone.split >= cut.split and alone.tail >= cut.tail  # one multiprocessor has enough to do


def test_deterministic_plans_are_cut_by_the_path_alone(monkeypatch):
    monkeypatch.setattr(TritonTreeAttention, "_multiprocessors", 132)
    backend = TritonTreeAttention("cpu", deterministic=True)
    cuts = [
        backend.cut(flat_layout(branches(rows, 300, 60), [new] * rows), heads=8, kv_heads=2, dim=64)
        for rows, new in ((1, 1), (16, 1), (300, 1), (4, 50))
    ]
    assert {(cut.rows, cut.tail_rows, cut.split, cut.compress, cut.tail_queries) for cut in cuts} == {(64, 64, 4096, False, 0)}
    assert len({cut.max_queries for cut in cuts}) > 1  # for the device's sake


def test_the_blind_backend_reads_every_path_by_itself(monkeypatch):
    monkeypatch.setattr(TritonBlindAttention, "_multiprocessors", 132)
    backend = TritonBlindAttention("cpu")
    layout = flat_layout(branches(5, 2000, 40), [1] * 5)
    cut = backend.cut(layout, heads=32, kv_heads=8, dim=64)
    assert (cut.rows, cut.max_queries, cut.tail_queries) == (16, 1, 1)
    plan = backend.tree(layout, cut)
    assert plan.items[:, 1].tolist() == [1] * len(plan.items) and plan.growth
    assert plan.segments[plan.item_segments, 1].sum() == 5 * 2040 and len(plan.items) == 5 * -(-2040 // cut.split)


def test_only_a_plan_that_fits_is_loaded_into_tables_that_stay():
    backend = TritonTreeAttention("cpu")
    plans = [
        backend.tree(layout, backend.cut(layout, 4, 1, 16)) for layout in (flat_layout(branches(n, 9, 3), [1] * n) for n in (2, 9))
    ]
    sizes = [TableBuffers.sizes(plan) for plan in plans]
    buffers = TableBuffers("cpu", sizes[0])
    assert sizes[0] != sizes[1] and buffers.fits(plans[0]) and not buffers.fits(plans[1])
    assert buffers.load(plans[0]) is buffers.tables
    with pytest.raises(EngineError, match=r"a plan of 9 grown does not fit tables made for 2"):
        buffers.load(plans[1])
    roomy = TableBuffers("cpu", sizes[1])
    assert roomy.fits(plans[0]) and all(table.data_ptr() % 16 == 0 for table in (roomy.tables.slots, roomy.tables.items))
