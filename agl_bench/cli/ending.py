"""How commands end: statuses, and signals that ask for the end."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import click

from agl_bench.addresses import masked

INTERRUPTED = 75  # EX_TEMPFAIL: try again
GRACE = 10.0  # seconds from a signal to the end, whatever is being done; Slurm kills after 30
_LONG = 1000  # characters of a word; a path is seldom longer
AGAIN = 1.0  # seconds; a library's callback may swallow what is raised


def never_fail_to_print() -> None:
    """A character that the terminal's encoding lacks is replaced, on standard error by its number."""
    for stream, how in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=how)


def say(sentence: str) -> None:
    """One sentence on standard error, without secrets, and without words that nobody reads to their end."""
    text = re.sub(rf"\S{{{_LONG},}}", lambda found: f"{found[0][:40]}…{found[0][-40:]}", masked(sentence))
    click.echo(f"agl-bench: {text}", err=True)


def stop_with(sentence: str, status: int) -> None:
    """End the program with one sentence."""
    say(sentence)
    sys.exit(status)


def interrupted(*_: object) -> None:
    """What a signal does where nothing has to be finished first."""
    raise KeyboardInterrupt


class Signals:
    """While cells run, the first SIGTERM or SIGINT asks for the end after this epoch, the second one ends at once.

    Not all that is done is an epoch, and some epochs are long: `GRACE` seconds after the first signal comes the second
    one by itself. What a checkpoint or a file holds by then is kept.

    A thread waits for that, and not a timer of the process: who sets one while a plug-in is watched is taken for it.
    """

    def __init__(self) -> None:
        self._why = ""
        self._before: dict[signal.Signals, Any] = {}
        self._has_come, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._insist, name="agl-bench: whether it ends", daemon=True)

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
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._has_come.set()
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._why:
            raise KeyboardInterrupt
        self._why = signal.Signals(number).name
        self._has_come.set()
        sentence = f"agl-bench: stopping at the end of this epoch, or in {GRACE:.0f} s; a second signal ends at once\n"
        os.write(2, sentence.encode())  # as a handler may

    def _insist(self) -> None:
        self._has_come.wait()
        seconds, main = GRACE, threading.main_thread().ident
        while not self._is_over.wait(seconds) and main is not None:
            signal.pthread_kill(main, signal.SIGALRM)
            seconds = AGAIN
