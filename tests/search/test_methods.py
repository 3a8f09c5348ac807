"""What holds for every method: how they are made, and what no script may make them do."""

import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tts_engine.branch import Branch, root_branch
from tts_engine.errors import EngineError
from tts_engine.search import METHODS, PRESETS, SAL, BeamSearch, Cot, Driver, Dvts, MethodError, make_method
from tts_engine.testing import play_method, random_policy, random_prm

UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)  # a smaller seed is no simpler script


def every_method(rules="paper", n=8, **settings):
    for name, method in METHODS.items():
        own = {field.name for field in fields(method)}
        yield make_method(name, **{k: v for k, v in {"rules": rules, "n": n, **settings}.items() if k in own})


def test_importing_the_methods_does_not_import_torch():
    code = "import sys, tts_engine.search; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_methods_are_known_by_their_own_names():
    assert list(METHODS) == ["cot", "majority", "best_of_n", "beam", "dvts", "rebase", "adaptive"]
    assert all(method.name == name for name, method in METHODS.items())
    assert [method.name for method in every_method() if not method.uses_prm] == ["cot", "majority", "adaptive"]
    assert all(method.vote == ("last_vote" if method.uses_prm else "majority") for method in every_method())


def test_a_method_prints_compares_and_cannot_be_changed():
    method = make_method("beam", n=16, width=4)
    assert method == BeamSearch(n=16) and hash(method) == hash(BeamSearch(n=16))
    assert repr(method).startswith("BeamSearch(n=16, width=4, rules=Rules(")
    with pytest.raises(FrozenInstanceError):
        method.n = 4


def test_temperature_comes_from_the_rules_and_chain_of_thought_is_greedy():
    for name, ref in [("paper", 0.7), ("reference", 0.7), ("sal", 0.8)]:
        assert {m.temperature for m in every_method(name) if m != Cot()} == {ref}
    assert Cot().temperature == 0.0
    assert make_method("dvts", n=8, rules=SAL, temperature=0.6).temperature == 0.6


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("beams", {}, "no method 'beams'; known: cot, majority, best_of_n, beam, dvts, rebase, adaptive"),
        ("beam", {"n": 4, "widht": 4}, "beam has no setting 'widht'; known: n, width, rules, max_steps, finished, "),
        ("cot", {"n": 4}, "cot has no setting 'n'; known: max_steps"),
        ("dvts", {}, "dvts needs n"),
        ("majority", {"n": 0}, "n must be a whole number of at least 1, not 0"),
        ("best_of_n", {"n": "4"}, "n must be a whole number of at least 1, not '4'"),
        ("best_of_n", {"n": True}, "n must be a whole number of at least 1, not True"),
        ("cot", {"max_steps": 0}, "max_steps must be a whole number of at least 1, not 0"),
        ("dvts", {"n": 6}, "n=6 must be a multiple of width=4: survivors are n // width"),
        ("majority", {"n": 4, "budget": "60s"}, "majority has no setting 'budget'; known: n, rules, max_steps, finished, "),
        ("adaptive", {"n": 4, "vote": "prm"}, "no vote 'prm'; known: majority, last_max, last_vote, min_max, min_vote, mean_max, "),
        ("adaptive", {"n": 4, "bound": 1}, "bound must be a number of at least 0 and below 1, not 1"),
        ("adaptive", {"n": 4, "bound": float("nan")}, "bound must be a number of at least 0 and below 1, not nan"),
        ("adaptive", {"n": 4, "batch": 0}, "batch must be a whole number of at least 1, not 0"),
        ("adaptive", {"n": 4, "budget": "60 minutes"}, "budget must be a number above 0 of tokens, flops or s, such as "),
        ("beam", {"n": 4, "rules": "snell"}, "no rules 'snell'; known: paper, reference, sal"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(name, given, sentence):
    with pytest.raises(MethodError) as error:
        make_method(name, **given)
    assert str(error.value).startswith(sentence)
    assert isinstance(error.value, EngineError) and isinstance(error.value, ValueError)


def test_rules_given_by_name_to_a_method_itself_are_refused():
    with pytest.raises(MethodError, match="rules must be a Rules value"):
        Dvts(n=4, rules="sal")


@settings(max_examples=25, deadline=None, phases=UNSHRUNK)
@given(
    seed=st.integers(0, 2**32),
    n=st.sampled_from([2, 4, 8, 12]),
    width=st.sampled_from([1, 2]),
    rules=st.sampled_from(sorted(PRESETS)),
    p_finish=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    max_steps=st.integers(1, 6),
)
def test_every_method_ends_within_its_budget_under_any_script(seed, n, width, rules, p_finish, max_steps):
    for method in every_method(rules, n, width=width, max_steps=max_steps):
        policy, prm = random_policy(seed, p_finish), random_prm(seed)
        result, rounds = play_method(method, policy, prm)
        drawn = [draw for r in rounds for expanded in r for draw in expanded.draws]
        assert len(rounds) <= (max_steps if method.name != "adaptive" else n)
        assert all(sum(len(expanded.draws) for expanded in r) <= method.n for r in rounds)
        assert not any(draw.branch.finished for draw in drawn)
        assert len({draw.identity for draw in drawn}) == len(drawn)
        assert result and all(branch.parent is not None and branch.depth <= max_steps for branch in result)
        if not (method.name == "dvts" and rules == "sal"):  # there unfinished siblings are voted too
            assert all(branch.finished for branch in result)
        if method.uses_prm:
            assert all(None not in branch.scores for branch in result)
        again, _ = play_method(method, policy, prm, newest_first=True)
        assert [branch.identity for branch in again] == [branch.identity for branch in result]


@settings(max_examples=15, deadline=None, phases=UNSHRUNK)
@given(seed=st.integers(0, 2**32), n=st.sampled_from([4, 8, 16]), rules=st.sampled_from(sorted(PRESETS)))
def test_how_many_branches_are_voted(seed, n, rules):
    for method in every_method(rules, n):
        voted = len(play_method(method, random_policy(seed), random_prm(seed))[0])
        if method.name in ("majority", "best_of_n"):
            assert voted == n
        elif method.name == "adaptive":
            assert min(n, 4) <= voted <= n
        elif method.name in ("beam", "dvts") and rules == "sal":
            assert voted == n
        elif method.name in ("beam", "dvts") and rules == "reference":
            assert 1 <= voted <= n // method.width
        elif method.name in ("beam", "dvts"):
            assert voted >= n // method.width
        elif method.name == "rebase":
            assert 1 <= voted <= n


@pytest.mark.parametrize("rules", ["paper", "sal", {"finished": "hold"}], ids=str)
@pytest.mark.parametrize("name", ["beam", "dvts", "rebase"])
def test_who_is_kept_of_a_round_that_is_read_is_who_is_expanded_next(name, rules):
    settings = {"rules": rules} if isinstance(rules, str) else rules
    policy, prm, checked = random_policy(5, letters="abcdefghijklmnop"), random_prm(5, levels=1000), 0
    method = make_method(name, n=16, max_steps=6, **settings)
    driver, foreseen = Driver(method.program(root_branch(()))), {}
    while not driver.done:
        for ask in driver.asks():
            if ask.kind == "score":
                driver.answer(ask, [replace(branch, score=prm(branch)) for branch in ask.branches])
                continue
            if ask.draws[0].lane in foreseen:
                ahead, asked = foreseen.pop(ask.draws[0].lane), [draw.identity for draw in ask.draws]
                assert ahead and set(ahead) <= set(asked) and (len(ahead) == len(asked) or method.rules.finished == "refill")
                checked += 1
            steps = [policy(draw) for draw in ask.draws]
            children = [Branch(draw.branch, (1,), text, draw.identity, draw.lane, draw.draw, finish)
                        for draw, (text, finish) in zip(ask.draws, steps, strict=True)]  # fmt: skip
            for child in children:
                driver.close_step(ask, child)
            ask.round.look(prm)
            foreseen[ask.round.lane] = [draw.identity for child, count in Counter(ask.round.entries).items()
                                        for draw in driver.foreseen(child, ask.round.lane, count)]  # fmt: skip
            driver.answer(ask, children)
    assert checked > 3 and not any(foreseen.values())
