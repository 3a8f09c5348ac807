"""native against the definition over random trees, odd sizes and poisoned slots, on every instruction set; and what its bits
may depend on."""

import random

import numpy as np
import pytest
import torch

from tts_engine import _C
from tts_engine.attention import make_backend
from tts_engine.attention.base import BatchLayout
from tts_engine.kv.cache import KVCache
from tts_engine.kv.tree import NO_NODE, KVTree, TreePaths
from tts_engine.testing import flat_layout

HEADS = [(3, 3, 8), (4, 2, 32), (7, 1, 10), (14, 2, 64), (6, 2, 80), (5, 1, 256)]  # H, K, D


def random_paths(seed, max_nodes=20, longest=150):
    """(slots of each row's path, new tokens of each) over a random tree; rows end at leaves and, some, within."""
    rng = random.Random(seed)
    longest = rng.choice([3, 20, longest])
    parents, lens = [], []
    for node in range(rng.randint(1, max_nodes)):
        parents.append(rng.randrange(-1, node))
        lens.append(rng.randint(1, longest))
    free = rng.sample(range(1, sum(lens) + 50), sum(lens))
    runs = [[free.pop() for _ in range(length)] for length in lens]
    paths = []
    for node, parent in enumerate(parents):
        paths.append((paths[parent] if parent >= 0 else []) + runs[node])
    rows = [node for node in range(len(parents)) if node not in parents or rng.random() < 0.3]
    rng.shuffle(rows)
    # New tokens lie in the row's own node, and that is shorter where another row parts from it.
    return [paths[row] for row in rows], [rng.choice([1, rng.randint(1, lens[row])]) for row in rows]


def filled_cache(slots, heads, dim, dtype, seed=1):
    cache = KVCache(num_layers=2, num_blocks=1 + max(max(path) for path in slots), block_size=1, num_kv_heads=heads, head_dim=dim,
                    dtype=dtype)  # fmt: skip
    for table in cache.tables:
        table.fill_(torch.nan)
    live = torch.tensor(sorted({slot for path in slots for slot in path}))
    gen = torch.Generator().manual_seed(seed)
    cache.k[1][live], cache.v[1][live] = (torch.randn(len(live), heads, dim, generator=gen).to(dtype) for _ in range(2))
    return cache


def drawn(layout, heads, kv_heads, dim, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    tokens = len(layout.positions)
    return [torch.randn(tokens, n, dim, generator=gen).to(dtype) for n in (heads, kv_heads, kv_heads)]


def attend(backend, slots, new, heads, kv_heads, dim, dtype):
    layout = flat_layout(slots, new)
    q, k, v = drawn(layout, heads, kv_heads, dim, dtype)
    return backend.run(q, k, v, filled_cache(slots, kv_heads, dim, dtype), 1, backend.plan(layout))


def exact(slots, new, heads, kv_heads, dim, dtype):
    """The same in float64 from the same numbers; and plain PyTorch in `dtype`, products in float32, as the yardstick."""
    layout = flat_layout(slots, new)
    q, k, v = drawn(layout, heads, kv_heads, dim, dtype)
    cache = filled_cache(slots, kv_heads, dim, dtype)
    cache.write(1, torch.from_numpy(layout.write_slots), k, v)
    wide, plain = torch.empty(q.shape, dtype=torch.float64), torch.empty_like(q)
    token = 0
    for path, count in zip(slots, new, strict=True):
        for i in range(count):
            seen = path[: len(path) - count + i + 1]
            keys, values = (x[1][seen].repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for x in (cache.k, cache.v))
            for out, to in ((wide, torch.float64), (plain, torch.float32)):
                weights = (keys.to(to) @ q[token].to(to)[:, :, None]).div(dim**0.5).softmax(1)
                out[token] = (
                    (weights.to(dtype).to(to) if to == torch.float32 else weights).transpose(1, 2).matmul(values.to(to))[:, 0]
                )
            token += 1
    return wide, plain


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_native_is_as_near_to_the_truth_as_plain_pytorch(instruction_set, dtype, deterministic):
    worst = 0.0
    for seed in range(24):
        heads, kv_heads, dim = HEADS[seed % len(HEADS)]
        slots, new = random_paths(seed)
        backend = make_backend("native", deterministic=deterministic)
        backend.instruction_set = instruction_set
        out = attend(backend, slots, new, heads, kv_heads, dim, dtype)
        assert out.dtype == dtype and not out.isnan().any()
        wide, plain = exact(slots, new, heads, kv_heads, dim, dtype)
        error, yardstick = ((x.double() - wide).square().mean().sqrt().item() for x in (out, plain))
        worst = max(worst, error / max(yardstick, 1e-9))
        assert (out.double() - wide).abs().max() <= (2e-6 if dtype == torch.float32 else 2**-7) * wide.abs().max()
    assert worst <= 1.5


def test_scores_beyond_any_finite_mask_still_count():
    slots, new = [list(range(1, 41))], [3]
    layout = flat_layout(slots, new)
    q, k, v = drawn(layout, 4, 2, 32, torch.float32)
    cache = filled_cache(slots, 2, 32, torch.float32)
    backend = make_backend("native")
    for sign in (-1, 1):  # all scores below -1e5, then the softmax all but one-hot
        cache.k[1].abs_()
        out = backend.run(q.abs() * sign * 1e5, k.abs(), v, cache, 1, backend.plan(flat_layout(slots, new)))
        ref_backend = make_backend("reference")
        ref = ref_backend.run(q.abs() * sign * 1e5, k.abs(), v, cache, 1, ref_backend.plan(flat_layout(slots, new)))
        torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-5)


def tree_layout(tree, handles, is_lease, starts, counts):
    """The layout of runs of a real tree, as the runner makes it."""
    handles, is_lease = np.array(handles), np.full(len(handles), is_lease)
    starts, counts = np.array(starts, np.int32), np.array(counts, np.int32)
    before = [
        tree.lease_start(h) if lease else tree.path_len(h) - tree.num_tokens(h) for h, lease in zip(handles, is_lease, strict=True)
    ]
    lens = np.array(before, np.int32) + starts + counts
    return BatchLayout(
        rows=handles,
        starts=starts,
        ends=starts + counts,
        row_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        positions=np.concatenate([np.arange(n - c, n) for n, c in zip(lens, counts, strict=True)]),
        write_slots=tree.write_slots(handles, is_lease, starts, counts),
        context_lens=lens,
        paths=TreePaths(tree, handles, is_lease, starts + counts, lens),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_company_threads_or_the_order_of_rows(dtype):
    """deterministic=True: each run alone, token by token, and among all others in any order."""
    rng = random.Random(5)
    tree, nodes = KVTree(num_blocks=900, block_size=4), []
    for number in range(30):
        parent = rng.choice([NO_NODE, *nodes, *nodes])
        nodes.append(tree.insert(parent, [number] * rng.choice([1, 4, 11, 90, 130])))
    counts = {node: rng.choice([1, rng.randint(1, tree.num_tokens(node))]) for node in nodes[10:]}
    for node in nodes:  # what a row of the batch stands on is complete
        if node in counts and any(tree.parent(other) == node for other in nodes):
            counts[node] = tree.num_tokens(node)
    heads, kv_heads, dim = 14, 2, 64
    gen = torch.Generator().manual_seed(3)
    q = torch.randn(3600, heads, dim, generator=gen).to(dtype)  # by slot
    k, v = (torch.randn(3600, kv_heads, dim, generator=gen).to(dtype) for _ in range(2))
    cache = KVCache(num_layers=1, num_blocks=900, block_size=4, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype)
    cache.k[0][:], cache.v[0][:] = k, v
    backend = make_backend("native", deterministic=True)

    def run(rows, threads=1):
        """rows of (node, first token, tokens) -> output by slot"""
        handles, starts, sizes = zip(*rows, strict=True)
        layout = tree_layout(tree, handles, False, starts, sizes)
        at = torch.from_numpy(layout.write_slots)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = backend.run(q[at], k[at], v[at], cache, 0, backend.plan(layout))
        finally:
            torch.set_num_threads(before)
        return dict(zip(layout.write_slots.tolist(), out, strict=True))

    rows = [(node, tree.num_tokens(node) - count, count) for node, count in counts.items()]
    together = run(rows)
    for threads in (1, 2, 3):
        rng.shuffle(rows)
        again = run(rows, threads)
        assert again.keys() == together.keys() and all(torch.equal(again[slot], together[slot]) for slot in together)
    for node, start, count in rows:
        alone = run([(node, start, count)])
        one_by_one = {}
        for token in range(start, start + count):
            one_by_one |= run([(node, token, 1)])
        assert all(torch.equal(alone[slot], together[slot]) for slot in alone)
        assert all(torch.equal(one_by_one[slot], together[slot]) for slot in alone)


def test_a_plan_grows_as_a_new_one_would_be_and_only_for_the_same_rows():
    """Open steps over a KV tree, decoded token by token: the kept plan against one made anew each time."""
    tree = KVTree(num_blocks=200, block_size=4)
    prompt = tree.insert(NO_NODE, list(range(13)))
    step = tree.insert(prompt, [1, 2, 3])
    leases = [tree.lease(parent) for parent in (prompt, step, step, prompt)]
    cache = KVCache(num_layers=1, num_blocks=200, block_size=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    gen = torch.Generator().manual_seed(0)
    for table in cache.tables:
        table.normal_(generator=gen)
    kept, plans = make_backend("native"), []
    for length in range(1, 150):
        rows = leases if length < 120 else [leases[2], leases[0], leases[1]]  # one row less from there on
        assert tree.extend_many(rows) == len(rows)
        layout = tree_layout(tree, rows, True, [length - 1] * len(rows), [1] * len(rows))
        q, k, v = (torch.randn(len(rows), n, 16, generator=gen) for n in (4, 2, 2))
        plan = kept.plan(layout)
        if not plans or plan.tree is not plans[-1]:
            plans.append(plan.tree)
        out = kept.run(q, k, v, cache, 0, plan)
        fresh = make_backend("native")
        assert torch.equal(out, fresh.run(q, k, v, cache, 0, fresh.plan(layout)))
    assert len(plans) == 3  # one at first, one when 64 more tokens are drawn, one when a row is gone
