"""Where results are shown while and after they are made. A recorder is a sink: it can be absent and never costs a
result."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from agl_bench.bench.result import Result
from agl_bench.bench.spec import RunSpec
from agl_bench.training.records import EpochRecord


@dataclass(frozen=True)
class Standing:
    """How a line of the table stands among those that it may be compared with.

    Attributes:
        evaluation: "intra" or "inter".
        name: of the line, for people; tells lines of one selector with different settings apart.
        colour: "#RRGGBB", that of the selector wherever it is drawn.
        place: what those lines share, for people.
        is_control: no method but a bound for methods.
        rank: by mean test PCC, 1 = highest; None for a control, and where lines have different folds or seeds.
        of: lines that have a rank.
        pcc: mean test PCC over folds and seeds.
        baseline: name of the selector that differences are to.
        difference: of test PCC to the baseline, on the folds and seeds that both have; NaN where there is none.
        low, high: its 95 % interval; NaN where there are too few seeds for one.
        verdict: the sentence of the statistics; "" where there is nothing to judge.
    """

    evaluation: str
    name: str
    colour: str
    place: str
    is_control: bool
    rank: int | None
    of: int
    pcc: float
    baseline: str
    difference: float
    low: float
    high: float
    verdict: str

    @property
    def text(self) -> str:
        """Place and rank so that texts sort by them."""
        if self.rank is None:
            return f"{self.place}: {'control' if self.is_control else 'not ranked, other folds or seeds'}"
        number = f"{self.rank:0{len(str(self.of))}d}"
        return f"{self.place}: {number} of {self.of}" + (", highest mean" if self.is_best else "")

    @property
    def difference_text(self) -> str:
        """Difference to the baseline with its interval; "" where there is none."""
        if math.isnan(self.difference):
            return ""
        interval = "" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.difference:+.3f}{interval}"

    @property
    def is_best(self) -> bool:
        """Whether no other line has a higher mean; the verdict says whether that means anything."""
        return self.rank == 1 and self.of > 1


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

    @abstractmethod
    def annotate(self, standings: Mapping[str, Standing]) -> None:
        """Show how lines stand, by `RunSpec.group`."""


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

    def annotate(self, standings: Mapping[str, Standing]) -> None:
        """Nothing to do."""

    def epoch(self, record: EpochRecord) -> None:
        """Nothing to do."""

    def close(self, result: Result) -> None:
        """Nothing to do."""

    def fail(self, sentence: str) -> None:
        """Nothing to do."""
