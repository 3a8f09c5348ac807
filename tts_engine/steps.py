"""Where a step of the policy ends, found on token ids: at a marker in its text or, for benchmarks, after a drawn length."""

import re
import string
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np

from . import _C  # type: ignore[attr-defined]
from .errors import EngineError

# What closes a step once some text stands before it, by the mode's name: literal characters, and [0-9]+ for a number.
STEP_MARKERS = {"blank-line": "\n\n", "header": "\n## Step", "numbered": "\nStep [0-9]+:"}
NUMBER = "[0-9]+"
NO_TEXT, TEXT, CLOSED = range(3)  # the states that every mode has; those beyond are inside a marker
MOST_LENGTH = 1 << 20
NO_POSITION = 0xFFFFFFFF  # the counter of a length: no token stands there


class StepRule(Protocol):
    """What the policy asks about one step while it is drawn."""

    eos: np.ndarray  # bool [V], tokens that end step and solution

    @property
    def after(self) -> np.ndarray | None:
        """uint8 [states, V], the state behind one more token; None where each token brings a step one nearer to CLOSED."""
        ...

    def start(self, identity: int, key: tuple[int, int]) -> int:
        """The state of a step before its first token; identity and key are those of its random numbers."""
        ...

    def advance(self, tokens: np.ndarray, states: np.ndarray) -> np.ndarray:
        """The states int32 [B] behind one more token int64 [B] a row; CLOSED once the step is whole, and from then on."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """What a step's tokens say."""
        ...


def step_rule(mode: str, token_bytes: Sequence[bytes], eos_ids: Sequence[int], vocab_size: int) -> StepRule:
    """The rule of a name in STEP_MARKERS, or of a number of tokens. Raises EngineError for any other mode."""
    if mode in STEP_MARKERS:
        return MarkedSteps(token_bytes, eos_ids, vocab_size, mode)
    return DrawnLengths(mean_length(mode), vocab_size)


def check_mode(mode: str) -> None:
    """Raises EngineError for a mode that is none."""
    if mode not in STEP_MARKERS:
        mean_length(mode)


class MarkedSteps:
    """Where a step ends, found on token ids: at the first marker that follows some text, or at an end-of-text token.

    A marker may lie inside a token or across several; the step ends with the token that completes it. A header is therefore the
    end of the step before it, and the step it announces starts behind it: whatever a mode cuts, the tokens of a branch are those
    that the policy drew, in their order, none dropped, forced or encoded anew. A marker before any text closes nothing (white
    space, ASCII's, is no text); only an end-of-text token right behind another step makes an empty one.
    """

    def __init__(self, token_bytes: Sequence[bytes], eos_ids: Sequence[int], vocab_size: int, mode: str = "blank-line") -> None:
        """token_bytes[v]: what token v adds to the text; ids beyond it, up to vocab_size, add nothing."""
        self.token_bytes = [*token_bytes, *[b""] * (vocab_size - len(token_bytes))]
        self.eos = np.isin(np.arange(len(self.token_bytes)), eos_ids)
        self.after = _over_tokens(_automaton(STEP_MARKERS[mode]), self.token_bytes)

    def start(self, identity: int, key: tuple[int, int]) -> int:
        return NO_TEXT

    def advance(self, tokens: np.ndarray, states: np.ndarray) -> np.ndarray:
        return self.after[states, tokens]

    def text(self, tokens: Sequence[int]) -> str:
        """Bytes that are no UTF-8 yet become replacement characters."""
        return b"".join([self.token_bytes[t] for t in tokens]).decode("utf-8", "replace")


class DrawnLengths:
    """Steps of a drawn number of tokens, whatever these say: a search is then the same work for every engine and model.

    A length is uniform on [mean - mean // 2, mean + mean // 2] and hangs on the step's random key and identity alone; no token ends
    a solution. The text has a letter or digit for each token, which no tokenizer joins, so that a PRM reads as many.
    """

    after = None

    def __init__(self, mean: int, vocab_size: int) -> None:
        self.mean = mean
        self.eos = np.zeros(vocab_size, bool)

    def start(self, identity: int, key: tuple[int, int]) -> int:
        spread = self.mean // 2
        drawn, *_ = _C.philox((0, NO_POSITION, identity & NO_POSITION, identity >> 32), key)
        return CLOSED + self.mean - spread + drawn % (2 * spread + 1)

    def advance(self, tokens: np.ndarray, states: np.ndarray) -> np.ndarray:
        return np.maximum(states - 1, CLOSED)

    def text(self, tokens: Sequence[int]) -> str:
        signs = (string.ascii_lowercase, string.digits)
        return "".join([signs[i % 2][token % len(signs[i % 2])] for i, token in enumerate(tokens)])


def mean_length(mode: str) -> int:
    """The number of tokens that a mode names. Raises EngineError where it names none."""
    if not (mode.isascii() and mode.isdecimal() and 1 <= int(mode[:10]) <= MOST_LENGTH):
        raise EngineError(f"steps={mode!r} is unknown; known: {', '.join(STEP_MARKERS)}, or a mean number of tokens up to "
                          f"{MOST_LENGTH}")  # fmt: skip
    return int(mode)


@cache
def _automaton(marker: str) -> np.ndarray:
    """The state after one more byte, uint8 [states, 256]; a state is a set of places in the marker that may be reached."""
    parts = re.findall(re.escape(NUMBER) + "|(?s:.)", marker)
    end = len(parts)
    states: list[frozenset[int]] = [frozenset(), frozenset({0}), frozenset({end})]  # NO_TEXT, TEXT, CLOSED

    def fits(part: str, byte: int) -> bool:
        return chr(byte) in "0123456789" if part == NUMBER else chr(byte) == part

    def after(state: frozenset[int], byte: int) -> frozenset[int]:
        if end in state or (not state and bytes([byte]).isspace()):
            return state
        further = {place + 1 for place in state if fits(parts[place], byte)}
        within = {place for place in state if place and parts[place - 1] == NUMBER and fits(NUMBER, byte)}
        return states[CLOSED] if end in further else frozenset({0} | further | within)

    table: list[list[int]] = []
    while len(table) < len(states):
        row = [after(states[len(table)], byte) for byte in range(256)]
        states += [state for state in dict.fromkeys(row) if state not in states]
        table.append([states.index(state) for state in row])
    return np.array(table, np.uint8)


def _over_tokens(automaton: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """The state after one more token, uint8 [states, vocabulary]."""
    lengths = np.array([len(piece) for piece in token_bytes])
    starts = np.cumsum(lengths) - lengths
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    after = np.tile(np.arange(len(automaton), dtype=np.uint8)[:, None], len(token_bytes))
    for place in range(lengths.max()):
        longer = np.flatnonzero(lengths > place)
        after[:, longer] = automaton[after[:, longer], text[starts[longer] + place]]
    return after
