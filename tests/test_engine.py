"""Whole searches: the laws of the house, on tiny random models."""

import logging
import random
import sys
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

import tts_engine
from tts_engine import engine as engine_room
from tts_engine import guesses as guesses_room
from tts_engine import policy as policy_room
from tts_engine.branch import Finish
from tts_engine.config import EngineConfig, kv_room, workspace
from tts_engine.engine import Engine
from tts_engine.errors import EngineError, MissingExtra, OutOfBlocks
from tts_engine.ledger import Stopwatch
from tts_engine.models.weights import weight_bytes
from tts_engine.prm import scorer as scorer_room
from tts_engine.sampling import gumbel, philox_key
from tts_engine.search import METHODS, PRESETS, BeamSearch, make_method
from tts_engine.search.requests import Expand
from tts_engine.steps import MarkedSteps
from tts_engine.tasks.problems import Problem
from tts_engine.testing import check_blocks, random_policy_directory, random_prm_directory

LIMITS = {"max_step_tokens": 16, "max_tokens": 60, "block_size": 4, "kv_bytes": 4 << 20}
PROBLEMS = [Problem(id=f"p{i}", problem=text, answer=None) for i, text in enumerate(
    ["a=3;b=a+4;b?", "1+1?", "x=9;y=x*2;z=y-1;z?", "q?", "c=12;d=c/3;d?", "a=3;b=a+4;a?", "7*8?", "k=1;l=k;m=l;m?"])]  # fmt: skip
POLICY = {"seed": 23, "leans": {"<|endoftext|>": 0.0}}  # a seed that writes several steps before it ends
STEP_METHODS = [make_method(name, n=8, max_steps=5) for name in ("best_of_n", "beam", "dvts", "rebase")]
by_name = pytest.mark.parametrize("method", STEP_METHODS, ids=lambda method: method.name)


class Watched(Engine):
    """Checks the law of blocks after every tick; with `forgetful`, drops all idle KV between ticks and spoils what was written."""

    forgetful = False
    ticks = 0

    def _tick(self):
        super()._tick()
        self.ticks += 1
        for runner in self.runners:
            check_blocks(runner.tree)
            if self.forgetful:
                runner.tree.evict_all()
        if self.scorer is not None and not self.scorer.under_way:
            counts = self.scorer.runner.tree.counts()
            assert counts.pinned == counts.filling == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a policy and of both kinds of PRM."""
    top = tmp_path_factory.mktemp("models")
    random_policy_directory(top / "policy", **POLICY)
    for kind in ("qwen2.5-math-prm", "math-shepherd"):
        random_prm_directory(top / kind, kind, seed=2)
    return top


def load(models, kind: str | None = "qwen2.5-math-prm", *, forgetful: bool = False, **settings) -> Watched:
    engine = Watched.from_pretrained(models / "policy", models / kind if kind else None, **LIMITS | settings)
    engine.forgetful, engine.trees = forgetful, [runner.tree for runner in engine.runners]
    for runner in engine.runners:  # whoever reads a slot that was never written draws nonsense
        for table in runner.cache.tables:
            table.fill_(torch.nan)
    return engine


def tiny_pool(models, blocks: int) -> int:
    """kv_bytes for so many blocks of each model."""
    engine = load(models)
    return blocks * sum(runner.block_bytes for runner in engine.runners)


def essence(result) -> tuple:
    """All that must be equal, bit for bit."""
    branches = [(b.identity, b.solution, b.scores, b.finish) for b in result.branches]
    nodes = {(n.identity, n.parent.identity, n.tokens, n.score, n.finish) for n in result.nodes}
    return branches, nodes, result.answer, result.aggregates


def tokens_of(result) -> dict[int, tuple[int, ...]]:
    return {node.identity: node.tokens for node in result.nodes}


def assert_at_rest(engine, interrupted=False) -> None:
    """Nothing is held or waits; unless an interrupt came at a bad moment, without the engine having had to start over for it."""
    trees, engine.trees = engine.trees, [runner.tree for runner in engine.runners]
    assert interrupted or engine.trees == trees
    for runner in engine.runners:
        counts = check_blocks(runner.tree)
        assert counts.pinned == counts.filling == 0
    assert engine.policy.num_open == 0 and not engine.policy.busy
    assert engine.scorer is None or (engine.scorer.num_open == 0 and not engine.scorer.under_way)


@pytest.fixture
def late(monkeypatch):
    """late(): from then on the PRM is mostly not ready with what it has begun, as where a GPU reads in a stream of its own. Returns
    how often it was ready, and how often not."""
    asked, rng = Counter(), random.Random(4)

    def ready(scorer):
        asked[found := rng.random() < 0.15] += 1
        return found and scorer.under_way

    def later():
        monkeypatch.setattr(scorer_room.Scorer, "ready", property(ready))
        return asked

    return later


@pytest.fixture(scope="module")
def alone(models):
    """PROBLEMS[0] by itself in a fresh deterministic engine, under each method."""
    return {method: load(models, deterministic=True).search(PROBLEMS[0], method, seed=3)[0] for method in STEP_METHODS}


# Laws 5 and 6, bit for bit in deterministic mode.


@by_name
def test_the_searches_under_test_are_worth_testing(alone, method):
    result = alone[method]
    assert len(result.nodes) >= 12
    assert {n.depth for n in result.nodes} >= {1, 2, 3}
    assert len({n.score for n in result.nodes}) > 6


@by_name
def test_a_problem_among_seven_others_in_any_order_gives_the_same_bits(models, alone, method):
    others = PROBLEMS.copy()
    random.Random(method.name).shuffle(others)
    out = load(models, deterministic=True).search(others, method, seed=3)[others.index(PROBLEMS[0])]
    assert essence(out) == essence(alone[method])


@by_name
def test_evicting_everything_between_ticks_changes_no_bit(models, alone, method):
    engine = load(models, deterministic=True, forgetful=True)
    out = engine.search(PROBLEMS[:2], method, seed=3)[0]
    assert essence(out) == essence(alone[method])
    assert out.ledger.prm.tokens_recomputed > 0 or method.name == "best_of_n"
    assert out.ledger.policy.tokens_recomputed > 0


def crowded(engine):
    """It begins searches whatever they may come to."""
    engine.admission.expected = lambda *asked: [0, 0]
    return engine


@pytest.mark.parametrize("method", STEP_METHODS, ids=lambda method: method.name)
def test_no_more_searches_are_under_way_than_keep_what_they_need(models, method):
    """As much as one of them keeps and half as much again: nothing is computed twice but for the ends of steps."""
    engine = load(models, deterministic=True)
    results = {problem.id: engine.search(problem, method, seed=3)[0] for problem in PROBLEMS}
    kept = engine.admission.expected(method, (1 << 60, 1 << 60))
    small = load(models, deterministic=True, kv_bytes=2 * sum(kept))
    small.admission.note(method, kept)
    out, free = small.search(PROBLEMS, method, seed=3), crowded(load(models, deterministic=True, kv_bytes=2 * sum(kept)))
    assert [essence(result) for result in out] == [essence(results[problem.id]) for problem in PROBLEMS]
    thrashed = sum(result.ledger.policy.tokens_recomputed for result in free.search(PROBLEMS, method, seed=3))
    assert sum(result.ledger.policy.tokens_recomputed for result in out) < thrashed / 2


def test_a_policy_beside_an_idle_prm_has_room_for_as_many_searches_as_one_alone(models):
    """What eight searches keep and a quarter more, half of which was proposed for the PRM."""
    method = make_method("majority", n=8, max_steps=5)
    engine = load(models, deterministic=True)
    ours = engine.search(PROBLEMS, method, seed=3)
    kept, prm = engine.admission.expected(method, (1 << 60, 1 << 60))
    assert prm == 0
    small = load(models, deterministic=True, kv_bytes=len(PROBLEMS) * kept * 5 // 4)
    before = small.policy.runner.tree.num_blocks
    small.admission.note(method, (kept, prm))
    out = small.search(PROBLEMS, method, seed=3)
    assert [essence(result) for result in out] == [essence(result) for result in ours]
    assert small.policy.runner.tree.num_blocks > 1.5 * before
    assert sum(result.ledger.policy.tokens_recomputed for result in out) == 0


@by_name
def test_a_budget_that_holds_little_more_than_one_branch_changes_no_bit(models, alone, method):
    engine = crowded(load(models, deterministic=True, kv_bytes=tiny_pool(models, 27)))
    assert sum(runner.tree.num_blocks for runner in engine.runners) == 54
    out = engine.search(PROBLEMS[:3], method, seed=3)[0]
    assert essence(out) == essence(alone[method])
    assert engine.policy.preemptions > 0
    assert out.ledger.policy.tokens_recomputed > 0
    assert_at_rest(engine)


@by_name
def test_any_memory_that_holds_one_branch_gives_the_same_bits(models, alone, method):
    """As much as a search of all problems side by side keeps, and less and less of it."""
    engine, most, counted = load(models, deterministic=True), 0, []

    def look():
        nonlocal most
        most = max(most, sum(sum(runner.tree.counts()[1:]) * runner.block_bytes for runner in engine.runners))

    engine.budget.look = look
    unlimited = [essence(result) for result in engine.search(PROBLEMS, method, seed=3)]
    assert unlimited[0] == essence(alone[method])
    for share in (1.0, 0.5, 0.25, 0.12):
        engine = load(models, deterministic=True, kv_bytes=int(most * share))
        assert [essence(result) for result in engine.search(PROBLEMS, method, seed=3)] == unlimited, share
        engine = crowded(load(models, deterministic=True, kv_bytes=int(most * share)))
        results = engine.search(PROBLEMS, method, seed=3)
        assert [essence(result) for result in results] == unlimited, share
        assert_at_rest(engine)
        ledgers = [part for result in results for part in (result.ledger.policy, result.ledger.prm)]
        recomputed, evicted = (sum(getattr(part, of) for part in ledgers) for of in ("tokens_recomputed", "blocks_evicted"))
        preempted = sum(result.ledger.policy.preemptions for result in results)
        assert preempted == engine.policy.preemptions
        counted.append((recomputed, evicted, preempted, engine.budget.moves))
    assert all(less < more for less, more in zip(counted[0], counted[-1], strict=True))


@by_name
def test_pools_of_another_size_after_every_tick_change_no_bit(models, alone, method):
    rng, engine = random.Random(method.name), load(models, deterministic=True)

    def restless():
        for runner in engine.runners:
            counts, size = runner.tree.counts(), rng.choice([30, 60, 90, 400])
            assert runner.resize(size) == (counts.pinned + counts.filling <= size)
            for table in runner.cache.tables:  # what is not in use is for nobody to read
                table[runner.tree.extent * runner.tree.block_size :] = torch.nan
            check_blocks(runner.tree)

    engine.budget.look = restless
    out = engine.search(PROBLEMS[:3], method, seed=3)[0]
    assert essence(out) == essence(alone[method])
    assert all(runner.cache.version > 10 for runner in engine.runners)
    assert_at_rest(engine)


def test_draws_that_are_asked_for_together_begin_together(models):
    """Where there are rows for one search and a half, what two draws have in common is computed once all the same."""
    method = make_method("majority", n=8, max_steps=5, temperature=0.3)
    for rows, wasteful in ((12, False), (7, True)):
        ledgers = [result.ledger.policy for result in load(models, max_rows=rows).search(PROBLEMS, method, seed=3)]
        assert any(ledger.duplicate_flops > 0 for ledger in ledgers) == wasteful


@by_name
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_change_no_bit(models, alone, method, rows):
    """One at a time no two draws are read together."""
    out = load(models, deterministic=True, max_rows=rows).search(PROBLEMS[:2][::-1], method, seed=3)[1]
    assert essence(out) == essence(alone[method])


def test_a_second_search_in_a_warm_engine_gives_the_same_bits_for_less(models, alone):
    engine = load(models, deterministic=True)
    for method in STEP_METHODS[1:3]:
        engine.forget()
        first, second = (engine.search(PROBLEMS[0], method, seed=3)[0] for _ in range(2))
        assert essence(first) == essence(second) == essence(alone[method])
        assert second.ledger.prm.tokens_computed < first.ledger.prm.tokens_computed


@pytest.mark.parametrize(
    ("settings", "count", "batch"),
    [({}, 1, 2048), ({}, 4, 40), ({"forgetful": True}, 2, 2048), ({"max_rows": 5}, 2, 2048), ({"max_rows": 11}, 3, 40)],
    ids=["alone", "others beside", "forgetful", "few rows", "some rows"],
)
@by_name
def test_speculation_changes_no_bit(models, alone, monkeypatch, method, settings, count, batch):
    monkeypatch.setattr(guesses_room, "MOST_ROWS", {"cpu": 40})
    monkeypatch.setattr(scorer_room, "BATCH_TOKENS", batch)
    engine = load(models, deterministic=True, speculate=True, **settings)
    policy, forward = engine.policy, engine.policy.runner.forward

    def yielding(segments, read_at):
        assert not (policy._waiting and policy._guesses.num_decoding), "a draw waits while rows decode what nobody asked for"
        return forward(segments, read_at)

    monkeypatch.setattr(policy.runner, "forward", yielding)
    results = engine.search(PROBLEMS[:count], method, seed=3)
    assert essence(results[0]) == essence(alone[method])
    assert_at_rest(engine)
    guessed = sum(result.ledger.policy.tokens_adopted + result.ledger.policy.tokens_wasted for result in results)
    assert (guessed > 0) == (method.name != "best_of_n")


@pytest.mark.parametrize("settings", [{}, {"speculate": True}, {"kv_bytes": 32}], ids=["plenty", "speculating", "hardly any room"])
@by_name
def test_scores_that_come_ticks_later_change_no_bit(models, alone, monkeypatch, late, method, settings):
    """And while the PRM reads, draws go on, and no pool changes its size."""
    monkeypatch.setattr(guesses_room, "MOST_ROWS", {"cpu": 40})
    monkeypatch.setattr(scorer_room, "BATCH_TOKENS", 40)
    if "kv_bytes" in settings:
        settings = {"kv_bytes": tiny_pool(models, settings["kv_bytes"])}
    engine, asked = load(models, deterministic=True, **settings), late()
    move, beside = engine.budget._give, Counter()

    def give(*how):
        assert not engine.scorer.under_way
        return move(*how)

    def tick():
        beside["tokens"] += engine.scorer.under_way * engine.policy.num_open
        policy_tick()

    policy_tick, engine.policy.tick, engine.budget._give = engine.policy.tick, tick, give
    results = engine.search(PROBLEMS[:5], method, seed=3)
    assert essence(results[0]) == essence(alone[method])
    assert asked[False] > asked[True] > 0 and beside["tokens"] > 0
    assert_at_rest(engine)


@by_name
def test_a_search_that_ends_while_the_prm_reads_it_leaves_nothing_behind(models, alone, monkeypatch, late, method):
    monkeypatch.setattr(scorer_room, "BATCH_TOKENS", 40)
    engine, _ = load(models, deterministic=True), late()
    tick = engine.policy.tick

    def lost():
        if engine.scorer.under_way:
            raise RuntimeError("the device is lost")
        tick()

    with monkeypatch.context() as only, pytest.raises(RuntimeError, match="is lost"):
        only.setattr(engine.policy, "tick", lost)
        engine.search(PROBLEMS[:5], method, seed=3)
    assert_at_rest(engine)
    assert essence(engine.search(PROBLEMS[0], method, seed=3)[0]) == essence(alone[method])


@pytest.mark.parametrize("method", STEP_METHODS[1:3], ids=lambda method: method.name)
def test_speculation_yields_to_a_budget_that_holds_little_more_than_one_branch(models, alone, monkeypatch, method):
    monkeypatch.setattr(guesses_room, "MOST_ROWS", {"cpu": 40})
    for blocks in (27, 60):
        engine = load(models, deterministic=True, speculate=True, kv_bytes=tiny_pool(models, blocks))
        results = engine.search(PROBLEMS[:3], method, seed=3)
        assert essence(results[0]) == essence(alone[method])
        assert_at_rest(engine)
    assert sum(result.ledger.policy.tokens_wasted for result in results) > 0


@pytest.mark.parametrize("method", STEP_METHODS[1:3], ids=lambda method: method.name)
def test_what_speculation_wasted_is_told_and_nothing_else_is_more(models, alone, method):
    engine = load(models, deterministic=True, speculate=True)
    (result,) = engine.search(PROBLEMS[0], method, seed=3)
    ours, ref = result.ledger.policy, alone[method].ledger.policy
    assert 0 < ours.tokens_adopted <= ours.tokens_generated == ref.tokens_generated
    assert ours.tokens_wasted > 0 and ours.speculation_flops > 0 == ref.speculation_flops
    assert ours.useful_flops == ours.ideal_flops == ref.ideal_flops
    assert result.ledger.prm.tokens_computed == alone[method].ledger.prm.tokens_computed


@pytest.mark.parametrize("ticks", [5, 12, 25, 40])
def test_a_search_cancelled_or_failing_while_it_speculates_leaves_nothing_behind(models, alone, monkeypatch, ticks):
    monkeypatch.setattr(guesses_room, "MOST_ROWS", {"cpu": 40})
    engine, method = load(models, deterministic=True, speculate=True, max_rows=12), STEP_METHODS[1]
    forward, calls = engine.policy.runner.forward, iter(range(1000))

    def failing(segments, read_at):
        if next(calls) == ticks:
            raise KeyboardInterrupt
        return forward(segments, read_at)

    monkeypatch.setattr(engine.policy.runner, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        engine.search(PROBLEMS[:3], method, seed=3)
    assert_at_rest(engine)
    assert not engine.policy._guesses.rows and not engine.policy._guesses.rounds
    stream = engine.stream(PROBLEMS[:3], method, seed=3)
    next(stream)
    stream.close()
    assert_at_rest(engine)
    assert essence(engine.search(PROBLEMS[0], method, seed=3)[0]) == essence(alone[method])


def test_restricted_draws_and_the_other_prm_family_keep_the_law_too(models):
    settings = {"kind": "math-shepherd", "deterministic": True, "top_p": 0.9, "top_k": 20, "min_p": 0.02}
    method = make_method("beam", n=8, max_steps=4, rules="sal")
    ref = load(models, **settings).search(PROBLEMS[1], method)[0]
    out = load(models, **settings, forgetful=True, max_rows=5).search(PROBLEMS[:4], method)[1]
    assert essence(out) == essence(ref)


@pytest.mark.parametrize("kind", ["qwen2.5-math-prm", "math-shepherd"])
def test_the_laws_hold_in_int8(models, kind):
    method = STEP_METHODS[1]
    ref = load(models, kind, dtype="int8", deterministic=True).search(PROBLEMS[0], method, seed=3)[0]
    out = load(models, kind, dtype="int8", deterministic=True, forgetful=True).search(PROBLEMS[:3][::-1], method, seed=3)[2]
    assert essence(out) == essence(ref) and len(ref.nodes) >= 12
    exact = load(models, kind, deterministic=True).search(PROBLEMS[0], method, seed=3)[0]
    scores = [{node.identity: node.score for node in result.nodes if node.depth == 1} for result in (ref, exact)]
    assert scores[0] != scores[1]  # or nothing was quantised


def test_another_seed_or_problem_id_draws_other_tokens(models, alone):
    engine = load(models, deterministic=True)
    method = STEP_METHODS[1]
    renamed = Problem(id="other", problem=PROBLEMS[0].problem, answer=None)
    for problem, seed in ((PROBLEMS[0], 4), (renamed, 3)):
        out = engine.search(problem, method, seed=seed)[0]
        assert not set(tokens_of(out).items()) & set(tokens_of(alone[method]).items())


def test_two_engines_in_two_threads_do_not_meet(models, alone):
    jobs = {method: load(models, deterministic=True, forgetful=i % 2 == 1) for i, method in enumerate(STEP_METHODS[1:3])}
    found = {}

    def work(method, engine):
        found[method] = engine.search(PROBLEMS[:3], method, seed=3)[0]

    threads = [threading.Thread(target=work, args=job) for job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for method in jobs:
        assert essence(found[method]) == essence(alone[method])


def test_two_engines_taking_turns_do_not_meet(models, alone):
    a, b = STEP_METHODS[1:3]
    one, two = (load(models, deterministic=True).stream(PROBLEMS[:4], method, seed=3) for method in (a, b))
    found = {a: {}, b: {}}
    for left, right in zip(one, two, strict=True):
        found[a][left.problem.id], found[b][right.problem.id] = left, right
    for method in (a, b):
        assert essence(found[method]["p0"]) == essence(alone[method])


# Without deterministic: the rate of changed tokens.


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.05), ("bfloat16", 0.5)])
def test_without_deterministic_the_rate_of_changed_tokens_is_measured(models, record_testsuite_property, dtype, bound):
    """A changed token changes all behind it, and a score that then differs the whole rest of a search."""
    changed = total = 0
    for method in STEP_METHODS[:2]:
        ref = load(models, dtype=dtype).search(PROBLEMS[0], method, seed=3)[0]
        among = load(models, dtype=dtype).search(PROBLEMS, method, seed=3)[0]
        evicted = load(models, dtype=dtype, forgetful=True, max_rows=3).search(PROBLEMS[0], method, seed=3)[0]
        for out in (among, evicted):
            seen = tokens_of(out)
            for identity, tokens in tokens_of(ref).items():
                total += len(tokens)
                changed += sum(a != b for a, b in zip(tokens, seen.get(identity, (-1,) * len(tokens)), strict=False))
    record_testsuite_property(f"changed tokens without deterministic, {dtype}", f"{changed} of {total}")
    assert total > 500
    assert changed / total < bound


# What is drawn and scored, against transformers.


@pytest.mark.parametrize("kind", ["qwen2.5-math-prm", "math-shepherd"])
def test_every_token_and_score_of_a_beam_search_is_what_transformers_says(models, kind, tmp_path):
    policy, prm = random_policy_directory(tmp_path, **POLICY), random_prm_directory(tmp_path / "prm", kind, seed=2)
    engine = load(models, kind, forgetful=True)
    (result,) = engine.search(PROBLEMS[2], make_method("beam", n=8, max_steps=4), seed=5)
    key, spec = np.array([philox_key(5, "p2")], np.uint32), engine.scorer.spec
    for node in result.nodes:
        path = [token for step in node.path for token in step.tokens]
        start, count = len(path) - len(node.tokens), len(node.tokens)
        ids, positions = spec.render(node.path[0].text, [step.text for step in node.steps])
        with torch.no_grad():
            logits = policy(torch.tensor([path])).logits[0, start - 1 : -1] / 0.7
            hidden = prm.model(torch.tensor([ids])).last_hidden_state[0, positions]
        noise = gumbel(key.repeat(count, 0), np.full(count, node.identity, np.uint64), np.arange(start, len(path)), logits.shape[1])
        assert (logits + torch.from_numpy(noise)).argmax(-1).tolist() == list(node.tokens)
        assert engine.scorer.head(hidden).tolist() == pytest.approx(list(node.scores), abs=1e-5)


# Law 7 and the ends of a stream.


@by_name
def test_after_a_search_nothing_is_pinned_or_filling(models, method):
    engine = load(models, max_rows=5)
    engine.search(PROBLEMS[:3], method)
    assert engine.ticks > 10
    assert_at_rest(engine)


def test_forget_empties_the_pools(models):
    engine = load(models)
    engine.search(PROBLEMS[0], STEP_METHODS[0])
    engine.forget()
    assert all(runner.tree.counts().free == runner.tree.num_blocks for runner in engine.runners)


@by_name
def test_closing_a_stream_midway_leaves_nothing_behind_and_a_new_search_works(models, alone, method):
    engine = load(models, deterministic=True, max_rows=6)
    stream = engine.stream(PROBLEMS[::-1], method, seed=3)
    next(stream)
    stream.close()
    assert_at_rest(engine)
    assert essence(engine.search(PROBLEMS[0], method, seed=3)[0]) == essence(alone[method])


def test_an_error_inside_a_tick_leaves_an_engine_that_still_searches(models, alone, monkeypatch):
    engine, method = load(models, deterministic=True), STEP_METHODS[1]
    for runner, fails_at in zip(engine.runners, (5, 1), strict=True):
        forward, calls = runner.forward, iter(range(1000))

        def failing(segments, read_at, forward=forward, calls=calls, fails_at=fails_at):
            if next(calls) == fails_at:
                raise KeyboardInterrupt
            return forward(segments, read_at)

        monkeypatch.setattr(runner, "forward", failing)
    for _ in engine.runners:
        with pytest.raises(KeyboardInterrupt):
            engine.search(PROBLEMS[:2], method, seed=3)
        assert_at_rest(engine)
    assert essence(engine.search(PROBLEMS[0], method, seed=3)[0]) == essence(alone[method])


def test_results_come_as_problems_finish_and_each_once(models):
    engine = load(models, max_rows=8)
    seen, open_searches = [], []
    for result in engine.stream(PROBLEMS, STEP_METHODS[1]):
        seen.append(result.problem.id)
        open_searches.append(engine.policy.num_open)
    assert sorted(seen) == [problem.id for problem in PROBLEMS]
    assert open_searches[0] > 0 and open_searches[-1] == 0


def test_search_gives_results_in_the_order_of_the_problems(models):
    engine = load(models, None)
    results = engine.search(["1+1?", *PROBLEMS[:3]], make_method("majority", n=2))
    assert [result.problem.id for result in results] == ["problem-1", "p0", "p1", "p2"]


def test_a_second_stream_while_one_is_open_is_refused_and_the_first_goes_on(models):
    engine = load(models)
    stream = engine.stream(PROBLEMS[:2], STEP_METHODS[0])
    next(stream)
    with pytest.raises(EngineError, match="searching already"):
        engine.search(PROBLEMS[2], STEP_METHODS[0])
    assert len(list(stream)) == 1
    assert_at_rest(engine)


@pytest.mark.parametrize("problems", [[], ()], ids=str)
def test_no_problems_give_no_results(models, problems):
    assert load(models).search(problems, STEP_METHODS[0]) == []


# Faults: what goes wrong in one problem ends that problem.


@dataclass(frozen=True, slots=True, kw_only=True)
class Raising(BeamSearch):
    """A beam search that gives up on the problem with `text` as soon as it has drawn, or has scores."""

    text: str = ""
    scored: bool = False

    def program(self, root):
        program, value = BeamSearch.program(self, root), None
        while True:
            try:
                request = program.send(value)
            except StopIteration as stop:
                return stop.value
            value = yield request
            if root.text == self.text and self.scored == (not isinstance(request, Expand)):
                raise LookupError("no more ideas")


FAULTY, HEALTHY = PROBLEMS[1], [PROBLEMS[0], PROBLEMS[2]]


def fault_logits(engine, monkeypatch):
    draw, key, ticks = policy_room.sample, np.array(philox_key(3, FAULTY.id), np.uint32), count()

    def spoiled(logits, rows, sampling, keys, *rest):
        mine = (keys == key).all(axis=1)
        if mine.any() and next(ticks) >= 5:
            logits = logits.clone()
            logits[torch.from_numpy(rows[np.flatnonzero(mine)[-1:]])] = torch.nan
        return draw(logits, rows, sampling, keys, *rest)

    monkeypatch.setattr(policy_room, "sample", spoiled)


def fault_scores(engine, monkeypatch):
    found, opening = engine.scorer._found, engine.scorer.spec.opening(FAULTY.problem)

    def faulty(begun):
        return {node: torch.inf if begun.runs[node].context.opening == opening else score for node, score in found(begun).items()}

    monkeypatch.setattr(engine.scorer, "_found", faulty)


def fault_grader(engine, monkeypatch, error=None):
    conclude = engine_room.conclude

    def failing(problem, *rest):
        if problem.id == FAULTY.id:
            raise error or LookupError("no such answer")
        return conclude(problem, *rest)

    monkeypatch.setattr(engine_room, "conclude", failing)


def fault_time(engine, monkeypatch):
    start = engine._start

    def late(*given):
        search = start(*given)
        search.started -= 500 if search.problem.id == FAULTY.id else 0
        return search

    monkeypatch.setattr(engine, "_start", late)
    engine.config = replace(engine.config, timeout=400.0)


FAULTS = {
    "empty": (" \n", None, "problem p1 is empty"),
    "long prompt": ("1" * 600, None, "problem p1 has a prompt of 601 tokens and the policy 512 positions"),
    "logits": (FAULTY.problem, fault_logits, "the policy's logits are not finite"),
    "scores": (FAULTY.problem, fault_scores, "the PRM gave inf for a step, which is no probability"),
    "program, drawn": (FAULTY.problem, False, "LookupError: no more ideas"),
    "program, scored": (FAULTY.problem, True, "LookupError: no more ideas"),
    "grader": (FAULTY.problem, fault_grader, "LookupError: no such answer"),
    "time": (FAULTY.problem, fault_time, "problem p1 timed out after 400 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_in_one_problem_ends_that_problem_and_no_other(models, alone, monkeypatch, fault):
    monkeypatch.setattr(guesses_room, "MOST_ROWS", {"cpu": 40})
    text, make, reason = FAULTS[fault]
    engine, method = load(models, deterministic=True, speculate=fault in ("logits", "program, scored")), STEP_METHODS[1]
    given, told = [HEALTHY[0], replace(FAULTY, problem=text), HEALTHY[1]], []
    if isinstance(make, bool):
        method = Raising(n=8, max_steps=5, text=text, scored=make)
    elif make is not None:
        make(engine, monkeypatch)
    results = {result.problem.id: result for result in
               engine.stream(given, method, seed=3, failed=lambda problem, error: told.append((problem, error)))}  # fmt: skip
    assert [problem for problem, _ in told] == [given[1]] and results.keys() == {problem.id for problem in HEALTHY}
    assert isinstance(told[0][1], EngineError) and reason in str(told[0][1])
    assert essence(results["p0"]) == essence(alone[STEP_METHODS[1]])
    assert_at_rest(engine)
    with pytest.raises(Exception, match=reason.split(": ")[-1]):
        engine.search(given, method, seed=3)
    assert_at_rest(engine)


def test_what_every_problem_lacks_is_no_fault_of_one(models, monkeypatch):
    engine, told = load(models), []
    fault_grader(engine, monkeypatch, MissingExtra("math-verify is not installed"))
    with pytest.raises(MissingExtra):
        list(engine.stream(PROBLEMS[:3], STEP_METHODS[1], failed=lambda *given: told.append(given)))
    assert not told
    assert_at_rest(engine)


def test_time_that_a_result_is_looked_at_counts_for_nobody(models, monkeypatch):
    clock = 0.0
    monkeypatch.setattr(engine_room.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(engine_room, "Stopwatch", lambda: Stopwatch(clock=lambda: clock))
    engine = load(models, max_rows=8, timeout=5.0)
    seen = []
    for result in engine.stream(PROBLEMS[:4], STEP_METHODS[1]):
        clock += 100
        seen.append(result.problem.id)
    assert len(seen) == 4


# Memory that does not suffice for a forward: fewer rows, fewer tokens, and the same results.


@contextmanager
def scarce(engine, monkeypatch, *most):
    """The forwards of policy and PRM take so many tokens at most; the sizes of those that were done."""
    done = [[] for _ in most]
    with monkeypatch.context() as only:
        for runner, limit, sizes in zip(engine.runners, most, done, strict=True):

            def limited(segments, read_at, forward=runner.forward, limit=limit, sizes=sizes):
                if len(segments.token_ids) > limit:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                sizes.append(len(segments.token_ids))
                return forward(segments, read_at)

            only.setattr(runner, "forward", limited)
        yield done


@by_name
def test_searches_that_are_too_much_for_the_memory_go_on_in_smaller_batches(models, alone, monkeypatch, method):
    engine = load(models, deterministic=True, speculate=True)
    with scarce(engine, monkeypatch, 30, 90) as sizes:
        results = engine.search(PROBLEMS[:4], method, seed=3)
    assert essence(results[0]) == essence(alone[method])
    assert engine.policy.max_rows < engine.config.max_rows or engine.policy.max_prefill < policy_room.MAX_PREFILL
    assert all(len(own) > 10 for own in sizes)
    assert_at_rest(engine)


def test_a_problem_of_which_one_row_is_too_much_for_the_memory_ends_and_the_others_go_on(models, alone, monkeypatch):
    engine, told = load(models, deterministic=True), []
    given = [PROBLEMS[0], Problem(id="long", problem="1" * 60, answer=None), *PROBLEMS[2:4]]
    with scarce(engine, monkeypatch, 40, 400):
        results = list(engine.stream(given, STEP_METHODS[1], seed=3, failed=lambda *one: told.append(one)))
    assert [(problem.id, str(error)) for problem, error in told] == [("long", policy_room.NO_MEMORY)]
    assert essence(next(result for result in results if result.problem.id == "p0")) == essence(alone[STEP_METHODS[1]])
    assert len(results) == 3 and engine.policy.max_rows == engine.config.max_rows
    assert_at_rest(engine)


# Law 7 wherever it is interrupted, and under everything at once.

CLOSING = {"_abandon", "abandon", "_clear", "start_over", "close"}  # who interrupts these, interrupts the second time


def interrupt(line: int, spared: set[str]) -> None:
    """KeyboardInterrupt before the line-th line from here on that the package runs, but in what functions of these names do."""
    lines, top = count(), str(Path(tts_engine.__file__).parent)

    def local(frame, event, _):
        if event == "line" and next(lines) >= line and not within(frame):
            raise KeyboardInterrupt  # and nothing is traced any longer
        return local

    def within(frame):
        while frame is not None and frame.f_code.co_filename.startswith(top):
            if frame.f_code.co_name in spared:
                return True
            frame = frame.f_back
        return False

    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename.startswith(top) else None)


@contextmanager
def interrupted_at(line):
    """KeyboardInterrupt before the line-th line that the package runs, as Ctrl-C raises it between any two."""
    before = sys.gettrace()
    interrupt(line, CLOSING)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("speculate", [False, True], ids=["", "speculating"])
def test_an_interrupt_between_any_two_lines_leaves_no_lease(models, alone, monkeypatch, soak, speculate):
    monkeypatch.setattr(guesses_room, "MOST_ROWS", {"cpu": 40})
    settings, method = {"deterministic": True, "speculate": speculate, "max_rows": 12}, STEP_METHODS[1]
    rng, engine = random.Random(speculate), load(models, **settings, kv_bytes=tiny_pool(models, 40))
    for _ in range(4 * soak):
        engine.forget()
        with pytest.raises(KeyboardInterrupt), interrupted_at(rng.randrange(20_000)):
            engine.search(PROBLEMS[:2], method, seed=3)
        assert_at_rest(engine, interrupted=True)
    assert essence(engine.search(PROBLEMS[0], method, seed=3)[0]) == essence(alone[method])


@pytest.mark.parametrize("late_scores", [False, True], ids=["", "late"])
def test_interrupts_while_the_first_is_cleared_up_cost_the_next_search_nothing(models, alone, late, soak, late_scores):
    if late_scores:
        late()
    rng, met = random.Random(soak), Counter()
    engine = load(models, deterministic=True, max_rows=12, kv_bytes=tiny_pool(models, 40))
    abandon = engine._abandon

    def second(search):
        engine._clear = third
        interrupt(rng.randrange(60), set())
        abandon(search)

    def third():
        met["cleared up"] += 1
        del engine._clear
        interrupt(rng.randrange(8), set())
        engine._clear()

    engine._abandon = second
    for _ in range(20 * soak):
        with pytest.raises(KeyboardInterrupt), interrupted_at(rng.randrange(15_000)):
            engine.search(PROBLEMS[:2], STEP_METHODS[1], seed=3)
        met["left"] += engine.policy.busy or engine.scorer.busy
    engine._abandon = abandon
    assert min(met["cleared up"], met["left"]) > 0
    assert essence(engine.search(PROBLEMS[0], STEP_METHODS[1], seed=3)[0]) == essence(alone[STEP_METHODS[1]])
    assert_at_rest(engine, interrupted=True)


@dataclass
class Misfortune:
    """What goes wrong in an engine, now and then, unless it is `off`."""

    rng: random.Random
    met: Counter
    off: bool = False

    def strikes(self, kind: str, chance: float) -> bool:
        hit = not self.off and self.rng.random() < chance
        self.met[kind] += hit
        return hit

    def befall(self, engine, only) -> None:
        """Have it come over whatever the engine calls."""
        draw, conclude, rng = policy_room.sample, engine_room.conclude, self.rng

        def forward(segments, read_at, forward):
            if self.strikes("out of memory", 0.01):
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")
            if self.strikes("interrupted", 0.0005):
                raise KeyboardInterrupt
            if self.strikes("broken", 0.0005):
                raise RuntimeError("the device is lost")
            return forward(segments, read_at)

        def sample(logits, rows, *how):
            if self.strikes("logits", 0.004):
                logits = logits.index_fill(0, torch.tensor([rng.choice(rows.tolist())]), torch.nan)
            return draw(logits, rows, *how)

        def group(*given):
            if self.strikes("grader", 0.02):
                raise EngineError("the grading worker did not start")
            return conclude(*given)

        class Driver(engine_room.Driver):
            def answer(driver, *given):
                if self.strikes("program", 0.01):
                    raise LookupError("no more ideas")
                super().answer(*given)

        for runner in engine.runners:
            only.setattr(runner, "forward", partial(forward, forward=runner.forward))
        if engine.scorer is not None:
            head = engine.scorer.head
            only.setattr(engine.scorer, "head", lambda hidden: head(hidden) + (torch.nan if self.strikes("score", 0.01) else 0))
        only.setattr(policy_room, "sample", sample)
        only.setattr(engine_room, "conclude", group)
        only.setattr(engine_room, "Driver", Driver)


def random_method(rng: random.Random, prm: bool):
    name = rng.choice([*METHODS] if prm else ["cot", "majority", "adaptive"])
    settings = {"n": rng.choice([1, 2, 3]), "width": 2, "vote": rng.choice(["majority", "last_vote"][: 1 + prm]),
                "batch": rng.choice([1, 2]), "budget": rng.choice([None, "60tokens"]), "rules": rng.choice([*PRESETS])}  # fmt: skip
    if name in ("beam", "dvts"):
        settings["n"] = rng.choice([2, 4])
    known = {field.name for field in fields(METHODS[name])}
    return make_method(name, max_steps=rng.choice([1, 2, 3]), **{key: value for key, value in settings.items() if key in known})


def random_engine(rng: random.Random, models) -> Watched:
    return load(models, rng.choice(["qwen2.5-math-prm", "math-shepherd", None]), forgetful=rng.random() < 0.1, max_tokens=24,
                max_step_tokens=rng.choice([3, 8]), max_rows=rng.choice([1, 3, 8, 64]), deterministic=rng.random() < 0.3,
                speculate=rng.random() < 0.5, kv_bytes=tiny_pool(models, rng.choice([24, 32, 64, 200])))  # fmt: skip


@pytest.mark.parametrize("when", ["at once", "late"])
@pytest.mark.timeout(0)
def test_no_block_is_lost_whatever_searches_meet(models, monkeypatch, late, soak, when):
    """Random searches under random budgets, with random faults, timeouts, interrupts and abandoned streams, 20 and more of them."""
    monkeypatch.setattr(guesses_room, "MOST_ROWS", {"cpu": 40})
    if when == "late":
        late()
    rng, met, searched = random.Random(soak), Counter(), 0
    texts = [*(problem.problem for problem in PROBLEMS)] * 5 + ["", "1" * 600]
    while searched < 20 * soak:
        engine, chance = random_engine(rng, models), Misfortune(rng, met)
        ref = essence(engine.search(PROBLEMS[1], make_method("cot", max_steps=4))[0])
        for _ in range(10):
            given = [Problem(id=f"p{i}", problem=rng.choice(texts), answer="1") for i in range(rng.randrange(1, 7))]
            searched += len(given)
            engine.config = replace(engine.config, timeout=rng.choice([None, None, None, 0.01]))
            told, most = list[str](), rng.choice([1, 2, 99, 99])
            failed = rng.choice([None, lambda _, error, told=told: told.append(str(error))])
            method = random_method(rng, engine.scorer is not None)
            line = rng.randrange(30_000) if chance.strikes("any line", 0.03) else None
            try:
                with monkeypatch.context() as only, interrupted_at(line) if line is not None else nullcontext():
                    chance.befall(engine, only)
                    stream = engine.stream(given, method, seed=searched, failed=failed)
                    results = list(islice(stream, most))
                    met["closed"] += most < len(given)
                    stream.close()
            except (Exception, KeyboardInterrupt) as error:
                assert failed is None or isinstance(error, KeyboardInterrupt) or "device is lost" in str(error), repr(error)
                met["raised"] += 1
            else:
                met["done"] += len(results)
                assert most < 99 or len(results) + len(told) == len(given)
            met["timed out"] += sum("timed out" in reason for reason in told)
            met["told"] += len(told)
            assert_at_rest(engine, interrupted=line is not None)
        engine.config = replace(engine.config, timeout=None)
        again = essence(engine.search(PROBLEMS[1], make_method("cot", max_steps=4))[0])
        assert again == ref or not engine.config.deterministic
    print(f"{searched} searches: {dict(met)}")
    assert soak < 100 or min(met.values()) > 0


# What is refused, in one sentence, before anything is computed.


@pytest.mark.parametrize(
    ("problems", "complaint"),
    [
        ("", "problem problem-1 is empty"),
        (["1+1?", " \n"], "problem problem-2 is empty"),
        ([Problem(id="a", problem="1+1?", answer=None)] * 2, "two problems have the same id"),
        (["1+1?", "1" * 600], "problem problem-2 has a prompt of 601 tokens and the policy 512 positions"),
    ],
    ids=["empty", "blank", "same id", "too long"],
)
def test_a_problem_that_cannot_be_searched_is_refused_before_any_compute(models, problems, complaint):
    engine = load(models)
    with pytest.raises(EngineError, match=complaint) as refused:
        engine.stream(problems, STEP_METHODS[0])
    assert "\n" not in str(refused.value)
    assert engine.ticks == 0


def test_a_method_that_scores_needs_a_prm(models):
    with pytest.raises(EngineError, match="beam needs a PRM and this engine has none: give prm="):
        load(models, None).search("1+1?", STEP_METHODS[1])


def test_a_search_that_can_never_fit_is_refused_with_the_numbers(models):
    """The policy may need 23 blocks for p2, and the PRM 25."""
    engine = load(models, kv_bytes=tiny_pool(models, 23))
    with pytest.raises(OutOfBlocks, match="problem p2 .* 23 for the policy and 25 for the PRM .*; raise kv_bytes or memory"):
        engine.search(PROBLEMS[1:3], STEP_METHODS[1])
    assert engine.ticks == 0
    assert_at_rest(engine)


@pytest.mark.parametrize("positions", [80, 110])
def test_a_solution_ends_where_the_prm_has_no_positions_left(models, tmp_path, positions):
    random_prm_directory(tmp_path / "short", "qwen2.5-math-prm", seed=2, max_position_embeddings=positions)
    method = make_method("best_of_n", n=4, max_steps=5)
    with Engine.from_pretrained(models / "policy", tmp_path / "short", **LIMITS) as engine:
        spec = engine.scorer.spec
        results = engine.search(PROBLEMS[:4], method)
    longest = 0
    for result in results:
        for branch in result.branches:
            length = len(spec.render(result.problem.problem, [step.text for step in branch.steps])[0])
            assert None not in branch.scores and length <= positions
            longest = max(longest, length)
    assert longest > positions / 2


def test_a_problem_that_fills_the_prm_alone_is_refused(models, tmp_path):
    random_prm_directory(tmp_path / "short", "math-shepherd", seed=2, max_position_embeddings=24)
    with Engine.from_pretrained(models / "policy", tmp_path / "short", **LIMITS) as engine:
        with pytest.raises(EngineError, match="problem p0 takes 12 tokens .* the PRM's 24 positions leave no room"):
            engine.search(PROBLEMS[:1], make_method("best_of_n", n=2, max_steps=5))
        assert engine.search(PROBLEMS[:1], make_method("majority", n=2, max_steps=5))


def test_memory_is_for_weights_and_workspace_and_what_is_left_for_keys_and_values(models):
    specs = [runner.decoder.spec for runner in load(models).runners]
    fixed = {name: LIMITS[name] for name in ("max_step_tokens", "max_tokens", "block_size")} | {"max_rows": 64}
    config = EngineConfig(memory="1GB", **fixed)
    left = kv_room(config, specs)
    taken = workspace(config, specs) + sum(weight_bytes(spec, torch.float32) for spec in specs)
    assert config.kv_bytes is None and left == 10**9 - taken > 0 and taken > 64 * specs[0].vocab_size * 4
    with Engine.from_pretrained(models / "policy", models / "qwen2.5-math-prm", memory=taken + (1 << 20), **fixed) as engine:
        held = [runner.cache.num_bytes for runner in engine.runners]
        assert 0 <= (1 << 20) - sum(held) < sum(runner.block_bytes for runner in engine.runners)
    assert kv_room(EngineConfig(memory="50%", **fixed), specs) > kv_room(EngineConfig(memory="25%", **fixed), specs)
    with pytest.raises(EngineError, match=r"memory=1000 is too little: weights take 0\.00 GB and the workspace"):
        Engine.from_pretrained(models / "policy", memory=1000)
    with pytest.raises(EngineError, match=f"memory={taken + 100} leaves 100 bytes for keys and values, which holds no block of 4"):
        Engine.from_pretrained(models / "policy", models / "qwen2.5-math-prm", memory=taken + 100, **fixed)


def test_a_pool_without_a_single_block_is_refused(models):
    with pytest.raises(EngineError, match="kv_bytes=100 holds no block"):
        load(models, kv_bytes=100)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [({"dtype": "int3"}, "no dtype 'int3'"), ({"dtype": "int8", "device": "cuda"}, "int8 runs on a CPU only, not on cuda"),
     ({"dtype": "fp8"}, "dtype fp8 runs on a GPU only, not on cpu: use bfloat16 or int8"),
     ({"memory": "1GB"}, "memory and kv_bytes both say"), ({"memory": "most", "kv_bytes": None}, "memory='most' is neither a size"),
     ({"max_rows": 0}, "max_rows=0"), ({"backend": "fast"}, "fast"),
     ({"deterministic": True, "backend": "per_branch"}, "not batch-invariant"), ({"rows": 3}, "rows")],
    ids=str,
)  # fmt: skip
def test_senseless_settings_are_refused_in_one_sentence(models, setting, complaint):
    with pytest.raises(EngineError, match=complaint):
        load(models, **setting)


def test_a_reward_model_cannot_be_the_policy_nor_a_policy_the_prm(models):
    with pytest.raises(EngineError, match="cannot write"):
        Engine.from_pretrained(models / "qwen2.5-math-prm")
    with pytest.raises(EngineError, match="cannot be recognised as a PRM"):
        Engine.from_pretrained(models / "policy", models / "policy")


def test_the_default_settings_are_valid_and_frozen():
    config = EngineConfig()
    assert config.dtype == "float32" and EngineConfig(device="cuda:1").dtype == "bfloat16"
    assert EngineConfig(device="cuda", dtype="fp8").dtype == "fp8" and EngineConfig(dtype="int8").dtype == "int8"
    for deterministic in (False, True):
        assert EngineConfig(deterministic=deterministic).attention == "native"
        assert EngineConfig(device="cuda", deterministic=deterministic).attention == "triton_tree"
    with pytest.raises(AttributeError):
        config.dtype = "bfloat16"


# What is counted.


def begun(nodes):
    """Tokens that were read while steps were drawn: of each all but the last, and of those that begin alike that once."""
    paths = [tuple(step.tokens for step in node.path) for node in nodes]
    return len({(*path[:-1], path[-1][:count]) for path in paths for count in range(1, len(path[-1]))})


def test_a_prompt_and_every_distinct_token_are_computed_once(models):
    """Best-of-16: the prompt once; each step but a trajectory's last in full, of the last all but its last token; and where steps
    begin alike, that once. PRM: all once."""
    engine = load(models)
    (result,) = engine.search(PROBLEMS[0], make_method("best_of_n", n=16, max_steps=5), seed=1)
    nodes, ledger, prompt = result.nodes, result.ledger, len(result.branches[0].path[0].tokens)
    paths = {tuple(step.tokens for step in node.path): node for node in nodes}
    assert len(paths) == len(nodes)  # no two draws came out equal
    assert ledger.policy.tokens_generated == sum(len(node.tokens) for node in nodes)
    drawn = begun(nodes) + sum(not node.finished for node in nodes)
    assert ledger.policy.tokens_computed == prompt + drawn < prompt + sum(len(node.tokens) - node.finished for node in nodes)
    assert ledger.policy.tokens_recomputed == ledger.prm.tokens_recomputed == 0
    assert ledger.policy.tokens_unshared == sum(prompt + branch.num_tokens for branch in result.branches)
    assert ledger.policy.head_flops == 2 * 60 * 32 * (1 + drawn)

    spec = engine.scorer.spec
    opening = len(spec.opening(PROBLEMS[0].problem))
    read = {tuple(step.text.strip() for step in node.steps): len(spec.step(node.text, node.depth == 1)) for node in nodes}
    assert ledger.prm.tokens_computed == opening + sum(read.values())
    assert ledger.prm.steps_scored == len(nodes)
    assert ledger.prm.tokens_reread == sum(len(spec.render(PROBLEMS[0].problem, [s.text for s in n.steps])[0]) for n in nodes)


def test_a_step_shared_by_children_is_computed_once_in_beam_search(models):
    engine = load(models)
    (result,) = engine.search(PROBLEMS[0], STEP_METHODS[1], seed=3)
    nodes, prompt = result.nodes, len(result.branches[0].path[0].tokens)
    expanded = {node.parent.identity for node in nodes}
    computed = prompt + begun(nodes) + len(expanded) - 1
    assert max(Counter(node.parent.identity for node in nodes if node.depth > 1).values()) >= 4
    assert result.ledger.policy.tokens_computed == computed
    leaves = [node for node in nodes if node.identity not in expanded]
    assert result.ledger.policy.tokens_unshared == sum(prompt + leaf.num_tokens for leaf in leaves) > computed


@pytest.mark.parametrize("method", [make_method("beam", n=8, max_steps=5, rules="reference"), *STEP_METHODS])
def test_the_prm_reads_each_distinct_step_that_is_scored_once_and_no_other(models, monkeypatch, method):
    monkeypatch.setattr(scorer_room, "BATCH_TOKENS", 30)  # most are read before they are asked for
    engine = load(models)
    (result,) = engine.search(PROBLEMS[0], method, seed=3)
    spec, problem = engine.scorer.spec, PROBLEMS[0].problem
    scored = {tuple(step.text for step in node.steps) for node in result.nodes if node.score is not None}
    read = {path[:depth] for path in scored for depth in range(1, len(path) + 1)}
    own = sum(len(spec.step(path[-1], len(path) == 1)) for path in read)
    assert result.ledger.prm.tokens_computed == len(spec.opening(problem)) + own
    dropped = [node for node in result.nodes if node.score is None]
    assert bool(dropped) == method.rules.drop_truncated


def test_cot_is_greedy_one_branch_and_needs_no_prm(models):
    engine = load(models, None)
    (result,) = engine.search(PROBLEMS[0], make_method("cot", max_steps=5))
    (other,) = engine.search(PROBLEMS[0], make_method("cot", max_steps=5), seed=9)
    assert len(result.branches) == 1
    assert result.branches[0].solution == other.branches[0].solution
    assert result.ledger.prm.tokens_computed == 0 and result.aggregates.keys() == {"majority"}
    assert result.branches[0].scores == (None,) * result.branches[0].depth


# What comes back.


@pytest.fixture(scope="module")
def answering(models):
    """An engine whose policy says "\\boxed{" for j, "}" for k and a digit for most other letters."""
    engine = load(models)
    said = [*engine.policy.rule.token_bytes]
    for i, piece in enumerate(said):
        if len(piece) == 1 and piece.isalpha():
            said[i] = {b"j": b"\\boxed{", b"k": b"}", b"m": b"\\boxed{1}"}.get(piece, b"%d" % (i % 2 + 1))
    engine.policy.rule = MarkedSteps(said, np.flatnonzero(engine.policy.rule.eos), len(said))
    return engine


@by_name
def test_answers_are_extracted_grouped_and_voted(answering, method):
    results = answering.search(PROBLEMS[:4], method, seed=2)
    assert any(result.answer is not None for result in results)
    for result in results:
        assert len(result.branches) == len(result.answers) == len(result.groups) > 0
        assert len(result.aggregates) == 7
        assert result.answer == result.aggregates["last_vote"]
        assert all(branch.finished and branch.score is not None for branch in result.branches)
        assert {branch.identity for branch in result.branches} <= {node.identity for node in result.nodes}
        if result.answer is not None:
            behind = [b.score for b, group in zip(result.branches, result.groups, strict=True) if group == result.answer]
            assert result.chosen.score == max(behind)
            votes = Counter()
            for branch, group in zip(result.branches, result.groups, strict=True):
                votes[group] += branch.score * (group is not None)
            assert votes[result.answer] == pytest.approx(max(votes.values()))


def test_a_closed_step_with_a_boxed_answer_ends_its_branch(answering):
    finishes = Counter()
    for result in answering.search(PROBLEMS, STEP_METHODS[0], seed=2):
        for node in result.nodes:
            finishes[node.finish] += 1
            if node.finish is Finish.ANSWER:
                assert "\\boxed{" in node.text and "\n\n" in node.text
    assert finishes[Finish.ANSWER] and finishes[Finish.EOS] and finishes[None]


def test_nodes_hold_the_score_of_every_step_that_was_read(models):
    for method in STEP_METHODS:
        (result,) = load(models).search(PROBLEMS[0], method, seed=3)
        assert all(node.score is not None and node.depth >= 1 for node in result.nodes)
        assert len({node.identity for node in result.nodes}) == len(result.nodes)
        on_paths = {step.identity: step for branch in result.branches for step in branch.steps}
        recorded = {node.identity: node for node in result.nodes}
        assert all(recorded[identity] is step for identity, step in on_paths.items())


def test_the_library_prints_and_logs_nothing(models, capfd, caplog):
    with caplog.at_level(logging.DEBUG), load(models) as engine:
        engine.search(PROBLEMS[:2], STEP_METHODS[1])
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert not [record for record in caplog.records if record.name.startswith("tts_engine")]
