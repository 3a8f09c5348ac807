"""The rows that decode, oldest first: a table of what a batch needs to know of each, and what a tick does to all of them at once.

The table stays where it is, and its records can be read and written; loops over them are C++, csrc/rows.cpp.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from . import _C  # type: ignore[attr-defined]
from .attention.base import BatchLayout
from .graphs import Drawn, Draws
from .kv.tree import KVTree
from .runner import Segments
from .sampling import Sampling
from .steps import CLOSED, StepRule

Owner = TypeVar("Owner")
# Why a row leaves: an end-of-text token, a step that closed, no room for more, a draw that is no token; or several of these.
END, WHOLE, CUT, FAULT = 1, 2, 4, 8
SETTINGS = (("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32))  # of a draw


class Run(NamedTuple):
    """New tokens of one node or lease."""

    handle: int
    is_lease: bool
    start: int  # own tokens of it that are written already
    path_start: int  # tokens on the path before it
    tokens: Sequence[int]


class Change(NamedTuple, Generic[Owner]):
    """What a token of every row changed."""

    left: list[tuple[Owner, int]]  # whose rows left, and why: END, WHOLE, CUT or several of these
    # Whose rows have another lease from here on, or are the first under theirs from here on; NO_NODE where a row that ended needs
    # none, and where one that did not found no room.
    parted: list[tuple[Owner, int, bool]]
    copies: np.ndarray  # int32 [M, 2], blocks whose contents those rows need too, and theirs


class Rows(Generic[Owner]):
    """At most `most` rows, B of them now, and whose each is. Rows with equal tokens behind one node may have one lease together:
    the model reads them once, and each draws for itself."""

    def __init__(self, most: int) -> None:
        self.owners: list[Owner] = []
        self._rows = _C.Rows(most)
        self._records = self._rows.records

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def table(self) -> np.ndarray:
        """[B] records as csrc/rows.h has them, to be read and written."""
        return self._records[: len(self.owners)]

    def add(self, owner: Owner, *, lease: int, identity: int, key: tuple[int, int], sampling: int, path_start: int, length: int,
            room: int, state: int) -> None:  # fmt: skip
        """The youngest. Its `length` tokens are written, or in this tick's runs."""
        self._rows.add(len(self.owners), lease, identity, key, sampling, path_start, length, room, state)
        self.owners.append(owner)

    def pop(self) -> Owner:
        """The youngest leaves."""
        return self.owners.pop()

    def keep(self, stays: Sequence[bool]) -> None:
        """Of all rows those that stay."""
        at = np.flatnonzero(stays)
        self._records[: len(at)] = self._records[at]
        self.owners = [self.owners[i] for i in at.tolist()]

    def follow(self, runs: Sequence[Run], sources: Sequence[int], count: int) -> tuple[Segments, np.ndarray, np.ndarray]:
        """The runs, and behind them the newest token of each of the first `count` rows, of those under one lease once. Those draw
        their next tokens behind it, the rows that come after them behind the runs `sources`.

        With it the tokens int64 [R] behind which one is drawn, increasing indices, and int64 [B] which of these is each row's.
        """
        *columns, read_at, drawn_at = self._rows.follow(runs, sources, count)
        return Segments(*columns), read_at, drawn_at

    def draws(self, sampling: int, sources: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows with this sampling, and what their next tokens are drawn with: places int64 [N], their sources int64 [N], of
        those of all rows int64 [B], keys uint32 [N, 2], identities uint64 [N] and positions int64 [N]."""
        return self._rows.draws(sampling, sources)

    def append(self, tokens: np.ndarray, rule: StepRule, tree: KVTree) -> Change[Owner]:
        """Every row takes a token int64 [B]. Rows under one lease that differ now part, and those that end with it leave."""
        left, parted, copies = self._rows.append(tokens, rule.after, rule.eos, CLOSED, tree.native)
        changed = [(self.owners[place], lease, first) for place, lease, first in parted]
        leaving = [(self.owners[place], why) for place, why in left]
        for place, _ in reversed(left):
            del self.owners[place]
        return Change(leaving, changed, copies)

    @property
    def leases(self) -> np.ndarray:
        """int64: of all rows, each once, in the order of their oldest rows."""
        return self._rows.leases(len(self.owners))

    def begin(self, newest: np.ndarray, layout: BatchLayout, ahead: np.ndarray, order: np.ndarray,
              samplings: Sequence[Sampling]) -> Draws:  # fmt: skip
        """What rows are to decode on from, for ticks on end. order int64 [B]: the rows as they stand in the layout, which has
        their `newest` tokens int64 [B]; ahead int64 [ticks, B]: the slots behind those; the samplings by their numbers."""
        t = self.table[order]
        settings = {name: np.array([getattr(one, name) for one in samplings], dtype)[t["sampling"]] for name, dtype in SETTINGS}
        return Draws(token=newest, position=layout.positions, slots=np.concatenate([layout.write_slots[None], ahead]),
                     state=t["state"], room=t["room"] - t["length"], key=t["key"], identity=t["identity"],
                     **settings)  # fmt: skip

    def go_on(self, drawn: Drawn, seats: Sequence[int]) -> list[tuple[Owner, int]]:
        """Every row takes what was drawn on end for its seat, and leaves where it stopped: as `append` says."""
        at, t = np.array(seats, np.int64), self.table
        count, stop = drawn.drawn[at], drawn.stop[at]
        t["newest"] = drawn.tokens[count - 1, at]
        t["length"] += count
        t["state"] = drawn.state[at]
        leaving = [(self.owners[i], int(stop[i])) for i in np.flatnonzero(stop).tolist()]
        self.keep(stop == 0)
        return leaving
