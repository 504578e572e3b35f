"""Where processes of single cells come from, and what they do; their side of `bench.apart`.

A nursery is a process that has imported agl-bench, torch and the plug-ins, and has computed nothing: no thread of a
library and no CUDA context is there that a fork would tear apart. Each cell gets a fork of it, in milliseconds.

On its socket a nursery is sent one letter and file descriptors:

    c   a cell: where its request is read from, where it tells what happens, where a crash leaves its trace. The nursery
        answers the number of the process, and when that has ended its status, a line each.
    n   another nursery, with other plug-ins: its socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from agl_bench.bench.cells import CellStore
from agl_bench.bench.checkpoints import Keeper
from agl_bench.bench.fitness import Skipped
from agl_bench.bench.leases import HeldLease
from agl_bench.bench.prepare import Preparation, code_digest
from agl_bench.bench.provenance import provenance
from agl_bench.bench.run import (
    Bench,
    EpochDone,
    Failed,
    Finished,
    Happening,
    Lost,
    Noted,
    Opened,
    Stopped,
    choose_device,
    failure,
    run_cell,
)
from agl_bench.bench.spec import Part, RunSpec, make_dataset
from agl_bench.data.folds import FoldPlan
from agl_bench.data.prepared import PatchSize
from agl_bench.errors import AglBenchError, BadPlugin, told
from agl_bench.registry.plugins import Plugins
from agl_bench.registry.strangers import AVOIDED

SIZE = struct.Struct(">Q")  # of a request, before it
DESCRIPTORS = 3
BEGUN = {"event": "begun"}  # what a process says first
PREPARED = {"event": "prepared"}  # what it says last if it was to prepare a dataset
_DIES_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


def serve(control: socket.socket) -> NoReturn:
    """Be a nursery until the other end of the socket is closed."""
    command = os.getppid()
    try:
        # What comes from a terminal, or to a whole group, is for the command, which tells us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_with(command)
        device = choose_device("cpu")  # what torch imports for it takes seconds
        provenance(device), code_digest()  # looked up once for all cells
        torch.set_num_threads(1)  # threads that a plug-in's import would leave behind do not survive a fork
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # nor does what else torch does to look for a device
        plugins = _Plugins()
        while True:
            letter, given, *_ = socket.recv_fds(control, 1, DESCRIPTORS)
            if not letter:
                os._exit(0)
            if letter == b"n":
                if os.fork():
                    os.close(given[0])
                    continue
                _end_with(os.getppid())
                control.close()
                control, plugins = socket.socket(fileno=given[0]), _Plugins()
                continue
            request = _read(given[0])
            plugins.get(request)
            gc.freeze()  # what is here lives as long as this process: a collection in a fork need not look at it
            nursery, pid = os.getpid(), os.fork()
            if not pid:
                control.close()
                _be_a_cell(nursery, request, plugins, *given)
            _see_to_its_end(control, pid, given)
    finally:
        os._exit(1)


def _see_to_its_end(control: socket.socket, pid: int, given: list[int]) -> None:
    """Tell who it is and how it ended; what it has started itself ends with it."""
    _lead_a_group(pid)
    for descriptor in given:
        os.close(descriptor)
    control.sendall(f"{pid}\n".encode())
    status = None
    if hasattr(os, "waitid"):  # not so on macOS before Python 3.13
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until it is waited for, its number is nobody else's
    else:
        status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left of the group
        os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1] if status is None else status
    control.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _lead_a_group(pid: int) -> None:
    """A process and all that it starts; parent and child both see to it, since either may be first."""
    try:
        os.setpgid(pid, pid)
    except OSError:
        return  # the other one has


def _end_with(parent: int) -> None:
    """End this process with its parent, whatever it is at; where the system cannot, it ends when it next looks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


class _Plugins:
    """The plug-ins of a nursery, imported once for all of its cells."""

    def __init__(self) -> None:
        self._found: Plugins | BaseException | None = None
        self._sources: dict[tuple[str, str], str] = {}

    def get(self, request: Mapping[str, Any]) -> None:
        """Import them, and those classes that stand behind a name; a fault of theirs is one of the cell."""
        os.chdir(request["folder"])
        sys.path[:] = request["path"]
        os.environ.update(request["environment"])
        for library in request["libraries"]:
            importlib.import_module(library)
        AVOIDED.update(request["avoided"])
        named = request.get("spec", request)
        parts = {kind: named[kind]["name"] for kind in ("dataset", "backbone", "selector") if kind in named}
        try:
            found = self._found or Plugins.discover(tuple(map(Path, request["files"])))
            if isinstance(found, Plugins):
                self._sources |= {
                    place: found.entry(place[1], place[0]).digest()
                    for place in parts.items()
                    if place not in self._sources
                }
            self._found = found
        except BaseException as error:  # noqa: BLE001  (a stranger's module)
            self._found = error

    def of(self, parts: Mapping[str, Part]) -> Plugins:
        """The plug-ins, as long as they are what the command has seen.

        Raises:
            BadPlugin: if they cannot be imported, or have changed since the command began.
        """
        if not isinstance(self._found, Plugins):
            raise BadPlugin(f"plug-ins cannot be imported in the process of a cell: {told(self._found or OSError())}")
        for kind, part in parts.items():
            if not part.source.startswith(self._sources[kind, part.name]):
                raise BadPlugin(
                    f"{kind} '{part.name}' of {part.provider} has changed since the command began; run it again"
                )
        return self._found


def _be_a_cell(
    nursery: int, request: Mapping[str, Any], plugins: _Plugins, orders: int, happenings: int, trace: int
) -> NoReturn:
    """The life of a forked process."""
    try:
        _lead_a_group(os.getpid())
        _end_with(nursery)
        signal.signal(signal.SIGTERM, _for_the_command)
        os.dup2(2, 1)  # standard output belongs to the results
        faulthandler.enable(trace)
        os.environ.clear()
        os.environ.update(request["environment"])
        tell = _Tell(happenings)
        tell(**BEGUN)
        torch.set_num_threads(request["threads"])
        if "plan" in request:
            _run(request, plugins, orders, tell)
        else:
            _prepare(request, plugins, tell)
        os._exit(0)
    finally:
        os._exit(1)


def _for_the_command(*_: object) -> None:
    """A signal to a whole group: the command hears it too, and says what is to be done."""


class _Tell:
    """Tells the command what happens, one JSON object a line."""

    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)

    def __call__(self, **content: object) -> None:
        try:
            self._stream.write(json.dumps(content) + "\n")
        except BrokenPipeError:  # the command has gone; that is no fault of the cell, and no failure to be recorded
            os._exit(1)

    def event(self, event: Happening) -> None:
        """One of a running cell."""
        if isinstance(event, EpochDone):
            self(event="epoch", record=asdict(event.record))
        elif isinstance(event, Noted):
            self(event="noted", sentence=event.sentence)
        elif isinstance(event, Failed):
            details = event.details and str(event.details)
            self(event="failed", sentence=event.sentence, details=details, status=event.status)
        elif isinstance(event, Skipped):
            self(event="skipped", sentence=event.reason)
        elif isinstance(event, Stopped):
            self(event="stopped", sentence=event.why)
        else:
            plain: dict[type, str] = {Opened: "opened", Finished: "finished", Lost: "lost"}
            self(event=plain[type(event)])


def _run(request: Mapping[str, Any], plugins: _Plugins, orders: int, tell: _Tell) -> None:
    """Run the cell and tell what happens."""
    spec, store = RunSpec.from_json(request["spec"]), CellStore(Path(request["work"]))
    keeper = Keeper(
        store.begun(spec.key), HeldLease(Path(request["lease"])), every=request["checkpoint_every"],
        limit=request["time_limit"], stop=_Orders(orders),
    )  # fmt: skip
    try:
        parts = {kind: getattr(spec, kind) for kind in ("dataset", "backbone", "selector")}
        bench = _bench(request, plugins.of(parts))
        plan = FoldPlan.from_json(request["plan"])
        for event in run_cell(spec, plan, bench, store, keeper, request["keep"]):
            tell.event(event)
    except BaseException as error:  # noqa: BLE001  (no signal of a person comes here: whatever it is, is a stranger's)
        tell.event(failure(spec, error, store, keeper.partial))


def _prepare(request: Mapping[str, Any], plugins: _Plugins, tell: _Tell) -> None:
    """Prepare the sections of a dataset."""
    part = Part.from_json(request["dataset"])
    try:
        bench = _bench(request, plugins.of({"dataset": part}))
        size = PatchSize(*request["size"]) if request["size"] else None
        bench.sections(part, size)
        make_dataset(bench.plugins, part).truth(bench.root)
    except BaseException as error:  # noqa: BLE001  (as above)
        is_input = isinstance(error, AglBenchError) and not isinstance(error, BadPlugin)
        tell(event="refused" if is_input else "failed", sentence=told(error))
        return
    tell(**PREPARED)


def _bench(request: Mapping[str, Any], plugins: Plugins) -> Bench:
    root = Path(request["root"])
    return Bench(plugins, root, choose_device(request["device"]), Preparation(root, Path(request["cache"])))


class _Orders:
    """Why the cell must stop, as the command says; "" if it need not."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._why = descriptor, ""

    def __call__(self) -> str:
        if not self._why and select.select([self._descriptor], [], [], 0)[0]:
            self._why = os.read(self._descriptor, 1000).decode().strip() or "its command has ended"
        return self._why


def _read(descriptor: int) -> dict[str, Any]:
    """A request, whole."""

    def take(size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = os.read(descriptor, size - len(found))
            if not part:
                raise EOFError
            found += part
        return found

    (size,) = SIZE.unpack(take(SIZE.size))
    found: dict[str, Any] = json.loads(take(size))
    return found


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
