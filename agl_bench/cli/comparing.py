"""Commands on what finished cells say: report, compare, export, reproduce."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agl_bench.cli.ending import Signals
from agl_bench.cli.group import cli
from agl_bench.cli.opening import apart_from, cache_of, discover, existing, warn
from agl_bench.cli.options import DATA, PATH, PLUGIN, SET, WORK, words
from agl_bench.cli.tracking import annotate, check_tracking, recorder_of
from agl_bench.cli.writing import check_writable, make_folder, writing
from agl_bench.errors import BadSpec, TrackerUnavailable
from agl_bench.terminal import (
    follow,
    make_console,
    show_end,
    show_export,
    styled,
)

if TYPE_CHECKING:  # torch, mlflow and rich load only in the commands that use them
    from rich.console import Console

    from agl_bench.comparison.gather import Gathered
    from agl_bench.comparison.reproduce import Grid


@cli.command()
@click.option("--out", type=PATH, help="Folder of the report.  [default: WORK/report]")
@click.option("--baseline", default="pgl", show_default=True, help="Selector that the others are compared with.")
@click.option("--partial", is_flag=True, help="Cells that are still to come or failed are no error.")
@click.option(
    "--tracking", metavar="URI", help="Show it in MLflow too; none = do not.  [default: WORK/mlflow.db if it is there]"
)
@PLUGIN
@DATA
@WORK
def report(
    files: tuple[Path, ...],
    root: Path,
    work: Path,
    out: Path | None,
    baseline: str,
    partial: bool,
    tracking: str | None,
) -> None:
    """Write what the finished cells say: OUT/report.html, which opens from disk, OUT/tables and OUT/figures.

    The exit status is 0 if every cell of the grid is there, 1 if some are missing or failed (the report says which, and
    --partial makes it 0), 2 if there is nothing to report.
    """
    from agl_bench.comparison.gather import gather

    store = existing(work)
    check_tracking(work, tracking)
    plugins = discover(files)
    out = out or work / "report"
    console = make_console()
    with console.status("reading the cells"):
        gathered = gather(store)
    with console.status("comparing, drawing and writing"):
        from agl_bench.comparison.report import write_report

        with writing(
            f"the report in {out}", "it is incomplete, but no cell has changed; free some space and repeat the command"
        ):
            made = write_report(gathered, work, out, plugins, baseline=baseline, root=root)
    for sentence in [*made.answers, f"Report: {out / 'report.html'}"]:
        console.print(sentence)
    if tracking != "none" and (tracking or os.environ.get("MLFLOW_TRACKING_URI") or (work / "mlflow.db").exists()):
        from agl_bench.bench.mlflow_recorder import log_report

        try:
            log_report(work, tracking, out)
            console.print("The report is in MLflow too: `agl-bench ui`.")
        except (BadSpec, TrackerUnavailable) as error:  # the report itself is written
            warn(str(error))
    if made.quality.sentence:
        warn(made.quality.sentence)
    if not (made.quality.is_whole or partial):
        sys.exit(1)


@cli.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--json", "json_", is_flag=True, help="For programs.")
@WORK
def compare(a: str, b: str, work: Path, json_: bool) -> None:
    """Compare two selectors of the work folder, or two work folders: A − B on the folds and seeds that both have.

    Selectors are named as in tables. A and B are work folders where both are folders with cells.
    """
    from agl_bench.comparison.duel import as_json, two_folders, two_selectors
    from agl_bench.comparison.gather import gather
    from agl_bench.terminal import show_comparison

    if all((Path(name) / "cells").is_dir() for name in (a, b)):
        pairs = two_folders(gather(existing(Path(a))).cells, gather(existing(Path(b))).cells, (a, b))
    else:
        pairs = two_selectors(gather(existing(work)).cells, a, b)
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
@SET
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--retry-failed", is_flag=True, help="Run failed and diverged cells anew.")
@click.option("--dry-run", is_flag=True, help="Print the grid and stop.")
@click.option("--out", type=PATH, help="Folder for the tables as CSV, and figures.")
@click.option("--tracking", metavar="URI", help="MLflow as for run: a tracking URI, or none.")
@PLUGIN
@DATA
@WORK
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

    apart = None if dry_run else apart_from(files)
    plugins = discover(files)
    target = load_target(what, on=on, evaluations=words("--evaluation", evaluation))

    from agl_bench.bench.cells import CellStore
    from agl_bench.bench.prepare import Preparation
    from agl_bench.bench.run import Bench, choose_device, preflight, run_cells
    from agl_bench.comparison.gather import gather
    from agl_bench.terminal import show_planned, show_skips, show_target

    torch_device = choose_device(device)
    prepared = Preparation(root, cache_of(work))
    grid = make_grid(
        target, plugins, root, device=torch_device.type, digests=prepared.digests, preset=preset, backbone=backbone,
        seeds=seeds, folds=words("--fold", fold), assignments=assignments,
    )  # fmt: skip
    console = make_console()
    show_target(grid, plugins, console)
    if dry_run:
        show_planned(grid, CellStore(work) if (work / "cells").is_dir() else None, console)
        return
    if out is not None:
        make_folder("--out", out)
    store = CellStore(work, warn=warn)
    prepared.digests.keep()
    bench = Bench(plugins, root, torch_device, prepared)
    with console.status("reading and checking the data"):
        preflight(grid.cells, bench, store, retry_failed=retry_failed, apart=apart)
    recorder = recorder_of(work, tracking, console)
    with Signals() as signals:
        events = run_cells(
            grid.cells, bench, store, recorder, retry_failed=retry_failed, stop=signals.asked, apart=apart
        )  # fmt: skip
        _, failures, _, skips = follow(events, len(grid.cells), console)
    if signals.asked():
        raise KeyboardInterrupt
    _show_reproduced(grid, gather(store), root, out, console)
    show_skips(skips)
    annotate(store, recorder, plugins)
    show_end(work, tracking, recorder, failures, console)
    if failures:
        sys.exit(1)


@cli.command()
@click.argument("file", type=PATH)
@click.option("--dataset", required=True, help="As in the run, e.g. synthetic.")
@click.option("--section", required=True, help="Name of the section.")
@click.option("--evaluation", type=click.Choice(["intra", "inter"]), default="intra", show_default=True)
@click.option("--backbone", help="Needed where several were run; so are --preset and --tuning.")
@click.option("--preset", help="As the table shows it.")
@click.option("--tuning", help="As the table shows it.  [default: fixed settings]")
@click.option("--seed", "seeds", type=int, multiple=True, help="Only this seed; repeatable.  [default: all]")
@PLUGIN
@DATA
@WORK
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
        raise BadSpec(f"{file} does not end in .h5ad; name it so, because scanpy and anndata go by the ending")
    check_writable("FILE", file)
    from agl_bench.bench.prepare import Preparation
    from agl_bench.comparison.export import export_section, write_h5ad
    from agl_bench.comparison.gather import gather

    store, console, plugins = existing(work), make_console(), discover(files)
    asked = {name: value for name, value in place.items() if value is not None}
    with console.status(styled(f"reading the cells of {section}")):
        data = export_section(
            gather(store), plugins, Preparation(root, cache_of(work)), place=asked, section=section, seeds=seeds,
            warn=warn,
        )  # fmt: skip
        with writing(file, "no cell has changed, and an older file of that name is unchanged"):
            write_h5ad(data, file)
    show_export(file, data, console)


def _show_reproduced(grid: Grid, gathered: Gathered, root: Path, out: Path | None, console: Console) -> None:
    """What a paper prints, what came out, and the same as files."""
    from agl_bench.comparison.reproduce import compare, draw, ends, only_one_takes, taken_genes, trajectories
    from agl_bench.data.spreadsheet import as_csv
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
        console.print(sentence)
    if out is not None:
        for stem, table in tables.items():
            with writing(out / f"{stem}.csv", "finished cells are kept"):
                (out / f"{stem}.csv").write_text(as_csv(table), encoding="utf-8")
            click.echo(f"wrote {out / stem}.csv")
        for drawn in draw(grid, gathered, out / "figures", root):
            click.echo(f"wrote {drawn.png}" if drawn.png else f"no figure of {drawn.title}: {drawn.why}")
