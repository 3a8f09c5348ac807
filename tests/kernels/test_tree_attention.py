"""Tree attention in Triton, interpreted, against the paths written out: random trees, odd sizes, poisoned slots and outputs; and
what its bits may depend on."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from tts_engine import _C
from tts_engine.attention.triton_tree import tables_of
from tts_engine.testing import flat_layout
from tts_kernels.tree_attention import Tables, tree_attention

GROUPS = [(1, 1), (2, 2), (3, 1), (10, 2), (6, 1), (7, 1), (8, 1)]  # H, K


def random_paths(seed, longest):
    """(slots of each row's path, new tokens of each) over a random tree whose rows end at leaves and, some, within."""
    rng = random.Random(seed)
    parents = [rng.randrange(-1, node) for node in range(rng.randint(1, 7))]
    lens = [rng.randint(1, longest) for _ in parents]
    free = rng.sample(range(1, sum(lens) + 20), sum(lens))
    paths = []
    for parent, length in zip(parents, lens, strict=True):
        paths.append((paths[parent] if parent >= 0 else []) + [free.pop() for _ in range(length)])
    rows = [node for node in range(len(parents)) if node not in parents or rng.random() < 0.3]
    rng.shuffle(rows)
    return [paths[row] for row in rows], [rng.choice([1, rng.randint(1, min(9, lens[row]))]) for row in rows]


def pool(paths, kv_heads, dim, dtype, seed=0):
    """Keys and values [slots, K, D]; those of slots on no path are NaN."""
    gen = torch.Generator().manual_seed(seed)
    live = torch.tensor(sorted({slot for path in paths for slot in path}))
    tables = []
    for _ in "kv":
        table = torch.full((int(live.max()) + 3, kv_heads, dim), torch.nan, dtype=dtype)
        table[live] = torch.randn(len(live), kv_heads, dim, generator=gen).to(dtype)
        tables.append(table)
    return tables


def attend(paths, new, q, k, v, *, rows=16, split=4096, compress=True, num_programs=3):
    layout = flat_layout(paths, new)
    plan = _C.TreePlan(layout.paths.forest, layout.starts, layout.row_starts, max_queries=rows // (q.shape[1] // k.shape[1]),
                       split=split, reserve=0, compress=compress)  # fmt: skip
    return tree_attention(q, k, v, tables_of(plan, "cpu"), rows=rows, num_programs=num_programs), plan


def exact(paths, new, q, k, v, dtype=torch.float64):
    """The definition, path by path; weights are rounded to q's dtype where that is not float64's own computation."""
    out, token = torch.empty(q.shape, dtype=dtype), 0
    for path, count in zip(paths, new, strict=True):
        for seen in range(len(path) - count + 1, len(path) + 1):
            keys, values = (x[path[:seen]].repeat_interleave(q.shape[1] // x.shape[1], 1).to(dtype) for x in (k, v))
            weights = torch.einsum("hd,chd->hc", q[token].to(dtype), keys).div(q.shape[2] ** 0.5).softmax(-1)
            weights = weights if dtype == torch.float64 else weights.to(q.dtype).to(dtype)
            out[token] = torch.einsum("hc,chd->hd", weights, values)
            token += 1
    return out


def drawn(new, heads, dim, dtype, seed=1):
    return torch.randn(sum(new), heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_the_kernel_is_as_near_to_the_truth_as_plain_pytorch(heads, kv_heads, dtype, soak):
    merged = 0
    for seed in range(2 * soak):
        dim, rows = (16, 32)[seed % 2], (16, 64)[heads % 2]
        paths, new = random_paths(seed + heads, longest=(9, 80)[seed % 2])
        q, (k, v) = drawn(new, heads, dim, dtype), pool(paths, kv_heads, dim, dtype)
        out, plan = attend(paths, new, q, k, v, rows=rows, split=(4096, 37)[seed % 2])
        assert out.dtype == dtype
        wide, plain = exact(paths, new, q, k, v), exact(paths, new, q, k, v, torch.float32).to(dtype)
        error, yardstick = ((x.double() - wide).square().mean().sqrt() for x in (out, plain))
        assert error <= max(1.5 * yardstick, 1e-6)
        assert (out.double() - wide).abs().max() <= (2e-6 if dtype == torch.float32 else 2**-9) * wide.abs().max()
        merged += len(plan.merges)
    assert merged or len(paths) == 1


@pytest.mark.parametrize("sign", [-1, 1])
def test_all_that_is_read_was_written_and_no_score_is_beyond_counting(sign, monkeypatch):
    """Poisoned outputs and partial results; scores of a million, all negative or one of them far above the rest."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *size, **how: empty(*size, **how).fill_(-(2**31)))
    paths, new = random_paths(5, longest=60)
    q, (k, v) = sign * 1e6 * drawn(new, 6, 16, torch.float32).abs(), pool(paths, 2, 16, torch.float32)
    out, plan = attend(paths, new, q, k.abs(), v, split=25)
    monkeypatch.undo()
    assert len(plan.merges)
    torch.testing.assert_close(out.double(), exact(paths, new, q, k.abs(), v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [-1, 0])
def test_a_query_that_sees_no_key_becomes_zero(place):
    ints = partial(torch.tensor, dtype=torch.int32)
    seen_by_the_first_alone = [[0, 3, 0, 1, 3], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    tables = Tables(order=ints([1, 0]), slots=ints([4, 2, 3]), segments=ints(seen_by_the_first_alone),
                    items=ints([[0, 2, 0, 1, place]]), merges=ints([[0, 2, 0, 1]]), merge_slots=ints([0]),
                    counts=ints([1, 1 + place]), num_partials=2 + 2 * place)  # fmt: skip
    q, k = torch.randn(2, 3, 16), torch.full((5, 1, 16), torch.nan)
    k[2:] = torch.randn(3, 1, 16)
    out = tree_attention(q, k, k, tables, rows=16, num_programs=1)
    assert not out[0].any() and out[1].all()


def plan_of(parents, runs, rows):
    """The plan of rows (node, first token, tokens) of a tree whose node n has slots runs[n], without nodes that no row needs."""
    needed = {node for node, _, _ in rows}
    for node in reversed(range(len(parents))):
        needed |= {parents[node]} - {-1} if node in needed else set()
    index = {node: i for i, node in enumerate(sorted(needed))}
    first = np.cumsum([0, *(len(runs[node]) for node in index)])[:-1]
    columns = ([index.get(parents[node], -1) for node in index], first, [len(runs[node]) for node in index],
               [index[node] for node, _, _ in rows], sum((runs[node] for node in index), []))  # fmt: skip
    forest = _C.Forest(*(np.array(column, np.int32) for column in columns))
    starts, ends = np.array([row[1] for row in rows], np.int32), np.cumsum([0, *(row[2] for row in rows)]).astype(np.int32)
    return _C.TreePlan(forest, starts, ends, max_queries=5, split=64, reserve=0, compress=False)


def test_bits_do_not_depend_on_company_programs_or_the_order_of_rows():
    """One tile class, no chains made one, paths cut at fixed depths: each row alone, token by token, and among all others."""
    rng = random.Random(0)
    parents = [rng.randrange(-1, node) for node in range(6)]
    lens = [rng.choice([1, 5, rng.randint(1, 70)]) for _ in parents]
    runs = [[*range(sum(lens[:node]), sum(lens[: node + 1]))] for node in range(len(lens))]
    k, v = pool(runs, 1, 32, torch.float32)
    q = torch.randn(len(k), 3, 32, generator=torch.Generator().manual_seed(0))  # by slot

    def run(rows, programs=2):
        slots = [runs[node][start + i] for node, start, count in rows for i in range(count)]
        out = tree_attention(q[slots], k, v, tables_of(plan_of(parents, runs, rows), "cpu"), rows=16, num_programs=programs)
        return dict(zip(slots, out, strict=True))

    counts = [rng.randint(1, min(4, length)) for length in lens]
    rows = [(node, length - count, count) for node, (length, count) in enumerate(zip(lens, counts, strict=True))]
    together = run(rows)
    for programs in (1, 132):
        rng.shuffle(rows)
        assert all(torch.equal(out, together[slot]) for slot, out in run(rows, programs).items())
    for node, start, count in rows:
        alone, last = run([(node, start, count)]), run([(node, lens[node] - 1, 1)])
        assert all(torch.equal(out, together[slot]) for slot, out in (*alone.items(), *last.items()))
