"""Serves the MLflow pages of a work folder on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from agl_bench.bench.mlflow_tracker import Tracker, client_of, database_of, first_line
from agl_bench.bench.mlflow_views import experiment_name, links
from agl_bench.data.folds import EVALUATIONS
from agl_bench.errors import TrackerUnavailable

# Runs a command, and ends it and all that it has started when the other end of its input closes.
WATCHED = """
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGTERM, lambda *_: None)
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: sys.stdin.buffer.read() or os.killpg(0, signal.SIGKILL), daemon=True).start()
sys.exit(server.wait() % 256)
"""


def serve(
    work: Path,
    uri: str | None = None,
    *,
    port: int = 5000,
    ready: Callable[[dict[str, str]], None],
    patience: float = 120.0,
) -> None:
    """Serve MLflow's pages on this machine until a KeyboardInterrupt. If the tracker is a server, only name its links.

    Args:
        work: work folder.
        uri: as for `MlflowRecorder.connect`.
        port: on 127.0.0.1.
        ready: called once with the links when the pages can be opened.
        patience: seconds to wait for that; a cold start takes up to half a minute.

    Raises:
        TrackerUnavailable: if nothing has been recorded, the port is taken, or the server does not start.
    """
    tracker = Tracker.of(work, uri)
    if tracker.is_server:
        tracker.probe()
        ready(_known_links(tracker, tracker.page))
        return
    if tracker.uri.startswith("sqlite") and not database_of(tracker.uri).is_file():
        raise TrackerUnavailable(f"there is no {database_of(tracker.uri)}; run `agl-bench run` first")
    tracker.probe()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise TrackerUnavailable(
                f"port {port} is taken ({first_line(error)}); choose another with --port"
            ) from None
    known = _known_links(tracker, f"http://127.0.0.1:{port}")
    command = [sys.executable, "-c", WATCHED, sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--artifacts-destination", str(tracker.artifacts), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": tracker.uri,  # which may hold a password, and everybody sees command lines
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else it keeps a pool of idle workers
    }
    with tempfile.TemporaryFile("w+b") as log:
        server = subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.PIPE,  # closed by our end, whatever the reason of it
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us only, and we end the server and its workers together
        )
        try:
            _wait_until_up(server, port, patience, log)
            ready(known)
            status = server.wait()
            raise TrackerUnavailable(f"the MLflow server ended with status {status}: {_last_line(log)}")
        except KeyboardInterrupt:
            return
        finally:
            _end(server)


def _known_links(tracker: Tracker, base: str) -> dict[str, str]:
    """Links to the experiments that hold runs."""
    try:
        client = client_of(tracker)
        found = {e: client.get_experiment_by_name(experiment_name(e)) for e in EVALUATIONS}
        ids = {
            e: str(x.experiment_id)
            for e, x in found.items()
            if x and client.search_runs([x.experiment_id], max_results=1)
        }
    except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
        raise TrackerUnavailable(f"cannot read {tracker.name}: {first_line(error)}") from error
    if not ids:
        raise TrackerUnavailable(
            f"{tracker.name} holds no runs of agl-bench; run `agl-bench run` or `agl-bench sync` first"
        )
    return links(base, ids)


def _wait_until_up(server: subprocess.Popen[bytes], port: int, patience: float, log: IO[bytes]) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise TrackerUnavailable(f"the MLflow server does not start: {_last_line(log)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)  # not up yet
    raise TrackerUnavailable(f"the MLflow server is not up after {patience:.0f} s: {_last_line(log)}")


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return first_line(lines[-1]) if lines else "it said nothing"


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
            break
    if server.stdin is not None:
        server.stdin.close()
