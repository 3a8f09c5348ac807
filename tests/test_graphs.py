"""Ticks on end against the same ticks one by one, interpreted, where the tree is another every time and all padding is poison."""

import itertools
import random
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tts_engine import rows
from tts_engine.attention import make_backend
from tts_engine.attention.triton_tree import RESERVE, TritonTreeAttention
from tts_engine.branch import root_branch
from tts_engine.engine import Engine
from tts_engine.errors import EngineError
from tts_engine.graphs import BUCKETS, TICKS, DecodeGraphs, Draws, bucket_for
from tts_engine.ledger import Work
from tts_engine.models.weights import load_decoder
from tts_engine.policy import Policy
from tts_engine.runner import ModelRunner
from tts_engine.sampling import Sampling
from tts_engine.search import Majority, make_method
from tts_engine.steps import CLOSED, TEXT, DrawnLengths, MarkedSteps
from tts_engine.tasks.problems import Problem
from tts_engine.testing import (
    TicksOneByOne,
    check_blocks,
    draw_all,
    flat_layout,
    poisoned_cache,
    random_model,
    random_policy_directory,
    random_prm_directory,
)  # fmt: skip

advance = pytest.importorskip("tts_kernels.advance")

VOCAB, SLOTS, POISON = 97, 700, -(1 << 20)
AFTER = np.tile(np.where(np.arange(VOCAB) % 9 == 0, CLOSED, TEXT).astype(np.uint8), (3, 1))
PIECES = [b"a"] * 70 + [b".\n\n"] * 27  # a step closes with one of the last
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
    for table in cache.tables:
        table.fill_(torch.nan)
        table[known] = torch.randn(table[known].shape, generator=gen)


def test_ticks_over_any_tree_draw_what_they_draw_one_by_one(decoder):
    """Buffers are the same for all trees, and what a tree leaves unused of them is poison."""
    rule = {"after": AFTER, "ends": ENDS, "last_state": CLOSED}
    cache = poisoned_cache(decoder.spec, SLOTS)
    graphs, stops = DecodeGraphs(decoder, cache, TritonTreeAttention("cpu"), **rule), set()
    for number in range(50):
        rng = random.Random(number)
        paths, slots = random_tree(rng, 4, rng.choice([1, 1, 1, 1, 3]))
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
    draws = replace(random_draws(random.Random(0), paths, slots, SETTINGS[2:]), room=nines, state=nines)
    cache = poisoned_cache(decoder.spec, SLOTS)
    fill(cache, paths, 0)
    graphs = DecodeGraphs(decoder, cache, TritonTreeAttention("cpu"), after=None, ends=ENDS & False, last_state=0)
    graphs.start(graphs.plan(flat_layout(paths, [1, 1])), draws)
    drawn = graphs.finish()
    assert drawn.tokens[0, 0] == -1 and drawn.stop.tolist() == [advance.FAULT, 0] and drawn.state.tolist() == [8, 8]


def test_each_size_and_kind_is_captured_once_and_again_for_other_tensors(decoder, monkeypatch):
    """With a device that captures acted out: what is called while a graph is made is what its replay calls."""
    paths, slots = [[0, 1, 2]], np.array([[2], [6], [7]])
    cache, rule = poisoned_cache(decoder.spec, SLOTS), {"after": AFTER, "ends": ENDS, "last_state": CLOSED}
    graphs, captured, waited = DecodeGraphs(decoder, cache, TritonTreeAttention("cpu"), **rule), [], []
    tick, open_graphs = graphs._tick, []

    class Graph:
        def replay(self):
            tick(*self.given)

    @contextmanager
    def capture(graph, *, pool, stream):
        open_graphs.append(graph)
        yield
        open_graphs.clear()
        captured.append((pool, graph.given[0].size, graph.given[1]))

    def tick_or_note(*given):
        if open_graphs:
            open_graphs[0].given = given
        else:
            tick(*given)

    monkeypatch.setattr(graphs, "_tick", tick_or_note)
    pools = itertools.count()
    for name, double in (("CUDAGraph", Graph), ("graph", capture), ("stream", lambda stream: nullcontext()),
                         ("current_stream", lambda device: None), ("graph_pool_handle", lambda: next(pools))):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, double)
    graphs._captures, graphs._stream = True, SimpleNamespace(wait_stream=lambda stream: None)
    graphs._done = SimpleNamespace(record=lambda: waited.append(False), synchronize=lambda: waited.append(True))
    graphs._forget()
    slowly = TicksOneByOne(decoder, cache, make_backend("native"), **rule)
    for number, settings in enumerate((SETTINGS[1:2], SETTINGS[1:2], SETTINGS[2:3], SETTINGS[1:2])):
        if number == 3:
            cache.resize(SLOTS, SLOTS)
        draws, drawn = random_draws(random.Random(number), paths, slots, settings), []
        for ticks in (graphs, slowly):
            fill(cache, paths, 0)
            ticks.start(ticks.plan(flat_layout(paths, [1])), draws)
            drawn.append(ticks.finish())
        assert [one.drawn.tolist() for one in drawn] == [drawn[1].drawn.tolist()] * 2
        assert drawn[0].tokens[: drawn[1].drawn[0], 0].tolist() == drawn[1].tokens[: drawn[1].drawn[0], 0].tolist()
    assert captured == [(0, 1, False), (0, 1, True), (1, 1, False)] and waited == [False, True] * 4


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


# Whole searches, with the ticks one by one in the graphs' place: what the policy makes of them.

LIMITS = {"max_step_tokens": 16, "max_tokens": 60, "block_size": 4, "kv_bytes": 4 << 20, "deterministic": True}
PROBLEMS = [Problem(id=f"p{i}", problem=text, answer=None) for i, text in enumerate(["a=3;b=a+4;b?", "1+1?", "7*8?"])]
METHODS = [make_method("cot", max_steps=5)]
METHODS += [make_method(name, n=8, max_steps=5) for name in ("majority", "best_of_n", "beam", "dvts", "rebase")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    random_policy_directory(top / "policy", seed=23, leans={"<|endoftext|>": 0.0})
    random_prm_directory(top / "prm", "qwen2.5-math-prm", seed=2)
    return top


class Watched(Engine):
    """Checks the law of blocks after every tick."""

    def _tick(self):
        super()._tick()
        for runner in self.runners:
            check_blocks(runner.tree)


def engine_of(models, *, on_end: bool, **settings) -> Watched:
    """Its policy's ticks one by one, or on end."""
    engine = Watched.from_pretrained(models / "policy", models / "prm", **LIMITS | settings)
    runner, rule = engine.policy.runner, engine.policy.rule
    for table in runner.cache.tables:
        table.fill_(torch.nan)  # whoever reads a slot that was never written draws nonsense
    if on_end:
        engine.policy.graphs = TicksOneByOne(runner.decoder, runner.cache, make_backend("native", deterministic=True),
                                             after=rule.after, ends=rule.eos, last_state=CLOSED)  # fmt: skip
        monitor(engine.policy.graphs)
    return engine


def monitor(graphs) -> None:
    """Note the ticks that are begun."""
    start, graphs.begun = graphs.start, []
    graphs.start = lambda outlook, draws: graphs.begun.append(len(draws.slots) - 1) or start(outlook, draws)


def essence(results) -> list[tuple]:
    """All that must be equal, bit for bit."""
    return [
        (
            [(b.identity, b.solution, b.scores, b.finish) for b in result.branches],
            {(n.identity, n.parent.identity, n.tokens, n.score, n.finish) for n in result.nodes},
            result.answer,
            result.ledger.policy.tokens_generated,
        )
        for result in results
    ]


def assert_nothing_held(engine) -> None:
    for runner in engine.runners:
        counts = check_blocks(runner.tree)
        assert counts.pinned == counts.filling == 0


@pytest.mark.parametrize("steps", ["blank-line", "7"])
@pytest.mark.parametrize("method", METHODS[3:5], ids=lambda method: method.name)
def test_speculation_on_end_changes_no_bit(models, method, steps):
    ref = engine_of(models, on_end=False, steps=steps).search(PROBLEMS[:1], method, seed=1)
    engine = engine_of(models, on_end=True, steps=steps, speculate=True, max_rows=12)
    out = engine.search(PROBLEMS, method, seed=1)
    assert essence(out)[:1] == essence(ref)
    assert engine.policy.graphs.begun and sum(result.ledger.policy.tokens_adopted for result in out) > 0
    assert_nothing_held(engine)


@pytest.mark.parametrize("steps", ["blank-line", "7"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_whole_searches_are_the_same_on_end(models, method, steps):
    engines = [engine_of(models, on_end=on_end, steps=steps) for on_end in (False, True)]
    one_by_one, on_end = (essence(engine.search(PROBLEMS, method, seed=1)) for engine in engines)
    assert on_end == one_by_one
    assert TICKS in engines[1].policy.graphs.begun
    assert_nothing_held(engines[1])


def test_searches_in_a_small_pool_are_the_same_on_end(models):
    """Ticks on end are fewer where blocks are, and none where a draw must give way."""
    method = make_method("beam", n=8, max_steps=5)
    blocks = 26 * sum(runner.block_bytes for runner in engine_of(models, on_end=False).runners)
    engines = [engine_of(models, on_end=on_end, kv_bytes=kv) for on_end, kv in ((False, LIMITS["kv_bytes"]), (True, blocks))]
    engines[1].admission.expected = lambda *asked: [0, 0]  # all at once
    roomy, tight = (essence(engine.search(PROBLEMS, method, seed=1)) for engine in engines)
    assert tight == roomy and engines[1].policy.preemptions > 0
    assert {TICKS, 1} <= set(engines[1].policy.graphs.begun)
    assert_nothing_held(engines[1])


def test_a_draw_behind_a_step_of_its_own_is_seated_without_a_forward(models):
    """Once the prompt is read; children of one parent wait for a forward, which reads it once for all of them."""
    for name, most in (("majority", 1), ("beam", 5)):
        engine, forwards = engine_of(models, on_end=True, steps="7"), []
        whole = engine.policy.runner.forward
        engine.policy.runner.forward = lambda *given, whole=whole, forwards=forwards: forwards.append(1) or whole(*given)
        (result,) = engine.search(PROBLEMS[0], make_method(name, n=4, max_steps=5), seed=1)
        assert max(branch.depth for branch in result.branches) == 5
        assert len(forwards) <= most


def test_ticks_computed_for_nobody_are_padding(models):
    engine, beside = engine_of(models, on_end=True, deterministic=False), []
    finish = engine.policy.graphs.finish

    def counting():
        drawn = finish()
        beside.append(len(drawn.tokens) * bucket_for(len(drawn.drawn)) - drawn.drawn.sum())
        return drawn

    engine.policy.graphs.finish = counting
    results = engine.search(PROBLEMS, make_method("beam", n=8, max_steps=5), seed=1)
    counted = sum(result.ledger.policy.padding_flops for result in results)
    assert counted == sum(beside) * engine.policy.accounts.flops(Work(tokens=1, reads=1)) > 0


def test_few_rows_are_the_same_on_end(models):
    method = make_method("majority", n=8, max_steps=5)
    engines = [engine_of(models, on_end=on_end, max_rows=rows) for on_end, rows in ((False, 64), (True, 2))]
    many, few = (essence(engine.search(PROBLEMS, method, seed=1)) for engine in engines)
    assert few == many


def test_a_search_given_up_under_way_leaves_nothing_held_and_the_next_is_as_ever(models):
    method = make_method("beam", n=8, max_steps=5)
    engine, fresh = (engine_of(models, on_end=True) for _ in range(2))
    for ticks in range(1, 9):
        stream = engine.stream(PROBLEMS, method)
        tick, engine._tick = engine._tick, interrupted_after(ticks, engine)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        engine._tick = tick
        assert_nothing_held(engine)
    assert essence(engine.search(PROBLEMS, method, seed=1)) == essence(fresh.search(PROBLEMS, method, seed=1))


def interrupted_after(ticks, engine):
    left, tick = iter(range(ticks)), engine._tick

    def tick_or_stop():
        if next(left, None) is None:
            raise KeyboardInterrupt
        tick()

    return tick_or_stop


@pytest.mark.parametrize("verb", ["plan", "start"])
def test_memory_that_does_not_suffice_for_ticks_on_end_lowers_the_rows_and_nothing_else(models, verb):
    method = make_method("beam", n=8, max_steps=5)
    engine, fresh = (engine_of(models, on_end=True) for _ in range(2))
    whole, calls, failed = getattr(engine.policy.graphs, verb), iter(range(1 << 20)), []

    def failing(*given):
        if next(calls) % 3 == 1 and len(engine.policy._rows) > 1:
            failed.append(len(engine.policy._rows))
            raise MemoryError
        return whole(*given)

    setattr(engine.policy.graphs, verb, failing)
    assert essence(engine.search(PROBLEMS, method, seed=1)) == essence(fresh.search(PROBLEMS, method, seed=1))
    assert len(failed) > 3
    assert_nothing_held(engine)


@pytest.mark.parametrize("verb", ["plan", "start", "finish"])
def test_ticks_that_fail_lose_no_step_and_leave_nothing_held(models, verb):
    method = make_method("best_of_n", n=8, max_steps=5)
    engine, fresh = (engine_of(models, on_end=True) for _ in range(2))
    whole, calls = getattr(engine.policy.graphs, verb), iter(range(1 << 20))

    def failing(*given):
        if next(calls) % 3 == 0:
            raise KeyboardInterrupt
        return whole(*given)

    setattr(engine.policy.graphs, verb, failing)
    tick = engine.policy.tick

    def patient():
        try:
            tick()
        except KeyboardInterrupt:
            check_blocks(engine.policy.runner.tree)

    engine.policy.tick = patient
    assert essence(engine.search(PROBLEMS, method, seed=1)) == essence(fresh.search(PROBLEMS, method, seed=1))
    assert_nothing_held(engine)


def test_logits_that_are_not_finite_end_the_searches_with_a_sentence(models, monkeypatch):
    engine = engine_of(models, on_end=True)
    decoder, calls = engine.policy.runner.decoder, iter(range(1 << 20))
    whole = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: whole(hidden) + (torch.nan if next(calls) > 3 else 0))
    with pytest.raises(EngineError, match="logits are not finite"):
        engine.search(PROBLEMS, make_method("majority", n=4, max_steps=5))
    assert engine.policy.graphs.begun
    assert_nothing_held(engine)


@pytest.mark.parametrize("rule", [MarkedSteps(PIECES, [5], VOCAB), DrawnLengths(6, VOCAB)], ids=["marked", "drawn lengths"])
def test_a_whole_search_with_the_kernels_is_the_same_on_end(decoder, rule):
    found = []
    for backend in (make_backend("native"), TritonTreeAttention("cpu")):
        runner, graphs = ModelRunner(decoder, backend, num_blocks=64, block_size=4), None
        if isinstance(backend, TritonTreeAttention):
            graphs = DecodeGraphs(decoder, runner.cache, backend, after=rule.after, ends=rule.eos, last_state=CLOSED)
            monitor(graphs)
        policy = Policy(runner, rule, max_rows=8, graphs=graphs)
        program = Majority(n=2).program(root_branch(range(20, 33)))
        drawn = draw_all(policy, program, 13, temperature=0.8, max_tokens=11, max_step_tokens=8)
        found.append({(node.identity, node.tokens, node.finish) for node in drawn.nodes})
    assert found[0] == found[1] and sum(graphs.begun) >= 6


def test_why_a_row_leaves_is_told_by_the_same_numbers_everywhere():
    assert (rows.END, rows.WHOLE, rows.CUT, rows.FAULT) == (advance.ENDED, advance.CLOSED, advance.CUT, advance.FAULT)
