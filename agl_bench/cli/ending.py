"""How commands end: statuses, and signals that ask for the end."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    pass


INTERRUPTED = 75  # EX_TEMPFAIL: try again
GRACE = 10.0  # seconds from a signal to the end, whatever is being done; Slurm kills after 30
AGAIN = 1.0  # seconds; a library's callback may swallow what is raised


def stop_with(sentence: str, status: int) -> None:
    """End the program with one sentence."""
    click.echo(f"agl-bench: {sentence}", err=True)
    sys.exit(status)


def interrupted(*_: object) -> None:
    """What a signal does where nothing has to be finished first."""
    raise KeyboardInterrupt


class Signals:
    """While cells run, the first SIGTERM or SIGINT asks for the end after this epoch, the second one ends at once.

    Not all that is done is an epoch, and some epochs are long: `GRACE` seconds after the first signal comes the second
    one by itself. What a checkpoint or a file holds by then is kept.
    """

    def __init__(self) -> None:
        self._why = ""
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> str:
        """Which signal has come; "" if none has."""
        return self._why

    def __enter__(self) -> Signals:
        for number, handler in (
            (signal.SIGTERM, self._take),
            (signal.SIGINT, self._take),
            (signal.SIGALRM, interrupted),
        ):
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._why:
            raise KeyboardInterrupt
        self._why = signal.Signals(number).name
        signal.setitimer(signal.ITIMER_REAL, GRACE, AGAIN)
        sentence = f"agl-bench: stopping at the end of this epoch, or in {GRACE:.0f} s; once more ends at once\n"
        os.write(2, sentence.encode())  # as a handler may
