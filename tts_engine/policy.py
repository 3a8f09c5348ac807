"""The policy: draws of all searches, drawn together, one step each.

A draw waits until its parent's tokens have been read, takes its first token from the parent's own logits, and then is a row of
every tick until its step closes. Draws that begin together behind one step have one lease, and the model reads them once, until
their tokens differ. What a tick holds decides nothing but speed.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from .accounts import PolicyAccounts
from .branch import Branch, Finish
from .draws import Batch, DrawContext, Missing, OpenDraw
from .errors import EngineError
from .graphs import TICKS, DecodeGraphs, bucket_for
from .guesses import Guesses
from .kv.tree import NO_NODE
from .ledger import Work
from .rows import END, FAULT, WHOLE, Change, Rows, Run
from .runner import ModelRunner, out_of_memory
from .sampling import Sampling, sample
from .search.driver import Answer, Ask
from .steps import StepRule

NO_TOKEN = -1  # what `sample` draws from logits that are no numbers
MAX_PREFILL = 4096  # tokens of prompts and forgotten steps that one tick reads, beside at least one parent
ANSWER_SIGN = "\\boxed{"
NOT_FINITE = "the policy's logits are not finite: its weights or dtype are at fault"
NO_MEMORY = "memory does not suffice to draw a single row: lower memory or kv_bytes, so that more is left for that"
COVER = 2  # ticks that a device does while the host closes the steps that ended before them


class Policy:
    """Draws for many searches over one model. `submit` what a driver asks; `tick` until `busy` is False."""

    def __init__(self, runner: ModelRunner, rule: StepRule, *, max_rows: int, graphs: DecodeGraphs | None = None,
                 speculate: bool = False) -> None:  # fmt: skip
        """graphs: of that decoder and cache, for that rule. With them rows decode for many ticks on end, and the host does what is
        its own meanwhile. speculate: rows that would stand idle draw what is likely to be asked for next."""
        self.runner, self.rule, self.max_rows, self.graphs = runner, rule, max_rows, graphs
        self.speculate = speculate
        self._most_rows, self.max_prefill = max_rows, MAX_PREFILL
        self.preemptions = 0
        self.more_room: Callable[[], bool] = lambda: False  # asked before a draw that was asked for is preempted
        self.accounts = PolicyAccounts(runner)
        self._samplings: dict[Sampling, int] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Without a draw."""
        tree, device = self.runner.tree, self.runner.decoder.device.type
        self._waiting = deque[OpenDraw]()
        self._rows = Rows[OpenDraw](self._most_rows)
        self._guesses = Guesses(self._rows, tree, device, seat=self._seat, leave=self._withdraw)
        self._under_way = 0  # ticks that the graphs were told to do
        self._seated = False  # the last forward was read by draws that it seated

    @property
    def under_way(self) -> bool:
        """Whether the graphs are at work."""
        return self._under_way > 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    @property
    def num_open(self) -> int:
        """Draws asked for that wait or decode."""
        return len(self._waiting) + len(self._rows) - self._guesses.num_decoding

    @property
    def _reads_together(self) -> bool:
        """Whether draws that begin alike are one row of the model: graphs draw one token a row, and steps of drawn lengths are to
        be the same work whatever the model says."""
        return self.graphs is None and self.rule.after is not None

    def submit(self, context: DrawContext, ask: Ask) -> None:
        """Take an Expand; it is answered through the context's driver during some tick, or at once where all of it was guessed."""
        answer = Answer(context.driver, ask)
        context.sampling_number = self._samplings.setdefault(context.sampling, len(self._samplings))
        if self.speculate and ask.round is not None and ask.round.outlook.entries is not None:
            self._guesses.rounds.append((context, ask.round))
        guesses = {row.draw.identity: row for row in self._guesses.rows if row.context is context}
        for place, draw in enumerate(ask.draws):
            guess = guesses.get(draw.identity)
            if guess is None:
                self._waiting.append(OpenDraw(context, answer, place, draw))
            else:
                self._guesses.adopt(guess, answer, place, draw)
                if guess.lease == NO_NODE:
                    self._deliver(guess)

    def settle(self, context: DrawContext) -> None:
        """Drop the guesses that were not asked for when their program went on."""
        self._guesses.settle(context)

    def wants_scores(self) -> bool:
        """Whether more of what has closed should be read soon, so that idle rows have something to draw."""
        return len(self._rows) < self.max_rows and self._guesses.wants_scores()

    def retire(self, context: DrawContext) -> None:
        """A search is over: its steps go first where room is needed, its prompt stays."""
        self.runner.tree.retire([node for identity, node in context.nodes.items() if identity])

    def abandon(self, context: DrawContext) -> None:
        """Forget every draw of one search and give up its leases."""
        self._waiting = deque(row for row in self._waiting if row.context is not context)
        for lease in {row.lease for row in self._rows.owners if row.context is context}:
            self.runner.tree.release(lease)
        self._rows.keep([row.context is not context for row in self._rows.owners])
        self._guesses.abandon(context)
        if not self._rows:
            self._finish()

    def start_over(self) -> None:
        """Forget every draw and all that was computed: for where an interrupt left what nobody knows of any more."""
        if self.graphs is not None:
            self.graphs.abandon()
        self.runner.start_over()
        self._begin_anew()

    def tick(self) -> None:
        """Admit what fits, run one forward, draw one token a row, close the steps that ended.

        With graphs rows decode for many ticks on end, and a call ends while these are under way. Where draws are seated that want
        more read than graphs can, that is one forward, and the next draws are seated after ticks on end.
        A search whose logits are no numbers, or of which no row fits, fails and is abandoned; its driver knows why.
        """
        ticks, leaving = self._under_way, self._finish()
        try:
            if leaving and ticks > COVER:
                self._start(COVER)
        except BaseException as error:
            if not out_of_memory(error):
                raise
        finally:
            self._leave(leaving)
        if self._under_way:
            return
        batch = Batch() if self._seated and self._rows and self.graphs is not None else self._admit()
        self._seated, decoding = False, len(self._rows) - len(batch.sources)
        try:
            if not self._rows or self._start(TICKS, batch):
                return
            tokens = self._draw(*self._forward(batch, decoding))
        except BaseException as error:
            rows = len(self._rows)
            self._send_back(decoding)
            if not out_of_memory(error):
                raise
            return self._shrink(rows, batch.num_tokens)
        self._seated = bool(batch.runs)
        self._append(tokens)

    # Admission

    def _admit(self) -> Batch:
        """Seat waiting draws, oldest first, while rows, blocks and the tick's prefill last; what must be read for them."""
        batch = Batch()
        while self._waiting and (batch.num_tokens < self.max_prefill or not self._rows):
            if self._has_places(batch) and self._seat(batch, self._waiting[0]):
                self._waiting.popleft()
            elif not self._guesses.give_way():
                assert self._rows, "a branch that was found to fit the pool does not"
                break
        if self._guesses.rounds and not self._waiting:
            self._guesses.make(batch, self.max_rows, self.max_prefill)
        return batch

    def _has_places(self, batch: Batch) -> bool:
        """Whether there are rows for the oldest draw that waits, and for those of its search that wait with it: what begins later
        is not read together."""
        free, context = self.max_rows - len(self._rows), self._waiting[0].context
        if context is not batch.seating and self._rows and self._reads_together:
            alike = 0
            for row in self._waiting:
                if row.context is not context or alike > free:
                    break
                alike += 1
            if free < alike <= self.max_rows:
                return False
        batch.seating = context
        return free > 0 or not self._rows

    def _seat(self, batch: Batch, row: OpenDraw) -> bool:
        """Give a draw a lease and a place among the rows; False where there is no room for its path or its tokens."""
        context, draw = row.context, row.draw
        run = self._join(batch, row)
        if run is None and (run := self._begin(batch, row)) is None:
            return False
        batch.sources.append(run)
        state = self.rule.start(draw.identity, context.key)
        for token in row.tokens:
            state = int(self.rule.advance(np.array([token]), np.array([state]))[0])
        self._rows.add(
            row,
            lease=row.lease,
            identity=draw.identity,
            key=context.key,
            sampling=context.sampling_number,
            path_start=row.path_start,
            length=row.first,
            room=context.limits.step_room(row.path_start - context.prompt_tokens, context.prompt_tokens),
            state=state,
        )
        return True

    def _join(self, batch: Batch, row: OpenDraw) -> int | None:
        """Give a draw the lease of one that begins alike, and the run that both draw behind; None where there is no such one.

        A draw that computed some of its tokens itself stays on its own account.
        """
        context, tokens = row.context, tuple(row.tokens)
        other, run = batch.begun.get((context, context.nodes.get(row.draw.branch.identity, NO_NODE), tokens), (None, 0))
        if other is None or not self._reads_together or row.spared < len(tokens) - 1:
            return None
        row.lease, row.path_start, row.first, row.follows = other.lease, other.path_start, other.first, True
        return run

    def _begin(self, batch: Batch, row: OpenDraw) -> int | None:
        """Give a draw a lease of its own, and the run that it draws behind; None where there is no room."""
        tree, context = self.runner.tree, row.context
        if batch.leases is None:
            batch.leases = len(self._rows.leases)
        # Whoever is at work may want another block soon.
        leased = self._lease(row) if not self._rows or tree.has_room(batch.leases + 1) else None
        if leased is None:
            return None
        row.lease, path, nodes = leased
        if row.tokens and not tree.extend(row.lease, len(row.tokens)):
            tree.release(row.lease)
            return None
        row.path_start, row.first, row.follows, row.skipped = tree.lease_start(row.lease), len(row.tokens), False, 0
        self._read(batch, row, path, nodes)
        run = batch.add(Run(row.lease, True, 0, row.path_start, row.tokens)) if row.tokens else batch.run_of[nodes[-1]]
        batch.leases += 1
        batch.first.setdefault(run, row)
        batch.begun.setdefault((context, nodes[-1], tuple(row.tokens)), (row, run))
        return run

    def _lease(self, row: OpenDraw) -> tuple[int, list[Branch], list[int]] | None:
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

    def _read(self, batch: Batch, row: OpenDraw, path: list[Branch], nodes: list[int]) -> None:
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
                batch.missing[run] = Missing(context, context.steps[step.identity], computed, kept)
            context.nodes[step.identity] = node
            path_start += count

    # One forward

    def _forward(self, batch: Batch, decoding: int) -> tuple[torch.Tensor, np.ndarray]:
        """Read the batch's runs and the first `decoding` rows; logits float32 [R, V], and int64 [B] which of them is each row's."""
        segments, read_at, sources = self._rows.follow(batch.runs, batch.sources, decoding)
        logits = self.runner.decoder.logits(self.runner.forward(segments, read_at))
        if batch.runs:
            self._note_read(batch)
        padding = self.runner.padding(len(segments.token_ids), len(read_at), self.accounts.head_flops)
        self._rows.owners[-1].context.ledger.padding_flops += padding
        return logits, sources

    def _note_read(self, batch: Batch) -> None:
        for number in batch.run_of.values():
            run = batch.runs[number]
            self.runner.tree.set_computed(run.handle, run.start + len(run.tokens))
        self.accounts.charge_runs(batch)

    def _send_back(self, decoding: int) -> None:
        """Undo an admission whose forward failed: no lease is left, and the draws behind the first `decoding` rows wait again."""
        while len(self._rows) > decoding:
            row = self._rows.pop()
            if all(other.lease != row.lease for other in self._rows.owners):
                self.runner.tree.release(row.lease)
            row.context.nodes.clear()  # some of them were to be computed
            if row.round is None:
                self._waiting.appendleft(row)
            else:
                self._guesses.rows.remove(row)

    def _shrink(self, rows: int, read: int) -> None:
        """After a forward that was too much for the memory, of so many rows with `read` tokens read for them: half of what it had
        more of from here on. Where it was one row alone, its search ends, and the others try as before."""
        if rows == 1:
            self._fail([*self._rows.owners, *self._waiting][0].context, NO_MEMORY)
            self.max_rows, self.max_prefill = self._most_rows, MAX_PREFILL
        elif read > rows and self.max_prefill > 1:
            self.max_prefill = min(self.max_prefill, read) // 2
        else:
            self.max_rows = rows // 2
            while len(self._rows) > self.max_rows:
                self._preempt(self._rows.pop())

    def _fail(self, context: DrawContext, why: str) -> None:
        context.driver.fail(EngineError(why))
        self.abandon(context)

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
        newest = tokens.tolist()
        if NO_TOKEN in newest:
            tokens = tokens[self._rid_of_faults(tokens == NO_TOKEN)]
            newest = tokens.tolist()
        for row, token in zip(self._rows.owners, newest, strict=True):
            row.tokens.append(token)
        change = self._rows.append(tokens, self.rule, self.runner.tree)
        if change.parted:
            self._part(change)
        self._extend()  # a closing row's spare slot may be the last one: rows that go on take room first
        self._leave(change.left)

    def _rid_of_faults(self, no_token: np.ndarray) -> np.ndarray:
        """End the searches of rows bool [B] that drew no token, but for guesses, which are dropped; bool [B], which rows stay."""
        rows = self._rows.owners
        faulty = [rows[place] for place in np.flatnonzero(no_token)]
        ended = {row.context for row in faulty if row.round is None}
        dropped = [row for row in faulty if row.context not in ended]
        stays = np.array([row.context not in ended for row in rows], bool) & ~no_token
        for context in ended:
            self._fail(context, NOT_FINITE)
        self._guesses.drop(dropped)
        return stays

    def _part(self, change: Change[OpenDraw]) -> None:
        """Rows that were read together, and differ now, go on under leases of their own."""
        if len(change.copies):
            self.runner.cache.copy(change.copies)
        for row, lease, first in change.parted:
            row.lease = lease
            if first and row.follows:
                row.follows, row.skipped = False, len(row.tokens) - 1
                row.spared = row.skipped
        if any(lease == NO_NODE for _, lease, _ in change.parted):
            homeless = [row.lease == NO_NODE for row in self._rows.owners]
            rows = [row for row, out in zip(self._rows.owners, homeless, strict=True) if out]
            self._rows.keep([not out for out in homeless])
            for row in reversed(rows):
                self._preempt(row)

    def _withdraw(self, row: OpenDraw) -> None:
        """A row decodes no longer."""
        self._rows.keep([other is not row for other in self._rows.owners])
        self._give_up(row)

    def _give_up(self, row: OpenDraw) -> None:
        """A row that is no longer among the others gives up its lease: to the next one under it, who answers from here on for all
        that was computed there, or to nobody."""
        heir = next((other for other in self._rows.owners if other.lease == row.lease), None)
        if heir is not None and not row.follows:
            heir.first, heir.skipped, heir.spared, heir.computed = row.first, row.skipped, row.spared, row.computed
            heir.follows, row.follows = False, True
        if row.tokens:  # otherwise its first one is under way
            self.accounts.charge_lease(row)
        if heir is None and row.lease != NO_NODE:
            self.runner.tree.release(row.lease)

    def _leave(self, leaving: list[tuple[OpenDraw, int]]) -> None:
        """Close steps. Those that are equal to the last token have one lease, and are one node."""
        closed: dict[int, OpenDraw] = {}  # by lease
        for row, why in leaving:
            equal = closed.setdefault(row.lease, row) if row.lease != NO_NODE else row
            if equal is not row:
                row.text, row.finish = equal.text, equal.finish
                self.accounts.charge_lease(row)
                if row.finish is None:
                    row.context.nodes[row.draw.identity] = row.context.nodes[equal.draw.identity]
            else:
                self._close(row, Finish.EOS if why & END else None if why & WHOLE else Finish.LENGTH)
            row.lease = NO_NODE
            if row.round is None:
                self._deliver(row)

    def _extend(self) -> None:
        """One more slot for every row that goes on; guesses, and then the youngest rows, give way where blocks run out."""
        tree = self.runner.tree
        while self._guesses.rows and np.count_nonzero((self._rows.table["length"] - 1) % tree.block_size == 0) > tree.available():
            if not self._guesses.give_way():
                break
        leases, done = self._rows.leases, 0
        while done < len(leases):
            done += tree.extend_many(leases[done:], 1)
            if done < len(leases):
                if self._rows.owners[-1].round is None and self.more_room():
                    continue
                self._preempt(self._rows.pop())
                leases = self._rows.leases
                done = min(done, len(leases))

    def _preempt(self, row: OpenDraw) -> None:
        if row.round is not None:
            return self._guesses.drop([row])
        self._give_up(row)
        self._waiting.appendleft(row)
        self.preemptions += 1
        row.context.ledger.preemptions += 1

    def _close(self, row: OpenDraw, finish: Finish | None) -> None:
        """The step is whole: keep its KV if it may be expanded."""
        context, draw, tree, tokens = row.context, row.draw, self.runner.tree, tuple(row.tokens)
        text = self.rule.text(tokens)
        if finish is None and ANSWER_SIGN in text:
            finish = Finish.ANSWER
        used = row.path_start - context.prompt_tokens + len(tokens)
        if finish is None and context.limits.step_room(used, context.prompt_tokens) <= 0:
            finish = Finish.LENGTH
        self.accounts.charge_lease(row)
        if row.lease == NO_NODE:
            pass  # another needs what it had
        elif finish is None:
            context.nodes[draw.identity] = tree.keep(row.lease, tokens, len(tokens) - 1)
        else:
            tree.release(row.lease)
        row.text, row.finish = text, finish

    def _deliver(self, row: OpenDraw) -> None:
        """A step that is whole and asked for becomes the child."""
        context, draw, tokens = row.context, row.draw, tuple(row.tokens)
        step = context.steps.add(draw.identity, draw.branch.identity, tokens, spared=row.spared)
        step.computed = max(step.computed, step.written)
        context.ledger.tokens_generated += len(tokens)
        self._pass_on(row, Branch(draw.branch, tokens, row.text, draw.identity, draw.lane, draw.draw, row.finish), step.depth)

    def _pass_on(self, row: OpenDraw, child: Branch, depth: int) -> None:
        """Answer the ask with the child, or draw on where the whole trajectory was asked for."""
        context, answer = row.context, row.answer
        assert answer is not None, "nobody asked for this draw"
        if row.draw.to_end and depth >= context.max_steps:
            child = child.ended(Finish.DEPTH)
        context.drawn(child)
        answer.close_step(child)
        if row.draw.to_end and not child.finished:
            draw = context.driver.next_draw(child, row.draw.lane, to_end=True)
            self._waiting.appendleft(OpenDraw(context, answer, row.place, draw))
        else:
            answer.put(row.place, child)

    # Many ticks on end

    def _start(self, ticks: int, batch: Batch | None = None) -> bool:
        """Have the graphs do so many for all rows, or as many as there are blocks for; False where it is none.

        Those that were just seated begin by reading what is missing, if that is one token of nobody else's each.
        """
        rows, tree, batch = self._rows, self.runner.tree, batch or Batch()
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

    def _finish(self) -> list[tuple[OpenDraw, int]]:
        """Wait for the ticks under way, if there are any; rows that stopped, and why."""
        if not self._under_way or self.graphs is None:
            return []
        drawn, ticks = self.graphs.finish(), self._under_way
        self._under_way = 0
        if (faulty := drawn.stop[[row.seat for row in self._rows.owners]] & FAULT).any():
            self._rid_of_faults(faulty != 0)
        rows = self._rows.owners
        if rows:  # those of the batch that are nobody's, and those that had stopped, went through every tick all the same
            beside = ticks * (bucket_for(len(drawn.drawn)) or 0) - int(drawn.drawn.sum())
            rows[-1].context.ledger.padding_flops += self.accounts.flops(Work(tokens=beside, reads=beside))
        columns = drawn.tokens.T.tolist()
        for row in rows:
            row.tokens += columns[row.seat][: drawn.drawn[row.seat]]
        return self._rows.go_on(drawn, [row.seat for row in rows])
