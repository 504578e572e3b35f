"""Spot arrays: whether positions in an image are those of the rows and columns that the spots have on their array.

fit_array        lays an array over positions
array_problems   what contradicts the array in the table of a section
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import anndata
import numpy as np

STRETCH = 1.1  # scanners and hand alignment stretch by 1 %; rows and columns swapped by 73 % or more
_VISIUM_UM = 100.0  # between neighbouring spots of Visium, the one array with rows shifted by half a pitch
_PITCH_SLACK = 0.1  # pixel sizes read from scanners are wrong by some percent, magnifications mistaken by factors
_NEAREST = 0.5  # pitches: a spot farther off is nearer to another's place; by hand 0.3 was met
# Spots from which on a fit may also bend, by degree: registered images are seen in perspective, which at 2 % moves the
# spots of a whole array by half a pitch. Fewer spots could bend to whatever they are given.
_BENDS = ((200, 3), (60, 2))
_HEXAGONAL = ("array_row", "array_col")  # as Space Ranger, scanpy and HEST name them
_SQUARE = ("array_y", "array_x")  # as tables of Spatial Transcriptomics name them


@dataclass(frozen=True)
class ArrayFit:
    """How an array lies in an image: moved, turned, mirrored and stretched so that it fits best.

    Attributes:
        pitch_px: pixels between neighbours.
        stretch: how much longer it is in one direction than in another, ≥ 1.
        mirrored: whether it is seen from its back.
        off: (spots,) pitches between a spot and where the array puts it, bent as perspective bends it.
    """

    pitch_px: float
    stretch: float
    mirrored: bool
    off: np.ndarray


def fit_array(row: np.ndarray, column: np.ndarray, positions: np.ndarray, *, hexagonal: bool) -> ArrayFit | None:
    """The array laid over positions by least squares; None where they do not say how it lies.

    Args:
        row: (spots,) of the array.
        column: (spots,) of the array; in a hexagonal one, neighbours of a row are two columns apart.
        positions: (spots, 2) in pixels, (x = column, y = row).
        hexagonal: whether odd rows are shifted by half a pitch.
    """
    across, down = (0.5, np.sqrt(3) / 2) if hexagonal else (1.0, 1.0)
    place = np.stack([np.asarray(column) * across, np.asarray(row) * down], axis=1).astype(np.float64)
    known = np.isfinite(place).all(axis=1) & np.isfinite(positions).all(axis=1)
    if not known.all() or len(place) < 3:
        return None
    place, seen = place - place.mean(axis=0), positions - positions.mean(axis=0)
    matrix, _, rank, _ = np.linalg.lstsq(place, seen, rcond=None)
    long, short = np.linalg.svd(matrix, compute_uv=False)
    if rank < 2 or not short > 0:
        return None
    pitch_px = float(np.sqrt(long * short))
    degree = next((degree for least, degree in _BENDS if len(place) >= least), 1)
    x, y = (place / np.abs(place).max()).T
    terms = np.stack([x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)], axis=1)
    bent = terms @ np.linalg.lstsq(terms, seen, rcond=None)[0]
    off = np.linalg.norm(seen - bent, axis=1) / pitch_px
    return ArrayFit(pitch_px, float(long / short), bool(np.linalg.det(matrix) < 0), off)


def array_problems(counts: anndata.AnnData, positions: np.ndarray, um_per_px: float) -> Iterator[str]:
    """What contradicts rows and columns in `obs`: a sentence. Tables without them, or of an unknown array, pass.

    Args:
        counts: with `array_row` and `array_col` of Visium, or `array_y` and `array_x` of Spatial Transcriptomics.
        positions: (spots, 2) in pixels, (x = column, y = row), finite.
        um_per_px: tissue micrometres for one pixel; NaN = not known.
    """
    for names, hexagonal in ((_HEXAGONAL, True), (_SQUARE, False)):
        if not set(names) <= set(counts.obs.columns) or any(counts.obs[n].dtype.kind not in "iuf" for n in names):
            continue
        row, column = (counts.obs[name].to_numpy(dtype=np.float64) for name in names)
        if hexagonal and not is_hexagonal(row, column):
            continue  # bins and binned molecules have such columns too, in ways of their own
        fit = fit_array(row, column, positions, hexagonal=hexagonal)
        if fit is None:
            continue
        told = "{} and {} of obs".format(*names)
        strays = np.flatnonzero(fit.off > _NEAREST)
        if len(strays) or fit.stretch > STRETCH:
            first = counts.obs_names[strays[0]] if len(strays) else counts.obs_names[0]
            yield (
                f"obsm['spatial'] contradicts {told} for spot '{first}' ({len(strays) or counts.n_obs} spots); "
                f"take both from the same table, in the same order of spots"
            )
        elif hexagonal and abs(fit.pitch_px * um_per_px / _VISIUM_UM - 1) > _PITCH_SLACK:
            yield (
                f"by {told} its spots are {fit.pitch_px * um_per_px:.3g} µm apart, but Visium spots "
                f"are {_VISIUM_UM:g} µm apart; um_per_px is about {_VISIUM_UM / fit.pitch_px:.3g}, not {um_per_px:.3g}"
            )


def is_hexagonal(row: np.ndarray, column: np.ndarray) -> bool:
    """Whether rows and columns are numbered as in Visium: even columns in even rows, odd ones in odd rows."""
    with np.errstate(invalid="ignore"):
        return len(row) > 3 and not ((row + column) % 2).any() and bool((row % 2).any()) and not (row % 2).all()
