"""What commands open before they work: plug-ins, work folders; and what they say beside their results."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agl_bench.cli.ending import say
from agl_bench.cli.supervision import SUPERVISION
from agl_bench.errors import BadSpec

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from agl_bench.bench.apart import Apart
    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.spec import Campaign, RunSpec
    from agl_bench.registry.plugins import Plugins


class LoadingNotice(MetaPathFinder):
    """Says so before torch is imported, which takes seconds, on a cold disk many: a command is not silent for so long.

    It finds no module: the finders behind it do.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname == "torch":
            sys.meta_path.remove(self)
            click.echo("loading torch ...", err=True)

    @classmethod
    def install(cls) -> None:
        """For this process, unless torch is there already."""
        if "torch" not in sys.modules:
            sys.meta_path.insert(0, cls())


def warn(sentence: str) -> None:
    """One sentence beside the results."""
    say(sentence)


def discover(files: Sequence[Path], *, warn: bool = True) -> Plugins:
    """The plug-ins of this installation and of files; a line for each that is broken or odd, unless `warn` is False."""
    from agl_bench.registry.plugins import Plugins, are_strangers_there

    if are_strangers_there(files):
        SUPERVISION.begin()
    plugins = Plugins.discover(files)
    if warn:
        for broken in plugins.broken:
            click.echo(f"agl-bench: plug-in {broken.provider} is disabled: {broken.reason}", err=True)
        for remark in plugins.remarks:
            click.echo(f"agl-bench: plug-in {remark.provider} {remark.sentence}", err=True)
    return plugins


def apart_from(files: Sequence[Path]) -> Apart | None:
    """Where cells with plug-ins of others run; None if there are none. Asked before any plug-in is imported."""
    from agl_bench.registry.plugins import are_strangers_there

    if not are_strangers_there(files):
        return None
    # As long as this process has not imported torch, it has computed nothing, and can be forked.
    is_fresh = sys.platform == "linux" and "torch" not in sys.modules and threading.active_count() == 1
    from agl_bench.bench.apart import Apart

    return Apart(fork=is_fresh)


def cache_of(work: Path) -> Path:
    """Folder of prepared sections.

    Raises:
        BadSpec: if there can be none.
    """
    cache = Path(os.environ.get("AGL_BENCH_CACHE") or work / "cache")
    there = next((path for path in (cache, *cache.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise BadSpec(
            f"{cache} cannot be created because {there} is not a folder; choose another with --work or AGL_BENCH_CACHE"
        )
    return cache


def existing(work: Path) -> CellStore:
    """The store of a work folder that is there.

    Raises:
        BadSpec: if there is none.
    """
    from agl_bench.bench.cells import CellStore

    check_work_folder(work)
    return CellStore(work, warn=warn)


def check_work_folder(work: Path) -> None:
    """Raises `BadSpec` where nothing has been run."""
    if not (work / "cells").is_dir():
        raise BadSpec(f"{work} is not a work folder of agl-bench: nothing has been run there; use --work")


def say_left_out(campaign: Campaign, cells: list[Any]) -> None:
    """One line for each dataset that an evaluation cannot be made on."""
    if campaign.folds:
        return
    made = {(spec.dataset.label, spec.evaluation) for spec, _ in cells}
    for dataset in campaign.datasets:
        for evaluation in campaign.evaluations:
            if (dataset, evaluation) not in made:
                why = "has no such fold in protocol.fold_file" if campaign.protocol.fold_file else "has one section"
                click.echo(f"agl-bench: {dataset} {why}: no {evaluation}-batch evaluation of it", err=True)


def say_other_versions(work: Path, specs: Sequence[RunSpec]) -> None:
    """One line where another version of the code has finished cells of a grid that this one has not."""
    from agl_bench.bench.versions import not_reused, told

    found = not_reused(work, specs)
    if found:
        warn(told(found))
