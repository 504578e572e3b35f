"""What a rule says of a plug-in, and what all contracts share.

    kept       the rule holds
    broken     it does not: what, which, what instead
    known      it does not, and the plug-in says so itself
    skipped    it cannot be said here, or not of this plug-in: why

A rule is a method `test_…` of a contract, whose docstring is the rule. `agl-bench check` and pytest run the same
methods.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch

from agl_bench.errors import AglBenchError, BadPlugin, UnknownName
from agl_bench.registry.watch import watched

Outcome = Literal["kept", "broken", "known", "skipped"]
PAGE = "docs/rules.md"  # a heading for each rule
PREFIX = "test_"


class Skip(unittest.SkipTest):
    """A rule that says nothing of this plug-in, or nothing on this machine; pytest knows it too."""


class Unavailable(Skip):
    """What this rule and those that build upon it need is not here: a GPU, data, a rule that is kept."""


@dataclass(frozen=True)
class Verdict:
    """One rule and how a plug-in stands to it.

    Attributes:
        name: of the rule, e.g. "forward_is_pure".
        rule: what it says, one sentence.
        outcome: see the module.
        reason: why, if it is not plainly kept; one sentence.
        docs: the paragraph that says why there is such a rule, and how to mend what breaks it.
    """

    name: str
    rule: str
    outcome: Outcome
    reason: str = ""
    docs: str = ""

    @property
    def problem(self) -> str | None:
        """What is wrong; None if nothing is, or nothing that the plug-in does not say itself."""
        return self.reason if self.outcome == "broken" else None

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return dict(vars(self))


def rule(*, needs: Sequence[str] = ()) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """A method as a rule: it runs with global generators that nobody else has drawn from, and the process is after it
    what it was before.

    Args:
        needs: rules without which this one would say nothing, or the same once more; where one of them is broken, this
            one is skipped.
    """

    def wrap(method: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(method)
        def run(contract: Contract) -> None:
            contract.demand(needs)
            with watched(is_import=False) as seen, repeatable():
                method(contract)
            sys.stderr.write(seen.printed)

        return run

    return wrap


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """The global generators start from the same numbers inside, and are outside what they were."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (it is what is guarded)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002


class Contract:
    """The rules of a door.

    Attributes:
        door: "selector", "backbone" or "dataset".
        broken: rules that the plug-in is known to break, each with the reason: {"test_forward_is_pure": "it …"}. The
            plug-in's class may have an attribute of that name too. They are strict expected failures: one that is kept
            after all fails.
    """

    door: ClassVar[str] = ""
    broken: ClassVar[Mapping[str, str]] = {}
    _met: ClassVar[dict[str, str]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._met = {}
        if cls.door:
            cls._mark_expected()

    @classmethod
    def _mark_expected(cls) -> None:
        """Rules that are known to be broken are strict expected failures, where pytest is at work."""
        pytest = sys.modules.get("pytest")
        for name, reason in cls.known().items():
            if pytest is not None:
                setattr(cls, name, pytest.mark.xfail(reason=reason, strict=True)(_expected(cls._method(name))))

    @classmethod
    def _method(cls, name: str) -> Callable[[Any], None]:
        """A rule without its mark."""
        method = getattr(cls, name)
        plain: Callable[[Any], None] = getattr(method, "plain", method)
        return plain

    @classmethod
    def plugin(cls) -> object:
        """The class under test, or the instance; None in a contract that is not about any."""
        return getattr(cls, cls.door, None)

    @classmethod
    def known(cls) -> dict[str, str]:
        """Rules that are known to be broken, with the reason.

        Raises:
            BadPlugin: if there is no such rule, or no reason.
        """
        declared = {**getattr(cls.plugin(), "broken", {}), **cls.broken}
        names = {PREFIX + name for name in cls.rules()}
        for name, reason in declared.items():
            if name not in names:
                error = UnknownName("rule", name, names)
                raise BadPlugin(f"{cls.__name__}: `broken` names what is no rule: {error}")
            if not isinstance(reason, str) or not reason:
                raise BadPlugin(f"{cls.__name__}: `broken` gives no reason for {name}; write why, in one sentence")
        return declared

    @classmethod
    def rules(cls) -> tuple[str, ...]:
        """Names of the rules, in order; for `pytest.mark.parametrize` as well."""
        names = (name for base in reversed(cls.__mro__) for name in vars(base) if name.startswith(PREFIX))
        return tuple(dict.fromkeys(name.removeprefix(PREFIX) for name in names))

    @classmethod
    def of(cls, plugin: object, **attributes: object) -> Self:
        """A contract about a plug-in, without writing a class.

        Args:
            plugin: what the attribute named like the door is to be: the class, or of a dataset the instance.
            **attributes: further ones, e.g. `settings`.
        """
        made: type[Self] = type(f"{cls.__name__}Of", (cls,), {cls.door: plugin, **attributes})
        return made()

    def check(self, name: str) -> Verdict:
        """The verdict of one rule.

        Raises:
            UnknownName: if there is no such rule.
        """
        if name not in self.rules():
            raise UnknownName(f"rule of a {self.door}", name, self.rules())
        method = self._method(PREFIX + name)
        text = " ".join((inspect.getdoc(method) or name).split())
        docs = f"{PAGE}#{anchor(self.door, name)}"
        reason = self.known().get(PREFIX + name)
        try:
            problem = _problem(functools.partial(method, self))
        except Skip as skip:
            return Verdict(name, text, "skipped", str(skip), docs)
        if reason is None:
            return Verdict(name, text, "kept" if problem is None else "broken", problem or "", docs)
        if problem is None:
            kept = f"it is declared as broken ({reason}) and yet kept: take it out of `broken`"
            return Verdict(name, text, "broken", kept, docs)
        return Verdict(name, text, "known", f"{reason} ({problem})", docs)

    def verdicts(self, only: Iterable[str] = ()) -> Iterator[Verdict]:
        """The verdicts of all rules, or of `only` some, each when it is known.

        Raises:
            UnknownName: if there is no such rule.
        """
        wanted = [name.removeprefix(PREFIX) for name in only]
        for name in wanted:
            if name not in self.rules():
                raise UnknownName(f"rule of a {self.door}", name, self.rules())
        return (self.check(name) for name in self.rules() if not wanted or name in wanted)

    def demand(self, rules: Sequence[str]) -> None:
        """Look at rules that others build upon, once for each class of contract.

        Raises:
            Unavailable: if one of them is broken, or cannot be looked at.
        """
        for name in rules:
            if name not in self._met:
                try:
                    is_kept = _problem(functools.partial(self._method(PREFIX + name), self)) is None
                    self._met[name] = "" if is_kept else f"not looked at, since it breaks the rule {name}"
                except Unavailable as why:
                    self._met[name] = str(why)
                except Skip:
                    self._met[name] = ""  # it has nothing to say, and nothing against the rules that come after it
            if self._met[name]:
                raise Unavailable(self._met[name])


def anchor(door: str, name: str) -> str:
    """The anchor of a rule's heading."""
    return f"{door}-{name}".replace("_", "-")


def listed(names: Iterable[str], most: int = 3) -> str:
    """Some names, for a sentence."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def _expected(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """A function of its own for a mark, so that the mark stays with one class."""

    @functools.wraps(method)
    def expected(contract: Contract) -> None:
        method(contract)

    vars(expected)["plain"] = method
    return expected


def _problem(method: Callable[[], None]) -> str | None:
    """What is wrong, one line; None if nothing is."""
    try:
        method()
    except Skip:
        raise
    except AssertionError as error:
        return str(error).partition("\n")[0] or "not kept"
    except AglBenchError as error:
        return " ".join(str(error).split())
    except Exception as error:  # noqa: BLE001  (the plug-in under test may raise anything)
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None
