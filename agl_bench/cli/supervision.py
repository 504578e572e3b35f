"""A command watched from outside, where plug-ins of others are there: whatever they do to it, it ends with a sentence.

    agl-bench (watches) ── the command itself, a fork

A plug-in may end the process that imports it (`os._exit`, a crash, an import that never returns). Then the command is
begun once more without that plug-in, which is listed as disabled. What ends it later, e.g. a dataset that is described,
ends it with a sentence and not in silence. Where this process ends, the command ends with it; signals are passed on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from types import FrameType
from typing import NoReturn

from agl_bench.cli.ending import say
from agl_bench.registry.plugins import OWN
from agl_bench.registry.strangers import AVOIDED, Watcher

SILENT = 60.0  # seconds in which an import looks for no module, after which it is taken for one that never ends
_END, _ALIVE = "the end", "alive"
_DIES_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Supervision:
    """Whether this process may be watched, and who watches."""

    def __init__(self) -> None:
        self.is_allowed = False  # only where all of the process is the command
        self._notes: int | None = None

    def begin(self) -> None:
        """From here on in a fork; this process watches it and ends as it does, and does not come back from here."""
        if not self.is_allowed or self._notes is not None or threading.active_count() > 1:
            return
        handlers = {number: signal.getsignal(number) for number in (*_PASSED_ON, signal.SIGTSTP)}
        sys.stdout.flush()
        sys.stderr.flush()
        while True:
            notes, ours = os.pipe()
            watcher, pid = os.getpid(), os.fork()
            if not pid:
                os.close(notes)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                self._be_watched(watcher, ours)
                return
            os.close(ours)
            _Watch(pid, notes).until_it_ends()

    def end(self) -> None:
        """The command ends as it should."""
        if self._notes is not None:
            self._note(_END)

    def _be_watched(self, watcher: int, notes: int) -> None:
        os.setpgid(0, 0)  # signals from the terminal come from the watcher, and once
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != watcher:
                os._exit(1)
        self._notes = notes
        Watcher.tell = self._note
        sys.meta_path.insert(0, _Pulse(self))

    def _note(self, text: str) -> None:
        assert self._notes is not None
        os.write(self._notes, f"{text}\n".encode(errors="backslashreplace"))


class _Pulse(MetaPathFinder):
    """Tells that an import goes on. It finds no module: the finders behind it do."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision, self._last = supervision, -1.0

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if (now := time.monotonic()) - self._last > 1:
            self._last = now
            self._supervision._note(_ALIVE)


class _Watch:
    """The watcher's side of one fork."""

    def __init__(self, pid: int, notes: int) -> None:
        self.pid, self.notes = pid, notes
        self.importing = ""  # whose plug-in
        self.seen: list[str] = []
        self.is_at_its_end = False
        self.passed_on: int | None = None
        for number in (*_PASSED_ON, signal.SIGTSTP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._pause if number == signal.SIGTSTP else self._pass_on)

    def until_it_ends(self) -> None:
        """End as the command has ended; come back only where it is to begin anew."""
        reason = "" if self._listen() else f"its import did not finish within {SILENT:.0f} s"
        if reason:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.notes)
        if self.is_at_its_end or -status == self.passed_on:
            _end(status)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if (self.importing and status != -signal.SIGKILL) or reason:
            AVOIDED[self.importing] = reason or f"the process that imported it {how}"
            return
        why = (
            ", perhaps for lack of memory" if status == -signal.SIGKILL else f", by a plug-in ({', '.join(self.seen)})"
        )
        say(f"the command {how} before it finished{why}; finished work is kept")
        _end(2)

    def _listen(self) -> bool:
        """Take what it notes until it has ended; False if it is caught in an import."""
        text = b""
        while True:
            if not select.select([self.notes], [], [], SILENT if self.importing else None)[0]:
                return False
            found = os.read(self.notes, 1 << 12)
            if not found:
                return True
            *lines, text = (text + found).split(b"\n")
            for line in lines:
                self._take(line.decode())

    def _take(self, line: str) -> None:
        if line == _END:
            self.is_at_its_end = True
        elif line != _ALIVE:
            self.importing = line
            if line and line not in self.seen and line.partition(" ")[0] != OWN:
                self.seen.append(line)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.passed_on = number
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z, and what follows it."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended, or does not lead its group yet
            os.killpg(self.pid, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.killpg(self.pid, signal.SIGCONT)


def _end(status: int) -> NoReturn:
    sys.stderr.flush()
    if status < 0:  # as it ended, but for the core
        if -status not in (signal.SIGKILL, signal.SIGSTOP):  # which have no other handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


SUPERVISION = Supervision()
