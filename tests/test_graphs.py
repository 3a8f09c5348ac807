"""Ticks on end against the same ticks one by one, interpreted, where the tree is another every time and all padding is poison."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tts_engine.attention import make_backend
from tts_engine.attention.triton_tree import RESERVE, TritonTreeAttention
from tts_engine.graphs import BUCKETS, TICKS, DecodeGraphs, Draws, bucket_for
from tts_engine.models.weights import load_decoder
from tts_engine.sampling import Sampling
from tts_engine.steps import CLOSED, TEXT
from tts_engine.testing import TicksOneByOne, flat_layout, poisoned_cache, random_model

advance = pytest.importorskip("tts_kernels.advance")

VOCAB, SLOTS, POISON = 97, 700, -(1 << 20)
AFTER = np.tile(np.where(np.arange(VOCAB) % 9 == 0, CLOSED, TEXT).astype(np.uint8), (3, 1))
ENDS = np.arange(VOCAB) % 10 == 5
SETTINGS = [Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
            for t, k, p, m in [(0, 0, 1, 0), (0.7, 0, 1, 0), (1.3, 9, 1, 0), (0.9, 0, 0.6, 0), (1, 30, 0.9, 0.05)]]  # fmt: skip


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    random_model("qwen2", hidden_size=64, num_key_value_heads=1, seed=4).save_pretrained(directory)
    return load_decoder(directory)


def random_tree(rng: random.Random, most: int, ticks: int) -> tuple[list[list[int]], np.ndarray]:
    """Rows' paths of slots, some sharing some of theirs and the last of each its own; slots int64 [ticks + 1, B] from there on."""
    free = iter(rng.sample(range(SLOTS), SLOTS))
    paths = [[next(free) for _ in range(rng.randint(1, 70))]]
    for _ in range(rng.randrange(most)):
        parent = rng.choice(paths)
        paths.append(parent[: rng.randint(0, len(parent) - 1)] + [next(free) for _ in range(rng.randint(1, 9))])
    rng.shuffle(paths)
    return paths, np.array([[path[-1] for path in paths]] + [[next(free) for _ in paths] for _ in range(ticks)])


def random_draws(rng: random.Random, paths, slots, settings) -> Draws:
    count = len(paths)
    chosen = [rng.choice(settings) for _ in paths]
    columns = {name: np.array([getattr(one, name) for one in chosen]) for name in ("temperature", "top_k", "top_p", "min_p")}
    return Draws(
        token=np.array([rng.randrange(VOCAB) for _ in paths]),
        position=np.array([len(path) - 1 for path in paths]),
        slots=slots,
        state=np.full(count, TEXT, np.int32),
        room=np.array([rng.choice([1, 2, 50]) for _ in paths], np.int32),
        key=np.array([[rng.getrandbits(32), rng.getrandbits(32)] for _ in paths], np.uint32),
        identity=np.array([rng.getrandbits(64) for _ in paths], np.uint64),
        **columns,
    )


def fill(cache, paths, seed):
    """Keys and values of all that was read before; NaN everywhere else."""
    gen, known = torch.Generator().manual_seed(seed), sorted({slot for path in paths for slot in path[:-1]})
    for table in (cache.k, cache.v):
        table.fill_(torch.nan)
        table[:, known] = torch.randn(table[:, known].shape, generator=gen)


def test_ticks_over_any_tree_draw_what_they_draw_one_by_one(decoder):
    """Buffers are the same for all trees, and what a tree leaves unused of them is poison."""
    rule = {"after": AFTER, "ends": ENDS, "last_state": CLOSED}
    cache = poisoned_cache(decoder.spec, SLOTS)
    graphs, stops = DecodeGraphs(decoder, cache, TritonTreeAttention("cpu"), **rule), set()
    for number in range(50):
        rng = random.Random(number)
        paths, slots = random_tree(rng, 5, rng.choice([1, 1, 1, 2, 4]))
        draws = random_draws(rng, paths, slots, SETTINGS if number % 4 == 0 else SETTINGS[:2])
        fill(cache, paths, number)
        outlook = graphs.plan(flat_layout(paths, [1] * len(paths)))
        assert outlook.ticks == TICKS
        for bucket in graphs._buckets.values():
            bucket._buffers._host.fill_(POISON)
            bucket._buffers._buffer.fill_(POISON)
        graphs.start(outlook, draws)
        drawn = graphs.finish()

        fill(cache, paths, number)
        slowly = TicksOneByOne(decoder, cache, make_backend("native"), **rule)
        slowly.start(slowly.plan(flat_layout(paths, [1] * len(paths))), draws)
        expected = slowly.finish()
        assert drawn.drawn.tolist() == expected.drawn.tolist()
        for tick, tokens in enumerate(expected.tokens):
            assert (drawn.tokens[tick] == tokens)[expected.drawn > tick].all()
        assert drawn.stop.tolist() == expected.stop.tolist() and drawn.state.tolist() == expected.state.tolist()
        stops |= set(drawn.stop.tolist())
    assert {0, advance.ENDED, advance.CLOSED, advance.CUT} <= stops and len(graphs._buckets) > 2


def test_a_draw_that_is_no_token_stops_its_row_alone(decoder, monkeypatch):
    whole = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: whole(hidden).index_fill(0, torch.tensor([0]), torch.nan))
    paths, slots = [[0, 1, 2], [3, 4, 5]], np.array([[2, 5], [6, 7]])
    nines = np.array([9, 9], np.int32)
    draws = replace(random_draws(random.Random(0), paths, slots, SETTINGS[:2]), room=nines, state=nines)
    cache = poisoned_cache(decoder.spec, SLOTS)
    fill(cache, paths, 0)
    graphs = DecodeGraphs(decoder, cache, TritonTreeAttention("cpu"), after=None, ends=ENDS & False, last_state=0)
    graphs.start(graphs.plan(flat_layout(paths, [1, 1])), draws)
    drawn = graphs.finish()
    assert drawn.tokens[0, 0] == -1 and drawn.stop.tolist() == [advance.FAULT, 0] and drawn.state.tolist() == [8, 8]


def test_a_tree_that_no_graph_serves_has_no_ticks(decoder):
    cache = poisoned_cache(decoder.spec, SLOTS)
    graphs = DecodeGraphs(decoder, cache, TritonTreeAttention("cpu"), after=AFTER, ends=ENDS, last_state=CLOSED)
    assert graphs.plan(flat_layout([[0, 1, 2]], [1])).ticks == TICKS
    longer = flat_layout([list(range(SLOTS + RESERVE))], [1])  # than the pool
    assert graphs.plan(longer).ticks == 0


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (3, 4), (192, 192), (193, 256), (257, 320), (1025, 1280), (4096, 4096), (4097, None)]
)
def test_rows_go_into_the_smallest_batch_that_holds_them(rows, size):
    assert bucket_for(rows) == size
    assert list(BUCKETS) == sorted(set(BUCKETS))
