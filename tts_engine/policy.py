"""The policy: draws of all searches, drawn together, one step each.

A draw waits until its parent's tokens have been read, takes its first token from the parent's own logits (children of one
parent share one forward), and then is a row of every tick until its step closes. What a tick holds decides nothing but speed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .branch import Branch, Finish
from .errors import EngineError
from .ledger import PolicyLedger
from .runner import ModelRunner, Segments, pairs
from .sampling import Sampling, sample
from .search.driver import Answer, Ask, Draw, Driver
from .steps import CLOSED, StepRule

MAX_PREFILL = 4096  # tokens of prompts and forgotten steps that one tick reads, beside at least one parent
ANSWER_SIGN = "\\boxed{"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a branch is cut: tokens of one step, tokens of all steps, positions the model has."""

    max_step_tokens: int
    max_tokens: int
    max_positions: int

    def step_room(self, branch: Branch, prompt_tokens: int) -> int:
        """Tokens that the next step after `branch` may have."""
        used = branch.num_tokens
        return min(self.max_step_tokens, self.max_tokens - used, self.max_positions - prompt_tokens - used)


@dataclass(slots=True, eq=False, kw_only=True)
class DrawContext:
    """What all draws of one search have in common. `drawn` is told every child as it closes."""

    driver: Driver
    sampling: Sampling
    key: tuple[int, int]  # of the random numbers, see sampling.philox_key
    limits: Limits
    max_steps: int
    prompt_tokens: int
    ledger: PolicyLedger
    drawn: Callable[[Branch], None]
    fed: dict[int, int] = field(default_factory=dict)  # by identity: leading tokens of the step that were computed before


@dataclass(slots=True, eq=False)
class _Row:
    """One draw on its way to its `place` in an answer. `tokens` are those of earlier leases: it was preempted and resumes behind
    them."""

    context: DrawContext
    answer: Answer
    place: int
    draw: Draw
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Batch:
    """The runs that one tick reads before or beside the decoding rows."""

    handles: list[int] = field(default_factory=list)
    is_lease: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    path_starts: list[int] = field(default_factory=list)
    tokens: list[Sequence[int]] = field(default_factory=list)
    run_of: dict[int, int] = field(default_factory=dict)  # node -> its run
    held: list[int] = field(default_factory=list)
    forks: list[tuple[_Row, int, int]] = field(default_factory=list)  # a draw, its parent's node, its parent's run
    resumed: list[tuple[_Row, int, int]] = field(default_factory=list)  # a draw, its lease, its run
    num_tokens: int = 0

    def add(self, handle: int, is_lease: bool, start: int, path_start: int, tokens: Sequence[int]) -> int:
        self.handles.append(handle)
        self.is_lease.append(is_lease)
        self.starts.append(start)
        self.path_starts.append(path_start)
        self.tokens.append(tokens)
        self.num_tokens += len(tokens)
        return len(self.handles) - 1


class Policy:
    """Draws for many searches over one model. `submit` what a driver asks; `tick` until `busy` is False."""

    def __init__(self, runner: ModelRunner, rule: StepRule, *, max_rows: int) -> None:
        self.runner, self.rule, self.max_rows = runner, rule, max_rows
        self.preemptions = 0
        self._waiting: deque[_Row] = deque()
        # Rows that decode, as columns over `max_rows` places; `_active` lists the places in use, oldest row first.
        self._active = np.empty(0, np.int64)
        self._free = list(range(max_rows))[::-1]
        self._rows: dict[int, _Row] = {}  # by place
        self._lease = np.zeros(max_rows, np.int64)
        self._path_start = np.zeros(max_rows, np.int32)
        self._length = np.zeros(max_rows, np.int32)  # tokens drawn; all but the last are written
        self._first = np.zeros(max_rows, np.int32)  # tokens it had when its lease began
        self._room = np.zeros(max_rows, np.int32)
        self._identity = np.zeros(max_rows, np.uint64)
        self._key = np.zeros((max_rows, 2), np.uint32)
        self._sampling = np.zeros(max_rows, np.int64)  # index into `_samplings`
        self._samplings: dict[Sampling, int] = {}
        self._state = np.zeros(max_rows, np.int32)  # the rule's
        self._tokens = np.zeros((max_rows, 64), np.int64)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or bool(len(self._active))

    @property
    def num_open(self) -> int:
        """Draws waiting or decoding."""
        return len(self._waiting) + len(self._active)

    def submit(self, context: DrawContext, ask: Ask) -> None:
        """Take an Expand; it is answered through the context's driver during some tick."""
        answer = Answer(context.driver, ask)
        self._waiting.extend(_Row(context, answer, place, draw) for place, draw in enumerate(ask.draws))

    def abandon(self, context: DrawContext) -> None:
        """Forget every draw of one search and give up its leases."""
        self._waiting = deque(row for row in self._waiting if row.context is not context)
        leaving = np.array([self._rows[place].context is context for place in self._active.tolist()], np.bool_)
        for place in self._active[leaving].tolist():
            self.runner.tree.release(int(self._lease[place]))
            self._vacate(place)
        self._active = self._active[~leaving]

    def tick(self) -> None:
        """Admit what fits, run one forward, draw one token a row, close the steps that ended."""
        batch = self._admit()
        decoding = self._active
        read_ends = np.cumsum([len(t) for t in batch.tokens], dtype=np.int64) - 1
        last = self._tokens[decoding, self._length[decoding] - 1]
        segments = Segments(
            handles=np.concatenate([np.array(batch.handles, np.int64), self._lease[decoding]]),
            is_lease=np.concatenate([np.array(batch.is_lease, bool), np.ones(len(decoding), bool)]),
            starts=np.concatenate([np.array(batch.starts, np.int32), self._length[decoding] - 1]),
            counts=np.concatenate([np.array([len(t) for t in batch.tokens], np.int32), np.ones(len(decoding), np.int32)]),
            path_starts=np.concatenate([np.array(batch.path_starts, np.int32), self._path_start[decoding]]),
            token_ids=np.concatenate([*(np.asarray(t, np.int64) for t in batch.tokens), last]),
        )
        runs = sorted({run for _, _, run in batch.forks + batch.resumed})
        reads = np.concatenate([read_ends[runs], batch.num_tokens + np.arange(len(decoding))]).astype(np.int64)
        try:
            hidden = self.runner.forward(segments, reads)
        except BaseException:
            self._send_back(batch)
            raise
        for node, is_lease, start, new in zip(batch.handles, batch.is_lease, batch.starts, batch.tokens, strict=True):
            if not is_lease:
                self.runner.tree.set_computed(node, start + len(new))
        logits = self.runner.decoder.logits(hidden)
        self._seat(batch)
        head_of = {run: i for i, run in enumerate(runs)}
        sources = np.concatenate([np.array([head_of[run] for _, _, run in batch.forks + batch.resumed], np.int64),
                                  len(runs) + np.arange(len(decoding))])  # fmt: skip
        places = np.concatenate([self._active[len(decoding) :], decoding])
        self._charge_heads(batch, runs)
        tokens = self._draw(logits, sources, places)
        self._append(places, tokens)

    # Admission

    def _admit(self) -> _Batch:
        """Parents to read for waiting draws, oldest first, while rows, blocks and the tick's prefill last."""
        batch, tree = _Batch(), self.runner.tree
        while self._waiting and len(self._active) + len(batch.forks) + len(batch.resumed) < self.max_rows:
            row = self._waiting[0]
            working = len(self._active) + len(batch.forks) + len(batch.resumed)
            counts = tree.counts()
            if working and (counts.free + counts.idle <= working or batch.num_tokens >= MAX_PREFILL):
                break  # each row at work may want another block soon
            node = self._read_parent(batch, row)
            if node is None or (row.tokens and not self._resume(batch, row, node)):
                assert working, "a branch that was found to fit the pool does not"
                break
            if not row.tokens:
                batch.forks.append((row, node, batch.run_of[node]))
            self._waiting.popleft()
        return batch

    def _read_parent(self, batch: _Batch, row: _Row) -> int | None:
        """Hold the draw's parent and see that its path is read; its node, or None where there is no room for the path."""
        tree, path = self.runner.tree, row.draw.branch.path
        nodes = self.runner.hold_path([step.tokens for step in path])
        if nodes is None:
            return None
        batch.held.append(nodes[-1])
        path_start = 0
        for node, step in zip(nodes, path, strict=True):
            computed, count = tree.computed(node), len(step.tokens)
            if node == nodes[-1] and not row.tokens:
                computed = min(computed, count - 1)  # the first draw wants its last hidden state, known K and V or not
            if computed < count and node not in batch.run_of:
                batch.run_of[node] = batch.add(node, False, computed, path_start, step.tokens[computed:])
                fed = row.context.fed
                self._charge(row.context, path_start + computed, count - computed, max(0, fed.get(step.identity, 0) - computed))
                fed[step.identity] = max(fed.get(step.identity, 0), count)
            path_start += count
        return nodes[-1]

    def _resume(self, batch: _Batch, row: _Row, parent: int) -> bool:
        """Lease again for a preempted draw and have its tokens read; False where there is no room."""
        tree = self.runner.tree
        lease = tree.lease(parent)
        if not tree.extend(lease, len(row.tokens)):
            tree.release(lease)
            return False
        run = batch.add(lease, True, 0, tree.lease_start(lease), row.tokens)
        batch.resumed.append((row, lease, run))
        return True

    def _seat(self, batch: _Batch) -> None:
        """Give each admitted draw a place among the rows; the batch's holds end, leases pin the paths from here on."""
        tree, seated = self.runner.tree, []
        fresh = [(row, tree.lease(node), 0) for row, node, _ in batch.forks]
        for row, lease, count in fresh + [(row, lease, len(row.tokens)) for row, lease, _ in batch.resumed]:
            place = self._free.pop()
            context, branch = row.context, row.draw.branch
            self._rows[place], self._lease[place], self._path_start[place] = row, lease, tree.lease_start(lease)
            self._length[place] = self._first[place] = count
            self._room[place] = context.limits.step_room(branch, context.prompt_tokens)
            self._identity[place], self._key[place] = row.draw.identity, context.key
            self._sampling[place] = self._samplings.setdefault(context.sampling, len(self._samplings))
            self._state[place] = self.rule.start(row.draw.identity, context.key)
            self._keep_tokens(place, row.tokens)
            seated.append(place)
        for node in batch.held:
            tree.drop(node)
        self._active = np.concatenate([self._active, np.array(seated, np.int64)])

    def _send_back(self, batch: _Batch) -> None:
        """Undo an admission whose forward failed: nothing is held, and the draws wait again."""
        for _, lease, _ in batch.resumed:
            self.runner.tree.release(lease)
        for node in batch.held:
            self.runner.tree.drop(node)
        self._waiting.extendleft(row for row, _, _ in reversed(batch.forks + batch.resumed))

    def _keep_tokens(self, place: int, tokens: list[int]) -> None:
        if len(tokens) + 1 > self._tokens.shape[1]:
            self._grow_tokens(len(tokens) + 1)
        self._tokens[place, : len(tokens)] = tokens
        for token in tokens:
            self._state[place] = self.rule.advance(np.array([token]), self._state[[place]])[0]

    def _grow_tokens(self, need: int) -> None:
        wider = np.zeros((self.max_rows, max(need, 2 * self._tokens.shape[1])), np.int64)
        wider[:, : self._tokens.shape[1]] = self._tokens
        self._tokens = wider

    # One token a row

    def _draw(self, logits, sources: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The next token int64 of each place; `sources` are rows of `logits`."""
        tokens = np.empty(len(places), np.int64)
        for sampling, number in self._samplings.items():
            at = self._sampling[places] == number
            if not at.any():
                continue
            rows, who = sources[at], places[at]
            positions = self._path_start[who] + self._length[who]
            tokens[at] = sample(logits, rows, sampling, self._key[who], self._identity[who], positions)
        won = logits[torch.from_numpy(sources).to(logits.device), torch.from_numpy(tokens).to(logits.device)]
        if not won.isfinite().all():
            raise EngineError("the policy's logits are not finite: its weights or dtype are at fault")
        return tokens

    def _append(self, places: np.ndarray, tokens: np.ndarray) -> None:
        """Add a token to each row; rows whose step ended leave, the others get room for what comes, or are preempted."""
        if (self._length[places] + 1 > self._tokens.shape[1]).any():
            self._grow_tokens(int(self._length[places].max()) + 1)
        self._tokens[places, self._length[places]] = tokens
        self._length[places] += 1
        self._state[places] = self.rule.advance(tokens, self._state[places])
        at_boundary, ended = self._state[places] == CLOSED, self.rule.eos[tokens]
        cut = ~ended & ~at_boundary & (self._length[places] >= self._room[places])
        closing = ended | at_boundary | cut
        leaving = dict(zip(places[closing].tolist(), zip(ended[closing], cut[closing], strict=True), strict=True))
        # Rows that go on take room first: a closing row's spare slot may be the last one.
        order = self._active
        self._active = order[~np.isin(order, places[closing])]
        self._extend()
        for place in order.tolist():
            if place in leaving:
                self._close(place, *leaving[place])

    def _extend(self) -> None:
        """One more slot for every row that goes on; the youngest rows give way where blocks run out."""
        done = 0
        while done < len(self._active):
            done += self.runner.tree.extend_many(self._lease[self._active[done:]], 1)
            if done < len(self._active):
                youngest = int(self._active[-1])
                self._active = self._active[:-1]
                self._preempt(youngest)
                done = min(done, len(self._active))

    def _preempt(self, place: int) -> None:
        row = self._rows[place]
        self._charge_lease(place)
        row.tokens = self._tokens[place, : self._length[place]].tolist()
        self.runner.tree.release(int(self._lease[place]))
        self._vacate(place)
        self._waiting.appendleft(row)
        self.preemptions += 1

    def _close(self, place: int, ended: bool, cut: bool) -> None:
        """The step is whole: make the child, keep its KV if it may be expanded, pass it on."""
        row, tree = self._rows[place], self.runner.tree
        context, draw = row.context, row.draw
        tokens = tuple(self._tokens[place, : self._length[place]].tolist())
        text = self.rule.text(tokens)
        finish = Finish.EOS if ended else Finish.LENGTH if cut else Finish.ANSWER if ANSWER_SIGN in text else None
        child = Branch(draw.branch, tokens, text, draw.identity, draw.lane, draw.draw, finish)
        if not child.finished and context.limits.step_room(child, context.prompt_tokens) <= 0:
            child = child.ended(Finish.LENGTH)
        lease = int(self._lease[place])
        keep = not child.finished and tree.extend(lease, 1)
        self._charge_lease(place)
        if keep:
            tree.drop(tree.seal(lease, tokens, len(tokens) - 1))
        else:
            tree.release(lease)
        context.ledger.tokens_generated += len(tokens)
        self._vacate(place)
        self._pass_on(row, child)

    def _pass_on(self, row: _Row, child: Branch) -> None:
        """Answer the ask with the child, or draw on where the whole trajectory was asked for."""
        context = row.context
        if row.draw.to_end:
            if child.depth >= context.max_steps:
                child = child.ended(Finish.DEPTH)
            context.drawn(child)
            if not child.finished:
                draw = context.driver.next_draw(child, row.draw.lane, to_end=True)
                self._waiting.appendleft(_Row(context, row.answer, row.place, draw))
                return
        else:
            context.drawn(child)
        row.answer.put(row.place, child)

    def _vacate(self, place: int) -> None:
        del self._rows[place]
        self._free.append(place)

    # Counting

    def _charge(self, context: DrawContext, start: int, count: int, recomputed: int) -> None:
        self.runner.charge(context.ledger, tokens=count, context_pairs=pairs(start, count))
        context.ledger.tokens_recomputed += min(recomputed, count)

    def _charge_lease(self, place: int) -> None:
        """Count what a row computed since its lease began: every token but the newest, and the logits of what it drew."""
        row = self._rows[place]
        written, first = int(self._length[place]) - 1, int(self._first[place])
        identity, fed = row.draw.identity, row.context.fed
        before = int(self._path_start[place])
        self._charge(row.context, before, written, fed.get(identity, 0))
        # The first draw of a lease reads logits of the parent's run, or of the resuming run: counted in _charge_heads.
        if written > first:
            self._charge_reads(row.context, before + first, written - first)
        fed[identity] = max(fed.get(identity, 0), written)

    def _charge_heads(self, batch: _Batch, runs: list[int]) -> None:
        """One row of logits for each run that is read, on the account of the first draw that reads it."""
        payer = {run: row.context for row, _, run in reversed(batch.forks + batch.resumed)}
        for run in runs:
            self._charge_reads(payer[run], batch.path_starts[run] + batch.starts[run] + len(batch.tokens[run]) - 1, 1)

    def _charge_reads(self, context: DrawContext, start: int, count: int) -> None:
        """Tokens behind which one is drawn: the rest of the last layer, and logits."""
        self.runner.charge_reads(context.ledger, tokens=count, context_pairs=pairs(start, count))
        context.ledger.head_flops += self.runner.decoder.spec.lm_head_flops * count
