"""Policies x PRMs x methods x n as one run that can be gone on with: a directory of runs that a recipe describes.

`sweep.json` holds the recipe with all its defaults, the models by the sha256 of their files, the problems' fingerprint, versions,
and the cells in the order in which they are made; `runs/NAME/` is one run a cell, as `eval` writes it. What a cell's cost means is
told in make.py.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import RunError

SWEEP, RUNS = "sweep.json", "runs"
SCHEMA_VERSION = 1


def is_sweep(directory: Path) -> bool:
    return (Path(directory) / SWEEP).is_file()


def read_sweep_description(directory: Path) -> dict[str, Any]:
    """A sweep's sweep.json. Raises RunError where there is none that can be read."""
    file = Path(directory) / SWEEP
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'not JSON'}") from error
    version = description.get("schema_version") if isinstance(description, dict) else None
    if version != SCHEMA_VERSION:
        raise RunError(f"{file} is no description of a sweep of schema_version {SCHEMA_VERSION}")
    return description


def read_sweep(directory: Path, *, pilots: bool = False) -> list[Path]:
    """The run directories of a sweep's cells, in the order in which they are made; those that were not begun yet are left out.

    pilots: instead those that tell how hard the problems are; they draw with another seed and are no results. Raises RunError.
    """
    try:
        cells = [cell for cell in read_sweep_description(directory)["cells"] if bool(cell["pilot"]) == pilots]
        directories = [Path(directory) / cell["directory"] for cell in cells]
    except (KeyError, TypeError) as error:
        raise RunError(f"{Path(directory) / SWEEP} does not say which cells the sweep has") from error
    return [run for run in directories if run.is_dir()]
