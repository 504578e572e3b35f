"""Settings from the command line and from TOML."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest

from agl_bench.errors import BadPlugin, BadSpec, UnknownName
from agl_bench.interfaces.tunable import LogRange, Range, Tunable, resolve, tunable, tunables

RATE = Annotated[float | Literal["backbone"], LogRange(1e-7, 10)]


def parse(annotation: Any, value: object) -> object:
    return tunable("x", annotation, None).parse(value, owner="plug")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (bool, "true", True),
        (bool, "False", False),
        (bool, True, True),
        (int, "12", 12),
        (int, 12, 12),
        (int, "1e3", 1000),
        (int, 5.0, 5),
        (int, "-3", -3),
        (int, "9007199254740993", 2**53 + 1),  # beyond what a float can hold
        (int, 9007199254740993, 2**53 + 1),
        (float, "0.25", 0.25),
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (float, 2.5, 2.5),
        (str, "imagenet", "imagenet"),
        (str, "", ""),
        (str, "a=b,c", "a=b,c"),
        (str, 5, "5"),
        (tuple[str, ...], "a, b,,c ", ("a", "b", "c")),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[str, ...], ("a",), ("a",)),
        (tuple[str, ...], "", ()),
        (tuple[str, ...], [], ()),
        (Literal["sgd", "adam"], "adam", "adam"),
        (Literal[1, 2], "2", 2),
        (RATE, "backbone", "backbone"),
        (RATE, "3e-5", 3e-5),
        (RATE, 1, 1.0),
        (int | float, "2", 2),
        (int | float, "2.5", 2.5),
        (Annotated[int, Range(1, 12)], "12", 12),
        (Annotated[int, Range(1, 12)], 1, 1),
    ],
)
def test_parses(annotation: Any, value: object, expected: object) -> None:
    parsed = parse(annotation, value)
    assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (bool, "yes"),
        (bool, 1),
        (bool, ""),
        (int, "2.5"),
        (int, 2.5),
        (int, "many"),
        (int, ""),
        (int, True),
        (int, "nan"),
        (int, "inf"),
        (int, [1]),
        (float, "fast"),
        (float, False),
        (float, "0.1,0.2"),
        (str, True),
        (str, ["a"]),  # TOML
        (str, {"a": 1}),
        (tuple[str, ...], 5),
        (tuple[str, ...], True),
        (Literal["sgd", "adam"], "Adam"),
        (Literal["sgd", "adam"], "momentum"),
        (RATE, "backbones"),
        (RATE, True),
        (RATE, "11"),
        (RATE, 0),
        (RATE, "nan"),
        (RATE, math.inf),
        (Annotated[int, Range(1, 12)], "13"),
        (Annotated[int, Range(1, 12)], 0),
        (Annotated[int, Range(1, 12)], "1" * 400),  # no float holds it
        (Annotated[float, Range(0, math.inf)], "inf"),
        (Annotated[float, Range(0, 1)], "1.0000001"),
        (Annotated[float, Range(0, 1)], "nan"),
    ],
)
def test_refuses(annotation: Any, value: object) -> None:
    with pytest.raises(BadSpec, match=r"plug\.x = .* is not allowed; it takes \w+"):
        parse(annotation, value)


def test_a_refusal_says_what_is_allowed() -> None:
    with pytest.raises(BadSpec, match=r"plug\.x = '13' is not allowed; it takes a whole number in 1 … 12$"):
        parse(Annotated[int, Range(1, 12)], "13")
    with pytest.raises(BadSpec, match=r"it takes a number or backbone in 1e-07 … 10 \(log\)$"):
        parse(RATE, "x")
    with pytest.raises(BadSpec, match=r"it takes sgd \| adam$"):
        parse(Literal["sgd", "adam"], "x")
    with pytest.raises(BadSpec, match=r"it takes true \| false$"):
        parse(bool, "x")


class Plug:
    def __init__(
        self,
        view: object,
        also: int = 3,
        *,
        temperature: Annotated[float, LogRange(1e-3, 1)] = 0.01,
        k: Annotated[int, Range(1, 9)] = 5,
        inner: Literal["sgd", "adam"] = "sgd",
        names: tuple[str, ...] = (),
    ) -> None: ...


def test_tunables_are_the_keyword_only_arguments_in_order() -> None:
    found = tunables(Plug)
    assert list(found) == ["temperature", "k", "inner", "names"]
    assert found["temperature"] == Tunable("temperature", float, 0.01, Range(1e-3, 1, log=True))
    assert found["inner"].range is None and found["k"].range == Range(1, 9)


def test_nothing_to_set() -> None:
    class Bare: ...

    class Silent:
        def __init__(self, view: object) -> None: ...

    assert tunables(Bare) == tunables(Silent) == {}


def test_a_subclass_with_its_own_arguments_hides_those_of_its_base() -> None:
    class Child(Plug):
        def __init__(self, view: object, *, depth: int = 1) -> None: ...

    class Heir(Plug): ...

    assert list(tunables(Child)) == ["depth"] and tunables(Heir) == tunables(Plug)


def test_bad_plugins_are_named() -> None:
    class Outside:
        def __init__(self, *, k: Annotated[int, Range(1, 9)] = 10) -> None: ...

    class WrongType:
        def __init__(self, *, k: int = "many") -> None: ...  # type: ignore[assignment]

    class WrongChoice:
        def __init__(self, *, k: Literal["a"] = "b") -> None: ...  # type: ignore[assignment]

    class NoDefault:
        def __init__(self, *, k: int) -> None: ...

    class NoAnnotation:
        def __init__(self, *, k=1) -> None: ...

    class Unsupported:
        def __init__(self, *, k: dict[str, int] = {}) -> None: ...  # noqa: B006

    for cls, sentence in (
        (Outside, r"default outside its own range: Outside\.k = 10"),
        (WrongType, r"WrongType\.k = 'many'"),
        (WrongChoice, r"WrongChoice\.k = 'b'"),
        (NoDefault, "NoDefault: keyword argument 'k' needs"),
        (NoAnnotation, "NoAnnotation: keyword argument 'k' needs"),
        (Unsupported, "is not supported"),
    ):
        with pytest.raises(BadPlugin, match=sentence):
            tunables(cls)


def test_resolve_fills_in_defaults_and_parses_the_given() -> None:
    assert resolve("plug", tunables(Plug), {"k": "7", "names": "a,b"}) == {
        "temperature": 0.01,
        "k": 7,
        "inner": "sgd",
        "names": ("a", "b"),
    }


def test_an_unknown_key_gets_a_suggestion() -> None:
    with pytest.raises(
        UnknownName, match=r"unknown setting of plug 'temprature'. Did you mean 'temperature'\? Known: "
    ):
        resolve("plug", tunables(Plug), {"temprature": 1})
