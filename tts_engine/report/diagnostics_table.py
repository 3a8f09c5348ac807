"""A PRM's diagnostics for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .diagnostics import Agreement, Calibration, Choice, Diagnostics, Estimate, FirstError, Length
from .text import harmless, percent

OPTIMISTIC = "chosen on these very data: optimistic"


def diagnostics_table(found: Diagnostics) -> RenderableType:
    """All of it, one table a section; what the data could not give is said below them."""
    parts: list[RenderableType] = [Text(headline(found)), Text()]
    steps, answers = found.step_scores, found.answers
    if steps is not None:
        parts.append(_figures("steps: known good ones against first errors", [*_scores(steps), *_calls(found.agreement)]))
    if found.first_error is not None:
        parts.append(_figures("first errors, as ProcessBench counts", _first_error(found.first_error)))
    if answers:
        rows = [(f"{by} score: {name}", *cells) for by, one in answers.items() for name, *cells in _scores(one)]
        parts.append(_figures("solutions: right answers against wrong ones", rows))
    if steps is not None:
        parts.append(_reliability(steps))
    parts.append(_by_length(found.length))
    if found.choice is not None:
        parts.append(_choice(found.choice))
    told = [f"{bias}: {sign}" for bias, sign in found.signs.items()]
    told += [f"{name.replace('_', ' ')}: not known, {why}" for name, why in found.missing.items()]
    return Group(*parts, *(Text(harmless(line)) for line in told))


def headline(found: Diagnostics) -> str:
    """Who judged what, and how much of it."""
    about = found.subject
    told = ", ".join(part for part in (about.task, about.policy and f"by {about.policy}", about.method) if part)
    counts = f"{found.problems} problems, {found.solutions} solutions, {found.steps} steps"
    if found.good_steps is not None:
        counts += f" ({found.good_steps} good, {found.first_errors} first errors)"
    failed = f"; {about.failed} problems could not be searched or read and are left out" if about.failed else ""
    return harmless(f"{about.prm} on {about.source}{f' ({told})' if told else ''}: {counts}{failed}")


def _scores(one: Calibration) -> list[tuple[str, str, str]]:
    return [
        ("AUC", _percent(one.auc), _behind(one.auc)),
        ("AUC within a problem", _percent(one.auc_within), _behind(one.auc_within)),
        ("calibration error (ECE)", percent(one.ece), f"a calibrated PRM stays below {percent(one.ece_by_luck)} in 95 of 100"),
        ("mean score minus share", _points(one.bias), _behind(one.bias)),
    ]


def _calls(agreement: Agreement | None) -> list[tuple[str, str, str]]:
    if agreement is None:
        return []
    at = f"at {agreement.threshold:g}"
    return [
        (f"called rightly {at}", _percent(agreement.accuracy), f"{percent(agreement.always)} by calling all what is commoner"),
        (f"called rightly at {agreement.best_threshold:.3g}", percent(agreement.best_accuracy), OPTIMISTIC),
        (f"good, called bad {at}", _percent(agreement.over_criticism), "over-criticism"),
        (f"first errors, called good {at}", _percent(agreement.error_neglect), "error neglect"),
        (f"steps behind them, called good {at}", _percent(agreement.forgiven), _behind(agreement.forgiven)),
    ]


def _first_error(one: FirstError) -> list[tuple[str, str, str]]:
    best = [] if one.best_f1 is None else [(f"F1 at {one.best_threshold:.3g}", percent(one.best_f1), OPTIMISTIC)]
    return [
        (f"F1 at {one.threshold:g}", _percent(one.f1), _behind(one.f1)),
        *best,
        ("found, of erroneous solutions", _percent(one.accuracy_erroneous), f"{one.erroneous} solutions"),
        ("seen too early", _percent(one.early), ""),
        ("seen too late", _percent(one.late), ""),
        ("never seen", _percent(one.never), ""),
        ("none seen, of correct solutions", _percent(one.accuracy_correct), f"{one.correct} solutions"),
    ]


def _figures(title: str, rows: Sequence[tuple[str, ...]]) -> RenderableType:
    return _section(title, ["", "%", ""], rows, left=(0, 2))


def _reliability(steps: Calibration) -> RenderableType:
    rows = [
        (
            f"{one.low:g}-{one.high:g}",
            str(one.count),
            "-" if one.mean_score is None else percent(one.mean_score),
            _percent(one.true),
        )
        for one in steps.bins
    ]
    return _section("steps by score", ["score", "steps", "mean score %", "good %"], rows)


def _by_length(length: Length) -> RenderableType:
    """Behind the correlation of all steps that of good ones, where some are known."""
    good = f", among good steps {_number(length.among_good)}" if length.among_good.value is not None else ""
    title = f"steps by length: rank correlation with the score {_number(length.correlation)}{good}"
    rows = [
        (
            str(one.low) if one.low == one.high else f"{one.low}-{one.high}",
            str(one.steps),
            _percent(one.mean_score),
            _percent(one.good),
        )
        for one in length.bins
    ]
    return _section(title, ["tokens", "steps", "mean score %", "good %"], rows)


def _choice(choice: Choice) -> RenderableType:
    """One line a rule: its accuracy at every n."""
    sizes = list(dict.fromkeys(point.n for point in choice.curve))
    rows = []
    for gain in choice.gains:
        points = [point for point in choice.curve if point.rule == gain.rule]
        promised = points[-1].promised
        rows.append((gain.rule, *(_percent(point.accuracy, bounds=False) for point in points), _points(gain.gain),
                     _points(gain.last_doubling), "" if promised is None else _percent(promised)))  # fmt: skip
    title = f"choosing: pass@1 {_percent(choice.pass_at_1)} %, pass@{choice.n} {_percent(choice.any_right)} %"
    return _section(title, ["rule", *(f"n={n}" for n in sizes), "gain over pass@1", "by the last doubling", "promised"], rows)


def _section(title: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]], left: Sequence[int] = (0,)) -> RenderableType:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if place in left else "right")
    for row in rows:
        drawn.add_row(*map(Text, row))
    return Group(Text(title), drawn, Text())


def _percent(one: Estimate, bounds: bool = True) -> str:
    if one.value is None:
        return "-"
    return percent(one.value, (one.low, one.high) if bounds and one.low is not None and one.high is not None else None)


def _points(one: Estimate) -> str:
    """A difference of two shares."""
    if one.value is None:
        return "-"
    bounds = "" if one.low is None or one.high is None else f" ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
    return f"{100 * one.value:+.1f}{bounds}"


def _number(one: Estimate) -> str:
    if one.value is None:
        return "-"
    return f"{one.value:+.2f}" + (f" ({one.low:+.2f} to {one.high:+.2f})" if one.low is not None else "")


def _behind(one: Estimate) -> str:
    return one.why if one.why is not None else f"{one.problems} problems"
