"""How many searches are under way at once: as many as keep their keys and values until they are over, as far as can be foretold.

Where more were, what one of them still needs would be evicted for another, and computed again. So a search has a place for as much
as the searches of its kind that are over have come to, on average; before the first of them is over, for as much as it may come to.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Past:
    """Bytes of so many searches together."""

    num_bytes: int = 0
    searches: int = 0


class Admission:
    """Places for searches in memory."""

    def __init__(self) -> None:
        self._past: dict[Any, _Past] = {}

    def expected(self, kind: Any, most: int) -> int:
        """Bytes that a search of this kind will come to; `most`: that it may come to."""
        past = self._past.get(kind)
        return most if past is None else min(most, past.num_bytes // past.searches)

    def note(self, kind: Any, num_bytes: int) -> None:
        """A search of this kind is over and has come to so many bytes."""
        past = self._past.setdefault(kind, _Past())
        past.num_bytes += num_bytes
        past.searches += 1
