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


def stop_with(sentence: str, status: int) -> None:
    """End the program with one sentence."""
    click.echo(f"agl-bench: {sentence}", err=True)
    sys.exit(status)


def interrupted(*_: object) -> None:
    """What a signal does where nothing has to be finished first."""
    raise KeyboardInterrupt


class Signals:
    """While cells run, the first SIGTERM or SIGINT asks for the end after this epoch, the second one ends at once."""

    def __init__(self) -> None:
        self._why = ""
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> str:
        """Which signal has come; "" if none has."""
        return self._why

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._why:
            raise KeyboardInterrupt
        self._why = signal.Signals(number).name
        os.write(2, b"agl-bench: stopping at the end of this epoch; once more ends at once\n")  # as a handler may
