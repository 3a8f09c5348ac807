"""A method chosen problem by problem, on tiny random models: the chosen search is the direct one, the pilot nobody else's."""

import json
from dataclasses import asdict, replace

import pytest

from tts_engine.config import EngineConfig
from tts_engine.engine import Engine
from tts_engine.errors import EngineError, OutOfBlocks, RunError
from tts_engine.runs import Run, describe_model, describe_run, evaluate
from tts_engine.score import score
from tts_engine.search import make_method
from tts_engine.strategy import StrategyError
from tts_engine.strategy.auto import Auto, Pilot, make_auto, table_for
from tts_engine.strategy.choose import Model, Pick, Strategy, Table, load_strategy
from tts_engine.strategy.difficulty import absolute_bins
from tts_engine.strategy.predictor import Predictor
from tts_engine.tasks.grader import Grader
from tts_engine.tasks.problems import Problem
from tts_engine.testing import random_policy_directory, random_prm_directory

SETTINGS = {"max_step_tokens": 16, "max_tokens": 60, "block_size": 4, "kv_bytes": 4 << 20, "deterministic": True}
PROBLEMS = [Problem(id=f"p{i}", problem=text, answer="7") for i, text in enumerate(
    ["a=3;b=a+4;b?", "1+1?", "x=9;y=x*2;z=y-1;z?", "q?", "c=12;d=c/3;d?", "a=3;b=a+4;a?"])]  # fmt: skip
SEED = 3
METHODS = {name: make_method(name, n=4, max_steps=5) for name in ("best_of_n", "dvts", "majority")}
BINS = dict(zip(("easy", "medium", "hard"), METHODS.values(), strict=True))


def described(method):
    return json.loads(json.dumps({"name": method.name, **asdict(method)}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    random_policy_directory(directory / "policy", seed=23, leans={"<|endoftext|>": 0.0})
    random_prm_directory(directory / "prm", "qwen2.5-math-prm", seed=2)
    return directory


@pytest.fixture(scope="module")
def engine(models):
    with Engine.from_pretrained(models / "policy", models / "prm", **SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def strategy(engine, models):
    """By the mean over three draws of their lowest scores, with cuts that put some problems into each bin."""
    pilot = make_method("best_of_n", n=3, max_steps=5)
    means = []
    for result in engine.search(PROBLEMS, Pilot(draws=pilot), seed=SEED):
        means.append(sum(min(branch.scores) for branch in result.branches) / 3)
    low, high = sorted(means)[1:5:2]
    lean = 1e4  # so sure that the cuts decide
    predictor = Predictor(features=("prm_mean",), draws=3, centres=(0.0,), scales=(1.0,), weights=(lean,),
                          thresholds=(-lean * (high + 1e-4), -lean * (low + 1e-4)))  # fmt: skip
    of = {name: describe_model(models / name) for name in ("policy", "prm")}
    table = Table(
        **{name: Model(**{key: made[key] for key in ("name", "parameters", "sha256")}) for name, made in of.items()},
        bins=absolute_bins(), pilot=described(pilot), predictor=predictor,
        picks=tuple(Pick(bin=bin, n=4, method=described(method)) for bin, method in BINS.items()),
    )  # fmt: skip
    return Strategy(schema_version=1, name="mine", source="a test", tables=(table,))


@pytest.fixture
def auto(strategy, models):
    return make_auto(strategy, n=4, policy=models / "policy", prm=models / "prm")


def alone(engine, problem, method):
    engine.forget()
    [result] = engine.search(problem, method, seed=SEED)
    return result


def tree(nodes):
    return {(n.identity, n.parent.identity, n.tokens, n.score, n.finish, n.lane, n.draw) for n in nodes}


def chosen_tree(result):
    return [node for node in result.nodes if node.lane != (0, 0)]


def test_the_chosen_search_is_the_direct_one_and_the_pilot_is_paid_for(engine, auto):
    seen = set()
    for problem in PROBLEMS:
        result = alone(engine, problem, auto)
        seen.add(result.choice["bin"])
        assert result.method == BINS[result.choice["bin"]] and result.choice["by"] == "predicted"
        direct, pilot = (
            alone(engine, problem, result.method),
            alone(engine, problem, Pilot(draws=make_method("best_of_n", n=3, max_steps=5))),
        )
        assert tree(chosen_tree(result)) == tree(direct.nodes)
        assert tree(result.nodes) == tree(direct.nodes) | tree(pilot.nodes) and len(result.nodes) == len(direct.nodes) + len(
            pilot.nodes
        )
        assert [b.identity for b in result.branches] == [b.identity for b in direct.branches]
        assert (result.answer, result.aggregates, result.groups) == (direct.answer, direct.aggregates, direct.groups)
        ours, parts = result.ledger, [direct.ledger, pilot.ledger]
        for part, name in [
            ("policy", "tokens_generated"),
            ("policy", "tokens_unshared"),
            ("prm", "steps_scored"),
            ("prm", "tokens_reread"),
        ]:
            assert getattr(getattr(ours, part), name) == sum(getattr(getattr(one, part), name) for one in parts)
        assert ours.policy.tokens_generated == sum(len(node.tokens) for node in result.nodes)
        # the prompt is computed once for both, but for its last token, behind which the method's first draws are made
        prompt = len(result.nodes[0].path[0].tokens)
        assert ours.policy.tokens_computed == sum(one.policy.tokens_computed for one in parts) - (prompt - 1)
        assert max(one.flops for one in parts) < ours.flops < sum(one.flops for one in parts)
    assert seen == {"easy", "medium", "hard"}


def test_no_draw_of_the_pilot_is_one_of_a_method(engine, auto):
    for method in auto.methods:
        if method.name != "pilot":
            for result in engine.search(PROBLEMS[:2], method, seed=SEED):
                assert not {node.identity for node in result.nodes} & {
                    node.identity for node in engine.search(result.problem, auto.methods[0], seed=SEED)[0].nodes
                }


def test_alone_among_others_and_in_any_order(engine, auto):
    def essence(result):
        return tree(result.nodes), result.answer, result.choice

    apart = {problem.id: essence(alone(engine, problem, auto)) for problem in PROBLEMS}
    for problems in (PROBLEMS, PROBLEMS[::-1]):
        assert {result.problem.id: essence(result) for result in engine.search(problems, auto, seed=SEED)} == apart


def test_what_is_known_needs_no_pilot(engine, auto):
    known = {problem.id: bin for problem, bin in zip(PROBLEMS, ["hard", "easy", "medium"] * 2, strict=True)}
    told = replace(auto, known=known)
    for problem in PROBLEMS[:3]:
        result = alone(engine, problem, told)
        direct = alone(engine, problem, BINS[known[problem.id]])
        assert tree(result.nodes) == tree(direct.nodes)
        assert (result.ledger.policy, result.ledger.prm) == (direct.ledger.policy, direct.ledger.prm)
        assert result.choice == {"strategy": "mine", "n": 4, "bin": known[problem.id], "by": "known"}
    # without a predictor all must be known
    table = replace(auto.table, pilot=None, predictor=None)
    with pytest.raises(StrategyError, match="predicts nothing"):
        replace(auto, table=table)
    with pytest.raises(StrategyError, match="problem p1 is not among those whose difficulty is known"):
        engine.search(PROBLEMS[1], replace(auto, table=table, known={"p0": "easy"}))
    with pytest.raises(StrategyError, match="p0 is said to be 'odd'"):
        replace(auto, known={"p0": "odd"})


def test_one_method_for_all_needs_no_pilot(engine, auto):
    table = replace(auto.table, picks=tuple(replace(pick, method=described(METHODS["majority"])) for pick in auto.table.picks))
    same = replace(auto, table=table)
    assert same.methods == (METHODS["majority"],) and not same.uses_prm and auto.uses_prm
    result = alone(engine, PROBLEMS[0], same)
    assert tree(result.nodes) == tree(alone(engine, PROBLEMS[0], METHODS["majority"]).nodes) and result.choice["by"] == "no need"


def test_closing_a_stream_between_pilot_and_choice_leaves_nothing_behind(engine, auto):
    stream = engine.stream(PROBLEMS, auto, seed=SEED)
    next(stream)
    stream.close()
    assert all(runner.tree.counts().pinned == runner.tree.counts().filling == 0 for runner in engine.runners)
    assert not engine.policy.busy and engine.scorer.num_open == 0


def test_an_engine_without_a_prm_refuses_a_strategy_that_needs_one(models, auto):
    with Engine.from_pretrained(models / "policy", **SETTINGS) as bare, pytest.raises(EngineError, match="needs a PRM"):
        bare.search(PROBLEMS[0], auto)


def test_tables_serve_the_weights_they_were_fitted_on(strategy, models, tmp_path):
    def found(strategy=strategy, policy=models / "policy", prm=models / "prm", **how):
        return table_for(strategy, policy=policy, prm=prm, **how)

    assert found() == strategy.tables[0]
    random_policy_directory(tmp_path / "policy", seed=24)
    for asked in ({"policy": tmp_path / "policy"}, {"prm": None}, {"prm": models / "policy"}):
        with pytest.raises(StrategyError, match="the strategy mine has no table for .*; it was fitted on policy with prm"):
            found(**asked)
    paper = load_strategy("paper_table")
    assert found(paper).picks[0].method["name"] == "beam" and found(paper, task="aime24").picks[0].method["name"] == "dvts"
    assert found(paper, prm=None).policies == ()


def test_a_run_says_what_was_chosen_and_is_read_back(engine, auto, models, tmp_path, strategy):
    def description(method):
        return describe_run(policy=models / "policy", prm=models / "prm", config=EngineConfig(**SETTINGS), method=method, seed=SEED,
                            task="sums", split="test", limit=None, problems=PROBLEMS)  # fmt: skip

    long = Problem(id="p9", problem="1+" * 400 + "1?", answer="401")
    for _ in range(2):  # the second time there is nothing left to do
        with Run(tmp_path / "run", description(auto)) as run:
            evaluate(engine, [*PROBLEMS, long], auto, run, seed=SEED, finished=lambda record: None)
    assert len(run.records) == len(PROBLEMS) + 1
    made = json.loads((tmp_path / "run" / "run.json").read_text())["method"]
    assert made == {"name": "auto", "n": 4, "strategy": {"name": "mine", "sha256": strategy.sha256}, "known": None}
    for record in run.records:
        if record["id"] != "p9":
            assert record["method"] == described(BINS[record["choice"]["bin"]]) and record["choice"]["features"].keys() >= {
                "agreement"
            }
        else:
            assert "tokens" in record["error"] and "choice" not in record
    with Grader() as grader:
        assert score(tmp_path / "run", grader).changed == []
    other = replace(auto, strategy=replace(strategy, source="another"))
    with pytest.raises(RunError, match="was made with strategy.sha256="):
        Run(tmp_path / "run", description(other))


def test_a_problem_that_one_of_the_methods_could_not_fit_is_refused_before_the_pilot(models, auto):
    with Engine.from_pretrained(models / "policy", models / "prm", **SETTINGS | {"kv_bytes": 1 << 14}) as small:
        with pytest.raises(OutOfBlocks, match="raise kv_bytes"):
            small.stream(PROBLEMS, auto)


@pytest.mark.parametrize("n", [3, 8])
def test_a_budget_without_a_pick_is_refused_when_it_is_asked(strategy, models, n):
    with pytest.raises(StrategyError, match=f"n={n}; its budgets: 4"):
        Auto(strategy=strategy, table=strategy.tables[0], n=n, known={})
