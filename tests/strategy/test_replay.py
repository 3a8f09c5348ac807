"""Replays against direct runs of the models that ship: the same tree, choice and cost, bit for bit."""

from dataclasses import asdict

import pytest

from tts_engine.embedded import BLOCK_SIZE, MODELS, model_path
from tts_engine.engine import Engine
from tts_engine.search import METHODS, make_method
from tts_engine.strategy import StrategyError
from tts_engine.strategy.replay import refuse_unless_exact, replay
from tts_engine.tasks.problems import load_task

PROBLEMS = 4
SEED = 3
EXECUTED = ("tokens_computed", "linear_flops", "attention_flops", "head_flops")

pytestmark = pytest.mark.skipif(not (MODELS / "policy-s").is_dir(), reason="needs the embedded models: tts-engine embedded train")


@pytest.fixture(scope="module")
def engine():
    models = [model_path(name) for name in ("policy-s", "prm-good")]
    with Engine.from_pretrained(*models, block_size=BLOCK_SIZE, kv_bytes=16 << 20, deterministic=True) as engine:
        yield engine


def alone(engine, problem, method):
    """A search that shares nothing with others."""
    engine.forget()
    [result] = engine.search(problem, method, seed=SEED)
    return result


def tree(result):
    return {(n.identity, n.parent.identity, n.tokens, n.score, n.finish, n.lane, n.draw) for n in result.nodes}


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ("best_of_n", [("best_of_n", 4), ("best_of_n", 1), ("majority", 4)]),
        ("majority", [("majority", 5), ("adaptive", 16), ("adaptive", 6)]),
        ("dvts", [("dvts", 8), ("dvts", 4)]),
    ],
)
def test_a_replay_is_the_direct_run(engine, made, wanted):
    large = make_method(made, n=16)
    for problem in load_task("embedded", "calibration", PROBLEMS):
        whole = alone(engine, problem, large)
        for name, n in wanted:
            method = make_method(name, n=n)
            out = replay(problem, whole.nodes, large, method, seed=SEED, engine=engine)
            ref = alone(engine, problem, method)
            assert tree(out) == tree(ref) and len(out.nodes) == len(ref.nodes)
            assert [b.identity for b in out.branches] == [b.identity for b in ref.branches]
            assert (out.answer, out.answers, out.groups, out.aggregates) == (ref.answer, ref.answers, ref.groups, ref.aggregates)
            for ours, theirs in ((out.ledger.policy, ref.ledger.policy), (out.ledger.prm, ref.ledger.prm)):
                for part, count in asdict(theirs).items():
                    if part not in ("padding_flops", "rereading_flops", "duplicate_flops", *EXECUTED):
                        assert getattr(ours, part) == count, part
                # What a direct run executes beyond that it says itself: rows beside those asked for, ends of steps read again, and
                # steps that are drawn at different times and come out equal.
                assert ours.flops == ours.useful_flops == theirs.useful_flops
                if name == "adaptive":  # which reads the end of the prompt again for every batch
                    continue
                assert all(getattr(ours, part) <= getattr(theirs, part) for part in EXECUTED)
                if made != "dvts" and theirs is ref.ledger.policy:
                    assert theirs.rereading_flops == theirs.duplicate_flops == 0
                    assert all(getattr(ours, part) == getattr(theirs, part) for part in EXECUTED)
            assert out.method == method and out.seed == SEED and out.choice is None


def test_rules_of_other_presets_are_replayed_too(engine):
    [problem] = load_task("embedded", "calibration", 1)
    for rules in ("reference", "sal"):
        large, method = (make_method("dvts", n=n, rules=rules) for n in (12, 8))
        out = replay(problem, alone(engine, problem, large).nodes, large, method, seed=SEED, engine=engine)
        ref = alone(engine, problem, method)
        assert tree(out) == tree(ref) and out.aggregates == ref.aggregates and out.groups == ref.groups


@pytest.mark.parametrize(
    ("made", "wanted", "words"),
    [
        (make_method("beam", n=16), make_method("beam", n=4), "beam cannot be replayed: what it draws depends on all n candidates"),
        (make_method("rebase", n=16), make_method("rebase", n=4), "rebase cannot be replayed"),
        (make_method("majority", n=16), make_method("cot"), "cot cannot be replayed"),
        (make_method("majority", n=16), make_method("best_of_n", n=4), "best_of_n cannot be replayed from a run of majority"),
        (make_method("dvts", n=16), make_method("majority", n=4), "from a run of dvts, only of majority or best_of_n"),
        (make_method("dvts", n=4), make_method("dvts", n=8), "dvts n=8 cannot be replayed from n=4: only a smaller budget can"),
        (make_method("dvts", n=16), make_method("dvts", n=8, width=2), "dvts with width=2 cannot be replayed"),
        (make_method("majority", n=8, temperature=0.5), make_method("majority", n=4), "majority with rules="),
        (make_method("majority", n=8), make_method("majority", n=4, max_steps=9), "with max_steps=9"),
        (make_method("majority", n=8), make_method("adaptive", n=8, vote="last_vote"), "of majority, which scored nothing"),
        (make_method("best_of_n", n=8), make_method("adaptive", n=8, budget="60s"), "what one problem is given depends on others"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused(made, wanted, words):
    with pytest.raises(StrategyError) as refusal:
        refuse_unless_exact(made, wanted)
    assert words in str(refusal.value) and str(refusal.value).count("\n") == 0


def test_trees_that_another_prm_read_are_replayed_where_nobody_was_guided():
    large, small = (make_method("dvts", n=n) for n in (8, 4))
    with pytest.raises(StrategyError, match="rescored run"):
        refuse_unless_exact(large, small, rescored=True)
    refuse_unless_exact(make_method("best_of_n", n=8), make_method("best_of_n", n=4), rescored=True)


def test_every_method_is_exact_or_refused_by_name():
    for name in METHODS:
        method = make_method(name) if name == "cot" else make_method(name, n=4)
        if name in ("majority", "best_of_n", "dvts"):
            refuse_unless_exact(method, method)
        elif name == "adaptive":
            refuse_unless_exact(make_method("majority", n=4), method)
        else:
            with pytest.raises(StrategyError, match=f"{name} cannot be replayed"):
                refuse_unless_exact(method, method)


def test_a_tree_that_lacks_a_draw_is_refused(engine):
    [problem] = load_task("embedded", "calibration", 1)
    method = make_method("best_of_n", n=2)
    nodes = alone(engine, problem, method).nodes
    for missing, words in ((nodes[1:], "a draw is not in its tree"), ([], "it could not be searched")):
        with pytest.raises(StrategyError, match=words):
            replay(problem, missing, method, method, seed=SEED, engine=engine)
