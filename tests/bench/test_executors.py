"""Cells on workers: as in one process, whoever dies, leaves or says stop."""

import contextlib
import os
import signal
import sys
import textwrap

import pandas as pd
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from agl_bench.bench import spec as spec_module
from agl_bench.bench.cells import CellStore
from agl_bench.bench.executors import DEATHS, Engine, Options
from agl_bench.bench.fitness import Skipped
from agl_bench.bench.jobs import GROUPS, LARGEST, Job, groups_of, run_on
from agl_bench.bench.mlflow_recorder import MlflowRecorder
from agl_bench.bench.mlflow_views import experiment_name
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import Failed, Finished, Noted, Stopped, Waiting, run_cells
from agl_bench.bench.status import status_of
from agl_bench.bench.worker import LOOK, work
from agl_bench.cli import main
from agl_bench.errors import BadSpec, ExecutorFailed

SELECTORS = """
    import contextlib
    import os
    import time
    from pathlib import Path

    from agl_bench import Selector, hookimpl

    HERE, LOOK = Path(__file__).parent, {LOOK}

    class Struck(Selector):
        '''Sends the signal in the file `armed` in its second epoch, once.'''
        reference = "test"

        def forward(self, losses, step):
            with (HERE / "workers").open("a") as log:
                log.write(f"{os.getpid()}\\n")
            if step.epoch == 1:
                with contextlib.suppress(FileNotFoundError):
                    (HERE / "armed").rename(HERE / f"fired {os.getpid()}")
                    number, pid, jobs = (HERE / f"fired {os.getpid()}").read_text().split("\\n")
                    os.kill(int(pid) or os.getpid(), int(number))
                    while jobs and list(Path(jobs).glob("[!.]*")):  # until the command has taken its lease back
                        time.sleep(0.05)
                    time.sleep(LOOK if jobs else 0)
            return losses[self.is_primary].mean()

    class Raising(Selector):
        '''Cannot be made.'''
        reference = "test"

        def __init__(self, view):
            raise RuntimeError("on purpose")

        def forward(self, losses, step):
            return losses.mean()

    class Leaving(Selector):
        '''Ends its worker.'''
        reference = "test"

        def forward(self, losses, step):
            raise KeyboardInterrupt

    class Few(Selector):
        '''Takes few genes.'''
        reference = "test"
        max_genes = 12

    @hookimpl
    def register_selectors():
        return {"struck": Struck, "raising": Raising, "leaving": Leaving, "few": Few}
"""
EPOCHS = ("protocol.epochs=4", "protocol.patience=4")


@pytest.fixture(scope="module")
def selectors(tmp_path_factory):
    """A single-file plug-in, as on the machines of all workers."""
    path = tmp_path_factory.mktemp("plugin") / "ours.py"
    path.write_text(textwrap.dedent(SELECTORS).replace("{LOOK}", str(LOOK)))
    return path


@pytest.fixture
def arm(selectors):
    """Have `struck` send a signal to its own process, or to a command, and wait for what this does to its jobs."""

    def arm(number, pid=0, jobs=""):
        (selectors.parent / "workers").unlink(missing_ok=True)
        (selectors.parent / "armed").write_text(f"{int(number)}\n{pid}\n{jobs}")

    yield arm
    left = (selectors.parent / "armed").exists()
    (selectors.parent / "armed").unlink(missing_ok=True)  # before it strikes another test
    assert not left


@pytest.fixture(scope="module")
def cells(grid, selectors):
    """The grid of most tests: two selectors that train, one that cannot; two folds, two seeds."""
    return grid("pgl", "struck", "raising", files=[selectors], more=EPOCHS, seeds=["0", "1"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of this process and of each worker: more threads add numbers in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def serial(cells, tmp_path_factory):
    """Work folder of the same cells in this process, shown in MLflow."""
    work = tmp_path_factory.mktemp("serial")
    list(run_cells(*cells, CellStore(work), MlflowRecorder.connect(work)))
    return work


@pytest.fixture
def start(cells, selectors, tmp_path):
    """Run cells on an engine; returns the events."""

    def start(engine, store, recorder=None, of=cells, checkpoint_every=0, time_limit=None, apart=False, **options):
        job = Job(store.work, of[1].root, tmp_path / "cache", (selectors,), "cpu", checkpoint_every, time_limit)
        job.apart = apart
        return list(run_on(engine, of[0], job, store, recorder or NoRecorder(), **options))

    return start


class Here(Engine):
    """Workers that are this process, one after the other."""

    workers, threads = 2, 1

    def __init__(self, *stops):
        self.rounds, self.said, self.stops = 0, "", list(stops)

    def start(self, job):
        self.job = job

    def submit(self, groups):
        self.rounds += 1
        for group in groups:
            with contextlib.suppress(KeyboardInterrupt):
                work(self.job, [group], *self.stops)

    def is_busy(self):
        return False

    def problem(self):
        return self.said

    def close(self):
        self.job = None


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_workers_tell_what_cannot_run(grid, selectors, start, tmp_path):
    of = grid("few", "pgl", files=[selectors], more=EPOCHS)
    events = start(Here(), CellStore(tmp_path / "work"), of=of)
    assert [e.reason.partition(",")[0] for e in of_kind(events, Skipped)] == [
        "selector 'few' takes 12 genes at most"
    ] * 2
    assert len(of_kind(events, Finished)) == 2
    found = {place.selector: dict(count) for place, count in status_of(tmp_path / "work").counts.items()}
    assert found == {"few": {"skipped": 2}, "pgl": {"done": 2}}


def same(one, other):
    """Two work folders have the same results and failures, bit for bit; cost and machine apart."""
    first, second = ({r.spec.key: r for r in CellStore(work)} for work in (one, other))
    assert first.keys() == second.keys() and first
    for key, result in first.items():
        twin = second[key]
        for name in ("scores", "best_epoch", "counts", "fold"):
            assert getattr(result, name) == getattr(twin, name)
        for name in ("genes", "epochs", "outer"):
            tables = [getattr(r, name).drop(columns="seconds", errors="ignore") for r in (result, twin)]
            pd.testing.assert_frame_equal(*tables, check_exact=True)
    failures = [{key: f.sentence for key, _, f in CellStore(work).failures()} for work in (one, other)]
    assert failures[0] == failures[1]


def nothing_is_left(store):
    """No cell has begun, nobody holds one, and no job is there."""
    for folder in (store.partial, store.leases.folder, store.grids, store.work / "executors"):
        assert list(folder.iterdir()) == []


def shown(work):
    """What MLflow has of a work folder: of each run, what does not depend on the time and the machine."""
    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    found = {}
    for run in client.search_runs([client.get_experiment_by_name(experiment_name("inter")).experiment_id]):
        tags = {k: v for k, v in run.data.tags.items() if k.startswith("agl.")}
        # Ray's workers find the same code in the current folder, which may be a checkout and have a commit.
        params = {k: v for k, v in run.data.params.items() if k != "commit"}
        metrics = {k: v for k, v in run.data.metrics.items() if not k.startswith("cost/")}
        curve = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "validation/pcc")]
        name = tags["agl.level"], tags["agl.group"], tags.get("agl.fold"), tags.get("agl.seed")
        assert name not in found
        files = sorted(f.path for f in client.list_artifacts(run.info.run_id))
        found[name] = (run.info.status, run.info.run_name, tags, params, metrics, curve, files)
    return found


# --- engines, for real -----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster():
    """Ray on two nodes of one core each."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}, shutdown_at_exit=False
    )
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_ray_on_two_nodes_where_a_worker_is_killed(cluster, arm, start, serial, selectors, tmp_path):
    """Nothing is lost, doubled or different, in the store and in MLflow."""
    arm(signal.SIGKILL)
    store = CellStore(tmp_path / "work")
    terminate = signal.getsignal(signal.SIGTERM)
    options = Options("ray", workers=2, ray_address=cluster.address)
    events = start(options.engine("cpu"), store, MlflowRecorder.connect(store.work))
    assert signal.getsignal(signal.SIGTERM) == terminate
    assert len(of_kind(events, Finished)) == 8 and len(of_kind(events, Failed)) == 4
    assert [e.sentence for e in of_kind(events, Noted)] == ["continued after epoch 0"]
    same(store.work, serial)
    nothing_is_left(store)
    assert shown(store.work) == shown(serial)
    pids = set((selectors.parent / "workers").read_text().split())
    assert len(pids) >= 2 and str(os.getpid()) not in pids  # the one that was killed, and who went on


def test_processes_of_this_machine_one_of_which_is_killed(arm, start, serial, selectors, tmp_path):
    arm(signal.SIGKILL)
    store = CellStore(tmp_path / "work")
    events = start(Options("local", workers=2).engine("cpu"), store)
    assert len(of_kind(events, Finished)) == 8 and len(of_kind(events, Failed)) == 4
    assert [e.sentence for e in of_kind(events, Noted)] == ["continued after epoch 0"]
    same(store.work, serial)
    nothing_is_left(store)


def test_a_signal_stops_workers_at_their_epoch(arm, words, serial, selectors, tmp_path, capfd):
    """The command ends with 75, and the same command goes on where it stood."""
    work = tmp_path / "work"
    command = ["run", "--selectors", "pgl,struck", "--plugin", str(selectors), "--seeds", "0,1", *words]
    command += [w for s in EPOCHS for w in ("--set", s)] + ["--work", str(work), "--checkpoint-every", "100"]
    command += ["--executor", "local", "--workers", "1"]
    arm(signal.SIGTERM, os.getpid(), work / "executors")
    ended = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(command)
        ended.append(end.value.code or 0)
        if len(ended) == 1:
            assert "INTERRUPTED, SIGTERM" in capfd.readouterr().out
            assert len(list((work / "partial").glob("*/*.pt"))) == 1
    assert ended == [75, 0]
    assert "continued after epoch" in capfd.readouterr().out
    found = {r.spec.key: r for r in CellStore(work)}
    expected = {r.spec.key: r for r in CellStore(serial)}
    assert found.keys() == expected.keys()
    assert {k: r.scores for k, r in found.items()} == {k: r.scores for k, r in expected.items()}
    nothing_is_left(CellStore(work))


# Commands of Slurm, as far as they are used: an array runs one after the other, here and at once.
SLURM = {
    "sbatch": """
        import os, re, subprocess, sys
        place, text = os.environ["FAKE_SLURM"], open(sys.argv[1]).read()
        with open(place + "/batch", "w") as batch:
            batch.write(text)
        for task in range(int(re.search(r"--array=0-(\\d+)", text)[1]) + 1):
            names = {"SLURM_JOB_ID": str(70 + task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
            names |= {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
            names |= {"SLURM_LOCALID": "0"}
            with open(place + "/log", "a") as log:
                subprocess.Popen(["bash", place + "/batch"], env=os.environ | names, stdout=log, stderr=log)
        print("Submitted batch job 7")
    """,
    "srun": """
        import os, sys
        words = sys.argv[1:]
        while words[0].startswith("-"):
            del words[: 2 if words[0] in ("--output", "--error") else 1]
        os.execvp(words[0], words)
    """,
    "scontrol": """
        import os, subprocess, sys
        place = os.environ["FAKE_SLURM"]
        with open(place + "/asked", "a") as asked:
            asked.write(" ".join(sys.argv[1:]) + "\\n")
        with open(place + "/log", "a") as log:
            subprocess.Popen(["bash", place + "/batch"], stdout=log, stderr=log)
    """,
    "sacct": """
        print("JobID|State|NodeList")
        print("7_0|RUNNING|here\\n7_1|RUNNING|here")
    """,
    "scancel": "",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of one machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, code in SLURM.items():
        (folder / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def test_slurm_takes_a_machine_away(slurm, arm, start, serial, tmp_path):
    """The worker keeps its epoch, goes back to the queue and comes again."""
    arm(signal.SIGUSR2)
    store = CellStore(tmp_path / "work")
    options = Options("slurm", workers=2, slurm_partition="short", slurm_time=5400)
    events = start(options.engine("cpu"), store, checkpoint_every=1000)
    batch = (slurm / "batch").read_text()
    for line in ("--partition=short", "--time=90", "--cpus-per-task=1", "export OMP_NUM_THREADS=1"):
        assert line in batch
    assert "--gpus" not in batch
    assert (slurm / "asked").read_text() in ("requeue 7_0\n", "requeue 7_1\n")
    assert [e.sentence for e in of_kind(events, Noted)] == ["continued after epoch 1"]
    same(store.work, serial)
    nothing_is_left(store)


# --- one discipline for all engines ----------------------------------------------------------------------------------


def test_kept_again_and_retried(start, serial, selectors, tmp_path):
    store = CellStore(tmp_path / "work")
    events = start(Here(), store)
    assert len(of_kind(events, Finished)) == 8 and not any(e.kept for e in of_kind(events, Finished))
    assert {e.sentence for e in of_kind(events, Failed)} == {"RuntimeError: on purpose"}
    assert all("on purpose" in e.details.read_text() for e in of_kind(events, Failed))
    same(store.work, serial)
    nothing_is_left(store)
    results = {path: path.stat().st_ino for path in store.cells.glob("*/result.json")}

    engine = Here()
    events = start(engine, store)
    assert len(events) == 12 and all(e.kept for e in events) and engine.rounds == 0
    events = start(engine, store, retry_failed=True)
    assert [e.kept for e in of_kind(events, Finished)] == [True] * 8
    assert [e.kept for e in of_kind(events, Failed)] == [False] * 4 and engine.rounds == 1
    assert results == {path: path.stat().st_ino for path in store.cells.glob("*/result.json")}

    events = start(engine, store, again=True)
    assert not any(e.kept for e in events) and len(events) == 12
    assert all(path.stat().st_ino != number for path, number in results.items())
    same(store.work, serial)


def test_a_time_limit_is_for_all_workers_together(start, cells, tmp_path):
    """A cell whose time is over is not gone on with by the next worker."""

    class Stealing(Here):
        def submit(self, groups):
            for _ in range(2):
                super().submit(groups)

    store = CellStore(tmp_path / "work")
    some = [cell for cell in cells[0] if cell[0].selector.name == "pgl"], cells[1]
    events = start(Stealing(), store, of=some, time_limit=0.0)
    assert [e.why for e in events] == ["time limit"] * 4
    assert all(store.begun(spec.key).progress() == (0, 4) for spec, _ in some[0])


def test_a_cell_that_takes_its_workers_with_it_fails_alone(start, grid, selectors, tmp_path):
    store = CellStore(tmp_path / "work")
    of = grid("leaving", "pgl", files=[selectors], more=EPOCHS)
    events = start(Here(), store, of=of)
    assert {e.sentence for e in of_kind(events, Failed)} == {
        f"{DEATHS} workers died while running it, perhaps for lack of memory"
    }
    assert len(of_kind(events, Failed)) == 2 and len(of_kind(events, Finished)) == 2


def test_a_worker_runs_cells_with_plugins_of_others_apart(arm, start, grid, selectors, serial, tmp_path):
    """What ends their process ends none of the worker, which goes on; the others are those of one process."""
    arm(signal.SIGKILL)
    store = CellStore(tmp_path / "work")
    of = grid("pgl", "struck", "leaving", files=[selectors], more=EPOCHS)
    events = start(Options("local", workers=1).engine("cpu"), store, of=of, apart=True)
    struck, *left = (e.sentence for e in of_kind(events, Failed))
    assert struck == "selector 'struck' of ours.py had its process killed by SIGKILL, perhaps for lack of memory"
    assert left == ["KeyboardInterrupt"] * 2 and of_kind(events, Noted) == []
    expected = {r.spec.key: r.scores for r in CellStore(serial)}
    found = {e.result.spec.key: e.result.scores for e in of_kind(events, Finished)}
    assert len(found) == 3 and found.items() <= expected.items()
    nothing_is_left(store)


def test_a_worker_that_must_go_leaves_the_rest_to_others(start, serial, tmp_path):
    """Such as one that is preempted: nothing counts as stopped, and the next round does it."""
    asked = iter([*[""] * 10, *["preempted"] * 20])
    store = CellStore(tmp_path / "work")
    engine = Here(lambda: next(asked, ""))
    events = start(engine, store)
    assert engine.rounds >= 2 and not of_kind(events, Stopped)
    same(store.work, serial)


def test_workers_stop_when_their_command_is_gone(start, cells, tmp_path):
    class Gone(Here):
        def submit(self, groups):
            for lease in self.job.parent.glob("[!.]*/*"):
                lease.unlink()
            super().submit(groups)

    engine = Gone()
    engine.said = "no reason"
    with pytest.raises(ExecutorFailed, match="workers end without running anything: no reason"):
        start(engine, store := CellStore(tmp_path / "work"))
    assert engine.rounds > 0 and list(store.cells.iterdir()) == []


def test_stopped_before_anything_is_handed_out(start, tmp_path):
    engine = Here()
    assert start(engine, CellStore(tmp_path / "work"), stop=lambda: "SIGTERM") == []
    assert engine.rounds == 0


def test_others_are_waited_for(start, cells, tmp_path):
    """What another command works on is its own; what it leaves is taken over."""
    store = CellStore(tmp_path / "work")
    one = cells[0][:1], cells[1]
    lease = store.leases.take(one[0][0][0].key)

    class Helping(Here):
        def submit(self, groups):
            super().submit(groups)
            if self.rounds == 1:
                assert list(store.cells.iterdir()) == []
                others.append(True)

    others = []
    looks = iter(range(10))

    def stop():
        if others and next(looks) == 2:
            lease.release()
        return ""

    events = start(Helping(), store, of=one, stop=stop)
    assert [type(e) for e in events] == [Waiting, Finished] and events[0].cells == 1


def test_a_worker_of_other_code_is_refused(start, monkeypatch, tmp_path):
    class Other(Here):
        def submit(self, groups):
            with monkeypatch.context() as patch:
                patch.setattr(spec_module, "_engine", lambda: "0ther")
                super().submit(groups)

    with pytest.raises(ExecutorFailed, match=r"a worker on \S+ cannot run these cells: its version: .*0ther; the comm"):
        start(Other(), CellStore(tmp_path / "work"))


def test_a_worker_without_the_plugin_is_refused(start, selectors, tmp_path):
    class Lacking(Here):
        def submit(self, groups):
            hidden = selectors.rename(selectors.with_suffix(".hidden"))
            try:
                super().submit(groups)
            finally:
                hidden.rename(selectors)

    with pytest.raises(ExecutorFailed, match=r"cannot run these cells: plug-in .*ours.py: no such file"):
        start(Lacking(), CellStore(tmp_path / "work"))


def test_a_worker_that_does_not_see_the_folder(tmp_path):
    with pytest.raises(ExecutorFailed, match="at the same place on every machine"):
        work(tmp_path / "nowhere", [0])


def test_what_a_killed_command_has_left_is_cleared(start, tmp_path):
    store = CellStore(tmp_path / "work")
    left = store.work / "executors" / ".job-0123"
    left.mkdir(parents=True)
    (left / "job.json").write_text("{}")
    start(Here(), store)
    nothing_is_left(store)


def test_groups_share_data_and_are_small_enough(cells):
    many = cells[0] * 50
    for workers in (1, 2, 7):
        groups = groups_of(many, workers)
        assert [position for group in groups for position in group] == list(range(len(many)))
        assert max(map(len, groups)) <= min(LARGEST, len(many) // (GROUPS * workers))
        for group in groups:
            assert len({(many[n][0].fold, many[n][0].seed) for n in group}) == 1


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "device", "sentence"),
    [
        (
            {"ray_address": "auto"},
            "auto",
            "--ray-address does nothing with --executor serial; it belongs to --executor",
        ),
        ({"executor": "slurm", "ray_address": "auto"}, "auto", "it belongs to --executor ray"),
        ({"executor": "local", "gpus_per_cell": 1.0}, "auto", "it belongs to --executor ray or slurm"),
        ({"executor": "ray", "slurm_time": 60.0}, "auto", "--slurm-time does nothing with --executor ray"),
        ({"executor": "slurm", "workers": 2, "gpus_per_cell": 0.5}, "auto", "Slurm gives whole GPUs only"),
        ({"executor": "ray", "gpus_per_cell": 1.5}, "auto", "has to be a whole number"),
        ({"executor": "ray", "gpus_per_cell": float("nan")}, "auto", "is not a share of a GPU"),
        ({"executor": "ray", "gpus_per_cell": 0.5}, "cpu", "contradict each other"),
        ({"executor": "slurm"}, "auto", "say with --workers"),
        ({"workers": 2}, "auto", "--workers does nothing with --executor serial"),
    ],
)
def test_options_that_clash(options, device, sentence):
    with pytest.raises(BadSpec, match=sentence):
        Options(**options).check(device)


@pytest.mark.parametrize(
    ("given", "options", "threads"),
    [("3", {}, 3), ("", {"executor": "local", "workers": 10_000}, 1), ("", {"executor": "slurm", "workers": 2}, 1)],
)
def test_threads_of_a_worker(monkeypatch, given, options, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert Options(**options).threads == threads


@pytest.mark.parametrize(("executor", "library"), [("ray", "ray"), ("local", "submitit"), ("slurm", "submitit")])
def test_a_library_that_is_not_there(monkeypatch, executor, library):
    home = "executor_ray" if library == "ray" else "executor_submitit"
    monkeypatch.delitem(sys.modules, f"agl_bench.bench.{home}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    extra = {"ray": "ray", "submitit": "slurm"}[library]
    with pytest.raises(ExecutorFailed, match=rf"needs {library}, which is not installed; pip .*agl-bench\[{extra}\]"):
        Options(executor, workers=2).engine("cpu")


def test_no_slurm_and_no_ray_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExecutorFailed, match="there is no Slurm on this machine"):
        Options("slurm", workers=1).engine("cpu").start(tmp_path)
    with pytest.raises(ExecutorFailed, match=r"no Ray cluster answers at 127.0.0.1:1 \(.*refused"):
        Options("ray", ray_address="127.0.0.1:1").engine("cpu").start(tmp_path)


def test_clashes_end_with_status_2(words, tmp_path, capsys):
    for more, sentence in (
        (["--ray-address", "auto"], "--ray-address does nothing with --executor serial"),
        (["--executor", "slurm", "--slurm-time", "soon", "--workers", "1"], "--slurm-time soon is not a duration"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["run", "--selectors", "pgl", *words, "--work", str(tmp_path), *more])
        assert end.value.code == 2 and sentence in capsys.readouterr().err
