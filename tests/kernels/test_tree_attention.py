"""Tree attention in Triton, interpreted, against the paths written out: trees of all shapes, odd sizes, poisoned slots and tables;
growth and stops on the device; and what its bits may depend on."""

import itertools
import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tts_engine import _C
from tts_engine.attention.triton_tree import TableBuffers, tables_of
from tts_engine.testing import flat_layout
from tts_kernels.advance import STOPPED
from tts_kernels.tree_attention import Tables, prepare, tree_attention

GROUPS = [(1, 1), (2, 2), (3, 1), (8, 2), (5, 1), (12, 2), (7, 1), (8, 1), (12, 1), (16, 1)]  # H, K
DTYPES = [torch.float32, torch.float16]
APART = {"tile": 4, "tail_queries": 4, "tail": 0}  # tails as items of their own
DETERMINISTIC = {"compress": False, "split": 64}
SMALLEST_TILE = 16


def random_paths(seed, longest):
    """(slots of each row's path, new tokens of each) over a random tree whose rows end at leaves and, some, within."""
    rng = random.Random(seed)
    parents = [rng.randrange(-1, node) for node in range(rng.randint(1, 7))]
    lens = [rng.randint(1, longest) for _ in parents]
    paths = paths_of(parents, lens, rng)
    rows = [node for node in range(len(parents)) if node not in parents or rng.random() < 0.3]
    rng.shuffle(rows)
    return [paths[row] for row in rows], [rng.choice([1, rng.randint(1, min(9, lens[row]))]) for row in rows]


def paths_of(parents, lens, rng):
    """The slots of each node's path, at random places of a pool."""
    free = rng.sample(range(1, sum(lens) + 20), sum(lens))
    paths = []
    for parent, length in zip(parents, lens, strict=True):
        paths.append((paths[parent] if parent >= 0 else []) + [free.pop() for _ in range(length)])
    return paths


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


def plan_for(layout, group, rows, reserve=0, **options):
    how = {"max_queries": rows // group, "split": 4096, "compress": True, **options}
    if how.get("tail_queries"):
        how["tail_queries"] = max(1, min(how["max_queries"], SMALLEST_TILE // group))
    return _C.TreePlan(layout.paths.forest, layout.starts, layout.row_starts, reserve=reserve, **how)


def attend(paths, new, q, k, v, *, rows=16, num_programs=3, **options):
    plan = plan_for(flat_layout(paths, new), q.shape[1] // k.shape[1], rows, **options)
    tail_rows = SMALLEST_TILE if "tail" in options else rows
    return tree_attention(q, k, v, tables_of(plan, "cpu"), rows=rows, tail_rows=tail_rows, num_programs=num_programs), plan


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


def near(out, paths, new, q, k, v):
    """Whether the error is that of plain PyTorch in the same dtype, half as much again at most."""
    wide, plain = exact(paths, new, q, k, v), exact(paths, new, q, k, v, torch.float32).to(q.dtype)
    error, yardstick = ((x.double() - wide).square().mean().sqrt() for x in (out, plain))
    worst = (2e-6 if q.dtype == torch.float32 else 2**-9) * wide.abs().max()
    return bool(error <= max(1.5 * yardstick, 1e-6)) and bool((out.double() - wide).abs().max() <= worst)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_the_kernel_is_as_near_to_the_truth_as_plain_pytorch(heads, kv_heads, dtype, soak):
    merged = 0
    for seed in range(2 * soak):
        dim, rows, options = (16, 32)[seed % 2], (16, 64)[heads % 2], ({"split": 37}, APART | {"split": 50})[seed % 2]
        paths, new = random_paths(seed + 3 * heads, longest=(9, 80)[seed % 2])
        q, (k, v) = drawn(new, heads, dim, dtype), pool(paths, kv_heads, dim, dtype)
        out, plan = attend(paths, new, q, k, v, rows=rows, **options)
        assert out.dtype == dtype and near(out, paths, new, q, k, v)
        merged += len(plan.merges)
    assert merged


SHAPES = {  # parents, tokens of each node
    "a single row of one token": ([-1], [1]),
    "a chain of single tokens": ([-1, 0, 1, 2, 3], [1] * 5),
    "a star": ([-1] + [0] * 9, [70] + [3] * 9),
    "a caterpillar": ([-1, 0, 0, 1, 1, 3, 3, 5, 5], [5, 17, 2, 16, 2, 17, 2, 1, 1]),
    "a full binary tree": ([-1, 0, 0, 1, 1, 2, 2, *np.repeat(range(3, 7), 2).tolist()], [20] * 15),
    "blocks and tiles that are just full": ([-1, 0, 0, 1, 1], [64, 16, 64, 16, 64]),
    "blocks and tiles of one more": ([-1, 0, 0, 1, 1], [65, 17, 65, 17, 65]),
    "trees that share nothing": ([-1, -1, -1, 2, 2], [30, 90, 1, 8, 70]),
}


@pytest.mark.parametrize("options", [APART, APART | {"tail": 30, "split": 24}, DETERMINISTIC], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_of_every_shape(shape, options):
    parents, lens = SHAPES[shape]
    every = paths_of(parents, lens, random.Random(0))
    paths = [path for node, path in enumerate(every) if node not in parents]
    new = [1] * len(paths)
    q, (k, v) = drawn(new, 6, 16, torch.float32), pool(paths, 2, 16, torch.float32)
    out, _ = attend(paths, new, q, k, v, rows=64, **options)
    assert near(out, paths, new, q, k, v)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_wide_heads_and_tiles(dim, rows):
    paths, new = random_paths(3, longest=50)
    q, (k, v) = drawn(new, 7, dim, torch.float16), pool(paths, 1, dim, torch.float16)
    out, _ = attend(paths, new, q, k, v, rows=rows, **APART)
    assert near(out, paths, new, q, k, v)


@pytest.mark.parametrize("sign", [-1, 1])
def test_all_that_is_read_was_written_and_no_score_is_beyond_counting(sign, monkeypatch):
    """Poisoned outputs and partial results; scores of a million, all negative or one of them far above the rest."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *size, **how: empty(*size, **how).fill_(-(2**31)))
    paths, new = random_paths(5, longest=60)
    q, (k, v) = sign * 1e6 * drawn(new, 6, 16, torch.float32).abs(), pool(paths, 2, 16, torch.float32)
    out, plan = attend(paths, new, q, k.abs(), v, **APART, split=25)
    monkeypatch.undo()
    assert len(plan.merges)
    torch.testing.assert_close(out.double(), exact(paths, new, q, k.abs(), v), rtol=1e-4, atol=1e-5)


def test_partial_results_and_the_logarithms_of_their_denominators():
    """Item by item: what a query sees of its keys, and no key at all for some."""
    paths = [[*range(1, 30), 90], [*range(1, 30), 91, 92], [40, 41], [*range(50, 75), 80], [*range(50, 75), 81]]
    new = [1] * 5  # the third shares nothing with those on both sides of it
    q, (k, v) = drawn(new, 4, 16, torch.float32), pool(paths, 2, 16, torch.float32)
    plan = plan_for(flat_layout(paths, new), 2, 16, split=20, **APART)
    part, lse = torch.full((plan.num_partials, 4, 16), torch.nan), torch.full((plan.num_partials, 4), torch.nan)
    out = torch.empty_like(q)
    prepare(q, k, v, out, part, lse, tables_of(plan, "cpu"), rows=16, num_programs=2, capability=90).run()
    nothing = 0
    for query, count, first, number, place in plan.items.tolist():
        for i in range(count if place >= 0 else 0):
            seen = [
                slot
                for offset, size, lo, hi, start in plan.segments[plan.item_segments[first : first + number]].tolist()
                for j, slot in enumerate(plan.slots[offset : offset + size].tolist())
                if lo + max(0, j - start) <= query + i < hi
            ]
            keys, values = (x[seen].double().repeat_interleave(2, 1) for x in (k, v))
            scores = torch.einsum("hd,chd->hc", q[plan.order[query + i]].double(), keys) / 4
            expected = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
            torch.testing.assert_close(part[place + i].double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse[place + i].double(), scores.logsumexp(-1) / math.log(2), rtol=1e-5, atol=1e-6)
            nothing += not seen
    assert nothing and len(plan.merges)


@pytest.mark.parametrize("place", [-1, 0])
def test_a_query_that_sees_no_key_becomes_zero(place):
    ints = partial(torch.tensor, dtype=torch.int32)
    seen_by_the_first_alone = [[0, 3, 0, 1, 3, -1], [0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 0, -1]]
    tables = Tables(order=ints([1, 0]), slots=ints([4, 2, 3]), segments=ints(seen_by_the_first_alone), grown=ints([]),
                    items=ints([[0, 2, 0, 1, place]]), merges=ints([[0, 0, 0, 1], [1, 1, 0, 1]]), merge_slots=ints([0]),
                    counts=ints([1, 2 + 2 * place]), num_partials=2 + 2 * place)  # fmt: skip
    q, k = torch.randn(2, 3, 16), torch.full((5, 1, 16), torch.nan)
    k[2:] = torch.randn(3, 1, 16)
    out = tree_attention(q, k, k, tables, rows=16, num_programs=1)
    assert not out[0].any() and out[1].all()


def test_no_row_is_no_output():
    plan = plan_for(flat_layout([[1, 2]], [1]), 1, 16)
    empty = _C.TreePlan(_C.Forest(*[np.zeros(0, np.int32)] * 5), np.zeros(0, np.int32), np.zeros(1, np.int32), max_queries=4,
                        split=9, reserve=3, compress=True, tail_queries=1)  # fmt: skip
    buffers = TableBuffers("cpu", TableBuffers.sizes(plan))
    q, k = torch.randn(0, 2, 16), torch.full((3, 2, 16), torch.nan)
    assert tree_attention(q, k, k, buffers.load(empty), rows=16).shape == (0, 2, 16)


# --- tables that stay where they are --------------------------------------------------------------------------------------


def decoding(seed, branches=6, ahead=0):
    """Branches of a small tree that decode on: their paths, with slots for `ahead` tokens to come behind them."""
    rng = random.Random(seed)
    parents = [-1, 0, 0, *(rng.randrange(3) for _ in range(branches))]
    lens = [rng.choice([5, 64, 70]), 16, 3, *(rng.choice([1, 15, 16, 60]) + ahead for _ in range(branches))]
    return paths_of(parents, lens, rng)[3:]


@pytest.mark.parametrize("options", [APART, APART | {"tail": 99}, DETERMINISTIC | {"split": 4096}], ids=str)
def test_rows_grow_on_the_device_over_tiles_and_blocks_to_the_bits_of_a_new_plan(options):
    steps, rows = 5, 64
    paths = decoding(1, branches=4, ahead=steps)
    new, k_v = [1] * len(paths), pool(paths, 1, 16, torch.float32)
    before = [path[:-steps] for path in paths]
    plan = plan_for(flat_layout(before, new), 3, rows, reserve=steps, **options)
    assert plan.growth == steps and plan.reserve(np.array([path[-steps:] for path in paths], np.int64).T.copy())
    tables = tables_of(plan, "cpu")
    for step in range(steps + 1):
        now = [path[: len(path) - steps + step] for path in paths]
        q = drawn(new, 3, 16, torch.float32, seed=step)
        out = tree_attention(q, *k_v, tables, rows=rows, tail_rows=SMALLEST_TILE)
        fresh = tables_of(plan_for(flat_layout(now, new), 3, rows, reserve=steps, **options), "cpu")
        assert torch.equal(out, tree_attention(q, *k_v, fresh, rows=rows, tail_rows=SMALLEST_TILE))
        assert near(out, now, new, q, *k_v)
        tables.grown.add_(1)


@pytest.mark.parametrize("options", [APART, DETERMINISTIC | {"split": 4096}], ids=str)
def test_a_row_that_stopped_reads_nothing_of_its_own_and_changes_no_bit_of_others(options):
    paths = decoding(2)
    new, (k, v) = [1] * len(paths), pool(paths, 1, 16, torch.float32)
    q = drawn(new, 4, 16, torch.float32)
    tables = tables_of(plan_for(flat_layout(paths, new), 4, 64, reserve=4, **options), "cpu")
    run = partial(tree_attention, q, tables=tables, rows=64, tail_rows=SMALLEST_TILE)
    whole = run(k, v)
    shared = set.intersection(*map(set, paths))
    for stopped in ([0], [1, 4], range(len(paths))):
        tables.grown.zero_()
        tables.grown[list(stopped)] = STOPPED
        poisoned = [x.clone() for x in (k, v)]
        for row in stopped:
            alone = set(paths[row]) - set().union(*(paths[other] for other in range(len(paths)) if other != row))
            for x in poisoned:
                x[sorted(alone)] = torch.nan
        out = run(*poisoned)
        others = [row for row in range(len(paths)) if row not in stopped]
        assert torch.equal(out[others], whole[others]) and not out.isnan().any() and shared


def test_one_set_of_tables_serves_any_tree():
    """What a captured graph does: the addresses stay, poison lies behind what a plan has."""
    cases = [random_paths(seed, longest=30) for seed in range(10)]
    plans = [plan_for(flat_layout(*case), 2, 16, split=25, **APART) for case in cases]
    sizes = [TableBuffers.sizes(plan) for plan in plans]
    buffers = TableBuffers("cpu", {name: 5 + max(size[name] for size in sizes) for name in sizes[0]})
    kept = buffers.tables
    for (paths, new), plan, poison in zip(cases, plans, itertools.cycle([-7, 2**30]), strict=False):
        for table in (kept.order, kept.slots, kept.items, kept.segments, kept.merges, kept.merge_slots, kept.grown):
            table.fill_(poison)
        q, (k, v) = drawn(new, 2, 16, torch.float32), pool(paths, 1, 16, torch.float32)
        assert buffers.fits(plan) and buffers.load(plan) is kept
        assert near(tree_attention(q, k, v, kept, rows=16, num_programs=2), paths, new, q, k, v)


def test_pools_of_more_elements_than_32_bits_count():
    """A few slots of a pool of 5 GB, of which nothing else is ever touched."""
    kv_heads, dim = 8, 128
    k = torch.empty((2**31 // (kv_heads * dim) + 300_000, kv_heads, dim), dtype=torch.float16)
    path = [7, len(k) - 1, 2**31 // (kv_heads * dim) + 5]
    k[path] = torch.randn(3, kv_heads, dim).half()
    q = torch.randn(1, kv_heads, dim).half()
    plan = plan_for(flat_layout([path], [1]), 1, 16)
    out = tree_attention(q, k, k, tables_of(plan, "cpu"), rows=16, num_programs=1)
    assert k.numel() > 2**31 and near(out, [[0, 1, 2]], [1], q, k[path], k[path])


# --- what bits may depend on ----------------------------------------------------------------------------------------------


def plan_of(parents, runs, rows, max_queries=5):
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
    return _C.TreePlan(forest, starts, ends, max_queries=max_queries, split=64, reserve=0, compress=False, tile=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_company_programs_or_the_order_of_rows_and_items(dtype):
    """One tile class, no chains made one, paths cut at fixed depths: each row alone, token by token, and among all others."""
    rng = random.Random(0)
    parents = [rng.randrange(-1, node) for node in range(6)]
    lens = [rng.choice([1, 5, rng.randint(1, 70)]) for _ in parents]
    runs = [[*range(sum(lens[:node]), sum(lens[: node + 1]))] for node in range(len(lens))]
    k, v = pool(runs, 1, 32, dtype)
    q = torch.randn(len(k), 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)  # by slot

    def run(rows, programs=2, shuffled=False):
        slots = [runs[node][start + i] for node, start, count in rows for i in range(count)]
        tables = tables_of(plan_of(parents, runs, rows), "cpu")
        if shuffled:
            tables = replace(tables, items=tables.items[torch.randperm(len(tables.items))].contiguous())
        return dict(zip(slots, tree_attention(q[slots], k, v, tables, rows=16, num_programs=programs), strict=True))

    counts = [rng.randint(1, min(4, length)) for length in lens]
    rows = [(node, length - count, count) for node, (length, count) in enumerate(zip(lens, counts, strict=True))]
    together = run(rows)
    for programs in (1, 48, 78, 108, 132, 148):
        rng.shuffle(rows)
        assert all(torch.equal(out, together[slot]) for slot, out in run(rows, programs, shuffled=True).items())
    for node, start, count in rows:
        alone, last = run([(node, start, count)]), run([(node, lens[node] - 1, 1)])
        assert all(torch.equal(out, together[slot]) for slot, out in (*alone.items(), *last.items()))


def test_a_branch_has_the_same_bits_alone_and_among_255_others():
    branches = 256
    parents = [-1, *[0] * 16, *(1 + branch % 16 for branch in range(branches))]
    lens = [40, *[20] * 16, *(1 + branch % 7 for branch in range(branches))]
    runs = [[*range(sum(lens[:node]), sum(lens[: node + 1]))] for node in range(len(lens))]
    k, v = pool(runs, 1, 16, torch.float32)
    q = drawn([1] * branches, 1, 16, torch.float32)
    rows = [(17 + branch, lens[17 + branch] - 1, 1) for branch in range(branches)]
    together = tree_attention(q, k, v, tables_of(plan_of(parents, runs, rows, 64), "cpu"), rows=64, num_programs=7)
    for branch in (0, 100, 255):
        tables = tables_of(plan_of(parents, runs, rows[branch : branch + 1], 16), "cpu")
        assert torch.equal(tree_attention(q[branch : branch + 1], k, v, tables, rows=64)[0], together[branch])


@pytest.mark.parametrize("programs", [1, 48, 78, 108, 132, 148])
def test_every_item_is_computed_once_whatever_the_number_of_programs(programs):
    """Turns go there and back; the last is taken by some."""
    for items in {1, 2, programs - 1, programs, programs + 1, 2 * programs + 3} - {0}:
        num_work = 2 * items  # two KV heads
        turns, rest, seen = num_work // programs, num_work % programs, []
        for program in range(programs):
            mine = turns + ((program if turns % 2 == 0 else programs - 1 - program) < rest)
            seen += [turn * programs + (program if turn % 2 == 0 else programs - 1 - program) for turn in range(mine)]
        assert sorted(seen) == list(range(num_work))
