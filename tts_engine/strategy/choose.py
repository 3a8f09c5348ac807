"""theta*(policy, PRM, difficulty, budget): the method of the highest expected accuracy, as a file that says what it was fitted on.

A strategy is chosen on calibration problems only. Where its table holds a predictor, problems are told apart by predicted bins,
each predicted by the other problems, since predicted bins are what a search of a new problem will go by; else by known ones.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..ledger import Ledger
from ..search import METHODS, Method, MethodError, make_method, make_rules
from ..tasks.problems import TASKS
from . import StrategyError
from .difficulty import PAPER_EDGES, Bins, Draws, absolute_bins, quantile_bins, refuse_as_pilot, refuse_shared_draws
from .predictor import Predictor, cross_predict, features, fit_predictor
from .typed import parse

SCHEMA_VERSION = 1
SHIPPED = {"paper_table": Path(__file__).with_name("paper_table.json")}
PILOT_DRAWS = 4
GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint: equal files make it the same model, whatever it is called."""

    name: str
    parameters: int
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """The method for a bin and a budget; None stands for any. Of a fitted one, what it gave on the bin's calibration problems and
    how many candidates there were."""

    bin: str | None = None
    n: int | None = None
    method: dict[str, Any]
    accuracy: float | None = None
    gflop: float | None = None  # a problem, policy and PRM
    problems: int | None = None
    compared: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedOn:
    """The calibration problems and the runs over them."""

    task: str
    split: str
    problems: int
    problems_sha256: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    pilot: str
    pilot_seed: int
    pilot_draws: int  # that measured how hard a problem is


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The picks for a policy with a PRM; or, in a table that nobody fitted, for all policies of some size, name and task."""

    policy: Model | None = None
    prm: Model | None = None
    parameters: tuple[float | None, float | None] = (None, None)  # of the policy: from, and below
    policies: tuple[str, ...] = ()  # what its name begins with; none: any
    tasks: tuple[str, ...] = ()  # none: any
    bins: Bins
    pilot: dict[str, Any] | None = None  # the method whose draws the predictor takes
    predictor: Predictor | None = None
    picks: tuple[Pick, ...]
    fitted_on: FittedOn | None = None

    def __post_init__(self) -> None:
        if (self.pilot is None) != (self.predictor is None):
            raise StrategyError("a pilot and a predictor are of no use without each other")
        if self.predictor is not None:
            if len(self.predictor.thresholds) != len(self.bins.edges):
                raise StrategyError(f"{len(self.bins.names)} bins take {len(self.bins.edges)} thresholds of a predictor")
            drawn = method_of(self.pilot or {})
            if drawn.n != self.predictor.draws or drawn.name not in ("majority", "best_of_n"):
                raise StrategyError(f"a pilot is a majority or best_of_n of the predictor's {self.predictor.draws} draws")
            if self.predictor.uses_prm and not drawn.uses_prm:
                raise StrategyError("the predictor asks what a PRM thinks, and its pilot reads none")
        for pick in self.picks:
            if pick.bin not in (None, *self.bins.names):
                raise StrategyError(f"a pick is for the bin {pick.bin!r:.40}, and the bins are {', '.join(self.bins.names)}")
            method_of(pick.method, pick.n or pick.method.get("n", pick.method.get("width", 4)))
        for n in {pick.n for pick in self.picks}:
            for name in self.bins.names:
                self.pick(name, n)
        if not self.picks:
            raise StrategyError("a table without picks chooses nothing")

    def pick(self, bin: str, n: int | None) -> Pick:
        found = [pick for pick in self.picks if pick.bin in (None, bin) and pick.n in (None, n)]
        if not found:
            budgets = ", ".join(str(n) for n in dict.fromkeys(pick.n for pick in self.picks if pick.bin in (None, bin)))
            raise StrategyError(f"the strategy has no method for {bin} problems at n={n}; its budgets: {budgets or 'none'}")
        return found[0]

    def was_fitted_on(self, task: dict[str, Any]) -> bool:
        """Whether a run's problems, by its description, are those of the calibration."""
        told = self.fitted_on
        return told is not None and (told.split, told.problems_sha256) == (task["split"], task["problems_sha256"])

    def method(self, bin: str, n: int) -> Method:
        return method_of(self.pick(bin, n).method, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Tables, the first that fits counting, and where they come from."""

    schema_version: int
    name: str
    source: str
    tables: tuple[Table, ...]
    versions: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise StrategyError(f"schema_version is {self.schema_version}; this version reads {SCHEMA_VERSION}")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_strategy(name_or_path: str | Path) -> Strategy:
    """One that ships, by its name, or a file's. Raises StrategyError for a file that is none, naming what is wrong and where."""
    file = SHIPPED.get(str(name_or_path), Path(name_or_path))
    if not file.is_file():
        raise StrategyError(f"{name_or_path} is no strategy and no file; known: {', '.join(SHIPPED)}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StrategyError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    return parse(text, Strategy, str(name_or_path))


def method_of(settings: dict[str, Any], n: int | None = None) -> Method:
    """The method that a file describes, as runs do; at budget n where it leaves n open. Raises StrategyError."""
    own = dict(settings)
    name, rules = own.pop("name", None), own.pop("rules", None)
    if n is not None and name != "cot":
        own.setdefault("n", n)
    try:
        if isinstance(rules, dict):
            rules = make_rules(**rules)
        return make_method(name, **own | ({} if rules is None else {"rules": rules}))
    except (MethodError, TypeError) as error:
        raise StrategyError(f"{name} is no method as it is described: {error}") from error


# --- fitting --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evidence:
    """A run over calibration problems. outcomes: by id, whether it was solved and its FLOPs; draws: by id, of a pilot run."""

    name: str
    description: dict[str, Any]
    outcomes: dict[str, tuple[bool, int]] = field(default_factory=dict)
    draws: dict[str, Draws | None] = field(default_factory=dict)

    def check(self) -> None:
        """Raise StrategyError for a run without a problem, of another form, or in which the method was itself chosen."""
        if not self.outcomes and not self.draws:
            raise StrategyError(f"{self.name} holds no finished problem yet")
        try:
            task, models = self.description["task"], [self.description[part] for part in ("policy", "prm")]
            models = [model for model in models if model is not None]
            texts = [
                task["name"],
                task["split"],
                task["problems_sha256"],
                self.method["name"],
                *(model["name"] for model in models),
            ]
            counts = [self.description["seed"], *(model["parameters"] for model in models)]
            sound = self.description["policy"] is not None and all(isinstance(model["sha256"], dict) for model in models)
            sound = sound and all(isinstance(text, str) for text in texts) and all(isinstance(count, int) for count in counts)
            if sound and self.method["name"] not in METHODS:
                known = ", ".join(METHODS)
                raise StrategyError(f"{self.name} is a run of {self.method['name']!r:.40}, and a strategy chooses among {known}")
            whole = asdict(method_of(self.method)) if sound else {}  # type: ignore[call-overload]
            sound = sound and all(
                set(own) <= set(self.method["rules"]) if key == "rules" else key in self.method for key, own in whole.items()
            )
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise StrategyError(f"the run.json of {self.name} is not as a run of this version has it")

    @property
    def policy(self) -> dict[str, str]:
        return self.description["policy"]["sha256"]

    @property
    def prm(self) -> dict[str, str] | None:
        return self.description["prm"]["sha256"] if self.description["prm"] is not None else None

    @property
    def method(self) -> dict[str, Any]:
        return self.description["method"]

    @property
    def n(self) -> int:
        return self.method.get("n", 1)


def outcome_of(record: dict[str, Any]) -> tuple[bool, int]:
    """Whether a problem was solved, and the FLOPs that it asked for, policy and PRM. Raises StrategyError for one without a known
    answer."""
    if record["correct"] is None:
        raise StrategyError(f"problem {record['id']} has no known answer, so no method can be chosen by it")
    return record["correct"], Ledger.from_dict(record["ledger"]).asked_flops if record["ledger"] else 0


def fit(
    runs: Sequence[Evidence], pilots: Sequence[Evidence], *, name: str, versions: dict[str, str | None], kind: str = "absolute",
    edges: Sequence[float] = PAPER_EDGES, quantiles: int = 5, draws: int = PILOT_DRAWS, budgets: Sequence[int] = (),
) -> Strategy:  # fmt: skip
    """A table for each policy and PRM among the runs; a run without a PRM is a candidate beside each.

    draws: of a pilot that the predictor sees, and whose cost each search will bear; how hard a problem is is measured by the
    pilot run's other draws. 0: no predictor, a strategy for problems whose difficulty is known. budgets: those to choose for, by
    default every n among the runs; whatever costs no larger n is a candidate.
    Raises StrategyError for runs on test problems, over other problems than each other, or that share draws with a pilot run.
    """
    for run in (*runs, *pilots):
        _refuse_unless_calibration(run)
    for pilot in pilots:
        refuse_as_pilot(pilot.description, pilot.name)
        for run in runs:
            if run.method["name"] != "cot":  # greedy: it draws nothing
                refuse_shared_draws(pilot.description, pilot.name, run.description, run.name)
    tables = []
    for policy in _different(run.policy for run in runs):
        own = [run for run in runs if run.policy == policy]
        for prm in _different(run.prm for run in own if run.prm is not None) or [None]:
            candidates = [run for run in own if run.prm in (None, prm)]
            pilot = _pilot_for(pilots, own[0], prm)
            tables.append(_fit_table(candidates, pilot, prm, kind, edges, quantiles, draws, budgets))
    source = "fitted by tts-engine fit"
    return Strategy(schema_version=SCHEMA_VERSION, name=name, source=source, tables=tuple(tables), versions=versions)


def _fit_table(
    candidates: list[Evidence], pilot: Evidence, prm: dict[str, str] | None, kind: str, edges: Sequence[float], quantiles: int,
    draws: int, budgets: Sequence[int],
) -> Table:  # fmt: skip
    first = candidates[0]
    for run in candidates:
        if run.outcomes.keys() != first.outcomes.keys():
            raise StrategyError(f"{first.name} and {run.name} hold different problems: methods are compared on the same ones only")
    if draws >= pilot.n:
        raise StrategyError(f"{pilot.name} has {pilot.n} draws a problem: with {draws} for the predictor none are left to measure "
                            "how hard it is")  # fmt: skip
    known = {id: found for id in sorted(first.outcomes) if (found := pilot.draws.get(id)) is not None}
    if not known:
        raise StrategyError(f"{pilot.name} and {first.name} have no problem in common")
    rates = {id: found.only(draws).pass_rate for id, found in known.items()}
    bins = absolute_bins(edges) if kind == "absolute" else quantile_bins(list(rates.values()), quantiles)
    bin_of = {id: bins.of(rate) for id, rate in rates.items()}
    predictor, pilot_method = None, None
    if draws:
        seen = [found.only(0, draws) for found in known.values()]
        if pilot.prm != prm:
            seen = [Draws(one.correct, one.groups, None) for one in seen]  # another PRM's opinion is not to be had later
        seen_features = [features(one) for one in seen]
        predictor = fit_predictor(seen_features, list(bin_of.values()), bins.names, draws)
        reads = {"name": "best_of_n" if predictor.uses_prm else "majority"}
        pilot_method = {key: pilot.method[key] for key in ("rules", "max_steps")} | reads | {"n": draws}
        bin_of = dict(zip(known, cross_predict(seen_features, list(bin_of.values()), bins.names, draws), strict=True))
    asked = sorted(set(budgets) or {run.n for run in candidates})
    picks = [_best(candidates, bin_of, bin, n) for n in asked for bin in bins.names]
    task = first.description["task"]
    return Table(
        policy=_model(first.description["policy"]),
        prm=next((_model(run.description["prm"]) for run in candidates if run.prm is not None), None),
        bins=bins,
        pilot=pilot_method,
        predictor=predictor,
        picks=tuple(picks),
        fitted_on=FittedOn(
            task=task["name"],
            split=task["split"],
            problems=len(known),
            problems_sha256=task["problems_sha256"],
            runs=tuple(run.name for run in candidates),
            seeds=tuple(dict.fromkeys(run.description["seed"] for run in candidates)),
            pilot=pilot.name,
            pilot_seed=pilot.description["seed"],
            pilot_draws=pilot.n - draws,
        ),
    )


def _best(candidates: Sequence[Evidence], bin_of: dict[str, str], bin: str, n: int) -> Pick:
    """The argmax over runs of at most n; of equals the cheaper. A bin that no problem fell into gets what is best for all."""
    within = [run for run in candidates if run.n <= n]
    if not within:
        raise StrategyError(f"no run has n={n} or less: the smallest is n={min(run.n for run in candidates)}")
    ids = [id for id, own in bin_of.items() if own == bin] or list(bin_of)

    def solved(run: Evidence) -> int:
        return sum(run.outcomes[id][0] for id in ids)

    def flops(run: Evidence) -> int:
        return sum(run.outcomes[id][1] for id in ids)

    best = max(within, key=lambda run: (solved(run), -flops(run)))
    return Pick(bin=bin, n=n, method=best.method, accuracy=solved(best) / len(ids), gflop=flops(best) / GIGA / len(ids),
                problems=sum(own == bin for own in bin_of.values()), compared=len(within))  # fmt: skip


def _refuse_unless_calibration(run: Evidence) -> None:
    task = run.description["task"]
    if task["split"] == "test" and task["name"] in TASKS:
        raise StrategyError(f"{run.name} is a run on the test split of {task['name']}: a strategy is chosen on calibration "
                            "problems only, or its gains on the test split would be luck")  # fmt: skip


def _pilot_for(pilots: Sequence[Evidence], run: Evidence, prm: dict[str, str] | None) -> Evidence:
    """A pilot run of the same policy and problems, the PRM's own if there is one."""
    task = ("name", "split", "problems_sha256")
    alike = [pilot for pilot in pilots if pilot.policy == run.policy
             and all(pilot.description["task"][key] == run.description["task"][key] for key in task)]  # fmt: skip
    if not alike:
        raise StrategyError(f"no pilot run is of the policy and problems of {run.name}: how hard these are is not known")
    return min(alike, key=lambda pilot: (pilot.prm != prm, pilot.prm is not None))


def _model(description: dict[str, Any]) -> Model:
    return Model(name=description["name"], parameters=description["parameters"], sha256=description["sha256"])


def _different(values: Any) -> list[Any]:
    """Each value once, in order; they may be unhashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
