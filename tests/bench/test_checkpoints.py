"""Cells that are killed, stopped, damaged or wanted by two end as if nothing had been."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pandas as pd
import pytest
import torch

from agl_bench.bench import checkpoints
from agl_bench.bench.cells import CellStore
from agl_bench.bench.checkpoints import Partial
from agl_bench.bench.leases import Owner
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import EpochDone, Failed, Finished, Noted, Started, Stopped, Waiting, run_cells
from agl_bench.bench.status import Place, as_json, status_of
from agl_bench.cli import main

SELECTORS = ("pgl", "agl", "random_k", "hvg_k", "dkgsb", "amal")
FEWER = ("random_k.k=20", "hvg_k.k=20")
SCHEDULES = {
    "alternating": ("protocol.outer_start=0", "protocol.epochs=5"),
    "two_stage": (
        *("protocol.schedule=two_stage", "protocol.warm_start=learners", "protocol.round_patience=1"),
        *("protocol.patience=1", "protocol.outer_patience=1", "protocol.outer_passes=2", "protocol.epochs=6"),
    ),
}

DIVERGING = """
    from agl_bench import Selector, hookimpl

    class Diverging(Selector):
        '''Has no finite loss in its second epoch.'''
        reference = "test"

        def forward(self, losses, step):
            return losses[self.is_primary].mean() * (float("nan") if step.epoch == 1 else 1)

    @hookimpl
    def register_selectors():
        return {"diverging": Diverging}
"""

# Forks a process for each try, so that what takes long is imported once. It never trains itself: no thread is lost.
DRIVER = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import scanpy
    import torch
    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.recorder import NoRecorder
    from agl_bench.bench.run import Bench, EpochDone, Started, choose_device, fingerprints, run_cells
    from agl_bench.bench.spec import Campaign
    from agl_bench.registry.plugins import Plugins

    torch.set_num_threads(1)
    device, plugins, root = choose_device("cpu"), Plugins.discover(()), Path(os.devnull)

    class Job:
        def __init__(self, how):
            self.place = Path(how["place"])
            campaign = Campaign.of(
                plugins, selectors=how["selectors"], datasets=["synthetic"], evaluation=["inter"], preset="smoke",
                seeds=how["seeds"], fold=how["fold"], assignments=how["settings"],
            )
            known = fingerprints(campaign, plugins, root, None)
            self.cells = campaign.cells(plugins, root, device="cpu", fingerprint=known)
            getattr(self, how["mode"])()

        def start(self, work, events=None):
            # Runs all cells in a new process, killed after so many events of it; returns its number.
            child = os.fork()
            if child:
                return child
            try:
                bench = Bench(plugins, root, device, Preparation(root, self.place.parent / "cache"))
                store = CellStore(self.place / work)
                with open(self.place / f"{work}.log", "a", buffering=1) as log:
                    for event in run_cells(self.cells, bench, store, NoRecorder(), checkpoint_every=0):
                        kind = type(event).__name__
                        if kind != "Waiting":
                            spec = event.result.spec if kind == "Finished" else event.spec
                            log.write(f"{os.getpid()} {kind} {spec.key} {getattr(event, 'sentence', '')}\\n")
                        events = events and events - 1
                        if events == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)

        def killed(self):
            assert ended(self.start("undisturbed")) == 0
            chance, kills, status = random.Random(3), 0, None
            while status != 0:
                if chance.random() < 0.6:
                    status = ended(self.start("work", chance.randint(2, 9 + kills)))
                else:
                    child = self.start("work")
                    time.sleep(chance.uniform(0.1, 0.6 + 0.1 * kills))
                    os.kill(child, signal.SIGKILL)
                    status = ended(child)
                assert status in (0, -signal.SIGKILL), status
                kills += status != 0
            (self.place / "kills").write_text(str(kills))

        def shared(self):
            children = [self.start("work") for _ in range(2)]
            assert [ended(child) for child in children] == [0, 0]

    def ended(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for how in json.loads(sys.argv[1]):
        Job(how)
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory, small):
    """Folder of each job of the driver: `work`, its log, and `undisturbed` where it was killed."""
    place = tmp_path_factory.mktemp("driven")
    jobs = {
        "alternating": ("killed", SELECTORS, ["0", "7"], ["D1"], SCHEDULES["alternating"]),
        "two_stage": ("killed", ("agl", "dkgsb", "amal"), ["5"], ["D2"], SCHEDULES["two_stage"]),
        "shared": ("shared", SELECTORS, ["0"], [], ()),
    }
    words = []
    for name, (mode, selectors, seeds, fold, settings) in jobs.items():
        (place / name).mkdir()
        how = {"mode": mode, "place": str(place / name), "selectors": selectors, "seeds": seeds, "fold": fold}
        words.append(how | {"settings": [*small, *FEWER, *settings]})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(DRIVER), json.dumps(words)],
        capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place


def log_of(place):
    """Process, event, key and sentence of each event."""
    return [line.split(" ", 3) for line in (place / "work.log").read_text().splitlines()]


def same(first, second):
    """Bit for bit, cost and times apart."""
    assert first.spec == second.spec
    for name in ("genes", "outer"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True)
    epochs = [r.epochs.drop(columns="seconds") for r in (first, second)]
    pd.testing.assert_frame_equal(*epochs, check_exact=True)
    for name in ("scores", "best_epoch", "counts", "fold"):
        assert getattr(first, name) == getattr(second, name)
    assert first.provenance["hypergradient"] == second.provenance["hypergradient"]


def nothing_is_left(store):
    assert store.leases.running() == {}
    assert [p.name for folder in (store.partial, store.failed, store.grids) for p in folder.iterdir()] == []


@pytest.mark.parametrize(("schedule", "cells"), [("alternating", 12), ("two_stage", 3)])
def test_killed_at_any_time(driven, schedule, cells):
    place = driven / schedule
    assert int((place / "kills").read_text()) >= 3
    store = CellStore(place / "work")
    found, expected = ({r.spec.key: r for r in s} for s in (store, CellStore(place / "undisturbed")))
    assert len(found) == cells and found.keys() == expected.keys()
    for key, result in found.items():
        same(result, expected[key])
    assert any(kind == "Noted" and text.startswith("continued after epoch") for _, kind, _, text in log_of(place))
    nothing_is_left(store)


def test_two_processes_share_the_cells(driven):
    log = log_of(driven / "shared")
    started = [(key, process) for process, kind, key, _ in log if kind == "Started"]
    keys = {key for key, _ in started}
    assert len(started) == len(keys) == 12, "a cell was run twice"
    assert len({process for _, process in started}) == 2
    for process in {process for _, process in started}:  # each ends with the whole table
        assert {key for p, kind, key, _ in log if (p, kind) == (process, "Finished")} == keys
    store = CellStore(driven / "shared/work")
    assert {r.spec.key for r in store} == keys
    nothing_is_left(store)


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def events(grid, tmp_path):
    """Run dkgsb on one fold; returns its events. Further arguments are those of `run_cells`."""
    cells, bench = grid("dkgsb", fold=["D1"], more=["protocol.epochs=4"])

    def events(work="work", **options):
        options = {"checkpoint_every": 0} | options
        return run_cells(cells, bench, CellStore(tmp_path / work), NoRecorder(), **options)

    events.spec = cells[0][0]
    return events


@pytest.fixture
def expected(events):
    return list(events("undisturbed"))[-1].result


@pytest.fixture
def store(tmp_path):
    return CellStore(tmp_path / "work")


@pytest.fixture
def stopped(events, store):
    """The cell was interrupted after its second epoch; returns the file of its checkpoint."""
    seen = []
    (*_, last) = (seen.append(e) or e for e in events(stop=lambda: "test" if len(seen) > 1 else ""))
    assert isinstance(last, Stopped) and last.why == "test"
    (path,) = (store.partial / events.spec.key).glob("*.pt")
    assert path.name.startswith("0000001-")
    return path


def test_stopped_and_continued(events, stopped, expected, store):
    place = Place("synthetic", "inter", "tiny", "dkgsb")
    found = status_of(store.work)
    assert found.counts == {place: {"interrupted": 1}} and found.running == []
    kinds = []
    for event in events():
        kinds.append(type(event))
        if kinds == [Started]:
            (running,) = status_of(store.work).running
            assert (running.place, running.owner.pid, running.progress) == (place, os.getpid(), (1, 4))
            assert as_json(status_of(store.work))["lines"][0]["running"] == 1
    assert kinds == [Started, Noted, *[EpochDone] * 4, Finished]
    same(event.result, expected)
    assert event.result.cost["seconds"] > 0
    assert status_of(store.work).counts == {place: {"done": 1}}
    nothing_is_left(store)


def test_stopped_before_its_first_epoch(events, expected, store):
    seen = []
    kinds = [type(seen.append(e) or e) for e in events(stop=lambda: "test" if seen else "")]
    assert kinds == [Started, Stopped]
    nothing_is_left(store)
    same(list(events())[-1].result, expected)


def test_a_time_limit_stops_each_cell_and_goes_on(grid, tmp_path):
    cells, bench = grid("pgl,amal", fold=["D1"])
    store, turns = CellStore(tmp_path / "work"), []
    while len(list(store)) < 2:
        turns.append(list(run_cells(cells, bench, store, NoRecorder(), time_limit=1e-9)))
        assert len(turns) < 10
    assert [type(e) for e in turns[0]] == [Started, Stopped, Started, Stopped]
    assert {e.why for e in turns[0] if isinstance(e, Stopped)} == {"time limit"}
    whole = {r.spec.key: r for r in store}
    for event in run_cells(cells, bench, CellStore(tmp_path / "undisturbed"), NoRecorder()):
        if isinstance(event, Finished):
            same(event.result, whole[event.result.spec.key])


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "no checkpoint", "another format"])
def test_a_damaged_checkpoint_is_set_aside(events, stopped, expected, store, damage):
    content = stopped.read_bytes()
    if damage in ("truncated", "changed", "empty"):
        broken = {"truncated": content[:-100], "changed": content[:300] + b"x" + content[301:], "empty": b""}[damage]
        stopped.write_bytes(broken)
    else:  # as the digest says, but of no use
        state = {"format": 0} if damage == "another format" else [os.getcwd]
        torch.save(state, stopped)
        stopped.rename(stopped.with_name(f"0000001-{checkpoints.file_digest(stopped, 16)}.pt"))
    started, noted, *rest = events()
    assert isinstance(started, Started) and isinstance(noted, Noted)
    assert noted.sentence.startswith("its checkpoint") and noted.sentence.endswith(
        "it was set aside, and the cell starts again"
    )
    same(rest[-1].result, expected)


def test_a_damaged_checkpoint_stays_to_be_looked_at(stopped):
    stopped.write_bytes(stopped.read_bytes()[:-1])
    partial = Partial(stopped.parent)
    assert partial.read() == (None, "its checkpoint is damaged")
    assert [p.name for p in stopped.parent.glob("*.pt")] == [f"damaged-{stopped.name}"]
    assert partial.read() == (None, "")


def test_what_a_killed_writer_left_is_no_checkpoint(events, stopped, expected):
    (stopped.parent / f".{stopped.name}.part").write_bytes(b"PK")
    (stopped.parent / "progress.json").write_text('{"epoch": ')
    assert Partial(stopped.parent).progress() is None
    same(list(events())[-1].result, expected)


def test_a_full_disk_costs_a_cell_and_no_work(events, expected, store, monkeypatch):
    write, count = checkpoints.write_through, []

    def full(path, data):
        count.append(path)
        if len(count) == 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_through", full)
    (*_, failed) = events()
    assert isinstance(failed, Failed) and failed.status == "failed"
    assert failed.sentence == (
        f"no space is left to write to {store.work} (No space left on device); "
        "free some, and continue the cell with --retry-failed"
    )
    assert list(store) == [] and store.leases.running() == {}
    assert status_of(store.work).counts == {Place("synthetic", "inter", "tiny", "dkgsb"): {"failed": 1}}
    (kept,) = events()
    assert kept == replace(failed, kept=True)
    _, noted, *_, done = events(retry_failed=True)
    assert noted.sentence == "continued after epoch 1"
    same(done.result, expected)
    nothing_is_left(store)


def test_a_file_that_may_not_grow(events, expected, stopped, store):
    """The system refuses for real."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = stopped.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        (*_, failed) = events()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"no space is left to write to {store.work} (File too large)" in failed.sentence
    assert stopped.stat().st_size == size and len(list(stopped.parent.glob("*.pt*"))) == 1
    same(list(events(retry_failed=True))[-1].result, expected)


def test_killed_right_after_its_result(events, expected, stopped, store):
    kept = stopped.read_bytes()
    store.write(expected)
    stopped.parent.mkdir()
    stopped.write_bytes(kept)
    (event,) = events()
    assert event.kept
    nothing_is_left(store)


def test_again_begins_anew(events, stopped):
    assert not any(isinstance(e, Noted) for e in events(again=True))


def test_diverged_is_not_tried_again(grid, tmp_path):
    path = tmp_path / "diverging.py"
    path.write_text(textwrap.dedent(DIVERGING))
    cells, bench = grid("diverging", files=[path], fold=["D1"])
    *_, diverged = run_cells(cells, bench, CellStore(tmp_path), NoRecorder(), checkpoint_every=0)
    assert isinstance(diverged, Failed) and diverged.status == "diverged"
    assert diverged.sentence.startswith("the training loss became nan in epoch 1")
    assert status_of(tmp_path).counts == {Place("synthetic", "inter", "tiny", "diverging"): {"diverged": 1}}
    assert list(run_cells(cells, bench, CellStore(tmp_path), NoRecorder())) == [replace(diverged, kept=True)]
    kinds = [type(e) for e in run_cells(cells, bench, CellStore(tmp_path), NoRecorder(), retry_failed=True)]
    assert kinds == [Started, EpochDone, Failed], "what led there is no place to continue from"


def test_waits_for_others_and_takes_over_what_they_leave(grid, tmp_path, monkeypatch):
    monkeypatch.setattr("agl_bench.bench.run.POLL", 0.01)
    cells, bench = grid("pgl,agl", fold=["D1"])
    store = CellStore(tmp_path)
    other = store.leases.take(cells[0][0].key)
    order = []
    for event in run_cells(cells, bench, store, NoRecorder()):
        order.append(type(event))
        if isinstance(event, Waiting):
            assert (event.cells, [o.pid for o in event.holders]) == (1, [os.getpid()])
            found = status_of(tmp_path)
            assert {p.selector: dict(c) for p, c in found.counts.items()} == {"agl": {"done": 1}, "pgl": {"running": 1}}
            other.release()
    assert [k for k in order if k is not EpochDone] == [Started, Finished, Waiting, Started, Finished]
    assert event.result.spec.selector.name == "pgl"
    nothing_is_left(store)


def test_a_result_that_is_still_being_shown_by_its_process_is_waited_for(events, expected, store, monkeypatch):
    monkeypatch.setattr("agl_bench.bench.run.POLL", 0.01)
    store.write(expected)
    other, kinds = store.leases.take(events.spec.key), []
    for event in events():
        kinds.append(type(event))
        if isinstance(event, Waiting):
            other.release()
    assert kinds == [Waiting, Finished] and event.kept


def test_what_is_left_to_do_is_known_while_it_runs(grid, tmp_path):
    cells, bench = grid("pgl,agl", fold=["D1"])
    run = run_cells(cells, bench, CellStore(tmp_path), NoRecorder())
    next(run)
    found = {p.selector: dict(c) for p, c in status_of(tmp_path).counts.items()}
    assert found == {"pgl": {"running": 1}, "agl": {"to do": 1}}
    run.close()
    assert {p.selector: dict(c) for p, c in status_of(tmp_path).counts.items()} == {}


def test_a_cell_that_another_process_took_over_is_left_to_it(events, expected, store, monkeypatch):
    monkeypatch.setattr("agl_bench.bench.run.POLL", 0.01)
    seen = []
    for event in events():
        seen.append(event)
        if [type(e) for e in seen] == [Started, EpochDone]:
            (lease,) = (store.leases.folder / events.spec.key).iterdir()
            (other,) = [lease.rename(lease.with_name(Owner("other", 1, "5", "0a", "0b").name))]
        if isinstance(event, Waiting):
            store.write(expected)
            other.unlink()
    kinds = [type(e) for e in seen]
    assert kinds == [Started, EpochDone, Noted, Waiting, Finished]
    assert seen[2].sentence == "taken over by another process" and seen[-1].kept


# --- the command line ------------------------------------------------------------------------------------------------

SIGNALLING = """
    import os, time
    from agl_bench import Selector, hookimpl

    class Signalling(Selector):
        '''Has the command ended in its second epoch if it is told to.'''
        reference = "test"
        signalled = False

        def forward(self, losses, step):
            if step.epoch == 1 and not self.signalled and "AGL_TEST_SIGNAL" in os.environ:
                self.signalled = True
                number, command = os.environ["AGL_TEST_SIGNAL"].split()
                os.kill(int(command), int(number))
                time.sleep(2)  # until its word has come
            return losses[self.is_primary].mean()

    @hookimpl
    def register_selectors():
        return {"signalling": Signalling}
"""


def status(words):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main(words)
    finally:
        signal.signal(signal.SIGTERM, before)
    return caught.value.code or 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_epoch(number, tmp_path, words, monkeypatch, capfd):
    path = tmp_path / "signalling.py"
    path.write_text(textwrap.dedent(SIGNALLING))
    handler = signal.getsignal(signal.SIGINT)
    command = ["run", "--selectors", "pgl,signalling", "--plugin", str(path), "--fold", "D1", *words]
    work = ["--work", str(tmp_path / "work")]
    monkeypatch.setenv("AGL_TEST_SIGNAL", f"{int(number)} {os.getpid()}")
    assert status([*command, *work]) == 75
    monkeypatch.delenv("AGL_TEST_SIGNAL")
    assert signal.getsignal(signal.SIGINT) == handler
    said = capfd.readouterr()
    assert f"signalling · fold D1 · seed 0: INTERRUPTED, {number.name}" in said.out
    assert said.err.split("\n")[:1] + said.err.split("\n")[-2:-1] == [
        "agl-bench: stopping at the end of this epoch, or in 10 s; a second signal ends at once",
        "agl-bench: interrupted; finished work is kept, and the same command continues",
    ]
    assert status(["status", *work]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].strip() == f"cells of {tmp_path / 'work'}"
    (line,) = (line for line in lines if "signalling" in line)
    assert [w.strip() for w in line.strip("│").split("│")][:7] == [
        "synthetic", "inter", "tiny", "signalling", "–", "–", "1",
    ]  # fmt: skip
    assert status([*command, *work]) == 0
    assert "signalling · fold D1 · seed 0: continued after epoch 1" in capfd.readouterr().out
    assert status([*command, "--work", str(tmp_path / "other")]) == 0
    for one, other in zip(*(CellStore(tmp_path / name) for name in ("work", "other")), strict=True):
        same(one, other)


def test_a_time_limit_ends_with_75(tmp_path, words, monkeypatch, capsys):
    command = ["run", "--selectors", "pgl", *words, "--work", str(tmp_path), "--time-limit", "1h30m"]
    asked = []
    monkeypatch.setattr("agl_bench.cli.running.seconds", lambda text: asked.append(text) or 1e-9)
    assert status(command) == 75
    said = capsys.readouterr()
    assert said.out.count("INTERRUPTED, time limit") == 2 and asked == ["1h30m"]
    assert said.err == "agl-bench: 2 of 2 cells reached the time limit of 1h30m; the same command continues them\n"
    assert status(["status", "--json", "--work", str(tmp_path)]) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert (line["selector"], line["interrupted"], line["done"]) == ("pgl", 2, 0)
    monkeypatch.undo()
    assert status(command) == 0
    assert "pgl" in capsys.readouterr().out
