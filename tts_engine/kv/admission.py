"""How many searches are under way at once: as many as keep their keys and values until they are over, as far as can be foretold.

Where more were, what one of them still needs would be evicted for another, and computed again. So a search has a place for as much
as the searches of its kind that are over have come to, on average; before the first of them is over, for as much as it may come to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Past:
    """Bytes of so many searches together, model by model."""

    num_bytes: list[int]
    searches: int = 0


class Admission:
    """Places for searches in memory. Bytes are of keys and values, the policy's first and then the PRM's, where there is one."""

    def __init__(self) -> None:
        self._past: dict[Any, _Past] = {}

    def expected(self, kind: Any, most: Sequence[int]) -> list[int]:
        """Bytes that a search of this kind will come to in each model; `most`: that it may come to."""
        past = self._past.get(kind)
        return list(most) if past is None else [min(m, b // past.searches) for m, b in zip(most, past.num_bytes, strict=True)]

    def note(self, kind: Any, num_bytes: Sequence[int]) -> None:
        """A search of this kind is over and has come to so many bytes."""
        past = self._past.setdefault(kind, _Past([0] * len(num_bytes)))
        past.num_bytes = [before + new for before, new in zip(past.num_bytes, num_bytes, strict=True)]
        past.searches += 1
