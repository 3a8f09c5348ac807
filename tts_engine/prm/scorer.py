"""The PRM at work: steps of many searches read together, each once, behind what it has read of their paths before."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from textwrap import shorten

import numpy as np
from torch import Tensor

from ..branch import Branch
from ..errors import EngineError, OutOfBlocks
from ..kv.tree import NO_NODE, blocks_needed
from ..ledger import PRMLedger
from ..runner import ModelRunner, Segments, pairs
from ..search.driver import Answer, Ask, Driver
from .spec import PRMSpec

MAX_TOKENS = 4096  # new tokens of one forward, beside at least one branch


@dataclass(slots=True, eq=False, kw_only=True)
class ScoreContext:
    """What all scoring of one search has in common. `scored` is told every step that gets its score."""

    driver: Driver
    opening: list[int]  # the PRM's token ids before the first step
    ledger: PRMLedger
    scored: Callable[[Branch], None]
    opened: bool = False  # the opening was read once already
    step_ids: dict[tuple[str, bool], list[int]] = field(default_factory=dict)  # spec.step's answers so far


@dataclass(slots=True, eq=False)
class _Reading:
    """One branch to be read on its way to its `place` in an answer: its tokens step by step, the opening first."""

    context: ScoreContext
    answer: Answer
    place: int
    branch: Branch
    ids: list[list[int]]


@dataclass(slots=True, eq=False)
class _Run:
    """New tokens of one node, `start` of it written before, `before` more on the path above; on the account of `context`."""

    context: ScoreContext
    before: int
    start: int
    ids: list[int]
    known: bool  # read before, and evicted since


class Scorer:
    """Scores for many searches over one model. `submit` what a driver asks; `tick` while `num_open`."""

    def __init__(self, runner: ModelRunner, spec: PRMSpec, head: Callable[[Tensor], Tensor], *, head_flops: int) -> None:
        """head: hidden states [R, d] -> scores float32 [R]; head_flops: its cost for one of them."""
        self.runner, self.spec, self.head, self.head_flops = runner, spec, head, head_flops
        self._waiting: deque[_Reading] = deque()

    @property
    def num_open(self) -> int:
        """Branches that wait to be read."""
        return len(self._waiting)

    def submit(self, context: ScoreContext, ask: Ask) -> None:
        """Take a Score; it is answered through the context's driver, at once where every step has its score already.

        Raises EngineError, before anything of it is read, where a branch has more tokens than the model has positions, or one that
        the model does not know.
        """
        answer = Answer(context.driver, ask)
        readings = []
        for place, branch in enumerate(ask.branches):
            if None in branch.scores:
                steps = [self._ids(context, step.text, number == 0) for number, step in enumerate(branch.steps)]
                readings.append(_Reading(context, answer, place, branch, [context.opening, *steps]))
                self._refuse_unless_readable(readings[-1])
            else:
                answer.put(place, branch)
        self._waiting.extend(readings)

    def abandon(self, context: ScoreContext) -> None:
        """Forget whatever one search still waits for."""
        self._waiting = deque(reading for reading in self._waiting if reading.context is not context)

    def tick(self) -> None:
        """One forward over as many waiting branches as fit: new tokens only, shared ones once."""
        tree = self.runner.tree
        taken: list[tuple[_Reading, list[int]]] = []
        runs: dict[int, _Run] = {}  # by node
        num_tokens = 0
        while self._waiting and (num_tokens < MAX_TOKENS or not taken):
            reading = self._waiting[0]
            nodes = self.runner.hold_path(reading.ids)
            if nodes is None:
                break
            self._waiting.popleft()
            taken.append((reading, nodes))
            num_tokens += self._plan(reading, nodes, runs)
        if not taken:
            need = sum(blocks_needed(len(ids), tree.block_size) for ids in self._waiting[0].ids)
            raise OutOfBlocks(f"the PRM needs {need} KV blocks of {tree.block_size} tokens to read one branch and has "
                              f"{tree.num_blocks} in all; raise kv_bytes")  # fmt: skip
        try:
            scores = self._read(runs)
        finally:
            for _, nodes in taken:
                tree.drop(nodes[-1])
        for reading, nodes in taken:
            self._answer(reading, [scores.get(node) for node in nodes])

    def _ids(self, context: ScoreContext, text: str, first: bool) -> list[int]:
        """A step as the PRM reads it; the tokenizer is asked once."""
        ids = context.step_ids.get((text, first))
        if ids is None:
            ids = context.step_ids[text, first] = self.spec.step(text, first)
        return ids

    def _refuse_unless_readable(self, reading: _Reading) -> None:
        model = self.runner.decoder.spec
        length, largest = sum(map(len, reading.ids)), max(max(ids, default=0) for ids in reading.ids)
        if length > model.max_positions:
            problem = shorten(reading.branch.path[0].text, 60, placeholder=" ...")
            raise EngineError(f"a solution to {problem!r} has come to {length} tokens as the PRM reads it, and the PRM has "
                              f"{model.max_positions} positions: lower max_tokens, or take another PRM")  # fmt: skip
        if largest >= model.vocab_size:
            raise EngineError(f"the PRM's tokenizer writes token {largest} and its model knows {model.vocab_size}: they do not "
                              "belong together")  # fmt: skip

    def _plan(self, reading: _Reading, nodes: list[int], runs: dict[int, _Run]) -> int:
        """Note the runs that this branch adds to the forward; the tokens they hold."""
        context, before, added = reading.context, 0, 0
        for node, ids, step in zip(nodes, reading.ids, reading.branch.path, strict=True):
            start = self.runner.tree.computed(node)
            unscored = step.parent is not None and step.score is None
            if start == len(ids) and unscored:
                start += self.spec.read_at  # an equal step was read before: its score is read again, from the marker on
            if start < len(ids) and node not in runs:
                known = context.opened if step.parent is None else not unscored
                runs[node] = _Run(context, before, start, ids[start:], known)
                added += len(ids) - start
            before += len(ids)
        context.opened = True
        return added

    def _read(self, runs: dict[int, _Run]) -> dict[int, float]:
        """Run the forward; the score at the read position of every run of a step."""
        tree = self.runner.tree
        counts = np.array([len(run.ids) for run in runs.values()], np.int32)
        of_step = np.array([tree.parent(node) != NO_NODE for node in runs], bool)  # an opening has no score
        segments = Segments(
            handles=np.array(list(runs), np.int64),
            is_lease=np.zeros(len(runs), bool),
            starts=np.array([run.start for run in runs.values()], np.int32),
            counts=counts,
            path_starts=np.array([run.before for run in runs.values()], np.int32),
            token_ids=np.concatenate([np.array(run.ids, np.int64) for run in runs.values()]),
        )
        hidden = self.runner.forward(segments, np.cumsum(counts, dtype=np.int64)[of_step] + self.spec.read_at)
        scores = iter(self.head(hidden).tolist())
        found: dict[int, float] = {}
        for (node, run), is_step in zip(runs.items(), of_step, strict=True):
            tree.set_computed(node, run.start + len(run.ids))
            ledger = run.context.ledger
            before, count = run.before + run.start, len(run.ids)
            self.runner.charge(ledger, tokens=count, context_pairs=pairs(before, count))
            ledger.tokens_recomputed += len(run.ids) * run.known
            if is_step:
                self.runner.charge_reads(ledger, tokens=1, context_pairs=before + count + self.spec.read_at + 1)
                ledger.head_flops += self.head_flops
                found[node] = next(scores)
        return found

    def _answer(self, reading: _Reading, scores: list[float | None]) -> None:
        """The branch anew with every step's score; answer the ask when all its branches are there."""
        context, path = reading.context, reading.branch.path
        read_so_far, parent, changed = len(reading.ids[0]), path[0], False
        for step, ids, score in zip(path[1:], reading.ids[1:], scores[1:], strict=True):
            read_so_far += len(ids)
            if step.score is None:
                if score is None or not 0.0 <= score <= 1.0:
                    raise EngineError(f"the PRM gave {score} for a step, which is no probability: its weights or dtype are "
                                      "at fault")  # fmt: skip
                step, changed = replace(step, parent=parent, score=score), True
                context.ledger.steps_scored += 1
                context.ledger.tokens_reread += read_so_far
                context.scored(step)
            elif changed:
                step = replace(step, parent=parent)
            parent = step
        reading.answer.put(reading.place, parent)
