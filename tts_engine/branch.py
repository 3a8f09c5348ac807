"""A branch: an immutable path of token steps from the prompt to here.

Tokens are the truth and KV is a cache of them: a branch knows no blocks, no tensors, no model.
"""

import hashlib
import struct
from dataclasses import dataclass, replace
from enum import StrEnum

Lane = tuple[int, ...]


class Finish(StrEnum):
    """Why a branch cannot be expanded any further."""

    EOS = "eos"  # the policy ended its text
    ANSWER = "answer"  # the step closed and holds a boxed answer
    LENGTH = "length"  # the step was cut at its token limit
    DEPTH = "depth"  # the method's step limit was reached


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The newest step of a path, and through `parent` all those before it. The root holds the prompt and is no step.

    `identity` names the draw that made this step: a 64-bit hash of (parent identity, lane, draw number). It seeds the
    step's random numbers, so it never depends on what else runs. Two branches are the same only if they are one object.
    """

    parent: "Branch | None"
    tokens: tuple[int, ...]
    text: str
    identity: int
    lane: Lane = ()
    draw: int = 0
    finish: Finish | None = None
    score: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish is not None

    @property
    def path(self) -> list["Branch"]:
        """Root first, this branch last."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    @property
    def steps(self) -> list["Branch"]:
        """The steps of the path, the prompt left out."""
        return self.path[1:]

    @property
    def depth(self) -> int:
        """How many steps lie behind the prompt."""
        depth, node = 0, self.parent
        while node is not None:
            depth, node = depth + 1, node.parent
        return depth

    @property
    def scores(self) -> tuple[float | None, ...]:
        return tuple(step.score for step in self.steps)

    @property
    def solution(self) -> str:
        """The text of all steps."""
        return "".join(step.text for step in self.steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps, the prompt left out."""
        return sum(len(step.tokens) for step in self.steps)

    def ended(self, finish: Finish) -> "Branch":
        """This branch, closed for `finish` unless it has ended already."""
        return self if self.finished else replace(self, finish=finish)


def root_branch(prompt_ids: list[int] | tuple[int, ...], text: str = "") -> Branch:
    """The branch that every search of one problem starts from."""
    return Branch(parent=None, tokens=tuple(prompt_ids), text=text, identity=0)


def child_identity(parent: int, lane: Lane, draw: int) -> int:
    """The 64-bit name of a draw: equal exactly when parent, lane and draw number are (up to hash collisions)."""
    packed = struct.pack(f"<QI{len(lane)}IQ", parent, len(lane), *lane, draw)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
