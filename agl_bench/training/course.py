"""Where a training stands in the protocol's schedule: bookkeeping on validation scores, without a tensor.

    alternating                                     two_stage
    for each epoch:                                 for each round:
        outer steps, where one is due                   outer steps
        train the model                                 train the model until `round_patience`
    until `patience`                                until a round brings no gain

After a warm start, and after each round, the model goes back to its best state and gets a new optimiser. `two_stage`
with `warm_start` is Algorithm 1 of Shiku et al. (AAAI 2026) as their first code runs it; `alternating` is their later
code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from agl_bench.protocol import Protocol

Next = Literal["on", "back", "end"]  # another epoch; another one from the best state; none


@dataclass
class Course:
    """Told the score of each epoch, it says which is best, where outer steps are due, and what comes next.

    Args:
        protocol: its stages, patience and outer steps.
        learns: whether the selector takes outer steps. One that does not is trained plainly, unless the warm start is
            for all: then it goes through the same stages without outer steps, so that a comparison is of equal length.

    Attributes:
        round: 0 in the warm start, then 1, 2, …; 1 throughout where the schedule has no rounds.
        best: highest score so far.
        best_epoch: its epoch.
    """

    protocol: Protocol
    learns: bool
    round: int = field(init=False)
    best: float = field(default=-float("inf"), init=False)
    best_epoch: int = field(default=0, init=False)
    _start: int = field(default=0, init=False)  # first epoch of the round
    _trained_from: int = field(default=0, init=False)  # first epoch after the warm start
    _best_at_last_end: float = field(default=-float("inf"), init=False)  # score that a round has to surpass

    def __post_init__(self) -> None:
        warms = self.protocol.warm_start
        self.round = 0 if warms == "all" or (warms == "learners" and self.learns) else 1
        # A plain selector takes part in the rounds only where it takes part in the warm start.
        self._has_rounds = self.protocol.schedule == "two_stage" and (self.learns or warms == "all")

    @property
    def is_warming(self) -> bool:
        """Whether the mean loss of all genes is trained."""
        return self.round == 0

    def outer_is_due(self, epoch: int) -> bool:
        """Whether the epoch opens with outer steps."""
        if not self.learns or self.is_warming:
            return False
        if self._has_rounds:
            return epoch == self._start
        since = epoch - self._trained_from - self.protocol.outer_start
        return since >= 0 and since % self.protocol.outer_every == 0

    def take(self, epoch: int, score: float) -> bool:
        """Note the score of an epoch, NaN where there is none; whether it is the best so far."""
        is_best = score > self.best or epoch == 0
        if is_best:
            self.best, self.best_epoch = score if score == score else -float("inf"), epoch
        return is_best

    def state(self) -> dict[str, Any]:
        """Plain values: all that has been noted, without what was given."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, in a course of the same protocol."""
        for name, value in state.items():
            setattr(self, name, value)

    def next(self, epoch: int) -> Next:
        """What comes after an epoch whose score has been taken."""
        has_rounds = self._has_rounds and not self.is_warming
        patience = self.protocol.round_patience if has_rounds else self.protocol.patience
        if epoch - max(self.best_epoch, self._start - 1) < patience:
            return "on"
        if self.is_warming:
            self._trained_from = epoch + 1
        elif not has_rounds or not self.best > self._best_at_last_end:
            return "end"
        else:
            self._best_at_last_end = self.best
        self.round, self._start = self.round + 1, epoch + 1
        return "back"
