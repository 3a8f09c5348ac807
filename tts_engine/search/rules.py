"""What the descriptions of one method leave open, as explicit settings: who stays, who is voted, what is dropped.

Three readings of step search are in use and give different numbers, so each is a preset and every setting may be changed.

| | paper | reference (its released code) | sal (search-and-learn) |
|---|---|---|---|
| finished branch | competes | holds a place | leaves, the pool is refilled |
| draws a round | width for each live survivor | the same | n |
| search ends | the survivors have all finished | the same | no unfinished candidate is left |
| voted | all finished | n // width | n |
| duplicate siblings | kept | dropped | kept |
| truncated step | ends its branch | dropped | ends its branch |
| temperature | 0.7 | 0.7 | 0.8 |
| answers grouped by | exact string | exact string | canonical form |

Common to all: the first round draws n steps after the prompt. Survivors, n // width of them, are chosen over the whole pool,
never parent by parent, and of equal scores the earlier place wins: branches that finished in earlier rounds come first, then
this round's candidates in the order drawn. Whoever reaches `max_steps` unfinished ends there (Finish.DEPTH) and is from then
on a finished branch like any other, so a search lasts `max_steps` rounds at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, Literal, get_args

from ..branch import Branch, Finish
from ..errors import EngineError
from .ranking import AGGREGATES, rank, top
from .requests import Outlook

MOST = 1 << 20  # of draws a round and of rounds: beyond is no search but a mistake

Finished = Literal["compete", "hold", "refill"]
Voted = Literal["finished", "survivors", "n"]
Grouping = Literal["exact", "canonical"]


class MethodError(EngineError, ValueError):
    """A method or a setting of one that does not exist or contradicts another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings behind the presets.

    finished: what becomes of a branch that has ended.
        "compete": it stays in the pool for the rest of the search, selected or not, and costs no draw. Where it is among the
            survivors it takes the place of a live branch for that round only: later candidates may outdo it.
        "hold": it counts only if it is selected in the round in which it ends; then its place is taken for good, and the
            live width shrinks by one. Not selected, it is pruned like any other candidate.
        "refill": it leaves, whatever its score; survivors are chosen among the unfinished and copied up to n, in turn,
            the better ones once more where the division leaves a rest.
    voted: which finished branches the search returns, that is, whose answers are voted.
        "finished": all that `finished` counts. "survivors": the n // width best of these (under "hold": all).
        "n": the n best of these; where fewer have finished they are listed again from the best down until there are n. In
            DVTS: all siblings of the last step of each subtree, unfinished ones too.
    drop_duplicates: siblings with exactly the text of an earlier sibling of the same round are dropped before scoring.
    drop_truncated: a step cut at its token limit is dropped before scoring. Otherwise it ends its branch, which makes it a
        finished branch; so paper's "kept, ends the branch" and sal's "counts as finished" are one setting.
    selects_by: the aggregate of step scores that ranks branches while searching.
    temperature: of all draws of a method with more than one.
    grouping: how equal answers are recognised when they are voted.
    """

    finished: Finished = "compete"
    voted: Voted = "finished"
    drop_duplicates: bool = False
    drop_truncated: bool = False
    selects_by: str = "last"
    temperature: float = 0.7
    grouping: Grouping = "exact"

    def __post_init__(self) -> None:
        choices = {"finished": get_args(Finished), "voted": get_args(Voted), "grouping": get_args(Grouping)}
        choices |= {"drop_duplicates": (True, False), "drop_truncated": (True, False), "selects_by": tuple(AGGREGATES)}
        for setting, known in choices.items():
            if getattr(self, setting) not in known:
                raise MethodError(f"no rule {setting}={getattr(self, setting)!r}; known: {', '.join(map(str, known))}")
        if not 0 <= self.temperature < float("inf"):
            raise MethodError(f"temperature must be a number of at least 0, not {self.temperature!r}")

    def outlook(self, entries: Callable[[list[Branch]], list[Branch]], max_steps: int) -> Outlook:
        """What becomes of a round's children: those that `admit` keeps whatever else is drawn are scored. entries: who is
        continued, as far as `max_steps` lets them, see Outlook."""

        def scored(child: Branch) -> bool:
            return not (self.drop_truncated and child.finish is Finish.LENGTH)

        def continued(children: list[Branch]) -> list[Branch]:
            return [child for child in entries(children) if child.depth < max_steps]

        return Outlook(scored, continued)

    def admit(self, entries: Sequence[Branch], children: Sequence[Branch], max_steps: int) -> list[Branch]:
        """The candidates of a round: the drawn children (one per entry) without those the rules drop, closed at `max_steps`.

        Where nothing remains of a parent's children, the parent stands in for them, closed for Finish.LENGTH, with the score
        it has; of the prompt, which is no candidate, the children are kept after all. Paper and sal drop nothing. The
        reference code draws such a step up to three times more, on budget it does not count, and fails after that on the prompt.
        """
        candidates: list[Branch] = []
        for _, family in groupby(zip(entries, children, strict=True), key=lambda pair: id(pair[0])):
            parents, siblings = zip(*family, strict=True)
            kept = self._without_dropped(siblings)
            if not kept:
                parent = parents[0]
                kept = list(siblings) if parent.parent is None else [parent.ended(Finish.LENGTH)]
            candidates += kept
        return [child.ended(Finish.DEPTH) if child.depth >= max_steps else child for child in candidates]

    def select(self, candidates: list[Branch], finished: list[Branch], survivors: int) -> tuple[list[Branch], list[Branch]]:
        """One selection: the live survivors, best first, and `finished` brought up to date."""
        if self.finished == "compete":
            kept = top(finished + candidates, survivors, self.selects_by)
            return _live(kept), finished + _ended(candidates)
        if self.finished == "hold":
            kept = top(candidates, survivors - len(finished), self.selects_by)
            return _live(kept), finished + _ended(kept)
        return top(_live(candidates), survivors, self.selects_by), finished + _ended(candidates)

    def answers(self, finished: list[Branch], n: int, survivors: int) -> list[Branch]:
        """The branches to vote on when a search is over; `finished` is not empty."""
        if self.voted == "finished":
            return finished
        if self.voted == "survivors":
            return top(finished, survivors, self.selects_by)
        ranked = rank(finished, self.selects_by)
        return [ranked[i % len(ranked)] for i in range(n)]

    def _without_dropped(self, siblings: Sequence[Branch]) -> list[Branch]:
        kept: list[Branch] = []
        texts: set[str] = set()
        for child in siblings:
            if self.drop_truncated and child.finish is Finish.LENGTH:
                continue
            if self.drop_duplicates and child.text in texts:
                continue
            texts.add(child.text)
            kept.append(child)
        return kept


PAPER = Rules()
REFERENCE = Rules(finished="hold", voted="survivors", drop_duplicates=True, drop_truncated=True)
SAL = Rules(finished="refill", voted="n", temperature=0.8, grouping="canonical")
PRESETS = {"paper": PAPER, "reference": REFERENCE, "sal": SAL}


def make_rules(preset: str | Rules = "paper", **changes: Any) -> Rules:
    """A preset, by name or value, with some of its settings changed."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise MethodError(f"no rules {preset!r}; known: {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    known = [field.name for field in fields(Rules)]
    for name in changes:
        if name not in known:
            raise MethodError(f"no rule {name!r}; known: {', '.join(known)}")
    return replace(preset, **changes)


def check_settings(*, max_steps: int, rules: Rules, n: int = 1, width: int = 1) -> None:
    """What every method checks of its settings; raises MethodError in one sentence."""
    for name, value in {"n": n, "width": width, "max_steps": max_steps}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MethodError(f"{name} must be a whole number of at least 1, not {value!r}")
        if value > MOST:
            raise MethodError(f"{name}={value} is more than the {MOST} that a search can have")
    if n % width:
        raise MethodError(f"n={n} must be a multiple of width={width}: survivors are n // width")
    if not isinstance(rules, Rules):
        raise MethodError(f"rules must be a Rules value, such as PRESETS['paper'], not {rules!r}")


def _live(branches: Sequence[Branch]) -> list[Branch]:
    return [branch for branch in branches if not branch.finished]


def _ended(branches: Sequence[Branch]) -> list[Branch]:
    return [branch for branch in branches if branch.finished]
