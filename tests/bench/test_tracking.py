"""Tracking into an MLflow server with PostgreSQL behind it, for real: nothing is lost when it dies."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from agl_bench.bench.cells import CellStore
from agl_bench.bench.mlflow_recorder import MlflowRecorder
from agl_bench.cli import main
from agl_bench.errors import TrackerUnavailable

FATAL = """
    import os, signal
    from pathlib import Path
    from agl_bench import Selector, hookimpl

    class Fatal(Selector):
        '''Ends the server in the middle of its training.'''
        reference = "test"

        def forward(self, losses, step):
            if step.epoch == 1 and Path("server").exists():
                os.killpg(int(Path("server").read_text()), signal.SIGKILL)
                Path("server").unlink()
            return losses[self.is_primary].mean()

    @hookimpl
    def register_selectors():
        return {"fatal": Fatal}
"""


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run a command in this process, in an empty folder; its status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    handler = signal.getsignal(signal.SIGTERM)

    def command(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(map(str, words)))
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def serve(postgresql, tmp_path):
    """Start an MLflow server on a port of its own; again where it was killed. Returns its address and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []

    def serve():
        words = ["server", "--backend-store-uri", postgresql, "--artifacts-destination", str(tmp_path / "artifacts")]
        words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        with (tmp_path / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        started.append(process)
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                return f"http://127.0.0.1:{port}", process
            except OSError:
                time.sleep(0.2)
        pytest.fail((tmp_path / "server.log").read_text()[-2000:])

    yield serve
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shown(uri):
    """What a tracker has of every finished cell: parameters, curves and files."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("agl-bench/inter")
    runs = client.search_runs([experiment.experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    groups = [r for r in runs if r.data.tags["agl.level"] == "group"]
    cells = {r.data.tags["agl.key"]: r for r in runs if r.data.tags["agl.level"] == "cell"}
    assert len(groups) + len(cells) == len(runs)
    found = {
        key: (
            r.data.params, r.data.metrics, sorted(f.path for f in client.list_artifacts(r.info.run_id)),
            [(m.step, m.value) for m in client.get_metric_history(r.info.run_id, "validation/pcc")],
        )
        for key, r in cells.items()
    }  # fmt: skip
    return found | {r.data.tags["agl.group"]: (r.data.params, r.data.metrics) for r in groups}


def test_a_server_with_postgresql_that_dies(words, serve, command, tmp_path, postgresql):
    words = [w for w in words if w not in ("--tracking", "none")]
    (tmp_path / "fatal.py").write_text(textwrap.dedent(FATAL))
    address, process = serve()
    (tmp_path / "server").write_text(str(process.pid))
    run = ("run", *words, "--selectors", "pgl,fatal", "--plugin", "fatal.py", "--work", "work")
    status, out, err = command(*run, "--tracking", address)
    assert process.wait() == -signal.SIGKILL
    assert status == 0 and "[4/4]" in out and len(list(CellStore(Path("work")))) == 4
    assert err.count("tracking stopped") == 1 and f"{address} does not answer" in err
    assert "MLflow is incomplete; `agl-bench sync --work work` brings it up to date" in err

    status, out, err = command("sync", "--work", "work", "--tracking", address)
    assert status == 2 and "no MLflow server answers" in err
    serve()
    status, out, err = command("sync", "--work", "work", "--tracking", address)
    assert (status, err) == (0, "")
    assert "3 cells added to MLflow, 1 were there already." in out
    whole = shown(address)
    assert len(whole) == 6

    direct = postgresql.rpartition("/")[0] + "/direct"  # MLflow writes to the database itself
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(postgresql.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE direct")
    status, out, err = command(*run, "--tracking", direct)
    assert (status, err) == (0, "") and "4 cells were finished before and kept" in out
    assert shown(direct) == whole


def test_databases_that_cannot_be_used_are_said_at_once(postgresql, tmp_path):
    """MLflow itself would try for minutes."""
    place = postgresql.partition("://")[2]
    for uri, words in (
        (f"postgresql+nosuch://{place}", "Can't load plugin: sqlalchemy.dialects:postgresql.nosuch"),
        (f"postgresql+psycopg://{place}-nothing", 'database "postgres-nothing" does not exist'),
        (f"postgresql+psycopg://me:secret@{place.partition('@')[2]}-no", "connection failed"),
    ):
        with pytest.raises(TrackerUnavailable) as caught:
            MlflowRecorder.connect(tmp_path, uri)
        said = str(caught.value)
        assert said.startswith("cannot track to postgresql+") and words in said
        assert "secret" not in said and "\n" not in said


def test_a_missing_driver_is_said_with_the_one_to_use(postgresql, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # as if it were not installed
    with pytest.raises(
        TrackerUnavailable, match=r"psycopg2.*pip install 'agl-bench\[postgresql\]'.*postgresql\+psycopg:"
    ):
        MlflowRecorder.connect(tmp_path, postgresql.replace("+psycopg", "+psycopg2"))
