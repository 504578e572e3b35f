"""What files of patches state is compared with their pixels, the slide and the spots."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from agl_bench import ArrayPatches, BadSection

BARCODES = [f"S{spot:02d}-1" for spot in range(20)]
POSITIONS = np.stack(np.divmod(np.arange(20), 5), axis=1) * 200.0 + 300.3  # px
SIDE_PX = 32  # of a stored patch
UM_PER_PX = 0.5
WIDTH_PX = 224  # 112 µm of the scan


def write(path: Path, *, images: int = 20, corners: np.ndarray | None = None, barcodes=None, **attributes) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["img"] = rng.integers(0, 256, (images, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        file["barcode"] = np.array(BARCODES, "S")[:, None] if barcodes is None else barcodes
        if corners is not None:
            file["coords"] = corners
        file["img"].attrs.update(attributes)
    return path


def cut(width_px: float = WIDTH_PX, positions: np.ndarray = POSITIONS) -> np.ndarray:
    """Corners as HEST writes them."""
    return (positions - width_px // 2).astype(np.int64)


def matched(path: Path, side_um: float | None = None, **known) -> float | None:
    known = {"positions": POSITIONS, "um_per_px": UM_PER_PX} | known
    return ArrayPatches.matched(path, BARCODES, side_um, section="S1", **known)[0].side_um


@pytest.mark.parametrize(
    "what",
    [
        {"images": 19},
        {"images": 21},
        {"images": 20, "barcodes": np.array(BARCODES[:15], "S")},
        {"corners": cut()[:15]},
        {"corners": np.concatenate([cut(), cut()])},
    ],
)
def test_lengths_that_differ_are_refused(tmp_path: Path, what: dict) -> None:
    with pytest.raises(BadSection, match=r"section 'S1': .*p\.h5 has 2?\d+ images, \d+ barcodes.*it is unclear which"):
        matched(write(tmp_path / "p.h5", **what))


def test_barcodes_of_two_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSection, match=r"has barcodes \(10, 2\); there has to be one for each patch"):
        matched(write(tmp_path / "p.h5", barcodes=np.array(BARCODES, "S").reshape(10, 2)))


@pytest.mark.parametrize(
    ("attributes", "width_um"),
    [
        ({}, None),
        ({"patch_size_src": 224, "patch_size_target": SIDE_PX, "pixel_size": 0.5}, 112.0),
        ({"patch_size_src": 225, "pixel_size": 0.5}, 112.0),  # whole pixels
        ({"patch_size_src": 448, "patch_size_target": SIDE_PX, "pixel_size": 0.5, "downsample": 1.0}, 224.0),
        ({"patch_size_src": np.array([448])}, 224.0),
        ({"patch_size_level0": 112}, 56.0),
        ({"patch_size_src": 448, "pixel_size": 7.0}, 224.0),  # of the stored patch: 32 px of 7 µm
        ({"patch_size": 128, "pixel_size": 0.5}, 64.0),
        ({"pixel_size": 3.5}, 112.0),
        ({"patch_size_src": "unknown", "level": 0}, None),
    ],
)
@pytest.mark.parametrize("placed", [False, True])
def test_width_is_what_attributes_state(tmp_path: Path, attributes: dict, width_um: float | None, placed: bool) -> None:
    corners = cut((width_um or 112.0) / UM_PER_PX) if placed else None
    expected = 112.0 if placed and width_um is None else width_um
    assert matched(write(tmp_path / "p.h5", corners=corners, **attributes)) == expected


def test_a_wider_patch_gives_its_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "p.h5", patch_size_src=448)
    patches, kept = ArrayPatches.matched(path, BARCODES, positions=POSITIONS, um_per_px=UM_PER_PX)
    with h5py.File(path) as file:
        middle = file["img"][:, 8:24, 8:24].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(patches.read(np.arange(20), 16, 112.0), middle)
    assert len(kept) == 20


@pytest.mark.parametrize(
    ("attributes", "side_um", "message"),
    [
        ({"patch_size_target": 64}, None, r"states patches of 64 px, but its images are 32 px wide"),
        ({"patch_size_src": 224, "pixel_size": 0.25}, None, r"was cut at 0\.25 µm per pixel, but the slide has 0\.5"),
        ({"patch_size_src": 448}, 112.0, r"a patch shows 224 µm of tissue, but 112 µm is stated elsewhere"),
        ({"pixel_size": 0.5}, 112.0, r"a patch shows 16 µm of tissue, but 112 µm is stated"),
    ],
)
def test_statements_that_contradict_are_refused(
    tmp_path: Path, attributes: dict, side_um: float | None, message: str
) -> None:
    with pytest.raises(BadSection, match=message):
        matched(write(tmp_path / "p.h5", **attributes), side_um)


@pytest.mark.parametrize(
    "corners",
    [
        cut(),
        cut(positions=POSITIONS + 1.5),
        POSITIONS.astype(np.int64),  # centres
        np.zeros((20, 2)),  # one place for all says nothing
        cut()[None],
    ],
)
def test_patches_cut_around_their_spots_are_taken(tmp_path: Path, corners: np.ndarray) -> None:
    assert matched(write(tmp_path / "p.h5", corners=corners), 112.0) == 112.0


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        (cut()[np.r_[1, 0, 2:20]], r"patch of spot 'S0\d-1' cut 200 px away from the spot \(2 of 20 spots\)"),
        (cut()[::-1], r"px away from the spot"),
        (cut()[:, ::-1], r"px away from the spot"),
        (cut(positions=POSITIONS * 2), r"px away from the spot"),
        (cut(positions=POSITIONS / 2), r"px away from the spot"),
        (cut(positions=POSITIONS + 40), r"cut 72 px to the left of their spots and 72 px above, but .* 224 px wide"),
    ],
)
def test_patches_of_other_places_are_refused(tmp_path: Path, corners: np.ndarray, message: str) -> None:
    with pytest.raises(BadSection, match=message):
        matched(write(tmp_path / "p.h5", corners=corners), 112.0)


def test_width_by_place_alone(tmp_path: Path) -> None:
    assert matched(write(tmp_path / "p.h5", corners=cut(448))) == pytest.approx(224, abs=1)
    assert matched(write(tmp_path / "p.h5", corners=cut(448)), um_per_px=None) is None
    with pytest.raises(BadSection, match=r"cut 224 px to the left of their spots .* a patch is 224 px wide"):
        matched(write(tmp_path / "p.h5", corners=cut(448)), 112.0)
