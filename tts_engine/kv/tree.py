"""Which KV block belongs to which step: the Python face of the C++ tree. No tensors; the slots it names index kv/cache.py.

A node is a closed step or a prompt, a lease is an open step. Both are int handles that die with what they name: a stale
one raises ValueError, always. Blocks are free, filling (leased), pinned (needed now) or idle (kept in case), and conserved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "tts_engine's C++ extension tts_engine._C is not built: run `pip install -e .` (or `make test`, `make demo`) in the "
        "repository; it needs a C++17 compiler"
    ) from error

NO_NODE: Final = -1  # the parent of prompts, and the answer where there is no node


class Places(NamedTuple):
    """Where the T new tokens of a batch of B runs stand."""

    row_starts: np.ndarray  # int32 [B + 1], tokens of run b are row_starts[b] : row_starts[b + 1]
    ends: np.ndarray  # int32 [B], tokens of its own node or lease up to its last one
    context_lens: np.ndarray  # int32 [B], the same of its whole path
    positions: np.ndarray  # int64 [T], on its path
    write_slots: np.ndarray  # int64 [T]


class BlockCounts(NamedTuple):
    """Blocks by state; the four add up to the pool, always."""

    free: int
    filling: int
    pinned: int
    idle: int


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Blocks of `block_size` tokens that one step (or prompt) of `num_tokens` occupies."""
    return -(-num_tokens // block_size)


class KVTree:
    """The shared tree of steps over a pool of `num_blocks` blocks of `block_size` token slots. One thread at a time.

    Siblings with equal tokens are one node. A step's blocks are never shared with another step, so a fork copies nothing.
    A node is pinned while it, or any descendant, is held or leased under; all others are idle, and go leaf first, least
    recently used first, as soon as their blocks are wanted. Whatever raises has changed nothing.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self._tree = _C.KVTree(num_blocks, block_size)
        self.block_size = block_size

    @property
    def num_blocks(self) -> int:
        return self._tree.num_blocks

    @property
    def native(self) -> Any:
        """The C++ tree, for loops in C++ that change it."""
        return self._tree

    # Nodes

    def find(self, parent: int, tokens: Sequence[int]) -> int:
        """The resident child of `parent` (or of the top level, NO_NODE) with exactly these tokens, or NO_NODE."""
        return self._tree.find(parent, tokens)

    def insert(self, parent: int, tokens: Sequence[int]) -> int:
        """Find that child or make it with nothing computed; held once for the caller. NO_NODE if its blocks cannot be had now."""
        return self._tree.insert(parent, tokens)

    def hold(self, node: int) -> None:
        """Pin `node` and its path until as many drops."""
        self._tree.hold(node)

    def drop(self, node: int) -> None:
        """Take back one hold; ValueError if there is none."""
        self._tree.drop(node)

    def set_computed(self, node: int, num_tokens: int) -> None:
        """State that K and V of the node's first `num_tokens` tokens are written, and no others."""
        self._tree.set_computed(node, num_tokens)

    def computed(self, node: int) -> int:
        """Leading tokens of the node whose K and V are written."""
        return self._tree.computed(node)

    def retire(self, nodes: Sequence[int]) -> None:
        """State that nobody is likely to come back to these nodes, some of which may be gone: idle, they are evicted first."""
        self._tree.retire(nodes)

    def num_tokens(self, node: int) -> int:
        """The node's own tokens."""
        return self._tree.num_tokens(node)

    def parent(self, node: int) -> int:
        """The node above, or NO_NODE."""
        return self._tree.parent(node)

    def path_len(self, node: int) -> int:
        """Tokens from the top of the path to the end of the node."""
        return self._tree.path_len(node)

    # Leases

    def lease(self, parent: int) -> int:
        """Open a step under a node, with no room yet; its path is pinned until `seal` or `release`."""
        return self._tree.lease(parent)

    def extend(self, lease: int, num_tokens: int = 1) -> bool:
        """Make room for `num_tokens` more tokens, evicting what is idle; False, with nothing changed, if that cannot be."""
        return self._tree.extend(lease, num_tokens)

    def extend_many(self, leases: ArrayLike, num_tokens: int = 1) -> int:
        """Extend leases int64 [B] one after the other; how many leading ones could be (it stops at the first that cannot)."""
        return self._tree.extend_many(_array(leases, np.int64), num_tokens)

    def seal(self, lease: int, tokens: Sequence[int], computed: int) -> int:
        """Close the step: a node with these tokens, the first `computed` of them written, held once for the caller.

        There must be room for the tokens; spare blocks are freed. If the parent has that child already, the lease's blocks
        are all freed and the child is returned as it is, with its own `computed`. The lease is gone either way.
        """
        return self._tree.seal(lease, tokens, computed)

    def keep(self, lease: int, tokens: Sequence[int], computed: int) -> int:
        """Close the step as `seal` does, with what room the tokens lack, and held by nobody; NO_NODE, and the lease is given up,
        if that room cannot be had."""
        return self._tree.keep(lease, tokens, computed)

    def fork(self, lease: int) -> tuple[int, np.ndarray]:
        """Open another step that has as many tokens behind the same node; with it int32 [M, 2]: the blocks whose contents it is to
        have, and its own. NO_NODE and no blocks, with nothing changed, if there is no room."""
        return self._tree.fork(lease)

    def release(self, lease: int) -> None:
        """Give up an open step and its blocks."""
        self._tree.release(lease)

    def lease_start(self, lease: int) -> int:
        """Tokens on the path before the open step."""
        return self._tree.lease_start(lease)

    # Room

    def available(self) -> int:
        """Blocks that can be had: free ones and idle ones."""
        return self._tree.available()

    @property
    def needed(self) -> int:
        """Blocks that somebody stands on: filling and pinned ones."""
        return self._tree.needed

    def has_room(self, num_blocks: int) -> bool:
        """Whether so many blocks can be had; if not, that counts among `refused`."""
        return self._tree.has_room(num_blocks)

    def evict(self, num_blocks: int) -> int:
        """Free at least `num_blocks` blocks of idle nodes, or all there are; the blocks freed."""
        return self._tree.evict(num_blocks)

    def evict_all(self) -> int:
        """Forget every idle node; the blocks freed."""
        return self._tree.evict_all()

    def resize(self, num_blocks: int) -> np.ndarray | None:
        """A pool of so many blocks from here on. int32 [M, 2]: blocks whose contents go elsewhere, from beyond its end to free ones
        below it. None, with nothing changed, if what is filling or pinned does not fit; what is idle is evicted as far as it must.
        """
        return self._tree.resize(num_blocks)

    @property
    def extent(self) -> int:
        """Blocks up to the last one in use."""
        return self._tree.extent()

    @property
    def evicted(self) -> int:
        """Blocks of idle nodes that were given up for others so far; what `evict` was asked to free is not counted."""
        return self._tree.evicted

    @property
    def refused(self) -> int:
        """How often room was asked for so far and there was none."""
        return self._tree.refused

    def counts(self) -> BlockCounts:
        return BlockCounts(*self._tree.counts())

    def check(self) -> None:
        """Recount everything from scratch; RuntimeError with a sentence if the books are wrong. For tests: O(pool)."""
        self._tree.check()

    # Slots of whole batches, with the GIL released. slot = block * block_size + offset

    def context_slots(self, handles: ArrayLike, is_lease: ArrayLike, lens: ArrayLike, out: np.ndarray | None = None) -> np.ndarray:
        """The first `lens[b]` slots of each row's path, top first and the row's own tokens last; 0 beyond.

        handles int64 [B], nodes, or leases where is_lease bool [B]; lens int32 [B], at most the path's length. Fills and
        returns `out` int32 [B, C], by default a new one with C = max(lens). ValueError if a row asks for more than it has.
        """
        lens = _array(lens, np.int32)
        if out is None:
            out = np.empty((lens.size, lens.max(initial=0)), np.int32)
        self._tree.context_slots(_array(handles, np.int64), _array(is_lease, np.bool_), lens, out)
        return out

    def lay_out(self, handles: np.ndarray, is_lease: np.ndarray, starts: np.ndarray, counts: np.ndarray,
                path_starts: np.ndarray) -> Places:  # fmt: skip
        """Where tokens [starts[b], starts[b] + counts[b]) of each row stand, path_starts[b] others on the path before its own.

        handles int64 [B], is_lease bool [B], the others int32 [B]. ValueError if a row has no such tokens.
        """
        return Places(*self._tree.lay_out(handles, is_lease, starts, counts, path_starts))

    def forest(self, handles: ArrayLike, is_lease: ArrayLike, ends: ArrayLike) -> Any:
        """The distinct nodes under rows handles int64 [B], is_lease bool [B], each with its first ends[b] int32 tokens: a
        _C.Forest. ValueError if a row has fewer."""
        return self._tree.forest(_array(handles, np.int64), _array(is_lease, np.bool_), _array(ends, np.int32))

    def write_slots(
        self, handles: ArrayLike, is_lease: ArrayLike, starts: ArrayLike, counts: ArrayLike, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The slots of each row's own tokens [starts[b], starts[b] + counts[b]), row after row.

        handles int64 [B], is_lease bool [B], starts and counts int32 [B]. Fills and returns `out` int64 [sum of counts], by
        default a new one. ValueError if a row has no such tokens.
        """
        counts = _array(counts, np.int32)
        if out is None:
            out = np.empty(int(counts.sum()), np.int64)
        self._tree.write_slots(_array(handles, np.int64), _array(is_lease, np.bool_), _array(starts, np.int32), counts, out)
        return out


@dataclass(frozen=True)
class TreePaths:
    """The paths of a batch's rows: row b is a node, or a lease, with its first ends[b] tokens and all that is above it."""

    tree: KVTree
    handles: np.ndarray  # int64 [B]
    is_lease: np.ndarray  # bool [B]
    ends: np.ndarray  # int32 [B], of the row's own tokens
    lens: np.ndarray  # int32 [B], of the whole path up to there

    @cached_property
    def context_slots(self) -> np.ndarray:
        return self.tree.context_slots(self.handles, self.is_lease, self.lens)

    @cached_property
    def forest(self) -> Any:
        return self.tree.forest(self.handles, self.is_lease, self.ends)


def _array(values: ArrayLike, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(values, dtype)
