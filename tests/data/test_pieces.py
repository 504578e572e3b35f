"""A long array goes on where it was left, and is the same however often it was interrupted."""

from pathlib import Path

import numpy as np
import pytest

from agl_bench.data.pieces import PIECE, put_together

SPOTS = 2 * PIECE + 5


class Maker:
    """Makes (2, rows, 3), ends in the piece of that number, and knows the rows that it was asked for."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.ends_at, self.asked = ends_at, []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if len(self.asked) == self.ends_at:
            raise KeyboardInterrupt
        self.asked.append((int(rows[0]), int(rows[-1])))
        return np.stack([rows[:, None] + np.arange(3)] * 2).astype(np.float32)


@pytest.mark.parametrize("ends_at", [0, 1, 2])
def test_what_was_made_is_not_made_again(ends_at: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        put_together(tmp_path / "pieces", SPOTS, Maker(ends_at))
    whole = put_together(tmp_path / "pieces", SPOTS, maker := Maker())
    assert maker.asked == [(0, PIECE - 1), (PIECE, 2 * PIECE - 1), (2 * PIECE, SPOTS - 1)][ends_at:]
    np.testing.assert_array_equal(whole, Maker()(np.arange(SPOTS)))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"zeros" * 9])
def test_a_piece_that_is_no_array_is_made_again(content: bytes, tmp_path: Path) -> None:
    whole = put_together(tmp_path / "pieces", SPOTS, Maker())
    (tmp_path / "pieces" / f"0-{PIECE}.npy").write_bytes(content)
    np.testing.assert_array_equal(put_together(tmp_path / "pieces", SPOTS, maker := Maker()), whole)
    assert maker.asked == [(0, PIECE - 1)]
