"""How good a PRM is, computed from problems whose steps it has scored: every section of diagnostics.json. Numbers only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EngineError
from ..search.ranking import AGGREGATES, aggregate
from .diagnostics import (
    FEWEST,
    LENGTH_BINS,
    SCHEMA_VERSION,
    SCORE_BINS,
    SUBSETS,
    THRESHOLD,
    Agreement,
    Calibration,
    Choice,
    Diagnostics,
    Estimate,
    FirstError,
    Gain,
    Length,
    LengthBin,
    Point,
    ScoreBin,
    Subject,
)
from .intervals import CANNOT_TELL, bootstraps

LUCK = 2000  # samples of a calibrated PRM

Array = np.ndarray


# --- what it is computed from ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """A step with its score in [0, 1]. good: up to its path's first error; None behind it and where nobody knows."""

    score: float
    length: int
    good: bool | None
    behind: bool = False


@dataclass(frozen=True, slots=True)
class Solution:
    """A whole path: its steps' scores, at least one. first_error: an index, -1 for none, None where nobody knows. group: its answer
    as it is voted, None for none; correct: None where the right answer is not known."""

    scores: tuple[float, ...]
    first_error: int | None
    group: str | None
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Judged:
    """A problem: its distinct steps, and the solutions they make."""

    steps: tuple[Step, ...]
    solutions: tuple[Solution, ...]


def diagnose(
    problems: Sequence[Judged], subject: Subject, *, threshold: float = THRESHOLD, no_choice: str | None = None
) -> Diagnostics:
    """Every section that the problems can give. no_choice: why their solutions are no independent draws, if they are not.

    Raises EngineError where there is no step, or a score or the threshold is no number in [0, 1].
    """
    _refuse_unless_sound(problems, threshold)
    missing: dict[str, str] = {}
    labelled = [[step for step in problem.steps if step.good is not None] for problem in problems]
    goods = sum(step.good is True for steps in labelled for step in steps)
    known = any(labelled)
    step_scores = agreement = first_error = choice = None
    if known:
        step_scores = calibration([[(step.score, bool(step.good)) for step in steps] for steps in labelled], "step")
        agreement = step_agreement(problems, threshold)
    else:
        missing |= dict.fromkeys(("step_scores", "agreement"), "nobody says which steps are good")
    judged = [[solution for solution in problem.solutions if solution.first_error is not None] for problem in problems]
    if any(judged):
        first_error = first_errors(judged, threshold)
    else:
        missing["first_error"] = "nobody says where a solution goes wrong"
    ended = [[solution for solution in problem.solutions if solution.correct is not None] for problem in problems]
    answers = {}
    if any(ended):
        answers = {by: calibration([[(aggregate(s.scores, by), bool(s.correct)) for s in one] for one in ended], "solution")
                   for by in AGGREGATES}  # fmt: skip
    else:
        missing["answers"] = "nobody says which answers are right"
    sizes = {len(one) for one in ended if one}
    if no_choice is None and len(sizes) != 1:
        no_choice = "problems differ in how many draws they have" if sizes else missing["answers"]
    if no_choice is None:
        choice = choosing([one for one in ended if one])
    else:
        missing["choice"] = no_choice
    length = score_by_length(problems)
    return Diagnostics(
        schema_version=SCHEMA_VERSION,
        subject=subject,
        problems=len(problems),
        solutions=sum(len(problem.solutions) for problem in problems),
        steps=sum(len(problem.steps) for problem in problems),
        good_steps=goods if known else None,
        first_errors=sum(map(len, labelled)) - goods if known else None,
        length=length,
        step_scores=step_scores,
        agreement=agreement,
        first_error=first_error,
        answers=answers,
        choice=choice,
        signs=_signs(length, step_scores, choice),
        missing=missing,
    )


# --- scores as chances ----------------------------------------------------------------------------------------------------


def calibration(problems: Sequence[Sequence[tuple[float, bool]]], what: str) -> Calibration:
    """problems: of each its (score, truth) pairs, at least one in all. what: "step" or "solution", for the reasons."""
    owner, (scores, truths) = _flat(problems, 2)
    sheet = _Sheet(len(problems))
    at = np.minimum((scores * SCORE_BINS).astype(int), SCORE_BINS - 1)
    bins = [(sheet.sums(owner, at == b), sheet.sums(owner, (at == b) * scores), sheet.sums(owner, (at == b) * truths))
            for b in range(SCORE_BINS)]  # fmt: skip
    counts, scored, true = (list(column) for column in zip(*bins, strict=True))
    every = sheet.sums(owner, np.ones(len(owner)))

    def bias(means: Array) -> Array:
        return (means[..., scored] - means[..., true]).sum(-1) / means[..., every]

    need = {every: f"there is no {what}"}
    asked = [sheet.ask(bias, need), _ask_auc(sheet, owner, scores, truths.astype(bool), what)]
    wins, pairs = zip(*map(_wins, problems), strict=True)
    asked.append(sheet.share(sheet.column(wins), sheet.column(pairs), f"no problem has both kinds of {what}s"))
    asked += [sheet.share(true[b], counts[b], "no score falls here") for b in range(SCORE_BINS)]
    found = sheet.solve()
    excess = sheet.table[:, scored] - sheet.table[:, true]
    return Calibration(
        count=len(scores),
        true=int(truths.sum()),
        ece=float(abs(excess.sum(0)).sum() / len(scores)),
        ece_by_luck=_ece_by_luck(excess, len(scores)),
        bias=found[asked[0]],
        auc=found[asked[1]],
        auc_within=found[asked[2]],
        bins=tuple(
            ScoreBin(
                low=b / SCORE_BINS,
                high=(b + 1) / SCORE_BINS,
                count=int((at == b).sum()),
                mean_score=float(scores[at == b].mean()) if (at == b).any() else None,
                true=found[asked[3 + b]],
            )
            for b in range(SCORE_BINS)
        ),
    )


def _ece_by_luck(excess: Array, count: int, seed: int = 0) -> float:
    """excess [problems, bins]: by how much scores add up to more than what came true; count: of all scores. The 95th percentile of
    ECE where each problem's excess is as likely above 0 as below, which is so where scores are calibrated."""
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(LUCK, len(excess)))
    return float(np.quantile(abs(signs @ excess).sum(1) / count, 0.95))


def _ask_auc(sheet: "_Sheet", owner: Array, scores: Array, truths: Array, what: str) -> int:
    """Area under the ROC curve over all pairs, also those across problems.

    A pair belongs to two problems, so what is resampled is its first-order part: how well each true one stands among all false
    ones, and each false one among all true ones (Obuchowski 1997).
    """
    true, false = np.sort(scores[truths]), np.sort(scores[~truths])
    needs = {sheet.sums(owner, truths): f"no {what} is {_words(what, True)}",
             sheet.sums(owner, ~truths): f"no {what} is {_words(what, False)}"}  # fmt: skip
    beaten = _placement(scores, false) * truths
    beating = (1 - _placement(scores, true)) * ~truths
    area = float(beaten[truths].mean()) if len(true) and len(false) else 0.0
    trues, falses = needs
    wins, losses = sheet.sums(owner, beaten), sheet.sums(owner, beating)
    return sheet.ask(
        lambda means: means[..., wins] / means[..., trues] + means[..., losses] / means[..., falses] - area, needs, bounds=(0, 1)
    )


def _wins(pairs: Sequence[tuple[float, bool]]) -> tuple[float, int]:
    """Of all pairs of a true one and a false one those in which the true one has the higher score; ties count half."""
    true, false = ([score for score, truth in pairs if truth == kind] for kind in (True, False))
    return float(_placement(np.array(true), np.sort(false)).sum() * len(false)), len(true) * len(false)


def _placement(scores: Array, among: Array) -> Array:
    """The share of `among`, in order of size, that lies below each score, equal ones counting half."""
    return (np.searchsorted(among, scores, "left") + np.searchsorted(among, scores, "right")) / max(2 * len(among), 1)


def _words(what: str, true: bool) -> str:
    return {"step": ("a first error", "good"), "solution": ("wrong", "right")}[what][true]


# --- against step labels --------------------------------------------------------------------------------------------------


def step_agreement(problems: Sequence[Judged], threshold: float) -> Agreement:
    """Of problems with at least one labelled step."""
    owner, (scores, goods) = _flat([[(s.score, s.good) for s in problem.steps if s.good is not None] for problem in problems], 2)
    after, (behind,) = _flat([[(s.score,) for s in problem.steps if s.behind] for problem in problems], 1)
    good, called = goods.astype(bool), scores >= threshold
    sheet = _Sheet(len(problems))
    every, right = sheet.sums(owner, np.ones(len(owner))), sheet.sums(owner, called == good)
    all_good, criticised = sheet.sums(owner, good), sheet.sums(owner, good & ~called)
    errors, neglected = sheet.sums(owner, ~good), sheet.sums(owner, ~good & called)
    later, forgiven = sheet.sums(after, np.ones(len(after))), sheet.sums(after, behind >= threshold)
    asked = {
        "accuracy": sheet.share(right, every, "no step is labelled"),
        "over_criticism": sheet.share(criticised, all_good, "no step is good"),
        "error_neglect": sheet.share(neglected, errors, "no step is a first error"),
        "forgiven": sheet.share(forgiven, later, "no step stands behind a first error"),
    }
    found = sheet.solve()
    candidates = np.unique(np.append(scores, 1.0))
    hits = good.sum() - np.searchsorted(np.sort(scores[good]), candidates) + np.searchsorted(np.sort(scores[~good]), candidates)
    best = int(hits.argmax())
    return Agreement(
        threshold=threshold,
        always=float(max(good.mean(), 1 - good.mean())),
        best_threshold=float(candidates[best]),
        best_accuracy=float(hits[best] / len(scores)),
        **{name: found[place] for name, place in asked.items()},
    )


def first_errors(problems: Sequence[Sequence[Solution]], threshold: float) -> FirstError:
    """ProcessBench's figures of solutions whose first_error is known, at least one in all.

    A solution is judged rightly by every threshold above its first error's score and up to the least score before it; one without
    error by every threshold up to its least score.
    """
    owner, (at, low, high, least) = _flat([[_judged_rightly(solution) for solution in one] for one in problems], 4)
    wrong, right = at >= 0, (low < threshold) & (threshold <= high)
    early, never = wrong & (high < threshold), wrong & (least >= threshold)
    sheet = _Sheet(len(problems))
    erroneous, correct = sheet.sums(owner, wrong), sheet.sums(owner, ~wrong)
    found_errors, passed = sheet.sums(owner, wrong & right), sheet.sums(owner, ~wrong & right)
    needs = {erroneous: "no solution has an error", correct: "no solution is without error"}

    def f1(means: Array) -> Array:
        return _harmonic(means[..., found_errors] / means[..., erroneous], means[..., passed] / means[..., correct])

    asked = {
        "f1": sheet.ask(f1, needs),
        "accuracy_erroneous": sheet.share(found_errors, erroneous, needs[erroneous]),
        "accuracy_correct": sheet.share(passed, correct, needs[correct]),
        "early": sheet.share(sheet.sums(owner, early), erroneous, needs[erroneous]),
        "late": sheet.share(sheet.sums(owner, wrong & ~right & ~early & ~never), erroneous, needs[erroneous]),
        "never": sheet.share(sheet.sums(owner, never), erroneous, needs[erroneous]),
    }
    found = sheet.solve()
    best_threshold = best_f1 = None
    if wrong.any() and not wrong.all():
        candidates = np.unique(high)  # what any threshold gets right, the next of these gets right too
        accuracies = []
        for of in (wrong, ~wrong):
            possible = of & (low < high)
            lows, highs = np.sort(low[possible]), np.sort(high[possible])
            accuracies.append((np.searchsorted(lows, candidates) - np.searchsorted(highs, candidates)) / of.sum())
        scores = _harmonic(*accuracies)
        best_threshold, best_f1 = float(candidates[scores.argmax()]), float(scores.max())
    return FirstError(
        threshold=threshold,
        erroneous=int(wrong.sum()),
        correct=int((~wrong).sum()),
        best_threshold=best_threshold,
        best_f1=best_f1,
        **{name: found[place] for name, place in asked.items()},
    )


def _judged_rightly(solution: Solution) -> tuple[float, float, float, float]:
    """(first error, threshold above which and threshold up to which it is judged rightly, least score)."""
    at, scores = solution.first_error, solution.scores
    assert at is not None
    if at < 0:
        return at, -1.0, min(scores), min(scores)
    return at, scores[at], min(scores[:at], default=1.0), min(scores)


def _harmonic(first: Array, second: Array) -> Array:
    return 2 * first * second / np.where(first + second > 0, first + second, 1)


# --- against length -------------------------------------------------------------------------------------------------------


def score_by_length(problems: Sequence[Judged]) -> Length:
    steps = [[(s.score, s.length, -1 if s.good is None else s.good) for s in problem.steps] for problem in problems]
    owner, (scores, lengths, labels) = _flat(steps, 3)
    sheet = _Sheet(len(problems))
    columns, unknown = (owner, lengths, scores), "no step is known to be"
    correlations = {
        "correlation": _ask_correlation(sheet, "there is no step", *columns),
        "among_good": _ask_correlation(sheet, f"{unknown} good", *(column[labels == 1] for column in columns)),
        "among_first_errors": _ask_correlation(sheet, f"{unknown} a first error", *(column[labels == 0] for column in columns)),
    }
    edges = np.unique(np.quantile(lengths, np.arange(1, LENGTH_BINS + 1) / LENGTH_BINS, method="inverted_cdf"))
    at = np.searchsorted(edges, lengths)
    asked = []
    for b in range(len(edges)):
        inside, known = sheet.sums(owner, at == b), sheet.sums(owner, (at == b) & (labels >= 0))
        scored, good = sheet.sums(owner, (at == b) * scores), sheet.sums(owner, (at == b) & (labels == 1))
        asked.append((sheet.share(scored, inside, "there is no step"), sheet.share(good, known, "no label is known")))
    found = sheet.solve()
    return Length(
        **{name: found[place] for name, place in correlations.items()},
        bins=tuple(
            LengthBin(
                low=int(lengths[at == b].min()),
                high=int(lengths[at == b].max()),
                steps=int((at == b).sum()),
                mean_score=found[mean],
                good=found[good],
            )
            for b, (mean, good) in enumerate(asked)
        ),
    )


def _ask_correlation(sheet: "_Sheet", why: str, owner: Array, first: Array, second: Array) -> int:
    """Spearman's, ties at their mean rank; ranks are those among all, also where problems are resampled."""
    x, y = (ranks - ranks.mean() if len(ranks) else ranks for ranks in (_ranks(first), _ranks(second)))
    count, sx, sy, sxx, syy, sxy = (sheet.sums(owner, part) for part in (np.ones(len(x)), x, y, x * x, y * y, x * y))
    varies = sheet.sums(owner, np.full(len(x), float(len(x) > 0 and np.ptp(x) > 0 and np.ptp(y) > 0)))

    def correlation(means: Array) -> Array:
        n = means[..., count]
        [xx, yy, xy] = [means[..., s] / n - means[..., a] * means[..., b] / n**2
                        for s, a, b in ((sxx, sx, sx), (syy, sy, sy), (sxy, sx, sy))]  # fmt: skip
        return xy / np.sqrt(np.maximum(xx, 0) * np.maximum(yy, 0))

    return sheet.ask(correlation, {count: why, varies: "lengths or scores do not vary"}, bounds=(-1, 1))


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


# --- what choosing gains --------------------------------------------------------------------------------------------------


def choosing(problems: Sequence[Sequence[Solution]]) -> Choice:
    """problems: of each equally many independent draws, in their order, whose answers are known to be right or not."""
    most = len(problems[0])
    sizes = [2**k for k in range(most.bit_length()) if 2**k < most] + [most]
    outcomes = [_outcomes(draws, sizes, np.random.default_rng([0, i])) for i, draws in enumerate(problems)]
    sheet = _Sheet(len(problems))
    one = sheet.column([np.mean([bool(draw.correct) for draw in draws]) for draws in problems])
    any_right = sheet.column([any(draw.correct for draw in draws) for draws in problems])
    whole = {sheet.column(np.ones(len(problems))): ""}
    columns = {key: sheet.column([outcome[key] for outcome in outcomes]) for key in outcomes[0]}

    def mean(column: int) -> int:
        return sheet.ask(lambda means: means[..., column], whole)

    def difference(first: int, second: int) -> int:
        return sheet.ask(lambda means: means[..., first] - means[..., second], whole)

    asked = {key: mean(column) for key, column in columns.items()}
    rules = list(dict.fromkeys(rule for rule, _, what in columns if what == "right"))
    gains = {rule: (difference(columns[rule, most, "right"], one),
                    difference(columns[rule, most, "right"], columns[rule, sizes[max(len(sizes) - 2, 0)], "right"]))
             for rule in rules}  # fmt: skip
    totals = mean(one), mean(any_right)
    found = sheet.solve()
    return Choice(
        n=most,
        pass_at_1=found[totals[0]],
        any_right=found[totals[1]],
        gains=tuple(Gain(rule=rule, gain=found[gain], last_doubling=found[change]) for rule, (gain, change) in gains.items()),
        curve=tuple(
            Point(rule=rule, n=n, accuracy=found[asked[rule, n, "right"]],
                  promised=found[asked[rule, n, "promised"]] if (rule, n, "promised") in asked else None)
            for rule in rules for n in sizes
        ),
    )  # fmt: skip


def _outcomes(draws: Sequence[Solution], sizes: Sequence[int], rng: np.random.Generator) -> dict[tuple[str, int, str], float]:
    """By (rule, n, "right"): the share of subsets of n draws in which the rule chooses a right answer; "promised" of a *_max rule:
    the mean score of what it chooses. Ties go to the earlier draw, and draws without an answer take no part, as in a search."""
    count = len(draws)
    names = list(dict.fromkeys(draw.group for draw in draws))
    member = np.array([[draw.group == name and bool(name) for name in names] for draw in draws], float)  # [draws, groups]
    place = member.argmax(1)
    answered = member.any(1)
    right = np.array([bool(draw.correct) and bool(draw.group) for draw in draws])
    weights = {by: np.array([aggregate(draw.scores, by) for draw in draws]) for by in AGGREGATES}
    order = rng.random((SUBSETS, count)).argsort(1).argsort(1)  # of each subset, the place of every draw
    found: dict[tuple[str, int, str], float] = {}
    for n in sizes:
        chosen = np.eye(count, dtype=bool) if n == 1 else order < n if n < count else np.ones((1, count), bool)

        def judge(rule: str, worth: Array, n: int = n, chosen: Array = chosen) -> Array:
            """worth [subsets, draws]: of each draw, by which the best is chosen; the chosen ones."""
            best = np.where(chosen & answered, worth, -np.inf).argmax(1)
            found[rule, n, "right"] = float((right[best] & chosen[np.arange(len(best)), best]).mean())
            return best

        judge("majority", (chosen @ member)[:, place])
        for by, weight in weights.items():
            best = judge(f"{by}_max", np.broadcast_to(weight, chosen.shape))
            found[f"{by}_max", n, "promised"] = float((weight * answered)[best].mean())
            judge(f"{by}_vote", ((chosen * weight) @ member)[:, place])
    return found


# --- in words -------------------------------------------------------------------------------------------------------------


def _signs(length: Length, steps: Calibration | None, choice: Choice | None) -> dict[str, str]:
    own = length.among_good if length.among_good.value is not None else length.correlation
    signs = {"length": _sign(own, "long steps score higher", "long steps score lower")}
    if steps is not None:
        signs["confidence"] = _sign(steps.bias, "scores too high: error neglect", "scores too low: over-criticism")
    if choice is not None:
        worse = [one.rule for one in choice.gains if "-" in (_sign(change, "+", "-") for change in (one.gain, one.last_doubling))]
        signs["over-optimisation"] = f"more draws make {', '.join(worse)} worse" if worse else "no rule is seen to get worse"
    return signs


def _sign(estimate: Estimate, above: str, below: str) -> str:
    if estimate.low is None or estimate.high is None or estimate.low <= 0 <= estimate.high:
        return CANNOT_TELL
    return above if estimate.low > 0 else below


# --- over problems --------------------------------------------------------------------------------------------------------


def _refuse_unless_sound(problems: Sequence[Judged], threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise EngineError(f"the threshold is a score from 0 to 1, not {threshold!r}")
    scores = [step.score for problem in problems for step in problem.steps]
    scores += [score for problem in problems for solution in problem.solutions for score in solution.scores]
    if not scores:
        raise EngineError("there is no scored step to judge a PRM by")
    for score in scores:
        if not 0 <= score <= 1:
            raise EngineError(f"a step has the score {score!r}, which is no probability")


def _flat(problems: Sequence[Sequence[tuple[Any, ...]]], width: int) -> tuple[Array, list[Array]]:
    """The problem's number of every tuple [T], and the tuples as columns, float64 [T] each."""
    owner = np.repeat(np.arange(len(problems)), [len(one) for one in problems])
    table = np.array([values for one in problems for values in one], np.float64).reshape(-1, width)
    return owner, list(table.T)


class _Sheet:
    """Columns of what each problem brings, and figures of their means that are asked for: all resampled together, at the end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.columns: list[Array] = []
        self.asked: list[tuple[Callable[[Array], Array], Mapping[int, str], tuple[float, float]]] = []

    def column(self, values: Any) -> int:
        """values [problems] -> the column's number."""
        self.columns.append(np.asarray(values, np.float64))
        return len(self.columns) - 1

    @property
    def table(self) -> Array:
        """[problems, columns]"""
        return np.stack(self.columns, axis=1)

    def sums(self, owner: Array, values: Array) -> int:
        """The column of each problem's sum of those values that it owns."""
        return self.column(np.bincount(owner, values, self.size))

    def share(self, part: int, whole: int, why: str) -> int:
        return self.ask(lambda means: means[..., part] / means[..., whole], {whole: why})

    def ask(self, of: Callable[[Array], Array], needs: Mapping[int, str], bounds: tuple[float, float] = (-np.inf, np.inf)) -> int:
        """of: means [..., columns] -> the figure [...]. needs: counts without which there is none, and what then to say. Gives the
        figure's number."""
        self.asked.append((of, needs, bounds))
        return len(self.asked) - 1

    def solve(self) -> list[Estimate]:
        """Every figure asked for. A resample that lacks what a figure needs counts as the whole."""
        table, means = self.table, self.table.mean(0)
        found: dict[int, Estimate] = {}
        figures, places = [], []
        for place, (of, needs, _) in enumerate(self.asked):
            lacking = [why for column, why in needs.items() if not means[column] > 0]
            if lacking:
                found[place] = Estimate(value=None, problems=0, why=lacking[0])
            else:
                figures.append(_guarded(of, list(needs), means))
                places.append(place)
        for place, boots in zip(places, bootstraps(table, figures), strict=True):
            _, needs, (least, most) = self.asked[place]
            bringing = table[:, list(needs)] > 0
            fewest = int(bringing.sum(0).min())
            low, high = boots.interval()
            problems = int(bringing.any(1).sum())
            if fewest < FEWEST:
                why = f"too few problems for an interval: {fewest}"
                found[place] = Estimate(value=boots.estimate, problems=problems, why=why)
            else:
                found[place] = Estimate(value=boots.estimate, low=max(low, least), high=min(high, most), problems=problems)
        return [found[place] for place in range(len(self.asked))]


def _guarded(of: Callable[[Array], Array], needs: list[int], means: Array) -> Callable[[Array], Array]:
    with np.errstate(all="ignore"):
        whole = float(of(means))

    def figure(resampled: Array) -> Array:
        with np.errstate(all="ignore"):
            values = of(resampled)
        return np.where((resampled[..., needs] > 0).all(-1) & np.isfinite(values), values, whole)

    return figure
