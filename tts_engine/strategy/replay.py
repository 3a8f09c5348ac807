"""Smaller budgets from larger runs, where that is exact: the smaller search runs anew, each of its draws looked up by its identity.

A draw's identity is its parent, lane and number, whatever n is (rule 6 of the house), so the first draws of best-of-N and of a
majority, and the first subtrees of DVTS, are those of a smaller n. Beam search is never replayed: whom it keeps depends on all n
candidates, so a narrower beam draws behind other parents, and where it happens not to, that is a choice of easy problems.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..branch import Branch, Finish
from ..engine import Engine
from ..ledger import Ledger, ModelLedger, PolicyLedger, PRMLedger
from ..prm.scorer import Scorer
from ..results import Choice, SearchResult, conclude
from ..runner import ModelRunner, pairs
from ..search import Driver, Method
from ..search.driver import Draw
from ..tasks.problems import Problem
from . import StrategyError

SOURCES = {"majority": ("majority", "best_of_n"), "best_of_n": ("best_of_n",), "dvts": ("dvts",)}  # what each is replayed from


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
    of this search alone, in an engine where nothing is evicted: the prompt computed once, and once what steps of equal tokens
    share. (Subtrees of DVTS that come to equal steps at different moments read the last token, or the PRM's marker, once more.) It
    has no clock: its seconds are 0. Raises StrategyError where a replay cannot be exact.
    """
    refuse_unless_exact(made, method)
    what = f"problem {problem.id} cannot be replayed as {method.name} n={method.n}"
    if not nodes:
        raise StrategyError(f"{what}: it could not be searched")
    known = {node.identity: node for node in nodes}
    driver = Driver(method.program(nodes[0].path[0]))
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
    ledger = Ledger(policy=policy_ledger(list(drawn.values()), engine.policy.runner), prm=PRMLedger())
    if method.uses_prm:
        if engine.scorer is None:
            raise StrategyError(f"{method.name} cannot be replayed with an engine that has no PRM: what reading costs is not known")
        ledger.prm = prm_ledger(problem, list(scored.values()), engine.scorer)
    return conclude(problem, Choice(method), seed, driver.result, list((drawn | scored).values()), ledger, engine.grader)


def policy_ledger(nodes: Sequence[Branch], runner: ModelRunner) -> PolicyLedger:
    """What drawing these steps costs: of the prompt every token, of a step all but the last; that one only where a step was drawn
    behind it, once for steps of equal tokens, which are drawn on from side by side."""
    ledger = PolicyLedger()
    root = nodes[0].path[0]
    expanded = {node.parent.identity for node in nodes if node.parent is not None}
    drawn_on = set[tuple[tuple[int, ...], ...]]()
    head_flops = runner.decoder.spec.lm_head_flops

    def compute(start: int, count: int, reads: int) -> None:
        """So many tokens behind `start` others; a token is drawn behind each of the last `reads`."""
        _compute(ledger, runner, start, count)
        runner.charge_reads(ledger, tokens=reads, context_pairs=pairs(start + count - reads, reads))
        ledger.head_flops += head_flops * reads

    compute(0, len(root.tokens), 1)
    for node in nodes:
        end = len(root.tokens) + node.num_tokens
        compute(end - len(node.tokens), len(node.tokens) - 1, len(node.tokens) - 1)
        ledger.tokens_generated += len(node.tokens)
        path = tuple(step.tokens for step in node.steps)
        if node.identity not in expanded:
            ledger.tokens_unshared += end
        elif path not in drawn_on:
            drawn_on.add(path)
            compute(end - 1, 1, 1)
    return ledger


def prm_ledger(problem: Problem, steps: Sequence[Branch], scorer: Scorer) -> PRMLedger:
    """What reading these steps costs, each behind those before it; steps that read alike are read once."""
    ledger, runner, spec = PRMLedger(), scorer.runner, scorer.spec
    opening = len(spec.opening(problem.problem))
    _compute(ledger, runner, 0, opening)
    read = set[tuple[str, ...]]()
    for step in steps:
        texts = tuple(part.text for part in step.steps)
        counts = [len(spec.step(text, place == 0)) for place, text in enumerate(texts)]
        end = opening + sum(counts)
        ledger.steps_scored += 1
        ledger.tokens_reread += end
        if texts not in read:
            read.add(texts)
            _compute(ledger, runner, end - counts[-1], counts[-1])
            runner.charge_reads(ledger, tokens=1, context_pairs=end + spec.read_at + 1)
            ledger.head_flops += scorer.head_flops
    return ledger


def _compute(ledger: ModelLedger, runner: ModelRunner, start: int, count: int) -> None:
    runner.charge(ledger, tokens=count, context_pairs=pairs(start, count))
