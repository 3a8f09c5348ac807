"""Our own decoder, kernels and sampling in an engine that knows no tree: what is left is what the tree is worth.

Every branch has its keys and values to itself. A fork copies its parent's, as engines with a cache per sequence do, so nothing is
computed twice while writing; but it is stored, and read in attention, once for every branch. The PRM keeps nothing: it reads the
whole path of every candidate anew, many in one forward.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tts_engine.branch import Branch
from tts_engine.prm.scorer import MAX_TOKENS, Scorer
from tts_engine.runner import ModelRunner, Segments

from .lockstep import Rows, Spent, path_ids


class Private:
    """Paths of one runner that nothing is shared with.

    The tree takes siblings of equal tokens for one node, so every path is entered with a first token that no other has; the model
    is fed the true one.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self._next = runner, runner.decoder.spec.vocab_size

    def add(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        """The nodes of a path given piece by piece, with nothing computed; the last one is held."""
        self._next += 1
        nodes = self.runner.hold_path([[self._next, *pieces[0][1:]], *pieces[1:]])
        assert nodes is not None, "the pool has no room for another path of its own"
        return nodes

    def forget(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self.runner.tree.drop(node)
        self.runner.tree.evict_all()

    @property
    def bytes_in_use(self) -> int:
        counts = self.runner.tree.counts()
        return (counts.filling + counts.pinned) * self.runner.block_bytes


class SharingBlindPolicy:
    """Decodes rows whose keys and values are their own; those of the last round are there until the next one has copied them."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.private = runner, Private(runner)
        self._kept: dict[int, tuple[int, int, int]] = {}  # by identity: node and lease of a branch, and how much of it is written

    def write(self, rows: Rows, spent: Spent) -> None:
        tree, paths = self.runner.tree, [path_ids(parent) for parent in rows.parents]
        nodes, leases = [], []
        for parent, path in zip(rows.parents, paths, strict=True):
            if parent.identity not in self._kept:
                self._kept[parent.identity] = self._read(path, spent)
            nodes.append(self._copy(*self._kept[parent.identity], path))
            leases.append(tree.lease(nodes[-1]))
        self._drop()
        handles, starts = np.array(leases, np.int64), np.array([len(path) - 1 for path in paths], np.int32)
        last, written = np.array([path[-1] for path in paths], np.int64), np.zeros(len(paths), np.int32)
        while len(rows.live):
            live = rows.live
            assert tree.extend_many(handles[live], 1) == len(live), "the pool has no room for another token of every branch"
            hidden = self.runner.forward(
                Segments(handles=handles[live], is_lease=np.ones(len(live), bool), starts=written[live],
                         counts=np.ones(len(live), np.int32), path_starts=starts[live], token_ids=last[live]),
                np.arange(len(live)),
            )  # fmt: skip
            written[live] += 1
            spent.policy_tokens += len(live)
            tokens = rows.sample(self.runner.decoder.logits(hidden))
            last[live] = tokens
            rows.take(tokens)
        spent.policy_kv_bytes = max(spent.policy_kv_bytes, self.private.bytes_in_use)
        for child, node, lease, start, more in zip(rows.children, nodes, leases, starts, written, strict=True):
            self._kept[child.identity] = (node, lease, int(start + more))

    def _read(self, path: Sequence[int], spent: Spent) -> tuple[int, int, int]:
        """A path read in full but for its last token, which the rows under it are fed first."""
        (node,), count = self.private.add([path[:-1]]), len(path) - 1
        nothing = np.zeros(1, np.int32)
        self.runner.forward(
            Segments(handles=np.array([node], np.int64), is_lease=np.zeros(1, bool), starts=nothing,
                     counts=np.array([count], np.int32), path_starts=nothing, token_ids=np.array(path[:-1], np.int64)),
            np.array([count - 1]),
        )  # fmt: skip
        self.runner.tree.set_computed(node, count)
        spent.policy_tokens += count
        return node, self.runner.tree.lease(node), count

    def _copy(self, node: int, lease: int, written: int, path: Sequence[int]) -> int:
        """A node of a row's own with the keys and values of its parent's path, all but those of the path's last token."""
        tree, cache, count = self.runner.tree, self.runner.cache, len(path) - 1
        assert written == count, "a branch has all of its keys and values but the last token's"
        (copy,) = self.private.add([path[:-1]])
        tree.set_computed(copy, count)
        given = (([lease], [True]), ([copy], [False]))
        slots = (torch.from_numpy(tree.context_slots(*which, [count])[0].astype(np.int64)) for which in given)
        theirs, own = (which.to(cache.k[0].device) for which in slots)
        for table in cache.tables:
            table.index_copy_(0, own, table.index_select(0, theirs))
        return copy

    def _drop(self) -> None:
        for _, lease, _ in self._kept.values():
            self.runner.tree.release(lease)
        self.private.forget([node for node, _, _ in self._kept.values()])
        self._kept = {}


class RereadingPRM:
    """A scorer's rendering and head; of what it has read it keeps nothing."""

    def __init__(self, runner: ModelRunner, scorer: Scorer) -> None:
        self.runner, self.spec, self.head = runner, scorer.spec, scorer.head
        self.private = Private(runner)

    def read(self, branches: Sequence[Branch], spent: Spent) -> list[list[float]]:
        scores: list[list[float]] = []
        paths = [self._pieces(branch) for branch in branches]
        while len(scores) < len(paths):
            some, total = list[list[list[int]]](), 0
            for path in paths[len(scores) :]:
                total += sum(map(len, path))
                if some and total > MAX_TOKENS:
                    break
                some.append(path)
            nodes = [self.private.add(path) for path in some]
            read = iter(self.head(self._forward(nodes, some)).tolist())
            scores += [[next(read) for _ in path[1:]] for path in some]
            spent.prm_tokens += sum(len(ids) for path in some for ids in path)
            spent.prm_kv_bytes = max(spent.prm_kv_bytes, self.private.bytes_in_use)
            self.private.forget([path[-1] for path in nodes])
        return scores

    def _pieces(self, branch: Branch) -> list[list[int]]:
        """The PRM's ids of the opening, then of each step."""
        steps = [self.spec.step(step.text, number == 0) for number, step in enumerate(branch.steps)]
        return [self.spec.opening(branch.path[0].text), *steps]

    def _forward(self, nodes: list[list[int]], paths: list[list[list[int]]]) -> Tensor:
        """Hidden states at the read position of each step."""
        pieces = [ids for path in paths for ids in path]
        counts = np.array([len(ids) for ids in pieces], np.int32)
        is_step = np.array([number > 0 for path in paths for number in range(len(path))])
        return self.runner.forward(
            Segments(
                handles=np.array([node for path in nodes for node in path], np.int64),
                is_lease=np.zeros(len(pieces), bool),
                starts=np.zeros(len(pieces), np.int32),
                counts=counts,
                path_starts=np.concatenate([np.cumsum([0, *map(len, path[:-1])]) for path in paths]).astype(np.int32),
                token_ids=np.concatenate([np.array(ids, np.int64) for ids in pieces]),
            ),
            np.cumsum(counts, dtype=np.int64)[is_step] + self.spec.read_at,
        )
