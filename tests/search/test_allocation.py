import pytest

from tts_engine.ledger import Ledger, PolicyLedger, PRMLedger
from tts_engine.search import MethodError
from tts_engine.search.allocation import Allocation, Budget, Cost, Standing, executed, read_budget


def standing(id, doubt, flops=100, drawn=4, draws=4):
    return Standing(id, doubt, drawn, draws, Cost(tokens=flops // 10, flops=flops))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("50000tokens", Budget(50000, "tokens")),
        ("2e9flops", Budget(2e9, "flops")),
        ("2.5e+9flops", Budget(2.5e9, "flops")),
        ("60s", Budget(60, "s")),
        ("0.5s", Budget(0.5, "s")),
    ],
)
def test_budgets_as_they_are_written(text, budget):
    assert read_budget(text) == budget


@pytest.mark.parametrize("text", ["", "s", "60", "60 s", "0s", "-1s", "nans", "infs", "1e999flops", "1e9FLOPS", "٣s", "60s\n", 60])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(MethodError, match="budget must be a number above 0 of tokens, flops or s"):
        read_budget(text)


def test_what_was_executed_is_told_in_the_unit_of_the_budget():
    ledger = Ledger(policy=PolicyLedger(tokens_computed=5, linear_flops=70, padding_flops=7), prm=PRMLedger(tokens_computed=4))
    ledger.seconds = 1.5
    assert [executed(Budget(1, unit), ledger) for unit in ("tokens", "flops", "s")] == [9, 77, 1.5]


def test_who_goes_on_is_in_most_doubt_for_its_cost():
    ask = [standing("sure", 0.1), standing("torn", 0.5), standing("dear", 0.5, flops=1000), standing("cheap", 0.2, flops=10)]
    assert Allocation(Budget(1e9, "flops")).grants(ask) == {"cheap"}
    assert Allocation(Budget(1e9, "flops")).grants(ask, part=2) == {"cheap", "torn"}
    assert Allocation(Budget(1e9, "flops")).grants(ask[::-1], part=1) == {"cheap", "torn", "sure", "dear"}
    assert Allocation(Budget(1e9, "flops")).grants([standing("b", 0.5), standing("a", 0.5)]) == {"a"}


def test_nobody_is_given_what_is_not_left():
    ask = [standing("a", 0.5), standing("b", 0.4, draws=2), standing("c", 0.3, flops=40)]  # have cost 240, would cost 100, 50, 40
    for left, granted in [(0, set()), (39, set()), (45, {"c"}), (60, {"b"}), (100, {"b", "c"}), (190, {"a", "b", "c"})]:
        assert Allocation(Budget(240 + left, "flops")).grants(ask, part=1) == granted, left
    allocation = Allocation(Budget(24 + 60, "tokens"))
    assert allocation.grants(ask, part=1) == {"a", "b", "c"}
    allocation.end(Cost(tokens=60, flops=0))
    assert allocation.grants(ask, part=1) == set()


def test_seconds_are_those_that_a_flop_has_taken_so_far():
    now = [100.0]
    allocation = Allocation(Budget(60, "s"), clock=lambda: now[0])
    allocation.end(Cost(tokens=0, flops=100))
    now[0] += 40  # 400 FLOPs until now
    ask = [standing("a", 0.5, flops=100), standing("b", 0.4, flops=200)]
    assert allocation.grants(ask, part=1) == {"a"}
    now[0] += 21
    assert allocation.grants(ask, part=1) == set()
