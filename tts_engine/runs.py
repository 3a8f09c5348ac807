"""A run on disk: what was asked (run.json) and what came of it (problems.jsonl, one line a finished problem, only ever appended).

A line is written whole and flushed to the disk before the next problem counts, so a run killed at any moment goes on where it
stopped: at most its last line is torn, and opening the run cuts that off.
"""

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .errors import EngineError, MissingExtra, RunError
from .ledger import Ledger
from .report.tree import in_order
from .report.versions import package_version
from .results import Chooser, SearchResult
from .search import Adaptive, Method
from .tasks.grader import Grader
from .tasks.problems import Problem

if TYPE_CHECKING:  # what takes torch; to read a run takes none
    from .config import EngineConfig
    from .engine import Engine

SCHEMA_VERSION = 1
RUN, PROBLEMS = "run.json", "problems.jsonl"
NOT_COMPARED = ("made", "policy.name", "prm.name", "rescores.name")  # when and where, and what a model's directory is called
MOST_DIFFERENCES = 4
FIELDS = ("schema_version", "id", "problem", "gold", "level", "method", "seed", "answer", "correct", "aggregates", "branches",
          "prompt_tokens", "nodes", "ledger", "error")  # fmt: skip

Told = Callable[[dict[str, Any]], None]  # who is told of a record


def describe_run(
    *, policy: Path, prm: Path | None, config: "EngineConfig", method: Method | Chooser, seed: int,
    task: str, split: str, limit: int | None, problems: Sequence[Problem],
) -> dict[str, Any]:  # fmt: skip
    """What run.json holds. `problems` are all of the task's split; `limit` says how many of them are asked."""
    texts = json.dumps([[p.id, p.problem, p.answer, p.level] for p in problems])
    return {
        "schema_version": SCHEMA_VERSION,
        "task": {"name": task, "split": split, "limit": limit, "problems_sha256": hashlib.sha256(texts.encode()).hexdigest()},
        "method": describe_method(method),
        "seed": seed,
        "engine": asdict(config),
        "policy": describe_model(policy, config.load),
        "prm": describe_model(prm, config.load) if prm is not None else None,
    } | describe_making()


def describe_making() -> dict[str, Any]:
    """With what, when and where a run is made."""
    packages = ("tts-engine", "torch", "transformers")
    return {
        "versions": {"python": platform.python_version()} | {package: package_version(package) for package in packages},
        "made": {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": platform.machine()},
    }


def describe_records(directory: Path) -> dict[str, Any]:
    """Which run this is, as far as it has come: how many problems, and the sha256 of its description and of their lines."""
    directory = Path(directory)
    ends = [end for _, end in _read_lines(directory / PROBLEMS)]
    digest = hashlib.sha256()
    with (directory / PROBLEMS).open("rb") as file:
        while ends and (block := file.read(min(1 << 20, ends[-1] - file.tell()))):
            digest.update(block)
    return {"problems": len(ends), "sha256": {RUN: _sha256(directory / RUN), PROBLEMS: digest.hexdigest()}}


def describe_method(method: Method | Chooser) -> dict[str, Any]:
    own = method.describe() if isinstance(method, Chooser) else asdict(method)  # type: ignore[call-overload]
    return {"name": method.name, **own}


def describe_model(directory: Path, load: str = "weights") -> dict[str, Any]:
    """A checkpoint's size, and the sha256 of every file that decides what it does; of weights that are not loaded, none does."""
    from .models.weights import SOURCES

    checkpoint = SOURCES[load](directory)
    spec = checkpoint.spec
    kinds = (".json", ".jinja", ".model", *([".safetensors"] if load == "weights" else []))
    files = sorted(path for path in checkpoint.directory.iterdir() if path.suffix in kinds and path.is_file())
    return {
        "name": checkpoint.directory.name,
        "architecture": spec.architecture,
        "parameters": spec.num_parameters,
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": {path.name: _sha256(path) for path in files},
    }


def describe_result(result: SearchResult, grader: Grader) -> dict[str, Any]:
    """A finished problem for problems.jsonl: every step drawn as a node, the vote, the verdicts, the cost, and how a Chooser came
    to its method.

    nodes[i]["parent"] is an index into nodes, always below i, or -1 for the prompt. Raises MissingExtra where a verdict takes
    math-verify and it is not installed.
    """
    nodes = in_order(result.nodes)
    place = {0: -1} | {node.identity: i for i, node in enumerate(nodes)}
    root = nodes[0].path[0] if nodes else None
    voted = zip([place[branch.identity] for branch in result.branches], result.answers, result.groups, strict=True)
    began = time.perf_counter()
    choice = describe_choice(result.problem.answer, result.answer, result.aggregates, voted, grader)
    ledger = result.ledger.as_dict()
    ledger["phases"]["grading"] += time.perf_counter() - began
    known = _header(result.problem, result.method, result.seed) | choice
    if result.choice is not None:
        known["choice"] = result.choice
    return known | {
        "prompt_tokens": list(root.tokens) if root else [],
        "nodes": [
            {
                "parent": place[node.parent.identity] if node.parent is not None else -1,
                "tokens": list(node.tokens),
                "text": node.text,
                "score": node.score,
                "finish": node.finish,
                "identity": f"{node.identity:016x}",
                "lane": list(node.lane),
                "draw": node.draw,
            }
            for node in nodes
        ],
        "ledger": ledger,
        "error": None,
    }


def describe_choice(
    gold: str | None, answer: str | None, aggregates: dict[str, str | None],
    voted: Iterable[tuple[int, str | None, str | None]], grader: Grader,
) -> dict[str, Any]:  # fmt: skip
    """The part of a record that follows from its tree. voted: of each branch its place among the nodes, its answer, its group."""

    def verdict(answer: str | None) -> bool | None:
        return None if gold is None else grader.equal(gold, answer)

    return {
        "answer": answer,
        "correct": verdict(answer),
        "aggregates": {name: {"answer": chosen, "correct": verdict(chosen)} for name, chosen in aggregates.items()},
        "branches": [{"node": place, "answer": own, "group": group} for place, own, group in voted],
    }


def describe_failure(problem: Problem, method: Method, seed: int, error: EngineError) -> dict[str, Any]:
    """A problem that could not be searched, in the same form; it counts as not solved."""
    empty: dict[str, Any] = {"aggregates": {}, "branches": [], "prompt_tokens": [], "nodes": [], "ledger": None}
    return _header(problem, method, seed) | {"answer": None, "correct": False} | empty | {"error": str(error)}


def _header(problem: Problem, method: Method, seed: int) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "id": problem.id,
        "problem": problem.problem,
        "gold": problem.answer,
        "level": problem.level,
        "method": describe_method(method),
        "seed": seed,
    }


class Run:
    """A run directory, open for appending by one process. `records` are those it holds, without what was written and searched."""

    def __init__(self, directory: Path, description: dict[str, Any]) -> None:
        """Open or make it. Raises RunError where another process writes it, it is damaged, or it was made with other settings."""
        self.directory = Path(directory)
        self.records: list[dict[str, Any]] = []
        self._end = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.directory / PROBLEMS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"{self.directory} cannot be used as a run's directory: {reason}") from error
        try:
            self._lock()
            for record, end in _checked_lines(self.directory / PROBLEMS):
                self._end = end
                self.records.append(outcome(record))
            self._settle(description)
            os.ftruncate(self._file, self._end)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others write the run."""
        os.close(self._file)

    @property
    def done(self) -> set[str]:
        """Ids of the problems that need no more work."""
        return {record["id"] for record in self.records}

    def append(self, record: dict[str, Any]) -> None:
        """Put one finished problem on the disk. Raises RunError where it cannot be written; the run stays as it was."""
        line = as_line(record)
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(None, f"only {written} of {len(line)} bytes were written")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise RunError(f"{self.directory / PROBLEMS} cannot be written ({error.strerror}); {len(self.records)} problems are "
                           "safe in it: make room and run the same command again") from error  # fmt: skip
        finally:  # the file tells, also where Ctrl-C came right after the write
            if os.fstat(self._file).st_size == self._end + len(line):
                self._end += len(line)
                self.records.append(outcome(record))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is writing {self.directory}: wait for it, or choose another --out") from None

    def _settle(self, description: dict[str, Any]) -> None:
        """Write run.json, or find the one there to say the same."""
        file = self.directory / RUN
        if not file.exists():
            if self.records:
                raise RunError(f"{self.directory} holds {PROBLEMS} without {RUN}, so its settings are lost: choose another --out")
            write_description(file, description)
            return
        refuse_unless_same(self.directory, read_description(self.directory), description)


def read_description(directory: Path) -> dict[str, Any]:
    """A run's run.json. Raises RunError where there is none that can be read."""
    file = Path(directory) / RUN
    try:
        _refuse_unless_file(file)
        description = json.loads(file.read_text(encoding="utf-8"))
        as_line(description)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'not JSON'}") from error
    if not isinstance(description, dict):
        raise RunError(f"{file} is no description of a run")
    return description


def read_run(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of a run, finished or not, whoever writes it now; a torn last line is left out."""
    for record, _ in _read_lines(Path(directory) / PROBLEMS):
        yield record


def read_outcomes(directory: Path) -> Iterator[dict[str, Any]]:
    """The same, each checked as far as tables count it. Raises RunError for a line that they cannot count, by its number."""
    for record, _ in _checked_lines(Path(directory) / PROBLEMS):
        yield record


def refuse_unless_same(directory: Path, made: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise RunError naming what differs between a run as it was made and as it is asked for."""
    before, now = _flat(made), _flat(asked)
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key) and not key.startswith(NOT_COMPARED)]
    if not keys:
        return
    named = keys[:MOST_DIFFERENCES]
    have, want = (" and ".join(f"{_setting(key)}={_value(side.get(key))}" for key in named) for side in (before, now))
    more = f" (and {len(keys) - len(named)} settings more)" if len(keys) > len(named) else ""
    raise RunError(f"{directory} was made with {have}, not {want}{more}; use its settings to continue it, or choose another --out")


def evaluate(
    engine: "Engine", problems: Sequence[Problem], method: Method | Chooser, run: Run, *, seed: int, finished: Told
) -> None:  # fmt: skip
    """Search what the run lacks; `finished` is told of each record once it is on the disk.

    A problem that can never fit is recorded as an error and the rest go on; where none fits, that is an error of the settings
    and raised. So is one whose search the PRM cannot read to its end. Where a Chooser would have chosen, an error is recorded under
    the last of its methods, none being chosen. Problems that share a budget are all searched again, so that each is given what it
    would have been given had the run never stopped.
    """
    stand_in = method.methods[-1] if isinstance(method, Chooser) else method
    done = run.done
    waiting = [problem for problem in problems if problem.id not in done]
    if waiting and isinstance(method, Adaptive) and method.budget is not None:
        waiting = list(problems)
    refused = {problem.id: error for problem in waiting if (error := _refusal(engine, problem, method, seed))}
    if waiting and len(refused) == len(waiting):
        raise next(iter(refused.values()))
    append = timed(run, finished)

    def put(record: dict[str, Any]) -> None:
        if record["id"] not in done:
            append(record)

    for problem in waiting:
        if problem.id in refused:
            put(describe_failure(problem, stand_in, seed, refused[problem.id]))

    def failed(problem: Problem, error: EngineError) -> None:
        put(describe_failure(problem, stand_in, seed, error))

    for result in engine.stream([p for p in waiting if p.id not in refused], method, seed=seed, failed=failed):
        try:
            record = describe_result(result, engine.grader)
        except MissingExtra:
            raise
        except EngineError as error:  # the grader could not be asked
            record = describe_failure(result.problem, stand_in, seed, error)
        put(record)


def timed(run: Run, finished: Told) -> Told:
    """What puts a record into the run and then tells `finished`.

    `seconds` of a record is the time since the one before it, so they add up to the time the run took.
    """
    mark = time.perf_counter()

    def put(record: dict[str, Any]) -> None:
        nonlocal mark
        now = time.perf_counter()
        record["seconds"], mark = round(now - mark, 6), now
        run.append(record)
        finished(record)

    return put


def _refusal(engine: "Engine", problem: Problem, method: Method | Chooser, seed: int) -> EngineError | None:
    """Why this problem cannot be searched; None where it can. Nothing is computed."""
    try:
        engine.stream(problem, method, seed=seed)
    except EngineError as error:
        return error
    return None


def _read_lines(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole records of a journal, each with the bytes up to its end; what a kill left of a last line is not among them."""
    end = 0
    try:
        _refuse_unless_file(file)
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                record = _record(line)
                if record is None:
                    if next(lines, None) is not None:
                        raise RunError(f"{file} line {number} is damaged: only the last line of a run may be torn")
                    return
                end += len(line)
                yield record, end
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _checked_lines(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    ids = set[str]()
    for number, (record, end) in enumerate(_read_lines(file), start=1):
        try:
            _check_outcome(record, ids)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise RunError(f"{file} line {number} is no record of a search: {reason}") from error
        yield record, end


def _refuse_unless_file(file: Path) -> None:
    """Whoever opens a pipe may wait for ever."""
    if file.exists() and not file.is_file():
        raise OSError(None, "it is not a file")


def outcome(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the parts that grow with the search."""
    return {key: value for key, value in record.items() if key not in ("problem", "prompt_tokens", "nodes", "branches")}


def _check_outcome(record: dict[str, Any], earlier: set[str]) -> None:
    """Raise one of the errors of data that is not of its form where the tables of a run cannot count this record.

    earlier: ids of the lines before it, to which its own is added.
    """
    if record["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {record['schema_version']!r:.40} and not {SCHEMA_VERSION}")
    if missing := [name for name in FIELDS if name not in record]:
        raise KeyError(missing[0])
    if record["id"] in earlier:
        raise ValueError(f"its id {record['id']!r:.80} is that of an earlier line")
    earlier.add(record["id"])
    if not isinstance(record["method"]["name"], str):
        raise TypeError("its method has no name")
    for name, choice in record["aggregates"].items():
        if not isinstance(choice, dict):
            raise TypeError(f"its aggregate {name!r:.40} is no choice")
    counts = [record["seconds"]]
    if record["ledger"] is not None:
        counts += _flat(asdict(Ledger.from_dict(record["ledger"]))).values()
    if not all(isinstance(count, int | float) and 0 <= count < 1 << 63 for count in counts):
        raise ValueError("its costs are no numbers")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None


def as_line(record: dict[str, Any]) -> bytes:
    """A record as it stands in a journal. Raises ValueError for what JSON or UTF-8 does not have: NaN, half a surrogate pair."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def write_description(file: Path, description: dict[str, Any]) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    part = file.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        out.write(json.dumps(description, indent=1, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"method": {"n": 4}} -> {"method.n": 4}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _setting(key: str) -> str:
    """As the command line calls it, where it does."""
    if key in ("method.name", "task.name"):
        return key.removesuffix(".name")
    for room in ("method.rules.", "method.", "engine.", "task."):
        key = key.removeprefix(room)
    return key


def _value(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] + "..." if len(text) == 64 else text
