"""Cells apart: those with plug-ins of others, each in a process of its own, so that such a plug-in harms itself only.

    command ── nursery ── cell        one cell at a time, see `bench.nursery`

The command holds the lease on the cell, shows what happens and records it. The cell's process reads the same prepared
sections, trains on as many threads, writes into the same store, and tells what happens by lines of JSON; nothing else
of a plug-in comes back. However it ends, by itself or by a signal, that is the outcome of this cell and of no other.
Where the command ends, the others end with it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

from agl_bench.bench import nursery
from agl_bench.bench.cells import CellStore
from agl_bench.bench.checkpoints import Keeper, record_of
from agl_bench.bench.fitness import Skipped
from agl_bench.bench.run import (
    Bench,
    EpochDone,
    Failed,
    Finished,
    Happening,
    Keep,
    Lost,
    Noted,
    Opened,
    Stopped,
    choose_device,
    failure,
)
from agl_bench.bench.spec import Part, RunSpec
from agl_bench.data.folds import FoldPlan
from agl_bench.data.prepared import PatchSize
from agl_bench.digests import TRUST
from agl_bench.errors import AglBenchError, BadPlugin
from agl_bench.registry.plugins import Plugins
from agl_bench.registry.strangers import AVOIDED

TICK = 0.1  # seconds between two looks at signals and clocks
GRACE = 30.0  # seconds that a cell may go on beyond its time or a request to stop, before its process is ended
EPOCHS = 3  # likewise, in epochs as long as its longest
# Imported where they are first used, some for seconds; a nursery imports what its command has.
LIBRARIES = ("scanpy", "tifffile", "zarr", "pyarrow.pandas_compat", "pandas.io.formats.csvs")
GARBLED = "wrote into the pipe through which its process tells the command what happens; it must leave open files alone"
KINDS = ("dataset", "backbone", "selector")


class Apart:
    """Runs cells in processes of their own.

    Args:
        fork: make the nursery by a fork of this process, at once; only where nothing has been computed in it yet, no
            CUDA device looked for and no thread started. Else a fresh process is started when it is first needed.
    """

    def __init__(self, *, fork: bool = False) -> None:
        self._nursery = _forked() if fork else None
        self._prepared: set[tuple[Part, PatchSize | None]] = set()
        self._spoilt: dict[Part, str] = {}  # datasets that cannot be prepared, and why

    def is_for(self, spec: RunSpec, plugins: Plugins) -> bool:
        """Whether a cell has a plug-in of others."""
        return bool(_strangers(spec, plugins))

    def run_cell(
        self, spec: RunSpec, plan: FoldPlan, bench: Bench, store: CellStore, keeper: Keeper, keep: Keep
    ) -> Generator[Happening, None, None]:
        """As `bench.run.run_cell`, in a process of its own."""
        if spec.dataset in self._spoilt:
            yield failure(spec, BadPlugin(self._spoilt[spec.dataset]), store, keeper.partial, "see the message above")
            return
        request = _common(bench) | {
            "spec": spec.as_json(), "plan": asdict(plan), "work": str(store.work.absolute()), "keep": keep,
            "lease": str(keeper.lease.file.absolute()), "checkpoint_every": keeper.every, "time_limit": keeper.limit,
        }  # fmt: skip
        if bench.has_read(spec.dataset):  # and has compared all with their digests, once for all cells
            request["environment"] |= {TRUST: "1"}
        patience, late = _Patience(keeper.limit), ""
        with self._child(request) as child:
            for said in child.happenings():
                if said == nursery.BEGUN:
                    patience.begin()
                elif said is not None:
                    event = _event(said, spec, store)
                    if event is None:
                        late = GARBLED
                        break
                    patience.heard(event)
                    yield event
                    if isinstance(event, Finished | Failed | Skipped | Stopped | Lost):
                        return
                elif not patience.asked and (why := keeper.stop()):
                    patience.asked_at(time.monotonic(), why)
                    child.ask(why)
                if patience.is_over():
                    late = patience.said()
                    break
            child.end()
            if patience.asked:
                yield Stopped(spec, patience.asked)
                return
            sentence = f"{' or '.join(_strangers(spec, bench.plugins))} {late or child.ending()}"
            yield failure(spec, BadPlugin(sentence), store, keeper.partial, f"{sentence}\n\n{child.trace()}")

    def has_prepared(self, spec: RunSpec, bench: Bench) -> bool:
        """Have the dataset of a cell read and prepared, if it is a stranger's, so that this process need not read it.

        Returns:
            False if that fails by a fault of the dataset; then its cells will fail.

        Raises:
            AglBenchError: if the data are not there or not sound.
        """
        part, size = spec.dataset, bench.patch_size(spec)
        if bench.plugins.entry(part.name, "dataset").is_own or (part, size) in self._prepared:
            return True
        if part in self._spoilt:
            return False
        request = _common(bench) | {"dataset": vars(part), "size": size and [size.px, size.um]}
        sentence = ""
        with self._child(request) as child:
            for said in filter(None, child.happenings()):
                if said == nursery.PREPARED:
                    self._prepared.add((part, size))
                    return True
                sentence = str(said.get("sentence", ""))
                if said.get("event") == "refused":
                    raise AglBenchError(sentence)
            self._spoilt[part] = sentence or f"dataset '{part.name}' of {part.provider} {child.ending()}"
        return False

    @contextlib.contextmanager
    def _child(self, request: Mapping[str, Any]) -> Iterator[_Child]:
        if self._nursery is None or not self._nursery.is_there():
            self._nursery = _branched()
        with self._nursery.child(request) as child:
            yield child


class _Nursery:
    """This process's end of a nursery; closing it ends the nursery."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control

    def is_there(self) -> bool:
        """Whether it has not ended; it says nothing of itself."""
        return not select.select([self.control], [], [], 0)[0]

    @contextlib.contextmanager
    def child(self, request: Mapping[str, Any]) -> Iterator[_Child]:
        """A process for one request, gone at the end."""
        orders, happenings = os.pipe(), os.pipe()
        with tempfile.TemporaryFile() as trace, contextlib.ExitStack() as end:
            end.callback(os.close, orders[1])
            end.callback(os.close, happenings[0])
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(self.control, [b"c"], [orders[0], happenings[1], trace.fileno()])
            os.close(orders[0])
            os.close(happenings[1])
            content = json.dumps(request).encode()
            with contextlib.suppress(BrokenPipeError):
                _write(orders[1], nursery.SIZE.pack(len(content)) + content)
            child = _Child(self.control, orders[1], happenings[0], trace)
            try:
                yield child
            finally:
                child.end()


class _Child:
    """This process's end of a cell's process."""

    def __init__(self, control: socket.socket, orders: int, happenings: int, trace: IO[bytes]) -> None:
        self._control, self._orders, self._happenings, self._trace = control, orders, happenings, trace
        self._answers = self._text = b""
        self._pid: int | None = None
        self._status: int | None = None
        self._is_over = False

    def happenings(self) -> Iterator[dict[str, Any] | None]:
        """What it tells, None at each tick, until its process has ended."""
        while True:
            is_over = self._is_over  # before the look, so that it misses nothing
            self._look(0 if is_over else TICK)
            *lines, self._text = self._text.split(b"\n")
            yield from map(_told, lines)
            if is_over and not lines:
                return
            yield None

    def ask(self, why: str) -> None:
        """Have it stop at the end of its epoch."""
        with contextlib.suppress(BrokenPipeError):
            _write(self._orders, f"{why}\n".encode())

    def end(self) -> None:
        """End it, if it is still there, and wait until it has gone."""
        given_up = time.monotonic() + GRACE
        while not self._is_over:
            if self._pid is None and time.monotonic() > given_up:  # the nursery itself is caught in a plug-in
                self._control.shutdown(socket.SHUT_RDWR)
            if self._pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pid, signal.SIGKILL)
            self._look(TICK)

    def ending(self) -> str:
        """How it has ended, as part of a sentence."""
        if self._status is None:
            return "ended the process that starts its cells"
        if self._status >= 0:
            return f"ended its process with status {self._status}"
        name = signal.Signals(-self._status).name
        return f"had its process killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")

    def trace(self) -> str:
        """Where it was when it crashed; "" if that is not known."""
        self._trace.seek(0)
        return self._trace.read().decode(errors="replace")

    def _look(self, seconds: float) -> None:
        """Take what has come; wait for it so long at most."""
        watched: list[Any] = [self._happenings, *([] if self._is_over else [self._control])]
        for ready in select.select(watched, [], [], seconds)[0]:
            if ready == self._happenings:
                found = os.read(self._happenings, 1 << 16)
                self._text += found
                if not found and not self._is_over:
                    time.sleep(TICK / 10)  # its end follows
                continue
            found = self._control.recv(1 << 10)
            self._is_over = not found
            self._answers += found
            *numbers, _ = self._answers.split(b"\n")
            if numbers:
                self._pid = int(numbers[0])
            if len(numbers) > 1:
                self._status, self._is_over = int(numbers[1]), True


@dataclass
class _Patience:
    """How long a process may take that nobody can make go faster."""

    limit: float | None
    asked: str = ""

    def __post_init__(self) -> None:
        self._began = self._heard = math.inf  # a nursery that is not there yet takes its time
        self._asked_at = self._longest = 0.0
        self._epochs = 0

    def begin(self) -> None:
        """It is there."""
        self._began = self._heard = time.monotonic()

    def heard(self, event: Happening) -> None:
        """It is alive."""
        self._heard = time.monotonic()
        if isinstance(event, EpochDone):
            self._longest = max(self._longest, event.record.seconds)
            self._epochs += 1

    def asked_at(self, now: float, why: str) -> None:
        """It was asked to stop."""
        self.asked, self._asked_at = why, now

    @property
    def _grace(self) -> float:
        """Seconds that it may go on. Before its first epoch it may be reading data, or encoding patches."""
        first = 0.0 if self._epochs or self.limit is None else self.limit
        return max(GRACE, EPOCHS * self._longest, first)

    def is_over(self) -> bool:
        """Whether it has gone on too long after it was asked to stop, or after its time."""
        now = time.monotonic()
        if self.asked:
            return now - self._asked_at > max(GRACE, EPOCHS * self._longest)
        return self.limit is not None and now - max(self._heard, self._began + self.limit) > self._grace

    def said(self) -> str:
        """Why its process was ended, as part of a sentence."""
        return (
            f"did not finish an epoch within the time limit of {self.limit or 0:g} s plus "
            f"{self._grace:.0f} s, so its process was ended; if its epochs take that long, raise --time-limit"
        )


def _strangers(spec: RunSpec, plugins: Plugins) -> list[str]:
    """The plug-ins of others in a cell, for people."""
    parts = [(kind, getattr(spec, kind)) for kind in KINDS]
    return [
        f"{kind} '{part.name}' of {part.provider}" for kind, part in parts if not plugins.entry(part.name, kind).is_own
    ]


def _common(bench: Bench) -> dict[str, Any]:
    """What every request has: the conditions of this process, and what it would read."""
    return {
        "root": str(bench.root), "cache": str(bench.prepared.cache.folder), "device": bench.device.type,
        "threads": torch.get_num_threads(), "files": [str(f) for f in bench.plugins.files],
        "avoided": AVOIDED, "folder": str(Path.cwd()), "path": sys.path,
        "environment": dict(os.environ), "libraries": [name for name in LIBRARIES if name in sys.modules],
    }  # fmt: skip


def _told(line: bytes) -> dict[str, Any]:
    """A line of a cell's process; {} if something else has written it."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _event(said: Mapping[str, Any], spec: RunSpec, store: CellStore) -> Happening | None:
    """What a line of a cell's process means here; None if it means nothing."""
    try:
        return _meant(said, spec, store)
    except (KeyError, TypeError):
        return None


def _meant(said: Mapping[str, Any], spec: RunSpec, store: CellStore) -> Happening | None:
    what, sentence = said["event"], str(said.get("sentence", ""))
    if what == "opened":
        return Opened()
    if what == "epoch":
        return EpochDone(spec, record_of(said["record"]))
    if what == "noted":
        return Noted(spec, sentence)
    if what == "skipped":
        return Skipped(spec, sentence)
    if what == "stopped":
        return Stopped(spec, sentence)
    if what == "lost":
        return Lost()
    if what == "failed":
        return Failed(spec, sentence, said["details"] and Path(said["details"]), said["status"])
    if what != "finished":
        return None
    kept = store.read(spec.key)
    if kept is None:
        return failure(spec, BadPlugin("its result was damaged after it was written"), store, store.begun(spec.key))
    return Finished(replace(kept, spec=spec), kept=False)


def _forked() -> _Nursery:
    """A nursery that is a fork of this process."""
    choose_device("cpu")  # once for both: what torch imports for it takes seconds
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        nursery.serve(theirs)
    theirs.close()
    return _Nursery(ours)


@cache
def _bare() -> tuple[_Nursery, Any]:
    """A nursery without plug-ins, from which others branch; a fresh process, once for this one."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", nursery.__name__, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    weakref.finalize(process, ours.close)
    return _Nursery(ours), process


def _branched() -> _Nursery:
    """A nursery for a set of plug-ins."""
    if not _bare()[0].is_there():
        _bare.cache_clear()
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(_bare()[0].control, [b"n"], [theirs.fileno()])
    return _Nursery(ours)


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
