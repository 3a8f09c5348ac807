"""Runs as a report compares them: the same problems, who searched them how, what was solved and what it cost. No files here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RunError
from ..ledger import Ledger
from .intervals import bootstrap, wilson
from .table import GIGA, Cell, cell_of

METHOD_ORDER = ("cot", "majority", "best_of_n", "beam", "dvts", "rebase", "adaptive", "auto")
# Engine settings that change what is drawn or scored; others change how fast, so runs that differ in them are the same arm.
TELLING = ("load", "dtype", "max_step_tokens", "max_tokens", "top_k", "top_p", "min_p", "system", "steps", "prm_family")
MOST_BINS = 8  # of a grouping; one of more is a list of names and no axis
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class RunRead:
    """A run as its directory has it; the records without their trees."""

    name: str
    description: dict[str, Any]
    records: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Difficulty:
    """A policy's problems by bin, as a run with other draws tells it. policy: the sha256 of its files; bins: easiest first."""

    policy: dict[str, str]
    bins: tuple[str, ...]
    of: dict[str, str]  # by problem


@dataclass(frozen=True, slots=True)
class Grouping:
    """One way to tell problems apart by how hard they are. of: by policy, since what is hard for one is easy for another."""

    name: str
    bins: tuple[str, ...]
    of: dict[str, dict[str, str]]

    def places(self, policy: str, ids: Sequence[str], bin: str) -> list[int]:
        """Where the problems of a bin stand among `ids`."""
        own = self.of.get(policy, {})
        return [place for place, id in enumerate(ids) if own.get(id) == bin]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One policy with one PRM (or none), method and budget, over all problems of the report. Of several seeds each problem brings
    its mean, as the draws of one problem are not independent."""

    policy: str
    prm: str | None
    method: str  # with the settings in which runs of one method differ
    n: int
    parameters: int  # of the policy
    made: str  # "searched", "replayed" or "rescored"
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]  # one a seed
    solved: tuple[float, ...]  # by problem, the share of seeds
    flops: tuple[float, ...]  # asked for by problem, policy and PRM, the mean of seeds
    ledger: Ledger  # of all problems and seeds
    failed: int

    @property
    def label(self) -> str:
        return self.method if self.method == "cot" else f"{self.method} n={self.n}"

    @property
    def ids(self) -> tuple[str, ...]:
        return self.cells[0].ids

    @property
    def accuracy(self) -> float:
        return sum(self.solved) / len(self.solved)

    @property
    def interval(self) -> tuple[float, float]:
        return share_interval(self.solved, once=len(self.cells) == 1)

    @property
    def searches(self) -> int:
        return len(self.ids) * len(self.cells)

    @property
    def gflop(self) -> float:
        """Asked for a problem, policy and PRM: what replayed and searched runs are compared by."""
        return self.ledger.asked_flops / GIGA / self.searches


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A run that an arm is made of."""

    name: str
    arm: Arm
    seed: int
    problems: int
    failed: int
    at: str
    version: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A problem's text and gold answer, and what the arms answered."""

    id: str
    problem: str
    gold: str | None
    solved: int  # by how many runs
    answers: tuple[tuple[str | None, bool, int], ...]  # answer, whether it is right, of how many runs; the most frequent first
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What a report is about. arms: by size of the policy, PRM, method, n."""

    task: str
    split: str
    ids: tuple[str, ...]
    arms: tuple[Arm, ...]
    groupings: tuple[Grouping, ...]
    sources: tuple[Source, ...]
    problems: tuple[Asked, ...]  # those that tell the runs apart, and those that failed
    notes: tuple[str, ...] = field(default=())

    @property
    def policies(self) -> list[str]:
        """The smallest first."""
        return list(dict.fromkeys(arm.policy for arm in self.arms))

    @property
    def prms(self) -> list[str | None]:
        """Those that took part; None alone where none did."""
        return list(dict.fromkeys(arm.prm for arm in self.arms if arm.prm is not None)) or [None]

    @property
    def methods(self) -> list[str]:
        return sorted({arm.method for arm in self.arms}, key=method_rank)

    def of(self, policy: str, prm: str | None) -> list[Arm]:
        """What a policy does with this PRM or with none."""
        return [arm for arm in self.arms if arm.policy == policy and arm.prm in (None, prm)]

    def has_prm(self, policy: str) -> bool:
        return any(arm.policy == policy and arm.prm is not None for arm in self.arms)

    def find(self, policy: str, prm: str | None, method: str, n: int | None = None) -> Arm | None:
        found = [arm for arm in self.of(policy, prm) if arm.method == method and n in (None, arm.n)]
        return found[-1] if found else None


def share_interval(solved: Sequence[float], *, once: bool) -> tuple[float, float]:
    """Wilson's where each problem counts once, else by resampling problems."""
    if once or not solved:
        return wilson(round(sum(solved)), len(solved))
    low, high = bootstrap(solved).interval()
    return max(0.0, low), min(1.0, high)


def method_rank(method: str) -> tuple[int, str]:
    name = method.split(" ")[0].rstrip(",")
    return METHOD_ORDER.index(name) if name in METHOD_ORDER else len(METHOD_ORDER), method


def study(runs: Sequence[RunRead], texts: Mapping[str, str], difficulty: Sequence[Difficulty] = (), shown: int = 6) -> Study:
    """Runs of one task, compared over the problems that all of them hold.

    texts: of problems by id. shown: how many problems that tell runs apart are to be quoted. Raises RunError, one sentence, for
    runs of different tasks, without a problem in common, of problems whose answer is not known, and for two runs that are the same
    arm with the same seed.
    """
    notes = [f"{run.name} holds no finished problem yet and is left out" for run in runs if not run.records]
    runs = [run for run in runs if run.records]
    if not runs:
        raise RunError("no run holds a finished problem yet")
    told = [_told(run) for run in runs]
    for run, facts in zip(runs, told, strict=True):
        if facts.problems != told[0].problems:
            first, other = (f"{one.task}, {one.split}" for one in (told[0], facts))
            apart = "the same, but of other problems" if first == other else other
            raise RunError(f"{runs[0].name} is a run of {first} and {run.name} of {apart}: only runs of the same problems can be "
                           "compared")  # fmt: skip
    ids = set.intersection(*({record["id"] for record in run.records} for run in runs))
    if not ids:
        raise RunError(f"no problem is in all of the {len(runs)} runs: there is nothing to compare them by")
    fewest, most = (pick(runs, key=lambda run: len(run.records)) for pick in (min, max))
    if len(most.records) > len(ids):
        notes.append(f"{len(ids)} problems are in all runs and compared; {fewest.name} holds {len(fewest.records)}, "
                     f"{most.name} {len(most.records)}")  # fmt: skip
    policies, prms = (_names([getattr(facts, part) for facts in told]) for part in ("policy", "prm"))
    variants = _variants(told)
    arms: dict[tuple[Any, ...], list[tuple[RunRead, _Told]]] = {}
    for run, facts, variant in zip(runs, told, variants, strict=True):
        key = (_key(facts.policy), _key(facts.prm), variant, facts.n)
        for earlier, known in arms.setdefault(key, []):
            if known.seed == facts.seed:
                raise RunError(f"{earlier.name} and {run.name} are both {variant} n={facts.n} of {policies[key[0]]} with seed "
                               f"{facts.seed}: report one of them")  # fmt: skip
        arms[key].append((run, facts))
    made = [_arm(group, key, ids, policies, prms) for key, group in arms.items()]
    sources = [_source(run, facts, arm) for arm, group in zip(made, arms.values(), strict=True) for run, facts in group]
    made.sort(key=_order)
    sources.sort(key=lambda one: (*_order(one.arm), one.seed))
    by_level, said = _levels(runs, ids, [arm.policy for arm in made])
    groupings = [*by_level, *_by_difficulty(difficulty, policies, ids)]
    failed = sum(arm.failed for arm in made)
    if failed:
        notes.append(f"searches that failed and count as not solved, at no cost: {failed}")
    return Study(
        task=told[0].task,
        split=told[0].split,
        ids=tuple(sorted(ids)),
        arms=tuple(made),
        groupings=tuple(groupings),
        sources=tuple(sources),
        problems=_telling(runs, ids, texts, shown),
        notes=(*notes, *said),
    )


def _order(arm: Arm) -> tuple[Any, ...]:
    return arm.parameters, arm.policy, arm.prm or "", method_rank(arm.method), arm.n


@dataclass(frozen=True, slots=True)
class _Told:
    """What run.json says, as far as it is needed."""

    task: str
    split: str
    problems: tuple[str, str, str]
    policy: dict[str, Any]
    prm: dict[str, Any] | None
    method: str
    n: int
    seed: int
    made: str
    settings: dict[str, str]


def _told(run: RunRead) -> _Told:
    """Raises RunError where run.json is not as a run of this version has it."""
    try:
        task, method, engine = (run.description[part] for part in ("task", "method", "engine"))
        policy, prm = (run.description[part] for part in ("policy", "prm"))
        made = run.description["derived"]["made"] if "derived" in run.description else "searched"  # by a sweep, from another cell
        made = "rescored" if "rescores" in run.description else made
        settings = _flat({key: value for key, value in method.items() if key not in ("name", "n", "known")})
        settings |= _flat({key: engine[key] for key in TELLING if engine.get(key) is not None})
        told = _Told(task["name"], task["split"], (task["name"], task["split"], task["problems_sha256"]), policy, prm,
                     method["name"], method.get("n", 1), run.description["seed"], made, settings)  # fmt: skip
        texts = [*told.problems, told.method, told.made, *(model["name"] for model in (policy, prm) if model is not None)]
        sound = all(isinstance(text, str) for text in texts) and all(
            isinstance(count, int) and 0 <= count < 1 << 63 for count in (told.n, told.seed, policy["parameters"])
        )
        sound = sound and all(isinstance(model["sha256"], dict) for model in (policy, prm) if model is not None)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise RunError(f"the run.json of {run.name} is not as a run of this version has it")
    for record in run.records:
        if record["correct"] is None:
            raise RunError(f"problem {record['id']} of {run.name} has no known answer, so no run can be told right or wrong by it")
    return told


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _key(model: dict[str, Any] | None) -> str | None:
    return None if model is None else repr(sorted(model["sha256"].items()))


def _names(models: Sequence[dict[str, Any] | None]) -> dict[str | None, str | None]:
    """What each model is called, by its files; two of one name get the first digits of theirs behind it."""
    found: dict[str | None, dict[str, Any]] = {_key(model): model for model in models if model is not None}
    names = [model["name"] for model in found.values()]
    told: dict[str | None, str | None] = {None: None}
    for key, model in found.items():
        digits = "".join(str(digest)[:4] for digest in model["sha256"].values())[-8:]
        told[key] = model["name"] if names.count(model["name"]) == 1 else f"{model['name']} ({digits})"
    return told


def _variants(told: Sequence[_Told]) -> list[str]:
    """Each run's method, with what tells it from other runs of that method, policy and PRM."""
    names = []
    for facts in told:
        alike = [other for other in told if (other.method, _key(other.policy), _key(other.prm)) == (
            facts.method, _key(facts.policy), _key(facts.prm))]  # fmt: skip
        differ = [key for key in dict.fromkeys(key for other in alike for key in other.settings)
                  if len({other.settings.get(key) for other in alike}) > 1]  # fmt: skip
        told_by = [f"{key.split('.')[-1]}={facts.settings[key]:.24}" for key in differ if key in facts.settings]
        if facts.made == "rescored" and facts.method != "best_of_n":  # whose tree no PRM has a part in
            told_by.append("rescored")
        names.append(facts.method + (f" ({', '.join(told_by)})" if told_by else ""))
    return names


def _arm(
    group: Sequence[tuple[RunRead, _Told]], key: tuple[Any, ...], ids: set[str],
    policies: Mapping[str | None, str | None], prms: Mapping[str | None, str | None],
) -> Arm:  # fmt: skip
    facts = group[0][1]
    policy = policies[key[0]]
    assert policy is not None, "every run has a policy"
    records = [[record for record in run.records if record["id"] in ids] for run, _ in group]
    costs: dict[str, float] = dict.fromkeys(sorted(ids), 0.0)
    for record in (record for part in records for record in part):
        if record["ledger"]:
            costs[record["id"]] += Ledger.from_dict(record["ledger"]).asked_flops / len(group)
    cells = tuple(cell_of(part, policy, facts.prm is not None) for part in records)
    total = Ledger.empty()
    for cell in cells:
        total.add(cell.ledger)
    return Arm(
        policy=policy,
        prm=prms[key[1]],
        method=key[2],
        n=facts.n,
        parameters=facts.policy["parameters"],
        made=facts.made,
        seeds=tuple(known.seed for _, known in group),
        cells=cells,
        solved=tuple(sum(outcomes) / len(cells) for outcomes in zip(*(cell.correct for cell in cells), strict=True)),
        flops=tuple(costs.values()),
        ledger=total,
        failed=sum(record["error"] is not None for part in records for record in part),
    )


def _source(run: RunRead, facts: _Told, arm: Arm) -> Source:
    made, versions = (run.description.get(part) or {} for part in ("made", "versions"))
    return Source(
        name=run.name,
        arm=arm,
        seed=facts.seed,
        problems=len(run.records),
        failed=sum(record["error"] is not None for record in run.records),
        at=str(made.get("at") or UNKNOWN),
        version=str(versions.get("tts-engine") or UNKNOWN),
        dtype=str(run.description["engine"].get("dtype") or UNKNOWN),
    )


def _levels(runs: Sequence[RunRead], ids: set[str], policies: Sequence[str]) -> tuple[list[Grouping], list[str]]:
    """Problems by the level that their task gives them, where it gives any; and what to say where it gives too many."""
    of = {record["id"]: _level(record["level"]) for record in runs[0].records if record["id"] in ids}
    levels = sorted(set(of.values()) - {UNKNOWN}, key=lambda level: (not level.isdecimal(), level.zfill(20)))
    if not levels or len(levels) > MOST_BINS:
        return [], [f"problems have {len(levels)} levels, too many to tell apart"] if levels else []
    if UNKNOWN in of.values():
        levels.append(UNKNOWN)
    return [Grouping("level", tuple(levels), {policy: of for policy in policies})], []


def _level(level: Any) -> str:
    known = isinstance(level, int | str) and not isinstance(level, bool)
    return f"{level:.40}" if known and isinstance(level, str) else str(level) if known and abs(level) < 1 << 63 else UNKNOWN


def _by_difficulty(
    found: Sequence[Difficulty], policies: Mapping[str | None, str | None], ids: set[str]
) -> list[Grouping]:  # fmt: skip
    """Problems by their policy's share of right draws; a policy nobody measured has no bins."""
    of = {policies[key]: {id: bin for id, bin in one.of.items() if id in ids}
          for one in found if (key := repr(sorted(one.policy.items()))) in policies}  # fmt: skip
    return [Grouping("pass@1", found[0].bins, {name: bins for name, bins in of.items() if name is not None})] if of else []


def _telling(runs: Sequence[RunRead], ids: set[str], texts: Mapping[str, str], shown: int) -> tuple[Asked, ...]:
    """The problems on which runs differ most, those nearest to half of them; then those that failed somewhere."""
    by_id: dict[str, list[dict[str, Any]]] = {id: [] for id in sorted(ids)}
    for run in runs:
        for record in run.records:
            if record["id"] in by_id:
                by_id[record["id"]].append(record)
    solved = {id: sum(bool(record["correct"]) for record in own) for id, own in by_id.items()}
    apart = [id for id in by_id if 0 < solved[id] < len(runs)]
    apart.sort(key=lambda id: abs(2 * solved[id] - len(runs)))
    failed = [id for id, own in by_id.items() if any(record["error"] is not None for record in own)]
    asked = []
    for id in dict.fromkeys([*apart[:shown], *failed[:shown]]):
        answers: dict[tuple[str | None, bool], int] = {}
        for record in by_id[id]:
            if record["error"] is None:
                answer = record["answer"] if record["answer"] is None else str(record["answer"])
                key = (answer, bool(record["correct"]))
                answers[key] = answers.get(key, 0) + 1
        ranked = sorted(((*key, count) for key, count in answers.items()), key=lambda one: -one[2])
        errors = dict.fromkeys(str(record["error"]) for record in by_id[id] if record["error"] is not None)
        gold = by_id[id][0]["gold"]
        asked.append(Asked(id=id, problem=texts.get(id, ""), gold=None if gold is None else str(gold), solved=solved[id],
                           answers=tuple(ranked), errors=tuple(errors)))  # fmt: skip
    return tuple(asked)
