"""Draws that nobody has asked for yet, but may when a round of theirs is over: made on rows that would stand idle.

A guess is a row like others, whose draw is exactly the one that would be asked for; it is asked for in its turn, or dropped, and it
gives way to whatever was.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from .draws import Batch, DrawContext, OpenDraw
from .kv.tree import NO_NODE, KVTree
from .rows import Rows
from .search.driver import Answer, Draw, Round

MOST_ROWS = {"cpu": 16, "cuda": 192}  # by kind of device: beyond so many, a row that nobody asked for costs as much as another


class Guesses:
    """Those of all searches. `rounds`: under way, whose programs say how they go on. `rows`: oldest first, decoding or whole."""

    def __init__(self, decoding: Rows[OpenDraw], tree: KVTree, device: str, *, seat: Callable[[Batch, OpenDraw], bool],
                 leave: Callable[[OpenDraw], None]) -> None:  # fmt: skip
        """decoding: all rows, guesses or not; device: its kind. seat: gives a draw a place among these if there is room; leave:
        takes it from there, and its lease."""
        self.rounds: list[tuple[DrawContext, Round]] = []
        self.rows: list[OpenDraw] = []
        self._decoding, self._tree, self._device, self._seat, self._leave = decoding, tree, device, seat, leave

    @property
    def num_decoding(self) -> int:
        return sum(row.lease != NO_NODE for row in self.rows)

    @property
    def crowded(self) -> bool:
        """Whether there are so many rows that another is not worth a guess."""
        return len(self._decoding) >= MOST_ROWS[self._device]

    def wants_scores(self) -> bool:
        """Whether guesses would be made if more of what has closed had been read: of some round as many as are still drawn, and as
        many as will go on."""
        if self.crowded:
            return False
        for context, round in self.rounds:
            round.look(context.score_of)
        return any(round.worth_reading for _, round in self.rounds)

    def make(self, batch: Batch, most_rows: int, most_tokens: int) -> None:
        """Seat what is likely to be asked for, a round at most on as many rows as its own draws had; what no longer is leaves. No
        more rows than so many in all, and no more tokens read for them."""
        for context, round in self.rounds:
            round.look(context.score_of)
            if round.over or not round.entries:
                continue
            made = {row.draw.identity: row for row in self.rows if row.round is round}
            likely = [draw for child, count in Counter(round.entries).items()
                      for draw in context.driver.foreseen(child, round.lane, count)]  # fmt: skip
            self.drop([made.pop(identity) for identity in made.keys() - {draw.identity for draw in likely}])
            idle = round.num_draws - round.num_open - sum(row.lease != NO_NODE for row in made.values())
            for draw in likely:
                if draw.identity in made:
                    continue
                no_place = self.crowded or len(self._decoding) >= most_rows or self._tree.available() <= 2 * len(self._decoding)
                guess = OpenDraw(context, None, 0, draw, round)
                if idle <= 0 or no_place or batch.num_tokens >= most_tokens or not self._seat(batch, guess):
                    break
                self.rows.append(guess)
                idle -= 1

    def adopt(self, guess: OpenDraw, answer: Answer, place: int, draw: Draw) -> None:
        """A guess is asked for: from here on it is a draw like others."""
        self.rows.remove(guess)
        guess.answer, guess.place, guess.draw, guess.round = answer, place, draw, None
        guess.context.ledger.tokens_adopted += len(guess.tokens)

    def give_way(self) -> bool:
        """Drop the youngest guess that decodes; False where there is none."""
        youngest = [row for row in self.rows if row.lease != NO_NODE][-1:]
        self.drop(youngest)
        return bool(youngest)

    def settle(self, context: DrawContext) -> None:
        """Drop those that were not asked for when their program went on."""
        if any(round.over for _, round in self.rounds):
            self.drop([row for row in self.rows if row.context is context and row.round is not None and row.round.over])
            self.rounds = [(whose, round) for whose, round in self.rounds if whose is not context or not round.over]

    def abandon(self, context: DrawContext) -> None:
        """Forget those of one search, whose leases are given up."""
        self.rows = [row for row in self.rows if row.context is not context]
        self.rounds = [(whose, round) for whose, round in self.rounds if whose is not context]

    def drop(self, guesses: Sequence[OpenDraw]) -> None:
        """Give up guesses, and count them as waste."""
        for row in guesses:
            if row.lease != NO_NODE:
                self._leave(row)
            row.context.ledger.tokens_wasted += len(row.tokens)
            row.context.ledger.speculation_flops += row.flops
        if guesses:
            left = {id(row) for row in guesses}
            self.rows = [row for row in self.rows if id(row) not in left]
