"""Doubles and makers that tests and benches share. Part of the package so that no test copies them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .branch import Branch, Finish, root_branch
from .search.driver import Draw, Driver
from .search.requests import Program

# --- scripted searches: a policy and a PRM written down as tables, for hand-worked traces (no model, no tensors) ---------

StepRule = Callable[[Draw], tuple[str, Finish | None]]
_ENDINGS = {".": Finish.EOS, "~": Finish.LENGTH}


def scripted_policy(table: dict[str, str]) -> StepRule:
    """A policy from a table: the solution so far -> the steps drawn after it, in draw order, separated by blanks.

    A step that ends in "." ends its text (EOS), one that ends in "~" was cut at the token limit. Looking up a draw that the
    table does not hold is an error, so a trace cannot draw more than was written down.
    """
    steps = {solution: row.split() for solution, row in table.items()}

    def rule(draw: Draw) -> tuple[str, Finish | None]:
        text = steps[draw.branch.solution][draw.draw]
        return text, _ENDINGS.get(text[-1])

    return rule


def random_policy(seed: int, p_finish: float = 0.2, letters: str = "abcdef") -> StepRule:
    """A uniform toy policy: the step depends on seed and draw identity alone, so equal draws give equal steps anywhere."""

    def rule(draw: Draw) -> tuple[str, Finish | None]:
        rng = random.Random(f"{seed}/{draw.identity}")
        ending = rng.choice([".", "~"]) if rng.random() < p_finish else ""
        return rng.choice(letters) + ending, _ENDINGS.get(ending)

    return rule


def scripted_prm(table: dict[str, float]) -> Callable[[Branch], float]:
    """A PRM from a table: solution up to and including a step -> that step's score."""
    return lambda step: table[step.solution]


def random_prm(seed: int, levels: int = 5) -> Callable[[Branch], float]:
    """Scores on a coarse grid in [0, 1], so that ties are frequent."""
    return lambda step: random.Random(f"{seed}/{step.identity}").randrange(levels) / (levels - 1)


@dataclass(frozen=True, slots=True)
class Expanded:
    """One answered Expand of a played search: the parents' solutions (one per draw), the steps drawn, the draws themselves."""

    parents: list[str]
    steps: list[str]
    draws: tuple[Draw, ...]


def play(
    program: Program, policy: StepRule, prm: Callable[[Branch], float], max_steps: int = 40, newest_first: bool = False
) -> tuple[list[Branch], list[list[Expanded]]]:
    """Run a program to its end with scripted doubles. Returns its result, and for each round the Expands answered in it.

    `newest_first` answers the asks of a round in reverse, which must change nothing but the order of the records.
    """
    driver = Driver(program)
    rounds: list[list[Expanded]] = []
    while not driver.done:
        asks = driver.asks()
        expanded = []
        for ask in reversed(asks) if newest_first else asks:
            if ask.kind == "score":
                driver.answer(ask, [_scored(branch, prm) for branch in ask.branches])
                continue
            children = [_drawn(driver, draw, policy, max_steps) for draw in ask.draws]
            parents = [draw.branch.solution for draw in ask.draws]
            expanded.append(Expanded(parents, [child.text for child in children], ask.draws))
            driver.answer(ask, children)
        if expanded:
            rounds.append(expanded)
    return driver.result, rounds


def play_method(
    method, policy: StepRule, prm: Callable[[Branch], float], **how: bool
) -> tuple[list[Branch], list[list[Expanded]]]:
    """`play` for a method, from an empty prompt."""
    return play(method.program(root_branch(())), policy, prm, method.max_steps, **how)


def solutions(branches: Sequence[Branch]) -> list[str]:
    return [branch.solution for branch in branches]


def _drawn(driver: Driver, draw: Draw, policy: StepRule, max_steps: int) -> Branch:
    while True:
        text, finish = policy(draw)
        child = Branch(draw.branch, tuple(text.encode()), text, draw.identity, draw.lane, draw.draw, finish)
        if not draw.to_end or child.finished:
            return child
        if child.depth >= max_steps:
            return child.ended(Finish.DEPTH)
        draw = driver.next_draw(child, draw.lane, to_end=True)


def _scored(branch: Branch, prm: Callable[[Branch], float]) -> Branch:
    """The branch with a score on every step; scores already there are kept."""
    if branch.parent is None:
        return branch
    parent = _scored(branch.parent, prm)
    if parent is branch.parent and branch.score is not None:
        return branch
    return replace(branch, parent=parent, score=prm(branch) if branch.score is None else branch.score)
