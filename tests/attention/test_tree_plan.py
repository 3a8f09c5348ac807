"""The plan as arrays: what its items cover, against the paths written out."""

import random
from collections import Counter

import numpy as np
import pytest

from tts_engine import _C

OPTIONS = [
    {"max_queries": 32, "split": 4096, "reserve": 0, "compress": True},
    {"max_queries": 1, "split": 7, "reserve": 5, "compress": True},
    {"max_queries": 3, "split": 16, "reserve": 0, "compress": False},
    {"max_queries": 1000, "split": 1, "reserve": 2, "compress": True},
    {"max_queries": 5, "split": 4096, "reserve": 4, "compress": True, "tile": 8, "tail_queries": 2, "tail": 0},
    {"max_queries": 9, "split": 13, "reserve": 3, "compress": True, "tile": 1, "tail_queries": 9, "tail": 12},
    {"max_queries": 4, "split": 6, "reserve": 0, "compress": False, "tile": 50, "tail_queries": 1, "tail": 3},
]


class Tree:
    """A random forest with rows, and the same as Python lists."""

    def __init__(self, seed, single=False, partly=False):
        rng = random.Random(seed)
        count = rng.randint(1, 40)
        self.parents = [rng.randrange(-1, node) for node in range(count)]
        lens = [rng.choice([0, 1, 2, rng.randint(1, 30)]) for _ in range(count)]
        slots = rng.sample(range(5000), sum(lens))
        self.runs = [[slots.pop() for _ in range(n)] for n in lens]
        leaves = [node for node in range(count) if node not in self.parents]
        self.rows = [n for n in range(count) if lens[n] and (n in leaves or (not single and rng.random() < 0.3))]
        rng.shuffle(self.rows)
        self.counts = [1 if single else rng.randint(1, lens[n]) for n in self.rows]
        self.starts = [lens[n] - count for n, count in zip(self.rows, self.counts, strict=True)]
        if partly:  # rows of which one token is read, or none
            self.starts = [rng.randrange(start, lens[n]) for n, start in zip(self.rows, self.starts, strict=True)]
            self.counts = [rng.randint(0, 1) for _ in self.rows]

    def arrays(self, order=None):
        """Arguments of a plan, rows in another order if given."""
        order = list(range(len(self.rows))) if order is None else order
        lens = [len(run) for run in self.runs]
        rows, counts = [self.rows[i] for i in order], [self.counts[i] for i in order]
        columns = (self.parents, np.cumsum([0, *lens[:-1]]), lens, rows, sum(self.runs, []))
        forest = _C.Forest(*(np.array(column, np.int32) for column in columns))
        starts = np.array([self.starts[i] for i in order], np.int32)
        return forest, starts, np.cumsum([0, *counts]).astype(np.int32)

    def seen(self, order=None):
        """For each token of the batch: the slots it sees."""
        order = list(range(len(self.rows))) if order is None else order
        found = []
        for i in order:
            node, count = self.rows[i], self.counts[i]
            path, above = [], self.parents[node]
            while above >= 0:
                path, above = self.runs[above] + path, self.parents[above]
            found += [path + self.runs[node][: self.starts[i] + j + 1] for j in range(count)]
        return found


def covered(plan):
    """For each token of the batch: the slots that items bring it, and the places of its partial results."""
    slots, segments, members = plan.slots.tolist(), plan.segments.tolist(), plan.item_segments.tolist()
    seen, places = {token: [] for token in plan.order.tolist()}, {token: [] for token in plan.order.tolist()}
    for query, count, first, number, place in plan.items.tolist():
        for i in range(query, query + count):
            token = int(plan.order[i])
            places[token].append(place + i - query if place >= 0 else None)
            for offset, length, lo, hi, start in (segments[s] for s in members[first : first + number]):
                seen[token] += [slots[offset + j] for j in range(length) if lo + max(0, j - start) <= i < hi]
    return seen, places


@pytest.mark.parametrize("partly", [False, True], ids=["", "read in part"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_items_cover_each_token_and_what_it_sees_exactly_once(options, partly):
    for seed in range(150):
        tree = Tree(seed, partly=partly)
        plan = _C.TreePlan(*tree.arrays(), **options)
        seen, places = covered(plan)
        ref = tree.seen()
        assert sorted(seen) == list(range(len(ref)))
        for token, slots in enumerate(ref):
            assert Counter(seen[token]) == Counter(slots)
        merged = {
            int(plan.order[query + i]): [int(place) + i for place in plan.merge_slots[first : first + number]]
            for query, count, first, number in plan.merges.tolist()
            for i in range(count)
        }
        used = []
        for token, mine in places.items():
            if token in merged:
                assert sorted(merged[token]) == sorted(mine)
                used += mine
            else:
                assert mine == [None]  # writes the output itself, once
        assert len(used) == len(set(used)) and all(0 <= place < plan.num_partials for place in used)


def test_merges_run_from_the_root_to_the_leaf():
    tree = Tree(11)
    plan = _C.TreePlan(*tree.arrays(), max_queries=4, split=5, reserve=0, compress=True)
    ref = tree.seen()
    by_place = {place: (first, number) for _, _, first, number, place in plan.items.tolist()}
    checked = 0
    for query, _, first, number in plan.merges.tolist():
        path = ref[int(plan.order[query])]
        depths = []
        for place in plan.merge_slots[first : first + number].tolist():
            item_first, item_number = by_place[place]
            slots = [
                int(plan.slots[offset])
                for offset, _, lo, hi, start in plan.segments[plan.item_segments[item_first : item_first + item_number]].tolist()
                if lo <= query < hi
            ]
            depths += [path.index(slot) for slot in slots if slot in path]
        assert depths == sorted(depths)
        checked += len(depths) > 1
    assert checked


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=str)
def test_the_order_in_which_rows_come_changes_only_who_is_called_what(options):
    for seed in range(40):
        tree = Tree(seed)
        order = list(range(len(tree.rows)))
        random.Random(seed).shuffle(order)
        plan, again = (_C.TreePlan(*tree.arrays(o), **options) for o in (None, order))
        assert np.array_equal(plan.slots, again.slots) or any(not run for run in tree.runs)  # empty steps tie
        assert sorted(map(len, tree.seen())) == sorted(map(len, tree.seen(order)))
        first, second = covered(plan)[0], covered(again)[0]
        assert Counter(map(tuple, map(sorted, first.values()))) == Counter(map(tuple, map(sorted, second.values())))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_grown_plan_covers_what_a_new_one_would(options):
    grew = 0
    for seed in range(80):
        tree = Tree(seed, single=True)
        plan = _C.TreePlan(*tree.arrays(), **options)
        fresh = iter(range(5000, 6000))
        for _ in range(options["reserve"]):
            new = [next(fresh) for _ in tree.rows]
            if not plan.grow(np.array(new, np.int64)):
                break
            for i, (node, slot) in enumerate(zip(tree.rows, new, strict=True)):
                tree.runs[node].append(slot)
                tree.starts[i] += 1
            grew += 1
            seen, ref = covered(plan)[0], covered(_C.TreePlan(*tree.arrays(), **options))[0]
            assert {t: Counter(slots) for t, slots in seen.items()} == {t: Counter(slots) for t, slots in ref.items()}
            if not options.get("tail_queries"):  # else a step grows over the depth at which a new plan would cut it
                assert Counter(map(tuple, plan.segments[:, 1:].tolist())) == Counter(
                    map(tuple, _C.TreePlan(*tree.arrays(), **options).segments[:, 1:].tolist())
                )
    assert grew > 20 or not options["reserve"] or options["split"] == 1


def test_slots_reserved_ahead_are_those_that_growing_would_write():
    options, checked = OPTIONS[4], 0
    for seed in range(40):
        tree = Tree(seed, single=True)
        plan, again = (_C.TreePlan(*tree.arrays(), **options) for _ in "ab")
        slots = np.arange(5000, 5000 + 3 * len(tree.rows)).reshape(3, -1)
        if not plan.growth:
            assert not len(plan.leaf) and not plan.reserve(slots)
            continue
        before = plan.segments
        assert plan.reserve(slots) and np.array_equal(plan.segments, before) and plan.growth == again.growth == 4
        for step in slots:
            assert again.grow(step)
        assert np.array_equal(plan.slots, again.slots)
        assert not again.reserve(slots) and not plan.reserve(np.repeat(slots, 2, 0)) and not plan.reserve(slots[:, 1:].copy())
        ends = again.segments[again.leaf]
        assert np.array_equal(again.slots[ends[:, 0] + ends[:, 1] - 1], slots[-1])  # row by row
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plans_keep_within_what_they_may_take(options):
    """Segments under queries are nested or apart; items have at most so many queries, and tails at most so many keys."""
    for seed in range(60):
        plan = _C.TreePlan(*Tree(seed).arrays(), **options)
        spans = sorted((lo, -hi) for _, length, lo, hi, start in plan.segments.tolist() if start >= length and hi > lo)
        open_ends = []
        for lo, hi in ((lo, -hi) for lo, hi in spans):
            while open_ends and open_ends[-1] <= lo:
                open_ends.pop()
            assert not open_ends or hi <= open_ends[-1]
            open_ends.append(hi)
        assert (plan.items[:, 1] <= options["max_queries"]).all() and (plan.items[:, 1] > 0).all()
        assert len(plan.merge_slots) == plan.merges[:, 3].sum() and (plan.merges[:, 3] > 0).all()
        assert plan.num_partials == sum(count for _, count, _, _, place in plan.items.tolist() if place >= 0)
        assert len(plan.item_segments) == plan.items[:, 3].sum()


def test_tiles_end_where_least_is_read_twice():
    """Two families of three on a root of ten tokens: tiles of at most four are the families, not four and two."""
    parents, lens = [-1, 0, 0, *[1] * 3, *[2] * 3], [10, 100, 100, *[7] * 6]
    forest = _C.Forest(*(np.array(column, np.int32) for column in (parents, np.cumsum([0, *lens[:-1]]), lens, range(3, 9),
                                                                  range(sum(lens)))))  # fmt: skip
    rows = np.full(6, 6, np.int32), np.arange(7, dtype=np.int32)
    how = {"max_queries": 4, "split": 4096, "reserve": 0, "compress": True}
    filled, cut = (_C.TreePlan(forest, *rows, **how, tile=tile) for tile in (0, 5))
    assert sorted(filled.items[:, :2].tolist()) == [[0, 4], [4, 2]] and sorted(cut.items[:, :2].tolist()) == [[0, 3], [3, 3]]

    # Where tails pay, each family reads what it shares, and its tails are items: of two at most, and then the third.
    apart = _C.TreePlan(forest, *rows, **how, tile=5, tail_queries=2, tail=7)
    assert sorted(apart.items[:, :2].tolist()) == [[0, 2], [0, 3], [2, 1], [3, 2], [3, 3], [5, 1]]
    together = _C.TreePlan(forest, *rows, **how, tile=5, tail_queries=2, tail=8)
    assert np.array_equal(together.items, cut.items) and not len(together.merges)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, s, r: (_C.Forest(f.parent[::-1], f.first, f.len, f.node, f.slots), s, r), "before its parent"),
        (lambda f, s, r: (_C.Forest(f.parent, f.first, f.len + 1, f.node, f.slots), s, r), "slots beyond"),
        (lambda f, s, r: (_C.Forest(f.parent, f.first, f.len, f.node[:1].repeat(2), f.slots), s, r), "no node of its own"),
        (lambda f, s, r: (f, s + 1, r), "goes beyond"),
        (lambda f, s, r: (f, s, r + 1), "begin at token 0"),
        (lambda f, s, r: (_C.Forest(f.parent, f.first[:1], f.len, f.node, f.slots), s, r), "differ in length"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change, words):
    forest = _C.Forest(*(np.array(column, np.int32) for column in ([-1, 0, 0], [0, 3, 5], [3, 2, 2], [1, 2], range(7))))
    arrays = change(forest, np.array([1, 0], np.int32), np.array([0, 1, 3], np.int32))
    with pytest.raises(ValueError, match=words):
        _C.TreePlan(*arrays, **OPTIONS[0])
