"""How every figure looks: a selector's own colour and marker, the canvas, and the files."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from agl_bench.bench.table import BASELINE
from agl_bench.registry.hooks import PROJECT
from agl_bench.registry.plugins import Plugins

# Okabe and Ito (2008), with Tol's indigo and a dark brown in place of black and of a yellow that white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#661100")
BASELINE_COLOUR = "#4D4D4D"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
QUIET, FAINT = "#595959", "#D9D9D9"  # of text that is not the point, and of lines to read values by
DPI = 120
_COLOURS = 192  # of a PNG
_LOOK = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "svg.hashsalt": "agl-bench",  # equal figures are equal files
    "svg.fonttype": "path",
}


class NotDrawn(Exception):
    """A figure for which there is nothing to draw; the message is a sentence that says why."""


@dataclass(frozen=True)
class Style:
    """How a selector is drawn: no two of a figure share both."""

    colour: str
    marker: str


@functools.cache
def _registered() -> tuple[str, ...]:
    """Selectors that come with agl-bench, in the order of registration, to which new ones are appended."""
    entries = Plugins.discover(strict=False).entries()
    own = [e.name for e in entries if e.kind == "selector" and e.provider.startswith(f"{PROJECT.replace('_', '-')} ")]
    return tuple(name for name in own if name != BASELINE)


def _own(name: str) -> Style:
    """By the name alone: the place of registration, or for a stranger's selector a digest of its name."""
    if name == BASELINE:
        return Style(BASELINE_COLOUR, MARKERS[0])
    known, colours = _registered(), len(PALETTE)
    digest = int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big")
    number = known.index(name) if name in known else digest
    return Style(PALETTE[number % colours], MARKERS[(number + 1 + number // colours) % len(MARKERS)])


def plain(label: str) -> str:
    """The selector's name without the settings that a label carries in brackets."""
    return label.partition("(")[0]


def colour(selector: str) -> str:
    """The fixed colour of a selector (name, or label with settings), the same in every figure of every report."""
    return _own(plain(selector)).colour


def styles(selectors: Iterable[str]) -> dict[str, Style]:
    """Colour and marker of each label of a figure, no two alike.

    Lines of one selector that differ in settings keep its colour and take other markers; only a stranger's selector
    whose digest falls on a taken pair takes another colour.
    """
    taken: dict[Style, str] = {}
    for label in in_order(selectors):
        name = plain(label)
        own = _own(name)
        first = MARKERS.index(own.marker)
        markers = MARKERS[first:] + MARKERS[:first]
        others = [Style(c, m) for c, m in product(PALETTE, markers) if c != own.colour]
        free = (s for s in (*(Style(own.colour, m) for m in markers), *others) if s not in taken)
        taken[next(free, own)] = label  # beyond 64 lines pairs repeat
    return {label: style for style, label in taken.items()}


def in_order(selectors: Iterable[str]) -> list[str]:
    """The baseline first, then as registered, then strangers by name; settings by their numbers."""
    known = (BASELINE, *_registered())

    def key(label: str) -> tuple[int, str, list[float], str]:
        name = plain(label)
        numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", label[len(name) :])]
        return (known.index(name) if name in known else len(known), name, numbers, label)

    return sorted(dict.fromkeys(selectors), key=key)


def short(label: str, longest: int = 26) -> str:
    """A label that fits beside an axis: a long one loses its middle."""
    if len(label) <= longest:
        return label
    kept = longest - 1
    return f"{label[: kept - kept // 2]}…{label[-(kept // 2) :]}"


def where(place: Mapping[str, Any], *without: str) -> str:
    """A place as people say it: "her2st · intra-batch · tiny · clean · fixed settings"."""
    words = {
        "dataset": place.get("dataset"),
        "evaluation": f"{place['evaluation']}-batch" if "evaluation" in place else None,
        "backbone": place.get("backbone"),
        "preset": place.get("preset"),
        "tuning": (place["tuning"] or "fixed settings") if "tuning" in place else None,
    }
    return " · ".join(str(w) for key, w in words.items() if w and key not in without)


def canvas(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches, drawn by Agg, with its title at the upper left."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))  # inches
    FigureCanvasAgg(figure)
    lines = textwrap.wrap(title, max(30, int(width * 13)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11)
    return figure


def plain_axes(axes: Any, grid: str = "both") -> None:
    """No frame where there is nothing to read, and faint lines to read values by."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid != "none":
        axes.grid(axis=grid, color=FAINT, linewidth=0.6)


def look() -> Any:
    """The settings of matplotlib that figures are made and written with; a context manager."""
    return matplotlib.rc_context(_LOOK)


def write(figure: Figure, png: Path, svg: Path) -> None:
    """Both files, without dates in them; the PNG with few colours, which makes it three times smaller."""
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it has placed everything: once is enough for two files
    figure.savefig(svg, dpi=DPI, metadata={"Date": None, "Creator": "agl-bench"})
    agg = FigureCanvasAgg(figure)
    agg.draw()
    pixels = Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3])
    pixels.quantize(_COLOURS, dither=Image.Dither.NONE).save(png, optimize=True)
