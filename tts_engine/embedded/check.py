"""Measures the embedded models on calibration problems, and tells whether they are still what their README says.

Figures are estimates with their standard errors over problems, draws of one problem never taken for independent.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ..engine import Engine
from ..errors import EngineError
from ..results import SearchResult
from ..search import BestOfN, Cot, Majority
from ..search.voting import majority
from ..tasks.problems import Problem, load_task
from ..tasks.programs import OPERATIONS_BY_LEVEL, step_labels
from . import BLOCK_SIZE, MODELS

POLICIES = ("policy-s", "policy-m", "policy-l")
PRMS = ("prm-good", "prm-poor")
DRAWS = 64
PRM_DRAWS = 8  # trajectories a problem whose steps the PRMs judge
BINS = {"easy": (0.5, 1.01), "medium": (0.1, 0.5), "hard": (0.0, 0.1)}  # of a problem's own pass@1
CONFIDENCE = 0.999  # of `check`
BOOTSTRAPS = 400


@dataclass(frozen=True, slots=True)
class Figure:
    """An estimate and its standard error."""

    value: float
    error: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        return max(0.0, self.value - z * self.error), min(1.0, self.value + z * self.error)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{100 * self.value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def mean(values: list[float]) -> Figure:
    """A mean over problems of values in [0, 1]. Its error is taken with two more successes and two more failures (Agresti and
    Coull), so that it does not vanish where all problems agree."""
    padded = np.array([*values, 0.0, 0.0, 1.0, 1.0])
    return Figure(sum(values) / len(values), float(padded.std() / math.sqrt(len(padded))))


def measure_policy(engine: Engine, problems: list[Problem]) -> dict[str, Figure]:
    """greedy, pass@1, majority@64, pass@64: over all problems and by level; the share of problems in each pass@1 bin."""
    greedy = [float(r.answer == r.problem.answer) for r in engine.search(problems, Cot())]
    draws = engine.search(problems, Majority(n=DRAWS))
    rates = [sum(a == r.problem.answer for a in r.answers) / DRAWS for r in draws]
    columns = {
        "greedy": greedy,
        "pass@1": rates,
        f"majority@{DRAWS}": [float(majority(r.answers) == r.problem.answer) for r in draws],
        f"pass@{DRAWS}": [float(rate > 0) for rate in rates],
    }
    figures = {}
    for name, values in columns.items():
        figures[name] = mean(values)
        for level in OPERATIONS_BY_LEVEL:
            figures[f"{name}, level {level}"] = mean([v for v, p in zip(values, problems, strict=True) if p.level == level])
    for name, (low, high) in BINS.items():
        figures[f"bin {name}"] = mean([float(low <= rate < high) for rate in rates])
    return figures


def measure_prm(engine: Engine, problems: list[Problem]) -> dict[str, Figure]:
    """How well scores tell first errors from good steps: areas under the ROC curve, their errors by resampling problems.

    "AUC" sets every first error against every good step, so a PRM that only knows which operations are hard does well in it;
    "AUC, one operation" compares results of one and the same operation of one problem, which is what a search chooses among.
    """
    judged = [_judged(result) for result in engine.search(problems, BestOfN(n=PRM_DRAWS))]
    everywhere = [[pair for pairs in by_operation.values() for pair in pairs] for by_operation in judged]
    alike = np.array([np.sum([_wins(pairs) for pairs in by_operation.values()], axis=0) for by_operation in judged])

    def whole(chosen: np.ndarray) -> float:
        wins, pairs = _wins([pair for i in chosen for pair in everywhere[i]])
        return wins / pairs

    def one_operation(chosen: np.ndarray) -> float:
        wins, pairs = alike[chosen].sum(axis=0)
        return wins / pairs

    rng = np.random.default_rng(0)
    samples = [rng.integers(len(judged), size=len(judged)) for _ in range(BOOTSTRAPS)]
    return {
        name: Figure(float(area(np.arange(len(judged)))), float(np.std([area(sample) for sample in samples])))
        for name, area in (("AUC", whole), ("AUC, one operation", one_operation))
    }


def measure(models: Path, problems: list[Problem], log: Callable[[str], None] = print) -> dict[str, Figure]:
    """Every figure by "model: name"."""
    figures: dict[str, Figure] = {}
    for policy in POLICIES:
        with Engine.from_pretrained(models / policy, block_size=BLOCK_SIZE) as engine:
            figures |= {f"{policy}: {name}": figure for name, figure in measure_policy(engine, problems).items()}
        log(f"{policy}: greedy {figures[f'{policy}: greedy']}, pass@1 {figures[f'{policy}: pass@1']}")
        for prm in PRMS:
            with Engine.from_pretrained(models / policy, models / prm, block_size=BLOCK_SIZE) as engine:
                found = measure_prm(engine, problems)
            figures |= {f"{prm} on {policy}: {name}": figure for name, figure in found.items()}
            log(f"{prm} on samples of {policy}: step {', '.join(f'{name} {figure}' for name, figure in found.items())}")
    return figures


def check(problems: int | None = None, log: Callable[[str], None] = print, models: Path = MODELS) -> dict[str, Figure]:
    """Measure anew on the first `problems` calibration problems (None: all) and compare with the figures that ship.

    Raises EngineError naming every figure whose 99.9 % interval does not hold what ships.
    """
    shipped = {name: Figure(**figure) for name, figure in json.loads((models / "figures.json").read_text())["figures"].items()}
    figures = measure(models, load_task("embedded", "calibration", problems), log)
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    strays = [
        f"{name} is {figure}, shipped as {shipped[name]}"
        for name, figure in figures.items()
        if abs(figure.value - shipped[name].value) > z * math.hypot(figure.error, shipped[name].error)
    ]
    if strays:
        raise EngineError(f"the embedded models are not what they were: {'; '.join(strays)}")
    log(f"all {len(figures)} figures agree with those that ship")
    return figures


def publish(models: Path, problems: list[Problem], log: Callable[[str], None] = print) -> None:
    """Measure and write figures.json and the models' README."""
    figures = measure(models, problems, log)
    record = {"problems": len(problems), "figures": {n: {"value": f.value, "error": f.error} for n, f in figures.items()}}
    (models / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    (models / "README.md").write_text(readme(figures, len(problems), models))


def ship_test(figures: dict[str, Figure]) -> list[tuple[str, float, bool]]:
    """The bets made before training: (what was asked, what was measured, holds)."""

    def value(name: str) -> float:
        return figures[name].value

    small, large = value("policy-s: greedy"), value("policy-l: greedy")
    bets = [
        ("policy-s greedy 20 to 40 %", small, 0.20 <= small <= 0.40),
        ("policy-l greedy 45 to 65 %", large, 0.45 <= large <= 0.65),
        ("their gap 15 to 30 points", large - small, 0.15 <= large - small <= 0.30),
    ]
    for policy, least in (("policy-s", 0.15), ("policy-l", 0.05)):
        room = value(f"{policy}: pass@{DRAWS}") - value(f"{policy}: majority@{DRAWS}")
        bets.append((f"{policy} pass@{DRAWS} minus majority@{DRAWS} at least {100 * least:.0f} points", room, room >= least))
    for policy in ("policy-s", "policy-m"):
        smallest = min(value(f"{policy}: bin {name}") for name in BINS)
        bets.append((f"{policy}: each pass@1 bin holds at least 15 % of problems", smallest, smallest >= 0.15))
    for policy in POLICIES:
        auc = value(f"prm-good on {policy}: AUC")
        bets.append((f"prm-good step AUC on {policy} at least 85 %", auc, auc >= 0.85))
    return bets


def readme(figures: dict[str, Figure], num_problems: int, models: Path) -> str:
    """The models' README; every number in it is generated."""
    names = ["greedy", "pass@1", f"majority@{DRAWS}", f"pass@{DRAWS}"]
    levels = ["", ", level 1", ", level 2", ", level 3"]
    lines = [
        "# The embedded models",
        "",
        "Made by `tts-engine embedded train` and measured by it; do not edit. The task: straight-line integer programs "
        "(`tts_engine/tasks/programs.py`), three levels of 2-3, 3-5 and 5-8 operations. Sizes, budgets and seeds: "
        "`tts_engine/embedded/recipe.py`. The PRMs are policy-m with two layers and a head on top. `prm-good`, in the form of "
        "Qwen2.5-Math-PRM, learned from labelled samples of policy-s and policy-m and an arithmetic drill; `prm-poor`, in that of "
        "Math-Shepherd, from level-1 solutions with one digit replaced: same size, same start, as many tokens.",
        "",
        f"Percent with 95 % intervals over {num_problems} calibration problems; draws at temperature 0.7.",
        "",
        "| policy | parameters | figure | all | level 1 | level 2 | level 3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        size = _num_parameters(models / policy)
        for name in names:
            cells = [str(figures[f"{policy}: {name}{level}"]) for level in levels]
            lines.append(row(policy, f"{size / 1e6:.2f} M", name, *cells))
    lines += ["", "Share of problems by the policy's own pass@1 (easy: 50 % and more, hard: below 10 %):", ""]
    lines += ["| policy | easy | medium | hard |", "|---|---|---|---|"]
    lines += [row(policy, *(str(figures[f"{policy}: bin {name}"]) for name in BINS)) for policy in POLICIES]
    lines += [
        "",
        f"Step AUC of the PRMs, {PRM_DRAWS} samples a problem: first errors against all good steps, and against right results "
        "of the same operation of the same problem only, where knowing which operations are hard does not help:",
        "",
        row("PRM", "parameters", "figure", *(f"on {policy}" for policy in POLICIES)),
        "|---|---|---|---|---|---|",
    ]
    for prm in PRMS:
        weight = f"{_num_parameters(models / prm) / 1e6:.2f} M"
        for name in ("AUC", "AUC, one operation"):
            lines.append(row(prm, weight, name, *(str(figures[f"{prm} on {policy}: {name}"]) for policy in POLICIES)))
    lines += ["", "What was asked of them before they were trained (chosen on calibration problems only):", ""]
    lines += ["| asked | measured | holds |", "|---|---|---|"]
    lines += [row(asked, f"{100 * value:.1f}", "yes" if holds else "no") for asked, value, holds in ship_test(figures)]
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _judged(result: SearchResult) -> dict[str, list[tuple[float, bool]]]:
    """(score, good) of the steps of each trajectory up to its first error, by what stands before the result."""
    program = result.problem.program
    assert program is not None, "only embedded problems can be judged step by step"
    judged: dict[str, list[tuple[float, bool]]] = {}
    for branch in result.branches:
        texts = [step.text.strip() for step in branch.steps]
        for text, score, good in zip(texts, branch.scores, step_labels(program, texts), strict=True):
            assert score is not None
            judged.setdefault(text.rpartition("=")[0], []).append((score, good))
            if not good:
                break
    return judged


def _wins(pairs: list[tuple[float, bool]]) -> tuple[float, int]:
    """Pairs in which a good step outscores a first error, ties counting half, and all pairs of the two kinds."""
    good = np.array([score for score, label in pairs if label])
    bad = np.sort([score for score, label in pairs if not label])
    below, not_above = (np.searchsorted(bad, good, side).sum() for side in ("left", "right"))
    return float(below + not_above) / 2, len(good) * len(bad)


def _num_parameters(directory: Path) -> int:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a mapping
