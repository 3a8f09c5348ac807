"""Stored trees read by another PRM: every step gets a score of its own and the choice is made anew. Nothing is drawn.

Every node counts, also one that its own search drew and dropped unread, and those of methods that read none: after that a PRM
took part, so the answer is the last-score vote. Whom a search kept is history: of beam search and DVTS this is another reading
of the same tree, not the tree that a search guided by this PRM would have grown.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from .attention import make_backend, refuse_windows
from .branch import Branch
from .config import DTYPES, EngineConfig, first_split
from .engine import make_scorer
from .errors import EngineError, RunError
from .ledger import Ledger, Phases
from .models.weights import SOURCES, load_decoder
from .prm.scorer import ScoreContext, Scorer
from .runner import ModelRunner
from .runs import Run, Told, describe_failure, describe_making, describe_model, describe_records, read_description, timed
from .score import Stored, choose
from .search.driver import Driver
from .search.requests import Program, Score
from .tasks.grader import Grader
from .tasks.problems import Problem


def config_of(source: Path, **changed: Any) -> EngineConfig:
    """The engine settings that the run at `source` was made with, some of them changed. The PRM's family is not carried over."""
    made = read_description(source).get("engine")
    try:
        return EngineConfig(**{**made, "prm_family": None} | changed)  # type: ignore[dict-item]
    except TypeError as error:
        raise RunError(f"{source} was made with engine settings that this version cannot take: {error}") from error


def describe_rescoring(source: Path, prm: Path, config: EngineConfig) -> dict[str, Any]:
    """What run.json holds: the source's, with this PRM and the settings it reads with, and under "rescores" which run that is.

    Raises RunError for what is no run, or one without a finished problem.
    """
    made = read_description(source)
    rescores = {"name": Path(source).resolve().name, "prm": made.get("prm")} | describe_records(source)
    if not rescores["problems"]:
        raise RunError(f"{source} holds no finished problem yet")
    return made | {"engine": asdict(config), "prm": describe_model(prm, config.load)} | describe_making() | {"rescores": rescores}


def load_scorer(prm: Path, config: EngineConfig) -> Scorer:
    """A PRM alone in its engine: all that is for keys and values is its. Raises ModelError or EngineError as an engine does."""
    checkpoint = SOURCES[config.load](prm)
    backend = make_backend(config.attention, config.device, deterministic=config.deterministic)
    refuse_windows(backend, checkpoint.spec.windows, str(prm))
    dtype = DTYPES[config.dtype]
    decoder = load_decoder(checkpoint, dtype=dtype, device=config.device, deterministic=config.deterministic)
    [num_blocks] = first_split(config, [checkpoint.spec])
    runner = ModelRunner(decoder, backend, num_blocks=num_blocks, block_size=config.block_size)
    return make_scorer(runner, checkpoint, config.prm_family)


def rescore(trees: Iterable[Stored], scorer: Scorer, run: Run, *, finished: Told) -> None:
    """Read those of the trees that `run` lacks; `finished` is told of each record once it is on the disk.

    A problem that its search could not do stays as it is. One that the PRM cannot read is recorded as an error after the others;
    where it could read none, that is an error of the settings and raised.
    """
    done, put = run.done, timed(run, finished)
    unread: list[tuple[Stored, EngineError]] = []
    with Grader() as grader:
        for stored in trees:
            if stored.record["id"] in done:
                continue
            try:
                steps, ledger = read_tree(stored, scorer)
            except EngineError as reason:
                unread.append((stored, reason))
            else:
                put(_read_anew(stored, steps, ledger, grader))
    if unread and not run.records:
        raise unread[0][1]
    for stored, error in unread:
        record = stored.record
        problem = Problem(record["id"], record["problem"], record["gold"], record["level"])
        put(describe_failure(problem, stored.method, record["seed"], error))


def read_tree(stored: Stored, scorer: Scorer) -> tuple[dict[int, Branch], Ledger]:
    """`read_steps` of a stored tree."""
    return read_steps(stored.record["problem"], stored.nodes, scorer)


def read_steps(problem: str, nodes: Sequence[Branch], scorer: Scorer) -> tuple[dict[int, Branch], Ledger]:
    """Every step of a tree with the PRM's score, by identity, and what it cost; each is read once. Raises EngineError.

    nodes: parents before their children; the root above them has identity 0 and is not among them.
    """
    steps: dict[int, Branch] = {}
    ledger, started = Ledger.empty(), perf_counter()

    def keep(step: Branch) -> None:
        steps[step.identity] = step

    driver = Driver(_reading(nodes))
    opening = scorer.spec.opening(problem)
    context = ScoreContext(driver=driver, opening=opening, ledger=ledger.prm, scored=keep)
    try:
        while not driver.done:
            for ask in driver.asks():
                scorer.submit(context, ask)
            while scorer.num_open:
                scorer.tick()
    finally:
        driver.close()
        scorer.abandon(context)
    scorer.count(context)
    ledger.seconds = perf_counter() - started
    ledger.phases = Phases(prm=ledger.seconds)
    return steps, ledger


def _reading(nodes: Sequence[Branch]) -> Program:
    """Ask scores for a whole tree: each chain of steps up to where it forks or ends in one piece, then those behind the forks."""
    below: dict[int, list[Branch]] = {}
    for node in nodes:
        assert node.parent is not None
        below.setdefault(node.parent.identity, []).append(node)

    def chain(parent: Branch, node: Branch) -> Branch:
        end = replace(node, parent=parent, score=None)
        while len(after := below.get(end.identity, [])) == 1:
            end = replace(after[0], parent=end, score=None)
        return end

    ends = [nodes[0].path[0]] if nodes else []
    while ends := [chain(end, child) for end in ends for child in below.get(end.identity, [])]:
        ends = yield Score(ends)
    return ends


def _read_anew(stored: Stored, steps: dict[int, Branch], ledger: Ledger, grader: Grader) -> dict[str, Any]:
    """The record of the tree with these scores. The policy's part of the cost stays as it was; the PRM's is this reading's."""
    record = stored.record
    if record["error"] is not None:
        return dict(record)
    nodes = [old | {"score": steps[node.identity].score} for old, node in zip(record["nodes"], stored.nodes, strict=True)]
    read = ledger.as_dict()
    cost = record["ledger"] | {name: read[name] for name in ("prm", "seconds", "phases")}
    branches = [steps[branch.identity] for branch in stored.branches]
    return record | choose(stored, branches, grader) | {"nodes": nodes, "ledger": cost}
