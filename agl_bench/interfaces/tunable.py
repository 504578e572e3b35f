"""One annotated line holds a setting's name, type, default and range; everything that needs them reads that line.

    def __init__(self, view, *, temperature: Annotated[float, LogRange(1e-3, 1e-1)] = 0.01): ...

The command line (`--set dkgsb.temperature=0.02`), `agl-bench show`, configuration files, the protocol and tuning all
go through this module.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from agl_bench.errors import BadPlugin, BadSpec, UnknownName

Value = bool | int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Closed interval of numbers; `log` says that tuning should search it on a logarithmic scale."""

    low: float
    high: float
    log: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} … {self.high:g}{' (log)' if self.log else ''}"


def LogRange(low: float, high: float) -> Range:
    """Closed interval searched on a logarithmic scale."""
    return Range(low, high, log=True)


@dataclass(frozen=True)
class Tunable:
    """A setting of a plug-in or of the protocol."""

    name: str
    kind: Any  # bool, int, float, str, tuple[str, ...], Literal[...] or a union of these
    default: Value
    range: Range | None = None

    def parse(self, value: object, *, owner: str) -> Value:
        """Convert text or a TOML value to this setting's type and check its range.

        Raises:
            BadSpec: with the field, the value and what is allowed.
        """
        parsed = _convert(self.kind, value)
        number = isinstance(parsed, int | float) and not isinstance(parsed, bool)
        inside = not number or self.range is None or (abs(parsed) != math.inf and parsed in self.range)  # type: ignore[arg-type, operator]
        if parsed is None or not inside:
            raise BadSpec(f"{owner}.{self.name} = {value!r} is not allowed; it takes {self.allowed()}")
        return parsed

    def allowed(self) -> str:
        """What the setting takes, for people."""
        return _describe(self.kind) + (f" in {self.range}" if self.range else "")


def tunables(cls: type) -> dict[str, Tunable]:
    """The keyword-only arguments of `cls.__init__`, in order.

    Raises:
        BadPlugin: if one of them has no default, no annotation, or a default outside its own range.
    """
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    hints = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    found = {}
    for parameter in inspect.signature(cls.__init__).parameters.values():  # type: ignore[misc]
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.default is inspect.Parameter.empty or parameter.name not in hints:
            raise BadPlugin(
                f"{cls.__name__}: keyword argument '{parameter.name}' needs a type annotation and a default"
            )
        found[parameter.name] = tunable(parameter.name, hints[parameter.name], parameter.default)
        try:
            found[parameter.name].parse(parameter.default, owner=cls.__name__)
        except BadSpec as error:
            raise BadPlugin(f"default outside its own range: {error}") from None
    return found


def tunable(name: str, annotation: Any, default: Value) -> Tunable:
    """Read one annotation, `Annotated[type, Range]` or a bare type."""
    if typing.get_origin(annotation) is Annotated:
        kind, *notes = typing.get_args(annotation)
        limits = next((note for note in notes if isinstance(note, Range)), None)
        return Tunable(name, kind, default, limits)
    return Tunable(name, annotation, default)


def resolve(owner: str, known: Mapping[str, Tunable], given: Mapping[str, object]) -> dict[str, Value]:
    """All settings of `owner`: the given ones parsed and checked, the others at their defaults.

    Raises:
        UnknownName: for a key that `owner` does not have, with the nearest one.
        BadSpec: for a value outside its range.
    """
    for key in given:
        if key not in known:
            raise UnknownName(f"setting of {owner}", key, known)
    return {name: entry.parse(given.get(name, entry.default), owner=owner) for name, entry in known.items()}


def _convert(kind: Any, value: object) -> Value | None:
    """`value` as `kind`, or None where it does not fit."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return next((v for v in (_convert(k, value) for k in typing.get_args(kind)) if v is not None), None)
    if origin is Literal:
        return next((option for option in typing.get_args(kind) if str(option) == str(value)), None)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        return (
            tuple(str(item).strip() for item in items if str(item).strip()) if isinstance(items, list | tuple) else None
        )
    if kind is bool:
        return {"true": True, "false": False}.get(str(value).lower())
    if isinstance(value, bool):
        return None
    if kind is str:
        return str(value) if isinstance(value, str | int | float) else None
    try:
        if kind is int:
            return int(str(value)) if str(value).lstrip("+-").isdecimal() else _whole(float(str(value)))
        if kind is float:
            return float(str(value))
    except (ValueError, OverflowError):
        return None
    raise BadPlugin(f"a setting of type {kind} is not supported; use bool, int, float, str, tuple[str, ...] or Literal")


def _whole(number: float) -> int | None:
    """2.0 and 1e4 are whole numbers too."""
    return int(number) if number.is_integer() else None


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    if origin is Literal:
        return " | ".join(str(option) for option in typing.get_args(kind))
    if origin is tuple:
        return "a comma-separated list"
    return {bool: "true | false", int: "a whole number", float: "a number", str: "text"}[kind]
