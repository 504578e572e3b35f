"""What a file of patches says beside its pixels: how wide a patch is, and where it was cut.

facts_of   the statements of an HDF5 file, by value
width_um   how much tissue a patch shows; refuses a file that contradicts itself, the slide or the spots
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agl_bench.errors import BadSection

# Corners and widths are whole pixels of the scan, cut off or rounded, each at most one pixel from what was meant.
SLACK_PX = 2.0
SLACK = 0.05  # or as a share of the width, whichever is more: pixel sizes are estimates
_USUAL_UM = 112.0  # of HEST, 224 px at 0.5 µm: a stated width that is this but for whole pixels is this
_SOURCE = ("patch_size_src", "patch_size_level0")  # of HEST, of TRIDENT; pixels of the scan
_TARGET = ("patch_size_target", "patch_size")  # pixels of the stored patch


@dataclass(frozen=True)
class PatchFacts:
    """What a file of patches states.

    Attributes:
        path: the file, for messages.
        section: whose patches, for messages.
        side_px: pixels of a stored patch.
        attributes: numbers by name.
        coords: (patches, 2) in pixels of the scan, corners or centres; None where there are none.
    """

    path: Path
    section: str
    side_px: int
    attributes: Mapping[str, float]
    coords: np.ndarray | None

    def first(self, names: tuple[str, ...]) -> float | None:
        """The first of `names` that is stated."""
        return next((self.attributes[name] for name in names if name in self.attributes), None)


def facts_of(file: Any, path: Path, rows: int, section: str) -> PatchFacts:
    """The statements of an open HDF5 file with `img`.

    Args:
        file: of h5py.
        path: of the file, for messages.
        rows: barcodes in the file.
        section: name used in errors.

    Raises:
        BadSection: if it has another number of images or places than of barcodes.
    """
    images = file["img"]
    lengths = {"images": len(images), "barcodes": rows}
    coords = np.asarray(file["coords"][()], dtype=np.float64) if "coords" in file else None
    if coords is not None:
        coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
        lengths["coords"] = len(coords)
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise BadSection(
            section,
            f"{path} has {listing}, so it is unclear which image belongs to which barcode; write all of them for the "
            f"same patches, in the same order",
        )
    if coords is not None and coords.shape[1:] != (2,):
        raise BadSection(section, f"{path} has 'coords' {coords.shape}; they have to be (patches, 2)")
    attributes: dict[str, float] = {}
    for place in (images, file.get("coords"), file):
        for name, value in place.attrs.items() if place is not None else ():
            number = np.asarray(value).ravel()
            if number.size == 1 and number.dtype.kind in "iuf" and np.isfinite(number[0]) and number[0] > 0:
                attributes.setdefault(name, float(number[0]))
    return PatchFacts(path, section, int(images.shape[1]), attributes, coords)


def width_um(
    facts: PatchFacts,
    rows: np.ndarray,
    barcodes: np.ndarray,
    positions: np.ndarray | None,
    um_per_px: float | None,
    side_um: float | None,
) -> float | None:
    """µm of tissue that a patch shows, by what its file states and what is said of it; None = nobody says.

    Args:
        facts: of the file.
        rows: (spots,) patch of each spot.
        barcodes: (spots,) names of the spots.
        positions: (spots, 2) in pixels of the scan, (x, y) of the spot centres; None = not known.
        um_per_px: size of a pixel of the scan, if it is known.
        side_um: what a patch shows, where it is stated beside the file.

    Raises:
        BadSection: if the file contradicts itself, the slide, the positions or `side_um`.
    """
    stated = _stated_width(facts, um_per_px)
    if positions is not None:
        said = stated or side_um
        width_px = _width_by_place(facts, rows, barcodes, positions, said / um_per_px if said and um_per_px else None)
        if stated is None and width_px and um_per_px:
            stated = width_px * um_per_px
    if stated is None:
        return side_um
    meant = side_um or _USUAL_UM
    if abs(stated - meant) <= max(SLACK_PX * (um_per_px or 0.0), SLACK * meant):
        return meant
    if side_um is not None:
        raise BadSection(
            facts.section,
            f"according to {facts.path} a patch shows {stated:.4g} µm of tissue, but {side_um:g} µm is stated "
            f"elsewhere; state the width with which the patches were cut",
        )
    return stated


def _stated_width(facts: PatchFacts, um_per_px: float | None) -> float | None:
    """µm that a patch shows by the attributes of its file; None where they do not say.

    HEST writes patch_size_src (pixels of the scan), patch_size_target (pixels stored) and pixel_size (µm, of the scan
    or of the patch, by version).
    """
    source, target, pixel_um = facts.first(_SOURCE), facts.first(_TARGET[:1]), facts.attributes.get("pixel_size")
    if target is not None and target != facts.side_px:
        raise BadSection(
            facts.section,
            f"{facts.path} states patches of {target:g} px, but its images are {facts.side_px} px wide; cut them again",
        )
    if source is None:
        if pixel_um is None:
            return None
        return (facts.first(_TARGET) or facts.side_px) * pixel_um
    scan_um = um_per_px or pixel_um
    if scan_um is None:
        return None
    width = source * scan_um
    if pixel_um is not None and not (_near(pixel_um, scan_um) or _near(pixel_um * facts.side_px, width)):
        raise BadSection(
            facts.section,
            f"{facts.path} was cut at {pixel_um:g} µm per pixel, but the slide has {scan_um:g} µm per pixel; cut the "
            f"patches again, or correct the pixel size",
        )
    return width


def _width_by_place(
    facts: PatchFacts, rows: np.ndarray, barcodes: np.ndarray, positions: np.ndarray, width_px: float | None
) -> float | None:
    """Pixels of the scan that a patch is wide, by the distance of its corner from its spot; None = not known."""
    if facts.coords is None:
        return None
    known = np.isfinite(positions).all(axis=1)
    corners, centres = facts.coords[rows[known]], positions[known]
    if not len(corners) or not np.ptp(facts.coords, axis=0).any():
        return None  # one place for all says nothing
    offset = centres - corners
    middle = np.median(offset, axis=0)
    side = width_px or max(2 * float(middle.mean()), 0.0)
    slack = max(SLACK_PX, SLACK * side)
    away = np.abs(offset - middle).max(axis=1)
    strays = np.flatnonzero(away > slack)
    if len(strays):
        raise BadSection(
            facts.section,
            f"{facts.path} has the patch of spot '{barcodes[known][strays[0]]}' cut {away[strays[0]]:.0f} "
            f"px away from the spot ({len(strays)} of {len(away)} spots); check that both are from the same section "
            f"and scan, and that no barcodes were swapped",
        )
    at_corner = np.abs(middle - side / 2).max() <= slack
    if not (at_corner or np.abs(middle).max() <= slack):
        raise BadSection(
            facts.section,
            f"{facts.path} has patches cut {middle[0]:.0f} px to the left of their spots and {middle[1]:.0f} px above, "
            f"but a patch is {side:.0f} px wide; cut them around the spots",
        )
    return side if at_corner and side > slack else None


def _near(value: float, other: float) -> bool:
    return abs(value / other - 1) <= SLACK
