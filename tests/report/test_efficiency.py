"""How much less compute: by curves whose crossings are known."""

import pytest

from tts_engine.report.arms import study
from tts_engine.report.efficiency import efficiency


def arms(run_of, method, points, prm=None):
    """points: n -> solved of 100, FLOPs. What a PRM chooses solves the last ones, everything else the first."""
    order = range(100) if prm is None else range(99, -1, -1)
    runs = [run_of(method, n, [i < solved for i in order], flops, prm=prm) for n, (solved, flops) in points.items()]
    return list(study(runs, {}).arms)


MAJORITY = {4: (40, 400), 16: (60, 1600)}


@pytest.mark.parametrize(
    ("method", "estimate", "reached"),
    [
        ({4: (60, 400)}, None, True),  # has it at its first point: may have had it before
        ({4: (50, 400), 16: (60, 800)}, 2.0, True),
        ({4: (40, 100), 16: (80, 400)}, 8.0, True),  # half way, on the logarithmic axis at 200
        ({4: (40, 3200), 16: (80, 12800)}, 0.25, True),
        ({4: (40, 100), 16: (59, 400)}, None, False),
    ],
)
def test_the_factor_is_read_off_where_the_curves_have_majoritys_accuracy(run_of, method, estimate, reached):
    found = efficiency(arms(run_of, "beam", method, prm="judge"), arms(run_of, "majority", MAJORITY))
    assert found.reached == reached
    assert found.estimate == (None if estimate is None else pytest.approx(estimate))
    if estimate is not None:
        assert (found.low or 0.0) <= estimate <= (found.high or 1e9)


def test_a_baseline_that_has_it_earlier_is_charged_for_that(run_of):
    """Majority stays at 40 from n = 4 on: n = 16 bought nothing, so 400 FLOPs are what counts."""
    [cot] = arms(run_of, "cot", {1: (10, 100)})
    flat = arms(run_of, "majority", {4: (40, 400), 16: (40, 1600)})
    beam = arms(run_of, "beam", {4: (40, 200)}, prm="judge")
    assert efficiency(beam, flat, cot).estimate == pytest.approx(2.0)


def test_from_chain_of_thought_on_both_curves_are_known(run_of):
    [cot] = arms(run_of, "cot", {1: (60, 50)})
    found = efficiency(arms(run_of, "beam", {4: (90, 400)}, prm="judge"), arms(run_of, "majority", MAJORITY), cot)
    assert found.estimate == pytest.approx(1.0)  # what chain of thought has, neither takes more for


def test_an_interval_is_open_where_resamples_never_get_there(run_of):
    [cot] = arms(run_of, "cot", {1: (10, 100)})
    majority = arms(run_of, "majority", MAJORITY)
    shaky = efficiency(arms(run_of, "beam", {16: (60, 800)}, prm="judge"), majority, cot)
    assert shaky.estimate == pytest.approx(2.0) and shaky.outcome == "cannot tell"
    far = efficiency(arms(run_of, "beam", {16: (100, 400)}, prm="judge"), majority, cot)
    assert far.outcome == "less" and far.low > 1 and far.estimate > 4
    never = efficiency(arms(run_of, "beam", {16: (10, 6400)}, prm="judge"), majority, cot)
    assert never.low is None and not never.reached


def test_nothing_is_told_without_curves_or_costs(run_of):
    majority = arms(run_of, "majority", MAJORITY)
    assert efficiency([], majority) is None and efficiency(majority, []) is None
    assert efficiency(arms(run_of, "beam", {4: (50, 0)}), majority) is None
