"""What a plug-in says of itself: settings that can be drawn at random, and where it is from."""

from __future__ import annotations

import inspect
import math
import types
import typing
from typing import Any, Literal, Union

import numpy as np

from agl_bench.interfaces.tunable import Range, Tunable, Value, tunables

UNFINISHED = ("todo", "fixme", "xxx", "...", "tbd")


def check_settings(cls: type) -> None:
    """Raises `BadPlugin` or `AssertionError` for a setting that cannot be given, shown or tuned."""
    for parameter in inspect.signature(cls.__init__).parameters.values() if "__init__" in vars(cls) else ():  # type: ignore[misc]
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), (
            f"*{parameter.name} hides which settings there are; write each as a keyword-only argument"
        )
        is_setting = parameter.default is not parameter.empty
        assert not is_setting or parameter.kind is parameter.KEYWORD_ONLY, (
            f"{parameter.name} is not keyword-only, so that --set does not know it; put a * before it"
        )
    for tunable in tunables(cls).values():
        limits, numbers = tunable.range, {int, float} & set(_kinds(tunable.kind))
        if limits is None:
            continue
        assert numbers, f"{tunable.name} has a range and is no number, but {tunable.allowed()}"
        assert limits.low < limits.high, f"the range of {tunable.name}, {limits}, is empty"
        assert math.isfinite(limits.high - limits.low), f"the range of {tunable.name}, {limits}, has an end at infinity"
        assert not limits.log or limits.low > 0, (
            f"the range of {tunable.name}, {limits}, is logarithmic and not above 0"
        )


def check_metadata(cls: type) -> None:
    """Raises `AssertionError` for a class that does not say what it is and where it is from."""
    reference = getattr(cls, "reference", None)
    assert isinstance(reference, str), f"reference is {reference!r}, not a text"
    assert reference.strip(), "reference is empty; name the publication, or whose idea it is"
    summary = (inspect.cleandoc(cls.__doc__) if cls.__doc__ else "").partition("\n")[0].strip()
    assert summary, "the class has no docstring; its first line is shown by agl-bench list"
    for name, text in (("reference", reference), ("the docstring", summary)):
        words = text.lower().replace(":", " ").split()
        assert not words or words[0] not in UNFINISHED, f"{name} is unfinished: {text!r}"


def ends(tunable: Tunable) -> list[Value]:
    """Both ends of a number's range, all choices of a choice; the default of what has neither."""
    found: list[Value] = []
    for kind in _kinds(tunable.kind):
        if kind is bool:
            found += [False, True]
        elif typing.get_origin(kind) is Literal:
            found += list(typing.get_args(kind))
        elif kind in (int, float) and tunable.range is not None:
            found += [kind(tunable.range.low), kind(tunable.range.high)]
    return found or [tunable.default]


def draw(tunable: Tunable, rng: np.random.Generator) -> Value:
    """A random value: uniform, or uniform in the logarithm; the default of what has neither range nor choices."""
    kinds = _kinds(tunable.kind)
    kind = kinds[rng.integers(len(kinds))]
    if kind is bool:
        return bool(rng.integers(2))
    if typing.get_origin(kind) is Literal:
        options: tuple[Value, ...] = typing.get_args(kind)
        return options[rng.integers(len(options))]
    if kind in (int, float) and tunable.range is not None:
        return _number(kind, tunable.range, rng)
    return tunable.default


def _number(kind: type, limits: Range, rng: np.random.Generator) -> Value:
    if limits.log:
        value = math.exp(rng.uniform(math.log(limits.low), math.log(limits.high)))
    else:
        value = rng.uniform(limits.low, limits.high)
    value = min(max(value, limits.low), limits.high)
    return min(max(round(value), math.ceil(limits.low)), math.floor(limits.high)) if kind is int else value


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The parts of a union, or the one kind."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
