"""Positions that contradict the rows and columns of an array."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from agl_bench import Section
from agl_bench.data.arrays import fit_array
from agl_bench.data.check import problems

PITCH_PX = 200.0


def grid(rows: int = 6, columns: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns as Space Ranger numbers them, and positions in pixels."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    column = 2 * column + row % 2
    return row, column, np.stack([column / 2, row * np.sqrt(3) / 2], axis=1) * PITCH_PX + 300


def turned(positions: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (positions - positions.mean(0)) @ turn.T + 1500


def told(row, column, positions, um_per_px: float = 0.5, names: tuple[str, str] = ("array_row", "array_col")) -> list:
    spots = len(row)
    counts = anndata.AnnData(
        np.ones((spots, 3), dtype=np.float32),
        obs=pd.DataFrame(dict(zip(names, (row, column), strict=True)), index=[f"S{s}" for s in range(spots)]),
        obsm={"spatial": np.asarray(positions, dtype=np.float64)},
    )
    return list(problems(Section("a", counts, um_per_px)))


def test_fit_knows_pitch_turn_and_mirror() -> None:
    row, column, positions = grid()
    for degrees in (0, 31, 90, 180):
        fit = fit_array(row, column, turned(positions, degrees), hexagonal=True)
        assert fit is not None and not fit.mirrored
        assert (fit.pitch_px, fit.stretch) == (pytest.approx(PITCH_PX), pytest.approx(1.0))
        assert fit.off.max() < 1e-9
    fit = fit_array(row, column, positions[:, ::-1], hexagonal=True)
    assert fit is not None and fit.mirrored
    assert fit_array(row[:2], column[:2], positions[:2], hexagonal=True) is None
    assert fit_array(row[:5], column[:5], positions[:5], hexagonal=True) is None  # a line
    assert fit_array(row, column, np.full_like(positions, np.nan), hexagonal=True) is None


def test_perspective_is_no_contradiction() -> None:
    row, column, positions = grid(78, 64)
    weight = 1 + 0.02 * positions[:, :1] / positions.max() + 0.01 * positions[:, 1:] / positions.max()
    fit = fit_array(row, column, np.rint(positions / weight), hexagonal=True)
    assert fit is not None and fit.off.max() < 0.02 and fit.stretch < 1.03
    order = np.arange(len(row))
    order[[700, 701]] = 701, 700
    fit = fit_array(row, column, (positions / weight)[order], hexagonal=True)
    assert fit is not None and sorted(np.flatnonzero(fit.off > 0.25)) == [700, 701]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p,
        lambda p: turned(p, 7),
        lambda p: turned(p, 90),
        lambda p: np.rint(p),
        lambda p: p * (1.0, 1.03),
        lambda p: p + np.random.default_rng(0).normal(0, 0.08 * PITCH_PX, p.shape),  # placed by hand
    ],
)
def test_sound_positions_pass(change) -> None:
    row, column, positions = grid()
    assert told(row, column, change(positions)) == []
    assert told(row[:3], column[:3], change(positions)[:3]) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p[::-1][np.r_[0:5, 10:15, 5:10, 15:30]],  # rows exchanged
        lambda p: np.random.default_rng(0).permutation(p),
        lambda p: p[np.r_[1, 0, 2:30]],
        lambda p: p * (1.0, 2.0),
    ],
)
def test_positions_of_other_spots_are_told(change) -> None:
    row, column, positions = grid()
    (problem,) = told(row, column, change(positions))
    assert "contradicts array_row and array_col of obs for spot 'S" in problem


def test_rows_taken_for_columns_are_told() -> None:
    row, column, positions = grid()
    (problem,) = told(column, row, positions)
    assert "contradicts array_row and array_col of obs" in problem and "(30 spots)" in problem


@pytest.mark.parametrize("um_per_px", [0.25, 0.4, 0.57, 1.0])
def test_pixel_size_that_contradicts_the_pitch(um_per_px: float) -> None:
    (problem,) = told(*grid(), um_per_px=um_per_px)
    assert f"its spots are {200 * um_per_px:.3g} µm apart" in problem
    assert f"um_per_px is about 0.5, not {um_per_px:g}" in problem
    assert told(*grid(), um_per_px=0.52) == []


def test_square_arrays_by_their_own_names() -> None:
    row, column = np.divmod(np.arange(30), 5)
    positions = np.stack([column, row], axis=1) * 250.0 + 300 + np.random.default_rng(0).normal(0, 20, (30, 2))
    assert told(row, column, positions, 0.8, ("array_y", "array_x")) == []
    (problem,) = told(row, column, positions[np.r_[7, 1:7, 0, 8:30]], 0.8, ("array_y", "array_x"))
    assert "contradicts array_y and array_x of obs" in problem and "(2 spots)" in problem
    # What is numbered in an unknown way is left alone.
    assert told(row, column, positions[::-1], 0.8) == []
    assert told(row.astype(str), column, positions, 0.8) == []
