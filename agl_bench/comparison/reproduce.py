"""The tables and figures of a paper as grids of cells: what it prints, what comes out here, and the difference.

What a paper prints and which cells it takes are data: one TOML file for each table or figure, `benchmarks/reproduce/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from agl_bench.bench.run import fingerprints
from agl_bench.bench.spec import Campaign, RunSpec
from agl_bench.bench.table import BASELINE
from agl_bench.comparison.figures import Drawn, draw_all
from agl_bench.comparison.gather import PLACE, UNIT, Gathered
from agl_bench.comparison.statistics import pairs
from agl_bench.data.folds import FoldPlan
from agl_bench.digests import FileDigests
from agl_bench.errors import BadSpec, UnknownName
from agl_bench.protocol import read_toml
from agl_bench.registry.plugins import Plugins
from agl_bench.training.trainer import HALF

Shows = Literal["scores", "trajectories", "genes"]
_KEYS = ("title", "source", "shows", "figures", "preset", "backbone", "seeds", "gpu_hours", "says", "column", "row")
_LINE = ("column", "method", "preset")  # what identifies a line of the tables below


@dataclass(frozen=True)
class Column:
    """What a column of the paper's table is about.

    Attributes:
        name: the paper's.
        dataset, evaluation: of its cells.
        settings: "NAME.KEY=VALUE" that it differs by.
    """

    name: str
    dataset: str
    evaluation: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A method of the paper.

    Attributes:
        name: the paper's.
        selector: what it is called here.
        settings: "NAME.KEY=VALUE" that it differs by.
        preset: conditions; "" = those of `run`.
        pcc: printed PCC by name of the column; nothing where the paper prints none.
        sd: printed standard deviation over folds, likewise.
        selected: printed number of auxiliary genes, likewise.
        genes: auxiliary genes that the paper says this method takes and the others do not.
    """

    name: str
    selector: str
    settings: tuple[str, ...] = ()
    preset: str = ""
    pcc: Mapping[str, float] = field(default_factory=dict, hash=False)
    sd: Mapping[str, float] = field(default_factory=dict, hash=False)
    selected: Mapping[str, float] = field(default_factory=dict, hash=False)
    genes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A table or figure of a paper; each pair of a column and a row is a line of cells.

    Attributes:
        name: e.g. "table1".
        title, source: for people.
        shows: test scores, trajectories over outer iterations, or genes.
        figures: kinds of `figures.draw_all` that show the same.
        backbone: image encoder; "" = that of `run`.
        seeds: roots of randomness.
        gpu_hours: rough estimate for the whole on one GPU; None on data that the paper has not used.
        says: what the paper says beside numbers, one sentence each; nothing on such data.
        columns, rows: of the table.
    """

    name: str
    title: str
    source: str
    shows: Shows
    figures: tuple[str, ...]
    backbone: str
    seeds: tuple[str, ...]
    gpu_hours: float | None
    says: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is on data that the paper has not used, so that its numbers say nothing about it."""
        return self.gpu_hours is None

    def absent(self, plugins: Plugins) -> list[Row]:
        """Methods of the paper that no plug-in provides."""
        known = plugins.names("selector")
        return [row for row in self.rows if row.selector not in known]


@dataclass(frozen=True)
class Grid:
    """The cells of a target.

    Attributes:
        target: whose cells.
        cells: in the order in which they run, cells on the same data together.
        lines: key of a cell -> the column and the row that it belongs to.
        assignments: "NAME.KEY=VALUE" that the user has given.
    """

    target: Target
    cells: list[tuple[RunSpec, FoldPlan]]
    lines: dict[str, tuple[Column, Row]]
    assignments: tuple[str, ...] = ()

    def keys(self, column: Column, row: Row) -> list[str]:
        """Of the cells of one line."""
        return [key for key, line in self.lines.items() if line == (column, row)]


def target_names() -> list[str]:
    """Tables and figures that can be reproduced."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_target(name: str, *, on: str | None = None, evaluations: Sequence[str] = ()) -> Target:
    """A table or figure, as the paper has it or on other data.

    Args:
        name: of `target_names`.
        on: a dataset. Of one that the paper uses, its columns; on any other one, the same grid under the conditions of
            `run` and without the paper's numbers. None = all columns.
        evaluations: keep these; on data that the paper uses, others than its own make it other data.

    Raises:
        UnknownName: with the names that exist.
        BadSpec: if no column is left.
    """
    if name not in target_names():
        raise UnknownName("table or figure", name, target_names())
    table = read_toml(_folder() / f"{name}.toml", allowed=_KEYS)
    columns = tuple(Column(c["name"], c["dataset"], c["evaluation"], tuple(c.get("set", ()))) for c in table["column"])
    kept = [c for c in columns if on in (None, c.dataset) and (not evaluations or c.evaluation in evaluations)]
    if not kept and on is None:
        own = ", ".join(dict.fromkeys(c.evaluation for c in columns))
        raise BadSpec(
            f"{name} has no {'- or '.join(evaluations)}-batch column, only {own}; choose other data with --on"
        )
    target = Target(
        name=name,
        title=table["title"],
        source=table["source"],
        shows=table["shows"],
        figures=tuple(table["figures"]),
        backbone=table["backbone"],
        seeds=tuple(map(str, table["seeds"])),
        gpu_hours=float(table["gpu_hours"]),
        says=tuple(table.get("says", ())),
        columns=tuple(kept),
        rows=tuple(row for entry in table["row"] for row in _rows(entry, columns, table["preset"], on)),
    )
    return target if kept else _elsewhere(target, columns, str(on), evaluations)


def _rows(entry: Mapping[str, Any], columns: Sequence[Column], preset: str, on: str | None) -> list[Row]:
    """The rows that an entry of the file stands for: one for each preset and each value of its sweep."""
    printed = {
        what: dict(zip((c.name for c in columns), entry.get(key, ()), strict=key in entry))
        for what, key in (("pcc", "pcc"), ("sd", "sd"), ("selected", "k"))
    }
    sweep = entry.get("sweep")
    values: Sequence[object] = ()
    if sweep:
        values = sweep.get("elsewhere", {}).get(str(on).partition(":")[0], sweep["values"])
    steps = [(f", k = {v:,}", (f"{sweep['setting']}={v}",)) for v in values] if sweep else [("", ())]
    own = tuple(entry.get("set", ()))
    return [
        Row(entry["name"] + name, entry["selector"], own + step, chosen, genes=tuple(entry.get("genes", ())), **printed)
        for chosen in entry.get("presets", [preset])
        for name, step in steps
    ]


def _elsewhere(target: Target, columns: Sequence[Column], on: str, evaluations: Sequence[str]) -> Target:
    """The grid on other data: its evaluations and settings, and neither the paper's conditions nor its numbers."""
    made = {
        (evaluation, column.settings): Column(
            ", ".join((on, evaluation, *column.settings)), on, evaluation, column.settings
        )
        for column in columns
        for evaluation in (evaluations or [column.evaluation])
    }
    rows = {(r.name, r.settings): Row(r.name, r.selector, r.settings) for r in target.rows}
    return replace(
        target, backbone="", gpu_hours=None, says=(), columns=tuple(made.values()), rows=tuple(rows.values())
    )


def make_grid(
    target: Target,
    plugins: Plugins,
    root: Path,
    *,
    device: str,
    digests: FileDigests | None = None,
    preset: str | None = None,
    backbone: str | None = None,
    seeds: Sequence[str] = (),
    folds: Sequence[str] = (),
    assignments: Sequence[str] = (),
) -> Grid:
    """The cells of a target.

    Args:
        target: whose.
        plugins: who provides which name; methods that nobody provides have no cells.
        root: data folder.
        device: "cpu" or "cuda".
        digests: of files that need not be read again.
        preset, backbone, seeds: in place of the target's.
        folds: labels to keep; empty = all.
        assignments: "NAME.KEY=VALUE", over the preset's.

    Raises:
        MissingData: if a dataset is not there, with what brings it.
        UnknownName, BadSpec: for anything that nobody knows, that is out of range, or that the lines differ by.
    """
    for text in assignments:
        _refuse_what_lines_differ_by(text, target)
    lines: dict[str, tuple[Column, Row]] = {}
    cells: list[tuple[RunSpec, FoldPlan]] = []
    known: dict[str, str] = {}
    absent = target.absent(plugins)
    for dataset, settings in dict.fromkeys((c.dataset, c.settings) for c in target.columns):
        columns = {c.evaluation: c for c in target.columns if (c.dataset, c.settings) == (dataset, settings)}
        block: list[tuple[RunSpec, FoldPlan]] = []
        for row in (r for r in target.rows if r not in absent):
            chosen = [backbone or target.backbone] if backbone or target.backbone else []
            campaign = Campaign.of(
                plugins, preset=preset or row.preset or None, assignments=[*settings, *row.settings, *assignments],
                selectors=[row.selector], datasets=[dataset], backbone=chosen, evaluation=list(columns),
                seeds=list(seeds or target.seeds),
            )  # fmt: skip
            if dataset not in known:
                known |= fingerprints(campaign, plugins, root, digests)
            for spec, plan in campaign.cells(plugins, root, device=device, fingerprint=known):
                if spec.key not in lines and (not folds or plan.label in folds):
                    lines[spec.key] = columns[spec.evaluation], row
                    block.append((spec, plan))
        order = {place: n for n, place in enumerate(dict.fromkeys(map(_data_of, block)))}
        cells += sorted(block, key=lambda cell: order[_data_of(cell)])
    labels = {plan.label for _, plan in cells}
    for label in folds:
        if label not in labels:
            raise UnknownName("fold", label, labels)
    return Grid(target, cells, lines, tuple(assignments))


def _data_of(cell: tuple[RunSpec, FoldPlan]) -> tuple[str, str, int]:
    spec, plan = cell
    return spec.evaluation, plan.label, spec.seed


def _refuse_what_lines_differ_by(text: str, target: Target) -> None:
    name = text.partition("=")[0].strip()
    own = (*(c.settings for c in target.columns), *(r.settings for r in target.rows))
    differing = {setting.partition("=")[0] for settings in own for setting in settings}
    if name in differing:
        raise BadSpec(f"--set {text}: {name} is what the lines of {target.name} differ by; leave it out")


def compare(grid: Grid, gathered: Gathered) -> pd.DataFrame:
    """What the paper prints and what came out, one row for each line; NaN where there is nothing to say.

    Returns:
        column, method, selector, preset, dataset, evaluation; cells (finished) and expected; pcc, pcc_low, pcc_high
        (mean over folds and seeds with its 95 % interval); paper, paper_sd; difference, difference_low,
        difference_high (of ours to the paper's number, which has no interval of its own); gain, gain_low, gain_high
        (paired, to the baseline), paper_gain; selected (mean number of auxiliary genes), paper_selected.
    """
    rows = []
    for column in grid.target.columns:
        here = gathered.cells[gathered.cells["key"].isin([k for k, (c, _) in grid.lines.items() if c == column])]
        gains = pairs(here, baseline=BASELINE) if BASELINE in set(here.get("selector", ())) else pd.DataFrame()
        floor = next((r.pcc.get(column.name, np.nan) for r in grid.target.rows if r.selector == BASELINE), np.nan)
        for row in grid.target.rows:
            keys = grid.keys(column, row)
            own = here[here["key"].isin(keys)]
            paper = row.pcc.get(column.name, np.nan)
            if not keys and np.isnan(paper):
                continue  # a method that is not installed, and the paper says nothing of it
            mean, low, high = _mean_over_units(own)
            rows.append(
                {
                    **_name_of(column, row),
                    "selector": row.selector,
                    "dataset": column.dataset,
                    "evaluation": column.evaluation,
                    "cells": len(own),
                    "expected": len(keys),
                    "pcc": mean,
                    "pcc_low": low,
                    "pcc_high": high,
                    "paper": paper,
                    "paper_sd": row.sd.get(column.name, np.nan),
                    "difference": mean - paper,
                    "difference_low": low - paper,
                    "difference_high": high - paper,
                    **_gain(own, gains),
                    "paper_gain": np.nan if row.selector == BASELINE else paper - floor,
                    "selected": own["selected"].mean() if len(own) else np.nan,
                    "paper_selected": row.selected.get(column.name, np.nan),
                }
            )
    return pd.DataFrame(rows)


def _name_of(column: Column, row: Row) -> dict[str, str]:
    return dict(zip(_LINE, (column.name, row.name, row.preset), strict=True))


def _mean_over_units(cells: pd.DataFrame) -> tuple[float, float, float]:
    """Mean PCC with its 95 % interval: that of the difference to a line that is 0 everywhere."""
    if cells.empty:
        return np.nan, np.nan, np.nan
    both = pd.concat([cells.assign(selector="line"), cells.assign(selector="zero", pcc=0.0)], ignore_index=True)
    found = pairs(both, baseline="zero").iloc[0]
    return float(found["difference"]), float(found["low"]), float(found["high"])


def _gain(own: pd.DataFrame, gains: pd.DataFrame) -> dict[str, float]:
    names = {"gain": "difference", "gain_low": "low", "gain_high": "high"}
    if own.empty or gains.empty:
        return dict.fromkeys(names, np.nan)
    first = own.iloc[0]
    same = (gains[PLACE] == first[PLACE]).all(axis=1) & (gains["a"] == first["selector"])
    found = gains[same]
    return {ours: float(found[theirs].iloc[0]) if len(found) else np.nan for ours, theirs in names.items()}


def trajectories(grid: Grid, gathered: Gathered) -> pd.DataFrame:
    """Every pass of outer steps of every cell, in order.

    Returns:
        column, method, preset, fold, seed, iteration (from 1), epoch, selected (k), auxiliary_genes, validation_pcc,
        outer_loss.
    """
    cells = gathered.cells.set_index("key")
    tables = []
    for key, (column, row) in grid.lines.items():
        if key not in cells.index:
            continue
        cell, outer = cells.loc[key], gathered.result(key).outer
        about = _name_of(column, row) | {name: cell[name] for name in (*UNIT, "auxiliary_genes")}
        table = outer[["epoch", "selected", "validation_pcc", "outer_loss"]]
        tables.append(table.assign(**about, iteration=np.arange(1, len(outer) + 1)))
    names = [*_LINE, *UNIT, "iteration", "epoch", "selected", "auxiliary_genes", "validation_pcc", "outer_loss"]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def ends(table: pd.DataFrame) -> pd.DataFrame:
    """Where the trajectories begin and end, mean over folds and seeds of each line.

    Returns:
        column, method, preset; cells; iterations; first and last (k), last_share (of the auxiliary genes),
        first_pcc, best_pcc, last_pcc (validation).
    """
    rows = []
    for name, line in table.groupby(list(_LINE), sort=False):
        cells = line.groupby(UNIT, sort=False)
        first, last = cells.first(), cells.last()
        rows.append(
            {
                **dict(zip(_LINE, name, strict=True)),
                "cells": len(first),
                "iterations": cells.size().mean(),
                "first": first["selected"].mean(),
                "last": last["selected"].mean(),
                "last_share": (last["selected"] / last["auxiliary_genes"]).mean(),
                "first_pcc": first["validation_pcc"].mean(),
                "best_pcc": cells["validation_pcc"].max().mean(),
                "last_pcc": last["validation_pcc"].mean(),
            }
        )
    return pd.DataFrame(rows)


def taken_genes(grid: Grid, gathered: Gathered) -> pd.DataFrame:
    """How often each auxiliary gene is taken by each method, over the cells that have it as an auxiliary gene.

    Returns:
        column, method, preset, gene; cells (that have it), taken (share of them), weight (mean), rank (mean).
    """
    tables = []
    for column in grid.target.columns:
        for row in grid.target.rows:
            here = gathered.cells[gathered.cells["key"].isin(grid.keys(column, row))]
            if here.empty:
                continue
            genes = pd.concat([gathered.result(key).genes for key in here["key"]], ignore_index=True)
            genes = genes[~genes["primary"]].assign(taken=lambda g: g["weight"] > HALF)
            found = genes.groupby("gene").agg(
                cells=("taken", "size"), taken=("taken", "mean"), weight=("weight", "mean"), rank=("rank", "mean")
            )
            tables.append(found.reset_index().assign(**_name_of(column, row)))
    names = [*_LINE, "gene", "cells", "taken", "weight", "rank"]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def only_one_takes(table: pd.DataFrame) -> pd.DataFrame:
    """For each column, how much more often one method takes a gene than the other method that takes it most.

    Returns:
        column, method, gene, taken (by it), others (by the one of the others that takes it most), margin (of mean
        weights); for each column and method the clearest first.
    """
    found = []
    for name, here in table.groupby("column", sort=False):
        taken = here.pivot_table(index="gene", columns="method", values="taken", sort=False)
        weight = here.pivot_table(index="gene", columns="method", values="weight", sort=False)
        taken, weight = taken.dropna(), weight.dropna()  # a gene that is primary for one is not compared
        for method in taken.columns if len(taken.columns) > 1 else ():
            rest = [m for m in taken.columns if m != method]
            lines = pd.DataFrame(
                {
                    "column": name,
                    "method": method,
                    "taken": taken[method],
                    "others": taken[rest].max(axis=1),
                    "margin": weight[method] - weight[rest].max(axis=1),
                }
            ).reset_index()
            lead = (lines["taken"] - lines["others"]).rename("lead")
            lines = lines.assign(lead=lead).sort_values(["lead", "margin", "gene"], ascending=[False, False, True])
            found.append(lines[lines["lead"] > 0].drop(columns="lead"))
    names = ["column", "method", "gene", "taken", "others", "margin"]
    return pd.concat(found, ignore_index=True)[names] if found else pd.DataFrame(columns=names)


def draw(grid: Grid, gathered: Gathered, folder: Path, root: Path) -> list[Drawn]:
    """Draw the cells of a grid; the figures that show what the paper's does.

    Args:
        grid: whose.
        gathered: the work folder.
        folder: for the files; other figures of the same cells come there as well.
        root: data folder, for maps on the tissue.
    """
    own = replace(gathered, cells=gathered.cells[gathered.cells["key"].isin(grid.lines)])
    return [drawn for drawn in draw_all(own, folder, root=root) if drawn.name.startswith(grid.target.figures)]


def _folder() -> Path:
    """Inside an installed wheel the files lie beside this one; in a checkout they are in `benchmarks/reproduce/`."""
    installed = Path(__file__).parent / "targets"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "benchmarks" / "reproduce"
