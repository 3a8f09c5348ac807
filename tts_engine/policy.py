"""The policy: draws of all searches, drawn together, one step each.

A draw waits until its parent's tokens have been read, takes its first token from the parent's own logits (children of one
parent share one forward), and then is a row of every tick until its step closes. What a tick holds decides nothing but speed.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .branch import Branch, Finish
from .errors import EngineError
from .graphs import TICKS, DecodeGraphs, bucket_for
from .kv.tree import NO_NODE
from .ledger import DistinctStep, DistinctSteps, PolicyLedger, Work, pairs
from .rows import END, FAULT, WHOLE, Rows, Run
from .runner import ModelRunner
from .sampling import Sampling, sample
from .search.driver import Answer, Ask, Draw, Driver
from .steps import StepRule

NO_TOKEN = -1  # what `sample` draws from logits that are no numbers
MAX_PREFILL = 4096  # tokens of prompts and forgotten steps that one tick reads, beside at least one parent
ANSWER_SIGN = "\\boxed{"
NOT_FINITE = "the policy's logits are not finite: its weights or dtype are at fault"
COVER = 2  # ticks that a device does while the host closes the steps that ended before them


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
    nodes: dict[int, int] = field(default_factory=dict)  # by identity: the step's node, all above it computed; or a stale handle
    steps: DistinctSteps = field(init=False)  # those that closed

    def __post_init__(self) -> None:
        self.steps = DistinctSteps(self.prompt_tokens)


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
    seat: int = 0  # among the rows of the ticks that are under way
    computed: int = 0  # leading tokens that were computed in earlier leases


@dataclass(slots=True, eq=False)
class _Missing:
    """What a tick reads of one step's tokens, on the account of the first search that needs it."""

    context: DrawContext
    step: DistinctStep
    start: int
    kept: bool  # its keys and values are there: what is missing is the last token's hidden state


@dataclass(slots=True, eq=False)
class _Batch:
    """What one tick reads for the rows it admits."""

    runs: list[Run] = field(default_factory=list)
    num_tokens: int = 0  # of all runs
    run_of: dict[int, int] = field(default_factory=dict)  # node -> its run
    sources: list[int] = field(default_factory=list)  # for each row admitted: the run that its next token is drawn behind
    missing: dict[int, _Missing] = field(default_factory=dict)  # run -> its account, where it is a node's
    first: dict[int, _Row] = field(default_factory=dict)  # run -> the first draw behind it

    @property
    def can_go_on(self) -> bool:
        """Whether every row that it is read for has one token of it to itself, as rows that decode have."""
        return len(set(self.sources)) == len(self.sources) == len(self.runs) == self.num_tokens

    def add(self, run: Run) -> int:
        """Its number."""
        self.runs.append(run)
        self.num_tokens += len(run.tokens)
        return len(self.runs) - 1


class Policy:
    """Draws for many searches over one model. `submit` what a driver asks; `tick` until `busy` is False."""

    def __init__(self, runner: ModelRunner, rule: StepRule, *, max_rows: int, graphs: DecodeGraphs | None = None) -> None:
        """graphs: of that decoder and cache, for that rule. With them rows decode for many ticks on end, and the host does what is
        its own meanwhile."""
        self.runner, self.rule, self.max_rows, self.graphs = runner, rule, max_rows, graphs
        self.preemptions = 0
        self._head_flops = runner.decoder.spec.lm_head_flops
        self._waiting: deque[_Row] = deque()
        self._rows = Rows[_Row](max_rows)
        self._samplings: dict[Sampling, int] = {}
        self._under_way = 0  # ticks that the graphs were told to do
        self._seated = False  # the last forward was read by draws that it seated

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
        for row in self._rows.owners:
            if row.context is context:
                self.runner.tree.release(row.lease)
        self._rows.keep([row.context is not context for row in self._rows.owners])

    def tick(self) -> None:
        """Admit what fits, run one forward, draw one token a row, close the steps that ended.

        With graphs rows decode for many ticks on end, and a call ends while these are under way. Where draws are seated that want
        more read than graphs can, that is one forward, and the next draws are seated after ticks on end.
        """
        ticks, leaving = self._under_way, self._finish()
        try:
            if leaving and ticks > COVER:
                self._start(COVER)
        finally:
            self._leave(leaving)
        if self._under_way:
            return
        decoding = len(self._rows)
        batch = _Batch() if self._seated and self._rows and self.graphs is not None else self._admit()
        self._seated = False
        try:
            if not self._rows or self._start(TICKS, batch):
                return
            logits, sources = self._forward(batch, decoding)
        except BaseException:
            self._send_back(decoding)
            raise
        self._seated = bool(batch.runs)
        self._append(self._draw(logits, sources))

    # Admission

    def _admit(self) -> _Batch:
        """Seat waiting draws, oldest first, while rows, blocks and the tick's prefill last; what must be read for them."""
        batch, tree = _Batch(), self.runner.tree
        while self._waiting and len(self._rows) < self.max_rows:
            if self._rows and (tree.available() <= len(self._rows) or batch.num_tokens >= MAX_PREFILL):
                break  # each row at work may want another block soon
            if not self._seat(batch, self._waiting[0]):
                assert self._rows, "a branch that was found to fit the pool does not"
                break
            self._waiting.popleft()
        return batch

    def _seat(self, batch: _Batch, row: _Row) -> bool:
        """Give a draw a lease and a place among the rows; False where there is no room for its path or its tokens."""
        tree, context, draw = self.runner.tree, row.context, row.draw
        leased = self._lease(row)
        if leased is None:
            return False
        row.lease, path, nodes = leased
        if row.tokens and not tree.extend(row.lease, len(row.tokens)):
            tree.release(row.lease)
            return False
        row.path_start, row.first = tree.lease_start(row.lease), len(row.tokens)
        self._read(batch, row, path, nodes)
        run = batch.add(Run(row.lease, True, 0, row.path_start, row.tokens)) if row.tokens else batch.run_of[nodes[-1]]
        batch.sources.append(run)
        batch.first.setdefault(run, row)
        state = self.rule.start(draw.identity, context.key)
        for token in row.tokens:
            state = int(self.rule.advance(np.array([token]), np.array([state]))[0])
        self._rows.add(
            row,
            lease=row.lease,
            identity=draw.identity,
            key=context.key,
            sampling=self._samplings.setdefault(context.sampling, len(self._samplings)),
            path_start=row.path_start,
            length=row.first,
            room=context.limits.step_room(row.path_start - context.prompt_tokens, context.prompt_tokens),
            state=state,
        )
        return True

    def _lease(self, row: _Row) -> tuple[int, list[Branch], list[int]] | None:
        """A lease behind a draw's path, the steps of it that may have to be read, and their nodes; None where there is no room."""
        tree, context, parent = self.runner.tree, row.context, row.draw.branch
        try:
            node = context.nodes[parent.identity]
            return tree.lease(node), [parent], [node]
        except (KeyError, ValueError):  # not read yet, or evicted since
            path = parent.path
            nodes = self.runner.hold_path([step.tokens for step in path])
            if nodes is None:
                return None
            lease = tree.lease(nodes[-1])
            tree.drop(nodes[-1])  # the lease pins the path from here on
            return lease, path, nodes

    def _read(self, batch: _Batch, row: _Row, path: list[Branch], nodes: list[int]) -> None:
        """See that a path is read as far as it was not, its last token in any case for a draw that begins there."""
        tree, context = self.runner.tree, row.context
        path_start = row.path_start - sum(len(step.tokens) for step in path)
        for node, step in zip(nodes, path, strict=True):
            computed, count = tree.computed(node), len(step.tokens)
            kept = computed == count
            if step is path[-1] and not row.tokens:
                computed = min(computed, count - 1)  # the first draw wants its last hidden state, known K and V or not
            if computed < count and node not in batch.run_of:
                run = batch.run_of[node] = batch.add(Run(node, False, computed, path_start, step.tokens[computed:]))
                batch.missing[run] = _Missing(context, context.steps[step.identity], computed, kept)
            context.nodes[step.identity] = node
            path_start += count

    # One forward

    def _forward(self, batch: _Batch, decoding: int) -> tuple[torch.Tensor, np.ndarray]:
        """Read the batch's runs and the first `decoding` rows; logits float32 [R, V], and int64 [B] which of them is each row's."""
        segments, read_at, sources = self._rows.follow(batch.runs, batch.sources, decoding)
        logits = self.runner.decoder.logits(self.runner.forward(segments, read_at))
        self._note_read(batch)
        padding = self.runner.padding(len(segments.token_ids), len(read_at), self._head_flops)
        self._rows.owners[-1].context.ledger.padding_flops += padding
        return logits, sources

    def _note_read(self, batch: _Batch) -> None:
        for number in batch.run_of.values():
            run = batch.runs[number]
            self.runner.tree.set_computed(run.handle, run.start + len(run.tokens))
        self._charge_runs(batch)

    def _send_back(self, decoding: int) -> None:
        """Undo an admission whose forward failed: no lease is left, and the draws behind the first `decoding` rows wait again."""
        while len(self._rows) > decoding:
            row = self._rows.pop()
            self.runner.tree.release(row.lease)
            row.context.nodes.clear()  # some of them were to be computed
            self._waiting.appendleft(row)

    # One token a row

    def _draw(self, logits: torch.Tensor, sources: np.ndarray) -> np.ndarray:
        """The next token int64 of each row; sources int64, its row of `logits`."""
        tokens = np.empty(len(sources), np.int64)
        for sampling, number in self._samplings.items():
            at, rows, *who = self._rows.draws(number, sources)
            if len(at):
                tokens[at] = sample(logits, rows, sampling, *who)
        return tokens

    def _append(self, tokens: np.ndarray) -> None:
        """Add a token to each row; rows whose step ended leave, the others get room for what comes, or are preempted."""
        listed = tokens.tolist()
        if NO_TOKEN in listed:
            raise EngineError(NOT_FINITE)
        for row, token in zip(self._rows.owners, listed, strict=True):
            row.tokens.append(token)
        leaving = self._rows.append(tokens, self.rule)
        self._extend()  # a closing row's spare slot may be the last one: rows that go on take room first
        self._leave(leaving)

    def _leave(self, leaving: list[tuple[_Row, int]]) -> None:
        for row, why in leaving:
            self._close(row, Finish.EOS if why & END else None if why & WHOLE else Finish.LENGTH)

    def _extend(self) -> None:
        """One more slot for every row that goes on; the youngest rows give way where blocks run out."""
        done = 0
        while done < len(self._rows):
            done += self.runner.tree.extend_many(self._rows.table["lease"][done:], 1)
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
        step = context.steps.add(draw.identity, draw.branch.identity, tokens)
        step.computed = max(step.computed, step.written)
        if finish is None:
            context.nodes[draw.identity] = tree.keep(row.lease, tokens, len(tokens) - 1)
        else:
            tree.release(row.lease)
        context.ledger.tokens_generated += len(tokens)
        self._pass_on(row, Branch(draw.branch, tokens, text, draw.identity, draw.lane, draw.draw, finish))

    def _pass_on(self, row: _Row, child: Branch) -> None:
        """Answer the ask with the child, or draw on where the whole trajectory was asked for."""
        context = row.context
        if row.draw.to_end and child.depth >= context.max_steps:
            child = child.ended(Finish.DEPTH)
        context.drawn(child)
        row.answer.close_step(child)
        if row.draw.to_end and not child.finished:
            draw = context.driver.next_draw(child, row.draw.lane, to_end=True)
            self._waiting.appendleft(_Row(context, row.answer, row.place, draw))
        else:
            row.answer.put(row.place, child)

    # Many ticks on end

    def _start(self, ticks: int, batch: _Batch | None = None) -> bool:
        """Have the graphs do so many for all rows, or as many as there are blocks for; False where it is none.

        Those that were just seated begin by reading what is missing, if that is one token of nobody else's each.
        """
        rows, tree, batch = self._rows, self.runner.tree, batch or _Batch()
        if self.graphs is None or not rows or not batch.can_go_on:
            return False
        segments, _, seats = rows.follow(batch.runs, batch.sources, len(rows) - len(batch.sources))
        layout = self.runner.layout(segments)
        outlook = self.graphs.plan(layout)
        ticks = min(ticks, outlook.ticks)
        while ticks and self._blocks_for(ticks) > tree.available():
            ticks //= 2
        if ticks <= bool(batch.runs) or tree.extend_many(rows.table["lease"], ticks) < len(rows):
            return False
        order = np.argsort(seats)
        standing, counts = rows.table[order], np.full(len(rows), ticks, np.int32)
        ahead = tree.write_slots(standing["lease"], np.ones(len(rows), bool), standing["length"], counts)
        draws = rows.begin(segments.token_ids, layout, ahead.reshape(-1, ticks).T, order, list(self._samplings))
        self.graphs.start(outlook, draws)
        for row, seat in zip(rows.owners, seats.tolist(), strict=True):
            row.seat = seat
        self._note_read(batch)
        self._under_way = ticks
        self.runner.count_forwards(ticks)
        return True

    def _blocks_for(self, ticks: int) -> int:
        """Blocks that all rows together lack for so many tokens more."""
        size = self.runner.tree.block_size
        spare = -self._rows.table["length"] % size
        return int(-(np.minimum(spare - ticks, 0) // size).sum())

    def _finish(self) -> list[tuple[_Row, int]]:
        """Wait for the ticks under way, if there are any; rows that stopped, and why."""
        if not self._under_way or self.graphs is None:
            return []
        drawn, ticks = self.graphs.finish(), self._under_way
        rows, self._under_way = self._rows.owners, 0
        if any(drawn.stop[row.seat] & FAULT for row in rows):
            raise EngineError(NOT_FINITE)
        if rows:  # those of the batch that are nobody's, and those that had stopped, went through every tick all the same
            beside = ticks * (bucket_for(len(drawn.drawn)) or 0) - int(drawn.drawn.sum())
            rows[-1].context.ledger.padding_flops += self.flops(Work(tokens=beside, reads=beside))
        columns = drawn.tokens.T.tolist()
        for row in rows:
            row.tokens += columns[row.seat][: drawn.drawn[row.seat]]
        return self._rows.go_on(drawn, [row.seat for row in rows])

    # Counting

    def count(self, context: DrawContext) -> None:
        """What of a search's costs follows from its tree, once all of it is drawn."""
        context.ledger.ideal_flops = self.flops(context.steps.drawn_once())
        context.ledger.duplicate_flops = self.flops(context.steps.drawn_again())
        context.ledger.hold(context.steps.widest_round(), self.runner.token_bytes)

    def flops(self, work: Work) -> int:
        """What work of this model comes to."""
        return self.runner.flops(work, self._head_flops)

    def _charge_runs(self, batch: _Batch) -> None:
        """Count what was read of nodes, and one row of logits for each run behind which something is drawn, on the account of the
        first draw there."""
        computed = list[DistinctStep]()
        for missing in batch.missing.values():
            step, start = missing.step, missing.step.start + missing.start
            self._charge(missing.context, _through(start, step.tokens - missing.start))
            if step.computed > missing.start:
                self._charge_waste(missing.context, _through(start, step.computed - missing.start), missing.kept)
            computed.append(step)
        for number, row in batch.first.items():
            context, run = row.context, batch.runs[number]
            read = _read(run.path_start + run.start + len(run.tokens) - 1, 1)
            self._charge(context, read)
            if number in batch.missing:
                step = context.steps[row.draw.branch.identity]
                if step.computed == step.tokens:
                    self._charge_waste(context, read, batch.missing[number].kept)
                computed.append(step)
        for step in computed:
            step.computed = step.tokens

    def _charge_lease(self, row: _Row) -> None:
        """Count what a row computed since its lease began: every token but the newest, and the logits of what it drew."""
        context, start, written = row.context, row.path_start, len(row.tokens) - 1
        self._charge(context, _through(start, written))
        # The first draw of a lease reads logits of the parent's run, or of the resuming run: counted in _charge_runs.
        if written > row.first:
            self._charge(context, _read(start + row.first, written - row.first))
        if row.computed:
            self._charge_waste(context, _through(start, min(row.computed, written)), kept=False)
        row.computed = max(row.computed, written)

    def _charge(self, context: DrawContext, work: Work) -> None:
        self.runner.charge(context.ledger, work, self._head_flops)

    def _charge_waste(self, context: DrawContext, work: Work, kept: bool) -> None:
        """Say of work that was counted that the search had done it before; kept: its keys and values were there."""
        if kept:
            context.ledger.rereading_flops += self.flops(work)
        else:
            context.ledger.recompute_flops += self.flops(work)
            context.ledger.tokens_recomputed += work.tokens


def _through(start: int, count: int) -> Work:
    """Tokens behind `start` others, through the layers."""
    return Work(tokens=count, pairs=pairs(start, count))


def _read(start: int, count: int) -> Work:
    """Of such tokens behind which one is drawn, the rest of the last layer and the logits."""
    return Work(reads=count, read_pairs=pairs(start, count))
