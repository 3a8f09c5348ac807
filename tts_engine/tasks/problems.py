"""Problems with known answers: the tasks by name, and any JSONL file with problem and answer fields.

A task is read and checked whole before its first problem is given out; what is wrong with a file is named by line.
"""

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tts_engine.errors import MissingExtra, TaskError
from tts_engine.tasks.programs import SPLIT_SIZES, Program, split_programs

LONGEST_LINE = 4 << 20  # bytes

DEFAULT_SPLIT = "test"
A_FILE = "the path of a JSONL file with problem and answer fields"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem; its text is the user's message as it stands, its answer None where it is not known. `program` is what an
    embedded problem was made from."""

    id: str
    problem: str
    answer: str | None
    level: int | str | None = None
    program: Program | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Where problems come from: `load` takes a split."""

    name: str
    load: Callable[[str], list[Problem]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A task that others keep on the hub: its id there, the split that holds the problems, the column that tells them apart."""

    hub_id: str
    split: str
    id: str


def load_task(name_or_path: str | Path, split: str = DEFAULT_SPLIT, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems (None: all) of a task or a JSONL file; the whole is checked either way.

    Raises TaskError for an unknown name or split, and for a file or line that cannot be used; ValueError for limit < 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    return find_task(name_or_path).load(split)[:limit]


def find_task(name_or_path: str | Path) -> Task:
    """A task by its name in TASKS, or the JSONL file at a path. Raises TaskError where it is neither."""
    if str(name_or_path) in TASKS:
        return TASKS[str(name_or_path)]
    if os.path.isfile(name_or_path):
        path = Path(name_or_path)
        return Task(path.stem, partial(_load_jsonl, path))
    reason = "is a directory" if os.path.isdir(name_or_path) else "is no task and no file"
    raise TaskError(f"{name_or_path} {reason}; known: {', '.join(TASKS)}, or {A_FILE}")


def _load_embedded(split: str) -> list[Problem]:
    if split not in SPLIT_SIZES:
        raise TaskError(f"the embedded task has no split {split!r}; known: {', '.join(SPLIT_SIZES)}")
    return [
        Problem(f"embedded-{split}-{number:04d}", program.text, str(program.answer), program.level, program)
        for number, program in enumerate(split_programs(split), start=1)
    ]


def _load_dataset(name: str, dataset: Dataset, split: str) -> list[Problem]:
    _refuse_splits(name, split)
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise MissingExtra(
            f"task {name} is read from the hub and datasets is not installed: pip install 'tts-engine[hub]', or give {A_FILE}"
        ) from None
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a network it tells of every attempt
    try:
        rows = [dict(row) for row in load_dataset(dataset.hub_id, split=dataset.split)]
        return [_problem(row | {"id": _text(row, [dataset.id], numbers=True)}) for row in rows]
    except Exception as error:  # whatever goes wrong on the way here, and in files that others may change
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TaskError(f"task {name} cannot be had from the hub ({dataset.hub_id}): {reason}; give {A_FILE} instead") from error
    finally:
        hub.setLevel(level)


DATASETS = {
    "math500": Dataset("HuggingFaceH4/MATH-500", "test", "unique_id"),
    "aime24": Dataset("HuggingFaceH4/aime_2024", "train", "id"),
    "amc23": Dataset("math-ai/amc23", "test", "id"),
}
TASKS = {"embedded": Task("embedded", _load_embedded)} | {
    name: Task(name, partial(_load_dataset, name, dataset)) for name, dataset in DATASETS.items()
}


def _load_jsonl(path: Path, split: str) -> list[Problem]:
    _refuse_splits(path, split)
    problems: list[Problem] = []
    line_of: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                try:
                    problem = _read_line(line, f"{path.stem}-{number}")
                    if problem is None:
                        continue
                    if line_of.setdefault(problem.id, number) != number:
                        raise ValueError(f"id {problem.id!r} is that of line {line_of[problem.id]}")
                except ValueError as error:
                    raise TaskError(f"{path} line {number}: {error}") from None
                problems.append(problem)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    if not problems:
        raise TaskError(f"{path} holds no problems")
    return problems


def _read_line(line: bytes, default_id: str) -> Problem | None:
    """The problem of one line, None for a blank one. Raises ValueError with what is wrong."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    if not text.strip():
        return None
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_json_type(record)} where an object was expected")
    return _problem(record, default_id)


def _refuse_splits(source: str | Path, split: str) -> None:
    if split != DEFAULT_SPLIT:
        raise TaskError(f"{source} has no splits: split={split!r} cannot be taken from it")


def _problem(record: dict[str, object], default_id: str | None = None) -> Problem:
    """Raises ValueError with what is wrong."""
    return Problem(
        id=_text(record, ["id"], numbers=True) if default_id is None or record.get("id") is not None else default_id,
        problem=_text(record, ["problem", "question"]),
        answer=_text(record, ["answer"], numbers=True),
        level=_level(record.get("level")),
    )


def _text(record: dict[str, object], names: list[str], numbers: bool = False) -> str:
    """The first of the fields `names` that is there, as text; with `numbers`, a JSON number passes as its decimal text."""
    name = next((name for name in names if name in record), None)
    if name is None:
        raise ValueError(f"no field {' or '.join(map(repr, names))}; it has {', '.join(map(repr, record)) or 'none'}")
    value = record[name]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"field {name!r} is a JSON {_json_type(value)}, not a {'string or finite number' if numbers else 'string'}"
        )
    if not value.strip():
        raise ValueError(f"field {name!r} is blank")
    _refuse_surrogates(name, value)
    return value


def _level(value: object) -> int | str | None:
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise ValueError(f"field 'level' is a JSON {_json_type(value)}, not an integer or a string")
    if isinstance(value, str):
        _refuse_surrogates("level", value)
    return value


def _refuse_surrogates(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {name!r} has half a surrogate pair at character {error.start + 1}: no tokenizer can read it"
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
