"""Trees of branches laid out by hand: nodes with their slots in a pool of shuffled blocks, and rows at the leaves."""

import random
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tts_engine import _C  # type: ignore[attr-defined]
from tts_engine.attention.base import BatchLayout

from . import setting

BLOCK = 16  # slots that lie side by side
GROWTH = 4  # tokens by which rows may have grown since their plan


@dataclass(frozen=True)
class Grove:
    """Nodes, parents before children, each with its slots, and the node of each row; a row's last `new` tokens are computed now."""

    parents: Sequence[int]
    runs: Sequence[np.ndarray]  # int32, the slots of each node
    rows: Sequence[int]
    new: Sequence[int]

    @cached_property
    def lens(self) -> list[int]:
        return list(map(len, self.runs))

    @property
    def num_slots(self) -> int:
        """Of a pool that has them all, whole blocks."""
        return BLOCK * (1 + max(int(run.max()) for run in self.runs if len(run)) // BLOCK)

    def only(self, row: int) -> "Grove":
        """One row, the nodes it needs and no others."""
        path = self.path(row)
        return Grove(range(-1, len(path) - 1), [self.runs[node] for node in path], [len(path) - 1], [self.new[row]])

    def before(self, tokens: int) -> "Grove":
        """The same when every row had so many tokens fewer."""
        own = set(self.rows)
        runs = [run[: len(run) - tokens * (node in own)] for node, run in enumerate(self.runs)]
        return Grove(self.parents, runs, self.rows, self.new)

    def path(self, row: int) -> list[int]:
        """Its nodes, the top first."""
        nodes = [self.rows[row]]
        while self.parents[nodes[-1]] >= 0:
            nodes.append(self.parents[nodes[-1]])
        return nodes[::-1]

    @cached_property
    def paths(self) -> list[np.ndarray]:
        """The slots of each row's path."""
        return [np.concatenate([self.runs[node] for node in self.path(row)]) for row in range(len(self.rows))]

    @property
    def distinct(self) -> int:
        """Tokens on the rows' paths, each once."""
        return sum(self.lens[node] for node in {node for row in range(len(self.rows)) for node in self.path(row)})

    @property
    def logical(self) -> int:
        """The same, had every row its path to itself."""
        return sum(map(len, self.paths))

    # What a layout asks of its paths

    @cached_property
    def forest(self) -> Any:
        lens = np.array(self.lens, np.int32)
        first = (np.cumsum(lens) - lens).astype(np.int32)
        return _C.Forest(np.array(self.parents, np.int32), first, lens, np.array(self.rows, np.int32), np.concatenate(self.runs))

    @cached_property
    def context_slots(self) -> np.ndarray:
        slots = np.zeros((len(self.rows), max(map(len, self.paths))), np.int32)
        for row, path in enumerate(self.paths):
            slots[row, : len(path)] = path
        return slots

    def layout(self) -> BatchLayout:
        """Of a forward whose keys and values are in their slots already."""
        lens = np.array([len(path) for path in self.paths], np.int32)
        new = np.array(self.new, np.int32)
        return BatchLayout(
            rows=np.arange(len(self.rows), dtype=np.int64),
            starts=(np.array([self.lens[node] for node in self.rows], np.int32) - new),
            ends=np.array([self.lens[node] for node in self.rows], np.int32),
            row_starts=np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
            positions=np.concatenate([np.arange(length - count, length) for length, count in zip(lens, new, strict=True)]),
            write_slots=np.empty(0, np.int64),
            context_lens=lens,
            paths=self,
        )

    def exact(self, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Attention path by path in that dtype: q [T, H, D] over k, v [slots, K, D]; weights are rounded to q's dtype where this
        is not float64's own computation."""
        out, token = torch.empty(q.shape, dtype=dtype, device=q.device), 0
        for path, count in zip(self.paths, self.new, strict=True):
            at = torch.from_numpy(path.astype(np.int64)).to(q.device)
            keys, values = (x[at].repeat_interleave(q.shape[1] // x.shape[1], 1).to(dtype) for x in (k, v))
            scores = torch.einsum("thd,chd->htc", q[token : token + count].to(dtype), keys).div(q.shape[2] ** 0.5)
            place = torch.arange(len(path), device=q.device)
            hidden = place[None] > len(path) - count + torch.arange(count, device=q.device)[:, None]
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            weights = weights if dtype == torch.float64 else weights.to(q.dtype).to(dtype)
            out[token : token + count] = torch.einsum("htc,chd->thd", weights, values)
            token += count
        return out


def planted(parents: Sequence[int], lens: Sequence[int], rows: Sequence[int], new: Sequence[int], seed: int = 0,
            first: int = 0) -> Grove:  # fmt: skip
    """Nodes of so many tokens in a pool of blocks, which are drawn; the first of them begins at slot `first`, of a block."""
    rng = np.random.default_rng(seed)
    needed = [-(-length // BLOCK) for length in lens]
    blocks = np.split(rng.permutation(sum(needed)), np.cumsum(needed)[:-1])
    runs = [(first + BLOCK * own[:, None] + np.arange(BLOCK)).ravel()[:length].astype(np.int32)
            for own, length in zip(blocks, lens, strict=True)]  # fmt: skip
    return Grove(parents, runs, rows, new)


def beam(tree: setting.Tree, seed: int = 0) -> Grove:
    """A prompt, levels that part further and further, each branch's own at last.

    With L levels between prompt and leaves, their numbers of nodes grow from 1 to about a quarter of the branches and are 1/16 of
    them on average, so that a token of a shared step is one of 16 branches.
    """
    rng = random.Random(seed)
    own = max(1, round((tree.levels - 1) * tree.private / (tree.shared + tree.private)))
    between = tree.levels - 1 - own if tree.shared else 0
    own = tree.levels - 1 - between
    parents, lens, of_row = [-1], [tree.prompt], [0] * tree.branches
    cuts: set[int] = set()  # rows that begin another node than the row before them
    for level in range(between):
        wanted = _nodes(tree.branches, (level + 0.5) / between)
        free = [row for row in range(1, tree.branches) if row not in cuts]
        cuts |= set(rng.sample(free, max(0, wanted - 1 - len(cuts))))
        size = tree.shared * (level + 1) // between - tree.shared * level // between
        of_row = _level(parents, lens, of_row, cuts, size, rng)
    for level in range(own):
        size = tree.private * (level + 1) // own - tree.private * level // own
        of_row = _level(parents, lens, of_row, range(tree.branches), size, rng)
    return planted(parents, lens, of_row, [1] * tree.branches, seed)


def _nodes(branches: int, depth: float) -> int:
    """How many nodes a level has at that share of the way down: its square times 3/16 of the branches, 1/16 of them on average."""
    return max(1, min(branches, round(branches * 3 / 16 * depth * depth)))


def _level(parents: list[int], lens: list[int], above: list[int], begins: Container[int], size: int,
           rng: random.Random) -> list[int]:  # fmt: skip
    """One more node, of about that size, under each run of rows; the node of each row now."""
    below: list[int] = []
    for row, node in enumerate(above):
        if row == 0 or row in begins:
            parents.append(node)
            lens.append(max(1, size + rng.randint(-(size // 4), size // 4)))
            below.append(len(parents) - 1)
        else:
            below.append(below[-1])
    return below


def unrelated(rows: int, tokens: int) -> Grove:
    """Sequences that have nothing in common."""
    return planted([-1] * rows, [tokens] * rows, range(rows), [1] * rows)


def random_grove(seed: int, nodes: int, longest: int, most_new: int = 9) -> Grove:
    """A random tree whose rows end at leaves and, some of them, within; rows have one new token or a few."""
    rng = random.Random(seed)
    parents = [rng.randrange(-1, node) for node in range(rng.randint(2, nodes))]
    lens = [rng.randint(1, longest) for _ in parents]
    rows = [node for node in range(len(parents)) if node not in parents or rng.random() < 0.3]
    rng.shuffle(rows)
    return planted(parents, lens, rows, [rng.choice([1, rng.randint(1, min(most_new, lens[row]))]) for row in rows], seed)


def growing_grove(seed: int, longest: int, rows: int) -> Grove:
    """A random tree with so many rows of one new token, each on a leaf of more than GROWTH tokens."""
    rng = random.Random(seed)
    parents = [rng.randrange(-1, node) for node in range(rng.randint(1, rows))]
    lens = [rng.randint(1, longest) for _ in parents]
    stems = len(parents)
    for row in range(rows):
        parents.append(row if row < stems else rng.randrange(-1, stems))
        lens.append(GROWTH + rng.randint(1, longest))
    return planted(parents, lens, range(stems, stems + rows), [1] * rows, seed)
