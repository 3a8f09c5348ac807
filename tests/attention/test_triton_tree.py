"""triton_tree, interpreted, against the definition over a KV tree that grows, forks and is read in part."""

import sys

import numpy as np
import pytest
import torch

from tts_engine.attention import make_backend
from tts_engine.attention.triton_tree import TritonBlindAttention, TritonTreeAttention
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
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
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
            outs.append([attention.run(q[:, :heads], k, v, cache, layer, plan) for layer in (0, 1)][1])
            if attention is backends[0]:
                plans.append(plan.tree)
        torch.testing.assert_close(*outs, rtol=1e-5, atol=2e-6)
    assert [plan is plans[max(0, i - 1)] for i, plan in enumerate(plans)] == [True, False, True, True, False, False, True]


@pytest.mark.parametrize(
    ("rows", "new", "shared", "expected"),
    [(4, 1, 300, 64), (4, 1, 0, 16), (1, 1, 300, 16), (4, 20, 300, 128), (200, 1, 0, 16)],
)
def test_tiles_are_chosen_by_what_is_shared_and_paths_are_cut_for_the_device(rows, new, shared, expected, monkeypatch):
    backend = TritonTreeAttention("cpu")
    monkeypatch.setattr(TritonTreeAttention, "_multiprocessors", 132)
    paths = [[*range(shared), *range(1000 * (row + 1), 1000 * (row + 1) + 200)] for row in range(rows)]
    size, queries, split = backend._cut(flat_layout(paths, [new] * rows), group=7, kv_heads=4)
    assert size == expected and queries == size // 7 and 256 <= split <= 4096


def test_the_blind_backend_reads_every_path_by_itself():
    backend = TritonBlindAttention("cpu")
    layout = flat_layout([[*range(300), 1000 + row] for row in range(5)], [1] * 5)
    size, queries, _ = backend._cut(layout, group=4, kv_heads=8)
    assert (size, queries) == (16, 1)
    forest, starts = backend._forest(layout)
    assert forest.parent.tolist() == [-1] * 5 and len(forest.slots) == 5 * 301 and starts.tolist() == [300] * 5
