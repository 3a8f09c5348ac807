"""Smaller budgets from larger runs, where that is exact: the smaller search runs anew, each of its draws looked up by its identity.

A draw's identity is its parent, lane and number, whatever n is (rule 6 of the house), so the first draws of best-of-N and of a
majority, and the first subtrees of DVTS, are those of a smaller n; an adaptive vote is one of the first draws, too. Beam search is
never replayed: whom it keeps depends on all n candidates, so a narrower beam draws behind other parents, and where it happens not
to, that is a choice of easy problems.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..branch import Branch, Finish
from ..engine import Engine
from ..ledger import DistinctSteps, Ledger, PolicyLedger, PRMLedger
from ..policy import Policy
from ..prm.scorer import Scorer
from ..results import Choice, SearchResult, conclude, read_answers
from ..search import Adaptive, Driver, Method
from ..search.driver import Draw
from ..tasks.problems import Problem
from . import StrategyError

# What each is replayed from.
SOURCES = {"majority": ("majority", "best_of_n"), "best_of_n": ("best_of_n",), "dvts": ("dvts",),
           "adaptive": ("majority", "best_of_n")}  # fmt: skip


def refuse_unless_exact(made: Method, method: Method, *, rescored: bool = False) -> None:
    """Raise StrategyError where a search with `made` does not hold one with `method`. rescored: its scores are another PRM's."""
    if method.name not in SOURCES:
        known = ", ".join(SOURCES)
        raise StrategyError(f"{method.name} cannot be replayed: what it draws depends on all n candidates; only {known} can")
    if made.name not in SOURCES[method.name]:
        known = " or ".join(SOURCES[method.name])
        raise StrategyError(f"{method.name} cannot be replayed from a run of {made.name}, only of {known}")
    if rescored and method.name == "dvts":
        raise StrategyError("dvts cannot be replayed from a rescored run: its subtrees were grown by another PRM's scores")
    if isinstance(method, Adaptive) and method.budget is not None:
        raise StrategyError("adaptive with a budget cannot be replayed by itself: what one problem is given depends on others")
    if method.uses_prm and not made.uses_prm:
        raise StrategyError(f"{method.name} by {method.vote} cannot be replayed from a run of {made.name}, which scored nothing")
    if method.n > made.n:
        raise StrategyError(f"{method.name} n={method.n} cannot be replayed from n={made.n}: only a smaller budget can")
    for setting in ("width", "rules", "max_steps"):
        ours, theirs = getattr(method, setting, None), getattr(made, setting, None)
        if ours != theirs:
            raise StrategyError(f"{method.name} with {setting}={ours} cannot be replayed from a run with {setting}={theirs}")


def replay(
    problem: Problem, nodes: Sequence[Branch], made: Method, method: Method, *, seed: int, engine: Engine
) -> SearchResult:  # fmt: skip
    """What searching `problem` with `method` would have given, from the `nodes` that a search with `made` and `seed` drew.

    engine: holds the models that drew and scored; it computes nothing here, but knows what they would compute. The ledger is that
    of this search alone as an ideal executor runs it: no padding, nothing evicted, nothing drawn or read a second time. It has no
    clock: its seconds are 0. Raises StrategyError where a replay cannot be exact.
    """
    refuse_unless_exact(made, method)
    what = f"problem {problem.id} cannot be replayed as {method.name} n={method.n}"
    if not nodes:
        raise StrategyError(f"{what}: it could not be searched")
    known = {node.identity: node for node in nodes}
    driver = Driver(method.program(nodes[0].path[0]), lambda found: read_answers(found, method.rules.grouping, engine.grader)[1])
    drawn: dict[int, Branch] = {}
    scored: dict[int, Branch] = {}

    def draw_on(draw: Draw) -> Branch:
        while True:
            if draw.identity not in known:
                raise StrategyError(f"{what}: a draw is not in its tree")
            child = drawn[draw.identity] = replace(known[draw.identity], parent=draw.branch, score=None)
            if child.finish is Finish.LENGTH and made.uses_prm and not method.uses_prm:
                raise StrategyError(f"{what}: a solution was cut, perhaps for the PRM's sake")
            if child.finished or not draw.to_end:
                return child
            draw = driver.next_draw(child, draw.lane, to_end=True)

    def score(branch: Branch) -> Branch:
        above, *steps = branch.path
        for step in steps:
            above = replace(step, parent=above, score=known[step.identity].score)
            scored.setdefault(above.identity, above)
        return above

    while not driver.done:
        for ask in driver.asks():
            driver.answer(ask, [draw_on(draw) for draw in ask.draws] or [score(branch) for branch in ask.branches])
    branches = driver.result
    ledger = Ledger(policy=policy_ledger(list(drawn.values()), branches, engine.policy), prm=PRMLedger())
    if method.uses_prm:
        if engine.scorer is None:
            raise StrategyError(f"{method.name} cannot be replayed with an engine that has no PRM: what reading costs is not known")
        ledger.prm = prm_ledger(problem, list(scored.values()), engine.scorer)
    return conclude(problem, Choice(method), seed, branches, list((drawn | scored).values()), ledger, engine.grader)


def policy_ledger(nodes: Sequence[Branch], voted: Sequence[Branch], policy: Policy) -> PolicyLedger:
    """What drawing these steps costs an ideal executor, parents first."""
    ledger, prompt = PolicyLedger(), len(nodes[0].path[0].tokens)
    steps = DistinctSteps(prompt)
    for node in nodes:
        assert node.parent is not None, "the prompt is no step"
        steps.add(node.identity, node.parent.identity, node.tokens)
    once, _ = steps.drawn()
    policy.runner.charge(ledger, once, policy.runner.decoder.spec.lm_head_flops)
    ledger.ideal_flops = policy.accounts.flops(once)
    ledger.hold(steps.widest_round(), policy.runner.token_bytes)
    parents = {node.parent.identity for node in nodes if node.parent is not None}
    ledger.tokens_generated = sum(len(node.tokens) for node in nodes)
    ledger.tokens_unshared = sum(prompt + node.num_tokens for node in nodes if node.identity not in parents)
    accepted = {step.identity: len(step.tokens) for branch in voted for step in branch.steps}
    ledger.tokens_accepted = sum(accepted.values())
    return ledger


def prm_ledger(problem: Problem, nodes: Sequence[Branch], scorer: Scorer) -> PRMLedger:
    """What reading these steps costs, parents first; steps that read alike are read once."""
    ledger, spec = PRMLedger(), scorer.spec
    steps = DistinctSteps(len(spec.opening(problem.problem)))
    for node in nodes:
        assert node.parent is not None, "the prompt is no step"
        step = steps.add(node.identity, node.parent.identity, spec.step(node.text, node.parent.parent is None))
        ledger.steps_scored += 1
        ledger.tokens_reread += step.start + step.tokens
    once = steps.read_once(spec.read_at)
    scorer.runner.charge(ledger, once, scorer.head_flops)
    ledger.ideal_flops = scorer.flops(once)
    ledger.hold(steps.widest_round(), scorer.runner.token_bytes)
    return ledger
