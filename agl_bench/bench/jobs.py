"""Jobs: cells on workers, which are processes of an engine (`bench.executors`) that share the work folder.

One discipline whatever the engine. This process, the command, writes a job into the work folder: the cells in groups
that share their data. The engine starts workers, hands them groups, and starts another worker where one dies. A worker
(`bench.worker`) takes a lease on each cell, runs it, and writes it into the store, as every process on a work folder
does; it notes what happens as lines of a file of its own in the job. The command reads these lines and finished cells,
records them, and is the only one that talks to MLflow.

The command holds a lease on its job. Where it gives it back, or dies, workers stop at the end of their epoch with a
checkpoint, on whatever machine they are.

    executors/<job>/        the lease, while the command lives
    executors/.job-<job>/   job.json, what happened (<worker>.jsonl), and files of the engine; gone when all has ended
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agl_bench.bench.cells import CellStore
from agl_bench.bench.checkpoints import EVERY, replace_text
from agl_bench.bench.executors import DEATHS, Engine
from agl_bench.bench.fitness import Skipped
from agl_bench.bench.leases import Lease, Leases
from agl_bench.bench.recorder import Recorder
from agl_bench.bench.run import Event, Failed, Finished, Keep, Noted, Stopped, Waiting, outcome_before
from agl_bench.bench.spec import RunSpec
from agl_bench.data.folds import FoldPlan
from agl_bench.errors import ExecutorFailed

POLL = 0.2  # seconds between two looks at what workers have noted
PATIENCE = 3  # times that workers may end without having done anything
GROUPS = 8  # for each worker, so that all end at about the same time
LARGEST = 20  # cells in a group

Cell = tuple[RunSpec, FoldPlan]


@dataclass
class Job:
    """What workers have to know: written once by the command, read by each worker.

    Attributes:
        work, root, cache: folders, at the same place on every machine.
        files: single-file plug-ins.
        device: "cpu" or "cuda".
        checkpoint_every, time_limit, keep: as of `run_cells`.
        cells: all that may be run.
        groups: positions in `cells` of such as share data.
        old: key -> stamp of a result or failure that does not count, since the cell is to be run anew.
        apart: whether cells with plug-ins of others run in processes of their own, see `bench.apart`.
    """

    work: Path
    root: Path
    cache: Path
    files: tuple[Path, ...] = ()
    device: str = "cpu"
    checkpoint_every: float = EVERY
    time_limit: float | None = None
    keep: Keep = "predictions"
    cells: list[Cell] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    old: dict[str, str] = field(default_factory=dict)
    apart: bool = False

    def write(self, folder: Path) -> None:
        """Into `job.json` of a folder."""
        names = ("device", "checkpoint_every", "time_limit", "keep", "groups", "old", "apart")
        plain = {name: getattr(self, name) for name in names}
        paths = {n: str(getattr(self, n).absolute()) for n in ("work", "root", "cache")}
        cells = [{"spec": spec.as_json(), "plan": asdict(plan)} for spec, plan in self.cells]
        content = plain | paths | {"files": [str(f.absolute()) for f in self.files], "cells": cells}
        replace_text(folder / "job.json", json.dumps(content))

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Inverse of `write`. The specs are as the command has named them.

        Raises:
            ExecutorFailed: if there is none.
        """
        try:
            content: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        except OSError:
            raise ExecutorFailed(
                f"there is no {folder} there; the work folder and the data must lie at the same place on every machine"
            ) from None
        cells = [(RunSpec.from_json(cell["spec"]), FoldPlan.from_json(cell["plan"])) for cell in content.pop("cells")]
        paths: dict[str, Any] = {n: Path(content.pop(n)) for n in ("work", "root", "cache")}
        return cls(**paths, files=tuple(map(Path, content.pop("files"))), cells=cells, **content)


class StoreAnew(CellStore):
    """A store in which results and failures that do not count are absent."""

    def __init__(self, work: Path, old: Mapping[str, str], warn: Callable[[str], None] = lambda _: None) -> None:
        """See `CellStore`.

        Args:
            work: the work folder.
            old: key -> `stamp` of what does not count.
            warn: told what was found damaged.
        """
        super().__init__(work, warn)
        self.old = old

    def read(self, key: str) -> Any:
        """As of `CellStore`."""
        return None if self.is_old(key) else super().read(key)

    def failure(self, key: str) -> Any:
        """As of `CellStore`."""
        return None if self.is_old(key) else super().failure(key)

    def is_old(self, key: str) -> bool:
        """Whether what is kept of a cell does not count."""
        return key in self.old and self.old[key] == stamp(self, key)

    def is_over(self, key: str) -> bool:
        """Whether a cell has a result or has failed; a glance, without reading it."""
        there = (self.cells / key / "result.json").exists() or (self.failed / key / "failure.json").exists()
        return there and not self.is_old(key)


def stamp(store: CellStore, key: str) -> str:
    """Tells one result or failure of a cell from a later one: which files, and when they were written."""
    parts = []
    for path in (store.cells / key / "result.json", store.failed / key / "failure.json"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            parts.append(f"{found.st_ino}.{found.st_mtime_ns}")
    return " ".join(parts)


def groups_of(cells: Sequence[Cell], workers: int) -> list[list[int]]:
    """Positions of neighbouring cells that share their data, in groups small enough for all workers to end together."""
    largest = min(max(1, len(cells) // (GROUPS * workers)), LARGEST)

    def data(position: int) -> object:
        spec, plan = cells[position]
        return spec.dataset, spec.evaluation, plan, spec.seed, spec.protocol

    groups = []
    for _, neighbours in itertools.groupby(range(len(cells)), data):
        positions = list(neighbours)
        groups += [positions[i : i + largest] for i in range(0, len(positions), largest)]
    return groups


def run_on(
    engine: Engine,
    cells: Sequence[Cell],
    job: Job,
    store: CellStore,
    recorder: Recorder,
    *,
    again: bool = False,
    retry_failed: bool = False,
    stop: Callable[[], str] = lambda: "",
) -> Iterator[Event]:
    """As `run_cells`, on workers of an engine; without events of epochs, which stay with the workers.

    A cell whose worker dies is continued by another from its checkpoint. One at which `DEATHS` workers have died
    counts as failed.

    Args:
        engine: starts the workers.
        cells: from `Campaign.cells`.
        job: settings for workers; its cells are filled in here.
        store: where results are kept.
        recorder: where they are shown.
        again: run finished and failed cells anew, from the beginning.
        retry_failed: run failed cells anew.
        stop: why no more must be done, asked often; "" = go on. Running cells end with their epoch.

    Raises:
        ExecutorFailed: if the engine has no workers, or they cannot run these cells.
    """
    with contextlib.ExitStack() as end:
        end.callback(recorder.finish)
        end.enter_context(store.announced(spec for spec, _ in cells))
        left: dict[str, Cell] = {}
        for spec, plan in cells:
            if stop():
                return
            outcome = outcome_before(spec, store, again=again, retry_failed=retry_failed)
            if outcome is None or store.leases.holder(spec.key) is not None:  # its process may be busy with showing it
                left[spec.key] = (spec, plan)
                continue
            if isinstance(outcome, Finished):
                recorder.record(outcome.result)
            yield outcome
        if not left:
            return
        if again or retry_failed:
            job.old = {key: old for key in left if (old := stamp(store, key))}
        if again:
            for key in left:
                if store.leases.holder(key) is None:
                    store.begun(key).discard()
        folder, lease = end.enter_context(_job_folder(store.work))
        end.callback(engine.close)
        end.callback(lease.release)  # first of all, so that workers end
        engine.start(folder)
        job.cells = list(left.values())
        job.groups = groups_of(job.cells, engine.workers)
        job.write(folder)
        campaign = _Campaign(folder, left, StoreAnew(store.work, job.old, store.warn), recorder)
        yield from campaign.run(engine, job, stop)
        if stop():
            lease.release()
            while engine.is_busy() and campaign.is_worked_on():
                yield from campaign.news()
                time.sleep(POLL)
            yield from campaign.news()
            yield from campaign.stopped(stop())


class _Campaign:
    """The command's side of a job: what has become of its cells."""

    def __init__(self, folder: Path, left: dict[str, Cell], store: StoreAnew, recorder: Recorder) -> None:
        self.folder, self.left, self.store, self.recorder = folder, left, store, recorder
        self.keys = list(left)
        self.at: dict[str, str] = {}  # file of a worker -> key of the cell that it has begun
        self.paused: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self._read: Counter[str] = Counter()  # bytes of each file

    def run(self, engine: Engine, job: Job, stop: Callable[[], str]) -> Iterator[Event]:
        """Until nothing is left, or no more must be done."""
        said, idle = False, 0
        while self.left and not stop():
            before = len(self.left), self.deaths.total()
            engine.submit([n for n, group in enumerate(job.groups) if any(self.keys[c] in self.left for c in group)])
            is_busy = True
            while is_busy and not stop():
                is_busy = engine.is_busy()  # before the look, so that it misses nothing
                yield from self.news()
                if is_busy:
                    time.sleep(POLL)
            if stop():
                return
            yield from self._unsaid()
            yield from self._deadly(engine)
            idle = idle + 1 if (len(self.left), self.deaths.total()) == before else 0
            holders = {key: holder for key in self.left if (holder := self.store.leases.holder(key)) is not None}
            if self.left and len(holders) == len(self.left):
                if not said:
                    yield Waiting(len(holders), tuple({o.name: o for o in holders.values()}.values()))
                said, idle = True, 0
                while not stop() and self._all_are_held():
                    time.sleep(1)
            elif idle >= PATIENCE:
                raise ExecutorFailed(
                    f"workers end without running anything: {engine.problem() or 'nobody says why'}; "
                    "--executor serial runs the cells here"
                )

    def news(self) -> Iterator[Event]:
        """What workers have noted since the last look.

        Raises:
            ExecutorFailed: if one cannot run these cells.
        """
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as stream:
                stream.seek(self._read[path.name])
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # being written
                    self._read[path.name] += len(line)
                    yield from self._take(path.name, json.loads(line))

    def stopped(self, why: str) -> Iterator[Event]:
        """Cells that were stopped between two epochs."""
        for key in self.keys:
            if key in self.paused & set(self.left):
                yield self._stop(key, why)

    def is_worked_on(self) -> bool:
        """Whether any cell that is left has a holder."""
        return any(self.store.leases.holder(key) is not None for key in self.left)

    def _all_are_held(self) -> bool:
        return all(self.store.leases.holder(key) is not None for key in self.left)

    def _take(self, worker: str, said: Mapping[str, Any]) -> Iterator[Event]:
        """One line of a worker."""
        what, sentence = said["event"], said.get("sentence", "")
        if what == "refused":
            raise ExecutorFailed(sentence)
        if what == "said":
            self.store.warn(sentence)
            return
        key = self.keys[said["cell"]]
        self.at.pop(worker, None)
        if what in ("started", "noted"):
            self.at[worker] = key
            self.paused.discard(key)
        elif what == "paused":
            self.paused.add(key)
        if key not in self.left:
            return
        spec, _ = self.left[key]
        if what == "noted":
            yield Noted(spec, sentence)
        elif what == "finished":
            outcome = outcome_before(spec, self.store, again=False, retry_failed=True)
            if isinstance(outcome, Finished):  # else it was damaged in between, and is computed anew
                yield self._finish(Finished(outcome.result, kept=False))
        elif what == "failed":
            yield self._fail(Failed(spec, sentence, said["details"] and Path(said["details"]), said["status"]))
        elif what == "skipped":
            self.left.pop(key)
            yield Skipped(spec, sentence)
        elif what == "stopped":
            yield self._stop(key, sentence)

    def _unsaid(self) -> Iterator[Event]:
        """Cells that have ended without a word of our workers: by other commands, or right before a worker died."""
        for key, (spec, _) in list(self.left.items()):
            if self.store.leases.holder(key) is not None:
                continue
            outcome = outcome_before(spec, self.store, again=False, retry_failed=False)
            if isinstance(outcome, Finished):
                yield self._finish(outcome)
            elif outcome is not None:
                yield self._fail(outcome)

    def _deadly(self, engine: Engine) -> Iterator[Event]:
        """Cells at which too many workers have died."""
        for key in self.at.values():
            self.deaths[key] += 1
        self.at.clear()
        for key, number in self.deaths.items():
            if key in self.left and number >= DEATHS:
                spec, _ = self.left[key]
                sentence = f"{number} workers died while running it, perhaps for lack of memory"
                trace = engine.problem()
                details = self.store.write_failure(spec, sentence, trace)
                yield self._fail(Failed(spec, sentence, details))

    def _finish(self, outcome: Finished) -> Finished:
        self.left.pop(outcome.result.spec.key)
        self.recorder.record(outcome.result, anew=not outcome.kept)
        return outcome

    def _fail(self, outcome: Failed) -> Failed:
        self.left.pop(outcome.spec.key)
        if not outcome.kept:
            self.recorder.open(outcome.spec).fail(outcome.sentence)
        return outcome

    def _stop(self, key: str, why: str) -> Stopped:
        spec, _ = self.left.pop(key)
        self.recorder.open(spec).fail("interrupted")
        return Stopped(spec, why)


@contextlib.contextmanager
def _job_folder(work: Path) -> Iterator[tuple[Path, Lease]]:
    """Folder of a new job and the command's lease on it; what killed commands have left is cleared."""
    leases = Leases(work / "executors")
    leases.folder.mkdir(exist_ok=True)
    leases.sweep()
    for folder in leases.folder.glob(".job-*"):
        if leases.holder(_name_of(folder)) is None:
            shutil.rmtree(folder, ignore_errors=True)
    folder = (leases.folder / f".job-{uuid.uuid4().hex[:12]}").absolute()
    lease = leases.take(_name_of(folder))
    assert lease is not None  # nobody else knows its name
    with lease:
        try:
            folder.mkdir()
            yield folder, lease
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _name_of(folder: Path) -> str:
    """Of a job, as its lease has it."""
    return folder.name.removeprefix(".job-")


def is_wanted(folder: Path) -> bool:
    """Whether the command of a job is alive and wants it to go on."""
    return Leases(folder.parent).holder(_name_of(folder)) is not None
