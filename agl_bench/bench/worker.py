"""A worker: a process that an engine has started, and that runs cells of a job (`bench.jobs`).

It builds its bench once and keeps it for its life, so that neighbouring cells share their data.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path

from agl_bench.bench.apart import Apart
from agl_bench.bench.fitness import Skipped
from agl_bench.bench.jobs import Cell, Job, StoreAnew, is_wanted
from agl_bench.bench.leases import Owner
from agl_bench.bench.prepare import Preparation, fingerprint
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import (
    Bench,
    Event,
    Failed,
    Finished,
    Noted,
    Started,
    Stopped,
    Waiting,
    choose_device,
    run_cells,
)
from agl_bench.bench.spec import Part, RunSpec, make_dataset, part_here
from agl_bench.errors import AglBenchError, ExecutorFailed
from agl_bench.registry.plugins import Plugins

LOOK = 0.5  # seconds between two looks at whether the command is still there
GRACE = 10.0  # seconds that a worker may take to the end of its epoch when its command has ended
TIME_LIMIT = "time limit"  # as `Keeper` says it


def work(folder: Path, groups: Sequence[int], stop: Callable[[], str] = lambda: "") -> None:
    """Run what is not over of some groups of a job, in their order, as far as no other worker is at it.

    What is wrong with this worker, e.g. other versions of libraries, is noted in the job for the command to say.

    Args:
        folder: of the job.
        groups: numbers of groups.
        stop: why this worker must stop, asked after each epoch; "" = go on.
    """
    try:
        worker = _worker(folder)
    except AglBenchError as error:
        if not folder.is_dir():
            raise
        _Notes(folder)(event="refused", sentence=f"a worker on {Owner.this().host} cannot run these cells: {error}")
        return
    worker.run(groups, stop)


@lru_cache(maxsize=1)
def _worker(folder: Path) -> _Worker:
    return _Worker(folder)


@contextlib.contextmanager
def _ended_with_its_command(folder: Path) -> Iterator[None]:
    """Ends what this thread does, wherever it is, where the command is gone and no epoch's end has come since."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK):
            if not is_wanted(folder) and not over.wait(GRACE):
                _thread.interrupt_main()

    watch = threading.Thread(target=look, name="agl-bench: is the command there", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


class _Notes:
    """The file in which a worker notes what happens, one JSON object a line; the command reads along."""

    def __init__(self, folder: Path) -> None:
        self._stream = (folder / f"{Owner.this().name}.jsonl").open("a", encoding="utf-8", buffering=1)

    def __call__(self, **content: object) -> None:
        self._stream.write(json.dumps(content) + "\n")


class _Worker:
    """One process's share of a job."""

    def __init__(self, folder: Path) -> None:
        """Get ready.

        Raises:
            ExecutorFailed: if the cells would be others here.
            AglBenchError: if plug-ins, data or folders are not there.
        """
        self.folder = folder
        self.job = job = Job.read(folder)
        # A worker is born for its job. One without threads has computed nothing, and can be forked.
        is_fresh = sys.platform == "linux" and threading.active_count() == 1
        self.apart = Apart(fork=is_fresh) if job.apart else None
        plugins = Plugins.discover(job.files)
        self.note = _Notes(folder)
        prepared = Preparation(job.root, job.cache, self._say)
        self.cells = _own(job.cells, plugins, job.root, prepared)
        self.position = {spec.key: n for n, (spec, _) in enumerate(self.cells)}
        self.store = StoreAnew(job.work, job.old, self._say)
        self.bench = Bench(plugins, job.root, choose_device(job.device), prepared)
        self._looked, self._is_wanted = -LOOK, True

    def run(self, groups: Sequence[int], stop: Callable[[], str]) -> None:
        """See `work`."""

        def why() -> str:
            now = time.monotonic()
            if now - self._looked >= LOOK:
                self._looked, self._is_wanted = now, is_wanted(self.folder)
            return stop() or ("" if self._is_wanted else "its command has ended")

        with _ended_with_its_command(self.folder):
            self._run(groups, why)

    def _run(self, groups: Sequence[int], why: Callable[[], str]) -> None:
        for number in groups:
            if why():
                return
            cells = [self.cells[n] for n in self.job.groups[number] if not self._is_over(n)]
            if not cells:
                continue
            events = run_cells(
                cells, self.bench, self.store, NoRecorder(), checkpoint_every=self.job.checkpoint_every,
                time_limit=self.job.time_limit, stop=why, keep=self.job.keep, apart=self.apart,
            )  # fmt: skip
            with contextlib.closing(events):
                for event in events:
                    if isinstance(event, Waiting):  # for other workers; whoever is left sees to what they leave
                        self.note(event="held", cell=self.position[cells[-1][0].key])
                        break
                    self._tell(event)

    def _is_over(self, number: int) -> bool:
        """Whether nothing is to be done for a cell: it has ended, or its time is over."""
        key = self.cells[number][0].key
        return self.store.is_over(key) or (self.job.time_limit is not None and self._limit(key).exists())

    def _limit(self, key: str) -> Path:
        """Marks a cell that has used up its time, so that no other worker goes on with it."""
        return self.folder / f"limit-{key}"

    def _tell(self, event: Event) -> None:
        """Note what the command has to know."""
        if isinstance(event, Finished):
            if not event.kept:  # else another worker has said so
                self.note(event="finished", cell=self.position[event.result.spec.key])
        elif isinstance(event, Failed):
            if not event.kept:
                details = event.details and str(event.details)
                self.note(
                    event="failed", cell=self.position[event.spec.key], sentence=event.sentence, details=details,
                    status=event.status,
                )  # fmt: skip
        elif isinstance(event, Skipped):
            self.note(event="skipped", cell=self.position[event.spec.key], sentence=event.reason)
        elif isinstance(event, Stopped):
            is_final = event.why == TIME_LIMIT
            if is_final:
                self._limit(event.spec.key).touch()
            name = "stopped" if is_final else "paused"
            self.note(event=name, cell=self.position[event.spec.key], sentence=event.why)
        elif isinstance(event, Noted):
            self.note(event="noted", cell=self.position[event.spec.key], sentence=event.sentence)
        elif isinstance(event, Started):
            self.note(event="started", cell=self.position[event.spec.key])

    def _say(self, sentence: str) -> None:
        self.note(event="said", sentence=sentence.removeprefix("agl-bench: "))


def _own(cells: Sequence[Cell], plugins: Plugins, root: Path, prepared: Preparation) -> list[Cell]:
    """The cells as this process names them: equal to what the command has sent, or it is the wrong one to run them.

    Raises:
        ExecutorFailed: naming what is different here.
    """
    here = cache(partial(part_here, plugins))

    @cache
    def data(part: Part) -> str:
        return fingerprint(part, make_dataset(plugins, part), root, prepared.digests)

    own = []
    for spec, plan in cells:
        dataset = here(spec.dataset, "dataset")
        mine = spec.retraced(dataset, here(spec.backbone, "backbone"), here(spec.selector, "selector"), data(dataset))
        if mine.key != spec.key:
            raise ExecutorFailed(f"{_difference(mine, spec)}; have the same code, libraries and data on every machine")
        own.append((mine, plan))
    return own


def _difference(mine: RunSpec, sent: RunSpec) -> str:
    """The first thing in which two specs of one cell differ, as part of a sentence."""
    for kind in ("dataset", "backbone", "selector"):
        ours, theirs = getattr(mine, kind), getattr(sent, kind)
        if ours != theirs:
            what = "provider" if ours.provider != theirs.provider else "source"
            return f"{kind} '{theirs.name}' has {what} {getattr(ours, what)}, for the command {getattr(theirs, what)}"
    for name in ("version", "libraries", "data"):
        if getattr(mine, name) != getattr(sent, name):
            return f"its {name}: {getattr(mine, name)}; the command's: {getattr(sent, name)}"
    return "its settings mean something else"
