"""What follows from the trees of a run: answers, votes and verdicts, from its records alone. No model and no torch.

A record is read back as the branches it was written from, so whatever chooses among branches chooses here as it did there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .branch import Branch, Finish, root_branch
from .errors import RunError
from .results import read_answers
from .runs import FIELDS, PROBLEMS, SCHEMA_VERSION, as_line, describe_choice, outcome, read_description, read_run
from .search import Method, make_method, make_rules
from .search.rules import Grouping
from .search.voting import LAST_VOTE, MAJORITY, all_aggregates
from .tasks.grader import Grader

TEXTS, MAYBE_TEXTS = ("id", "problem"), ("gold", "error")


@dataclass(frozen=True, slots=True)
class Stored:
    """One record, read back. `nodes` are its steps in the record's order, `branches` those that were voted."""

    record: dict[str, Any]
    method: Method
    nodes: list[Branch]
    branches: list[Branch]


@dataclass(frozen=True, slots=True)
class Scored:
    """A run's records with every choice made anew, without their trees; ids of those that say otherwise on the disk."""

    records: list[dict[str, Any]]
    changed: list[str]


def score(directory: Path, grader: Grader, grouping: Grouping | None = None) -> Scored:
    """All aggregates and verdicts of a run, recomputed. `grouping` in place of that of the method's rules.

    A problem that could not be searched stays so. Raises RunError as `read_trees` does, and where there is no record yet.
    """
    records, changed = [], []
    for stored in read_trees(directory):
        again = stored.record | choose(stored, stored.branches, grader, grouping)
        records.append(outcome(again))
        if again != stored.record:
            changed.append(stored.record["id"])
    if not records:
        raise RunError(f"{directory} holds no finished problem yet")
    return Scored(records, changed)


def choose(stored: Stored, branches: list[Branch], grader: Grader, grouping: Grouping | None = None) -> dict[str, Any]:
    """The parts of a record that follow from its voted branches, which are `branches`; nothing for a problem that failed."""
    if stored.record["error"] is not None:
        return {}
    answers, groups = read_answers(branches, grouping or stored.method.rules.grouping, grader)
    scores = [branch.scores for branch in branches]
    read = bool(branches) and all(None not in path for path in scores)
    aggregates = all_aggregates(groups, scores if read else None)
    places = [voted["node"] for voted in stored.record["branches"]]
    own = stored.method.uses_prm == read  # else a PRM came to it later
    answer = aggregates[stored.method.vote if own else LAST_VOTE if read else MAJORITY]
    return describe_choice(stored.record["gold"], answer, aggregates, zip(places, answers, groups, strict=True), grader)


def read_trees(directory: Path) -> Iterator[Stored]:
    """A run's records with their trees, each checked; a torn last line is left out.

    Raises RunError for what is no run, a run of another schema, and a line that no search has written, by its number.
    """
    version = read_description(directory).get("schema_version")
    if version != SCHEMA_VERSION:
        raise RunError(f"{directory} was written with schema_version {version!r:.40}; this version reads {SCHEMA_VERSION}")
    lines: dict[str, int] = {}
    for number, record in enumerate(read_run(directory), start=1):
        try:
            stored = _read_back(record)
            if lines.setdefault(record["id"], number) != number:
                raise ValueError(f"its id {record['id']!r:.80} is that of line {lines[record['id']]}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise RunError(f"{Path(directory) / PROBLEMS} line {number} is no record of a search: {reason}") from error
        yield stored


def _read_back(record: dict[str, Any]) -> Stored:
    """Raises one of the errors of data that is not of its form where the record is not one that describe_result makes."""
    if record["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {record['schema_version']!r:.40} and not {SCHEMA_VERSION}")
    as_line(record)
    if missing := [name for name in FIELDS if name not in record]:
        raise KeyError(missing[0])
    for name in (*TEXTS, *MAYBE_TEXTS):
        if record[name] is not None or name in TEXTS:
            _text(name, record[name])
    if record["error"] is None and not isinstance(record["ledger"], dict):
        raise TypeError("it has no ledger")
    nodes: list[Branch] = []
    root = root_branch(record["prompt_tokens"], record["problem"])
    for number, node in enumerate(record["nodes"]):
        parent, score = node["parent"], node["score"]
        if parent not in range(-1, number):
            raise ValueError(f"node {number} has the parent {parent!r:.40}")
        if score is not None and not 0 <= score <= 1:
            raise ValueError(f"node {number} has the score {score!r:.40}")
        nodes.append(
            Branch(
                parent=nodes[parent] if parent >= 0 else root,
                tokens=tuple(node["tokens"]),
                text=_text("text", node["text"]),
                identity=int(node["identity"], 16),
                lane=tuple(node["lane"]),
                draw=node["draw"],
                finish=Finish(node["finish"]) if node["finish"] is not None else None,
                score=score,
            )
        )
    if len({0, *(node.identity for node in nodes)}) <= len(nodes):
        raise ValueError("two of its nodes have one identity")
    places = [voted["node"] for voted in record["branches"]]
    if not all(place in range(len(nodes)) for place in places):
        raise ValueError(f"a branch that it votes on is none of its {len(nodes)} nodes")
    branches = [nodes[place] for place in places]
    if len({None in branch.scores for branch in branches}) > 1:
        raise ValueError("some of its voted branches carry scores and some do not")
    return Stored(record, _method(**record["method"]), nodes, branches)


def _method(name: str, rules: dict[str, Any] | None = None, **settings: Any) -> Method:
    return make_method(name, **settings if rules is None else settings | {"rules": make_rules(**rules)})


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r:.40}, not a text")
    return value
