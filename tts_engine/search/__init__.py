"""Search methods: what to draw, what to score, what to keep. No tensors, no models, no batches; imports no torch.

A new method is one file and one line in METHODS.
"""

from dataclasses import MISSING, fields
from typing import Any, ClassVar, Protocol

from ..branch import Branch
from .adaptive import Adaptive
from .beam_search import BeamSearch
from .best_of_n import BestOfN, Cot, Majority
from .driver import Ask, Draw, Driver
from .dvts import Dvts
from .rebase import Rebase
from .requests import Program
from .rules import PAPER, PRESETS, REFERENCE, SAL, MethodError, Rules, make_rules

__all__ = [
    "METHODS",
    "PAPER",
    "PRESETS",
    "REFERENCE",
    "SAL",
    "Adaptive",
    "Ask",
    "BeamSearch",
    "BestOfN",
    "Cot",
    "Draw",
    "Driver",
    "Dvts",
    "Majority",
    "Method",
    "MethodError",
    "Rebase",
    "Rules",
    "make_method",
    "make_rules",
]


class Method(Protocol):
    """A frozen dataclass of settings that can start a search."""

    name: ClassVar[str]

    @property
    def uses_prm(self) -> bool: ...

    @property
    def vote(self) -> str:
        """Which choice among the branches is the answer, one of voting.CHOICES."""

    @property
    def n(self) -> int: ...

    @property
    def rules(self) -> Rules: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    def program(self, root: Branch) -> Program:
        """A search of one problem; the branches it returns are the ones to vote on."""


METHODS: dict[str, type[Any]] = {
    "cot": Cot,
    "majority": Majority,
    "best_of_n": BestOfN,
    "beam": BeamSearch,
    "dvts": Dvts,
    "rebase": Rebase,
    "adaptive": Adaptive,
}


def make_method(name: str, **settings: Any) -> Method:
    """A method by its name. `rules` may be a preset's name, and any single rule may be set beside it:

    >>> make_method("beam", n=16, rules="sal", temperature=0.6).temperature
    0.6

    Raises MethodError, one sentence, for an unknown method, an unknown or missing setting, or a bad value.
    """
    if name not in METHODS:
        raise MethodError(f"no method {name!r}; known: {', '.join(METHODS)}")
    own = {field.name: field for field in fields(METHODS[name])}
    of_rules = [field.name for field in fields(Rules)] if "rules" in own else []
    for setting in settings:
        if setting not in own and setting not in of_rules:
            raise MethodError(f"{name} has no setting {setting!r}; known: {', '.join([*own, *of_rules])}")
    for setting, field in own.items():
        if field.default is MISSING and setting not in settings:
            raise MethodError(f"{name} needs {setting}")
    changes = {setting: settings.pop(setting) for setting in of_rules if setting in settings}
    if "rules" in own:
        settings["rules"] = make_rules(settings.get("rules", "paper"), **changes)
    method: Method = METHODS[name](**settings)
    return method
