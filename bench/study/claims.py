"""What the study claims, and what its runs, gathered as for a report, say of each claim. No files and no models here.

Whatever is the best of several is chosen on calibration problems and counted on test problems. Each claim is one number a test
problem, claimed to be above 0 on average; intervals.verdicts tells which hold, Holm over all. Equal budgets are equal n; FLOPs are
those of policy and PRM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tts_engine.embedded.recipe import POLICIES, PRMS, STUDY_POLICIES, STUDY_PRMS
from tts_engine.report.arms import Arm, Grouping, Study
from tts_engine.report.efficiency import Factor, efficiency
from tts_engine.report.intervals import Verdict, bootstrap, verdicts

SMALL, MIDDLE, LARGE = "policy-s", "policy-m", "policy-l"
SIZES = (SMALL, MIDDLE, LARGE)
GOOD, POOR, TINY, REDO = "prm-good", "prm-poor", "prm-small", "policy-m-redo"
CHECKPOINTS = ("prm-good-1.5M", "prm-good-3M", "prm-good-6M", "prm-good-9M", GOOD)
SEARCHES = ("best_of_n", "beam", "dvts")
METHODS = ("majority", *SEARCHES)
BUDGET = 16  # the largest that all policies have
GIGA = 1e9

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Side:
    """The runs of a split. votes: policy and PRM -> way of choosing among most draws -> whether each problem is solved by it;
    parameters: of every model."""

    study: Study
    parameters: Mapping[str, int]
    votes: Mapping[tuple[str, str], Mapping[str, Sequence[bool]]]

    @property
    def bins(self) -> Grouping:
        [found] = [grouping for grouping in self.study.groupings if grouping.name == "pass@1"]
        return found

    def arm(self, policy: str, prm: str, method: str, n: int = BUDGET) -> Arm:
        """That of chain of thought whatever n is. Raises KeyError where it was not run."""
        found = self.study.find(policy, prm, method, None if method == "cot" else n)
        if found is None:
            raise KeyError(f"no run of {policy} with {prm} and {method} n={n}")
        return found

    def solved(self, *arm: Any) -> Array:
        return np.array(self.arm(*arm).solved, float)

    def places(self, policy: str, bin: str) -> list[int]:
        return self.bins.places(policy, self.study.ids, bin)

    def best(self, arms: Sequence[Arm], places: Sequence[int] | None = None) -> Arm:
        """Who solves most of the problems at these places, of equals the cheaper."""
        at = range(len(self.study.ids)) if places is None or not places else places
        return max(arms, key=lambda arm: (sum(arm.solved[i] for i in at), -sum(arm.flops[i] for i in at)))

    def best_method(self, policy: str, prm: str, names: Sequence[str], places: Sequence[int] | None = None, n: int = BUDGET) -> str:
        return self.best([self.arm(policy, prm, name, n) for name in names], places).method

    def budgets(self, policy: str) -> list[int]:
        """Of its majorities, 1 left out: nothing is chosen there."""
        return sorted({arm.n for arm in self.study.arms if (arm.policy, arm.method) == (policy, "majority")} - {1})


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """values: by test problem, what is claimed to be above 0 on average. told: what else there is to say of it, plain data."""

    name: str
    text: str
    unit: str
    values: Array
    told: dict[str, Any]


def make_claims(calibration: Side, test: Side, quality: Mapping[str, float]) -> list[Claim]:
    """quality: of each checkpoint of the good PRM, how well it tells good steps from first errors."""
    return [
        best_by_size(calibration, test),
        search_by_size(calibration, test),
        poor_prm(test),
        best_by_difficulty(calibration, test),
        compute_optimal(calibration, test),
        small_beats_large(test),
        rule_by_prm(calibration, test),
        long_cot(calibration, test),
        weak_to_strong(test),
        by_quality(test, quality),
    ]


def judge(claims: Sequence[Claim]) -> dict[str, Verdict]:
    return verdicts({claim.name: claim.values.tolist() for claim in claims})


def best_by_size(calibration: Side, test: Side) -> Claim:
    chosen = {policy: calibration.best_method(policy, GOOD, METHODS) for policy in SIZES}
    own, other = chosen[SMALL], chosen[LARGE]
    values = sum(sign * test.solved(policy, GOOD, name)
                 for policy, sign in ((SMALL, 1), (LARGE, -1)) for name, sign in ((own, sign), (other, -sign))) / 2  # fmt: skip
    return Claim(
        name="a1",
        text=f"the best method differs by policy size: at n={BUDGET} the smallest and the largest policy do better each with "
        "its own best method than with the other's",
        unit="points",
        values=values,
        told={"chosen": chosen, "accuracy": _accuracies(test, GOOD, METHODS)},
    )


def search_by_size(calibration: Side, test: Side) -> Claim:
    chosen = {policy: calibration.best_method(policy, GOOD, SEARCHES) for policy in SIZES}
    gain = {policy: test.solved(policy, GOOD, chosen[policy]) - test.solved(policy, GOOD, "majority") for policy in SIZES}
    return Claim(
        name="a2",
        text=f"search helps small policies more: the smallest gains more over its majority at n={BUDGET} than the largest",
        unit="points",
        values=gain[SMALL] - gain[LARGE],
        told={"chosen": chosen, "gain": _means(gain)},
    )


def poor_prm(test: Side) -> Claim:
    pairs = [(policy, name) for policy in SIZES for name in SEARCHES]
    lost = {f"{policy}, {name}": test.solved(policy, POOR, "majority") - test.solved(policy, POOR, name) for policy, name in pairs}
    return Claim(
        name="b",
        text=f"a poor PRM makes search worse than majority at n={BUDGET}, over all policies and searches",
        unit="points",
        values=np.mean(list(lost.values()), axis=0),
        told={"lost": _means(lost), POOR: _accuracies(test, POOR, METHODS), GOOD: _accuracies(test, GOOD, METHODS)},
    )


def best_by_difficulty(calibration: Side, test: Side) -> Claim:
    names = ("cot", *METHODS)
    gains, winners = [], {}
    for policy in SIZES:
        overall = calibration.best_method(policy, GOOD, names)
        solved, by_bin = of_known_difficulty(calibration, test, policy, names, BUDGET)
        gains.append(solved - test.solved(policy, GOOD, overall))
        winners[policy] = {"all": overall} | by_bin
    accuracy = {bin: {policy: {name: _mean(test.solved(policy, GOOD, name)[test.places(policy, bin)]) for name in names}
                      for policy in SIZES} for bin in test.bins.bins}  # fmt: skip
    return Claim(
        name="c",
        text=f"the best method differs by difficulty: chosen by bin it beats the best single one at n={BUDGET}, over all policies",
        unit="points",
        values=np.mean(gains, axis=0),
        told={"chosen": winners, "accuracy": accuracy},
    )


def of_known_difficulty(
    calibration: Side, test: Side, policy: str, names: Sequence[str], n: int
) -> tuple[Array, dict[str, str]]:  # fmt: skip
    """What each test problem's bin is best served by with the good PRM, its bin being known: solved, and the method of each bin."""
    solved, chosen = np.zeros(len(test.study.ids)), {}
    for bin in test.bins.bins:
        chosen[bin] = calibration.best_method(policy, GOOD, names, calibration.places(policy, bin), n)
        at = test.places(policy, bin)
        solved[at] = test.solved(policy, GOOD, chosen[bin], n)[at]
    return solved, chosen


def compute_optimal(calibration: Side, test: Side) -> Claim:
    """By predicted difficulty, whose pilot is paid for in FLOPs; `known` tells what there would be to gain without error."""
    names = ("cot", *METHODS)
    gains, known, factors = {}, {}, {}
    for policy in SIZES:
        for n in test.budgets(policy):
            fixed = calibration.best_method(policy, GOOD, names, n=n)
            solved = test.solved(policy, GOOD, fixed, n)
            gains[f"{policy}, n={n}, over {fixed}"] = test.solved(policy, GOOD, "auto", n) - solved
            known[f"{policy}, n={n}, over {fixed}"] = of_known_difficulty(calibration, test, policy, names, n)[0] - solved
        for prm in (GOOD, POOR):
            curves = [_arms(test, policy, prm, name) for name in ("auto", "majority")]
            factors[f"{policy}, {prm}"] = _factor(efficiency(*curves, test.arm(policy, prm, "cot")))
    return Claim(
        name="d",
        text="compute-optimal scaling beats the best fixed method at equal budget, over all policies and budgets",
        unit="points",
        values=np.mean(list(gains.values()), axis=0),
        told={"gain": _means(gains), "gain if difficulty were known": _means(known),
              "less compute for the accuracy of the largest majority": factors},
    )  # fmt: skip


def small_beats_large(test: Side) -> Claim:
    small, large = test.arm(SMALL, GOOD, "auto", test.budgets(SMALL)[-1]), test.arm(LARGE, GOOD, "cot")
    return Claim(
        name="e",
        text=f"the smallest policy with compute-optimal scaling at n={small.n} beats the largest policy's chain of thought",
        unit="points",
        values=np.subtract(small.solved, large.solved),
        told={"small": _cost(small, GOOD), "large": _cost(large)},
    )


def rule_by_prm(calibration: Side, test: Side) -> Claim:
    chosen, gains, spread = {}, [], {}
    for policy in SIZES:
        own = {prm: max(calibration.votes[policy, prm], key=lambda rule, prm=prm: sum(calibration.votes[policy, prm][rule]))
               for prm in (GOOD, POOR)}  # fmt: skip
        chosen[policy] = own
        for prm, other in ((GOOD, POOR), (POOR, GOOD)):
            votes = {rule: np.array(column, float) for rule, column in test.votes[policy, prm].items()}
            gains.append(votes[own[prm]] - votes[own[other]])
            spread[f"{policy}, {prm}"] = _means(votes)
    return Claim(
        name="f",
        text="the voting rule matters by PRM: among most draws each PRM does better with its own best rule than with the other's",
        unit="points",
        values=np.mean(gains, axis=0),
        told={"chosen": chosen, "accuracy": spread},
    )


def long_cot(calibration: Side, test: Side) -> Claim:
    """At equal FLOPs: for each bin the plain policy's best arm among those that cost no more there than the other's chain of
    thought, chosen on calibration problems."""
    redo, before = test.arm(REDO, GOOD, "cot"), calibration.arm(REDO, GOOD, "cot")
    plain = [arm for arm in calibration.study.of(MIDDLE, GOOD) if arm.method in ("cot", *METHODS)]
    solved, spent, chosen, by_bin = np.zeros(len(redo.ids)), np.zeros(len(redo.ids)), {}, {}
    for bin in test.bins.bins:
        at = calibration.places(MIDDLE, bin)
        most = sum(before.flops[i] for i in at)
        affordable = [arm for arm in plain if arm.method == "cot" or sum(arm.flops[i] for i in at) <= most]
        best = calibration.best(affordable, at)
        arm, here = test.arm(MIDDLE, GOOD, best.method, best.n), test.places(MIDDLE, bin)
        solved[here], spent[here] = np.array(arm.solved)[here], np.array(arm.flops)[here]
        chosen[bin] = best.label
        by_bin[bin] = {
            "problems": len(here),
            "plain": _mean(solved[here]),
            "plain GFLOP": _mean(spent[here] / GIGA),
            "redo": _mean(np.array(redo.solved)[here]),
            "redo GFLOP": _mean(np.array(redo.flops)[here] / GIGA),
        }
    curve = efficiency(_arms(test, MIDDLE, GOOD, "auto"), [redo], test.arm(MIDDLE, GOOD, "cot"))
    return Claim(
        name="g",
        text="at equal FLOPs compute-optimal scaling of the plain middle policy beats the long chain of thought of one trained to "
        "check and redo",
        unit="points",
        values=solved - np.array(redo.solved),
        told={"chosen": chosen, "by difficulty": by_bin, "plain": {"accuracy": _mean(solved), "gflop": _mean(spent / GIGA)},
              "redo": _cost(redo), "FLOPs of the long chain over those of compute-optimal scaling at its accuracy": _factor(curve)},
    )  # fmt: skip


def weak_to_strong(test: Side) -> Claim:
    gains, all_pairs = {}, {}
    for policy in SIZES:
        for prm in (TINY, GOOD):
            ratio = test.parameters[prm] / test.parameters[policy]
            gain = test.solved(policy, prm, "best_of_n") - test.solved(policy, prm, "majority")
            all_pairs[f"{prm} on {policy}"] = {"PRM / policy": ratio, "gain": _mean(gain)}
            if ratio < 1:
                gains[prm, policy] = gain
    return Claim(
        name="h1",
        text=f"weak to strong: best-of-N under a PRM smaller than the policy beats its majority at n={BUDGET}, over all such pairs",
        unit="points",
        values=np.mean(list(gains.values()), axis=0),
        told={"pairs": all_pairs},
    )


def by_quality(test: Side, quality: Mapping[str, float]) -> Claim:
    """The slope of a straight line through the checkpoints, which is a mean over problems like any other figure here."""
    auc = np.array([quality[prm] for prm in CHECKPOINTS])
    weights = (auc - auc.mean()) / np.sum((auc - auc.mean()) ** 2) / 10
    solved = [np.mean([test.solved(policy, prm, "best_of_n") for policy in SIZES], axis=0) for prm in CHECKPOINTS]
    accuracy = {prm: {"AUC": quality[prm], "all": _mean(column)} | {policy: _mean(test.solved(policy, prm, "best_of_n"))
                for policy in SIZES} for prm, column in zip(CHECKPOINTS, solved, strict=True)}  # fmt: skip
    return Claim(
        name="h2",
        text=f"a better PRM finds more: best-of-N at n={BUDGET} by step AUC over {len(CHECKPOINTS)} checkpoints of the good PRM's "
        "training, over all policies",
        unit="points for 10 points of AUC",
        values=weights @ (np.array(solved) - solved[-1]),  # the weights add up to 0
        told={"checkpoints": accuracy},
    )


def adaptive_stopping(test: Side) -> dict[str, Any]:
    """No claim: of a majority that stops once it is all but decided, what it costs and changes against the whole one."""
    found = {}
    for policy in SIZES:
        whole = _arms(test, policy, GOOD, "majority")[-1]
        for arm in _arms(test, policy, GOOD, "adaptive"):
            difference = bootstrap(np.subtract(arm.solved, whole.solved))
            spent = bootstrap(np.stack([arm.flops, whole.flops], axis=1), of=lambda means: means[..., 0] / means[..., 1])
            found[f"{policy}, n={arm.n}"] = {
                "accuracy": arm.accuracy, "difference": difference.estimate, "difference_95": list(difference.interval()),
                "share of FLOPs": spent.estimate, "share_95": list(spent.interval()),
            }  # fmt: skip
    return found


# --- FLOPs of training ------------------------------------------------------------------------------------------------------


def training_flops(parameters: Mapping[str, int]) -> dict[str, float]:
    """6 a parameter and token of every model, a PRM's with those of the policy that it began as. parameters: of each model.

    What the good PRM's samples took to draw, some 2 % of it, is left out, as are checkpoints on its way.
    """
    found = {}
    for name, policy in (POLICIES | STUDY_POLICIES).items():
        if name in parameters:
            found[name] = 6.0 * parameters[name] * sum(tokens for tokens, _ in policy.legs)
    for name, prm in (PRMS | STUDY_PRMS).items():
        if name in parameters:
            found[name] = found[prm.start] + 6.0 * parameters[name] * sum(tokens for tokens, _ in prm.legs)
    return found


# --- plain numbers ----------------------------------------------------------------------------------------------------------


def _arms(side: Side, policy: str, prm: str, method: str) -> list[Arm]:
    return [arm for arm in side.study.of(policy, prm) if arm.method == method]


def _accuracies(side: Side, prm: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {policy: {name: _mean(side.solved(policy, prm, name)) for name in names} for policy in SIZES}


def _cost(arm: Arm, prm: str | None = None) -> dict[str, Any]:
    ledger = arm.ledger
    parts = {"policy": ledger.policy.asked_flops / GIGA / arm.searches, "PRM": ledger.prm.asked_flops / GIGA / arm.searches}
    return {"policy": arm.policy, "prm": prm, "method": arm.label, "accuracy": arm.accuracy, "interval_95": list(arm.interval),
            "gflop": arm.gflop, "gflop_by": parts}  # fmt: skip


def _factor(found: Factor | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"factor": found.estimate, "interval_95": [found.low, found.high], "reached": found.reached, "outcome": found.outcome}


def _mean(values: Array) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _means(columns: Mapping[str, Array]) -> dict[str, float | None]:
    return {name: _mean(column) for name, column in columns.items()}
