"""Commands on MLflow, sync and ui, and what other commands need of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from agl_bench.cli.group import cli
from agl_bench.cli.opening import discover, existing
from agl_bench.cli.options import PLUGIN, WORK
from agl_bench.errors import AglBenchError, BadSpec
from agl_bench.terminal import (
    make_console,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from rich.console import Console

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.recorder import Recorder
    from agl_bench.registry.plugins import Plugins


@cli.command()
@click.option(
    "--tracking", metavar="URI", help="MLflow tracking URI.  [default: MLFLOW_TRACKING_URI or WORK/mlflow.db]"
)
@click.option("--models", is_flag=True, help="Log the models too that cells have kept (run --keep model).")
@click.option("--register", metavar="NAME", help="Register the model of --cell under this name.")
@click.option("--cell", metavar="KEY", help="Whose model; its key, or the beginning of it.")
@PLUGIN
@WORK
def sync(
    work: Path, tracking: str | None, models: bool, register: str | None, cell: str | None, files: tuple[Path, ...]
) -> None:
    """Bring MLflow up to date with the finished cells of the work folder."""
    if tracking == "none":
        raise BadSpec("--tracking none: there is nothing to sync to; name a tracking URI or leave the option out")
    if (register is None) != (cell is None):
        raise BadSpec("--register NAME and --cell KEY go together: one model is registered at a time")
    store = existing(work)
    console = make_console()
    key = store.find(cell) if cell is not None else None
    if key is not None:
        store.model(key)  # what is not there is said before anything is logged
    recorder = recorder_of(work, tracking, console)
    added = kept = 0
    for result in store:
        if recorder.record(result):
            added += 1
        else:
            kept += 1
    recorder.finish()
    plugins = discover(files)
    annotate(store, recorder, plugins)
    _raise_if_dead(recorder)
    console.print(f"{added} cells added to MLflow, {kept} were there already.")
    if models or register:
        _sync_models(store, plugins, tracking, console, key, register)


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--tracking", metavar="URI", help="MLflow tracking URI of a database.  [default: WORK/mlflow.db]")
@WORK
def ui(work: Path, port: int, tracking: str | None) -> None:
    """Start the MLflow UI on this machine and print where to look."""
    from agl_bench.bench.mlflow_ui import serve

    existing(work)

    def ready(links: dict[str, str]) -> None:
        for what, address in links.items():
            click.echo(f"{what}\n    {address}")
        click.echo("Ctrl-C stops the server.")

    click.echo("starting the MLflow server …")
    serve(work, tracking, port=port, ready=ready)


def check_tracking(work: Path, tracking: str | None) -> None:
    """Raises `TrackerUnavailable` for an address that nothing can read, where a server that is away costs a line."""
    if tracking not in (None, "none"):
        from agl_bench.bench.mlflow_tracker import Tracker

        Tracker.of(work, tracking)


def recorder_of(
    work: Path, tracking: str | None, console: Console, models: tuple[CellStore, Plugins] | None = None
) -> Recorder:
    """What shows results; the models of a store too where it and the plug-ins are given."""
    from agl_bench.bench.recorder import NoRecorder

    if tracking == "none":
        return NoRecorder()
    with console.status("opening MLflow"):
        from agl_bench.bench.mlflow_models import Models
        from agl_bench.bench.mlflow_recorder import MlflowRecorder

        return MlflowRecorder.connect(work, tracking, models=Models(*models) if models else None)


def _sync_models(
    store: CellStore, plugins: Plugins, tracking: str | None, console: Console, key: str | None, name: str | None
) -> None:
    """Log the models that cells have kept, or of one cell alone, which is registered as `name`."""
    from agl_bench.bench.mlflow_recorder import MlflowRecorder

    recorder = recorder_of(store.work, tracking, console, (store, plugins))
    assert isinstance(recorder, MlflowRecorder)
    count = 0
    for result in store if key is None else filter(None, [store.read(key)]):
        if "model" in store.kept(result.spec.key):
            address = recorder.record_model(result.spec)
            count += address is not None
            if name is not None and address is not None:
                version = recorder.register_model(result.spec, name)
                console.print(f"{result.spec.title}: models:/{name}/{version}")
    _raise_if_dead(recorder)
    models = "1 model of a cell is" if count == 1 else f"{count} models of cells are"
    console.print(f"{models} in MLflow" + ("." if count else "; keep them by run --keep model."))


def _raise_if_dead(recorder: Recorder) -> None:
    if recorder.dead:
        raise AglBenchError(f"the sync was cut short: {recorder.dead}")


def annotate(store: CellStore, recorder: Recorder, plugins: Plugins) -> None:
    """Show in MLflow how the lines of the work folder stand."""
    from agl_bench.bench.recorder import NoRecorder

    if recorder.dead or isinstance(recorder, NoRecorder):
        return
    from agl_bench.comparison.gather import gather
    from agl_bench.comparison.standings import standings

    recorder.annotate(standings(gather(store), plugins))
