"""Pictures of a section: its spots on the tissue, and how much was counted in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from agl_bench.bench.describe import drawn_diameter_px, spot_diameter_px, umi_of
from agl_bench.interfaces.spots import Section
from agl_bench.protocol import Protocol

_LONGEST = 1600  # pixels of the longer side of the tissue
_PATCH_PX = (6, 48)  # a patch is placed with at least and at most so many pixels
_PANEL = 6.2  # inches
_MARGIN = 0.06  # around the spots, of the longer side, where there is no image
_CONTEXT = 0.2  # of an image around the spots, of the longer side
_BARS_UM = (50, 100, 200, 500, 1000, 2000, 5000)


def draw_overlay(dataset: str, section: Section, path: Path) -> None:
    """Write a PNG with two panels: the spots at their true size on the tissue, and the counts of each spot.

    Args:
        dataset: name, for the title.
        section: as read, with what its `patches` can show.
        path: of the PNG.
    """
    positions = np.asarray(section.counts.obsm["spatial"], dtype=np.float64)
    stated, diameter = spot_diameter_px(section.counts.uns), drawn_diameter_px(section)
    picture, extent = tissue(section)
    left, right, bottom, top = around(positions, extent)
    ratio = (bottom - top) / (right - left)
    figure = Figure(figsize=(2 * _PANEL + 1.2, min(max(_PANEL * ratio, 3.0), 2 * _PANEL) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    spots, counted = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, strength in ((spots, 1.0), (counted, 0.45)):
        if picture is not None:
            axes.imshow(picture, extent=extent, alpha=strength, interpolation="antialiased")
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set(color="0.8")
        scale_bar(axes, (left, right, bottom, top), section.um_per_px)

    for colour, line in (("black", 2.2), ("#ffe600", 1.0)):  # seen on glass and on any stain
        circles(spots, positions, diameter, facecolors="none", edgecolors=colour, linewidths=line)
    umi = np.maximum(umi_of(section), 1.0)
    low, high = np.quantile(umi, (0.01, 0.99))
    discs = circles(
        counted, positions, diameter, array=umi, cmap="viridis", linewidths=0, norm=LogNorm(low, max(high, low * 1.1))
    )
    bar = figure.colorbar(discs, ax=counted, shrink=0.75, label="counts of a spot (UMI)", extend="both")
    bar.set_ticks(LogLocator(subs=(1, 2, 3, 5, 7)), labels=None)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.minorticks_off()
    known = f"{diameter * section.um_per_px:.0f} µm wide" if stated else "drawn at 55 % of their pitch, width not known"
    spots.set_title(f"{len(positions):,} spots, {known}", fontsize=10)
    counted.set_title(f"median {np.median(umi_of(section)):,.0f} UMI, {section.counts.n_vars:,} genes", fontsize=10)
    donor = f" · donor {section.donor}" if section.donor else ""
    figure.suptitle(f"{dataset} · {section.name}{donor} · {section.um_per_px:.3g} µm for a pixel", fontsize=12)
    figure.savefig(path, dpi=130)


def circles(axes: Any, positions: np.ndarray, diameter: float, **look: Any) -> EllipseCollection:
    """Spots, (spots, 2) in pixels, as circles that keep their size on the tissue."""
    made = EllipseCollection(
        diameter, diameter, 0.0, units="xy", offsets=positions, offset_transform=axes.transData, **look
    )
    axes.add_collection(made)
    return made


def tissue(section: Section) -> tuple[np.ndarray | None, tuple[float, float, float, float]]:
    """A picture of the tissue, uint8 (h, w, 3), if there is one, and its (left, right, bottom, top) in pixels."""
    positions = np.asarray(section.counts.obsm["spatial"], dtype=np.float64)
    overview = getattr(section.patches, "overview", None)
    if overview is not None:
        picture, scale = overview(_LONGEST)
        height, width = picture.shape[:2]
        return picture, (0.0, width * scale, height * scale, 0.0)
    low, high = positions.min(axis=0), positions.max(axis=0)
    # As much as the protocol asks for, or all that a narrower patch has.
    um = min(Protocol().patch_um, getattr(section.patches, "side_um", None) or np.inf)
    side = um / section.um_per_px
    edge = max(side, _MARGIN * float((high - low).max()))
    (left, top), (right, bottom) = low - edge, high + edge
    extent = (float(left), float(right), float(bottom), float(top))
    if section.patches is None:
        return None, extent
    px = int(np.clip(_LONGEST * side / max(right - left, bottom - top), *_PATCH_PX))
    patches = section.patches.read(np.arange(len(positions)), px, um).transpose(0, 2, 3, 1)
    scale = side / px
    canvas = np.full((int((bottom - top) / scale) + 1, int((right - left) / scale) + 1, 3), 255, dtype=np.uint8)
    for (x, y), patch in zip(np.rint((positions - low + edge) / scale - px / 2).astype(int), patches, strict=True):
        canvas[y : y + px, x : x + px] = patch
    height, width = canvas.shape[:2]
    return canvas, (float(left), float(left + width * scale), float(top + height * scale), float(top))


def around(
    positions: np.ndarray, extent: tuple[float, float, float, float], margin: float = _CONTEXT
) -> tuple[float, float, float, float]:
    """The part of the picture that has spots, with a margin: (left, right, bottom, top) in pixels.

    Args:
        positions: (spots, 2) in pixels.
        extent: (left, right, bottom, top) of the picture.
        margin: around the spots, of their longer side.
    """
    low, high = positions.min(axis=0), positions.max(axis=0)
    edge = margin * float((high - low).max())
    left, right, bottom, top = extent
    return (
        max(left, low[0] - edge) if edge else left,
        min(right, high[0] + edge) if edge else right,
        min(bottom, high[1] + edge) if edge else bottom,
        max(top, low[1] - edge) if edge else top,
    )


def scale_bar(axes: Any, extent: tuple[float, float, float, float], um_per_px: float) -> None:
    """A bar of a round length, about a sixth of the width, in the lower left corner."""
    left, right, bottom, top = extent
    width, height = right - left, bottom - top
    um = max((b for b in _BARS_UM if b / um_per_px <= width / 5), default=_BARS_UM[0])
    x, y = left + 0.03 * width, bottom - 0.025 * height
    for colour, line in (("white", 6), ("black", 3)):  # legible on any tissue
        axes.plot([x, x + um / um_per_px], [y, y], color=colour, linewidth=line, solid_capstyle="butt")
    text = f"{um / 1000:g} mm" if um >= 1000 else f"{um} µm"
    label = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
    axes.text(x + um / um_per_px + 0.015 * width, y, text, fontsize=9, va="center", ha="left", bbox=label)
