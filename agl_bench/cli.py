"""The command line. Thin: it reads words, calls `bench`, and has `terminal` show what comes back."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import click

from agl_bench.bench.executors import EXECUTORS, Options
from agl_bench.errors import AglBenchError, BadPlugin, BadSpec, UnknownName
from agl_bench.terminal import (
    follow,
    make_console,
    show_card,
    show_end,
    show_export,
    show_findings,
    show_merge,
    show_plan,
    show_repetition,
    show_study_end,
    show_table,
)

# Read by OpenMP when torch is imported. By default an idle thread spins for milliseconds before it sleeps; where
# another process wants its core, every small operation waits for that, and a cell takes forty times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from rich.console import Console

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.recorder import Recorder
    from agl_bench.bench.run import Bench, Event
    from agl_bench.bench.spec import Campaign, RunSpec
    from agl_bench.bench.tune import Study
    from agl_bench.comparison.gather import Gathered
    from agl_bench.comparison.reproduce import Grid
    from agl_bench.registry.plugins import Plugins

INTERRUPTED = 75  # EX_TEMPFAIL: try again

_PLUGIN = click.option(
    "--plugin", "files", multiple=True, type=click.Path(path_type=Path), help="A single-file plug-in; repeatable."
)
_WORK = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=True),
    default=lambda: Path(os.environ.get("AGL_BENCH_WORK", "agl-bench-work")),
    show_default="AGL_BENCH_WORK or ./agl-bench-work",
    help="Folder of finished cells, mlflow.db and artifacts.",
)
_DATA = click.option(
    "--data",
    "root",
    type=click.Path(path_type=Path),
    default=lambda: Path(os.environ.get("AGL_BENCH_DATA", "data")),
    show_default="AGL_BENCH_DATA or ./data",
    help="Folder of the datasets.",
)
_SET = click.option(
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


def _executor_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of executors, which reach the command as one: `executor`."""

    @functools.wraps(command)
    def bundled(slurm_time: str | None, **values: Any) -> None:
        names = ("executor", "workers", "ray_address", "gpus_per_cell", "slurm_partition")
        limit = None if slurm_time is None else _seconds(slurm_time, "--slurm-time")
        executor = Options(**{name: values.pop(name) for name in names}, slurm_time=limit)
        command(executor=executor, **values)

    for option in reversed(_EXECUTOR):
        bundled = option(bundled)
    return bundled


class _Commands(click.Group):
    """Suggests the nearest command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        import difflib

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            ctx.fail(f"No such command '{args[0]}'.{hint} Commands: {', '.join(sorted(self.commands))}.")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agl-bench", prog_name="agl-bench")
def cli() -> None:
    """The pluggable benchmark for auxiliary-gene selection.

    Try: agl-bench run --selectors pgl,agl,hvg_k,dkgsb --datasets synthetic
    """


@cli.command()
@click.option("--selectors", multiple=True, metavar="A,B", help="Auxiliary selectors to compare.")
@click.option(
    "--datasets",
    multiple=True,
    metavar="A,B",
    help="Datasets to compare them on; NAME:VALUE where one takes a value, e.g. hest:TENX152,TENX89.",
)
@click.option("--backbone", multiple=True, metavar="A,B", help="Image encoders.  [default: tiny]")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--seeds", multiple=True, metavar="0,1", help="Roots of all randomness.  [default: 0]")
@click.option("--fold", multiple=True, metavar="A,B", help="Only these folds, e.g. C2.0 (intra) or C2 (inter).")
@click.option(
    "--preset", help="Protocol to start from: clean, paper (its schedules: paper_v1 … v3) or smoke.  [default: clean]"
)
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with the same keys; options here win.")
@_SET
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16"]),
    help="Of training passes, short for --set protocol.precision; look-aheads stay fp32.  [default: the preset's]",
)
@click.option("--again", is_flag=True, help="Run finished and failed cells anew, from the beginning.")
@click.option(
    "--keep",
    type=click.Choice(["predictions", "model", "nothing"]),
    default="predictions",
    show_default=True,
    help="Of each cell beside its tables: predictions of the test spots, the model too, or nothing.",
)
@click.option("--retry-failed", is_flag=True, help="Run failed and diverged cells anew.")
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(0),
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="How often a cell in training is kept, at ends of epochs; 0 = each epoch.",
)
@click.option(
    "--time-limit",
    metavar="TIME",
    help="Interrupt a cell after so long, e.g. 30m or 2h, and go on with the next; the next run continues it.",
)
@click.option(
    "--controls",
    is_flag=True,
    help="Also run what bounds the table: backbones without image, and images of the wrong spots.",
)
@click.option(
    "--tuned",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also run every selector with the settings that `tune` wrote there; tables keep tuned and fixed apart.",
)
@click.option("--transfer", is_flag=True, help="With --tuned: also settings found on other data or protocols.")
@_executor_options
@click.option("--dry-run", is_flag=True, help="Print the grid and stop.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table with per-fold values.")
@click.option(
    "--tracking",
    metavar="URI",
    help="MLflow: a tracking URI, or none.  [default: MLFLOW_TRACKING_URI or WORK/mlflow.db]",
)
@_PLUGIN
@_DATA
@_WORK
def run(
    files: tuple[Path, ...],
    root: Path,
    work: Path,
    config: Path | None,
    preset: str | None,
    assignments: tuple[str, ...],
    device: str,
    precision: str | None,
    again: bool,
    keep: Any,
    retry_failed: bool,
    checkpoint_every: float,
    time_limit: str | None,
    controls: bool,
    tuned: Path | None,
    transfer: bool,
    executor: Options,
    dry_run: bool,
    json_file: Path | None,
    tracking: str | None,
    **lists: tuple[str, ...],
) -> None:
    """Train every selector on every fold and print the comparison.

    Finished cells are kept: the same command continues where it was stopped, in the middle of a training too. Several
    may run at once on one work folder. The exit status is 0 if all cells are finished, 1 if some failed, 2 if the input
    is wrong, 75 if some were interrupted.
    """
    from agl_bench.bench.spec import Campaign

    limit = None if time_limit is None else _seconds(time_limit)
    executor.check(device)
    plugins = _discover(files)
    if precision is not None:
        assignments = (*assignments, f"protocol.precision={precision}")
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)
    _check_writable("--json", json_file)

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.controls import control_cells, control_selectors, controls_of, notes_on
    from agl_bench.bench.jobs import Job, run_on
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.run import Bench, choose_device, fingerprints, preflight, run_cells

    # Workers elsewhere have other devices; their data are looked at here, on the CPU.
    torch_device = choose_device("cpu" if executor.is_elsewhere else device)
    on = "cuda" if executor.is_elsewhere and (device == "cuda" or executor.gpus_per_cell) else torch_device.type
    if transfer and tuned is None:
        raise BadSpec("--transfer says which tuned settings may be taken; name their folder with --tuned")
    if dry_run:
        _show_grid(campaign, plugins, root, work, on, controls=controls, tuned=tuned, transfer=transfer)
        return
    if campaign.protocol.precision == "tf32" and on != "cuda":
        raise BadSpec(f"protocol.precision = tf32 needs a CUDA device, and this run is on the {on}; use fp32")
    engine = None if executor.executor == "serial" else executor.engine(on)
    store = CellStore(work, warn=_warn)
    prepared = Preparation(root, _cache(work))
    known = fingerprints(campaign, plugins, root, prepared.digests)
    prepared.digests.keep()
    cells = campaign.cells(plugins, root, device=on, fingerprint=known)
    cells = _with_tuned(cells, campaign, plugins, tuned, transfer=transfer)
    asked = {spec.key for spec, _ in cells}
    further = control_cells(campaign, plugins, root, device=on, fingerprint=known) if controls else []
    below = {spec.key for spec, _ in further}
    cells = _joined(cells, further)
    bench = Bench(plugins, root, torch_device, prepared)
    console = make_console()
    _say_left_out(campaign, cells)
    with console.status("reading and checking the data"):
        preflight(cells, bench, store, again=again, retry_failed=retry_failed)
    recorder = _recorder(work, tracking, console, (store, plugins) if keep == "model" else None)
    with _Signals() as signals:
        events: Iterator[Event]
        if engine is None:
            events = run_cells(
                cells, bench, store, recorder, again=again, retry_failed=retry_failed,
                checkpoint_every=checkpoint_every, time_limit=limit, stop=signals.asked, keep=keep,
            )  # fmt: skip
        else:
            del bench  # workers have their own
            job = Job(work, root, _cache(work), files, on, checkpoint_every, limit, keep)
            events = run_on(
                engine, cells, job, store, recorder, again=again, retry_failed=retry_failed, stop=signals.asked
            )
        results, failures, stopped = follow(events, len(cells), console)
    if signals.asked():
        raise KeyboardInterrupt
    place = {spec.key: number for number, (spec, _) in enumerate(cells)}
    results.sort(key=lambda r: place[r.spec.key])  # others may have finished some of them
    own = [r for r in results if r.spec.key in asked]
    bounds = control_selectors(plugins, campaign.selectors)
    fixed = [r for r in own if r.spec.tuning is None]
    found = controls_of(fixed, [r for r in results if r.spec.key in below])
    notes = notes_on(fixed, found, bounds)
    if own:
        show_table(own, campaign, console, found, bounds, notes)
    if json_file is not None:
        from agl_bench.bench.controls import controls_as_json
        from agl_bench.bench.table import as_json

        content = as_json(own) | controls_as_json(found, notes, bounds)
        json_file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _annotate(store, recorder, plugins)
    show_end(work, tracking, recorder, failures, console)
    lacking = [] if keep == "nothing" else [r.spec.key for r in results if keep not in store.kept(r.spec.key)]
    if lacking:
        _warn(
            f"{len(lacking)} of {len(results)} finished cells were made before and have kept no {keep}; "
            f"`agl-bench rerun {lacking[0]} --keep {keep} --work {work}` adds it to one"
        )
    if stopped:
        sentence = f"{len(stopped)} of {len(cells)} cells reached the time limit of {time_limit}"
        _stop(f"{sentence}; the same command continues them", INTERRUPTED)
    if failures:
        sys.exit(1)


@cli.command()
@click.option("--json", "json_", is_flag=True, help="For programs.")
@_WORK
def status(work: Path, json_: bool) -> None:
    """Show how far the cells of a work folder are, also while they run."""
    from agl_bench.bench.status import STATUSES, as_json, status_of

    _check_work_folder(work)
    found = status_of(work)
    if json_:
        click.echo(json.dumps(as_json(found), indent=1))
        return
    from rich.table import Table

    console = make_console()
    table = Table(title=f"cells of {work}", title_justify="left", title_style="bold")
    columns = ["dataset", "evaluation", "backbone", "selector"]
    if any(place.settings != "fixed" for place in found.counts):
        columns.append("settings")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for column in STATUSES:
        table.add_column(column, justify="right", no_wrap=True)
    for place, count in found.counts.items():
        words = (getattr(place, column) for column in columns)
        table.add_row(*words, *(str(count[name] or "–") for name in STATUSES))
    total = {name: sum(count[name] for count in found.counts.values()) for name in STATUSES}
    table.add_section()
    table.add_row("all", *[""] * (len(columns) - 1), *(str(total[name] or "–") for name in STATUSES))
    console.print(table)
    for cell in found.running:
        what = f"{cell.place.title} · fold {cell.fold} · seed {cell.seed}" if cell.place else cell.key
        done = "before its first epoch"
        if cell.progress is not None:
            done = f"{cell.progress[0] + 1} of {cell.progress[1]} epochs"
        line = f"running: {what}: {done}, process {cell.owner.pid} on {cell.owner.host}"
        console.print(line, markup=False, highlight=False)


@cli.command()
@click.option("--selectors", multiple=True, metavar="A,B", help="Auxiliary selectors to audit.")
@click.option("--datasets", multiple=True, metavar="A,B", help="Datasets to audit them on.")
@click.option("--backbone", multiple=True, metavar="A,B", help="Image encoders.  [default: tiny]")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--fold", multiple=True, metavar="A,B", help="These folds.  [default: the first of each evaluation]")
@click.option("--preset", help="Protocol to audit: clean, paper or smoke.  [default: clean]")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file as for run; options here win.")
@_SET
@click.option("--epochs", type=click.IntRange(2), default=3, show_default=True, help="Of each training.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every finding.")
@_PLUGIN
@_DATA
def audit(
    files: tuple[Path, ...],
    root: Path,
    config: Path | None,
    preset: str | None,
    assignments: tuple[str, ...],
    epochs: int,
    device: str,
    json_file: Path | None,
    **lists: tuple[str, ...],
) -> None:
    """Show that test and validation expression reach nothing before their turn.

    Everything is built and trained with the expression as measured, with garbage at the test spots and with garbage at
    the validation spots, and compared stage by stage, bit for bit. The exit status is 0 if nothing changes but what the
    protocol declares, 1 if something else does, 2 if the input is wrong.
    """
    from dataclasses import replace

    from agl_bench.bench.spec import Campaign

    plugins = _discover(files)
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)
    _check_writable("--json", json_file)

    from agl_bench.bench.audit import as_json, audit, short
    from agl_bench.bench.run import choose_device, fingerprints

    torch_device = choose_device(device)
    campaign = replace(campaign, protocol=short(campaign.protocol, epochs))
    known = fingerprints(campaign, plugins, root, None)
    cells = campaign.cells(plugins, root, device=torch_device.type, fingerprint=known)
    if not campaign.folds:
        first = {(spec.dataset.label, spec.evaluation): plan for spec, plan in reversed(cells)}
        cells = [(s, plan) for s, plan in cells if first[s.dataset.label, s.evaluation] == plan]
    console = make_console()
    _say_left_out(campaign, cells)
    with console.status("building and training three times each"):
        findings = list(audit(cells, plugins, root, torch_device))
    show_findings(findings, campaign.preset, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(findings, campaign.protocol), indent=1), encoding="utf-8")
    if any(f.is_bad for f in findings):
        sys.exit(1)


@cli.command()
@click.option("--selectors", multiple=True, metavar="A,B", help="Auxiliary selectors to tune.")
@click.option("--datasets", multiple=True, metavar="A,B", help="Datasets to tune them on.")
@click.option("--trials", type=click.IntRange(1), default=40, show_default=True, help="Budget of every study.")
@click.option("--backbone", multiple=True, metavar="A,B", help="Image encoders.  [default: tiny]")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--seeds", multiple=True, metavar="0,1", help="A trial trains each fold with each.  [default: 0]")
@click.option("--fold", multiple=True, metavar="A,B", help="Only these folds.")
@click.option("--tune-folds", type=click.IntRange(1), help="A trial trains the first so many folds.  [default: all]")
@click.option("--nested", is_flag=True, help="One study for each outer fold, whose settings serve this fold alone.")
@click.option(
    "--tune",
    "further",
    multiple=True,
    metavar="NAME.KEY",
    help="Search this too, for every selector alike, e.g. protocol.learning_rate,protocol.weight_decay,"
    "protocol.patience; repeatable.",
)
@click.option("--search", type=click.Path(path_type=Path), help="TOML file that says what to search, and where.")
@click.option("--sampler", type=click.Choice(["tpe", "random"]), default="tpe", show_default=True)
@click.option(
    "--pruner", type=click.Choice(["none", "median", "hyperband", "wilcoxon"]), default="none", show_default=True
)
@click.option("--storage", metavar="URL", help="Database of the trials.  [default: WORK/tune/journal.log]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the tuned settings.  [default: WORK/tuned]")
@click.option("--preset", help="Protocol to start from: clean, paper or smoke.  [default: clean]")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file as for run; options here win.")
@_SET
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--tracking", metavar="URI", help="MLflow as for run: a tracking URI, or none.")
@_PLUGIN
@_DATA
@_WORK
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

    plugins = _discover(files)
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.run import Bench, choose_device, fingerprints, preflight
    from agl_bench.bench.tune import open_storage, read_search, studies
    from agl_bench.bench.tuned import check_writable

    searched = read_search(plugins, search, further)
    torch_device = choose_device(device)
    store = CellStore(work)
    check_writable(out or work / "tuned")
    prepared = Preparation(root, _cache(work))
    known = fingerprints(campaign, plugins, root, prepared.digests)
    prepared.digests.keep()
    cells = campaign.cells(plugins, root, device=torch_device.type, fingerprint=known)
    found = studies(
        campaign, plugins, cells, searched, trials=trials, sampler=sampler, pruner=pruner, folds=tune_folds,
        nested=nested,
    )  # fmt: skip
    trial_storage = open_storage(work, storage)
    bench = Bench(plugins, root, torch_device, prepared)
    console = make_console()
    _say_left_out(campaign, cells)
    with console.status("reading and checking the data"):
        preflight([cell for study in found for cell in study.cells], bench, store, again=True)
    try:
        if _tune_all(found, bench, trial_storage, out or work / "tuned", work, tracking, console):
            sys.exit(1)
    except KeyboardInterrupt:
        _stop("interrupted; finished trials are kept, the same command continues", INTERRUPTED)


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
    from agl_bench.bench.tune import StudyDone, StudyFailed, TrialDone, tune
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
        console.print(f"Tuned settings: {path}", highlight=False, markup=False)
    if written:
        console.print(f"Compare with fixed settings: agl-bench run … --tuned {out}", highlight=False, markup=False)
    return failed


@cli.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_PLUGIN
def list_(files: tuple[Path, ...], as_json: bool) -> None:
    """List selectors, backbones and datasets, who provides them, and what is broken."""
    plugins = _discover(files, warn=False)
    if as_json:
        entries = [
            {"kind": e.kind, "name": e.name, "provider": e.provider, "summary": e.summary} for e in plugins.entries()
        ]
        click.echo(json.dumps({"entries": entries, "broken": [vars(b) for b in plugins.broken]}, indent=1))
        return
    from rich.table import Table

    console = make_console()
    for kind in ("selector", "backbone", "dataset"):
        table = Table(title=f"{kind}s", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("name", "what it is", "provided by"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        for name in plugins.names(kind):
            entry = plugins.entry(name)
            table.add_row(name, entry.summary, entry.provider)
        console.print(table, "")
    if plugins.broken:
        console.print("[bold red]disabled[/]")
        for broken in plugins.broken:
            console.print(f"{broken.provider}: {broken.reason}", markup=False, highlight=False)


@cli.command()
@click.argument("name")
@_PLUGIN
def show(name: str, files: tuple[Path, ...]) -> None:
    """Show one plug-in, or a preset: what it is, where it is from, and its settings."""
    from rich.table import Table

    from agl_bench.interfaces.tunable import tunables
    from agl_bench.protocol import Protocol, load_preset, preset_names

    console = make_console()
    if name in preset_names():
        preset = load_preset(name)
        console.print(f"[bold]{name}[/]  preset")
        for key, value in Protocol.of(preset.protocol).settings().items():
            console.print(f"  protocol.{key} = {value}", highlight=False)
        for plugin, settings in preset.plugins.items():
            for key, given in settings.items():
                console.print(f"  {plugin}.{key} = {given}", highlight=False)
        return
    plugins = _discover(files)
    names = [e.name for e in plugins.entries()]
    if name not in names:
        raise UnknownName("plug-in or preset", name, [*names, *preset_names()])
    entry = plugins.entry(name)
    cls = entry.load()
    module = sys.modules[cls.__module__]
    console.print(f"[bold]{name}[/]  {entry.kind} of {entry.provider}\n")
    console.print((module.__doc__ or cls.__doc__ or "").strip(), markup=False, highlight=False)
    for attribute in ("reference", "citation", "licence", "revision"):
        if getattr(cls, attribute, ""):
            console.print(f"\n{attribute}: {getattr(cls, attribute)}", markup=False, highlight=False, end="")
    table = Table(title="\nsettings (--set)", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("setting", "default", "takes"):
        table.add_column(column, overflow="fold")
    for tunable in tunables(cls).values():
        default = ",".join(tunable.default) if isinstance(tunable.default, tuple) else str(tunable.default)
        table.add_row(f"{name}.{tunable.name}", default, tunable.allowed())
    console.print("\n" if not table.rows else table)


@cli.command()
@click.argument("name")
@_SET
@_PLUGIN
@_DATA
def fetch(name: str, assignments: tuple[str, ...], files: tuple[Path, ...], root: Path) -> None:
    """Download a dataset: only what is missing, checked."""
    from agl_bench.bench.prepare import naming_the_dataset
    from agl_bench.bench.spec import make_dataset, one_part

    plugins = _discover(files)
    part = one_part(plugins, name, "dataset", assignments)
    dataset = make_dataset(plugins, part)
    console = make_console()
    if dataset.licence:
        console.print(f"{name}: {dataset.citation} Licence: {dataset.licence}.", markup=False, highlight=False)
    with naming_the_dataset(part):
        dataset.fetch(root)
        sections = dataset.sections(root)
    console.print(f"{name} is there: {len(sections)} sections ({', '.join(sections)}).", markup=False, highlight=False)


@cli.command()
@click.argument("name", metavar="PATH|NAME")
@_SET
@_PLUGIN
@_DATA
def validate(name: str, assignments: tuple[str, ...], files: tuple[Path, ...], root: Path) -> None:
    """Check sections, yours or a dataset's: a line for each sound one, a sentence for every problem.

    PATH is a folder or a store in the layout of any dataset, which is recognised. The exit status is 0 if all is
    sound, 2 otherwise.
    """
    from agl_bench.bench.validate import find_dataset, validate

    called, dataset = find_dataset(_discover(files), name, assignments)
    click.echo(f"read as {called}")
    found = 0
    for verdict in validate(called, dataset, root):
        if verdict.facts:
            click.echo(f"{verdict.section}: {verdict.facts}")
        for problem in verdict.problems:
            found += 1
            click.echo(f"agl-bench: {' '.join(problem.split())}", err=True)
    if found:
        click.echo(f"{found} problem{'s' if found > 1 else ''} found")
        sys.exit(2)


@cli.command()
@click.argument("dataset")
@click.option("--evaluation", multiple=True, metavar="A,B", help="intra, inter or both.  [default: intra,inter]")
@click.option("--seeds", multiple=True, metavar="0,1", help="Roots of all randomness.  [default: 0]")
@click.option("--preset", default="clean", show_default=True, help="Protocol to start from: clean, paper or smoke.")
@_SET
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the folds as CSV, for --set protocol.fold_file=CSV."
)
@_PLUGIN
@_DATA
def folds(
    dataset: str,
    evaluation: tuple[str, ...],
    seeds: tuple[str, ...],
    preset: str,
    assignments: tuple[str, ...],
    out: Path | None,
    files: tuple[Path, ...],
    root: Path,
) -> None:
    """Make the folds of a dataset without training: sizes, distances between train and test, digests."""
    from agl_bench.bench.spec import evaluations_of, one_dataset, seeds_of

    plugins = _discover(files)
    roots = seeds_of(seeds or ("0",))
    evaluations = evaluations_of(evaluation or ("intra", "inter"))
    if out is not None and len(roots) != 1:
        raise BadSpec(f"--out writes the folds of one seed, there are {len(roots)}; choose one with --seeds")
    _check_writable("--out", out)
    part, protocol = one_dataset(plugins, dataset, preset, assignments)
    protocol.files()  # one that is not there ends here

    import torch
    from rich.table import Table

    from agl_bench.bench.fold_report import fold_line, report_folds
    from agl_bench.bench.run import Bench

    sections = Bench(plugins, root, torch.device("cpu")).sections(part)
    reports = list(report_folds(sections, protocol, dataset=dataset, evaluations=evaluations, seeds=roots))
    if not reports:
        raise BadSpec(f"protocol.fold_file = '{protocol.fold_file}' has no fold for --evaluation {evaluations[0]}")
    console = make_console()
    for name in dict.fromkeys(r.evaluation for r in reports):
        here = [r for r in reports if r.evaluation == name]
        table = Table(title=f"{dataset} · {name}-batch", title_justify="left", title_style="bold")
        for column in ("fold", "seed", "train", "held-out", "validation", "test", "buffer", "unlisted"):
            table.add_column(column, justify="left" if column == "fold" else "right", no_wrap=True)
        for column in ("nearest µm", "median µm", "overlapping", "digest"):
            table.add_column(column, justify="left" if column == "digest" else "right", no_wrap=True)
        for report in here:
            distances = (report.record["nearest_um"], report.record["median_um"])
            table.add_row(
                report.label,
                str(report.seed),
                *(f"{count:,}" for count in report.counts.values()),
                *("–" if value is None else f"{value:,.0f}" for value in distances),
                f"{report.record['overlapping']:,}",
                report.record["digest"],
            )
        console.print(table)
        console.print(f"{fold_line([(r.counts, r.record) for r in here])}.\n", markup=False, highlight=False)
    if out is not None:
        header = reports[0].csv.partition("\n")[0]
        out.write_text(
            "\n".join([header, *(r.csv.partition("\n")[2].rstrip("\n") for r in reports), ""]), encoding="utf-8"
        )
        console.print(f"{len(reports)} folds written to {out}", markup=False, highlight=False)


@cli.command()
@click.argument("name")
@click.option("--backbone", help="Cut patches as this backbone sees them.  [default: tiny]")
@click.option("--px", type=click.IntRange(1, 4096), help="Cut patches with sides of so many pixels instead.")
@click.option("--um", type=click.FloatRange(1, 10_000), help="How much tissue they show.  [default: the protocol's]")
@_SET
@_PLUGIN
@_DATA
@_WORK
def prepare(
    name: str,
    backbone: str | None,
    px: int | None,
    um: float | None,
    assignments: tuple[str, ...],
    files: tuple[Path, ...],
    root: Path,
    work: Path,
) -> None:
    """Read, check and store a dataset as `run` uses it: memory-mapped, under AGL_BENCH_CACHE or WORK/cache.

    `run` does the same when it needs it. What is absent is fetched, unless AGL_BENCH_OFFLINE=1; what is there already
    is kept, and an interrupted preparation goes on where it stood.
    """
    from agl_bench.bench.prepare import Preparation, bring, seen_by
    from agl_bench.bench.spec import make_dataset, one_part
    from agl_bench.data.prepared import PatchSize
    from agl_bench.protocol import Protocol

    if backbone is not None and px is not None:
        raise BadSpec(f"--backbone {backbone} and --px {px} both say how large patches are; leave one out")
    if um is not None and math.isnan(um):  # which lies between any two numbers for click
        raise BadSpec("--um nan is no length; give micrometres from 1 to 10000")
    plugins = _discover(files)
    backbone = backbone or "tiny"
    of_backbone = [a for a in assignments if a.strip().startswith(f"{backbone}.")]
    part = one_part(plugins, name, "dataset", [a for a in assignments if a not in of_backbone])
    dataset = make_dataset(plugins, part)
    sees, side = seen_by(plugins, one_part(plugins, backbone, "backbone", of_backbone))
    seen = px is not None or sees == "patches"
    size = PatchSize(px or side, um or Protocol().patch_um) if seen else None
    console = make_console()
    with console.status(f"preparing {name}"):
        bring(part, dataset, root)
        cache, count, total = _cache(work), 0, 0
        for prepared in Preparation(root, cache).sections(part, dataset, size):
            section = prepared.section
            patches = ""
            if section.patches is not None and size is not None:
                patches = f", patches of {size.px} px for {size.um:g} µm"
            took = "was there" if prepared.was_there else f"{prepared.seconds:.1f} s"
            spots, genes = section.counts.shape
            console.print(
                f"{section.name}: {spots:,} spots × {genes:,} genes{patches}, {prepared.bytes / 1e6:,.1f} MB, {took}",
                markup=False, highlight=False,
            )  # fmt: skip
            count, total = count + 1, total + prepared.bytes
    console.print(
        f"{count} section{'s' if count != 1 else ''}, {total / 1e6:,.1f} MB in {cache}", markup=False, highlight=False
    )


@cli.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for a picture of each section: spots on tissue.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_SET
@_PLUGIN
@_DATA
@_WORK
def describe(
    name: str,
    out: Path | None,
    as_json: bool,
    assignments: tuple[str, ...],
    files: tuple[Path, ...],
    root: Path,
    work: Path,
) -> None:
    """Show what a dataset is: source, tissue, and the numbers of each section. Reads it, writes --out only."""
    from agl_bench.bench.describe import dataset_card, section_card
    from agl_bench.bench.prepare import Preparation, naming_the_dataset
    from agl_bench.bench.spec import make_dataset, one_part
    from agl_bench.data.check import check_section

    plugins = _discover(files)
    part = one_part(plugins, name, "dataset", assignments)
    dataset = make_dataset(plugins, part)
    card = dataset_card(part, dataset, root, Preparation(root, _cache(work)).digests)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    cards, pictures = [], []
    with naming_the_dataset(part):
        names = list(dataset.sections(root))
    for section_name in names:  # one at a time: they may be large
        with naming_the_dataset(part):
            section = dataset.read(root, section_name)
        check_section(section)
        cards.append(vars(section_card(section)))
        if out is not None:
            from agl_bench.bench.overlay import draw_overlay

            pictures.append(
                out / "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{name}-{section_name}.png")
            )
            draw_overlay(name, section, pictures[-1])
        del section  # before the next is read
    if as_json:
        click.echo(json.dumps(card | {"sections": cards, "pictures": [str(p) for p in pictures]}, indent=1))
    else:
        show_card(card, cards)
        for picture in pictures:
            click.echo(f"wrote {picture}")


@cli.command()
@click.argument("name")
@_SET
@_PLUGIN
@_DATA
def check(name: str, assignments: tuple[str, ...], files: tuple[Path, ...], root: Path) -> None:
    """Check a plug-in against the rules of its door. NAME is a plug-in or a .py file."""
    from agl_bench.bench.spec import make_dataset, one_part
    from agl_bench.testing import check_backbone, check_dataset, check_selector

    if name.endswith(".py"):
        plugins = _discover((*files, Path(name)))
        entries = [e for e in plugins.entries() if e.provider == Path(name).name]
        if not entries:
            raise BadPlugin(f"plug-in {name}: it registers nothing; return {{name: class}} from a hook")
    else:
        plugins = _discover(files)
        entries = [plugins.entry(name.partition(":")[0])]
    console = make_console()
    broken = 0
    for entry in entries:
        word = name if name.startswith(f"{entry.name}:") else entry.name
        part = one_part(plugins, word, entry.kind, assignments)
        if entry.kind == "selector":
            verdicts = check_selector(entry.load(), part.settings)
        elif entry.kind == "backbone":
            verdicts = check_backbone(entry.load(), part.settings)
        else:
            verdicts = check_dataset(make_dataset(plugins, part), root)
        console.print(f"[bold]{entry.name}[/]  {entry.kind} of {entry.provider}")
        for verdict in verdicts:
            mark = "[green]ok[/]  " if verdict.problem is None else "[red]FAIL[/]"
            console.print(f"  {mark} {verdict.rule}")
            if verdict.problem is not None:
                broken += 1
                console.print(f"       {verdict.problem}", markup=False, highlight=False)
    if broken:
        console.print(f"{broken} rule{'s' if broken > 1 else ''} broken")
        sys.exit(1)


@cli.command()
@click.option(
    "--tracking", metavar="URI", help="MLflow tracking URI.  [default: MLFLOW_TRACKING_URI or WORK/mlflow.db]"
)
@click.option("--models", is_flag=True, help="Log the models too that cells have kept (run --keep model).")
@click.option("--register", metavar="NAME", help="Register the model of --cell under this name.")
@click.option("--cell", metavar="KEY", help="Whose model; its key, or the beginning of it.")
@_PLUGIN
@_WORK
def sync(
    work: Path, tracking: str | None, models: bool, register: str | None, cell: str | None, files: tuple[Path, ...]
) -> None:
    """Bring MLflow up to date with the finished cells of the work folder."""
    if tracking == "none":
        raise BadSpec("--tracking none: there is nothing to sync to; name a tracking URI or leave the option out")
    if (register is None) != (cell is None):
        raise BadSpec("--register NAME and --cell KEY go together: one model is registered at a time")
    store = _existing(work)
    console = make_console()
    key = store.find(cell) if cell is not None else None
    if key is not None:
        store.model(key)  # what is not there is said before anything is logged
    recorder = _recorder(work, tracking, console)
    added = kept = 0
    for result in store:
        if recorder.record(result):
            added += 1
        else:
            kept += 1
    recorder.finish()
    plugins = _discover(files)
    _annotate(store, recorder, plugins)
    _raise_if_dead(recorder)
    console.print(f"{added} cells added to MLflow, {kept} were there already.")
    if models or register:
        _sync_models(store, plugins, tracking, console, key, register)


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--tracking", metavar="URI", help="MLflow tracking URI of a database.  [default: WORK/mlflow.db]")
@_WORK
def ui(work: Path, port: int, tracking: str | None) -> None:
    """Start the MLflow UI on this machine and print where to look."""
    from agl_bench.bench.mlflow_ui import serve

    _existing(work)

    def ready(links: dict[str, str]) -> None:
        for what, address in links.items():
            click.echo(f"{what}\n    {address}")
        click.echo("Ctrl-C stops the server.")

    click.echo("starting the MLflow server …")
    serve(work, tracking, port=port, ready=ready)


@cli.command(params=[p for p in run.params if p.name not in ("dry_run", "json_file", "workers")])
@click.option(
    "--from",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="WORK",
    help="Judge by the finished cells of this work folder too; repeatable.",
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Cells at a time.")
@click.option("--json", "json_", is_flag=True, help="For programs.")
def plan(
    files: tuple[Path, ...],
    root: Path,
    work: Path,
    config: Path | None,
    preset: str | None,
    assignments: tuple[str, ...],
    device: str,
    precision: str | None,
    again: bool,
    retry_failed: bool,
    controls: bool,
    tuned: Path | None,
    transfer: bool,
    others: tuple[Path, ...],
    workers: int,
    json_: bool,
    **words: Any,
) -> None:
    """Say what a run would cost, from what past cells have cost. Trains nothing.

    Takes the words of `run`, so that `plan` can be put in its place; those that change no cost are ignored. Past cells
    of the same line count, else cells of the same selector, backbone and evaluation, scaled; what is unknown is said.
    """
    from agl_bench.bench.spec import Campaign

    plugins = _discover(files)
    if precision is not None:
        assignments = (*assignments, f"protocol.precision={precision}")
    lists = {name: words[name] for name in ("selectors", "datasets", "backbone", "evaluation", "seeds", "fold")}
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)
    for other in others:
        _check_work_folder(other)

    from agl_bench.bench.plan import as_json, estimate, machine_of, past_cells, training_spots
    from agl_bench.bench.run import Bench, choose_device, provenance

    torch_device = choose_device(device)
    console = make_console()
    cells = _standing(
        campaign, plugins, root, work, torch_device.type, controls=controls, tuned=tuned, transfer=transfer
    )
    bench = Bench(plugins, root, torch_device)
    past = past_cells([*([work] if (work / "cells").is_dir() else []), *others])
    with console.status("looking at past cells"):
        found = estimate(
            cells, past, lambda specs: training_spots(specs, bench), machine=machine_of(provenance(torch_device)),
            workers=workers, again=again, retry_failed=retry_failed,
        )  # fmt: skip
    if json_:
        click.echo(json.dumps(as_json(found), indent=1))
    else:
        show_plan(found, campaign.preset, console)


@cli.command()
@click.argument("stores", nargs=-1, required=True, metavar="A B …", type=click.Path(path_type=Path))
@click.option(
    "--prefer",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="A",
    help="Where stores differ, take what A has; repeatable, the first that has it decides.",
)
@_WORK
def merge(stores: tuple[Path, ...], prefer: tuple[Path, ...], work: Path) -> None:
    """Join the work folders A, B … of several machines into --work, which may be one of them.

    Finished cells, failures, folds, checkpoints of unfinished cells (the furthest) and tuned settings are copied, each
    whole or not at all; A, B … stay as they are. Stores that differ in a cell are refused before anything is copied.
    The same command continues a merge that was stopped.
    """
    from agl_bench.bench.merge import Outcome, merge, plan_merge
    from agl_bench.errors import BadWorkFolder

    console = make_console()
    with console.status("comparing the stores"):
        plan = plan_merge(stores, work, prefer)
    if plan.conflicts:
        for conflict in plan.conflicts:
            click.echo(f"agl-bench: conflict: {conflict}", err=True)
        count = len(plan.conflicts)
        raise BadWorkFolder(
            f"the stores contradict each other in the {count} point{'s' if count > 1 else ''} above, and nothing was "
            f"copied; --prefer {stores[0]} takes what that one has"
        )
    outcome = Outcome({}, [])
    with console.status("copying") as said:
        for done in merge(plan, outcome):
            said.update(f"copying {done} of {plan.steps}")
    show_merge(plan, outcome, console)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.  [default: WORK/report]")
@click.option("--baseline", default="pgl", show_default=True, help="Selector that the others are compared with.")
@click.option("--partial", is_flag=True, help="Cells that are still to come or failed are no error.")
@_PLUGIN
@_DATA
@_WORK
def report(files: tuple[Path, ...], root: Path, work: Path, out: Path | None, baseline: str, partial: bool) -> None:
    """Write what the finished cells say: OUT/report.html, which opens from disk, OUT/tables and OUT/figures.

    The exit status is 0 if every cell of the grid is there, 1 if some are missing or failed (the report says which, and
    --partial makes it 0), 2 if there is nothing to report.
    """
    from agl_bench.comparison.gather import gather

    store = _existing(work)
    plugins = _discover(files)
    out = out or work / "report"
    console = make_console()
    with console.status("reading the cells"):
        gathered = gather(store)
    with console.status("comparing, drawing and writing"):
        from agl_bench.comparison.report import write_report

        made = write_report(gathered, work, out, plugins, baseline=baseline, root=root)
    for sentence in [*made.answers, f"Report: {out / 'report.html'}"]:
        console.print(sentence, markup=False, highlight=False)
    if not made.quality.is_whole:
        _warn(made.quality.sentence)
        if not partial:
            sys.exit(1)


@cli.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--json", "json_", is_flag=True, help="For programs.")
@_WORK
def compare(a: str, b: str, work: Path, json_: bool) -> None:
    """Compare two selectors of the work folder, or two work folders: A − B on the folds and seeds that both have.

    Selectors are named as in tables. A and B are work folders where both are folders with cells.
    """
    from agl_bench.comparison.duel import as_json, two_folders, two_selectors
    from agl_bench.comparison.gather import gather
    from agl_bench.terminal import show_comparison

    if all((Path(name) / "cells").is_dir() for name in (a, b)):
        pairs = two_folders(gather(_existing(Path(a))).cells, gather(_existing(Path(b))).cells, (a, b))
    else:
        pairs = two_selectors(gather(_existing(work)).cells, a, b)
    if json_:
        click.echo(json.dumps(as_json(pairs), indent=1))
        return
    show_comparison(pairs, a, b, make_console())


@cli.command()
@click.argument("what")
@click.option("--on", metavar="DATASET", help="Instead of the paper's data: the same grid under the conditions of run.")
@click.option("--preset", help="Conditions.  [default: those of the paper; elsewhere those of run]")
@click.option("--backbone", help="Image encoder.  [default: that of the paper; elsewhere that of run]")
@click.option("--evaluation", multiple=True, metavar="A,B", help="Only intra or inter.")
@click.option("--seeds", multiple=True, metavar="0,1", help="Roots of all randomness.  [default: see --dry-run]")
@click.option("--fold", multiple=True, metavar="A,B", help="Only these folds.")
@_SET
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--retry-failed", is_flag=True, help="Run failed and diverged cells anew.")
@click.option("--dry-run", is_flag=True, help="Print the grid and stop.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as CSV, and figures.")
@click.option("--tracking", metavar="URI", help="MLflow as for run: a tracking URI, or none.")
@_PLUGIN
@_DATA
@_WORK
def reproduce(
    what: str,
    on: str | None,
    preset: str | None,
    backbone: str | None,
    evaluation: tuple[str, ...],
    seeds: tuple[str, ...],
    fold: tuple[str, ...],
    assignments: tuple[str, ...],
    device: str,
    retry_failed: bool,
    dry_run: bool,
    out: Path | None,
    tracking: str | None,
    files: tuple[Path, ...],
    root: Path,
    work: Path,
) -> None:
    """Run the grid of a paper's table or figure and print its numbers, ours and the difference.

    WHAT is table1, table2, fig1b, fig3, fig4 or fig5 of Shiku et al. (AAAI 2026). The cells are those of `run`: kept,
    shared with it, continued where they were stopped. The exit status is that of `run`, too.
    """
    from agl_bench.comparison.reproduce import load_target, make_grid

    plugins = _discover(files)
    target = load_target(what, on=on, evaluations=_words(evaluation))

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.run import Bench, choose_device, preflight, run_cells
    from agl_bench.comparison.gather import gather
    from agl_bench.terminal import show_planned, show_target

    torch_device = choose_device(device)
    prepared = Preparation(root, _cache(work))
    grid = make_grid(
        target, plugins, root, device=torch_device.type, digests=prepared.digests, preset=preset, backbone=backbone,
        seeds=seeds, folds=_words(fold), assignments=assignments,
    )  # fmt: skip
    console = make_console()
    show_target(grid, plugins, console)
    if dry_run:
        show_planned(grid, CellStore(work) if (work / "cells").is_dir() else None, console)
        return
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    store = CellStore(work, warn=_warn)
    prepared.digests.keep()
    bench = Bench(plugins, root, torch_device, prepared)
    with console.status("reading and checking the data"):
        preflight(grid.cells, bench, store, retry_failed=retry_failed)
    recorder = _recorder(work, tracking, console)
    with _Signals() as signals:
        events = run_cells(grid.cells, bench, store, recorder, retry_failed=retry_failed, stop=signals.asked)
        _, failures, _ = follow(events, len(grid.cells), console)
    if signals.asked():
        raise KeyboardInterrupt
    _show_reproduced(grid, gather(store), root, out, console)
    _annotate(store, recorder, plugins)
    show_end(work, tracking, recorder, failures, console)
    if failures:
        sys.exit(1)


@cli.command()
@click.argument("cell")
@click.option(
    "--keep",
    type=click.Choice(["predictions", "model"]),
    help="If the result is the same, add this to the kept cell; model adds both.",
)
@click.option("--replace", "replaces", is_flag=True, help="Put the new result in place of the kept one.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: the cell's own]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every difference.")
@_PLUGIN
@_DATA
@_WORK
def rerun(
    cell: str,
    keep: Any,
    replaces: bool,
    device: str | None,
    json_file: Path | None,
    files: tuple[Path, ...],
    root: Path,
    work: Path,
) -> None:
    """Make a finished cell once more and report the difference. CELL is its key, or the beginning of it.

    The kept result stays unless --replace says otherwise. The exit status is 0 if both results are the same bit for
    bit, 1 if they differ, 2 if the input is wrong.
    """
    from dataclasses import asdict

    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.rerun import (
        check_can_be_written,
        compare,
        keep_more,
        prepare_repetition,
        repeat,
        replace_result,
    )
    from agl_bench.bench.result import Result

    store, console, plugins = _existing(work), make_console(), _discover(files)
    _check_writable("--json", json_file)
    prepared = Preparation(root, _cache(work))
    repetition = prepare_repetition(store, cell, plugins, prepared, device=device)
    check_can_be_written(repetition, keeps=keep is not None, replaces=replaces)
    with console.status(f"making {repetition.spec.title} again"):
        needed: Any = keep or ("predictions" if replaces else "nothing")
        *_, result = repeat(repetition, plugins, prepared, keep=needed)
    assert isinstance(result, Result)
    found = compare(repetition.before, result)
    show_repetition(repetition.key, repetition.spec.title, found, console)
    if json_file is not None:
        content = asdict(found) | {"cell": repetition.key, "identical": found.is_identical}
        json_file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if replaces:
        replace_result(store, repetition, result)
        console.print("It is in place of the kept one now.")
    elif keep is not None and found.is_identical:
        keep_more(store, repetition, result)
        what = "predictions" if keep == "predictions" else "predictions and its model"
        console.print(f"The kept cell has its {what} now.")
    elif keep is not None:
        console.print("Nothing was added to the kept cell; --replace puts the new one in its place.")
    if not found.is_identical:
        sys.exit(1)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dataset", required=True, help="As in the run, e.g. synthetic.")
@click.option("--section", required=True, help="Name of the section.")
@click.option("--evaluation", type=click.Choice(["intra", "inter"]), default="intra", show_default=True)
@click.option("--backbone", help="Needed where several were run; so are --preset and --tuning.")
@click.option("--preset", help="As the table shows it.")
@click.option("--tuning", help="As the table shows it.  [default: fixed settings]")
@click.option("--seed", "seeds", type=int, multiple=True, help="Only this seed; repeatable.  [default: all]")
@_PLUGIN
@_DATA
@_WORK
def export(
    file: Path,
    section: str,
    seeds: tuple[int, ...],
    files: tuple[Path, ...],
    root: Path,
    work: Path,
    **place: str | None,
) -> None:
    """Write a section with weights and predictions of every selector as an .h5ad FILE for scanpy.

    Adds var["agl_weight_NAME"], var["agl_selected_NAME"] and layers["agl_predicted_NAME"] for each selector, means over
    the folds that test the section and over seeds, and uns["agl_bench"].
    """
    if file.suffix != ".h5ad":
        raise BadSpec(f"{file} is no .h5ad; name the file so, since scanpy and anndata go by the ending")
    _check_writable("FILE", file)
    from agl_bench.bench.prepare import Preparation
    from agl_bench.comparison.export import export_section, write_h5ad
    from agl_bench.comparison.gather import gather

    store, console, plugins = _existing(work), make_console(), _discover(files)
    asked = {name: value for name, value in place.items() if value is not None}
    with console.status(f"reading the cells of {section}"):
        data = export_section(
            gather(store), plugins, Preparation(root, _cache(work)), place=asked, section=section, seeds=seeds,
            warn=_warn,
        )  # fmt: skip
        write_h5ad(data, file)
    show_export(file, data, console)


@cli.command()
@_PLUGIN
@_DATA
@_WORK
def doctor(files: tuple[Path, ...], root: Path, work: Path) -> None:
    """Say what this machine has and what is missing."""
    from agl_bench.bench.doctor import diagnose

    console = make_console()
    findings = diagnose(_discover(files, warn=False), root, work)
    for finding in findings:
        mark = {"ok": "[green]ok[/]  ", "note": "[yellow]note[/]", "problem": "[red]FAIL[/]"}[finding.level]
        console.print(f"{mark} [bold]{finding.subject}[/]: ", end="")
        console.print(finding.text, markup=False, highlight=False)
    if any(f.level == "problem" for f in findings):
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: one sentence and status 2 for bad input, never a traceback for it."""
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        sys.exit(cli.main(arguments, prog_name="agl-bench", standalone_mode=False))
    except AglBenchError as error:
        _stop(" ".join(str(error).split()), 2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:  # e.g. `agl-bench list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        _stop(f"{error.filename}: {error.strerror}", 2)
    except (click.Abort, KeyboardInterrupt):
        _stop("interrupted; what is done is kept, the same command continues", INTERRUPTED)


def _stop(sentence: str, status: int) -> None:
    click.echo(f"agl-bench: {sentence}", err=True)
    sys.exit(status)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


class _Signals:
    """While cells run, the first SIGTERM or SIGINT asks for the end after this epoch, the second one ends at once."""

    def __init__(self) -> None:
        self._why = ""
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> str:
        """Which signal has come; "" if none has."""
        return self._why

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._why:
            raise KeyboardInterrupt
        self._why = signal.Signals(number).name
        os.write(2, b"agl-bench: stopping at the end of this epoch; once more ends at once\n")  # as a handler may


def _warn(sentence: str) -> None:
    click.echo(f"agl-bench: {sentence}", err=True)


def _seconds(text: str, option: str = "--time-limit") -> float:
    """A duration such as 90s, 30m, 2h or 1h30m."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    seconds = sum(int(n or 0) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True)) if parts else 0
    if not seconds:
        raise BadSpec(f"{option} {text} is no duration; write e.g. 90s, 30m, 2h or 1h30m")
    return float(seconds)


def _discover(files: Sequence[Path], *, warn: bool = True) -> Plugins:
    from agl_bench.registry.plugins import Plugins

    plugins = Plugins.discover(files)
    if warn:
        for broken in plugins.broken:
            click.echo(f"agl-bench: plug-in {broken.provider} is disabled: {broken.reason}", err=True)
    return plugins


def _cache(work: Path) -> Path:
    """Folder of prepared sections."""
    return Path(os.environ.get("AGL_BENCH_CACHE") or work / "cache")


def _existing(work: Path) -> CellStore:
    from agl_bench.bench.cells import CellStore

    _check_work_folder(work)
    return CellStore(work, warn=_warn)


def _check_work_folder(work: Path) -> None:
    if not (work / "cells").is_dir():
        raise BadSpec(f"{work} is not a work folder of agl-bench: nothing has been run there; use --work")


def _check_writable(option: str, file: Path | None) -> None:
    """Before the work and not after it."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise BadSpec(f"{option} {file} cannot be written; name a file in a folder that exists and can be written")


def _recorder(
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

    recorder = _recorder(store.work, tracking, console, (store, plugins))
    assert isinstance(recorder, MlflowRecorder)
    count = 0
    for result in store if key is None else filter(None, [store.read(key)]):
        if "model" in store.kept(result.spec.key):
            address = recorder.record_model(result.spec)
            count += address is not None
            if name is not None and address is not None:
                version = recorder.register_model(result.spec, name)
                console.print(f"{result.spec.title}: models:/{name}/{version}", markup=False, highlight=False)
    _raise_if_dead(recorder)
    models = "1 model of a cell is" if count == 1 else f"{count} models of cells are"
    console.print(f"{models} in MLflow" + ("." if count else "; keep them by run --keep model."))


def _raise_if_dead(recorder: Recorder) -> None:
    if recorder.dead:
        raise AglBenchError(f"the sync was cut short: {recorder.dead}")


def _annotate(store: CellStore, recorder: Recorder, plugins: Plugins) -> None:
    """Show in MLflow how the lines of the work folder stand."""
    from agl_bench.bench.recorder import NoRecorder

    if recorder.dead or isinstance(recorder, NoRecorder):
        return
    from agl_bench.comparison.gather import gather
    from agl_bench.comparison.standings import standings

    recorder.annotate(standings(gather(store), plugins))


def _with_tuned(cells: list[Any], campaign: Campaign, plugins: Plugins, folder: Path | None, *, transfer: bool) -> Any:
    """The cells, each followed by itself with tuned settings. Controls have nothing to be tuned for."""
    if folder is None:
        return cells
    from agl_bench.bench.controls import control_selectors
    from agl_bench.bench.tuned import tuned_cells

    bounds = control_selectors(plugins, campaign.selectors)
    methods = [(spec, plan) for spec, plan in cells if spec.selector.name not in bounds]
    tuned = iter(tuned_cells(methods, plugins, folder, transfer=transfer))
    return [
        cell for c in cells for cell in ((c,) if c[0].selector.name in bounds else (c, next(tuned)))
    ]  # neighbours share their data


def _show_grid(
    campaign: Campaign,
    plugins: Plugins,
    root: Path,
    work: Path,
    device: str,
    *,
    controls: bool,
    tuned: Path | None,
    transfer: bool,
) -> None:
    """The cells that a run would go through, one line each, and whether they are finished."""
    cells = _standing(campaign, plugins, root, work, device, controls=controls, tuned=tuned, transfer=transfer)
    count = {"done": 0, "failed": 0, "diverged": 0, "todo": 0}
    for spec, status in cells:
        count[status] += 1
        click.echo(f"{spec.key}  {status}  {spec.title}")
    failed = count["failed"] + count["diverged"]
    click.echo(
        f"{len(cells)} cells, {count['done']} finished, {count['todo']} to run"
        + (f", {failed} failed (--retry-failed)" if failed else "")
        + f"; preset {campaign.preset}"
    )


def _standing(
    campaign: Campaign,
    plugins: Plugins,
    root: Path,
    work: Path,
    device: str,
    *,
    controls: bool,
    tuned: Path | None,
    transfer: bool,
) -> list[tuple[RunSpec, str]]:
    """The cells that a run would go through, and how each stands; nothing is written."""
    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.controls import control_cells
    from agl_bench.bench.plan import standing
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.run import fingerprints

    store = CellStore(work) if (work / "cells").is_dir() else None
    known = fingerprints(campaign, plugins, root, Preparation(root, _cache(work)).digests)
    cells = campaign.cells(plugins, root, device=device, fingerprint=known)
    cells = _with_tuned(cells, campaign, plugins, tuned, transfer=transfer)
    if controls:
        cells = _joined(cells, control_cells(campaign, plugins, root, device=device, fingerprint=known))
    return list(standing((spec for spec, _ in cells), store))


def _joined(cells: list[Any], further: list[Any]) -> list[Any]:
    """Cells and those of `further` that are not among them."""
    known = {spec.key for spec, _ in cells}
    return cells + [(spec, plan) for spec, plan in further if spec.key not in known]


def _words(options: Sequence[str]) -> list[str]:
    """Comma-separated words of a repeatable option."""
    return [word.strip() for option in options for word in option.split(",") if word.strip()]


def _show_reproduced(grid: Grid, gathered: Gathered, root: Path, out: Path | None, console: Console) -> None:
    """What a paper prints, what came out, and the same as files."""
    from agl_bench.comparison.reproduce import compare, draw, ends, only_one_takes, taken_genes, trajectories
    from agl_bench.terminal import show_ends, show_genes, show_lines

    name = grid.target.name
    tables = {name: compare(grid, gathered)}
    show_lines(grid, tables[name], console)
    if grid.target.shows == "trajectories":
        tables[f"{name}-trajectories"] = trajectories(grid, gathered)
        show_ends(ends(tables[f"{name}-trajectories"]), console)
    if grid.target.shows == "genes":
        tables[f"{name}-genes"] = taken_genes(grid, gathered)
        tables[f"{name}-one-takes"] = only_one_takes(tables[f"{name}-genes"])
        show_genes(grid, tables[f"{name}-genes"], tables[f"{name}-one-takes"], console)
    for sentence in grid.target.says:
        console.print(sentence, markup=False, highlight=False)
    if out is not None:
        for stem, table in tables.items():
            table.to_csv(out / f"{stem}.csv", index=False)
            click.echo(f"wrote {out / stem}.csv")
        for drawn in draw(grid, gathered, out / "figures", root):
            click.echo(f"wrote {drawn.png}" if drawn.png else f"no figure of {drawn.title}: {drawn.why}")


def _say_left_out(campaign: Campaign, cells: list[Any]) -> None:
    """One line for each dataset that an evaluation cannot be made on."""
    if campaign.folds:
        return
    made = {(spec.dataset.label, spec.evaluation) for spec, _ in cells}
    for dataset in campaign.datasets:
        for evaluation in campaign.evaluations:
            if (dataset, evaluation) not in made:
                why = "has no such fold in protocol.fold_file" if campaign.protocol.fold_file else "has one section"
                click.echo(f"agl-bench: {dataset} {why}: no {evaluation}-batch evaluation of it", err=True)
