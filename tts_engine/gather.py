"""Runs and sweeps on the disk, gathered for a report: each record checked, the trees left where they are."""

from collections.abc import Sequence
from pathlib import Path

from .diagnose import read_diagnostics
from .errors import RunError
from .report import diagnostics
from .report.arms import Difficulty, RunRead, Study, study
from .runs import SCHEMA_VERSION, outcome, read_description, read_outcomes
from .score import read_trees
from .strategy.difficulty import absolute_bins, read_draws, refuse_as_pilot, refuse_shared_draws
from .sweep import is_sweep, read_sweep
from .tasks.grader import Grader


def gather(directories: Sequence[Path], difficulty: Sequence[Path] = ()) -> Study:
    """The runs in these directories, a sweep standing for all of its own, as a report compares them.

    difficulty: majority or best-of-N runs of the same problems with another seed, one a policy, that say how hard they are for it;
    a sweep's pilots do anyway. Raises RunError or StrategyError, one sentence.
    """
    texts: dict[str, str] = {}
    runs = [read(directory, texts) for directory in unfolded(directories)]
    pilots = [pilot for directory in directories if is_sweep(directory) for pilot in read_sweep(directory, pilots=True)]
    return study(runs, texts, [bins_of(source, runs) for source in (*pilots, *difficulty)])


def diagnosed(directories: Sequence[Path], files: Sequence[Path] = ()) -> list[diagnostics.Diagnostics]:
    """What `diagnose` left in the runs' directories, and in these files. Raises RunError."""
    beside = [directory / diagnostics.FILE for directory in unfolded(directories)]
    return [read_diagnostics(file) for file in (*(file for file in beside if file.is_file()), *files)]


def unfolded(directories: Sequence[Path]) -> list[Path]:
    """Run directories, each once, sweeps taken apart."""
    found: dict[Path, Path] = {}
    for directory in map(Path, directories):
        parts = read_sweep(directory) if is_sweep(directory) else [directory]
        found |= {part.resolve(): part for part in parts if part.resolve() not in found}
    return list(found.values())


def read(directory: Path, texts: dict[str, str]) -> RunRead:
    """One run; what its problems say is put into `texts`."""
    description = read_description(directory)
    version = description.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RunError(f"{directory} was written with schema_version {version!r:.40}; this version reads {SCHEMA_VERSION}")
    records = []
    for record in read_outcomes(directory):
        texts.setdefault(record["id"], str(record["problem"]))
        records.append(outcome(record))
    return RunRead(str(directory), description, records)


def bins_of(source: Path, runs: Sequence[RunRead]) -> Difficulty:
    """The paper's bins by the share of right draws of a run. Raises StrategyError where its draws are no measure of how hard a
    problem is, or are those of an evaluated run too."""
    name, description = str(source), read_description(source)
    with Grader() as grader:
        drawn = {stored.record["id"]: read_draws(stored.record, grader) for stored in read_trees(source)}
    try:
        refuse_as_pilot(description, name)
        for run in runs:
            if run.description["method"]["name"] != "cot":  # greedy: it draws nothing
                refuse_shared_draws(description, name, run.description, run.name)
        policy = description["policy"]["sha256"]
    except (KeyError, TypeError):
        raise RunError(f"the run.json of {name}, or of a run, is not as a run of this version has it") from None
    bins = absolute_bins()
    return Difficulty(policy, bins.names, {id: bins.of(draws.pass_rate) for id, draws in drawn.items() if draws is not None})
