"""Strangers' code in this process: whose is being imported, whose is avoided, and what they raise to end it."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Callable, Iterator

from agl_bench.errors import BadPlugin

OURS = ("agl_bench", "importlib", "pluggy", "numpy", "torch")  # where an error is not to be mended

# Providers that end the process which imports them, and how; found out from outside this process.
AVOIDED: dict[str, str] = {}


class Watcher:
    """Told whose code is imported next, and "" when that is over; somebody outside sees what comes of it."""

    tell: Callable[[str], None] = staticmethod(lambda _: None)


@contextlib.contextmanager
def importing(provider: str) -> Iterator[None]:
    """While code of a provider is imported.

    Raises:
        BadPlugin: if it is avoided.
    """
    if provider in AVOIDED:
        raise BadPlugin(AVOIDED[provider])
    Watcher.tell(provider)
    try:
        yield
    finally:
        Watcher.tell("")


def raise_if_ours(error: BaseException) -> None:
    """A signal of a person is no fault of a plug-in; an interrupt that a plug-in raises itself is one."""
    if isinstance(error, GeneratorExit) or (isinstance(error, KeyboardInterrupt) and not is_strangers(error)):
        raise error


def is_strangers(error: BaseException) -> bool:
    """Whether a plug-in itself has raised what is meant to end the process, such as SystemExit.

    Where Ctrl-C has Python's own handler, an interrupt looks the same wherever it comes from, and is a person's.
    """
    if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).partition(".")[0] not in OURS
