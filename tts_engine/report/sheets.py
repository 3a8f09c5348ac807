"""A comparison's tables as text: one form for a terminal and for the page."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .arms import Arm, Study
from .comparison import ALL, Share, Winner, accuracy_rows, gain_rows, ledger_rows, size_rows, winners
from .efficiency import Factor
from .intervals import Verdict
from .text import figures, harmless, percent, short

GAP, WIDEST = 2, 30  # between columns; of one column
LONGEST = 40  # characters of a name
NOTHING = "-"
SPARED = ("runs",)  # of a terminal
UNITS = ((1e-9, "FLOP"), (1e-6, "kFLOP"), (1e-3, "MFLOP"), (1.0, "GFLOP"), (1e3, "TFLOP"), (1e6, "PFLOP"), (1e9, "EFLOP"))


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows of cells; the first `labels` columns say whose row it is. note: what a reader has to know, a sentence or more."""

    name: str
    title: str
    note: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int


@dataclass(frozen=True, slots=True)
class Unit:
    """In what FLOPs a problem are told, one for a whole report."""

    name: str
    gflop: float

    def __call__(self, gflop: float | None) -> str:
        return NOTHING if gflop is None else figures(gflop / self.gflop)


def unit_of(study: Study) -> Unit:
    """That in which the cheapest arm is told in at least tenths."""
    least = min((arm.gflop for arm in study.arms if arm.gflop > 0), default=1.0)
    gflop, name = next((one for one in reversed(UNITS) if least >= one[0] / 10), UNITS[0])
    return Unit(name, gflop)


def sheets(study: Study) -> list[Sheet]:
    """All tables of a report, those without a row left out."""
    unit = unit_of(study)
    made = [accuracy_sheet(study, unit), *difficulty_sheets(study), size_sheet(study, unit), gain_sheet(study),
            winner_sheet(study), ledger_sheet(study, unit), memory_sheet(study), source_sheet(study)]  # fmt: skip
    return [sheet for sheet in made if sheet.rows]


def accuracy_sheet(study: Study, unit: Unit) -> Sheet:
    rows = [
        (*_arm(row.arm), percent(row.share.accuracy or 0.0, row.share.interval), unit(row.policy_gflop),
         unit(row.prm_gflop) if row.arm.prm else NOTHING, unit(row.share.gflop))
        for row in accuracy_rows(study)
    ]  # fmt: skip
    seeds = max(len(arm.cells) for arm in study.arms)
    how = "Wilson's" if seeds == 1 else "of several seeds by resampling problems, else Wilson's"
    note = f"Problems solved with the 95 % interval ({how}); FLOPs a problem without waste, of policy and PRM apart and together."
    headings = (*ARM, "solved %\n(95 %)", f"policy\n{unit.name}", f"PRM\n{unit.name}", f"both\n{unit.name}")
    return Sheet("accuracy", f"Accuracy and compute over {len(study.ids)} problems", note, headings, tuple(rows), len(ARM))


def difficulty_sheets(study: Study) -> list[Sheet]:
    found, made = accuracy_rows(study), []
    for grouping in study.groupings:
        own = [row for row in found if row.arm.policy in grouping.of]
        counts = {bin: {row.by[grouping.name][bin].problems for row in own} for bin in grouping.bins}
        alike = all(len(each) == 1 for each in counts.values())  # or each policy has its own
        rows = [(*_arm(row.arm), *(_share(row.by[grouping.name][bin], alike) for bin in grouping.bins)) for row in own]
        headings = tuple(f"{grouping.name} {_name(bin)}\n" + (f"of {max(counts[bin])}" if alike else "") for bin in grouping.bins)
        note = (
            "Problems solved %, with the 95 % interval, by the level that the task gives them."
            if grouping.name == "level"
            else "Problems solved %, with the 95 % interval, by the policy's own share of right draws in a run with another seed: "
            "easy from 50 % on, medium from 10 %, hard below. What is hard for one policy is easy for another: compare within one."
        )
        name = "by-level" if grouping.name == "level" else "by-pass-rate"
        made.append(Sheet(name, f"Accuracy by {grouping.name}", note, (*ARM, *headings), tuple(rows), len(ARM)))
    return made


def size_sheet(study: Study, unit: Unit) -> Sheet:
    rows = [
        (*_arm(row.small), percent(row.small.accuracy), unit(row.small.gflop),
         _name(row.large.policy), percent(row.large.accuracy), unit(row.large.gflop),
         NOTHING if row.cost is None else _times(row.cost), *_verdict(row.verdict))
        for row in size_rows(study)
    ]  # fmt: skip
    note = (
        "Each method of a smaller policy at its largest n, PRM included, against a larger policy's single greedy answer (chain of "
        "thought). Difference: points, paired by problem, with its own 95 % interval; says: whether the smaller one solves more, "
        "Holm over all rows. The best of many rows is in part luck: choose it on other problems before you claim it."
    )
    headings = (
        *ARM,
        "solved\n%",
        unit.name,
        "larger\npolicy",
        "solved\n%",
        unit.name,
        "FLOPs\nratio",
        "difference\n(95 %)",
        "says",
    )
    return Sheet("sizes", "Small policies against large ones", note, headings, tuple(rows), len(ARM))


def gain_sheet(study: Study) -> Sheet:
    rows = [
        (*_arm(row.arm), percent(row.arm.accuracy), *_verdict(row.over_cot),
         NOTHING if row.relative is None else f"{100 * row.relative:+.0f}", *_verdict(row.over_majority), _factor(row.factor))
        for row in gain_rows(study)
    ]  # fmt: skip
    note = (
        "Each method at its largest n. Over CoT, and over a majority of as many draws: points, paired by problem, with their own "
        "95 % interval; says: whether it gains, Holm over all of this table's claims. Relative: the gain as a share of CoT's "
        "accuracy. Less compute: FLOPs with which majority has the accuracy of its largest n, over those with which this method "
        "has it, policy and PRM together; each read off straight lines between neighbouring budgets (logarithmic FLOPs, from CoT "
        "on, nothing beyond the largest). Its interval is by resampling problems, open where too many resamples never get there."
    )
    headings = (
        *ARM,
        "solved\n%",
        "over CoT\n(95 %)",
        "says",
        "relative\n%",
        "over majority\n(95 %)",
        "says",
        "less compute\n(95 %)",
    )
    return Sheet("gain", "Gain over chain of thought and majority", note, headings, tuple(rows), len(ARM))


def winner_sheet(study: Study) -> Sheet:
    found: dict[tuple[str, str | None, int], dict[tuple[str, str], Winner]] = {}
    for row in winners(study):
        found.setdefault((row.policy, row.prm, row.n), {})[row.grouping, row.bin] = row
    places = [(ALL, ALL), *((grouping.name, bin) for grouping in study.groupings for bin in grouping.bins)]
    rows = [(_name(policy), _prm(prm), str(n), *(_winner(own.get(place)) for place in places))
            for (policy, prm, n), own in found.items()]  # fmt: skip
    note = (
        "Who solves most at one n, chain of thought among the rivals; of equals the cheaper. Tied: those of whom the 95 % interval "
        "of the paired difference contains 0, or of whom too few problems tell. Below: solved % of so many problems. Equal n is "
        "not equal FLOPs, and the best of several is in part luck."
    )
    headings = ("policy", "PRM", "n", *(f"{name}\n{_name(bin)}" if name != ALL else "all\nproblems" for name, bin in places))
    return Sheet("winners", "The best method by policy, PRM and difficulty", note, headings, tuple(rows), 3)


def ledger_sheet(study: Study, unit: Unit) -> Sheet:
    found = ledger_rows(study)
    phases, reasons = list(found[0].phases), list(found[0].wasted)
    rows = [
        (*_arm(row.arm), figures(row.seconds) if row.seconds else NOTHING,
         *(percent(row.phases[phase]) if any(row.phases.values()) else NOTHING for phase in phases),
         unit(row.executed_gflop) if row.executed_gflop else NOTHING,
         NOTHING if row.useful is None else percent(row.useful),
         *(percent(row.wasted[reason]) if row.useful is not None else NOTHING for reason in reasons))
        for row in found
    ]  # fmt: skip
    note = (
        "Seconds of the run a problem, and their split by what the engine did; FLOPs that were executed, by policy and PRM "
        "together, their useful share (each distinct step computed once by each model) and what the rest was. A dash: not counted "
        "(a replayed search has no clock). Columns that are 0 everywhere are left out."
    )
    headings = (*ARM, "s a\nproblem", *(f"{phase}\ntime %" for phase in phases), f"executed\n{unit.name}", "useful\nFLOPs %",
                *(f"{reason}\nFLOPs %" for reason in reasons))  # fmt: skip
    return _without_zeros(Sheet("ledger", "Where time and FLOPs went", note, headings, tuple(rows), len(ARM)))


def memory_sheet(study: Study) -> Sheet:
    rows = [
        (*_arm(row.arm), short(row.drawn), short(row.prm_read) if row.arm.prm else NOTHING,
         short(row.prm_reread) if row.arm.prm else NOTHING, _bytes(row.kv_distinct), _bytes(row.kv_logical))
        for row in ledger_rows(study)
    ]  # fmt: skip
    note = (
        "A problem: tokens drawn, tokens the PRM read, and what reading every path anew would have taken; keys and values of both "
        "models in the round in which the branches held most, each step once, and had every branch its own."
    )
    headings = (*ARM, "tokens\ndrawn", "PRM\nread", "re-reading\nwould read", "KV, each\nstep once", "KV, each\nbranch alone")
    return _without_zeros(Sheet("memory", "Tokens, keys and values", note, headings, tuple(rows), len(ARM)))


def source_sheet(study: Study) -> Sheet:
    rows = [
        (*_arm(one.arm), _name(Path(one.name).name), str(one.seed), str(one.problems), str(one.failed), one.arm.made,
         _name(one.dtype), _name(one.at.replace("T", " ")[:16]), _name(one.version))
        for one in study.sources
    ]  # fmt: skip
    headings = (*ARM, "run", "seed", "problems", "failed", "made", "dtype", "at", "tts-engine")
    return Sheet("runs", "The runs", "What this page was made from.", headings, tuple(rows), 5)


def show(sheet: Sheet, screen: Console) -> None:
    """On a terminal: as many tables below one another as its width takes, each with the labels."""
    columns = [(heading, [row[i] for row in sheet.rows]) for i, heading in enumerate(sheet.headings)]
    labels, rest = columns[: sheet.labels], columns[sheet.labels :]
    parts: list[list[tuple[str, list[str]]]] = [[]]
    for column in rest:
        if parts[-1] and sum(map(_width, [*labels, *parts[-1], column])) > screen.width:
            parts.append([])
        parts[-1].append(column)
    screen.print(f"\n{sheet.title}", style="bold", markup=False)
    for part in parts:
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
        for i, (heading, cells) in enumerate([*labels, *part]):
            drawn.add_column(Text(heading), justify="left" if i < len(labels) else "right", vertical="bottom", overflow="fold",
                             width=_width((heading, cells)) - GAP)  # fmt: skip
        for i, row in enumerate(zip(*(cells for _, cells in [*labels, *part]), strict=True)):
            last = i + 1 < len(sheet.rows) and sheet.rows[i + 1][0] != row[0]
            drawn.add_row(*map(Text, row), end_section=last)
        screen.print(drawn)


# --- cells ------------------------------------------------------------------------------------------------------------------

ARM = ("policy", "PRM", "method", "n")


def _arm(arm: Arm) -> tuple[str, str, str, str]:
    return _name(arm.policy), _prm(arm.prm), _name(arm.method), str(arm.n)


def _prm(prm: str | None) -> str:
    return NOTHING if prm is None else _name(prm)


def _name(text: str) -> str:
    """On one line, and not endless."""
    text = " ".join(harmless(text).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _share(share: Share, alike: bool) -> str:
    told = NOTHING if share.accuracy is None else percent(share.accuracy, share.interval)
    return told if alike else f"{told} of {share.problems}"


def _verdict(verdict: Verdict | None) -> tuple[str, str]:
    if verdict is None:
        return NOTHING, NOTHING
    low, high = (100 * bound for bound in verdict.interval)
    return f"{100 * verdict.difference:+.1f} ({low:+.1f} to {high:+.1f})", verdict.outcome


def _times(ratio: float) -> str:
    return f"{figures(ratio)}x"


def _factor(factor: Factor | None) -> str:
    if factor is None:
        return NOTHING
    low, high = (None if bound is None else figures(bound) for bound in (factor.low, factor.high))
    interval = f"{low} to {high}" if low and high else f"from {low}" if low else f"up to {high}" if high else "anything"
    told = "not reached" if not factor.reached else "cannot tell" if factor.estimate is None else _times(factor.estimate)
    return f"{told} ({interval})"


def _winner(row: Winner | None) -> str:
    if row is None or not row.problems:
        return NOTHING
    if row.best is None:
        return f"none\n0.0 of {row.problems}"
    names = ", ".join(dict.fromkeys(_name(arm.method) for arm in row.tied))
    ties = "all tied" if len(row.tied) == row.rivals - 1 else f"tied: {names}" if names else "ahead of all"
    return f"{_name(row.best.method)}\n{ties}\n{percent(row.accuracy)} of {row.problems}"


def _without_zeros(sheet: Sheet) -> Sheet:
    """Without columns that say nothing of anybody."""
    kept = [i for i in range(len(sheet.headings)) if i < sheet.labels or {row[i] for row in sheet.rows} - {"0", "0.0", NOTHING}]
    rows = tuple(tuple(row[i] for i in kept) for row in sheet.rows)
    return replace(sheet, headings=tuple(sheet.headings[i] for i in kept), rows=rows)


def _bytes(count: float) -> str:
    return f"{short(count)}B" if count else NOTHING


def _width(column: tuple[str, list[str]]) -> int:
    heading, cells = column
    lines = [line for text in (heading, *cells) for line in text.split("\n")]
    return min(WIDEST, max(map(len, lines))) + GAP
