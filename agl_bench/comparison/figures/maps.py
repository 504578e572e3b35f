"""Genes on the tissue: what one selector takes and another does not, and what is predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from agl_bench.bench.describe import drawn_diameter_px
from agl_bench.bench.overlay import around, circles, scale_bar, tissue
from agl_bench.comparison.figures.style import QUIET, NotDrawn, canvas, short
from agl_bench.data.neighbours import pitch
from agl_bench.interfaces.spots import Section
from agl_bench.training.trainer import HALF

_TISSUE = 0.45  # how strongly the picture is seen below spots
_PANEL = 2.2  # inches
_PIXELS = 180  # of the longer side of the tissue: it is a ground, not the point, and every panel carries it
_MARGIN = 0.06  # around the spots, of their longer side
_LIMIT = 2.0  # standard deviations at the ends of the colours
_WIDTH = 0.8  # of the pitch: spots of maps without tissue


@dataclass(frozen=True)
class Apart:
    """An auxiliary gene that one selector takes and the other does not.

    Attributes:
        gene: its name.
        takes, leaves: the selectors.
        share, other_share: of cells in which each gives it more than half the weight of a primary gene.
    """

    gene: str
    takes: str
    leaves: str
    share: float
    other_share: float


@dataclass(frozen=True)
class Ground:
    """What maps are drawn on.

    Attributes:
        section: as read; what its `patches` can show is in the picture.
        positions: (spots, 2) in pixels.
        picture: of the tissue around the spots, uint8 (h, w), grey so that only expression has colour; or None.
        extent: (left, right, bottom, top) of the picture, in pixels of the section.
        diameter: of a spot, in pixels.
    """

    section: Section
    positions: np.ndarray
    picture: np.ndarray | None
    extent: tuple[float, float, float, float]
    diameter: float

    @classmethod
    def of(cls, section: Section) -> Ground:
        """Of a section, whose slide is read."""
        positions = np.asarray(section.counts.obsm["spatial"], dtype=np.float64)
        picture, whole = tissue(section)
        extent = around(positions, whole, _MARGIN)
        if picture is not None:
            picture, extent = _cut(picture, whole, extent)
        return cls(section, positions, picture, extent, drawn_diameter_px(section))


def _cut(
    picture: np.ndarray, whole: tuple[float, float, float, float], part: tuple[float, float, float, float]
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A part of a picture, grey and small, and its extent."""
    scale = (whole[1] - whole[0]) / picture.shape[1]
    first = np.floor((np.array([part[0], part[3]]) - [whole[0], whole[3]]) / scale).astype(int)
    last = np.ceil((np.array([part[1], part[2]]) - [whole[0], whole[3]]) / scale).astype(int)
    cut = picture[first[1] : last[1], first[0] : last[0]]
    height, width = cut.shape[:2]
    left, top = whole[0] + first[0] * scale, whole[3] + first[1] * scale
    shrink = max(max(height, width) / _PIXELS, 1.0)
    size = max(round(width / shrink), 1), max(round(height / shrink), 1)
    small = np.asarray(Image.fromarray(cut).convert("L").resize(size, Image.Resampling.BOX))
    return small, (float(left), float(left + width * scale), float(top + height * scale), float(top))


def genes_apart(genes: pd.DataFrame, a: str, b: str, each: int = 2) -> list[Apart]:
    """Auxiliary genes on which two selectors differ most, `each` of either kind.

    By the share of cells that take the gene, then by mean weight, then by name: never by how their maps look.

    Args:
        genes: of `reading.genes_of`.
        a, b: selectors.
        each: how many genes of either kind.
    """
    rows = genes[(genes["rank"] >= 0) & genes["selector"].isin([a, b])]
    rows = rows.assign(selector=rows["selector"].astype(str), taken=rows["weight"] > HALF)
    means = rows.groupby(["gene", "selector"], observed=True)[["taken", "weight"]].mean().unstack("selector").dropna()
    common = rows.groupby("gene", observed=True)["key"].nunique()
    means = means[common.reindex(means.index) >= common.max() / 2].rename_axis(
        None
    )  # primary in most cells: no choice to speak of
    found = []
    for takes, other in ((a, b), (b, a)):
        table = pd.DataFrame(
            {
                "taken": means[("taken", takes)] - means[("taken", other)],
                "weight": means[("weight", takes)] - means[("weight", other)],
                "gene": means.index.astype(str),
            },
            index=means.index,
        )
        table = table[table["taken"] > 0].sort_values(["taken", "weight", "gene"], ascending=[False, False, True])
        found += [
            Apart(gene, takes, other, float(means.at[gene, ("taken", takes)]), float(means.at[gene, ("taken", other)]))
            for gene in table["gene"].head(each)
        ]
    return found


def choices(ground: Ground, apart: Sequence[Apart], title: str) -> Figure:
    """Measured expression of genes on which two selectors differ (Fig. 5 of Shiku et al. 2026), one row per selector.

    Colours show ln(1 + counts), from 0 to the 99th percentile of the gene.

    Args:
        ground: the section.
        apart: genes, from `genes_apart`; those that the section does not measure are left out.
        title: of the figure.

    Raises:
        NotDrawn: if the section measures none of the genes.
    """
    section = ground.section
    measured = set(section.counts.var_names)
    rows = {s: [g for g in apart if g.takes == s and g.gene in measured] for s in dict.fromkeys(g.takes for g in apart)}
    rows = {selector: own for selector, own in rows.items() if own}
    if not rows:
        raise NotDrawn("there is no gene that one of the learning selectors takes and the other does not")
    columns = max(map(len, rows.values()))
    figure, grid = _panels(len(rows), columns, ground.extent, title)
    for line, (selector, own) in zip(grid, rows.items(), strict=True):
        for axes in line[len(own) :]:
            axes.set_visible(False)
        for axes, gene in zip(line, own, strict=False):
            values = _counts(section, gene.gene)
            _below(axes, ground.picture, ground.extent)
            top = float(np.quantile(values, 0.99)) or float(values.max()) or 1.0
            discs = circles(axes, ground.positions, ground.diameter, array=values, cmap="viridis", linewidths=0)
            discs.set_clim(0.0, top)
            discs.set_rasterized(True)
            figure.colorbar(discs, ax=axes, shrink=0.7, aspect=18, pad=0.02)
            axes.set_title(
                f"{gene.gene}, counted in {np.mean(values > 0):.0%} of spots\n"
                f"taken in {gene.share:.0%} of cells, by {short(gene.leaves, 14)} in {gene.other_share:.0%}",
                fontsize=8,
                loc="left",
            )
        line[0].set_ylabel(f"taken by {short(selector)}", fontsize=10)
    scale_bar(grid[0][0], ground.extent, section.um_per_px)
    return figure


def _counts(section: Section, gene: str) -> np.ndarray:
    """ln(1 + counts) of one gene: (spots,)."""
    column = section.counts.X[:, section.counts.var_names.get_loc(gene)]
    dense = column.toarray() if hasattr(column, "toarray") else np.asarray(column)
    return np.log1p(dense.ravel().astype(np.float64))


def predictions(tables: Mapping[str, pd.DataFrame], genes: Sequence[str], title: str) -> Figure:
    """Measured expression of primary genes above what each selector's model predicts at the same test spots.

    Every map is standardised over the test spots of a fold, since the correlation loss leaves scale and offset free.
    Spots of folds in which a gene is not primary are white.

    Args:
        tables: selector -> test spots of one section: section, fold, x_px, y_px, "measured:GENE" and "predicted:GENE";
            every spot once. The first one's measured values are shown.
        genes: primary genes, one column each.
        title: of the figure.

    Raises:
        NotDrawn: if there is no table or no gene.
    """
    if not tables or not genes:
        raise NotDrawn("there is no primary gene that all of these cells predict in one section")
    first = next(iter(tables.values()))
    spots = first[["x_px", "y_px"]].to_numpy(float)
    diameter = _WIDTH * (pitch(spots) or 1.0)
    low, high = spots.min(axis=0) - diameter, spots.max(axis=0) + diameter
    extent = (float(low[0]), float(high[0]), float(high[1]), float(low[1]))
    figure, grid = _panels(1 + len(tables), len(genes), extent, title)
    colours = colormaps["viridis"].with_extremes(bad="white")
    for number, (line, (name, table)) in enumerate(zip(grid, [("measured", first), *tables.items()], strict=True)):
        for axes, gene in zip(line, genes, strict=True):
            measured = _standardised(table, f"measured:{gene}")
            values = measured if number == 0 else _standardised(table, f"predicted:{gene}")
            _below(axes, None, extent)
            places = table[["x_px", "y_px"]].to_numpy(float)
            discs = circles(axes, places, diameter, array=values, cmap=colours, edgecolors="0.7", linewidths=0.3)
            discs.set_clim(-_LIMIT, _LIMIT)
            discs.set_rasterized(True)
            if number == 0:
                axes.set_title(gene, fontsize=10, loc="left", style="italic")
            else:
                axes.set_title(f"PCC {_correlation(measured, values):.2f}", fontsize=8, loc="left", color=QUIET)
        line[0].set_ylabel(short(name, 22), fontsize=10)
    figure.colorbar(
        grid[0][0].collections[0], ax=list(grid.flat), shrink=0.5, aspect=30, pad=0.01, extend="both",
        label="standard deviations of the gene",
    )  # fmt: skip
    return figure


def _standardised(table: pd.DataFrame, column: str) -> np.ndarray:
    """Mean 0 and standard deviation 1 within each fold; NaN where a fold has one value only."""
    groups = table.groupby("fold", sort=False)[column]
    spread = groups.transform("std", ddof=0)
    scaled = (table[column] - groups.transform("mean")) / spread.where(spread > 0)
    return np.asarray(scaled, dtype=np.float64)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    return float(np.corrcoef(a[known], b[known])[0, 1]) if known.sum() > 2 else float("nan")


def _panels(rows: int, columns: int, view: tuple[float, float, float, float], title: str) -> tuple[Figure, np.ndarray]:
    """A grid of maps in the proportions of the tissue."""
    left, right, bottom, top = view
    height = float(np.clip(_PANEL * (bottom - top) / max(right - left, 1e-9), 0.5 * _PANEL, 1.6 * _PANEL))
    figure = canvas(max((_PANEL + 0.7) * columns, 5.5) + 0.4, (height + 0.45) * rows + 0.7, title)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _below(axes: Any, picture: np.ndarray | None, extent: tuple[float, float, float, float]) -> None:
    """The faint tissue, and no ticks."""
    left, right, bottom, top = extent
    if picture is not None:
        axes.imshow(picture, extent=extent, alpha=_TISSUE, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set(color="0.8")
