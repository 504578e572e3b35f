"""An array that takes long to make, in pieces of so many spots: each is on the disk before the next one begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

PIECE = 1024  # spots; a multiple of the batches that encoders see, so that pieces change no batch


def put_together(folder: Path, spots: int, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The whole array, (…, spots, n); pieces that an interrupted process has left in `folder` are not made again.

    Args:
        folder: of the pieces, made if it is absent. Take it away when the array is safe.
        spots: of the whole array.
        make: rows -> (…, rows, n).
    """
    folder.mkdir(exist_ok=True)
    return np.concatenate(
        [_piece(folder, start, min(start + PIECE, spots), make) for start in range(0, spots, PIECE)], -2
    )


def _piece(folder: Path, start: int, stop: int, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    path = folder / f"{start}-{stop}.npy"
    try:
        found: np.ndarray = np.load(path)
    except (OSError, ValueError, EOFError):  # not made yet, or no array
        found = make(np.arange(start, stop))
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, found)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return found
