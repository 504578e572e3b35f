"""The door for datasets: a named source of sections."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from agl_bench.interfaces.spots import Section


def is_offline(*names: str) -> str:
    """Which environment variable forbids downloads, `AGL_BENCH_OFFLINE` or one of `names`; "" if none does."""
    on = ("1", "true", "yes", "on")
    return next((n for n in ("AGL_BENCH_OFFLINE", *names) if os.environ.get(n, "").strip().lower() in on), "")


class Dataset(ABC):
    """Knows where its sections are and how to read them; nothing is read until `read`, one section at a time.

    Settings are keyword-only arguments of `__init__` with their range in the annotation. `root` is always the data
    folder (`AGL_BENCH_DATA`).

    Attributes:
        citation: how to cite the data.
        licence: under which terms it may be used.
        revision: version of the data, part of every result.
        technology: with which the sections were measured, for the card.
        tissue: what they are of, for the card.
        argument: the setting that VALUE of `--datasets NAME:VALUE` is short for; "" = there is none.
        has_counts: whether X holds raw counts, as it should. False, on the class or on the instance, where the
            publishers give values that are normalised already: they need not be whole numbers, are taken as they are
            (`protocol.normalisation = "none"`), and what needs counts is skipped or refused.
        broken: rules of the door that it breaks on purpose, see `Selector`.
    """

    citation: str = ""
    licence: str = ""
    revision: str = ""
    technology: str = ""
    tissue: str = ""
    argument: str = ""
    has_counts: bool = True
    broken: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def sections(self, root: Path) -> dict[str, str]:
        """Names of the sections, in order, each with its donor ("" = not known). Cheap: reads no counts.

        Raises:
            MissingData: which file is absent and which command brings it.
        """

    def names(self, root: Path) -> list[str]:
        """Names of the sections, in order. Override it where `sections` opens files, so that a damaged one is named
        by `read` and does not hide the others.

        Raises:
            MissingData: where the sections are not even listed.
        """
        return list(self.sections(root))

    @abstractmethod
    def read(self, root: Path, name: str) -> Section:
        """One section with raw counts, no filter, no normalisation (but see `has_counts`).

        Raises:
            MissingData: which file is absent and which command brings it.
            BadSection: which section cannot be read and why.
        """

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the file or folder `path` is laid out as this dataset reads it. Looks at names only, opens nothing.

        False by default: data that are not the user's own are named, not pointed at.
        """
        return False

    @classmethod
    def settings_at(cls, path: Path) -> dict[str, object]:
        """The settings that make an instance read `path`, an absolute path that `recognises` has said yes to."""
        return {cls.argument: str(path)}

    def load(self, root: Path) -> list[Section]:
        """All sections, in order."""
        return [self.read(root, name) for name in self.sections(root)]

    def files(self, root: Path, name: str) -> list[Path]:
        """Every file that `read` looks at; their content makes the fingerprint. Empty for generated data.

        A section is prepared anew when one of them changes, and not otherwise.
        """
        return []

    def truth(self, root: Path) -> Mapping[str, float] | None:
        """For planted data: what each gene is worth as an auxiliary one, > 0 helpful, < 0 harmful; else None.

        It reaches the selectors that say `is_control`, and what is computed after a test; nothing else.
        """
        return None

    def fetch(self, root: Path) -> None:  # noqa: B027  (optional)
        """Download what is not there yet, once, checked. Nothing to do by default.

        Raises:
            FetchFailed: with what the user has to do.
        """
