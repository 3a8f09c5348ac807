"""The two verbs of every attention backend, and the shape of one forward as the host knows it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..kv.cache import KVCache


class Paths(Protocol):
    """What lies in the KV tree before and under the rows of one batch."""

    def context_slots(self) -> np.ndarray:
        """int32 [B, C]: slots of each row's whole path, its own tokens last; 0 beyond the length."""
        ...

    def forest(self) -> Any:
        """The same node by node, nodes that rows share once: a _C.Forest."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """B rows of new tokens, T in all. A row is a run of consecutive new tokens of one node (or open step) of the KV tree.

    Token i of row b sits at context index `context_lens[b] - (row_starts[b + 1] - row_starts[b]) + i` and sees
    `context_slots[b, : that index + 1]`: everything before it on its path, and itself. Ancestors may be rows of the same
    forward: all new keys and values of a layer are written before any are read.
    """

    rows: np.ndarray  # int64 [B], handles of the nodes or open steps; of one tree, equal handles mean equal paths
    starts: np.ndarray  # int32 [B], tokens of the row's own node that were written before
    row_starts: np.ndarray  # int32 [B + 1], tokens of row b are row_starts[b] : row_starts[b + 1]
    positions: np.ndarray  # int64 [T], place of each token on its path, the prompt's first token at 0
    write_slots: np.ndarray  # int64 [T], where each new token's key and value go
    context_lens: np.ndarray  # int32 [B]
    paths: Paths

    @cached_property
    def context_slots(self) -> np.ndarray:
        return self.paths.context_slots()


class AttentionBackend(Protocol):
    """Serves one model. `plan` is host work, once per forward; `run` is called once per layer with that plan."""

    name: str
    devices: tuple[str, ...]  # kinds of torch devices it runs on
    has_windows: bool  # `run` takes a window
    batch_invariant: bool  # when made with deterministic=True, a token's bits do not depend on what else is in the batch

    def plan(self, layout: BatchLayout) -> Any: ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int, plan: Any, window: int | None = None) -> Tensor:
        """Write k, v [T, K, D] of the new tokens to their slots, then attend: q [T, H, D] -> out [T, H, D]. Scale 1/sqrt(D).

        With a window a token sees the last `window` of its context only, itself among them.
        """
        ...
