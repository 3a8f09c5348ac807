"""The two verbs of every attention backend, and the shape of one forward as the host knows it."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..kv.cache import KVCache


class Paths(Protocol):
    """What lies in the KV tree before and under the rows of one batch; found out once, when first asked for."""

    @property
    def context_slots(self) -> np.ndarray:
        """int32 [B, C]: slots of each row's whole path, its own tokens last; 0 beyond the length."""
        ...

    @property
    def forest(self) -> Any:
        """The same node by node, nodes that rows share once: a _C.Forest."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """B rows of tokens, T in all, for each of which attention is computed. A row is a run of consecutive new tokens of one node (or
    open step) of the KV tree.

    Token i of row b sits at context index `context_lens[b] - (row_starts[b + 1] - row_starts[b]) + i` and sees
    `context_slots[b, : that index + 1]`: everything before it on its path, and itself. Ancestors may be rows of the same
    forward: all new keys and values of a layer are written before any are read.
    """

    rows: np.ndarray  # int64 [B], handles of the nodes or open steps; of one tree, equal handles mean equal paths
    starts: np.ndarray  # int32 [B], tokens of the row's own node before its first
    ends: np.ndarray  # int32 [B], and up to its last
    row_starts: np.ndarray  # int32 [B + 1], tokens of row b are row_starts[b] : row_starts[b + 1]
    positions: np.ndarray  # int64 [T], place of each token on its path, the prompt's first token at 0
    write_slots: np.ndarray  # int64 [W], where each new key and value goes: T of them, or more where only some tokens are read
    context_lens: np.ndarray  # int32 [B]
    paths: Paths
    version: int = 0  # of the cache: slots known at another one are others by now

    @property
    def context_slots(self) -> np.ndarray:
        return self.paths.context_slots

    def continues(self, rows: np.ndarray, ends: np.ndarray, version: int) -> bool:
        """Whether these are the rows that had come to `ends` before, each one token further, and all else where it was."""
        return (
            self.version == version
            and len(self.rows) == len(rows) == len(self.write_slots)
            and self.rows.tobytes() == rows.tobytes()
            and self.starts.tobytes() == ends.tobytes()
            and self.ends.tobytes() == (ends + 1).tobytes()
        )

    def only(self, read_at: np.ndarray) -> "BatchLayout":
        """The layout of the last layer: all keys and values written, but attention for the tokens read_at alone.

        read_at: int64 [R], increasing, at most one token of each row. The rows stay, those that are not read with no token.
        """
        row = np.searchsorted(self.row_starts, read_at, side="right") - 1
        assert (np.diff(row) > 0).all(), "one token of a row can be read, and rows are read in order"
        counts, starts, lens = np.zeros(len(self.rows), np.int32), self.starts.copy(), self.context_lens.copy()
        counts[row] = 1
        starts[row] += (read_at - self.row_starts[row]).astype(np.int32)
        lens[row] -= (self.row_starts[row + 1] - 1 - read_at).astype(np.int32)
        row_starts = np.zeros(len(self.rows) + 1, np.int32)
        np.cumsum(counts, out=row_starts[1:])
        return replace(
            self, starts=starts, ends=starts + counts, row_starts=row_starts, positions=self.positions[read_at], context_lens=lens
        )


class AttentionBackend(Protocol):
    """Serves one model. `plan` is host work, once per forward; `run` is called once per layer with that plan, whose `write_slots`
    are the layout's, where `run` reads them: on the device."""

    name: str
    devices: tuple[str, ...]  # kinds of torch devices it runs on
    has_windows: bool  # `run` takes a window
    batch_invariant: bool  # when made with deterministic=True, a token's bits do not depend on what else is in the batch

    def plan(self, layout: BatchLayout) -> Any: ...

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, layer: int, plan: Any,
            window: int | None = None) -> Tensor:  # fmt: skip
        """Write k, v [W, K, D] of the new tokens to their slots, then attend: q [T, H, D] -> out [T, H, D]. Scale 1/sqrt(D).
        Without k and v they are there already.

        With a window a token sees the last `window` of its context only, itself among them.
        """
        ...
