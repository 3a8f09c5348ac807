"""What of the policy's work is on whose account, and how much of it was waste: see ledger.py for what the words mean."""

from .draws import Batch, DrawContext, OpenDraw
from .ledger import DistinctStep, Work, pairs
from .runner import ModelRunner


class PolicyAccounts:
    """Of the searches that draw from one model."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.head_flops = runner.decoder.spec.lm_head_flops

    def flops(self, work: Work) -> int:
        """What work of this model comes to."""
        return self.runner.flops(work, self.head_flops)

    def count(self, context: DrawContext) -> None:
        """What of a search's costs follows from its tree, once all of it is drawn."""
        self.runner.charge(context.ledger, context.work, self.head_flops)
        context.work = Work()
        once, again = context.steps.drawn()
        context.ledger.ideal_flops, context.ledger.duplicate_flops = self.flops(once), self.flops(again)
        context.ledger.speculation_flops += sum(
            flops for identity, flops in context.ventured.items() if not context.steps[identity].expanded
        )
        context.ventured.clear()
        context.ledger.hold(context.steps.widest_round(), self.runner.token_bytes)

    def charge_runs(self, batch: Batch) -> None:
        """Count what was read of nodes, and one row of logits for each run behind which something is drawn, on the account of the
        first draw there."""
        computed: list[DistinctStep] = []
        for missing in batch.missing.values():
            step, start = missing.step, missing.step.start + missing.start
            missing.context.work.add_through(start, step.tokens - missing.start)
            if step.computed > missing.start:
                self._charge_waste(missing.context, _through(start, step.computed - missing.start), missing.kept)
            computed.append(step)
        for number, row in batch.first.items():
            context, run = row.context, batch.runs[number]
            seen = run.path_start + run.start + len(run.tokens)
            context.work.add(0, 0, 1, seen)
            if number in batch.missing:
                step = context.steps[row.draw.branch.identity]
                if step.computed == step.tokens:
                    self._charge_waste(context, Work(reads=1, read_pairs=seen), batch.missing[number].kept)
                elif row.round is not None:
                    tail = _through(step.start + step.computed, step.tokens - step.computed)
                    context.ventured[row.draw.branch.identity] = self.flops(tail) + self.flops(Work(reads=1, read_pairs=seen))
                computed.append(step)
        for step in computed:
            step.computed = step.tokens

    def charge_lease(self, row: OpenDraw) -> None:
        """Count what a row computed since its lease began: every token but the newest, and the logits of what it drew."""
        context, start, written = row.context, row.path_start, len(row.tokens) - 1
        if row.follows:
            row.spared = row.computed = written
            return
        skipped, drawn = row.skipped, Work()
        drawn.add_through(start + skipped, written - skipped)
        # The first draw of a lease reads logits of the parent's run, or of the resuming run: counted in charge_runs.
        if (reads := written - max(row.first, skipped)) > 0:
            drawn.add(0, 0, reads, pairs(start + written - reads, reads))
        context.work.add(drawn.tokens, drawn.pairs, drawn.reads, drawn.read_pairs)
        if row.round is not None:
            row.flops = self.flops(drawn)
        if row.computed > skipped:
            self._charge_waste(context, _through(start + skipped, min(row.computed, written) - skipped), kept=False)
        row.computed = max(row.computed, written)

    def _charge_waste(self, context: DrawContext, work: Work, kept: bool) -> None:
        """Say of work that was counted that the search had done it before; kept: its keys and values were there."""
        if kept:
            context.ledger.rereading_flops += self.flops(work)
        else:
            context.ledger.recompute_flops += self.flops(work)
            context.ledger.tokens_recomputed += work.tokens
            self.runner.tokens_recomputed += work.tokens


def _through(start: int, count: int) -> Work:
    """Tokens behind `start` others, through the layers."""
    return Work(tokens=count, pairs=pairs(start, count))
