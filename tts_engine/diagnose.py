"""A PRM diagnosed by what it says of steps: of a run's, by the scores that the run holds or by another PRM that reads its trees; or
of solutions whose first error is marked, in the form of ProcessBench.

To read a run's own scores takes no model and no torch.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .branch import Branch, child_identity, root_branch
from .errors import EngineError, RunError, TaskError
from .report.diagnostics import SCHEMA_VERSION, THRESHOLD, Diagnostics, Subject
from .report.prm_quality import Judged, Solution, Step, diagnose
from .runs import read_description
from .score import Stored, read_trees
from .strategy import StrategyError
from .strategy.difficulty import PILOTS
from .strategy.typed import build, parse
from .tasks.grader import Grader
from .tasks.problems import load_task
from .tasks.programs import SPLIT_SIZES, Program, step_labels

if TYPE_CHECKING:  # what takes torch
    from .config import EngineConfig
    from .prm.scorer import Scorer

NO_ERROR = -1  # ProcessBench's label of a solution without error

Labels = Callable[[list[str]], list[bool]]  # a solution's step texts -> of each whether the right answer can still be reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A solution in the form of ProcessBench. label: the index of its first wrong step, -1 for none. What other keys a file has is
    not read."""

    id: str
    problem: str
    steps: tuple[str, ...]
    label: int
    final_answer_correct: bool | None = None

    def __post_init__(self) -> None:
        if not self.problem.strip():
            raise StrategyError("its problem is blank")
        if not self.steps:
            raise StrategyError("it has no steps")
        if not NO_ERROR <= self.label < len(self.steps):
            raise StrategyError(f"its label {self.label} is none of its {len(self.steps)} steps, counted from 0, nor {NO_ERROR}")
        try:
            "".join([self.problem, *self.steps]).encode()
        except UnicodeEncodeError:
            raise StrategyError("its text holds half a surrogate pair: no tokenizer can read it") from None


def diagnose_by(prm: str | Path, source: Path, config: "EngineConfig", *, threshold: float = THRESHOLD) -> Diagnostics:
    """What a PRM (a directory or a hub id), loaded now, says of a run's directory or of a file in the form of ProcessBench.

    Raises RunError or TaskError for a source that is neither, before the PRM is loaded; ModelError for a PRM that is none.
    """
    from .models.weights import resolve_checkpoint
    from .rescore import load_scorer

    source, is_run = Path(source), Path(source).is_dir()
    samples = [] if is_run else read_processbench(source)
    for _ in read_trees(source) if is_run else ():
        pass
    scorer, name = load_scorer(resolve_checkpoint(prm, config.load), config), Path(prm).resolve().name
    if is_run:
        return diagnose_run(source, scorer=scorer, prm=name, threshold=threshold)
    return diagnose_samples(samples, source=source.name, scorer=scorer, prm=name, threshold=threshold)


# --- runs -----------------------------------------------------------------------------------------------------------------


def diagnose_run(
    directory: Path, *, scorer: "Scorer | None" = None, prm: str | None = None, threshold: float = THRESHOLD
) -> Diagnostics:
    """The PRM that scored a run; with `scorer` that one, called `prm`, which reads the run's trees now. The run is not changed.

    Steps of the embedded task are known to be good or not, those of others are not. Raises RunError for what is no run, and for one
    without scores; EngineError where `scorer` can read none of its problems.
    """
    description = read_description(directory)
    known = _programs(description)
    of_id: dict[str, Judged] = {}
    methods: dict[str, str | None] = {}  # as told -> why its solutions are no independent draws
    failed, labelled, refused = 0, False, None
    with Grader() as grader:
        for stored in read_trees(directory):
            if stored.record["error"] is not None:
                failed += 1
                continue
            try:
                steps = _scored(stored, scorer)
            except EngineError as error:
                failed, refused = failed + 1, refused or error
                continue
            program = known.get(stored.record["problem"])
            labels = None if program is None else _labels_of(program)
            labelled = labelled or labels is not None
            of_id[stored.record["id"]] = _judge(stored, steps, labels, grader)
            methods[f"{stored.method.name} n={stored.method.n}"] = _no_draws(stored)
    judged = [of_id[id] for id in sorted(of_id)]  # whatever order they finished in
    if not judged and refused is not None:
        raise refused
    if not judged:
        raise RunError(f"{directory} holds no finished problem")
    if not any(problem.steps for problem in judged):
        raise RunError(f"{directory} holds no scores, because its method read no PRM: give --prm, which then reads it")
    task = description.get("task") or {}
    subject = Subject(
        source=Path(directory).resolve().name,
        form="run",
        policy=_name(description.get("policy")),
        prm=prm or _name(description.get("prm")) or "unknown",
        task=", ".join(str(task[key]) for key in ("name", "split") if key in task) or None,
        method=", ".join(methods),
        length_unit="policy tokens",
        labels="the program that each problem is" if labelled else None,
        failed=failed,
    )
    no_choice = next(iter(methods.values())) if len(methods) == 1 else "the method differs from problem to problem"
    return diagnose(judged, subject, threshold=threshold, no_choice=no_choice)


def _scored(stored: Stored, scorer: "Scorer | None") -> dict[int, Branch]:
    """The steps of a tree by identity, as the scorer scores them or as they are."""
    if scorer is None:
        return {node.identity: node for node in stored.nodes}
    from .rescore import read_tree

    return read_tree(stored, scorer)[0]


def _judge(stored: Stored, steps: Mapping[int, Branch], labels: Labels | None, grader: Grader) -> Judged:
    good = {} if labels is None else _goodness(stored.nodes, labels)
    gold = stored.record["gold"]
    verdicts = {answer: None if gold is None else grader.equal(gold, answer)
                for answer in dict.fromkeys(voted["answer"] for voted in stored.record["branches"])}  # fmt: skip
    ends = {branch.identity: voted for branch, voted in zip(stored.branches, stored.record["branches"], strict=True)}
    solutions = []
    for identity, voted in ends.items():
        path = steps[identity].steps
        scores = tuple(step.score for step in path if step.score is not None)
        if len(scores) == len(path):
            flaws = [place for place, step in enumerate(path) if not good.get(step.identity, True)]
            first = (flaws or [NO_ERROR])[0] if labels is not None else None
            solutions.append(Solution(scores, first, voted["group"] or None, verdicts[voted["answer"]]))
    return Judged(
        tuple(
            _step(steps[node.identity], len(node.tokens), good) for node in stored.nodes if steps[node.identity].score is not None
        ),
        tuple(solutions),
    )


def _goodness(nodes: Sequence[Branch], labels: Labels) -> dict[int, bool]:
    """By identity, of every step of a tree, whether the right answer can still be reached."""
    parents = {node.parent.identity for node in nodes if node.parent is not None}
    good: dict[int, bool] = {}
    for leaf in nodes:
        if leaf.identity not in parents:
            path = leaf.steps
            good |= zip((step.identity for step in path), labels([step.text.strip() for step in path]), strict=True)
    return good


def _step(step: Branch, length: int, good: Mapping[int, bool]) -> Step:
    """good: by identity, also of the steps above; empty where nobody knows."""
    assert step.score is not None and step.parent is not None
    behind = not good.get(step.parent.identity, True)
    return Step(step.score, length, None if behind else good.get(step.identity), behind)


def _programs(description: Mapping[str, Any]) -> dict[str, Program]:
    """The programs of a run of the embedded task by their texts; none of any other."""
    task = description.get("task")
    if not isinstance(task, dict) or task.get("name") != "embedded" or task.get("split") not in SPLIT_SIZES:
        return {}
    return {p.problem: p.program for p in load_task("embedded", task["split"]) if p.program is not None}


def _labels_of(program: Program) -> Labels:
    return lambda texts: step_labels(program, texts)


def _no_draws(stored: Stored) -> str | None:
    """Why a search's solutions are no independent draws; None where they are."""
    if stored.method.name not in PILOTS:
        return f"solutions of {stored.method.name} are no independent draws: diagnose a run of {' or '.join(PILOTS)}"
    return None if stored.method.rules.temperature > 0 else "at temperature 0 all draws are alike"


def _name(model: Any) -> str | None:
    return model.get("name") if isinstance(model, dict) else None


# --- files in the form of ProcessBench ------------------------------------------------------------------------------------


def diagnose_samples(
    samples: Iterable[Sample], *, source: str, scorer: "Scorer", prm: str, threshold: float = THRESHOLD
) -> Diagnostics:
    """The PRM called `prm` on solutions from `source`. Those of one problem, by its text, count as one wherever problems count.

    Raises EngineError where the PRM can read none of them.
    """
    of_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        of_problem.setdefault(sample.problem, []).append(sample)
    judged, failed, refused = [], 0, None
    for problem, samples in of_problem.items():
        try:
            judged.append(_read_samples(problem, samples, scorer))
        except EngineError as error:
            failed, refused = failed + 1, refused or error
    if not judged and refused is not None:
        raise refused
    subject = Subject(source=source, form="processbench", policy=None, prm=prm, task=None, method=None,
                      length_unit="PRM tokens", labels="the file", failed=failed)  # fmt: skip
    return diagnose(judged, subject, threshold=threshold, no_choice="a file's solutions are no independent draws of one policy")


def _read_samples(problem: str, samples: Sequence[Sample], scorer: "Scorer") -> Judged:
    from .rescore import read_steps

    paths: list[list[Branch]] = []
    for draw, sample in enumerate(samples):
        path, above = [], root_branch((), problem)
        for text in sample.steps:
            above = Branch(parent=above, tokens=(), text=text, identity=child_identity(above.identity, (draw,), 0))
            path.append(above)
        paths.append(path)
    read, _ = read_steps(problem, [step for path in paths for step in path], scorer)
    steps, solutions = [], []
    for path, sample in zip(paths, samples, strict=True):
        scores = []
        for place, step in enumerate(path):
            score, behind = read[step.identity].score, NO_ERROR < sample.label < place
            assert score is not None
            scores.append(score)
            length = len(scorer.spec.step(step.text, place == 0))
            steps.append(Step(score, length, None if behind else place != sample.label, behind))
        solutions.append(Solution(tuple(scores), sample.label, None, sample.final_answer_correct))
    return Judged(tuple(steps), tuple(solutions))


def read_processbench(path: Path) -> list[Sample]:
    """The samples of a JSON list, or of a file with one JSON object a line; all of them are checked.

    Raises TaskError, one sentence that names the place, for a file that cannot be read, is empty or holds what is no sample.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    if text.lstrip().startswith("["):
        whole = _json(text, str(path))
        entries: Iterable[tuple[str, Any]] = ((f"{path} entry {number}", entry) for number, entry in enumerate(whole, start=1))
    else:
        lines = ((f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        entries = ((place, _json(line, place)) for place, line in lines)
    samples: list[Sample] = []
    places: dict[str, str] = {}
    for place, entry in entries:
        known = {key: entry[key] for key in Sample.__dataclass_fields__ if key in entry} if isinstance(entry, dict) else entry
        try:
            sample = build(known, Sample, place)
        except StrategyError as error:
            raise TaskError(str(error)) from None
        if places.setdefault(sample.id, place) != place:
            raise TaskError(f"{place}: its id {sample.id!r:.80} is that of {places[sample.id].removeprefix(f'{path} ')}")
        samples.append(sample)
    if not samples:
        raise TaskError(f"{path} holds no solutions")
    return samples


def _json(text: str, place: str) -> Any:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{place} is not JSON: {error}") from None


# --- the record on the disk -----------------------------------------------------------------------------------------------


def save_diagnostics(diagnostics: Diagnostics, file: Path) -> None:
    Path(file).write_text(json.dumps(asdict(diagnostics), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_diagnostics(file: Path) -> Diagnostics:
    """A diagnostics.json. Raises RunError for a file that is none, naming what is wrong and where."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        diagnostics = parse(text, Diagnostics, str(file))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    except StrategyError as error:
        raise RunError(str(error)) from None
    if diagnostics.schema_version != SCHEMA_VERSION:
        raise RunError(f"{file} was written with schema_version {diagnostics.schema_version}; this version reads {SCHEMA_VERSION}")
    return diagnostics
