"""JSON into frozen dataclasses, strictly: every key known, every value of the type that the field says."""

import json
import math
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from . import StrategyError

T = TypeVar("T")
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def parse(text: str, kind: type[T], what: str) -> T:
    """Raises StrategyError, one sentence that names the place, for what is no JSON of that kind."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        data = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StrategyError(f"{what} is not JSON: {error}") from error
    return build(data, kind, what)


def build(data: Any, kind: Any, place: str) -> Any:
    """`data` as a `kind`: a dataclass, bool, int, float, str, None, a union of those, tuple[X, ...], tuple[X, Y], dict[str, X] or
    Any."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        if data is None and type(None) in parts:
            return None
        [only] = [part for part in parts if part is not type(None)]
        return build(data, only, place)
    if is_dataclass(kind):
        return _record(data, kind, place)
    if origin is tuple:
        if not isinstance(data, list) or (parts[-1] is not ... and len(data) != len(parts)):
            raise StrategyError(f"{place} is {_shown(data)}, not a list" + ("" if parts[-1] is ... else f" of {len(parts)}"))
        kinds = parts[:1] * len(data) if parts[-1] is ... else parts
        return tuple(build(value, part, f"{place}[{i}]") for i, (value, part) in enumerate(zip(data, kinds, strict=True)))
    if origin is dict:
        if not isinstance(data, dict):
            raise StrategyError(f"{place} is {_shown(data)}, not an object")
        return {key: build(value, parts[1], f"{place}.{key:.40}") for key, value in data.items()}
    taken = (int, float) if kind is float else kind
    if not isinstance(data, taken) or (isinstance(data, bool) and kind is not bool) or not _finite(data):
        raise StrategyError(f"{place} is {_shown(data)}, not {NAMES[kind]}")
    return kind(data)


def _record(data: Any, kind: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise StrategyError(f"{place} is {_shown(data)}, not an object")
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    for key in data:
        if key not in known:
            raise StrategyError(f"{place} has the key {key!r:.40}, which is unknown; known: {', '.join(known)}")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise StrategyError(f"{place} lacks {name}")
    values = {name: build(value, hints[name], f"{place}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except StrategyError as error:
        raise StrategyError(f"{place}: {error}") from error


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _shown(data: Any) -> str:
    return f"{json.dumps(data, ensure_ascii=False):.60}"
