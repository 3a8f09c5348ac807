"""Imports go down: a room of tts_engine imports itself and lower floors, wherever in a file the import stands."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tts_engine"

FLOORS = {
    0: {"_C"},
    1: {"errors", "branch", "ledger"},
    2: {"search", "scheduler", "kv"},
    3: {"attention"},
    4: {"models"},
    5: {"runner", "graphs", "sampling"},
    6: {"steps", "rows", "draws", "accounts", "guesses", "policy", "prm"},
    7: {"config", "engine", "tasks", "results"},
    8: {"strategy", "report", "embedded"},
    9: {"runs", "score", "rescore", "diagnose", "sweep", "gather", "demo", "bench", "options", "cli", "__main__"},
    10: {"", "testing"},  # the package's own face, and the doubles
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Neighbours on one floor who may call one another, in this direction only.
NEIGHBOURS = {
    ("branch", "errors"), ("ledger", "errors"),
    ("scheduler", "kv"),
    ("runner", "graphs"), ("runner", "sampling"), ("rows", "steps"), ("draws", "rows"), ("accounts", "draws"),
    ("guesses", "draws"), ("guesses", "rows"), *(("policy", room) for room in ("steps", "rows", "draws", "accounts", "guesses")),
    ("engine", "config"), ("engine", "results"), ("engine", "tasks"), ("results", "tasks"),
    ("strategy", "report"),
    ("score", "runs"), ("rescore", "runs"), ("rescore", "score"), ("demo", "runs"),
    ("sweep", "runs"), ("sweep", "score"), ("sweep", "rescore"), ("cli", "sweep"),
    ("cli", "runs"), ("cli", "score"), ("cli", "rescore"), ("cli", "demo"), ("cli", "bench"),
    ("diagnose", "runs"), ("diagnose", "score"), ("diagnose", "rescore"), ("cli", "diagnose"),
    ("gather", "runs"), ("gather", "score"), ("gather", "sweep"), ("gather", "diagnose"), ("cli", "gather"),
    ("cli", "options"), ("__main__", "cli"),
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`tts_engine.kv.tree` lives in `kv`, `tts_engine` itself in ``."""
    return (module.split(".") + [""])[1]


def imported_rooms(source: str, module: str, is_package: bool) -> set[str]:
    """The rooms of tts_engine that a module imports anywhere in its text, lazily or for types alone too."""
    origins = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            origins += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) + is_package - node.level] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            if origin == "tts_engine":  # brings a room where there is one of that name, else a part of the package's face
                names = [alias.name for alias in node.names if alias.name != "__version__"]  # a constant, free to all
                origins += [f"{origin}.{name}" if name in FLOOR else origin for name in names]
            else:
                origins.append(origin)
    return {room(origin) for origin in origins if origin.split(".")[0] == "tts_engine"}


def complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    here = room(module)
    return [
        f"{module} (floor {FLOOR[here]}) imports {there or 'tts_engine'} (floor {FLOOR[there]})"
        for there in sorted(imported_rooms(source, module, is_package) - {here})
        if FLOOR[there] >= FLOOR[here] and (here, there) not in NEIGHBOURS and FLOOR[here] < 10
    ]


def test_every_module_has_a_floor():
    homeless = sorted({room(module_name(path)) for path in PACKAGE.rglob("*.py")} - set(FLOOR))
    assert not homeless, f"give {', '.join(homeless)} a floor: add it to FLOORS in {Path(__file__).name}"


def test_imports_go_down():
    wrong = [
        sentence
        for path in sorted(PACKAGE.rglob("*.py"))
        if room(module_name(path)) in FLOOR
        for sentence in complaints(path.read_text(), module_name(path), path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source, module, is_package",
    [
        ("from ..models import spec", "tts_engine.kv.tree", False),
        ("from .. import runner", "tts_engine.models.decoder", False),
        ("from ..scheduler import admit", "tts_engine.search", True),
        ("from .strategy import replay", "tts_engine.engine", False),
        ("import tts_engine.cli", "tts_engine.branch", False),
        ("from tts_engine import engine", "tts_engine.search.driver", False),
        ("from tts_engine import Engine", "tts_engine.report.tables", False),
        ("def plan():\n    from ..attention.base import BatchLayout", "tts_engine.kv.cache", False),
    ],
)
def test_an_import_that_climbs_is_seen_in_every_spelling(source, module, is_package):
    assert complaints(source, module, is_package)


def test_search_brings_no_torch():
    modules = sorted(module_name(path) for path in (PACKAGE / "search").glob("*.py"))
    command = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


def test_kernels_know_tensors_only():
    for path in (ROOT / "kernels").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        origins = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        origins += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        assert {origin.split(".")[0] for origin in origins} - sys.stdlib_module_names <= {"torch", "triton"}, path.name
