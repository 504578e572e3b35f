"""Commands on cells: run, plan, status, merge, rerun."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agl_bench.bench.executors import Options
from agl_bench.cli.ending import INTERRUPTED, Signals, stop_with
from agl_bench.cli.group import cli
from agl_bench.cli.opening import (
    apart_from,
    cache_of,
    check_work_folder,
    discover,
    existing,
    say_left_out,
    say_other_versions,
    warn,
)
from agl_bench.cli.options import DATA, MOST, PATH, PLUGIN, SET, WORK, Finite, executor_options, seconds
from agl_bench.cli.tracking import annotate, recorder_of
from agl_bench.cli.writing import check_writable, write_text
from agl_bench.errors import BadSpec
from agl_bench.terminal import (
    follow,
    make_console,
    show_end,
    show_merge,
    show_plan,
    show_repetition,
    show_skips,
    show_table,
    styled,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from agl_bench.bench.fitness import Skipped
    from agl_bench.bench.run import Event
    from agl_bench.bench.spec import Campaign, RunSpec
    from agl_bench.registry.plugins import Plugins


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
@click.option("--config", type=PATH, help="TOML file with the same keys; options here win.")
@SET
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16"]),
    help="Of training passes, short for --set protocol.precision; look-aheads stay fp32.  [default: the preset's]",
)
@click.option(
    "--again",
    is_flag=False,
    flag_value="cells",
    type=click.Choice(["cells", "data"]),
    help="Run finished and failed cells again from the beginning; --again=data also prepares their data again.",
)
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
    type=Finite(0),
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
    type=PATH,
    metavar="DIR",
    help="Also run every selector with the settings that `tune` wrote there; tables keep tuned and fixed apart.",
)
@click.option("--transfer", is_flag=True, help="With --tuned: also settings found on other data or protocols.")
@executor_options
@click.option("--dry-run", is_flag=True, help="Print the grid and stop.")
@click.option("--json", "json_file", type=PATH, help="Write the table with per-fold values.")
@click.option(
    "--tracking",
    metavar="URI",
    help="MLflow: a tracking URI, or none.  [default: MLFLOW_TRACKING_URI or WORK/mlflow.db]",
)
@PLUGIN
@DATA
@WORK
def run(
    files: tuple[Path, ...],
    root: Path,
    work: Path,
    config: Path | None,
    preset: str | None,
    assignments: tuple[str, ...],
    device: str,
    precision: str | None,
    again: str | None,
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
    may run at once on one work folder. What cannot run here, e.g. for want of a GPU, is skipped, and the table says
    why. The exit status is 0 if all else is finished, 1 if some failed, 2 if the input is wrong, 75 if some were
    interrupted.
    """
    from agl_bench.bench.spec import Campaign, make_dataset

    limit = None if time_limit is None else seconds(time_limit)
    executor.check(device)
    apart = None if dry_run else apart_from(files)
    plugins = discover(files)
    if precision is not None:
        assignments = (*assignments, f"protocol.precision={precision}")
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)
    check_writable("--json", json_file)

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.controls import control_cells, control_selectors, controls_of, notes_on
    from agl_bench.bench.fitness import as_json as skips_as_json
    from agl_bench.bench.fitness import summed
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
    store = CellStore(work, warn=warn)
    prepared = Preparation(root, cache_of(work))
    if again == "data":
        for name in campaign.datasets:
            part = campaign.part(plugins, name, "dataset")
            prepared.discard(part, make_dataset(plugins, part))
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
    say_left_out(campaign, cells)
    say_other_versions(work, [spec for spec, _ in cells])
    with console.status("reading and checking the data"):
        preflight(cells, bench, store, again=bool(again), retry_failed=retry_failed, apart=apart)
    recorder = recorder_of(work, tracking, console, (store, plugins) if keep == "model" else None)
    with Signals() as signals:
        events: Iterator[Event]
        if engine is None:
            events = run_cells(
                cells, bench, store, recorder, again=bool(again), retry_failed=retry_failed,
                checkpoint_every=checkpoint_every, time_limit=limit, stop=signals.asked, keep=keep, apart=apart,
            )  # fmt: skip
        else:
            del bench  # workers have their own
            job = Job(
                work, root, cache_of(work), files, on, checkpoint_every, limit, keep, apart=apart is not None
            )  # fmt: skip
            events = run_on(
                engine, cells, job, store, recorder, again=bool(again), retry_failed=retry_failed, stop=signals.asked
            )
        results, failures, stopped, skips = follow(events, len(cells), console)
    if signals.asked():
        raise KeyboardInterrupt
    place = {spec.key: number for number, (spec, _) in enumerate(cells)}
    results.sort(key=lambda r: place[r.spec.key])  # others may have finished some of them
    own = [r for r in results if r.spec.key in asked]
    bounds = control_selectors(plugins, campaign.selectors)
    fixed = [r for r in own if r.spec.tuning is None]
    found = controls_of(fixed, [r for r in results if r.spec.key in below])
    notes = notes_on(fixed, found, bounds)
    skips.sort(key=lambda s: place[s.spec.key])
    marked = [s for s in skips if s.spec.key in asked]
    if own or skips:
        said = [*notes, *summed(s for s in skips if s.spec.key not in asked)]
        show_table(own, campaign, console, found, bounds, said, marked)
    if json_file is not None:
        from agl_bench.bench.controls import controls_as_json
        from agl_bench.bench.table import as_json

        content = as_json(own) | controls_as_json(found, notes, bounds) | {"skipped": skips_as_json(skips)}
        write_text(json_file, json.dumps(content, indent=1), f"finished cells are kept in {work}")
    annotate(store, recorder, plugins)
    store.tell_unsigned()
    show_end(work, tracking, recorder, failures, console)
    lacking = [] if keep == "nothing" else [r.spec.key for r in results if keep not in store.kept(r.spec.key)]
    if lacking:
        warn(
            f"{len(lacking)} of {len(results)} finished cells were made before and have kept no {keep}; "
            f"`agl-bench rerun {lacking[0]} --keep {keep} --work {work}` adds it to one"
        )
    if stopped:
        sentence = f"{len(stopped)} of {len(cells)} cells reached the time limit of {time_limit}"
        stop_with(f"{sentence}; the same command continues them", INTERRUPTED)
    if failures:
        sys.exit(1)


@cli.command()
@click.option("--json", "json_", is_flag=True, help="For programs.")
@WORK
def status(work: Path, json_: bool) -> None:
    """Show how far the cells of a work folder are, also while they run."""
    from agl_bench.bench.status import STATUSES, as_json, status_of
    from agl_bench.bench.versions import told

    check_work_folder(work)
    found = status_of(work)
    if found.damaged:
        cells = "1 finished cell is" if len(found.damaged) == 1 else f"{len(found.damaged)} finished cells are"
        warn(f"{cells} damaged and left out ({found.damaged[0]}, …); the next run computes damaged cells again")
    for folder in found.unknown:
        warn(f"{work / folder / 'spec.json'} is damaged or of another version, so its cell is not counted")
    if found.others:
        warn(told(found.others))
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
        console.print(line)
    show_skips(found.skipped)


@cli.command(params=[p for p in run.params if p.name not in ("dry_run", "json_file", "workers")])
@click.option(
    "--from",
    "others",
    multiple=True,
    type=PATH,
    metavar="WORK",
    help="Judge by the finished cells of this work folder too; repeatable.",
)
@click.option("--workers", type=click.IntRange(1, MOST), default=1, show_default=True, help="Cells at a time.")
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
    again: str | None,
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

    _check_ignored(words, workers, device)
    plugins = discover(files)
    if precision is not None:
        assignments = (*assignments, f"protocol.precision={precision}")
    lists = {name: words[name] for name in ("selectors", "datasets", "backbone", "evaluation", "seeds", "fold")}
    campaign = Campaign.of(plugins, file=config, preset=preset, assignments=assignments, **lists)
    for other in others:
        check_work_folder(other)

    from agl_bench.bench.plan import as_json, estimate, machine_of, past_cells, training_spots
    from agl_bench.bench.provenance import provenance
    from agl_bench.bench.run import Bench, choose_device

    torch_device = choose_device(device)
    console = make_console()
    cells, skips = _standing(
        campaign, plugins, root, work, torch_device.type, controls=controls, tuned=tuned, transfer=transfer
    )
    bench = Bench(plugins, root, torch_device)
    past = past_cells([*([work] if (work / "cells").is_dir() else []), *others])
    with console.status("looking at past cells"):
        found = estimate(
            cells, past, lambda specs: training_spots(specs, bench), machine=machine_of(provenance(torch_device)),
            workers=workers, again=bool(again), retry_failed=retry_failed,
        )  # fmt: skip
    if json_:
        click.echo(json.dumps(as_json(found, skips), indent=1))
    else:
        show_plan(found, campaign.preset, console, skips)


@cli.command()
@click.argument("stores", nargs=-1, required=True, metavar="A B …", type=PATH)
@click.option(
    "--prefer",
    multiple=True,
    type=PATH,
    metavar="A",
    help="Where stores differ, take what A has; repeatable, the first that has it decides.",
)
@WORK
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
@click.argument("cell")
@click.option(
    "--keep",
    type=click.Choice(["predictions", "model"]),
    help="If the result is the same, add this to the kept cell; model adds both.",
)
@click.option("--replace", "replaces", is_flag=True, help="Put the new result in place of the kept one.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: the cell's own]")
@click.option("--json", "json_file", type=PATH, help="Write every difference.")
@PLUGIN
@DATA
@WORK
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

    store, console, plugins = existing(work), make_console(), discover(files)
    check_writable("--json", json_file)
    prepared = Preparation(root, cache_of(work))
    repetition = prepare_repetition(store, cell, plugins, prepared, device=device)
    check_can_be_written(repetition, keeps=keep is not None, replaces=replaces)
    with console.status(styled(f"making {repetition.spec.title} again")):
        needed: Any = keep or ("predictions" if replaces else "nothing")
        *_, result = repeat(repetition, plugins, prepared, keep=needed)
    assert isinstance(result, Result)
    found = compare(repetition.before, result)
    show_repetition(repetition.key, repetition.spec.title, found, console)
    if json_file is not None:
        content = asdict(found) | {"cell": repetition.key, "identical": found.is_identical}
        write_text(json_file, json.dumps(content, indent=1), f"finished cells are kept in {work}")
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


def _check_ignored(words: dict[str, Any], workers: int, device: str) -> None:
    """Words of `run` that change no cost may not be wrong either."""
    given = {n: words[n] for n in ("executor", "ray_address", "gpus_per_cell", "slurm_partition")}
    times = ((n, words[n]) for n in ("time_limit", "slurm_time") if words[n] is not None)
    limits = {name: seconds(text, f"--{name.replace('_', '-')}") for name, text in times}
    own = None if words["executor"] == "serial" else workers
    Options(**given, workers=own, slurm_time=limits.get("slurm_time")).check(device)


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
    cells, skips = _standing(campaign, plugins, root, work, device, controls=controls, tuned=tuned, transfer=transfer)
    reasons = {s.spec.key: s.reason for s in skips}
    count = {"done": 0, "failed": 0, "diverged": 0, "skipped": 0, "todo": 0}
    for spec, status in cells:
        count[status] += 1
        reason = f": {reasons[spec.key]}" if status == "skipped" else ""
        click.echo(f"{spec.key}  {status}  {spec.title}{reason}")
    failed = count["failed"] + count["diverged"]
    click.echo(
        f"{len(cells)} cells, {count['done']} finished, {count['todo']} to run"
        + (f", {failed} failed (--retry-failed)" if failed else "")
        + (f", {count['skipped']} skipped" if count["skipped"] else "")
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
) -> tuple[list[tuple[RunSpec, str]], list[Skipped]]:
    """The cells that a run would go through, and how each stands; and those that it would skip. Nothing is written."""
    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.controls import control_cells
    from agl_bench.bench.fitness import Skipped, known_unfit
    from agl_bench.bench.plan import standing
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.run import fingerprints

    store = CellStore(work) if (work / "cells").is_dir() else None
    known = fingerprints(campaign, plugins, root, Preparation(root, cache_of(work)).digests)
    cells = campaign.cells(plugins, root, device=device, fingerprint=known)
    cells = _with_tuned(cells, campaign, plugins, tuned, transfer=transfer)
    if controls:
        cells = _joined(cells, control_cells(campaign, plugins, root, device=device, fingerprint=known))
    if store is not None:
        say_other_versions(work, [spec for spec, _ in cells])
    unfit = known_unfit([spec for spec, _ in cells], plugins, work)
    standings = list(standing((spec for spec, _ in cells), store, unfit))
    return standings, [Skipped(spec, unfit[spec.key]) for spec, status in standings if status == "skipped"]


def _joined(cells: list[Any], further: list[Any]) -> list[Any]:
    """Cells and those of `further` that are not among them."""
    known = {spec.key for spec, _ in cells}
    return cells + [(spec, plan) for spec, plan in further if spec.key not in known]
