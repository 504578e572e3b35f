"""The door for datasets: a named source of sections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from agl_bench.interfaces.spots import Section


class Dataset(ABC):
    """Knows where its sections are and how to read them; nothing is read until `load`.

    Settings are keyword-only arguments of `__init__` with their range in the annotation. `root` is always the data
    folder (`AGL_BENCH_DATA`).

    Attributes:
        citation: how to cite the data.
        licence: under which terms it may be used.
        revision: version of the data, part of every result.
    """

    citation: str = ""
    licence: str = ""
    revision: str = ""

    @abstractmethod
    def sections(self, root: Path) -> dict[str, str]:
        """Names of the sections, in order, each with its donor ("" = not known). Cheap: reads no counts.

        Raises:
            MissingData: which file is absent and which command brings it.
        """

    @abstractmethod
    def load(self, root: Path) -> list[Section]:
        """All sections with raw counts, no filter, no normalisation.

        Raises:
            MissingData: which file is absent and which command brings it.
            BadSection: which section cannot be read and why.
        """

    def files(self, root: Path) -> list[Path]:
        """Every file that `load` reads; their content makes the fingerprint. Empty for generated data."""
        return []

    def fetch(self, root: Path) -> None:  # noqa: B027  (optional)
        """Download what is not there yet, once, checked. Nothing to do by default.

        Raises:
            FetchFailed: with what the user has to do.
        """
