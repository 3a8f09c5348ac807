"""All that differs between PRM families, as plain data: how a path becomes token ids, and where and how its scores are read.

Knows ids and text only: no tensors, no cache, no tokenizer of its own. Values are made by families.py and used by scorer.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenPair:
    """The score is `plus`'s share of the softmax over two output logits; the unembedding's other rows are never needed."""

    plus: int
    minus: int


@dataclass(frozen=True, slots=True)
class TwoClassHead:
    """The score is class 1 of softmax(out(relu(hidden(h)))), both linear with bias; the fields name their tensors."""

    hidden: str = "score.0"  # [D, D]
    out: str = "score.2"  # [2, D]

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(f"{layer}.{kind}" for layer in (self.hidden, self.out) for kind in ("weight", "bias"))


@dataclass(frozen=True, slots=True)
class ValueHead:
    """The score is sigmoid(linear(h)), one unit with bias; the field names its tensors, by default as TRL saves them."""

    linear: str = "v_head.summary"  # [1, D]

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(f"{self.linear}.{kind}" for kind in ("weight", "bias"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PRMSpec:
    """One family bound to one tokenizer.

    A path reads as opening(problem), step(text_1, True), step(text_2, False), ... Each piece is tokenised once, alone, and
    never changes afterwards: whatever follows, the ids so far are a prefix of it (law 8). The score is read from the hidden
    state at ids[read_at]. The ids that all steps have in common up to there are the family's marker, and a step's ids hold it
    exactly once, whatever its text. `testing.check_prm_family` is what a family has to pass.
    """

    family: str
    opening: Callable[[str], list[int]]  # problem -> ids before the first step
    step: Callable[[str, bool], list[int]]  # (text, is it the path's first step?) -> ids, marker included
    read_at: int  # from the end of a step's ids: -1 is their last
    readout: TokenPair | TwoClassHead | ValueHead

    def __post_init__(self) -> None:
        assert self.read_at < 0, "a step is read inside its own ids"

    def render(self, problem: str, texts: Iterable[str]) -> tuple[list[int], list[int]]:
        """The ids of a whole path, and the position in them where each step's score is read."""
        ids, positions = self.opening(problem), []
        for number, text in enumerate(texts):
            ids = ids + self.step(text, number == 0)
            positions.append(len(ids) + self.read_at)
        return ids, positions
