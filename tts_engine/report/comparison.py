"""What a study's arms say when they are held against one another: typed tables of plain numbers. Nothing is drawn here.

Whether one arm solves more than another is told by their paired difference over problems; with a table of many such claims, each
passes at the level that Holm's steps leave it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

from ..ledger import Ledger
from .arms import Arm, Study, share_interval
from .efficiency import Factor, efficiency
from .intervals import Verdict, verdicts
from .table import GIGA

SIGNIFICANT = 0.05
BASELINES = ("cot", "majority")
ALL = "all"  # the bin of every problem


@dataclass(frozen=True, slots=True)
class Share:
    """Of a bin's problems, the share solved with its 95 % interval, and GFLOP a problem. None for a bin without problems."""

    problems: int
    accuracy: float | None
    interval: tuple[float, float]
    gflop: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """An arm over all problems and by bin. by: grouping -> bin -> share."""

    arm: Arm
    share: Share
    policy_gflop: float
    prm_gflop: float
    by: dict[str, dict[str, Share]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRow:
    """A small policy's search against a larger policy's single greedy answer."""

    small: Arm
    large: Arm
    cost: float | None  # FLOPs of the small one's over the large one's
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRow:
    """What an arm gains over chain of thought, and over a majority of as many draws; None where that was not run.

    relative: the gain as a share of chain of thought's accuracy. factor: over all budgets of the method, see efficiency.py.
    """

    arm: Arm
    prm: str | None
    over_cot: Verdict | None
    relative: float | None
    over_majority: Verdict | None
    factor: Factor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """Who solves most of a bin's problems at one budget. tied: those of whom these problems cannot tell that they solve fewer."""

    policy: str
    prm: str | None
    n: int
    grouping: str
    bin: str
    problems: int
    best: Arm | None  # None where the bin has no problem, or where nobody solved one
    accuracy: float
    tied: tuple[Arm, ...]
    rivals: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """Where an arm's time and FLOPs went; of a problem where not shares."""

    arm: Arm
    seconds: float
    executed_gflop: float  # policy and PRM, waste and all; none by a search that was replayed
    phases: dict[str, float]  # shares of the engine's time
    useful: float | None
    wasted: dict[str, float]  # shares of FLOPs
    drawn: float  # tokens
    prm_read: float
    prm_reread: float
    kv_distinct: float  # bytes, policy and PRM
    kv_logical: float


def accuracy_rows(study: Study) -> list[AccuracyRow]:
    rows = []
    for arm in study.arms:
        ledger = arm.ledger
        by = {grouping.name: {bin: share_of(arm, grouping.places(arm.policy, arm.ids, bin)) for bin in grouping.bins}
              for grouping in study.groupings}  # fmt: skip
        rows.append(
            AccuracyRow(
                arm=arm,
                share=share_of(arm, range(len(arm.ids))),
                policy_gflop=ledger.policy.asked_flops / GIGA / arm.searches,
                prm_gflop=ledger.prm.asked_flops / GIGA / arm.searches,
                by=by,
            )
        )
    return rows


def share_of(arm: Arm, places: Sequence[int]) -> Share:
    solved = [arm.solved[place] for place in places]
    count = len(solved)
    interval = share_interval(solved, once=len(arm.cells) == 1)
    spent = sum(arm.flops[place] for place in places)
    return Share(count, sum(solved) / count if count else None, interval, spent / GIGA / count if count else None)


def size_rows(study: Study) -> list[SizeRow]:
    """Every method of every smaller policy at its largest budget, against every larger policy that has chain of thought."""
    pairs = []
    sizes = {arm.policy: arm.parameters for arm in study.arms}
    for small, large in combinations(study.policies, 2):
        answer = study.find(large, None, "cot")
        if answer is not None and sizes[small] < sizes[large]:
            pairs += [(arm, answer) for arm in largest(study.arms) if arm.policy == small]
    found = _verdicts({i: _difference(*pair) for i, pair in enumerate(pairs)})
    return [SizeRow(small=small, large=large, cost=small.gflop / large.gflop if large.gflop else None, verdict=found[i])
            for i, (small, large) in enumerate(pairs)]  # fmt: skip


def gain_rows(study: Study) -> list[GainRow]:
    """Every method but chain of thought, at its largest budget, with each PRM."""
    claims: dict[tuple[int, str], list[float]] = {}
    arms = [arm for arm in largest(study.arms) if arm.method != "cot"]
    baselines: dict[tuple[int, str], Arm] = {}
    for i, arm in enumerate(arms):
        for name in BASELINES:
            n = None if name == "cot" else arm.n
            other = study.find(arm.policy, None, name, n)
            if other is not None and other is not arm and arm.method != name:
                claims[i, name], baselines[i, name] = _difference(arm, other), other
    found = _verdicts(claims)
    rows = []
    for i, arm in enumerate(arms):
        cot = baselines.get((i, "cot"))
        own = [one for one in study.arms if (one.policy, one.prm, one.method) == (arm.policy, arm.prm, arm.method)]
        majority = [one for one in study.of(arm.policy, None) if one.method == "majority"]
        over_cot = found.get((i, "cot"))
        rows.append(
            GainRow(
                arm=arm,
                prm=arm.prm,
                over_cot=over_cot,
                relative=over_cot.difference / cot.accuracy if over_cot is not None and cot is not None and cot.accuracy else None,
                over_majority=found.get((i, "majority")),
                factor=None if arm.method == "majority" else efficiency(own, majority, cot),
            )
        )
    return rows


def winners(study: Study) -> list[Winner]:
    """For every policy with every PRM, budget and bin of difficulty: who solves most at that budget, chain of thought among them.

    Of equals the cheaper. Equal budgets are not equal FLOPs: a PRM's reading comes on top of the draws.
    """
    asked: list[tuple[str, str | None, int, str, str, list[int], list[Arm]]] = []
    for policy in study.policies:
        for prm in study.prms:
            arms = study.of(policy, prm)
            if prm is not None and all(arm.prm is None for arm in arms):
                continue
            for n in sorted({arm.n for arm in arms if arm.method != "cot"}):
                rivals = [arm for arm in arms if arm.n == n or arm.method == "cot"]
                if len(rivals) < 2:
                    continue
                asked.append((policy, prm, n, ALL, ALL, list(range(len(study.ids))), rivals))
                asked += [(policy, prm, n, grouping.name, bin, grouping.places(policy, study.ids, bin), rivals)
                          for grouping in study.groupings if policy in grouping.of for bin in grouping.bins]  # fmt: skip
    claims: dict[tuple[int, int], list[float]] = {}
    best: dict[int, tuple[Arm, float]] = {}
    for i, (*_, places, rivals) in enumerate(asked):
        if not places:
            continue
        solved = [[arm.solved[place] for place in places] for arm in rivals]
        spent = [sum(arm.flops[place] for place in places) for arm in rivals]
        first = max(range(len(rivals)), key=lambda j: (sum(solved[j]), -spent[j]))
        if sum(solved[first]) > 0:
            best[i] = rivals[first], sum(solved[first]) / len(places)
            for j in range(len(rivals)):
                if j != first:
                    claims[i, j] = [mine - theirs for mine, theirs in zip(solved[first], solved[j], strict=True)]
    found = _verdicts(claims)
    rows = []
    for i, (policy, prm, n, grouping, bin, places, rivals) in enumerate(asked):
        arm, accuracy = best.get(i, (None, 0.0))
        tied = tuple(rival for j, rival in enumerate(rivals) if (i, j) in found and found[i, j].p_value > SIGNIFICANT)
        rows.append(Winner(policy=policy, prm=prm, n=n, grouping=grouping, bin=bin, problems=len(places), best=arm,
                           accuracy=accuracy, tied=tied, rivals=len(rivals)))  # fmt: skip
    return rows


def ledger_rows(study: Study) -> list[LedgerRow]:
    rows = []
    for arm in study.arms:
        ledger, count = arm.ledger, arm.searches
        phases = _phases(ledger)
        rows.append(
            LedgerRow(
                arm=arm,
                seconds=ledger.seconds / count,
                executed_gflop=ledger.flops / GIGA / count,
                phases=phases,
                useful=ledger.useful,
                wasted=ledger.wasted,
                drawn=ledger.policy.tokens_generated / count,
                prm_read=ledger.prm.tokens_computed / count,
                prm_reread=ledger.prm.tokens_reread / count,
                kv_distinct=(ledger.policy.kv_distinct_bytes + ledger.prm.kv_distinct_bytes) / count,
                kv_logical=(ledger.policy.kv_logical_bytes + ledger.prm.kv_logical_bytes) / count,
            )
        )
    return rows


def largest(arms: Sequence[Arm]) -> list[Arm]:
    """Of each policy, PRM and method the arm of the largest n."""
    found = {(arm.policy, arm.prm, arm.method): arm for arm in sorted(arms, key=lambda arm: arm.n)}
    return [arm for arm in arms if arm is found[arm.policy, arm.prm, arm.method]]


def _phases(ledger: Ledger) -> dict[str, float]:
    spent = {"policy": ledger.phases.policy, "PRM": ledger.phases.prm, "grading": ledger.phases.grading, "rest": ledger.phases.rest}
    total = sum(spent.values())
    return {phase: seconds / total if total else 0.0 for phase, seconds in spent.items()}


def _difference(first: Arm, second: Arm) -> list[float]:
    return [mine - theirs for mine, theirs in zip(first.solved, second.solved, strict=True)]


def _verdicts(claims: Mapping[Any, Sequence[float]]) -> dict[Any, Verdict]:
    """By whatever names a claim."""
    found = verdicts({str(place): claim for place, claim in enumerate(claims.values())})
    return dict(zip(claims, found.values(), strict=True))


# --- for JSON ---------------------------------------------------------------------------------------------------------------


def as_dict(study: Study) -> dict[str, Any]:
    """Every table in plain numbers; shares in [0, 1]."""
    return {
        "task": study.task, "split": study.split, "problems": len(study.ids), "notes": list(study.notes),
        "accuracy": [
            _told(row.arm) | asdict(row.share) | {"by": {name: {bin: asdict(share) for bin, share in bins.items()}
                                                         for name, bins in row.by.items()}}
            | {"policy_gflop": row.policy_gflop, "prm_gflop": row.prm_gflop, "failed": row.arm.failed}
            for row in accuracy_rows(study)
        ],
        "sizes": [{"small": _told(row.small), "large": _told(row.large), "cost": row.cost} | asdict(row.verdict)
                  for row in size_rows(study)],
        "gain": [
            _told(row.arm) | {name: None if one is None else asdict(one) for name, one in
                              {"over_cot": row.over_cot, "over_majority": row.over_majority, "less_compute": row.factor}.items()}
            | {"relative": row.relative}
            for row in gain_rows(study)
        ],
        "winners": [
            {"policy": row.policy, "prm": row.prm, "n": row.n, "grouping": row.grouping, "bin": row.bin, "problems": row.problems,
             "best": None if row.best is None else _told(row.best), "accuracy": row.accuracy,
             "tied": [_told(arm) for arm in row.tied]}
            for row in winners(study)
        ],
        "ledger": [_told(row.arm) | {each.name: getattr(row, each.name) for each in fields(row) if each.name != "arm"}
                   for row in ledger_rows(study)],
    }  # fmt: skip


def _told(arm: Arm) -> dict[str, Any]:
    return {"policy": arm.policy, "prm": arm.prm, "method": arm.method, "n": arm.n}
