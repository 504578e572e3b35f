"""Workers of submitit: jobs of Slurm, or processes of this machine.

Every worker gets all groups, each in an order of its own: its share first, then what others have left. Leases decide
who runs what, so that all end at about the same time and one goes on where another dies.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.helpers import DelayedSubmission, environment_variables

from agl_bench.bench.executors import Engine, Options
from agl_bench.bench.worker import work
from agl_bench.errors import ExecutorFailed

HOUR = 3600.0
EVER = 60 * 24 * 365  # minutes: processes of this machine have no limit
REQUEUED = 1000  # times that Slurm may take a job away before it is given up
SPIN = "GOMP_SPINCOUNT"


class SubmititEngine(Engine):
    """See the module.

    Args:
        options: with the executor, "local" or "slurm", and what Slurm wants to know.
        workers: jobs at a time.
        threads: cores of each.
        gpus: of each.
    """

    def __init__(self, options: Options, workers: int, threads: int, gpus: float) -> None:
        self.options, self.workers, self.threads, self.gpus = options, workers, threads, math.ceil(gpus)
        self.jobs: list[Any] = []

    @property
    def is_local(self) -> bool:
        """Whether workers are processes of this machine."""
        return self.options.executor == "local"

    def start(self, job: Path) -> None:
        """Find Slurm."""
        self._job = job
        self._variables = {"OMP_NUM_THREADS": str(self.threads)}
        self._variables |= {SPIN: os.environ[SPIN]} if SPIN in os.environ else {}
        common: dict[str, Any] = {"name": "agl-bench", "timeout_min": EVER}
        common |= {"gpus_per_node": self.gpus} if self.gpus else {}
        try:
            self._executor = submitit.AutoExecutor(
                job / "submitit", cluster=self.options.executor, slurm_max_num_timeout=REQUEUED
            )
        except RuntimeError:
            raise ExecutorFailed(
                "--executor slurm: there is no Slurm on this machine (no srun); use --executor local"
            ) from None
        if self.is_local:
            self._executor.update_parameters(**common)
            return
        minutes = math.ceil((self.options.slurm_time or HOUR) / 60)
        self._executor.update_parameters(
            **common | {"timeout_min": minutes}, cpus_per_task=self.threads, slurm_array_parallelism=self.workers,
            slurm_setup=[f"export {name}={value}" for name, value in self._variables.items()],
            **({"slurm_partition": self.options.slurm_partition} if self.options.slurm_partition else {}),
        )  # fmt: skip

    def submit(self, groups: Sequence[int]) -> None:
        """One job for each worker; for Slurm they are an array."""
        number = min(self.workers, len(groups))
        orders = [[*groups[start:], *groups[:start]] for start in (len(groups) * n // number for n in range(number))]
        if not self.is_local:
            try:
                self.jobs = self._executor.map_array(_Work(), [self._job] * number, orders)
            except submitit.core.utils.FailedJobError as error:
                raise ExecutorFailed(f"Slurm refuses the jobs: {_last_line(error)}") from None
            return
        self.jobs = []
        gpus = _visible_gpus() if self.gpus else []
        with environment_variables(**self._variables), _without_ctrl_c():
            for position, order in enumerate(orders):
                if gpus:  # each worker its own, as long as there are enough
                    self._executor.update_parameters(visible_gpus=[gpus[position % len(gpus)]])
                self.jobs.append(self._executor.submit(_Work(), self._job, order))

    def is_busy(self) -> bool:
        """Whether any job is not at its end."""
        return not all(job.done() for job in self.jobs)

    def problem(self) -> str:
        """Last line of what a job that ended badly has said."""
        for job in self.jobs:
            error = job.exception() if job.done() else None
            if error is not None:
                return _last_line(job.stderr() or error)
        return ""

    def close(self) -> None:
        """Take back Slurm's jobs that still wait or run; a process of this machine ends with its epoch."""
        if not self.is_local:
            for job in self.jobs:
                if not job.done():
                    job.cancel(check=False)


class _Work:
    """A worker. Where Slurm takes its machine away, it ends with its epoch and goes back to the queue."""

    def __call__(self, job: Path, groups: Sequence[int]) -> None:
        preempted = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        asked: list[str] = []
        requeue = signal.signal(preempted, lambda *_: asked.append("preempted"))
        # Submitit's own handler raises SystemExit wherever the cell is, and so would make it a failed one.
        work(job, groups, lambda: asked[0] if asked else "")
        signal.signal(preempted, requeue)
        if asked and callable(requeue):
            requeue(preempted, None)

    def checkpoint(self, job: Path, groups: Sequence[int]) -> DelayedSubmission:
        """What goes back to the queue; the cells have their own checkpoints."""
        return DelayedSubmission(self, job, groups)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started here do not see Ctrl-C, which a terminal sends to all of them: the command does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _last_line(text: object) -> str:
    """Of what a program has said, as part of a sentence."""
    lines = str(text).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "nothing is said"


def _visible_gpus() -> list[int]:
    """Numbers of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [int(n) for n in given] if all(n.isdecimal() for n in given) else list(range(torch.cuda.device_count()))
