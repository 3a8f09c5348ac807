"""Attention over a shared tree on the CPU, against PyTorch's best forms and the same kernel with a plan that shares nothing.

Keys and values of LAYERS layers take turns, as in a model, so that no contender finds the last layer's in its cache.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tts_engine import _C
from tts_engine.attention import native

LAYERS = 11  # a number that no number of contenders divides: each of them comes to each layer
SHAPES = {"Qwen2.5-0.5B": (14, 2, 64), "Llama-3.2-1B": (32, 8, 64)}  # H, K, D
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED = 512


def pool(num_slots, kv_heads, dim, dtype):
    """Layers without end, which all contenders take turns with: none finds what the one before it has left in a cache."""
    gen = torch.Generator().manual_seed(0)
    layers = [[torch.randn(num_slots, kv_heads, dim, generator=gen).to(dtype) for _ in "kv"] for _ in range(LAYERS)]
    return itertools.cycle(layers)


def forest_of(paths, *, sharing):
    """A plan's arguments. paths: for each row its nodes, ranges of slots, of which the last token of the last is new.

    Without `sharing` every row has a node of its own with all its slots: the same kernel then reads what is stored once as often
    as there are rows.
    """
    parents, runs, numbers, rows = [], [], {}, []
    for row, path in enumerate(paths):
        nodes = path if sharing else [tuple(itertools.chain.from_iterable(path))]
        key, node = (None if sharing else row,), -1
        for run in nodes:
            key = (*key, run)
            if key not in numbers:
                numbers[key] = len(parents)
                parents.append(node)
                runs.append(run)
            node = numbers[key]
        rows.append(node)
    lens = [len(run) for run in runs]
    columns = (parents, np.cumsum([0, *lens[:-1]]), lens, rows, list(itertools.chain.from_iterable(runs)))
    forest = _C.Forest(*(np.array(column, np.int32) for column in columns))
    return forest, (forest.len[forest.node] - 1).astype(np.int32), np.arange(len(rows) + 1, dtype=np.int32)


def plan_of(paths, *, sharing):
    arrays = forest_of(paths, sharing=sharing)
    return _C.TreePlan(
        *arrays, max_queries=native.MAX_QUERIES, split=native.SPLIT, reserve=0, compress=True, tail_queries=1, tail=256
    )


def ours(plan, q, turn, out):
    heads, dim = q.shape[1:]

    def run():
        k, v = next(turn)
        _C.tree_attention(plan, q.data_ptr(), heads * dim, k.data_ptr(), v.data_ptr(), out.data_ptr(), num_heads=heads,
                          num_kv_heads=k.shape[1], head_dim=dim, bfloat16=q.dtype == torch.bfloat16,
                          instruction_set=_C.instruction_sets()[0], num_threads=torch.get_num_threads())  # fmt: skip
        return out

    return run


def sdpa_forms(q, turn, kv_heads, num_keys):
    """PyTorch over the shared keys only: a batch of branches over a stored-once view, and one call for all rows."""
    branches, heads, dim = q.shape
    group = heads // kv_heads

    def branch_view():
        k, v = (x[:num_keys].transpose(0, 1).expand(branches, kv_heads, num_keys, dim) for x in next(turn))
        return F.scaled_dot_product_attention(q.view(branches, kv_heads, group, dim), k, v)

    def one_call():
        k, v = (x[:num_keys].transpose(0, 1)[None] for x in next(turn))
        rows = q.view(branches, kv_heads, group, dim).transpose(0, 1).reshape(1, kv_heads, branches * group, dim)
        return F.scaled_dot_product_attention(rows, k, v)

    def two_products():
        k, v = (x[:num_keys].transpose(0, 1) for x in next(turn))
        rows = q.view(branches, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, branches * group, dim)
        return torch.bmm((torch.bmm(rows, k.transpose(1, 2)).float() * dim**-0.5).softmax(-1).to(q.dtype), v)

    return {"SDPA, per branch, stored once": branch_view, "one SDPA call": one_call, "two GEMMs": two_products}


def contenders_of(paths, q, turn):
    """Ours and the same kernel with nothing shared, found equal first."""
    plans = [plan_of(paths, sharing=sharing) for sharing in (True, False)]
    outs, one = [torch.empty_like(q) for _ in plans], itertools.repeat(next(turn))
    torch.testing.assert_close(*(ours(plan, q, one, out)() for plan, out in zip(plans, outs, strict=True)), rtol=2e-2, atol=2e-2)
    runs = [ours(plan, q, turn, out) for plan, out in zip(plans, outs, strict=True)]
    return dict(zip(("tree", "the same kernel, nothing shared"), runs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("branches", [1, 4, 16, 64, 256])
def test_branches_on_a_shared_prompt(race, branches, shape, dtype):
    heads, kv_heads, dim = SHAPES[shape]
    turn = pool(SHARED + branches, kv_heads, dim, DTYPES[dtype])
    q = torch.randn(branches, heads, dim).to(DTYPES[dtype])
    paths = [[range(SHARED), range(SHARED + row, SHARED + row + 1)] for row in range(branches)]
    contenders = contenders_of(paths, q, turn) | sdpa_forms(q, turn, kv_heads, SHARED)
    gflop = 4e-9 * branches * heads * dim * SHARED
    gbyte = 2e-9 * SHARED * kv_heads * dim * DTYPES[dtype].itemsize
    race(f"{shape} {dtype}, {branches} branches on {SHARED}", contenders, gflop=gflop, gbyte=gbyte)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_of_four_levels(race, shape, dtype):
    """512 shared tokens, then 64 a level: 4 nodes, 16, and 64 leaves."""
    heads, kv_heads, dim = SHAPES[shape]
    starts = itertools.count(SHARED, 64)
    tree = [[range(SHARED)]]
    for width in (4, 4, 4):
        tree = [[*path, range(at, at + 64)] for path in tree for at in itertools.islice(starts, width)]
    num_slots = next(starts)
    turn = pool(num_slots, kv_heads, dim, DTYPES[dtype])
    q = torch.randn(len(tree), heads, dim).to(DTYPES[dtype])
    gflop = 4e-9 * len(tree) * heads * dim * (SHARED + 3 * 64)
    gbyte = 2e-9 * num_slots * kv_heads * dim * DTYPES[dtype].itemsize
    race(f"{shape} {dtype}, 64 leaves of four levels", contenders_of(tree, q, turn), gflop=gflop, gbyte=gbyte)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_share(race, dtype):
    """16 unrelated sequences: what sharing costs where there is none, and PyTorch over the same, gathered beforehand."""
    heads, kv_heads, dim = SHAPES["Qwen2.5-0.5B"]
    rows, length = 16, SHARED
    turn = pool(rows * length, kv_heads, dim, DTYPES[dtype])
    q = torch.randn(rows, heads, dim).to(DTYPES[dtype])
    paths = [
        [range(row * length, row * length + length - 64), range(row * length + length - 64, (row + 1) * length)]
        for row in range(rows)
    ]

    def sdpa():
        k, v = (x.view(rows, length, kv_heads, dim).transpose(1, 2) for x in next(turn))
        return F.scaled_dot_product_attention(q.view(rows, kv_heads, heads // kv_heads, dim), k, v)

    contenders = contenders_of(paths, q, turn) | {"SDPA, per branch": sdpa}
    gflop, gbyte = 4e-9 * rows * heads * dim * length, 2e-9 * rows * length * kv_heads * dim * DTYPES[dtype].itemsize
    race(f"Qwen2.5-0.5B {dtype}, 16 unrelated of {length}", contenders, gflop=gflop, gbyte=gbyte)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ceilings(race, dtype):
    """What this machine can do at all: a large matrix product, and a copy."""
    a, b = (torch.randn(2048, 2048).to(DTYPES[dtype]) for _ in "ab")
    race(f"GEMM 2048 {dtype}", {"F.linear": lambda: F.linear(a, b)}, gflop=2e-9 * 2048**3)
    wide = torch.randn(64 << 20)
    into = torch.empty_like(wide)
    race("copy", {"copy_": lambda: into.copy_(wide)}, gbyte=2e-9 * wide.nbytes)


@pytest.mark.parametrize("leaves", [64, 4096])
def test_planning(race, leaves):
    """From scratch, and one token further."""
    starts = itertools.count(0, 12)
    tree = [[range(next(starts), next(starts) + 150)] for _ in range(leaves // 64)]
    for _ in range(3):
        tree = [[*path, range(at, at + 12)] for path in tree for at in itertools.islice(starts, 4)]
    forest, own, rows = forest_of(tree, sharing=True)
    limits = {"max_queries": native.MAX_QUERIES, "split": native.SPLIT, "compress": True}
    grown = [_C.TreePlan(forest, own, rows, reserve=1 << 10, **limits)]
    slots = np.arange(leaves)

    def grow():
        if not grown[0].grow(slots):
            grown[0] = _C.TreePlan(forest, own, rows, reserve=1 << 10, **limits)

    race(
        f"{leaves} leaves", {"a new plan": lambda: _C.TreePlan(forest, own, rows, reserve=64, **limits), "one token further": grow}
    )
