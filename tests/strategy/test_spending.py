"""Against searches of the models that ship, draw by draw; and against votes written down."""

from dataclasses import replace

import pytest

from tts_engine.embedded import BLOCK_SIZE, MODELS, model_path
from tts_engine.engine import Engine
from tts_engine.errors import EngineError
from tts_engine.search import make_method
from tts_engine.search.allocation import Cost
from tts_engine.strategy import StrategyError
from tts_engine.strategy.replay import replay
from tts_engine.strategy.spending import Drawn, draws_of, read_drawn, spend
from tts_engine.tasks.problems import Problem, load_task

SEED = 5
needs_models = pytest.mark.skipif(not (MODELS / "policy-s").is_dir(), reason="needs the embedded models: tts-engine embedded train")
KINDS = {"majority": "majority", "last_vote": "best_of_n"}  # a vote, and the run of all n draws that holds it


@pytest.fixture(scope="module")
def engine():
    models = [model_path(name) for name in ("policy-s", "prm-good")]
    with Engine.from_pretrained(*models, block_size=BLOCK_SIZE, kv_bytes=16 << 20, deterministic=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def problems():
    return load_task("embedded", "calibration", 6)


@pytest.fixture(scope="module", params=KINDS)
def whole(request, engine, problems):
    """A vote, the searches of all n draws, and these as they are read."""
    results = engine.search(problems, make_method(KINDS[request.param], n=16), seed=SEED)

    def read(method):
        return [read_drawn(result.problem, result.branches, engine, method) for result in results]

    return request.param, results, read


@needs_models
def test_what_the_first_draws_cost_is_what_their_replay_does(engine, whole):
    vote, results, read = whole
    drawn = read(make_method("adaptive", n=16, vote=vote, batch=16))
    for result, one in list(zip(results, drawn, strict=True))[:3]:
        for n in (1, 7, 16):
            ref = replay(result.problem, result.nodes, result.method, replace(result.method, n=n), seed=SEED, engine=engine)
            assert one.costs[n - 1] == one.batched[n - 1]
            assert one.costs[n - 1].flops == ref.ledger.policy.ideal_flops + ref.ledger.prm.ideal_flops
            assert one.costs[n - 1].tokens == ref.ledger.policy.tokens_computed + ref.ledger.prm.tokens_computed
            assert one.groups[:n] == tuple(ref.groups)


@needs_models
@pytest.mark.parametrize("settings", [{}, {"bound": 0.2, "batch": 3}, {"budget": 0.6}, {"budget": 0.5, "bound": 0.2}], ids=str)
def test_a_search_is_given_the_draws_that_are_foreseen(engine, problems, whole, settings):
    vote, results, read = whole
    unit = "tokens" if vote == "majority" else "flops"

    def total(counts):
        return sum(getattr(one.costs[count - 1], unit) for one, count in zip(drawn, counts, strict=True))

    share = settings.get("budget")
    method = make_method("adaptive", n=16, vote=vote, **{key: own for key, own in settings.items() if key != "budget"})
    drawn = read(method)
    if share is not None:
        method = replace(method, budget=f"{share * total([16] * len(drawn)):.0f}{unit}")
    expected = draws_of(drawn, method)
    assert min(expected) < 16
    orders = [problems, problems[::-1]]  # what a budget buys does not depend on the order, nor on what runs beside what
    for given in orders if share is not None else orders[:1]:
        found = {result.problem.id: result for result in engine.search(given, method, seed=SEED)}
        assert [len(found[problem.id].branches) for problem in problems] == expected
    for large, one, count in zip(results, drawn, expected, strict=True):
        small = found[large.problem.id]
        assert [branch.tokens for branch in small.branches] == [branch.tokens for branch in large.branches[:count]]
        assert small.ledger.policy.ideal_flops + small.ledger.prm.ideal_flops == one.costs[count - 1].flops
        assert small.ledger.policy.duplicate_flops == one.batched[count - 1].flops - one.costs[count - 1].flops
        if not settings:
            assert small.answer == large.answer
            assert small.ledger.policy.tokens_generated <= large.ledger.policy.tokens_generated
    if share is not None:
        assert 0.8 * method.shared_budget.amount < total(expected) < 1.05 * method.shared_budget.amount


@needs_models
def test_a_budget_in_seconds_ends(engine, problems):
    results = engine.search(problems, make_method("adaptive", n=64, budget="0.001s"), seed=SEED)
    assert {len(result.branches) for result in results} == {4}


@needs_models
def test_a_budget_that_is_searched_is_abandoned_like_any_search(engine, problems):
    method = make_method("adaptive", n=8, budget="1e12flops")
    searching = engine.stream(problems, method, seed=SEED)
    next(searching)
    searching.close()
    assert len(engine.search(problems[:1], method, seed=SEED)[0].branches) in (4, 8)


class Always:
    """A chooser of one method."""

    name = "always"
    methods = (make_method("adaptive", n=4, budget="1s"),)

    def pilot(self, problem): ...

    def choose(self, problem, pilot): ...

    def describe(self): ...


@needs_models
def test_a_budget_is_nothing_to_choose_problem_by_problem(engine):
    with pytest.raises(EngineError, match="always chooses problem by problem, and a budget is for all problems: leave it out"):
        engine.stream("1+1?", Always())


def test_what_cannot_be_told_is_refused():
    drawn = [written("aab")]
    for method, words in [
        (make_method("adaptive", n=4), "problem p has 3 draws, and adaptive may take 4"),
        (make_method("adaptive", n=3, batch=2), "problem p was read for batches of 4, not of 2"),
        (make_method("adaptive", n=3, budget="1s"), "a budget of 1s cannot be replayed"),
        (make_method("adaptive", n=1), "nothing to save"),
    ]:
        with pytest.raises(StrategyError, match=words):
            spend(drawn, method)


@needs_models
def test_draws_that_tell_nothing_are_refused(engine, whole):
    result = whole[1][0]
    problem = result.problem
    unread = [replace(branch, score=None) for branch in result.branches]
    for given, branches, words in [
        (problem, [], "was not searched"),
        (Problem(problem.id, problem.problem, None), result.branches, "has no known answer"),
        (problem, unread, "has draws that no PRM read"),
    ]:
        with pytest.raises(EngineError, match=words):
            read_drawn(given, branches, engine, make_method("adaptive", n=4, vote="last_vote"))


def written(answers, id="p", right="a", cost=10, batch=4):
    """A problem whose draws answer this, all for one price, whenever they are made."""
    costs = tuple(Cost(tokens=cost * k, flops=cost * k) for k in range(1, len(answers) + 1))
    return Drawn(id=id, groups=tuple(answers), scores=((0.5,),) * len(answers), right=frozenset(right), costs=costs,
                 batch=batch, batched=costs)  # fmt: skip


def test_what_is_saved_and_what_is_won_at_equal_cost():
    sure = [written("aaaaaaaa", id=f"sure {i}", batch=1) for i in range(20)]
    late = [written("bbbaaaaa", id=f"late {i}", batch=1) for i in range(20)]
    told = spend(sure + late, make_method("adaptive", n=8, batch=1))
    assert told.draws == (4,) * 20 + (8,) * 20 and told.same == 1.0 and told.accuracy == 1.0
    assert told.flops == 60 and told.saved == pytest.approx(1 - 6 / 8) and told.fixed_n == pytest.approx(6)
    # After six draws b, which came first, is level with a.
    assert told.fixed_accuracy == 0.5 and told.difference == 0.5 and told.interval[0] > 0
    hasty = spend(sure + late, make_method("adaptive", n=8, batch=1, bound=0.7))
    assert hasty.same == hasty.accuracy == hasty.fixed_accuracy == 0.5 and hasty.difference == 0 and hasty.saved > told.saved


def test_draws_that_cost_more_in_batches_are_paid_for():
    at_once = tuple(Cost(tokens=cost, flops=cost) for cost in (10, 11, 12, 13))
    alike = [replace(written("aaaa", id=str(i), batch=1), costs=at_once) for i in range(3)]
    told = spend(alike, make_method("adaptive", n=4, batch=1))
    assert told.draws == (2, 2, 2) and told.flops == 20 and told.saved < 0 and told.fixed_n == 4


def test_a_budget_goes_to_the_problems_that_are_open():
    sure = [written("aaaaaaaaaaaaaaaa", id=f"sure {i}", batch=2) for i in range(12)]
    late = [written("babbaaaaaaaaaaaa", id=f"late {i}", batch=2) for i in range(12)]
    told = spend(sure + late, make_method("adaptive", n=16, batch=2, budget="1440flops"))
    assert sum(told.draws[:12]) < sum(told.draws[12:]) and told.accuracy > told.fixed_accuracy
    assert told.flops * 24 <= 1440 and told.interval[0] > 0
    assert told.fixed_n == pytest.approx(told.flops / 10)
