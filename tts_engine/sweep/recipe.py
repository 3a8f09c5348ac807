"""A recipe: which policies, PRMs, methods and budgets a sweep crosses, over which problems, in what engine. A YAML file, typed.

    task: math500                  # or embedded, aime24, amc23, or the path of a JSONL file
    split: test
    limit: 100                     # only the first problems; left out: all
    seed: 0
    policies: [policy-s, policy-m] # embedded models, directories, hub ids
    prms: [prm-good, prm-poor]     # each beside every policy
    pilot: {n: 64, seed: 1}        # also draws that no method uses, which tell how hard the problems are; left out: none
    methods:
      - name: cot
      - {name: majority, n: [1, 4, 16, 64]}
      - {name: majority, n: 256, policies: [policy-s]}   # for some of them only
      - {name: beam, n: [4, 16], width: 4, rules: paper}
      - {name: auto, n: [4, 16], strategy: strategy.json}
    engine: {kv_bytes: 1G, deterministic: true}
    estimate: {solution_tokens: 400}

Of these task, policies and methods must be there. A method takes every setting that `eval` has for it. Nothing unknown is passed
over.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..config import EngineConfig
from ..embedded import BLOCK_SIZE, NAMES
from ..errors import EngineError
from ..kv.budget import read_bytes
from ..search import METHODS, Method, MethodError, Rules, make_method
from ..strategy import StrategyError
from ..strategy.typed import NAMES as NAMED
from ..strategy.typed import build, parse

AUTO = "auto"
LARGEST = 1 << 20  # bytes of a recipe


class RecipeError(EngineError):
    """A recipe that cannot be used; the sentence names the place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a dry run takes for granted of the policies' text and of the machine; see estimate.py. Tokens are means.

    problems: how many there are, where the task itself cannot be had. utilisation: the share of peak_flops that products reach, and
    of bandwidth that reading weights, keys and values does; both are of one GPU.
    """

    problems: int | None = None
    prompt_tokens: int = 150
    solution_tokens: int = 400
    step_tokens: int = 50
    utilisation: float = 0.5
    peak_flops: float = 790e12
    bandwidth: float = 4.3e12
    memory_bytes: float = 141e9

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value <= 0:
                raise StrategyError(f"{each.name}={value} must be above 0")
        if self.utilisation > 1:
            raise StrategyError(f"utilisation={self.utilisation} must be at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotEntry:
    """So many draws a problem, with a seed of their own; temperature: None for the rules'."""

    n: int
    seed: int
    temperature: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoEntry:
    """A strategy's choice at budget n; resolved for a policy and a PRM once these are there."""

    strategy: str
    n: int
    name: str = AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """As a file has it, checked; `methods` are its entries, each at every n of its own."""

    task: str
    split: str = "test"
    limit: int | None = None
    seed: int = 0
    policies: tuple[str, ...]
    prms: tuple[str, ...] = ()
    pilot: PilotEntry | None = None
    methods: tuple[dict[str, Any], ...]
    engine: dict[str, Any] = field(default_factory=dict)
    estimate: Estimate = field(default_factory=Estimate)

    def __post_init__(self) -> None:
        for name in ("policies", "methods"):
            if not getattr(self, name):
                raise StrategyError(f"{name} is empty")
        for name in ("policies", "prms"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise StrategyError(f"{name} names one model twice")
        if self.limit is not None and self.limit < 1:
            raise StrategyError(f"limit={self.limit} must be at least 1")
        object.__setattr__(self, "engine", _engine_settings(self.engine))
        _ = self.config
        if self.pilot is not None:
            if self.pilot.seed == self.seed:
                raise StrategyError(f"pilot.seed={self.seed} is the methods' seed: a pilot has draws of its own")
            _ = self.pilot_method
        for policy in self.policies:
            self._check_entries(self.entries_of(policy), policy)

    def _check_entries(self, methods: Sequence[Method | AutoEntry], policy: str) -> None:
        if not methods:
            raise StrategyError(f"no method is for {policy}")
        seen = set[Method | AutoEntry]()
        for method in methods:
            if method in seen:
                raise StrategyError(f"methods has {method.name} n={method.n} with the same settings twice for {policy}")
            seen.add(method)
            if not self.prms and not isinstance(method, AutoEntry) and method.uses_prm:
                raise StrategyError(f"{method.name} needs a PRM, and prms is empty")

    @property
    def config(self) -> EngineConfig:
        """Of every engine of the sweep."""
        settings = dict(self.engine)
        if set(self.policies) & set(NAMES):
            settings.setdefault("block_size", BLOCK_SIZE)
        try:
            return EngineConfig(**settings)
        except EngineError as error:
            raise StrategyError(f"engine: {error}") from error

    @property
    def pilot_method(self) -> Method | None:
        """None where the recipe has no pilot."""
        if self.pilot is None:
            return None
        drawn = {} if self.pilot.temperature is None else {"temperature": self.pilot.temperature}
        try:
            return make_method("majority", n=self.pilot.n, **drawn)
        except MethodError as error:
            raise StrategyError(f"pilot: {error}") from error

    def entries_of(self, policy: str) -> list[Method | AutoEntry]:
        """All methods for that policy, each at one n, in the file's order."""
        found = list[Method | AutoEntry]()
        for i, entry in enumerate(self.methods):
            own = dict(entry)
            for_ = build(own.pop("policies", list(self.policies)), tuple[str, ...], f"methods[{i}].policies")
            for name in for_:
                if name not in self.policies:
                    raise StrategyError(f"methods[{i}].policies names {name!r:.80}, which is none of policies")
            methods = _at_every_n(own, f"methods[{i}]")
            found += methods if policy in for_ else []
        return found


def load_recipe(file: Path) -> Recipe:
    """Raises RecipeError, one sentence that names the place, for a file that is none."""
    try:
        with Path(file).open("rb") as opened:
            text = opened.read(LARGEST + 1)
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}") from error
    if len(text) > LARGEST:
        raise RecipeError(f"{file} is no recipe: it is longer than {LARGEST >> 20} MiB")
    try:
        data = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{file}{where} is not YAML: {getattr(error, 'problem', None) or error}") from error
    return recipe_of(data, str(file))


def recipe_of(data: Any, place: str) -> Recipe:
    """A recipe from plain data, as YAML or JSON has it. Raises RecipeError."""
    try:
        return parse(json.dumps(data), Recipe, place)  # JSON has neither dates nor sets, and every key is a text
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{place} holds what no recipe has: {error}") from error
    except StrategyError as error:
        raise RecipeError(str(error)) from error


class _Loader(yaml.SafeLoader):
    """Plain data; a key that stands there twice is refused, where YAML's own loader would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set[str]()
        for key, _ in node.value:
            name = str(key.value)
            if name in keys:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r:.40} stands there twice", key.start_mark)
            keys.add(name)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a page of them can stand for more than any memory holds
            raise yaml.composer.ComposerError(None, None, "an alias, which no recipe has", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _engine_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """EngineConfig's, each of its type. Raises StrategyError for one that is none."""
    hints, known = get_type_hints(EngineConfig), [each.name for each in fields(EngineConfig)]
    settings = {}
    for name, value in given.items():
        if name not in hints:
            raise StrategyError(f"engine has the key {name!r:.40}, which is unknown; known: {', '.join(known)}")
        if name == "kv_bytes" and isinstance(value, str):
            try:
                value = read_bytes(value)
            except ValueError:
                raise StrategyError(f"engine.kv_bytes is {value!r:.40}, not a number of bytes such as 512M or 4G") from None
        kind = hints[name] if name != "memory" else int if isinstance(value, int) else str
        settings[name] = build(value, kind, f"engine.{name}")
    return settings


def _at_every_n(entry: Mapping[str, Any], place: str) -> list[Method | AutoEntry]:
    settings = dict(entry)
    name = build(settings.pop("name", None), str, f"{place}.name")
    budgets = settings.pop("n", None)
    if name == AUTO:
        if list(settings) != ["strategy"] or budgets is None:
            raise StrategyError(f"{place}: {AUTO} takes a strategy and n, and nothing else: the strategy has its settings")
        strategy = build(settings["strategy"], str, f"{place}.strategy")
        return [AutoEntry(strategy=strategy, n=n) for n in _budgets(budgets, place)]
    kinds = (get_type_hints(METHODS[name]) if name in METHODS else {}) | get_type_hints(Rules) | {"rules": str}
    for key, value in settings.items():
        if kinds.get(key) in NAMED:
            settings[key] = build(value, kinds[key], f"{place}.{key}")
    several = [{"n": n} for n in _budgets(budgets, place)] if budgets is not None else [{}]
    try:
        return [make_method(name, **settings | at) for at in several]
    except MethodError as error:
        raise StrategyError(f"{place}: {error}") from error


def _budgets(given: Any, place: str) -> tuple[int, ...]:
    found: tuple[int, ...] = build(given if isinstance(given, list) else [given], tuple[int, ...], f"{place}.n")
    if not found:
        raise StrategyError(f"{place}.n is empty")
    return found
