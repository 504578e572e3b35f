"""What Space Ranger says twice about a sample, compared: array and positions, scale factors, pictures, image.

array_scale       the size of a pixel; refuses positions that are not those of the array
check_spots       refuses a size of spots that no array has
pictures_in       the reduced pictures that are there
check_pictures    refuses an image that is not the one that Space Ranger was given
bin_width         µm of the bins of Visium HD
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from agl_bench import BadSection, ImagePatches, fit_array
from agl_bench_plugins.datasets.folder import positive_or_0
from agl_bench_plugins.datasets.space_ranger import COLUMNS, PLACES

SCALES = "scalefactors_json.json"
HIRES = "tissue_hires_image.png"
_PICTURES = {"tissue_hires_scalef": HIRES, "tissue_lowres_scalef": "tissue_lowres_image.png"}
_PITCH_UM = 100.0  # of the hexagonal array: a column is half of it, a row √3/2 of it
# Rows and columns of a capture area of 6.5 mm, as seen in its images. The larger one, of 11 mm, is numbered from the
# other side: in tables that its users have published, the array is mirrored, with the row or the column reversed.
_ROWS, _COLUMNS = 78, 128
_OFF_UM = 25.0  # that a spot may be away from where the array says: positions are computed, not measured
_STRETCH = 1.1  # registration stretches by 1 % or so, swapped rows and columns by factors
_STATED = 0.05  # microns_per_pixel is computed from the same transform; another image is wrong by factors
# 55 µm by the maker; Space Ranger 1 writes 65 µm for the same spots. 15 % on either side.
_SPOT_UM = (45.0, 75.0)
_BIN_SLACK = 0.15
_SIDE_PX = 2.0  # Space Ranger rounds the sides of its reduced pictures to whole pixels
_LOOKED_AT = 64  # spots whose surroundings are compared in the image and in the reduced picture
_LOOK_UM, _LOOK_PX = 200.0, 8
# Correlation of grey levels. On her2st, 0.98 and more for the same image, also compressed hard or with another gamma;
# 0.33 and less for other sections, turned, mirrored, or shifted by 70 µm; 0.7 for a shift of 20 µm.
_ALIKE = 0.7
_FLAT = 2.0  # grey levels; less says nothing


def bin_width(scales: Mapping[str, object], barcodes: pd.Index, section: str) -> float:
    """µm of a bin of Visium HD, 0 for spots of Visium."""
    found = barcodes.str.extract(r"^s_(\d+)um_(\d+)_(\d+)-\d+$")[0].dropna().unique()
    stated = positive_or_0(scales.get("bin_size_um"))
    named = float(found[0]) if len(found) else 0.0
    if len(found) > 1 or (stated and named and stated != named):
        raise BadSection(
            section,
            f"its barcodes name bins of {' and '.join(str(int(width)) for width in found)} µm, but {SCALES} states "
            f"bin_size_um = {stated:g}; take all files from one folder of binned_outputs",
        )
    return named or stated


def array_scale(
    scales: Mapping[str, object],
    table: pd.DataFrame,
    whole: pd.DataFrame,
    path: Path,
    bin_um: float,
    mirrored: bool,
    section: str,
) -> float:
    """µm of a full-resolution pixel: as stated, or by the array that the pixels are of.

    Args:
        scales: as Space Ranger states them.
        table: positions of the spots of the matrix.
        whole: positions of all spots of the array.
        path: of the positions, for messages.
        bin_um: µm of a bin, 0 for spots.
        mirrored: whether the array may be seen from its back.
        section: name used in errors.

    Raises:
        BadSection: if positions and array contradict each other or what is stated, or nothing says the size.
    """
    _check_bins(table, path, section)
    stated = positive_or_0(scales.get("microns_per_pixel"))
    whole = whole[np.isfinite(whole[list(COLUMNS[2:])]).all(axis=1)]
    fit = fit_array(
        whole["array_row"].to_numpy(),
        whole["array_col"].to_numpy(),
        whole[PLACES[::-1]].to_numpy(),
        hexagonal=not bin_um,
    )
    if fit is None:
        if stated:
            return stated  # a missing position is told when the section is checked
        if np.isfinite(table).all(axis=None):
            raise BadSection(
                section, f"the pixel size is not stated in {SCALES} and cannot be computed from {len(table)} spots"
            )
        raise BadSection(section, f"{path} has positions that are not numbers; copy it again")
    pitch_um = bin_um or _PITCH_UM
    strays = np.flatnonzero(fit.off * pitch_um > _OFF_UM)
    if len(strays) or fit.stretch > _STRETCH:
        raise BadSection(
            section,
            f"{path} puts spot '{whole.index[strays[0] if len(strays) else 0]}' off its place on the array "
            f"({len(strays) or len(whole)} spots); the columns {', '.join(COLUMNS[2:])} do not belong together",
        )
    if fit.mirrored and not (mirrored or bin_um or _is_large(whole)):
        raise BadSection(
            section,
            f"{path} shows the array mirrored, as if pxl_row_in_fullres and pxl_col_in_fullres were swapped or the "
            f"image flipped; correct them, or use --set visium.mirrored=true if the scan itself is mirrored",
        )
    if stated and abs(stated * fit.pitch_px / pitch_um - 1) > _STATED:
        raise BadSection(
            section,
            f"{SCALES} states {stated:g} µm per pixel, but in {path.name} neighbours are {fit.pitch_px:.4g} px or "
            f"{pitch_um:g} µm apart, which makes it {pitch_um / fit.pitch_px:.4g} µm; take both from the same run",
        )
    return stated or (_similar(table) if not bin_um else 0.0) or pitch_um / fit.pitch_px


def _is_large(whole: pd.DataFrame) -> bool:
    """Whether the array is that of a capture area of 11 mm."""
    return bool(whole["array_row"].max() >= _ROWS or whole["array_col"].max() >= _COLUMNS)


def _similar(table: pd.DataFrame) -> float:
    """µm of a pixel by the rotation, mirroring and scale that lay the array best over the spots; 0 for too few."""
    place = (table["pxl_col_in_fullres"] + 1j * table["pxl_row_in_fullres"]).to_numpy(dtype=np.complex128)
    array = (table["array_col"] * _PITCH_UM / 2 + 1j * table["array_row"] * _PITCH_UM * math.sqrt(3) / 2).to_numpy(
        dtype=np.complex128
    )
    if len(table) < 3 or not (np.isfinite(place).all() and np.isfinite(array).all()):
        return 0.0
    place, array = place - place.mean(), array - array.mean()
    extent = np.vdot(array, array).real
    slope = max(abs(np.vdot(side, place)) for side in (array, array.conj())) / extent if extent else 0.0
    return float(1 / slope) if slope else 0.0


def _check_bins(table: pd.DataFrame, path: Path, section: str) -> None:
    """Refuse bins whose barcode, which is their row and column, says otherwise than the columns of the table."""
    named = table.index.to_series().str.extract(r"^s_\d+um_(\d+)_(\d+)-\d+$").astype(np.float64).to_numpy()
    differs = (named != table[["array_row", "array_col"]].to_numpy()) & np.isfinite(named)
    wrong = np.flatnonzero(differs.any(axis=1))
    if len(wrong):
        raise BadSection(
            section,
            f"array_row or array_col of bin '{table.index[wrong[0]]}' in {path} contradicts its barcode "
            f"({len(wrong)} bins); copy the table again",
        )


def check_spots(scales: Mapping[str, object], um_per_px: float, bin_um: float, section: str) -> float:
    """µm of a spot as stated, 0 where it is not; refuses a size that spots or bins do not have."""
    spot_um = positive_or_0(scales.get("spot_diameter_fullres")) * um_per_px
    low, high = (bin_um * (1 - _BIN_SLACK), bin_um * (1 + _BIN_SLACK)) if bin_um else _SPOT_UM
    if spot_um and not low <= spot_um <= high:
        meant = f"bins are {bin_um:g} µm wide" if bin_um else "spots of Visium are 55 µm wide"
        raise BadSection(
            section,
            f"spot_diameter_fullres in {SCALES} is {spot_um:.3g} µm at {um_per_px:.4g} µm per pixel, but {meant}; "
            f"take scale factors and positions from the same run, in pixels of the same image",
        )
    return spot_um


def pictures_in(spatial: Path) -> list[Path]:
    """The reduced pictures of Space Ranger that are there."""
    return [spatial / name for name in _PICTURES.values() if (spatial / name).is_file()]


def check_pictures(
    image: ImagePatches | None,
    spatial: Path,
    scales: Mapping[str, object],
    positions: np.ndarray,
    um_per_px: float,
    section: str,
) -> None:
    """Refuse an image that is not the one that Space Ranger made its reduced pictures of, by size and content.

    Args:
        image: of the full resolution; None where it is not used.
        spatial: folder of the pictures.
        scales: as Space Ranger states them.
        positions: (spots, 2) in full-resolution pixels, (x, y).
        um_per_px: size of a full-resolution pixel.
        section: name used in errors.
    """
    reference: tuple[Path, float, ImagePatches] | None = None
    for key, name in _PICTURES.items():
        factor, path = positive_or_0(scales.get(key)), spatial / name
        if not factor or not path.is_file():
            continue
        picture = ImagePatches(path, positions * factor, um_per_px / factor, section=section)
        told = f"{path.name} ({picture.width} × {picture.height} px, {key} = {factor:.4g})"
        if image is not None and not _same_size(picture, factor, image, 1.0):
            raise BadSection(
                section,
                f"{image.source} is {image.width} × {image.height} px, but {told} was made from one of "
                f"{picture.width / factor:.0f} × {picture.height / factor:.0f} px; use exactly the image that Space "
                f"Ranger was given, not another export or a reduced copy of the slide",
            )
        if reference is not None and not _same_size(picture, factor, reference[2], reference[1]):
            raise BadSection(
                section,
                f"{told} is not from the same image as {reference[0].name} ({reference[2].width} × "
                f"{reference[2].height} px, scale factor {reference[1]:.4g}); copy {spatial} from one run",
            )
        if image is not None and reference is None and not _same_content(picture, image):
            raise BadSection(
                section,
                f"{image.source} shows different tissue around the spots than {path}; use the image that Space "
                f"Ranger was given for this section, neither rotated nor mirrored",
            )
        reference = reference or (path, factor, picture)


def _same_size(picture: ImagePatches, factor: float, other: ImagePatches, other_factor: float) -> bool:
    """Whether both are of one image but for the rounding of their sides."""
    part = factor / other_factor
    slack = _SIDE_PX * (1 + (part if other_factor < 1 else 0.0))
    return abs(picture.width - other.width * part) <= slack and abs(picture.height - other.height * part) <= slack


def _same_content(picture: ImagePatches, image: ImagePatches) -> bool:
    """Whether the surroundings of spots look alike in both; true where nothing is to be seen."""
    known = np.flatnonzero(np.isfinite(image.positions).all(axis=1))
    if not len(known):
        return True
    rows = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), _LOOKED_AT)).astype(np.intp))]
    grey = [each.read(rows, _LOOK_PX, _LOOK_UM).mean(axis=1).ravel() for each in (picture, image)]
    return min(np.std(grey, axis=1)) < _FLAT or float(np.corrcoef(grey)[0, 1]) >= _ALIKE
