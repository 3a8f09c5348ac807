"""What is told of the study: summary.json, tables for a README, the report's page and two of its figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.study.claims import (
    GIGA,
    GOOD,
    LARGE,
    METHODS,
    POOR,
    SIZES,
    SMALL,
    Claim,
    Side,
    adaptive_stopping,
    judge,
    make_claims,
    training_flops,
)  # fmt: skip
from tts_engine.report.arms import Arm, Study
from tts_engine.report.curves import accuracy_figure, size_figure
from tts_engine.report.diagnostics import Diagnostics
from tts_engine.report.intervals import Verdict
from tts_engine.report.page import PAGE, make_report, page, write_figures
from tts_engine.report.text import percent, short
from tts_engine.runs import describe_making

SHOWN = 16  # n of the accuracies in the README's table


def write_results(
    calibration: Side, test: Side, diagnosed: Mapping[str, Diagnostics], strategy: dict[str, Any], directory: Path
) -> None:  # fmt: skip
    """All of it into `directory`. diagnosed: each PRM; strategy: as its file has it."""
    quality = step_auc(diagnosed)
    claims = make_claims(calibration, test, quality)
    verdicts = judge(claims)
    training = training_flops(test.parameters)
    directory.mkdir(parents=True, exist_ok=True)
    numbers = summary(claims, verdicts, test, training, quality, strategy)
    (directory / "summary.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (directory / "table.md").write_text(f"{claim_table(claims, verdicts)}\n{cost_table(test, training)}", encoding="utf-8")
    grid = main_grid(test.study)
    write_figures([size_figure(grid), accuracy_figure(grid, "flops")], directory)
    (directory / PAGE).write_text(page(make_report(grid, [diagnosed[prm] for prm in (GOOD, POOR)])), encoding="utf-8")


def step_auc(diagnosed: Mapping[str, Diagnostics]) -> dict[str, float]:
    """Of each PRM, how often a good step outscores a first error. Raises ValueError where no step has a label."""
    found = {}
    for prm, told in diagnosed.items():
        if told.step_scores is None or told.step_scores.auc.value is None:
            raise ValueError(f"how good {prm} is cannot be told: its samples hold no first error, or nothing else")
        found[prm] = told.step_scores.auc.value
    return found


def main_grid(study: Study) -> Study:
    """The three policies with the two PRMs, all methods; nothing that one claim alone takes."""
    kept = tuple(arm for arm in study.arms if arm.policy in SIZES and arm.prm in (None, GOOD, POOR) and arm.method != "adaptive")
    sources = tuple(source for source in study.sources if source.arm in kept)
    return replace(study, arms=kept, sources=sources)


def summary(
    claims: Sequence[Claim], verdicts: Mapping[str, Verdict], test: Side, training: Mapping[str, float],
    quality: Mapping[str, float], strategy: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Plain numbers; differences in points are shares here."""
    return {
        "problems": len(test.study.ids),
        "claims": [
            {"name": claim.name, "text": claim.text, "unit": claim.unit} | asdict(verdicts[claim.name]) | {"told": claim.told}
            for claim in claims
        ],
        "arms": [_arm(arm) for arm in test.study.arms],
        "adaptive stopping": adaptive_stopping(test),
        "PRM step AUC": dict(quality),
        "parameters": dict(test.parameters),
        "training FLOPs": dict(training),
        "with training": [with_training(test, policy, prm, method, training) for policy, prm, method in COMPARED],
        "strategy": {"name": strategy["name"], "tables": [
            {"policy": table["policy"]["name"], "prm": table["prm"]["name"], "picks": table["picks"],
             "confusion": table["predictor"]["confusion"] if table["predictor"] else None} for table in strategy["tables"]]},
    } | describe_making()  # fmt: skip


COMPARED = ((SMALL, None, "cot"), (SMALL, GOOD, "auto"), (LARGE, None, "cot"))  # whose FLOPs are told with training and without


def with_training(test: Side, policy: str, prm: str | None, method: str, training: Mapping[str, float]) -> dict[str, Any]:
    """FLOPs over all test problems, as the paper's table has them; `auto` at its largest n."""
    arm = [arm for arm in test.study.of(policy, prm) if arm.method == method][-1]
    models = [policy] + ([prm] if prm is not None else [])
    trained, spent = sum(training[model] for model in models), float(sum(arm.flops))
    return {"policy": policy, "prm": prm, "method": arm.label, "accuracy": arm.accuracy, "training": trained, "inference": spent,
            "total": trained + spent}  # fmt: skip


def claim_table(claims: Sequence[Claim], verdicts: Mapping[str, Verdict]) -> str:
    """Numbers in points; where the unit is another it stands behind them."""
    lines = ["| | claim | number (95 % interval) | says |", "|---|---|---|---|"]
    for claim in claims:
        verdict = verdicts[claim.name]
        low, high = (100 * bound for bound in verdict.interval)
        number = f"{100 * verdict.difference:+.1f} {claim.unit} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {claim.name} | {claim.text} | {number} | {verdict.outcome} |")
    return "\n".join(lines) + "\n"


def cost_table(test: Side, training: Mapping[str, float]) -> str:
    """Accuracy by policy and method under the good PRM, and what small and large cost in all."""
    names = ("cot", *METHODS, "auto")
    headings = [name if name == "cot" else f"{name} n={SHOWN}" for name in names]
    lines = [f"| policy | {' | '.join(headings)} |", "|---|" + "---|" * len(names)]
    for policy in SIZES:
        arms = [test.arm(policy, GOOD, name, SHOWN) for name in names]
        cells = [f"{percent(arm.accuracy, arm.interval)}, {short(arm.gflop * GIGA)}FLOP" for arm in arms]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    lines += ["", "| | solved % | training FLOPs | inference FLOPs | both |", "|---|---|---|---|---|"]
    for row in (with_training(test, *compared, training) for compared in COMPARED):
        name = f"{row['policy']}{' with ' + row['prm'] if row['prm'] else ''}, {row['method']}"
        lines.append(
            f"| {name} | {percent(row['accuracy'])} | {row['training']:.2e} | {row['inference']:.2e} | {row['total']:.2e} |"
        )
    return "\n".join(lines) + "\n"


def _arm(arm: Arm) -> dict[str, Any]:
    return {"policy": arm.policy, "prm": arm.prm, "method": arm.method, "n": arm.n, "made": arm.made, "accuracy": arm.accuracy,
            "interval_95": list(arm.interval), "gflop": arm.gflop,
            "policy_gflop": arm.ledger.policy.asked_flops / GIGA / arm.searches,
            "prm_gflop": arm.ledger.prm.asked_flops / GIGA / arm.searches, "useful": arm.ledger.useful,
            "failed": arm.failed}  # fmt: skip
