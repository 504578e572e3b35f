"""The command tune."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agl_bench.cli.ending import INTERRUPTED, stop_with
from agl_bench.cli.group import cli
from agl_bench.cli.opening import cache_of, discover, say_left_out, warn
from agl_bench.cli.options import DATA, MOST, PATH, PLUGIN, SET, WORK, words
from agl_bench.cli.tracking import check_tracking
from agl_bench.terminal import (
    make_console,
    show_study_end,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from rich.console import Console

    from agl_bench.bench.run import Bench
    from agl_bench.bench.tune import Study


@cli.command()
@click.option("--selectors", multiple=True, metavar="A,B", help="Auxiliary selectors to tune.")
@click.option("--datasets", multiple=True, metavar="A,B", help="Datasets to tune them on.")
@click.option("--trials", type=click.IntRange(1, MOST), default=40, show_default=True, help="Budget of every study.")
@click.option("--backbone", multiple=True, metavar="A,B", help="Image encoders.  [default: tiny]")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--seeds", multiple=True, metavar="0,1", help="A trial trains each fold with each.  [default: 0]")
@click.option("--fold", multiple=True, metavar="A,B", help="Only these folds.")
@click.option(
    "--tune-folds", type=click.IntRange(1, MOST), help="Train only the first N folds in each trial.  [default: all]"
)
@click.option("--nested", is_flag=True, help="One study for each outer fold, whose settings serve this fold alone.")
@click.option(
    "--tune",
    "further",
    multiple=True,
    metavar="NAME.KEY",
    help="Search this too, for every selector alike, e.g. protocol.learning_rate,protocol.weight_decay,"
    "protocol.patience; repeatable.",
)
@click.option("--search", type=PATH, help="TOML file that says what to search, and where.")
@click.option("--sampler", type=click.Choice(["tpe", "random"]), default="tpe", show_default=True)
@click.option(
    "--pruner", type=click.Choice(["none", "median", "hyperband", "wilcoxon"]), default="none", show_default=True
)
@click.option("--storage", metavar="URL", help="Database of the trials.  [default: WORK/tune/journal.log]")
@click.option("--out", type=PATH, help="Folder of the tuned settings.  [default: WORK/tuned]")
@click.option("--preset", help="Protocol to start from: clean, paper or smoke.  [default: clean]")
@click.option("--config", type=PATH, help="TOML file as for run; options here win.")
@SET
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--tracking", metavar="URI", help="MLflow as for run: a tracking URI, or none.")
@PLUGIN
@DATA
@WORK
def tune(
    files: tuple[Path, ...],
    root: Path,
    work: Path,
    trials: int,
    tune_folds: int | None,
    nested: bool,
    further: tuple[str, ...],
    search: Path | None,
    sampler: str,
    pruner: str,
    storage: str | None,
    out: Path | None,
    preset: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    device: str,
    tracking: str | None,
    **lists: tuple[str, ...],
) -> None:
    """Search the settings of every selector with an equal budget, on validation spots alone.

    One study for each selector, dataset, evaluation and backbone; the best settings go to WORK/tuned/SELECTOR.toml,
    which `run --tuned` takes. Settings given with --set or --config are not searched. The same command continues where
    it was stopped, and may run in several processes at once. The exit status is 0 if all studies are finished, 1 if
    some failed, 2 if the input is wrong.
    """
    from agl_bench.bench.spec import Campaign

    check_tracking(work, tracking)
    plugins = discover(files)
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.run import Bench, choose_device, fingerprints, preflight
    from agl_bench.bench.tune import open_storage, read_search, studies
    from agl_bench.bench.tuned import check_writable

    searched = read_search(plugins, search, words("--tune", further))
    torch_device = choose_device(device)
    store = CellStore(work)
    check_writable(out or work / "tuned")
    prepared = Preparation(root, cache_of(work))
    known = fingerprints(campaign, plugins, root, prepared.digests)
    prepared.digests.keep()
    cells = campaign.cells(plugins, root, device=torch_device.type, fingerprint=known)
    found = studies(
        campaign, plugins, cells, searched, trials=trials, sampler=sampler, pruner=pruner, folds=tune_folds,
        nested=nested,
    )  # fmt: skip
    trial_storage = open_storage(work, storage, warn)
    bench = Bench(plugins, root, torch_device, prepared)
    console = make_console()
    say_left_out(campaign, cells)
    with console.status("reading and checking the data"):
        preflight([cell for study in found for cell in study.cells], bench, store, again=True)
    try:
        if _tune_all(found, bench, trial_storage, out or work / "tuned", work, tracking, console):
            sys.exit(1)
    except KeyboardInterrupt:
        stop_with("interrupted; finished trials are kept, the same command continues", INTERRUPTED)


def _tune_all(
    found: Sequence[Study],
    bench: Bench,
    storage: Any,
    out: Path,
    work: Path,
    tracking: str | None,
    console: Console,
) -> bool:
    """Run the studies and show them; whether one has failed."""
    from agl_bench.bench.tune import StudyDone, StudyFailed, StudySkipped, TrialDone, tune
    from agl_bench.bench.tuned import write_entry
    from agl_bench.errors import TrackerUnavailable

    failed, written = False, list[Path]()
    for study in found:
        if not study.space:
            click.echo(
                f"agl-bench: {study.title}: nothing is searched, so that one trial is all; give every selector the "
                "same freedom, e.g. with --tune protocol.learning_rate",
                err=True,
            )
        for event in tune(study, bench, storage):
            if isinstance(event, TrialDone):
                outcome = event.reason or f"validation PCC {event.value:.4f}"
                best = "" if event.best is None else f" (best {event.best:.4f})"
                click.echo(f"[{event.number}/{study.target}] {study.title}: {outcome}{best}")
            elif isinstance(event, StudyFailed):
                failed = True
                click.echo(f"agl-bench: failed: {study.title}: {event.sentence}", err=True)
            elif isinstance(event, StudySkipped):
                click.echo(f"{study.title}: SKIPPED, {event.reason}")
            elif isinstance(event, StudyDone):
                selector = study.spec.selector.name
                written.append(write_entry(out, selector, event.entry))
                show_study_end(event, console)
                from agl_bench.bench.mlflow_studies import keep_files, show_study

                keep_files(out, selector, event.entry, event.importances, event.history)
                if tracking != "none":
                    try:
                        show_study(work, tracking, selector, event.entry, event.importances, event.history)
                    except TrackerUnavailable as error:
                        click.echo(f"agl-bench: {error}; the tuned settings are safe in {out}", err=True)
            else:
                are = "trial is" if event.running == 1 else "trials are"
                click.echo(
                    f"{study.title}: {event.running} {are} still running in other processes; whoever ends last writes "
                    "the tuned settings"
                )
    for path in dict.fromkeys(written):
        console.print(f"Tuned settings: {path}")
    if written:
        console.print(f"Compare with fixed settings: agl-bench run … --tuned {out}")
    return failed
