"""Options that several commands have, and what their words mean."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agl_bench.bench.executors import EXECUTORS, Options
from agl_bench.errors import BadSpec

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    pass


PLUGIN = click.option(
    "--plugin",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A plug-in that is not installed: a .py file or a distribution's folder; repeatable.",
)


WORK = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=True),
    default=lambda: Path(os.environ.get("AGL_BENCH_WORK", "agl-bench-work")),
    show_default="AGL_BENCH_WORK or ./agl-bench-work",
    help="Folder of finished cells, mlflow.db and artifacts.",
)


DATA = click.option(
    "--data",
    "root",
    type=click.Path(path_type=Path),
    default=lambda: Path(os.environ.get("AGL_BENCH_DATA", "data")),
    show_default="AGL_BENCH_DATA or ./data",
    help="Folder of the datasets.",
)


SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME.KEY=VALUE",
    help="A setting of a plug-in or of the protocol, e.g. dkgsb.temperature=0.02 or protocol.epochs=50; repeatable.",
)


_EXECUTOR = (
    click.option(
        "--executor",
        type=click.Choice(EXECUTORS),
        default="serial",
        show_default=True,
        help="Who runs cells: this process, processes of this machine, Ray (one machine or a cluster), Slurm jobs.",
    ),
    click.option(
        "--workers", type=click.IntRange(1), metavar="N", help="Of an executor, at a time.  [default: one per core]"
    ),
    click.option("--ray-address", metavar="ADDRESS", help="A Ray cluster that is there.  [default: one of our own]"),
    click.option("--gpus-per-cell", type=float, metavar="X", help="Of ray and slurm, e.g. 0.5.  [default: 1 on CUDA]"),
    click.option("--slurm-partition", metavar="NAME", help="Where Slurm's jobs go."),
    click.option(
        "--slurm-time", metavar="TIME", help="That a Slurm job may take; then it queues again.  [default: 1h]"
    ),
)


def executor_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of executors, which reach the command as one: `executor`."""

    @functools.wraps(command)
    def bundled(slurm_time: str | None, **values: Any) -> None:
        names = ("executor", "workers", "ray_address", "gpus_per_cell", "slurm_partition")
        limit = None if slurm_time is None else seconds(slurm_time, "--slurm-time")
        executor = Options(**{name: values.pop(name) for name in names}, slurm_time=limit)
        command(executor=executor, **values)

    for option in reversed(_EXECUTOR):
        bundled = option(bundled)
    return bundled


def seconds(text: str, option: str = "--time-limit") -> float:
    """A duration such as 90s, 30m, 2h or 1h30m."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    seconds = sum(int(n or 0) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True)) if parts else 0
    if not seconds:
        raise BadSpec(f"{option} {text} is no duration; write e.g. 90s, 30m, 2h or 1h30m")
    return float(seconds)


def words(options: Sequence[str]) -> list[str]:
    """Comma-separated words of a repeatable option."""
    return [word.strip() for option in options for word in option.split(",") if word.strip()]
