"""One search's generators, from the outside: what they ask now, and who goes on when an answer comes.

Numbers the draws (rule 6 of the house); knows nothing of batches, models or other searches. The identity of a draw depends
only on its parent, lane and number, never on the order in which asks are answered.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ..branch import Branch, Lane, child_identity
from .requests import Answers, Expand, Join, Outlook, Program, Score

WORTH = 4  # one in so many of a round's children is enough for a forward before the others are there


class Draw(NamedTuple):
    """One step to be drawn after `branch`: its `draw`-th in `lane`. With `to_end`, and then on to the end of the trajectory."""

    branch: Branch
    lane: Lane
    draw: int
    identity: int
    to_end: bool = False


@dataclass(slots=True, eq=False)
class Round:
    """The children of an Expand whose program gave an outlook, until it asks for the next step or returns."""

    outlook: Outlook
    lane: Lane
    num_draws: int
    num_closed: int = 0
    unread: list[Branch] = field(default_factory=list)  # closed, and to be scored
    scored: list[Branch] = field(default_factory=list)  # with their scores
    entries: list[Branch] = field(default_factory=list)  # of these, who would be expanded next, the surest first
    over: bool = False

    @property
    def num_open(self) -> int:
        """Children still to come."""
        return self.num_draws - self.num_closed

    @property
    def worth_reading(self) -> bool:
        """Whether as many scores are missing as children are still to come, and enough of them for a forward of their own."""
        return 0 < self.num_open <= len(self.unread) >= self.num_draws // WORTH and not self.over

    def look(self, score_of: Callable[[Branch], float | None]) -> None:
        """See which of the children have scores by now."""
        found = [(child, score_of(child)) for child in self.unread]
        self.unread = [child for child, score in found if score is None]
        if len(self.unread) < len(found) and self.outlook.entries is not None:
            self.scored += [replace(child, score=score) for child, score in found if score is not None]
            self.entries = self.outlook.entries(self.scored)


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A program waits for this: draws to be made, or branches to be scored. Exactly one of the two is not empty.

    Draws with a `doubt` may be refused: then the answer is empty.
    """

    draws: tuple[Draw, ...] = ()
    branches: tuple[Branch, ...] = ()
    round: Round | None = None  # of the draws
    doubt: float | None = None

    @property
    def kind(self) -> Literal["expand", "score"]:
        return "expand" if self.draws else "score"


@dataclass(slots=True, eq=False)
class _Run:
    """A generator under way, and the place among its caller's results where its own belongs."""

    program: Program
    lane: Lane = ()
    caller: "_Run | None" = None
    round: Round | None = None
    place: int = 0
    results: list[Any] = field(default_factory=list)  # of the Join it waits for
    missing: int = 0  # how many of these are not in yet


class Driver:
    """Runs one program and, through Join, all those under it.

    The program runs to its first requests at once. Then, until `done`: take `asks()`, and `answer()` each in any order.

        driver = Driver(BestOfN(n=4).program(root))
        while not driver.done:
            for ask in driver.asks():
                driver.answer(ask, draw(ask.draws) if ask.kind == "expand" else score(ask.branches))
        driver.result  # the branches to vote on

    answers: what trajectories answer, for programs that ask.
    """

    def __init__(self, program: Program, answers: Callable[[Sequence[Branch]], Sequence[Hashable]] | None = None) -> None:
        self._answers = answers
        self._drawn: dict[tuple[int, Lane], int] = {}  # draws taken, by parent and lane
        self._new: list[Ask] = []
        self._arrived: list[Branch] = []
        self._waiting: dict[Ask, _Run] = {}
        self._open: list[_Run] = []
        self._result: list[Branch] | None = None
        self.failure: Exception | None = None  # why the search cannot go on
        self.stirred = True  # something has happened since `asks` was called
        self._advance(self._opened(program), None)

    @property
    def done(self) -> bool:
        return self._result is not None

    @property
    def result(self) -> list[Branch]:
        """What the program returned: the branches to vote on."""
        assert self._result is not None, "the search is not done: it still waits for answers"
        return self._result

    def asks(self) -> list[Ask]:
        """What was asked since the last call, in the order asked; each is answered exactly once. Raises why the search failed."""
        if self.failure is not None:
            raise self.failure
        asks, self._new, self.stirred = self._new, [], False
        return asks

    def arrived(self) -> list[Branch]:
        """The steps that closed since the last call and will be scored, though their program does not ask yet; in that order."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def close_step(self, ask: Ask, step: Branch) -> None:
        """Tell of a step that was drawn for `ask`, when it closes: before the answer in which it is, or on the way there."""
        if ask.round is not None:
            ask.round.num_closed += 1
            if ask.round.outlook.scored(step):
                ask.round.unread.append(step)
                self._arrived.append(step)
                self.stirred = True

    def answer(self, ask: Ask, branches: Sequence[Branch]) -> None:
        """Let the program that waits for `ask` go on: one branch per draw, or per branch to be scored, in the same order; none
        where its draws are refused."""
        assert ask in self._waiting, "this ask is not waiting: answered before, or another driver's, or this driver is closed"
        _check_answer(ask, branches)
        self._advance(self._waiting.pop(ask), list(branches))

    def foreseen(self, branch: Branch, lane: Lane, count: int) -> list[Draw]:
        """The next draws after `branch` in `lane`, should they be asked for; no number is given away."""
        first = self._drawn.get((branch.identity, lane), 0)
        return [Draw(branch, lane, draw, child_identity(branch.identity, lane, draw)) for draw in range(first, first + count)]

    def next_draw(self, branch: Branch, lane: Lane, to_end: bool = False) -> Draw:
        """The next unused draw after `branch` in `lane`; numbers are given here only, and never again within a search.

        For a draw with `to_end` the caller takes each later step of the trajectory from here too, with the draw's lane.
        """
        assert branch.finish is None, f"a branch that ended with {branch.finish} cannot be expanded"
        number = self._drawn.get((branch.identity, lane), 0)
        self._drawn[branch.identity, lane] = number + 1
        return Draw(branch, lane, number, child_identity(branch.identity, lane, number), to_end)

    def resume(self, ask: Ask, branches: Sequence[Branch]) -> None:
        """`answer`, for who serves many searches: what the program raises as it goes on is its own search's failure."""
        if self.failure is None:
            try:
                self.answer(ask, branches)
            except Exception as error:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """Say that the search cannot go on: `asks` raises the first of such errors, and what is resumed later changes nothing."""
        self.failure, self.stirred = self.failure or error, True

    def close(self) -> None:
        """Abandon the search: close every generator under way, callees first. A finished search is left as it is."""
        for run in reversed(self._open):
            with suppress(Exception):  # nobody is left who could be told
                run.program.close()
            self._end_round(run)
        self._open, self._new, self._arrived, self._waiting = [], [], [], {}

    def _advance(self, run: _Run, value: list[Any] | None) -> None:
        """Resume `run` with `value` and whatever can go on because of it, first sub-program first, until all wait."""
        self.stirred = True
        ready: list[tuple[_Run, list[Any] | None]] = [(run, value)]
        while ready:
            run, value = ready.pop()
            try:
                request = next(run.program) if value is None else run.program.send(value)
            except StopIteration as stop:
                ready += self._returned(run, stop.value)
            else:
                ready += self._requested(run, request)

    def _requested(self, run: _Run, request: Expand | Score | Answers | Join) -> list[tuple[_Run, list[Any] | None]]:
        """Note what `run` asks; returns who can go on at once, last first."""
        if isinstance(request, Join):
            programs = request.programs
            run.results, run.missing = [None] * len(programs), len(programs)
            subs = [self._opened(p, (*run.lane, j), run, j) for j, p in enumerate(programs)]
            return [(sub, None) for sub in reversed(subs)] or [(run, [])]
        if isinstance(request, Answers):
            assert self._answers is not None, "this program votes as it goes: its driver must know answers"
            return [(run, list(self._answers(request.branches)))]
        assert isinstance(request, Expand | Score), f"a program may ask Expand, Score, Answers or Join, not {request!r}"
        if not request.branches:
            return [(run, [])]
        if isinstance(request, Expand):
            draws = tuple(self.next_draw(branch, run.lane, request.to_end) for branch in request.branches)
            self._end_round(run)
            if request.outlook is not None:
                run.round = Round(request.outlook, run.lane, len(draws))
            ask = Ask(draws=draws, round=run.round, doubt=request.doubt)
        else:
            ask = Ask(branches=tuple(request.branches))
        self._new.append(ask)
        self._waiting[ask] = run
        return []

    def _returned(self, run: _Run, result: list[Branch]) -> list[tuple[_Run, list[Any] | None]]:
        """Hand a finished program's result to its caller; returns the caller once it has all."""
        assert isinstance(result, list), f"a program must return a list of branches, not {result!r}"
        self._open.remove(run)
        self._end_round(run)
        caller = run.caller
        if caller is None:
            self._result = result
            return []
        caller.results[run.place] = result
        caller.missing -= 1
        return [(caller, caller.results)] if caller.missing == 0 else []

    def _end_round(self, run: _Run) -> None:
        if run.round is not None:
            run.round.over, run.round = True, None

    def _opened(self, program: Program, lane: Lane = (), caller: _Run | None = None, place: int = 0) -> _Run:
        run = _Run(program, lane, caller, place=place)
        self._open.append(run)
        return run


@dataclass(slots=True, eq=False)
class Answer:
    """What comes of one ask, branch by branch in any order; with the last one the program goes on."""

    driver: Driver
    ask: Ask
    branches: dict[int, Branch] = field(default_factory=dict)  # by place

    def close_step(self, step: Branch) -> None:
        self.driver.close_step(self.ask, step)

    def put(self, place: int, branch: Branch) -> None:
        self.branches[place] = branch
        places = range(len(self.ask.draws or self.ask.branches))
        if len(self.branches) == len(places):
            self.driver.resume(self.ask, [self.branches[place] for place in places])


def _check_answer(ask: Ask, branches: Sequence[Branch]) -> None:
    asked: Sequence[Draw | Branch] = ask.draws or ask.branches
    if ask.doubt is not None and not branches:
        return
    assert len(branches) == len(asked), f"an ask of {len(asked)} was answered with {len(branches)} branches"
    for wanted, branch in zip(asked, branches, strict=True):
        if isinstance(wanted, Branch):
            assert branch.identity == wanted.identity, "a scored branch is not the one asked for at its place"
            assert None not in branch.scores, "a scored branch has a step without a score"
        elif wanted.to_end:
            assert branch.finished, "a trajectory drawn to its end has not ended"
        else:
            assert branch.identity == wanted.identity, "a child does not carry the identity of its draw"
