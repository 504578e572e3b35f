"""The command line. Thin: it reads words, calls `bench` and `comparison`, and has `terminal` show what comes back."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from agl_bench.cli import checking, comparing, data, plugins, running, scaffolding, tracking, tuning
from agl_bench.cli.ending import INTERRUPTED, interrupted, never_fail_to_print, stop_with
from agl_bench.cli.group import cli
from agl_bench.cli.library_warnings import hide_library_warnings
from agl_bench.cli.opening import LoadingNotice
from agl_bench.cli.supervision import SUPERVISION
from agl_bench.errors import AglBenchError, BadPlugin, told
from agl_bench.registry.strangers import is_strangers

__all__ = ["checking", "cli", "comparing", "data", "main", "plugins", "running", "scaffolding", "tracking", "tuning"]

# Read by OpenMP when torch is imported. By default an idle thread spins for milliseconds before it sleeps; where
# another process wants its core, every small operation waits for that, and a cell takes forty times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: one sentence and status 2 for bad input, never a traceback for it."""
    signal.signal(signal.SIGTERM, interrupted)
    if arguments is None:  # else the process is not ours alone
        hide_library_warnings()
        SUPERVISION.is_allowed = hasattr(os, "fork")
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupted)
    never_fail_to_print()
    LoadingNotice.install()
    try:
        _main(arguments)
    finally:
        SUPERVISION.end()


def _main(arguments: Sequence[str] | None) -> None:
    try:
        sys.exit(_command(arguments))
    except AglBenchError as error:
        stop_with(" ".join(str(error).split()), 2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:  # e.g. `agl-bench list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        kept = "" if where else "; finished work is kept"
        stop_with(f"{where}{error.strerror or ' '.join(str(error).split()) or type(error).__name__}{kept}", 2)
    except UnicodeEncodeError as error:
        name = error.object[max(0, error.start - 40) : error.end + 40]
        stop_with(f"the name {name!r} is not UTF-8 and cannot be recorded; rename the file or folder", 2)
    except (click.Abort, KeyboardInterrupt):
        stop_with("interrupted; finished work is kept, and the same command continues", INTERRUPTED)


def _command(arguments: Sequence[str] | None) -> Any:
    """The command; what a plug-in raises in it to end the process is an error of that plug-in."""
    try:
        return cli.main(arguments, prog_name="agl-bench", standalone_mode=False)
    except BaseException as error:
        ending = error.__cause__ if isinstance(error, click.Abort) else error
        if ending is None or isinstance(ending, Exception) or not is_strangers(ending):
            raise
        raise BadPlugin(f"a plug-in ended the command: {told(ending)}") from error
