"""Options that several commands have, and what their words mean."""

from __future__ import annotations

import functools
import math
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


class _Path(click.Path):
    """A path; an empty text would mean the folder that one is in."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if not str(value):
            self.fail("it is empty; name a file or a folder", parameter, context)
        return super().convert(value, parameter, context)


class Finite(click.FloatRange):
    """A number in a range; nan lies in every range of click's."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The number; fails where it is infinite or none."""
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", parameter, context)
        return number


PATH = _Path(path_type=Path)
MOST = 1_000_000  # of anything that is counted


PLUGIN = click.option(
    "--plugin",
    "files",
    multiple=True,
    type=PATH,
    help="A plug-in that is not installed: a .py file or a distribution's folder; repeatable.",
)


WORK = click.option(
    "--work",
    type=PATH,
    default=lambda: Path(os.environ.get("AGL_BENCH_WORK") or "agl-bench-work"),
    show_default="AGL_BENCH_WORK or ./agl-bench-work",
    help="Folder of finished cells, mlflow.db and artifacts.",
)


DATA = click.option(
    "--data",
    "root",
    type=PATH,
    default=lambda: Path(os.environ.get("AGL_BENCH_DATA") or "data"),
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
        "--workers",
        type=click.IntRange(1, MOST),
        metavar="N",
        help="Cells that an executor runs at a time.  [default: one per core]",
    ),
    click.option("--ray-address", metavar="ADDRESS", help="A Ray cluster that is there.  [default: one of our own]"),
    click.option(
        "--gpus-per-cell", type=Finite(0), metavar="X", help="For ray and slurm, e.g. 0.5.  [default: 1 on CUDA]"
    ),
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
    parts = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", text.strip(), re.ASCII)
    seconds = sum(int(n or 0) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True)) if parts else 0
    if not seconds:
        raise BadSpec(f"{option} {text} is not a duration; write e.g. 90s, 30m, 2h or 1h30m")
    return float(seconds)


def words(option: str, texts: Sequence[str]) -> list[str]:
    """Comma-separated words of a repeatable option.

    Raises:
        BadSpec: if it is given and has none.
    """
    found = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if texts and not found:
        raise BadSpec(f"{option} is empty; name at least one, or leave it out")
    return found
