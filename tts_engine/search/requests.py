"""What a search method may ask for. A method is a generator of these; it never sees a tensor, a batch or a cache."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from ..branch import Branch


@dataclass(frozen=True, slots=True)
class Outlook:
    """What becomes of the children of an Expand, as far as that is certain before they are there, so that it can be begun early.

    It decides when things are done, never what comes of them. scored: whether a step, as it closed, will be scored: it, or a
    sibling with the same text. entries: of the next Expand in this lane if no children came but those that are there, with their
    scores; the surest first.
    """

    scored: Callable[[Branch], bool]
    entries: Callable[[list[Branch]], list[Branch]] | None = None


@dataclass(frozen=True, slots=True)
class Expand:
    """Draw the next step after each branch; answered by one child per entry, same order.

    A branch may be listed several times: each entry is its parent's next draw in this lane. With `to_end` the child is
    the end of a whole trajectory (every step in between is on its path).

    With a `doubt` the draws are more than the search needs, and the answer may be no child at all: where searches share a budget
    it goes to those of greater doubt, see allocation.py.
    """

    branches: list[Branch]
    to_end: bool = False
    outlook: Outlook | None = None
    doubt: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Have the PRM read these branches; answered by equal branches, same order, in which every step carries its score."""

    branches: list[Branch]


@dataclass(frozen=True, slots=True)
class Answers:
    """What these trajectories answer, told at once: equal answers as equal values, None for none, as they will be voted."""

    branches: list[Branch]


@dataclass(frozen=True, slots=True)
class Join:
    """Run programs side by side; answered by their results, same order. Program j draws in lane (outer lane, j)."""

    programs: list["Program"]


Program = Generator[Expand | Score | Answers | Join, list, list[Branch]]
