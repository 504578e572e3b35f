"""Workers of Ray: on one machine, with several GPUs or parts of them, or on a cluster.

A group of cells is a Ray task. Ray runs it where there is room, and again elsewhere where a worker dies.
"""

from __future__ import annotations

import math
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Read by Ray while it is imported. A user's own values win.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks without a GPU leave CUDA_VISIBLE_DEVICES alone

import ray
import torch

from agl_bench.addresses import masked
from agl_bench.bench.executors import DEATHS, Engine
from agl_bench.errors import ExecutorFailed

THREADS = "OMP_NUM_THREADS"
PROBE = 5.0  # seconds to wait for a cluster


class RayEngine(Engine):
    """See the module.

    Args:
        address: of a cluster; None = a Ray of its own on this machine, gone when the command ends.
        workers: tasks at a time; None = as many as there is room for.
        threads: cores of each task.
        gpus: share of a GPU of each task.
    """

    def __init__(self, address: str | None, workers: int | None, threads: int, gpus: float) -> None:
        self.address, self.limit, self.threads, self.gpus = address, workers, threads, gpus
        self._waiting: deque[int] = deque()
        self._running: list[Any] = []
        self._problem = ""
        self._submit: Callable[[int], Any]
        self._is_up = False

    def start(self, job: Path) -> None:
        """Connect to the cluster, or start a Ray on this machine."""
        own: dict[str, Any] = {}
        if not self.address:
            own = {"include_dashboard": False, "num_cpus": self.threads * self.limit if self.limit else None}
        terminate, threads = signal.getsignal(signal.SIGTERM), os.environ.get(THREADS)
        os.environ[THREADS] = str(self.threads)  # which workers on this machine get from here
        try:
            _probe(self.address)
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = (
                f"no Ray cluster answers at {masked(self.address)}" if self.address else "Ray cannot be started here"
            )
            raise ExecutorFailed(f"{where} ({_first_line(error)}); check --ray-address, or leave it out") from None
        finally:
            signal.signal(signal.SIGTERM, terminate)  # Ray's own would end the command at once
            if threads is None:
                del os.environ[THREADS]
            else:
                os.environ[THREADS] = threads
        self._is_up = True
        room = ray.cluster_resources()
        places = int(room.get("CPU", 0) // self.threads)
        if self.gpus:
            places = min(places, int(room.get("GPU", 0) / self.gpus + 1e-9))
        if places < 1:
            raise ExecutorFailed(
                f"Ray has {room.get('CPU', 0):g} cores and {room.get('GPU', 0):g} GPUs, and a cell asks for "
                f"{self.threads} cores (OMP_NUM_THREADS) and {self.gpus:g} GPUs (--gpus-per-cell); ask for less"
            )
        self.workers = min(places, self.limit or places)
        remote: Any = ray.remote(_work)
        task = remote.options(num_cpus=self.threads, num_gpus=self.gpus, max_retries=DEATHS - 1)
        self._submit = lambda group: task.remote(job, group, self.threads)

    def submit(self, groups: Sequence[int]) -> None:
        """One task for each."""
        self._waiting.extend(groups)

    def is_busy(self) -> bool:
        """Looks what has ended, and fills up to `workers`."""
        if self._running:
            ended, self._running = ray.wait(self._running, num_returns=len(self._running), timeout=0)
            for task in ended:
                try:
                    ray.get(task)
                except ray.exceptions.RayError as error:
                    self._problem = _first_line(getattr(error, "cause", None) or error)
        # One more for each worker of our own Ray, which runs no more at a time than it has cores.
        most = math.inf if self.limit is None else self.workers if self.address else 2 * self.workers
        while self._waiting and len(self._running) < most:
            self._running.append(self._submit(self._waiting.popleft()))
        return bool(self._running)

    def problem(self) -> str:
        """As Ray says it."""
        return self._problem

    def close(self) -> None:
        """Leave the cluster, or end the Ray of this machine; Ray ends what still runs."""
        self._waiting.clear()
        if self._is_up:
            ray.shutdown()


def _work(job: Path, group: int, threads: int) -> None:
    """The task."""
    from agl_bench.bench.worker import work

    # Ray's own handler raises SystemExit wherever the cell is, and so would make it a failed one.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)  # a machine of a cluster may have an OMP_NUM_THREADS of its own
    work(job, [group])


def _probe(address: str | None) -> None:
    """Knock at HOST:PORT or ray://HOST:PORT, since Ray itself waits for minutes.

    Raises:
        OSError: if nobody is there.
    """
    host, colon, port = (address or "").rpartition("//")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), PROBE).close()


def _first_line(error: object) -> str:
    """Of an error, as part of a sentence."""
    lines = masked(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.')}" if lines else type(error).__name__
