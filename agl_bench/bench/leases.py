"""Who works on which cell: leases that work on a local disk and on a folder that several machines share.

A lease is a folder `leases/<key>/` with one empty file whose name says who holds it. Every change is one rename, which
is atomic on local and network file systems alike; nothing here locks a file. Its time is a heartbeat.

A lease is stale

- on the machine of its owner: as soon as that process is gone. The time at which a process started tells it from a
  later one with the same number;
- seen from elsewhere (another machine, another container of the same one, or where the system hides the processes of
  others): when no heartbeat came for `STALE` seconds of the file system's clock. One that is further in the future is
  of a clock that was wrong; whoever is alive sets it right with the next heartbeat.

What is no folder in the place of a lease holds nothing, and is removed; a link is not followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agl_bench.digests import text_digest

BEAT = 15.0  # seconds from one heartbeat to the next
STALE = 180.0  # without a heartbeat; network file systems may show times that are a minute old


@dataclass(frozen=True)
class Owner:
    """A process, named so that no other one is ever taken for it.

    Attributes:
        host: name of its machine, for people.
        pid: its number.
        started: when it started, in the units of the system; "0" where that cannot be told.
        place: where the number means something: the running system and its container.
        task: tells apart what one process holds.
    """

    host: str
    pid: int
    started: str
    place: str
    task: str = ""

    @classmethod
    def this(cls) -> Owner:
        """The process that asks."""
        pid = os.getpid()
        return cls(_host(), pid, _started(pid) or "0", _place(), uuid.uuid4().hex[:8])

    @classmethod
    def parse(cls, name: str) -> Owner | None:
        """Inverse of `name`; None if it is none."""
        parts = name.split("~")
        if len(parts) != 5 or not parts[1].isdecimal():
            return None
        return cls(parts[0], int(parts[1]), *parts[2:])

    @property
    def name(self) -> str:
        """As part of a file name."""
        return "~".join((self.host, str(self.pid), self.started, self.place, self.task))

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None if that cannot be told from here."""
        if self.place != _place():
            return None
        started = _started(self.pid)
        if started != self.started and "0" in (started, self.started):
            return None
        return started is None or started != self.started


def is_stale(path: Path, owner: Owner | None) -> bool:
    """Whether a file or folder was left behind by its owner.

    Args:
        path: its time is the last sign of life of an owner elsewhere.
        owner: who; None = nobody knows.
    """
    gone = owner.is_gone() if owner is not None else None
    if gone is not None:
        return gone
    try:
        return abs(_now(path.parent.parent) - path.lstat().st_mtime) > STALE
    except FileNotFoundError:
        return False  # it has just been given back or taken over


class TakenOver(Exception):
    """Another process has taken over what this one was working on."""


class HeldLease:
    """A lease that somebody holds, seen by a process that works for the holder."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            TakenOver: if it is not, e.g. because this machine slept for long.
        """
        if not self.file.exists():
            raise TakenOver


class Lease(HeldLease):
    """A cell that this process works on, until `release`; a thread keeps it alive."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        super().__init__(folder / owner.name)
        self.folder, self.owner = folder, owner
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {folder.name}", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give it back, if it is still held."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it was lost, or the next one is already there
            self.file.unlink()
            self.folder.rmdir()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):  # a server that is away for a moment; a lease that is lost stays so
                os.utime(self.file)


class Leases:
    """The leases of a work folder, `leases/<key>/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def holder(self, key: str) -> Owner | None:
        """Who works on a cell; None if nobody does."""
        found = self._read(key)
        return None if found is None or is_stale(*found) else found[1]

    def running(self) -> dict[str, Owner]:
        """Key -> holder of every cell that is worked on."""
        if not self.folder.is_dir():
            return {}
        keys = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
        return {key: owner for key in keys if (owner := self.holder(key)) is not None}

    def take(self, key: str) -> Lease | None:
        """A lease on a cell; None while somebody else holds it.

        Raises:
            OSError: if the folder cannot be written.
        """
        owner, folder = Owner.this(), self.folder / key
        found = self._read(key)
        if found is not None:
            path, _ = found
            if not is_stale(*found):
                return None
            try:  # of all who find it stale, the one whose rename finds the old name gets it
                os.utime(path)  # so that nobody finds the new one stale at once
                path.rename(folder / owner.name)
            except FileNotFoundError:
                return None
            return Lease(folder, owner)
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            folder.unlink(missing_ok=True)
        fresh = self.folder / f".new-{key}-{owner.name}"
        fresh.mkdir(parents=True)
        (fresh / owner.name).touch()
        try:
            fresh.rename(folder)  # refused where there is a folder that is not empty
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            if not folder.is_dir():
                raise
            return None
        return Lease(folder, owner)

    def sweep(self) -> None:
        """Clear what killed processes left: leases, and such as never came to be."""
        for path in self.folder.glob(".new-*-*"):
            if is_stale(path, Owner.parse(path.name.split("-", 2)[2])):
                shutil.rmtree(path, ignore_errors=True)
        for folder in self.folder.glob("[!.]*"):
            found = self._read(folder.name)
            if found is not None and is_stale(*found):
                with contextlib.suppress(OSError):  # somebody has taken it over
                    found[0].unlink()
                    folder.rmdir()

    def _read(self, key: str) -> tuple[Path, Owner | None] | None:
        """The file of a lease and who holds it; where there is no such file, whatever else the folder holds."""
        folder = self.folder / key
        try:
            found = [] if folder.is_symlink() else [(path, Owner.parse(path.name)) for path in sorted(folder.iterdir())]
        except (FileNotFoundError, NotADirectoryError):
            return None
        return min(found, key=lambda one: one[1] is None, default=None)


@cache
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64] or "unnamed"


@cache
def _place() -> str:
    """Digest of what a process number is valid within: this start of the system, and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # where there is no such thing, the name of the machine has to do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return text_digest("\n".join(parts), 6)


def _started(pid: int) -> str | None:
    """When a process of this machine started; None if there is no such process, "0" if only that is known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "0" if _exists(pid) else None  # of somebody else, whose processes the system may hide
    state, *rest = text.rpartition(")")[2].split()
    return None if state in ("Z", "X") else rest[18]  # 22nd field; a zombie has ended


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now(folder: Path) -> float:
    """Time by the clock of the file system, which may be another machine's; ours where we may only read."""
    probe = folder / f".now-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now
