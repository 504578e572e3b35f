"""Who stands where: differences to the baseline, ranks over datasets, the table as bars, genes, and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from agl_bench.bench.table import BASELINE
from agl_bench.comparison.figures.style import (
    QUIET,
    NotDrawn,
    Style,
    canvas,
    in_order,
    plain_axes,
    short,
    styles,
)

_POINT = 8  # size of a marker
_VERDICTS = {"better": "#00614A", "worse": "#A63F00", "equivalent": "#004B7A"}  # of decided ones, dark enough to read
_DECIDED = ("better", "worse")
_COLUMNS = 3  # of datasets side by side
_DOTS = 400  # genes drawn as dots for each selector
_SEED = 0  # of which dots, and of their scatter


def forest(pairs: pd.DataFrame, title: str, *, baseline: str = BASELINE, rope: float = 0.005) -> Figure:
    """One line per selector: its mean difference to the baseline, the interval, and the verdict in words.

    A filled marker is decided (better or worse), a hollow one is not. The band is what counts as no difference.

    Args:
        pairs: rows of `statistics.pairs` of one place; those with another b than the baseline are left aside.
        title: of the figure.
        baseline: what the others are compared with.
        rope: half the width of the region of practical equivalence, in PCC.

    Raises:
        NotDrawn: if no selector has been paired with the baseline.
    """
    rows = pairs[(pairs["b"] == baseline) & (pairs["a"] != baseline)]
    rows = rows[np.isfinite(rows["difference"].astype(float))].sort_values(["difference", "a"], ignore_index=True)
    if rows.empty:
        raise NotDrawn(f"no selector shares finished folds and seeds with the baseline {baseline}")
    look = styles(rows["a"])
    figure = canvas(9.8, 1.45 + 0.36 * len(rows), title)
    axes, words = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4.6))
    plain_axes(axes, "x")
    axes.axvspan(-rope, rope, color="#EEEEEE", linewidth=0)
    axes.axvline(0, color=QUIET, linewidth=1)
    for y, row in enumerate(rows.itertuples()):
        style = look[row.a]
        if math.isfinite(row.low) and math.isfinite(row.high):
            axes.plot([row.low, row.high], [y, y], color=style.colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(
            row.difference, y, style.marker, color=style.colour, markersize=_POINT,
            markerfacecolor=style.colour if row.verdict in _DECIDED else "white", markeredgewidth=1.6,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(a) for a in rows["a"]])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"difference of test PCC to {baseline}")
    axes.tick_params(axis="y", length=0)
    words.axis("off")
    words.set_xlim(0, 1)
    top = len(rows) - 0.35
    for x, head in ((0.0, "difference [95 % interval]"), (0.56, "p (Holm)"), (0.75, "verdict")):
        words.text(x, top, head, color=QUIET, fontsize=8, va="bottom")
    for y, row in enumerate(rows.itertuples()):
        words.text(0.0, y, f"{_signed(row.difference)} [{_signed(row.low)}, {_signed(row.high)}]", va="center")
        words.text(0.56, y, _p(row.p_holm), va="center")
        weight = "bold" if row.verdict in _VERDICTS else "normal"
        words.text(0.75, y, row.verdict, va="center", color=_VERDICTS.get(row.verdict, QUIET), weight=weight)
    return figure


def critical_difference(ranks: pd.DataFrame, title: str, *, width: float) -> Figure:
    """Mean ranks over datasets on one axis; a bar joins selectors that differ by less than the critical difference.

    As Demšar (2006), with the interval of each rank beside it.

    Args:
        ranks: of `statistics.ranks`, rows of one evaluation, backbone, preset and tuning.
        title: of the figure.
        width: Nemenyi's critical difference; NaN = there is none.

    Raises:
        NotDrawn: if there are fewer than two datasets or selectors, or no critical difference.
    """
    rows = ranks[np.isfinite(ranks["mean_rank"].astype(float))].sort_values(["mean_rank", "selector"])
    if len(rows) < 2:
        raise NotDrawn("ranks need at least two selectors")
    if not math.isfinite(width):
        raise NotDrawn("ranks need at least two datasets on which the same selectors were run")
    look, n = styles(rows["selector"]), len(rows)
    groups = _cliques(rows["mean_rank"].to_numpy(float), width)
    figure = canvas(8.6, 1.7 + 0.12 * len(groups) + 0.3 * n, title)
    axes = figure.subplots()
    plain_axes(axes, "x")
    axes.spines["left"].set_visible(False)
    for y, row in enumerate(rows.itertuples()):
        style = look[row.selector]
        if math.isfinite(row.low) and math.isfinite(row.high):
            axes.plot([row.low, row.high], [-y, -y], color=style.colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(row.mean_rank, -y, style.marker, color=style.colour, markersize=_POINT)
    for level, (first, last) in enumerate(groups):
        ends = rows["mean_rank"].iloc[[first, last]].to_numpy(float)
        bar = 0.75 + 0.35 * level
        axes.plot(ends + np.array([-0.03, 0.03]), [bar, bar], color="black", linewidth=4, solid_capstyle="butt")
    above = 1.15 + 0.35 * len(groups)
    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, n + 0.1, 0.9 + width)
    axes.plot([low, low + width], [above, above], color=QUIET, linewidth=1.2, marker="|", markersize=8)
    axes.text(low + width + 0.03 * (high - low), above, f"critical difference {width:.2f}", va="center", color=QUIET)
    axes.set_xlim(low, high)
    axes.set_ylim(-n + 0.4, above + 0.6)
    axes.set_yticks([-y for y in range(n)], [f"{short(r.selector)}  {r.mean_rank:.2f}" for r in rows.itertuples()])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("mean rank over datasets (1 = best)")
    return figure


def _cliques(ranks: np.ndarray, width: float) -> list[tuple[int, int]]:
    """First and last index of each largest run of sorted mean ranks that lie within the critical difference."""
    last = np.searchsorted(ranks, ranks + width, side="right") - 1
    runs, reached = [], -1
    for first, end in enumerate(last):
        if end > max(first, reached):
            runs.append((first, int(end)))
            reached = int(end)
    return runs


def results(cells: pd.DataFrame, title: str) -> Figure:
    """The table as bars: mean test PCC of each selector on each dataset, ± sd over folds and seeds; the best in bold.

    Args:
        cells: of one evaluation, backbone, preset and tuning; any number of datasets.
        title: of the figure.

    Raises:
        NotDrawn: if no cell has a finite PCC.
    """
    finite = cells[np.isfinite(cells["pcc"].astype(float))]
    if finite.empty:
        raise NotDrawn("no finished cell has a PCC")
    selectors, datasets = in_order(finite["selector"]), list(dict.fromkeys(finite["dataset"]))
    look = styles(selectors)
    table = finite.groupby(["dataset", "selector"])["pcc"].agg(["mean", "std", "count"])
    columns = min(len(datasets), _COLUMNS)
    rows = -(-len(datasets) // columns)
    figure = canvas(max(1.6 + 3.3 * columns, 6.2), 0.75 + rows * (0.75 + 0.3 * len(selectors)), title)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(datasets) :]:
        axes.set_visible(False)
    for axes, dataset in zip(grid.flat, datasets, strict=False):
        _bars(axes, table.loc[dataset].reindex(selectors), look)
        axes.set_title(short(dataset, 34), fontsize=10, loc="left")
        axes.set_yticks(range(len(selectors)), [short(s) for s in selectors])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(selectors) - 0.4, -0.6)
        axes.set_xlabel("test PCC, mean ± sd")
    return figure


def _bars(axes: Any, rows: pd.DataFrame, look: dict[str, Style]) -> None:
    """Bars of one dataset with their numbers in a column to the right."""
    plain_axes(axes, "x")
    means, sds = rows["mean"].to_numpy(float), np.nan_to_num(rows["std"].to_numpy(float))
    low, high = float(np.nanmin([0.0, *(means - sds)])), float(np.nanmax([0.0, *(means + sds)]))
    span = max(high - low, 1e-3)
    axes.set_xlim(low - 0.03 * span, high + 0.6 * span)  # the right part is for numbers
    axes.set_xticks([t for t in MaxNLocator(4).tick_values(low, high) if low - 0.03 * span <= t <= high + 0.02 * span])
    axes.axvline(0, color=QUIET, linewidth=1)
    best = float(np.nanmax(means)) if np.isfinite(means).any() else math.nan
    for y, (selector, row) in enumerate(rows.iterrows()):
        if not math.isfinite(row["mean"]):
            axes.text(high + 0.08 * span, y, "–", va="center", color=QUIET)
            continue
        colour = look[str(selector)].colour
        axes.barh(y, row["mean"], height=0.62, color=colour)
        if math.isfinite(row["std"]):
            axes.errorbar(row["mean"], y, xerr=row["std"], color="black", linewidth=1, capsize=2)
        sd = f" ± {row['std']:.3f}" if math.isfinite(row["std"]) else ""
        weight = "bold" if row["mean"] == best and len(rows) > 1 else "normal"
        axes.text(high + 0.08 * span, y, f"{row['mean']:.3f}{sd}", va="center", weight=weight, fontsize=8.5)


def gene_distributions(genes: pd.DataFrame, title: str, *, baseline: str = BASELINE) -> Figure:
    """PCC of single primary genes: how they are spread, and how each differs from the baseline's.

    Args:
        genes: one row per selector and primary gene: selector, gene, pearson (mean over the cells where it is
            primary) and difference (to the baseline on the same folds and seeds; NaN where there is none).
        title: of the figure.
        baseline: for the label.

    Raises:
        NotDrawn: if no gene has a PCC.
    """
    finite = genes[np.isfinite(genes["pearson"])]
    if finite.empty:
        raise NotDrawn("no primary gene has a PCC")
    selectors = in_order(finite["selector"])
    look = styles(selectors)
    parts = [("pearson", "test PCC of a primary gene")]
    if np.isfinite(finite["difference"][finite["selector"] != baseline]).any():
        parts.append(("difference", f"difference to {baseline}, same gene"))
    figure = canvas(5.0 * len(parts), 1.25 + 0.42 * len(selectors), title)
    random = np.random.default_rng(_SEED)
    for axes, (column, label) in zip(figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts, strict=True):
        plain_axes(axes, "x")
        axes.axvline(0, color=QUIET, linewidth=1)
        for y, selector in enumerate(selectors):
            values = finite.loc[finite["selector"] == selector, column].to_numpy(float)
            values = values[np.isfinite(values)]
            if len(values) and not (column == "difference" and selector == baseline):
                _spread(axes, y, values, look[selector], random)
        axes.set_yticks(range(len(selectors)), [short(s) for s in selectors])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(selectors) - 0.4, -0.6)
        axes.set_xlabel(label)
    return figure


def _spread(axes: Any, y: int, values: np.ndarray, style: Style, random: np.random.Generator) -> None:
    """A box of the quartiles over the dots of single genes."""
    dots = values if len(values) <= _DOTS else random.choice(values, _DOTS, replace=False)
    jitter = random.uniform(-0.3, 0.3, len(dots))
    axes.plot(dots, y + jitter, ".", color=style.colour, alpha=0.35, markersize=4, markeredgewidth=0, rasterized=True)
    low, first, median, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    axes.plot([low, high], [y, y], color=style.colour, linewidth=1.2)
    axes.barh(y, third - first, left=first, height=0.5, color="white", alpha=0.6, zorder=2.2)
    axes.barh(y, third - first, left=first, height=0.5, fill=False, edgecolor=style.colour, linewidth=1.5, zorder=2.3)
    axes.plot([median, median], [y - 0.25, y + 0.25], color="black", linewidth=1.8, zorder=2.4)


def cost(lines: pd.DataFrame, title: str, *, memory: str) -> Figure:
    """Score against what it costs: seconds of a cell, and peak memory; upper left is best.

    Args:
        lines: one row per selector of one place: selector, pcc (mean), seconds (mean of a cell), peak_memory_mb.
        title: of the figure.
        memory: whose peak it is, for the axis.

    Raises:
        NotDrawn: if no line has a finite PCC.
    """
    finite = lines[np.isfinite(lines["pcc"].astype(float))]
    if finite.empty:
        raise NotDrawn("no finished cell has a PCC")
    selectors = in_order(finite["selector"])
    look, rows = styles(selectors), finite.set_index("selector")
    figure = canvas(9.2, 3.9, title)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, label in (
        (left, "seconds", "seconds for a cell (logarithmic)"),
        (right, "peak_memory_mb", f"peak memory of the {memory}, MB"),
    ):
        plain_axes(axes)
        for selector in selectors:
            style = look[selector]
            axes.plot(
                rows.at[selector, column], rows.at[selector, "pcc"], style.marker,
                color=style.colour, markersize=_POINT + 2, markeredgecolor="white",
            )  # fmt: skip
        axes.set_xlabel(label)
        axes.margins(0.12)
    right.set_xlim(0, 1.12 * float(np.nanmax([1.0, *rows["peak_memory_mb"]])))
    left.set_xscale("log")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.xaxis.set_minor_formatter(FuncFormatter(_log_minor(rows["seconds"])))
    left.tick_params(axis="x", which="minor", labelsize=7)
    left.set_ylabel("test PCC, mean")
    key(figure, selectors, look)
    return figure


def _log_minor(values: pd.Series) -> Any:
    """Labels for minor ticks of a logarithmic axis that spans less than two powers of ten."""
    few = float(values.max()) < 100 * max(float(values.min()), 1e-9)
    return lambda value, _: f"{value:g}" if few and f"{value:e}"[0] in "235" else ""


def key(figure: Figure, selectors: Sequence[str], look: dict[str, Style]) -> None:
    """The key of selectors below a figure."""
    handles = [
        Line2D([], [], color=look[s].colour, marker=look[s].marker, linestyle="", markersize=_POINT) for s in selectors
    ]
    figure.legend(
        handles, [short(s) for s in selectors], loc="outside lower left", frameon=False,
        ncols=min(len(selectors), 6), handletextpad=0.2, columnspacing=1.4,
    )  # fmt: skip


def _signed(value: float) -> str:
    """With the minus sign that axes have."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "–"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
