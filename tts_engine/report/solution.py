"""A search's outcome on a terminal: the chosen solution step by step, the vote, the cost."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..ledger import Ledger
from ..results import SearchResult
from .text import figures, harmless, short


def solution(result: SearchResult) -> RenderableType:
    chosen = result.chosen
    steps = Table.grid(padding=(0, 2))
    for step in chosen.steps if chosen else ():
        steps.add_row(Text("" if step.score is None else f"{step.score:.3f}", style="cyan"), Text(harmless(step.text.strip())))
    votes = ", ".join(f"{name} {shown(answer)}" for name, answer in result.aggregates.items())
    missing = "" if result.answer is not None else "; no branch holds one, and this is the best of them"
    lines = [f"answer: {shown(result.answer)}{missing}", f"of {len(result.branches)} branches: {votes}", *cost(result.ledger)]
    return Group(steps, "", Text(lines[0], style="bold"), *map(Text, lines[1:]))


def cost(ledger: Ledger) -> list[str]:
    """What the search cost, one line a model and one for the time."""
    policy, prm = ledger.policy, ledger.prm
    lines = [
        f"policy: {short(policy.tokens_generated)} tokens generated, {short(policy.tokens_computed)} computed "
        f"({short(policy.tokens_unshared)} without sharing), {figures(policy.flops / 1e9)} GFLOP"
    ]
    if prm.steps_scored:
        lines.append(
            f"PRM: {short(prm.steps_scored)} steps scored, {short(prm.tokens_computed)} tokens computed "
            f"({short(prm.tokens_reread)} by re-reading), {figures(prm.flops / 1e9)} GFLOP"
        )
    return [*lines, f"time: {ledger.seconds:.2f} s"]


def shown(answer: str | None) -> str:
    return "none" if answer is None else harmless(answer)
