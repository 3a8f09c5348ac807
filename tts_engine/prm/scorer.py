"""The PRM at work: steps of many searches read together, each once, behind what it has read of their paths before.

On a GPU it reads in a stream of its own, beside the policy's ticks: a forward is begun, and its scores are fetched when it is over.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor

from ..branch import Branch
from ..errors import EngineError, OutOfBlocks
from ..kv.tree import NO_NODE, blocks_needed
from ..ledger import DistinctStep, DistinctSteps, PRMLedger, Work, pairs
from ..models.decoder import ROW_TILE
from ..runner import ModelRunner, Segments, out_of_memory
from ..search.driver import Answer, Ask, Driver
from .spec import PRMSpec

MAX_TOKENS = 4096  # new tokens of one forward, beside at least one path; fewer once memory ran out
BATCH_TOKENS = 2048  # new tokens that are worth a forward though nobody waits for their scores yet
OPENING = -1  # the path without steps
NO_MEMORY = "memory does not suffice for the PRM to read a single branch: lower memory or kv_bytes, so that more is left for that"


@dataclass(slots=True, eq=False, kw_only=True)
class ScoreContext:
    """What all scoring of one search has in common. `scored` is told every step that gets its score.

    What the PRM reads of a branch is a path of texts, and each path has a number: draws that wrote the same are one path.
    """

    driver: Driver
    opening: list[int]  # the PRM's token ids before the first step
    ledger: PRMLedger
    scored: Callable[[Branch], None]
    step_ids: dict[tuple[str, bool], list[int]] = field(default_factory=dict)  # spec.step's answers so far
    paths: dict[tuple[int, str], int] = field(default_factory=dict)  # (the path above, a step's text) -> the path
    scores: dict[int, float] = field(default_factory=dict)  # by path: its last step's
    readings: "dict[int, _Reading]" = field(default_factory=dict)  # by path: what is still to be read
    nodes: set[int] = field(default_factory=set)  # of steps that were read; or stale handles
    steps: DistinctSteps = field(init=False)  # by path, from 1 on: what was read

    def __post_init__(self) -> None:
        self.steps = DistinctSteps(len(self.opening))

    def step(self, above: int, path: int, ids: list[int]) -> DistinctStep:
        """The last step of a path, noted where it was not yet."""
        known = path == OPENING or path + 1 in self.steps
        return self.steps[path + 1] if known else self.steps.add(path + 1, above + 1, ids, draws=0)

    def path(self, branch: Branch) -> list[int]:
        """The paths down to the branch, that without steps first."""
        numbers = [OPENING]
        for step in branch.steps:
            numbers.append(self.paths.setdefault((numbers[-1], step.text), len(self.paths)))
            if step.score is not None:
                self.scores.setdefault(numbers[-1], step.score)
        return numbers

    def knows(self, path: list[int]) -> bool:
        return all(number in self.scores for number in path[1:])


@dataclass(slots=True, eq=False)
class _Reading:
    """A path to be read: its tokens step by step, the opening first. Those who wait for it: branches, each with its place in an
    answer."""

    context: ScoreContext
    path: list[int]
    ids: list[list[int]]
    waiting: list[tuple[Answer, int, Branch]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Run:
    """New tokens of one node, that of `step`, `start` of it written before; on the account of `context`."""

    context: ScoreContext
    step: DistinctStep
    start: int
    ids: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """What was begun: for the readings, each with the nodes of its path, which are held; runs by node; and a score float32 [R] for
    each run of a step, once it is `done`."""

    taken: list[tuple[_Reading, list[int]]]
    runs: dict[int, _Run]
    scores: Tensor
    done: torch.cuda.Event | None  # None where it was when it began


class Scorer:
    """Scores for many searches over one model. `offer` what will be asked, `submit` what a driver asks; `tick` while `num_open`, or
    `start` and, when `ready`, `finish`."""

    def __init__(self, runner: ModelRunner, spec: PRMSpec, head: Callable[[Tensor], Tensor], *, head_flops: int) -> None:
        """head: hidden states [R, d] -> scores float32 [R]; head_flops: its cost for one of them."""
        self.runner, self.spec, self.head, self.head_flops = runner, spec, head, head_flops
        self._begin_anew()

    def _begin_anew(self) -> None:
        """With nothing to be read."""
        self._asked: dict[_Reading, None] = {}  # oldest first
        self._offered: dict[_Reading, None] = {}
        self._max_tokens = MAX_TOKENS
        self._num_tokens = 0  # of the newest steps of both
        self._num_open = 0
        self._begun: _Forward | None = None

    @property
    def under_way(self) -> bool:
        """Whether a forward was begun and its scores are still to be fetched."""
        return self._begun is not None

    @property
    def ready(self) -> bool:
        """Whether they are there."""
        return self._begun is not None and (self._begun.done is None or self._begun.done.query())

    @property
    def busy(self) -> bool:
        """Whether anything is still to be read, or is being read."""
        return bool(self._asked or self._offered) or self.under_way

    @property
    def num_open(self) -> int:
        """Branches that are waited for."""
        return self._num_open

    @property
    def worth_a_tick(self) -> bool:
        """Whether so much is to be read that it pays, whoever waits."""
        return self._num_tokens >= BATCH_TOKENS

    def offer(self, context: ScoreContext, branch: Branch) -> None:
        """Take a branch whose score will be asked for: some tick reads it, with others. Raises EngineError as `submit` does."""
        path = context.path(branch)
        if not context.knows(path):
            reading = self._reading(context, branch, path)
            if path[-1] not in context.readings:
                context.readings[path[-1]] = reading
                self._offered[reading] = None
                self._num_tokens += len(reading.ids[-1])

    def score_of(self, context: ScoreContext, branch: Branch) -> float | None:
        """The score of a branch's last step, if it was read already."""
        return context.scores.get(context.path(branch)[-1])

    def submit(self, context: ScoreContext, ask: Ask) -> None:
        """Take a Score; it is answered through the context's driver, at once where every step has its score already.

        Raises EngineError, before anything of it is read, where a branch has more tokens than the model has positions, or one that
        the model does not know.
        """
        answer = Answer(context.driver, ask)
        branches = [(place, branch, context.path(branch)) for place, branch in enumerate(ask.branches)]
        unread = [(place, branch, self._reading(context, branch, path)) for place, branch, path in branches
                  if not context.knows(path)]  # fmt: skip
        for place, branch, reading in unread:
            reading = context.readings.setdefault(reading.path[-1], reading)
            if reading not in self._asked and reading not in self._offered:
                self._num_tokens += len(reading.ids[-1])
            reading.waiting.append((answer, place, branch))
            self._num_open += 1
            self._offered.pop(reading, None)
            self._asked[reading] = None
        for place, branch, path in branches:
            if context.knows(path):
                self._answer(context, answer, place, branch)

    def retire(self, context: ScoreContext) -> None:
        """A search is over: its steps go first where room is needed, its opening stays."""
        self.runner.tree.retire(list(context.nodes))

    def abandon(self, context: ScoreContext) -> None:
        """Forget whatever of one search is still to be read; what is being read is waited for."""
        if self._begun is not None:
            self.finish()
        for readings in (self._asked, self._offered):
            for reading in [reading for reading in readings if reading.context is context]:
                del readings[reading]
        self._num_tokens = sum(len(reading.ids[-1]) for reading in chain(self._asked, self._offered))
        self._num_open = sum(len(reading.waiting) for reading in self._asked)
        context.readings.clear()

    def start_over(self) -> None:
        """Forget whatever is to be read and all that was read: for where an interrupt left what nobody knows of any more."""
        self.runner.start_over()
        self._begin_anew()

    def tick(self) -> None:
        """`start` and `finish`."""
        self.start()
        if self._begun is not None:
            self.finish()

    def start(self) -> None:
        """Begin one forward over as many paths as fit, first those that are waited for: new tokens only, shared ones once.

        A search of which no path fits fails and is abandoned; its driver knows why.
        """
        assert self._begun is None, "what was started must be finished first"
        tree = self.runner.tree
        taken: list[tuple[_Reading, list[int]]] = []
        runs: dict[int, _Run] = {}  # by node
        num_tokens = 0
        for reading in chain(self._asked, self._offered):
            nodes = self.runner.hold_path(reading.ids) if num_tokens < self._max_tokens else None
            if nodes is None:
                break
            taken.append((reading, nodes))
            num_tokens += self._plan(reading, nodes, runs)
        if not taken:
            first = next(chain(self._asked, self._offered))
            need = sum(blocks_needed(len(ids), tree.block_size) for ids in first.ids)
            why = f"the PRM needs {need} KV blocks of {tree.block_size} tokens to read one branch and has {tree.num_blocks} in all"
            return self._fail(first.context, OutOfBlocks(f"{why}; raise kv_bytes"))
        try:
            self._begun = _Forward(taken, runs, *self._read(runs))
        except BaseException as error:
            self._drop(taken)
            if not out_of_memory(error):
                raise
            self._shrink([reading for reading, _ in taken], num_tokens)

    def finish(self) -> None:
        """Wait for what was started, and hand on its scores. A search of which a score is none fails and is abandoned."""
        begun, self._begun = self._begun, None
        assert begun is not None, "nothing was started"
        try:
            scores = self._found(begun)
        finally:
            self._drop(begun.taken)
        for reading, nodes in begun.taken:
            reading.context.nodes.update(nodes[1:])
            self._conclude(reading, [scores.get(node) for node in nodes])

    def _drop(self, taken: list[tuple[_Reading, list[int]]]) -> None:
        for _, nodes in taken:
            self.runner.tree.drop(nodes[-1])

    def _shrink(self, taken: list[_Reading], num_tokens: int) -> None:
        """After a forward that was too much for the memory: half as many tokens from here on. Where it was one path alone, its
        search ends, and the others try as before."""
        if len(taken) > 1:
            self._max_tokens = max(1, min(self._max_tokens, num_tokens) // 2)
        else:
            self._max_tokens = MAX_TOKENS
            self._fail(taken[0].context, EngineError(NO_MEMORY))

    def _fail(self, context: ScoreContext, error: EngineError) -> None:
        context.driver.fail(error)
        self.abandon(context)

    def _reading(self, context: ScoreContext, branch: Branch, path: list[int]) -> _Reading:
        """The reading of a branch, made where there is none yet."""
        reading = context.readings.get(path[-1])
        if reading is None:
            steps = [self._ids(context, step.text, number == 0) for number, step in enumerate(branch.steps)]
            reading = _Reading(context, path, [context.opening, *steps])
            self._refuse_unless_readable(branch, reading.ids)
        return reading

    def _ids(self, context: ScoreContext, text: str, first: bool) -> list[int]:
        """A step as the PRM reads it; the tokenizer is asked once."""
        ids = context.step_ids.get((text, first))
        if ids is None:
            ids = context.step_ids[text, first] = self.spec.step(text, first)
        return ids

    def _refuse_unless_readable(self, branch: Branch, ids: list[list[int]]) -> None:
        model = self.runner.decoder.spec
        length, largest = sum(map(len, ids)), max(max(step, default=0) for step in ids)
        if length > model.max_positions:
            problem = shorten(branch.path[0].text, 60, placeholder=" ...")
            raise EngineError(f"a solution to {problem!r} has come to {length} tokens as the PRM reads it, and the PRM has "
                              f"{model.max_positions} positions: lower max_tokens, or take another PRM")  # fmt: skip
        if largest >= model.vocab_size:
            raise EngineError(f"the PRM's tokenizer writes token {largest} and its model knows {model.vocab_size}: they do not "
                              "belong together")  # fmt: skip

    def _plan(self, reading: _Reading, nodes: list[int], runs: dict[int, _Run]) -> int:
        """Note the runs that this path adds to the forward; the tokens they hold."""
        context, above, added = reading.context, OPENING, 0
        for number, node, ids in zip(reading.path, nodes, reading.ids, strict=True):
            start = self.runner.tree.computed(node)
            step = context.step(above, number, ids)
            if start == len(ids) and number != OPENING and number not in context.scores:
                start += self.spec.read_at  # an equal step was read before: its score is read again, from the marker on
            if start < len(ids) and node not in runs:
                runs[node] = _Run(context, step, start, ids[start:])
                added += len(ids) - start
            above = number
        return added

    def _read(self, runs: dict[int, _Run]) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin the forward; the score at the read position of every run of a step, and when they are there."""
        counts = np.array([len(run.ids) for run in runs.values()], np.int32)
        of_step = np.array([self._is_step(node) for node in runs], bool)  # an opening has no score
        segments = Segments(
            handles=np.array(list(runs), np.int64),
            is_lease=np.zeros(len(runs), bool),
            starts=np.array([run.start for run in runs.values()], np.int32),
            counts=counts,
            path_starts=np.array([run.step.start for run in runs.values()], np.int32),
            token_ids=np.concatenate([np.array(run.ids, np.int64) for run in runs.values()]),
        )
        stream = self.runner.stream
        with torch.cuda.stream(stream):
            hidden = self.runner.forward(segments, np.cumsum(counts, dtype=np.int64)[of_step] + self.spec.read_at)
            scores = self.head(hidden)
        return scores, stream.record_event() if stream is not None else None

    def _found(self, begun: _Forward) -> dict[int, float]:
        """By node of a step: its score. What was read is noted."""
        with torch.cuda.stream(self.runner.stream):
            scores = iter(begun.scores.tolist())
        found: dict[int, float] = {}
        for node, run in begun.runs.items():
            self.runner.tree.set_computed(node, run.start + len(run.ids))
            is_step = self._is_step(node)
            self._charge(run, is_step)
            if is_step:
                found[node] = next(scores)
        self._charge_padding(run.context, sum(len(run.ids) for run in begun.runs.values()), len(found))
        return found

    def _is_step(self, node: int) -> bool:
        return self.runner.tree.parent(node) != NO_NODE

    def count(self, context: ScoreContext) -> None:
        """What of a search's costs follows from its tree, once all of it is scored."""
        context.ledger.ideal_flops = self.flops(context.steps.read_once(self.spec.read_at))
        context.ledger.hold(context.steps.widest_round(), self.runner.token_bytes)

    def flops(self, work: Work) -> int:
        """What work of this model comes to."""
        return self.runner.flops(work, self.head_flops)

    def _charge(self, run: _Run, is_step: bool) -> None:
        """Count a run that was read, and by what was known before how much of it was in vain."""
        step, ledger = run.step, run.context.ledger
        before, count = step.start + run.start, len(run.ids)
        work = Work(tokens=count, pairs=pairs(before, count))
        if is_step:
            work.add(0, 0, 1, before + count + self.spec.read_at + 1)
        self.runner.charge(ledger, work, self.head_flops)
        if step.computed and run.start:
            ledger.rereading_flops += self.flops(work)
        elif step.computed:
            ledger.recompute_flops += self.flops(work)
            ledger.tokens_recomputed += count
            self.runner.tokens_recomputed += count
        step.computed = step.tokens

    def _charge_padding(self, context: ScoreContext, tokens: int, reads: int) -> None:
        """The head goes by whole tiles, whatever the decoder does."""
        own = self.runner.padding(tokens, reads, head_flops=0)
        context.ledger.padding_flops += own + self.head_flops * (-reads % ROW_TILE)

    def _conclude(self, reading: _Reading, scores: list[float | None]) -> None:
        """Keep the scores of a path that was read, and answer whoever waits for it or for a part of it."""
        context = reading.context
        for number, score in zip(reading.path[1:], scores[1:], strict=True):
            if number not in context.scores:
                if score is None or not 0.0 <= score <= 1.0:
                    why = f"the PRM gave {score} for a step, which is no probability: its weights or dtype are at fault"
                    return self._fail(context, EngineError(why))
                context.scores[number] = score
        for number in reading.path[1:]:
            done = context.readings.pop(number, None)
            if done is not None:
                self._forget(done)
                for answer, place, branch in done.waiting:
                    self._answer(context, answer, place, branch)

    def _forget(self, reading: _Reading) -> None:
        if reading in self._asked or reading in self._offered:
            self._num_tokens -= len(reading.ids[-1])
            self._num_open -= len(reading.waiting)
        self._asked.pop(reading, None)
        self._offered.pop(reading, None)

    def _answer(self, context: ScoreContext, answer: Answer, place: int, branch: Branch) -> None:
        """Put the branch anew with every step's score."""
        path = branch.path
        read_so_far, above, parent, changed = len(context.opening), OPENING, path[0], False
        for step, number in zip(path[1:], context.path(branch)[1:], strict=True):
            ids = self._ids(context, step.text, parent.parent is None)
            read_so_far += len(ids)
            distinct, above = context.step(above, number, ids), number
            if step.score is None:
                step, changed = replace(step, parent=parent, score=context.scores[number]), True
                context.ledger.steps_scored += 1
                distinct.draws += 1
                context.ledger.tokens_reread += read_so_far
                context.scored(step)
            elif changed:
                step = replace(step, parent=parent)
            parent = step
        answer.put(place, parent)
