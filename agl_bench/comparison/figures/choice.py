"""Which genes, and how many: PCC against k, the course of k, and weight against rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from agl_bench.comparison.figures.standing import key
from agl_bench.comparison.figures.style import QUIET, NotDrawn, canvas, colour, in_order, plain_axes, short, styles

_LINES = 24  # single cells drawn behind a mean
_COLUMNS = 4
_BINS = 150  # of ranks


def sweep(lines: pd.DataFrame, title: str, *, score: str) -> Figure:
    """PCC against the number of auxiliary genes (Fig. 3 of Shiku et al. 2026).

    Selectors that were run with several fixed k are a curve each; every other selector is a point at the number that it
    chose, with the spread of its choice.

    Args:
        lines: one row per selector of one place: selector, name (of its curve), swept (whether it is a point of one),
            learned (whether its choice is marked), selected and selected_sd (auxiliary genes, over folds and seeds),
            value, low, high (of the score).
        title: of the figure.
        score: what `value` is, for the axis.

    Raises:
        NotDrawn: if no selector was run with two or more k.
    """
    rows = lines[np.isfinite(lines["value"].astype(float))]
    swept, others = rows[rows["swept"]], rows[~rows["swept"]]
    if swept.empty:
        raise NotDrawn("no selector was run with two or more values of its setting k")
    figure = canvas(8.6, 4.8, title)
    axes = figure.subplots()
    plain_axes(axes)
    axes.axhline(0, color=QUIET, linewidth=1)
    names = in_order([*swept["name"], *others["selector"]])
    look = styles(names)
    for name, curve in swept.groupby("name"):
        style, curve = look[str(name)], curve.sort_values("selected")
        axes.fill_between(curve["selected"], curve["low"], curve["high"], color=style.colour, alpha=0.15, linewidth=0)
        axes.plot(
            curve["selected"], curve["value"], color=style.colour, marker=style.marker, markersize=5, linewidth=1.8
        )
    for row in others.itertuples():
        style = look[row.selector]
        if row.learned:
            axes.axvline(row.selected, color=style.colour, linewidth=1, linestyle=":")
        if math.isfinite(row.low) and math.isfinite(row.high):
            axes.plot([row.selected, row.selected], [row.low, row.high], color=style.colour, linewidth=1.6)
        if row.selected_sd > 0:
            ends = [max(row.selected - row.selected_sd, 0), row.selected + row.selected_sd]
            axes.plot(ends, [row.value, row.value], color=style.colour, linewidth=1.6)
        axes.plot(
            row.selected, row.value, style.marker, color=style.colour, markersize=10, markeredgecolor="white", zorder=3,
            clip_on=False,
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=max(float(swept["selected"].min()), 1.0), linscale=0.4)
    axes.set_xlim(left=0)
    marks = _round_marks(float(rows["selected"].max()), float(swept["selected"].min()))
    axes.set_xticks([0, *marks], ["0", *(f"{m:,.0f}" for m in marks)])
    axes.minorticks_off()
    axes.set_xlabel("auxiliary genes selected (logarithmic from the smallest k)")
    axes.set_ylabel(score)
    key(figure, names, look)
    return figure


def _round_marks(largest: float, smallest: float) -> list[float]:
    """1, 3, 10, 30 … from about the smallest k to the largest."""
    steps = [m * 10**e for e in range(7) for m in (1, 3)]
    return [s for s in steps if smallest / 3.5 < s <= largest * 1.05]


def trajectories(courses: Mapping[str, list[pd.DataFrame]], title: str) -> Figure:
    """k and validation PCC over outer iterations (Fig. 4 of Shiku et al. 2026), one column per learning selector.

    Thin lines are cells, the thick one their median, for which cells that have ended keep their last value: else it
    would jump where one ends. A dot is the pass whose state was tested.

    Args:
        courses: selector -> for each cell its `Result.outer` with a column best (True at the tested state).
        title: of the figure.

    Raises:
        NotDrawn: if no selector made an outer step.
    """
    courses = {s: [c for c in courses[s] if len(c)] for s in in_order(courses)}
    courses = {s: cells for s, cells in courses.items() if cells}
    if not courses:
        raise NotDrawn("no selector of these cells learns from outer steps")
    figure = canvas(1.2 + 3.6 * max(len(courses), 2), 5.2, title)
    grid = figure.subplots(2, len(courses), sharex="col", sharey="row", squeeze=False)
    for (upper, lower), (selector, cells) in zip(grid.T, courses.items(), strict=True):
        own = colour(selector)
        for axes, column in ((upper, "selected"), (lower, "validation_pcc")):
            plain_axes(axes)
            for cell in cells[:_LINES]:
                values = cell[column].to_numpy(float)
                axes.plot(np.arange(1, len(values) + 1), values, color=own, alpha=0.3, linewidth=0.8)
                best = np.flatnonzero(cell["best"].to_numpy(bool))[-1:]
                axes.plot(best + 1, values[best], "o", color=own, markersize=3.5, markeredgecolor="white", mew=0.4)
            middle = _median([cell[column].to_numpy(float) for cell in cells])
            axes.plot(np.arange(1, len(middle) + 1), middle, color="black", linewidth=2)
        upper.set_title(f"{short(selector)}, {len(cells)} cells", fontsize=10, loc="left")
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        lower.set_xlabel("outer iteration (pass of outer steps)")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].set_ylim(bottom=0)
    grid[0, 0].set_ylabel("auxiliary genes selected, k")
    grid[1, 0].set_ylabel("validation PCC")
    return figure


def _median(curves: list[np.ndarray]) -> np.ndarray:
    """Median over cells at each pass; a cell that has ended keeps its last value."""
    longest = max(map(len, curves))
    table = np.stack([np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in curves])
    known = np.isfinite(table).any(axis=0)
    middle = np.full(longest, np.nan)
    middle[known] = np.nanmedian(table[:, known], axis=0)
    return middle


def weight_by_rank(genes: pd.DataFrame, title: str) -> Figure:
    """Effective weight of auxiliary genes against their rank, one panel per selector; 1 = the weight of a primary gene.

    Args:
        genes: auxiliary genes of cells: selector, key, rank, weight.
        title: of the figure.

    Raises:
        NotDrawn: if there is no auxiliary gene.
    """
    rows = genes[genes["rank"] >= 0]
    if rows.empty:
        raise NotDrawn("these cells have no auxiliary genes")
    width = max(-(-int(rows["rank"].max() + 1) // _BINS), 1)
    bins = rows["rank"] // width
    means = rows.groupby(["selector", "key", bins], observed=True)["weight"].mean()
    spread = rows.groupby(["selector", bins], observed=True)["weight"].quantile([0.1, 0.9]).unstack()
    selectors = in_order(str(s) for s in rows["selector"].unique())
    lines = -(-len(selectors) // _COLUMNS)
    columns = -(-len(selectors) // lines)
    figure = canvas(1.0 + 2.5 * max(columns, 2), 0.9 + 2.2 * lines, title)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(selectors) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(len(selectors) - columns, 0) : len(selectors)]:
        axes.tick_params(labelbottom=True)  # also where nothing stands below
    for axes, selector in zip(grid.flat, selectors, strict=False):
        _weights(axes, means.loc[selector], spread.loc[selector], width, colour(selector))
        axes.set_title(short(selector), fontsize=10, loc="left")
    top = float(np.nanmax([1.0, *means, *spread[0.9]]))
    grid[0, 0].set_ylim(-0.04 * top, 1.06 * top)
    figure.supxlabel("rank of an auxiliary gene (0 = first of the protocol's ranking)", fontsize=9)
    figure.supylabel("weight relative to a primary gene", fontsize=9)
    return figure


def _weights(axes: Any, means: pd.Series, spread: pd.DataFrame, width: int, own: str) -> None:
    """Band over genes, thin lines of cells, and the mean of all."""
    plain_axes(axes)
    axes.axhline(0.5, color=QUIET, linewidth=0.8, linestyle=":")  # more counts as selected
    middles = (spread.index.to_numpy(float) + 0.5) * width
    axes.fill_between(middles, spread[0.1], spread[0.9], color=own, alpha=0.18, linewidth=0)
    cells = means.unstack("key")
    for number in range(min(cells.shape[1], _LINES)):
        line = cells.iloc[:, number]
        axes.plot((line.index.to_numpy(float) + 0.5) * width, line, color=own, alpha=0.3, linewidth=0.7)
    mean = cells.mean(axis=1)
    axes.plot((mean.index.to_numpy(float) + 0.5) * width, mean, color="black", linewidth=1.8)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
