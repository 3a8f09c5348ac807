"""What adaptive votes and shared budgets would have given, from one run of n draws a problem; and whether that beats a fixed n.

An adaptive search makes the first of the draws that a majority or best-of-N of n makes (see search/adaptive.py), so what it and
every smaller fixed n would have answered is in the larger run. Of draws made at once, whatever begins alike is computed once, see
ledger.py; what a later batch has in common with an earlier one it computes again, so in batches as many draws cost more.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from os.path import commonprefix
from typing import TYPE_CHECKING

from ..branch import Branch
from ..engine import Engine
from ..ledger import DistinctSteps
from ..policy import Policy
from ..prm.scorer import Scorer
from ..report.intervals import bootstrap
from ..results import read_answers
from ..search import Adaptive
from ..search.adaptive import Polls
from ..search.allocation import SECONDS, Allocation, Cost, Standing
from ..tasks.problems import Problem
from . import StrategyError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A problem's independent draws in their order. costs: of the first one, two, ... of them, made at once; batched: `batch` at a
    time."""

    id: str
    groups: tuple[str | None, ...]
    scores: tuple[tuple[float | None, ...], ...]
    right: frozenset[str]  # the groups whose answer is right
    costs: tuple[Cost, ...]
    batch: int
    batched: tuple[Cost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """An adaptive vote over problems, against the same vote over a fixed number of draws. Intervals are of 95 %, over problems."""

    method: Adaptive
    draws: tuple[int, ...]  # of each problem
    accuracy: float
    flops: float  # a problem, policy and PRM
    same: float  # the share of problems whose answer is that of all n draws
    saved: float  # of the FLOPs of all n draws
    saved_interval: tuple[float, float]
    # At the same FLOPs over all problems a fixed number of draws is a mixture of two neighbouring ones.
    fixed_n: float
    fixed_accuracy: float
    difference: float  # in accuracy, from that
    interval: tuple[float, float]


def read_drawn(
    problem: Problem, branches: Sequence[Branch], engine: Engine, method: Adaptive
) -> Drawn:  # fmt: skip
    """The draws of one problem of a majority or best-of-N run, whose voted branches these are in their order, for votes of this
    kind: methods that differ from it in n, bound and budget.

    engine: holds the models that drew and scored; it computes nothing, but knows what they would compute. Raises StrategyError
    where there is nothing to vote on or to compare with.
    """
    if not branches:
        raise StrategyError(f"problem {problem.id} was not searched")
    if problem.answer is None:
        raise StrategyError(f"problem {problem.id} has no known answer, so no vote on it is right or wrong")
    if method.uses_prm and (engine.scorer is None or any(None in branch.scores for branch in branches)):
        raise StrategyError(f"problem {problem.id} has draws that no PRM read, so no vote can go by its scores")
    _, groups = read_answers(branches, method.rules.grouping, engine.grader)
    read = _read_costs(problem, branches, engine.scorer) if method.uses_prm and engine.scorer is not None else repeat(Cost())
    once, batched = zip(*map(_plus, _drawn_costs(branches, engine.policy, method.batch), read), strict=True)
    return Drawn(
        id=problem.id,
        groups=tuple(groups),
        scores=tuple(branch.scores for branch in branches),
        right=frozenset(group for group in set(groups) if group and engine.grader.equal(problem.answer, group)),
        costs=once,
        batch=method.batch,
        batched=batched,
    )


def draws_of(drawn: Sequence[Drawn], method: Adaptive) -> list[int]:
    """How many of its draws each problem is given when all are searched together.

    Raises StrategyError where there are fewer draws than the method may take, and for a budget in seconds: no run tells what
    another would have had time for.
    """
    for one in drawn:
        if len(one.groups) < method.n:
            raise StrategyError(f"problem {one.id} has {len(one.groups)} draws, and {method.name} may take {method.n}")
        if one.batch != method.batch:
            raise StrategyError(f"problem {one.id} was read for batches of {one.batch}, not of {method.batch}")
    budget = method.shared_budget
    if budget is not None and budget.unit == SECONDS:
        raise StrategyError(f"a budget of {method.budget} cannot be replayed: what there is time for depends on the machine")
    polls = {one.id: Polls(method) for one in drawn}
    draws_by_id = {one.id: one for one in drawn}

    def go_on(id: str) -> None:
        one, first, count = draws_by_id[id], polls[id].drawn, polls[id].draws
        for group, scores in zip(one.groups[first : first + count], one.scores[first:], strict=False):
            polls[id].count(group, scores)

    def cost(id: str) -> Cost:
        return draws_by_id[id].costs[polls[id].drawn - 1]

    allocation = Allocation(budget) if budget is not None else None
    granted = set(polls)
    while granted:
        for id in granted:
            go_on(id)
            if allocation is not None and not polls[id].draws:
                allocation.end(cost(id))
        asking = {id: own for id, own in polls.items() if own.draws}
        granted = (
            set(asking)
            if allocation is None
            else allocation.grants([Standing(id, own.doubt, own.drawn, own.draws, cost(id)) for id, own in asking.items()])
        )
    return [own.drawn for own in polls.values()]


def spend(drawn: Sequence[Drawn], method: Adaptive, seed: int = 0) -> Spending:
    """The method over these problems, against every fixed number of draws up to n. Raises StrategyError as draws_of does."""
    import numpy as np

    if method.n < 2:
        raise StrategyError("with one draw a problem there is nothing to save")
    draws, fixed = draws_of(drawn, method), replace(method, bound=0.0, budget=None)
    leaders = [_leaders(one, fixed) for one in drawn]
    # [problems, n]: by the vote of the first k draws, and what these cost at once.
    right = np.array([[leader in one.right for leader in own] for one, own in zip(drawn, leaders, strict=True)], np.float64)
    costs = np.array([[cost.flops for cost in one.costs[: method.n]] for one in drawn], np.float64)
    places = np.arange(len(drawn)), np.array(draws) - 1
    spent = [one.batched[count - 1].flops for one, count in zip(drawn, draws, strict=True)]
    columns = np.column_stack([right[places], spent, right, costs])

    def nearest(means: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
        """The fixed number of draws below those of equal cost, and how far it is from there to the next, in [0, 1]."""
        spent, grid = means[..., 1:2], means[..., 2 + method.n :]
        below = np.clip((grid <= spent).sum(-1, keepdims=True), 1, method.n - 1) - 1
        low, high = (np.take_along_axis(grid, below + step, -1) for step in (0, 1))
        return below, np.clip((spent - low) / (high - low), 0.0, 1.0)

    def fixed_accuracy(means: "np.ndarray") -> "np.ndarray":
        below, part = nearest(means)
        low, high = (np.take_along_axis(means[..., 2:], below + step, -1) for step in (0, 1))
        return (low + part * (high - low))[..., 0]

    means = columns.mean(0)
    below, part = nearest(means)
    difference = bootstrap(columns, of=lambda means: means[..., 0] - fixed_accuracy(means), seed=seed)
    saved = bootstrap(columns, of=lambda means: 1 - means[..., 1] / means[..., -1], seed=seed)
    return Spending(
        method=method,
        draws=tuple(draws),
        accuracy=float(means[0]),
        flops=float(means[1]),
        same=sum(own[count - 1] == own[-1] for own, count in zip(leaders, draws, strict=True)) / len(drawn),
        saved=saved.estimate,
        saved_interval=saved.interval(),
        fixed_n=float(below[0] + 1 + part[0]),
        fixed_accuracy=float(fixed_accuracy(means)),
        difference=difference.estimate,
        interval=difference.interval(),
    )


def _leaders(one: Drawn, method: Adaptive) -> list[Hashable | None]:
    """The answer of the vote of the first one, two, ... n draws."""
    polls, found = Polls(method), []
    for group, scores in zip(one.groups[: method.n], one.scores, strict=False):
        polls.count(group, scores)
        found.append(polls.leader)
    return found


def _drawn_costs(branches: Sequence[Branch], policy: Policy, batch: int) -> Iterator[tuple[Cost, Cost]]:
    """What drawing the first one, two, ... of these takes, made at once and `batch` at a time."""
    steps = DistinctSteps(len(branches[0].path[0].tokens))
    beside: dict[int, list[tuple[int, ...]]] = {}  # the batch's steps so far, by the distinct step that they are behind
    for count, branch in enumerate(branches):
        if count % batch == 0:
            beside = {}
        above = 0
        for step in branch.steps:
            begun = beside.setdefault(id(steps[above]), [])
            spared = max((len(commonprefix((step.tokens[:-1], other[:-1]))) for other in begun), default=0)
            begun.append(step.tokens)
            steps.add(step.identity, above, step.tokens, spared=spared)
            above = step.identity
        once, again = steps.drawn()
        cost = Cost(once.tokens, policy.accounts.flops(once))
        yield cost, cost + Cost(again.tokens, policy.accounts.flops(again))


def _read_costs(problem: Problem, branches: Sequence[Branch], scorer: Scorer) -> Iterator[Cost]:
    """What reading the first one, two, ... of these takes; a step that was read is known, whenever that was."""
    spec = scorer.spec
    steps = DistinctSteps(len(spec.opening(problem.problem)))
    for branch in branches:
        above = 0
        for place, step in enumerate(branch.steps):
            steps.add(step.identity, above, spec.step(step.text, place == 0))
            above = step.identity
        once = steps.read_once(spec.read_at)
        yield Cost(once.tokens, scorer.flops(once))


def _plus(drawn: tuple[Cost, Cost], read: Cost) -> tuple[Cost, Cost]:
    return drawn[0] + read, drawn[1] + read
