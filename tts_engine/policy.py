"""The policy: draws of all searches, drawn together, one step each.

A draw waits until its parent's tokens have been read, takes its first token from the parent's own logits (children of one
parent share one forward), and then is a row of every tick until its step closes. What a tick holds decides nothing but speed.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .branch import Branch, Finish
from .errors import EngineError
from .kv.tree import NO_NODE
from .ledger import PolicyLedger
from .runner import ModelRunner, Segments, pairs
from .sampling import Sampling, sample
from .search.driver import Answer, Ask, Draw, Driver
from .steps import CLOSED, StepRule

MAX_PREFILL = 4096  # tokens of prompts and forgotten steps that one tick reads, beside at least one parent
ANSWER_SIGN = "\\boxed{"

# What a batch needs to know of a row that decodes.
ROW = np.dtype([
    ("lease", np.int64),
    ("newest", np.int64),  # its last token, not written yet
    ("identity", np.uint64),
    ("key", np.uint32, 2),
    ("sampling", np.int32),  # index into Policy._samplings
    ("path_start", np.int32),
    ("length", np.int32),  # tokens drawn; all but the newest are written
    ("room", np.int32),
    ("state", np.int32),  # the rule's
], align=True)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a branch is cut: tokens of one step, tokens of all steps, positions the model has."""

    max_step_tokens: int
    max_tokens: int
    max_positions: int

    def step_room(self, used: int, prompt_tokens: int) -> int:
        """Tokens that the next step may have behind the prompt's and `used` others."""
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
    nodes: dict[int, int] = field(default_factory=dict)  # by identity: the step's node, all above it computed; or a stale handle


@dataclass(slots=True, eq=False)
class _Row:
    """One draw on its way to its `place` in an answer: waiting, or decoding under a lease. A row that was preempted waits with the
    tokens it has and resumes behind them."""

    context: DrawContext
    answer: Answer
    place: int
    draw: Draw
    tokens: list[int] = field(default_factory=list)
    lease: int = NO_NODE
    path_start: int = 0  # tokens on the path before the step
    first: int = 0  # tokens it had when its lease began


@dataclass(slots=True, eq=False)
class _Batch:
    """The runs that one tick reads before the decoding rows."""

    handles: list[int] = field(default_factory=list)
    is_lease: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    path_starts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # of all runs
    run_of: dict[int, int] = field(default_factory=dict)  # node -> its run
    sources: list[int] = field(default_factory=list)  # for each row admitted: the run that its next token is drawn behind

    def add(self, handle: int, is_lease: bool, start: int, path_start: int, tokens: Sequence[int]) -> int:
        self.handles.append(handle)
        self.is_lease.append(is_lease)
        self.starts.append(start)
        self.counts.append(len(tokens))
        self.path_starts.append(path_start)
        self.token_ids.extend(tokens)
        return len(self.handles) - 1


class Policy:
    """Draws for many searches over one model. `submit` what a driver asks; `tick` until `busy` is False."""

    def __init__(self, runner: ModelRunner, rule: StepRule, *, max_rows: int) -> None:
        self.runner, self.rule, self.max_rows = runner, rule, max_rows
        self.preemptions = 0
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # that decode, oldest first
        self._table = np.zeros(max_rows, ROW)  # the first so many are theirs
        self._samplings: dict[Sampling, int] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    @property
    def num_open(self) -> int:
        """Draws waiting or decoding."""
        return len(self._waiting) + len(self._rows)

    def submit(self, context: DrawContext, ask: Ask) -> None:
        """Take an Expand; it is answered through the context's driver during some tick."""
        answer = Answer(context.driver, ask)
        self._waiting.extend(_Row(context, answer, place, draw) for place, draw in enumerate(ask.draws))

    def abandon(self, context: DrawContext) -> None:
        """Forget every draw of one search and give up its leases."""
        self._waiting = deque(row for row in self._waiting if row.context is not context)
        for row in self._rows:
            if row.context is context:
                self.runner.tree.release(row.lease)
        self._keep(np.array([row.context is not context for row in self._rows], bool))

    def tick(self) -> None:
        """Admit what fits, run one forward, draw one token a row, close the steps that ended."""
        decoding = len(self._rows)
        batch = self._admit()
        rows = self._table[:decoding]
        segments = Segments(
            handles=_followed(batch.handles, rows["lease"]),
            is_lease=_followed(batch.is_lease, np.ones(decoding, bool)),
            starts=_followed(batch.starts, rows["length"] - 1),
            counts=_followed(batch.counts, np.ones(decoding, np.int32)),
            path_starts=_followed(batch.path_starts, rows["path_start"]),
            token_ids=_followed(batch.token_ids, rows["newest"]),
        )
        runs = sorted(set(batch.sources))
        ends = segments.counts.cumsum(dtype=np.int64)
        reads = np.concatenate([ends[runs], ends[len(batch.handles) :]]) - 1
        try:
            logits = self.runner.decoder.logits(self.runner.forward(segments, reads))
        except BaseException:
            self._send_back(decoding)
            raise
        for node, run in batch.run_of.items():
            self.runner.tree.set_computed(node, batch.starts[run] + batch.counts[run])
        self._charge_heads(batch, decoding)
        head_of = {run: i for i, run in enumerate(runs)}
        heads = np.array([head_of[run] for run in batch.sources], np.int64)
        self._append(self._draw(logits, np.concatenate([np.arange(len(runs), len(reads)), heads])))

    # Admission

    def _admit(self) -> _Batch:
        """Seat waiting draws, oldest first, while rows, blocks and the tick's prefill last; what must be read for them."""
        batch, tree = _Batch(), self.runner.tree
        while self._waiting and len(self._rows) < self.max_rows:
            counts = tree.counts()
            if self._rows and (counts.free + counts.idle <= len(self._rows) or len(batch.token_ids) >= MAX_PREFILL):
                break  # each row at work may want another block soon
            if not self._seat(batch, self._waiting[0]):
                assert self._rows, "a branch that was found to fit the pool does not"
                break
            self._waiting.popleft()
        return batch

    def _seat(self, batch: _Batch, row: _Row) -> bool:
        """Give a draw a lease and a place among the rows; False where there is no room for its path or its tokens."""
        tree, context, draw = self.runner.tree, row.context, row.draw
        found = self._hold_parent(row)
        if found is None:
            return False
        path, nodes = found
        row.lease = tree.lease(nodes[-1])
        tree.drop(nodes[-1])  # the lease pins the path from here on
        if row.tokens and not tree.extend(row.lease, len(row.tokens)):
            tree.release(row.lease)
            return False
        row.path_start, row.first = tree.lease_start(row.lease), len(row.tokens)
        self._read(batch, row, path, nodes)
        resumed = bool(row.tokens)
        batch.sources.append(batch.add(row.lease, True, 0, row.path_start, row.tokens) if resumed else batch.run_of[nodes[-1]])
        state = self.rule.start(draw.identity, context.key)
        for token in row.tokens:
            state = int(self.rule.advance(np.array([token]), np.array([state]))[0])
        room = context.limits.step_room(row.path_start - context.prompt_tokens, context.prompt_tokens)
        sampling = self._samplings.setdefault(context.sampling, len(self._samplings))
        self._table[len(self._rows)] = (row.lease, 0, draw.identity, context.key, sampling, row.path_start, row.first, room, state)
        self._rows.append(row)
        return True

    def _hold_parent(self, row: _Row) -> tuple[list[Branch], list[int]] | None:
        """Steps of the draw's path that may have to be read, and their nodes, the last one held; None where there is no room."""
        context, parent = row.context, row.draw.branch
        try:
            node = context.nodes[parent.identity]
            self.runner.tree.hold(node)
            return [parent], [node]
        except (KeyError, ValueError):  # not read yet, or evicted since
            path = parent.path
            nodes = self.runner.hold_path([step.tokens for step in path])
            return None if nodes is None else (path, nodes)

    def _read(self, batch: _Batch, row: _Row, path: list[Branch], nodes: list[int]) -> None:
        """See that a path is read as far as it was not, its last token in any case for a draw that begins there."""
        tree, context = self.runner.tree, row.context
        path_start = tree.path_len(nodes[0]) - len(path[0].tokens)
        for node, step in zip(nodes, path, strict=True):
            computed, count = tree.computed(node), len(step.tokens)
            if step is path[-1] and not row.tokens:
                computed = min(computed, count - 1)  # the first draw wants its last hidden state, known K and V or not
            if computed < count and node not in batch.run_of:
                batch.run_of[node] = batch.add(node, False, computed, path_start, step.tokens[computed:])
                fed = context.fed.get(step.identity, 0)
                self._charge(context, path_start + computed, count - computed, max(0, fed - computed))
                context.fed[step.identity] = max(fed, count)
            context.nodes[step.identity] = node
            path_start += count

    def _send_back(self, decoding: int) -> None:
        """Undo an admission whose forward failed: no lease is left, and the draws behind the first `decoding` rows wait again."""
        for row in reversed(self._rows[decoding:]):
            self.runner.tree.release(row.lease)
            row.context.nodes.clear()  # some of them were to be computed
            self._waiting.appendleft(row)
        del self._rows[decoding:]

    # One token a row

    def _draw(self, logits: torch.Tensor, sources: np.ndarray) -> np.ndarray:
        """The next token int64 of each row; sources int64, its row of `logits`."""
        rows = self._table[: len(self._rows)]
        tokens, samplings = np.empty(len(rows), np.int64), list(self._samplings)
        for number in set(rows["sampling"].tolist()):
            at = (rows["sampling"] == number).nonzero()[0]
            who = rows.take(at)
            positions = who["path_start"] + who["length"]
            tokens[at] = sample(logits, sources[at], samplings[number], who["key"], who["identity"], positions)
        won = logits.take(torch.from_numpy(sources * logits.shape[1] + tokens).to(logits.device))
        if not math.isfinite(won.sum().item()):
            raise EngineError("the policy's logits are not finite: its weights or dtype are at fault")
        return tokens

    def _append(self, tokens: np.ndarray) -> None:
        """Add a token to each row; rows whose step ended leave, the others get room for what comes, or are preempted."""
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.tokens.append(token)
        rows = self._table[: len(self._rows)]
        rows["newest"] = tokens
        rows["length"] += 1
        rows["state"] = self.rule.advance(tokens, rows["state"])
        ended, whole = self.rule.eos[tokens], rows["state"] == CLOSED
        closing = ended | whole | (rows["length"] >= rows["room"])
        leaving = [(self._rows[i], ended[i], whole[i]) for i in closing.nonzero()[0].tolist()]
        # Rows that go on take room first: a closing row's spare slot may be the last one.
        if leaving:
            self._keep(~closing)
        self._extend()
        for row, at_end, at_boundary in leaving:
            self._close(row, Finish.EOS if at_end else None if at_boundary else Finish.LENGTH)

    def _keep(self, stays: np.ndarray) -> None:
        """Of all rows those that stay, bool [B]."""
        at = stays.nonzero()[0]
        self._table[: len(at)] = self._table.take(at)
        self._rows = [self._rows[i] for i in at.tolist()]

    def _extend(self) -> None:
        """One more slot for every row that goes on; the youngest rows give way where blocks run out."""
        done = 0
        while done < len(self._rows):
            done += self.runner.tree.extend_many(self._table["lease"][done : len(self._rows)], 1)
            if done < len(self._rows):
                self._preempt(self._rows.pop())
                done = min(done, len(self._rows))

    def _preempt(self, row: _Row) -> None:
        self._charge_lease(row)
        self.runner.tree.release(row.lease)
        self._waiting.appendleft(row)
        self.preemptions += 1

    def _close(self, row: _Row, finish: Finish | None) -> None:
        """The step is whole: make the child, keep its KV if it may be expanded, pass it on."""
        context, draw, tree, tokens = row.context, row.draw, self.runner.tree, tuple(row.tokens)
        text = self.rule.text(tokens)
        if finish is None and ANSWER_SIGN in text:
            finish = Finish.ANSWER
        used = row.path_start - context.prompt_tokens + len(tokens)
        if finish is None and context.limits.step_room(used, context.prompt_tokens) <= 0:
            finish = Finish.LENGTH
        self._charge_lease(row)
        if finish is None and tree.extend(row.lease, 1):
            context.nodes[draw.identity] = tree.seal(row.lease, tokens, len(tokens) - 1)
            tree.drop(context.nodes[draw.identity])
        else:
            tree.release(row.lease)
        context.ledger.tokens_generated += len(tokens)
        self._pass_on(row, Branch(draw.branch, tokens, text, draw.identity, draw.lane, draw.draw, finish))

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

    # Counting

    def _charge(self, context: DrawContext, start: int, count: int, recomputed: int) -> None:
        self.runner.charge(context.ledger, tokens=count, context_pairs=pairs(start, count))
        context.ledger.tokens_recomputed += min(recomputed, count)

    def _charge_lease(self, row: _Row) -> None:
        """Count what a row computed since its lease began: every token but the newest, and the logits of what it drew."""
        written, identity, fed = len(row.tokens) - 1, row.draw.identity, row.context.fed
        known = fed.get(identity, 0)
        self._charge(row.context, row.path_start, written, known)
        # The first draw of a lease reads logits of the parent's run, or of the resuming run: counted in _charge_heads.
        if written > row.first:
            self._charge_reads(row.context, row.path_start + row.first, written - row.first)
        fed[identity] = max(known, written)

    def _charge_heads(self, batch: _Batch, decoding: int) -> None:
        """One row of logits for each run that is read, on the account of the first draw that reads it."""
        payers = dict(zip(reversed(batch.sources), (row.context for row in reversed(self._rows[decoding:])), strict=True))
        for run, context in payers.items():
            self._charge_reads(context, batch.path_starts[run] + batch.starts[run] + batch.counts[run] - 1, 1)

    def _charge_reads(self, context: DrawContext, start: int, count: int) -> None:
        """Tokens behind which one is drawn: the rest of the last layer, and logits."""
        self.runner.charge_reads(context.ledger, tokens=count, context_pairs=pairs(start, count))
        context.ledger.head_flops += self.runner.decoder.spec.lm_head_flops * count


def _followed(listed: list[int] | list[bool], column: np.ndarray) -> np.ndarray:
    """What is listed, and behind it the column."""
    return np.concatenate([np.array(listed, column.dtype), column])
