"""A decoding engine for test-time scaling: a policy writes steps, a process reward model scores them, a search keeps the best.

>>> from tts_engine import BeamSearch, Engine
>>> with Engine.from_pretrained(policy="path/or/hub-id", prm="path/or/hub-id") as engine:
...     [result] = engine.search("What is 6 times 7?", BeamSearch(n=16, width=4))
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "engine",
    "EngineError": "errors",
    "Branch": "branch",
    "Ledger": "ledger",
    "SearchResult": "results",
    "Problem": "tasks.problems",
    "load_task": "tasks.problems",
    "make_auto": "strategy.auto",
    **dict.fromkeys(("Cot", "Majority", "BestOfN", "BeamSearch", "Dvts", "Rebase", "Rules", "make_method"), "search"),
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Names are found where they live, and imported when first used: asking for help needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
