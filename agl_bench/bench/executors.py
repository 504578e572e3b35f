"""Who runs cells: this process, or workers that an existing engine starts, on this machine or on others.

An engine has a module of its own, which is the only home of its library. What all have in common, how workers and the
command work together, is in `bench.jobs`.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agl_bench.errors import BadSpec, ExecutorFailed

EXECUTORS = ("serial", "local", "ray", "slurm")
DEATHS = 4  # of workers at one and the same cell, after which the cell counts as failed


@dataclass(frozen=True)
class Options:
    """Where cells run, as the user asks for it.

    Attributes:
        executor: one of `EXECUTORS`.
        workers: processes at a time; None = the engine's own measure.
        ray_address: of a Ray cluster; None = one on this machine, for this command alone.
        gpus_per_cell: share of a GPU; None = one where cells run on CUDA.
        slurm_partition: where Slurm jobs go; None = its default.
        slurm_time: seconds that a Slurm job may take; None = an hour.
    """

    executor: str = "serial"
    workers: int | None = None
    ray_address: str | None = None
    gpus_per_cell: float | None = None
    slurm_partition: str | None = None
    slurm_time: float | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether workers may be on other machines, which have other devices than this one."""
        return self.executor == "slurm" or self.ray_address is not None

    @property
    def threads(self) -> int:
        """Of each worker: OMP_NUM_THREADS, else a fair share of this machine's cores; one where others are meant."""
        given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        if given.isdecimal() and int(given):
            return int(given)
        return 1 if self.is_elsewhere else max(1, _cores() // (self.workers or _cores()))

    def check(self, device: str) -> None:
        """Make sure that the options belong together.

        Args:
            device: "auto", "cpu" or "cuda", as asked for.

        Raises:
            BadSpec: for an option that the executor does not have.
        """
        takers = {
            "workers": ("local", "ray", "slurm"),
            "ray_address": ("ray",),
            "gpus_per_cell": ("ray", "slurm"),
            "slurm_partition": ("slurm",),
            "slurm_time": ("slurm",),
        }
        for name, executors in takers.items():
            if getattr(self, name) is not None and self.executor not in executors:
                raise BadSpec(
                    f"--{name.replace('_', '-')} does nothing with --executor {self.executor}; it belongs to "
                    f"--executor {' or '.join(executors)}"
                )
        share = self.gpus_per_cell
        if share is not None and not (share >= 0 and math.isfinite(share)):
            raise BadSpec(f"--gpus-per-cell {share:g} is not a share of a GPU; use e.g. 0.5 or 1")
        if share and not (share < 1 or share.is_integer()):
            raise BadSpec(f"--gpus-per-cell {share:g}: more than one GPU has to be a whole number of them")
        if share and self.executor == "slurm" and not share.is_integer():
            raise BadSpec(f"--gpus-per-cell {share:g}: Slurm gives whole GPUs only; use 1, or --executor ray")
        if share and device == "cpu":
            raise BadSpec(f"--gpus-per-cell {share:g} and --device cpu contradict each other; leave one of them out")
        if self.executor == "slurm" and self.workers is None:
            raise BadSpec("--executor slurm: say with --workers how many jobs may run at a time")

    def engine(self, device: str) -> Engine:
        """What starts workers.

        Args:
            device: "cpu" or "cuda", of the cells.

        Raises:
            ExecutorFailed: if its library is not installed.
        """
        extra = "ray" if self.executor == "ray" else "slurm"
        gpus = self.gpus_per_cell if self.gpus_per_cell is not None else float(device == "cuda")
        try:
            if self.executor == "ray":
                from agl_bench.bench.executor_ray import RayEngine

                return RayEngine(self.ray_address, self.workers, self.threads, gpus)
            from agl_bench.bench.executor_submitit import SubmititEngine

            return SubmititEngine(self, self.workers or _cores(), self.threads, gpus)
        except ModuleNotFoundError as error:
            if error.name not in ("ray", "submitit"):
                raise
            raise ExecutorFailed(
                f"--executor {self.executor} needs {error.name}, which is not installed; "
                f"pip install 'agl-bench[{extra}]', or use --executor serial"
            ) from None


class Engine(ABC):
    """Starts workers and hands them groups of cells: `bench.worker.work(job, groups)` in processes of its own.

    Attributes:
        workers: at a time.
        threads: of each worker.
    """

    workers: int
    threads: int

    @abstractmethod
    def start(self, job: Path) -> None:
        """Get ready for a job; sets `workers`.

        Raises:
            ExecutorFailed: if there is nothing to start workers with.
        """

    @abstractmethod
    def submit(self, groups: Sequence[int]) -> None:
        """Have these groups run. A group may be handed to several workers: leases decide."""

    @abstractmethod
    def is_busy(self) -> bool:
        """Whether workers are at work, or still to come."""

    @abstractmethod
    def problem(self) -> str:
        """Why workers ended that did not end well, as part of a sentence; "" if none did."""

    @abstractmethod
    def close(self) -> None:
        """End what is still there."""


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
