"""Where results are shown while and after they are made. A recorder is a sink: it can be absent and never costs a
result."""

from __future__ import annotations

from abc import ABC, abstractmethod

from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.training.records import EpochRecord


class CellLog(ABC):
    """The record of one running cell."""

    @abstractmethod
    def epoch(self, record: EpochRecord) -> None:
        """One more epoch."""

    @abstractmethod
    def close(self, result: Result) -> None:
        """The cell is finished."""

    @abstractmethod
    def fail(self, sentence: str) -> None:
        """The cell failed."""


class Recorder(ABC):
    """Opens one log for each cell.

    Attributes:
        dead: why nothing is shown any more; None while all is well.
    """

    dead: str | None = None

    @abstractmethod
    def open(self, spec: RunSpec) -> CellLog:
        """Start showing a cell."""

    @abstractmethod
    def record(self, result: Result, *, anew: bool = False) -> bool:
        """Show a finished cell that is not shown yet, or with `anew` in place of what is shown; whether there was
        anything to do."""

    @abstractmethod
    def finish(self) -> None:
        """Nothing more will come: close groups, flush."""


class NoRecorder(Recorder, CellLog):
    """Shows nothing (`--tracking none`)."""

    def open(self, spec: RunSpec) -> CellLog:
        """Itself."""
        return self

    def record(self, result: Result, *, anew: bool = False) -> bool:
        """Nothing to do."""
        return False

    def finish(self) -> None:
        """Nothing to do."""

    def epoch(self, record: EpochRecord) -> None:
        """Nothing to do."""

    def close(self, result: Result) -> None:
        """Nothing to do."""

    def fail(self, sentence: str) -> None:
        """Nothing to do."""
