"""Patches of spots, cut from a slide image or taken from an array, and features of them.

ImagePatches    cuts from a slide image: decoded once, or region by region where it is tiled
ArrayPatches    patches cut beforehand: an HDF5 file in the HEST layout, or an array in memory
blocks_of       patches of any source block by block, in the order that is cheapest to read
read_embedding  features computed beforehand, matched to spots by barcode or by place
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial import KDTree

from agl_bench.data.patch_facts import SLACK, SLACK_PX, facts_of, width_um
from agl_bench.data.slides import BAND, SUFFIXES, Slide, open_slide, reason
from agl_bench.data.stored_pixels import check_array
from agl_bench.errors import FORBIDDEN, BadSection
from agl_bench.interfaces.spots import PatchSource

BLOCK = 256  # patches at once: 38 MB at 224 × 224
_OVERVIEW_ROWS = 64  # of an overview made at once
_BROKEN_H5 = (OSError, KeyError, RuntimeError, ValueError)  # what h5py raises, by kind of damage

Block = tuple[np.ndarray, np.ndarray]  # rows (n,) and their patches, uint8 (n, 3, side_px, side_px)


def blocks_of(source: PatchSource, rows: np.ndarray, side_px: int, side_um: float) -> Iterator[Block]:
    """The patches of `rows`, each once, at most `BLOCK` at a time, in any order.

    Sources of this module open their file once for all blocks; any other is asked to `read` each block.
    """
    if isinstance(source, _BlockPatches):
        yield from source.blocks(rows, side_px, side_um)
    else:
        for start in range(0, len(rows), BLOCK):
            here = rows[start : start + BLOCK]
            yield here, source.read(here, side_px, side_um)


class _BlockPatches(ABC):
    """Patches that are read block by block; nothing is kept."""

    def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
        """Patches of the spots `rows`, uint8 (spots, 3, side_px, side_px), each `side_um` wide on the tissue."""
        rows = np.asarray(rows, dtype=np.intp)
        once, back = np.unique(rows, return_inverse=True)
        patches = np.empty((len(once), 3, side_px, side_px), dtype=np.uint8)
        for here, block in self.blocks(once, side_px, side_um):
            patches[np.searchsorted(once, here)] = block
        return patches if np.array_equal(once, rows) else patches[back]

    @abstractmethod
    def blocks(self, rows: np.ndarray, side_px: int, side_um: float) -> Iterator[Block]:
        """The patches of distinct `rows`, at most `BLOCK` at a time, in the order that is cheapest to read."""


class ImagePatches(_BlockPatches):
    """Cuts a square around each spot out of a slide image; white where a square leaves the image.

    The constructor reads the header of the image, `read` its pixels: of a tiled or pyramidal file only what is needed,
    at the level that is just fine enough. Coordinates are those of the full size and continuous: pixel 0 reaches from
    0 to 1. An orientation noted in the file (EXIF, TIFF) is not applied: coordinates refer to the stored pixels.

    Args:
        source: path of a .jpg, .png, .tif or a whole-slide image (.svs, .ndpi, .mrxs, …), one plane of 8-bit colour or
            grey; or the pixels themselves, uint8 (height, width, 3): an array, or what is sliced like one.
        positions: (spots, 2) in pixels, (x = column, y = row) of the spot centres.
        um_per_px: tissue micrometres for one pixel.
        section: name used in errors; the folder's name by default.

    Raises:
        BadSection: if the file is not an image that can be cut from.

    Attributes:
        SUFFIXES: how names of image files end, in small letters.
    """

    SUFFIXES: ClassVar[tuple[str, ...]] = SUFFIXES

    def __init__(self, source: Any, positions: np.ndarray, um_per_px: float, *, section: str = "") -> None:
        self.source = source = Path(source) if isinstance(source, str) else source
        self.section = section or (source.parent.name if isinstance(source, Path) else "")
        try:
            self.positions = np.asarray(positions, dtype=np.float64)
        except (TypeError, ValueError):
            raise BadSection(self.section, "the positions of its spots are not numbers") from None
        self.um_per_px = um_per_px
        with open_slide(source, self.section) as slide:
            self.width, self.height = slide.width, slide.height

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the positions (spots, 2) in pixels, (x, y), that lie outside the image."""
        x, y = np.asarray(positions, dtype=np.float64).T
        inside = (x >= 0) & (x <= self.width) & (y >= 0) & (y <= self.height)
        return np.flatnonzero(~inside)

    def blocks(self, rows: np.ndarray, side_px: int, side_um: float) -> Iterator[Block]:
        """Patches in the order of rows of tiles, so that neighbours are read together."""
        half = side_um / self.um_per_px / 2
        x, y = self.positions[rows].T
        rows = rows[np.lexsort((x, y // BAND))]
        with open_slide(self.source, self.section) as slide:
            for start in range(0, len(rows), BLOCK):
                here = rows[start : start + BLOCK]
                patches = np.empty((len(here), 3, side_px, side_px), dtype=np.uint8)
                for patch, (x, y) in zip(patches, self.positions[here], strict=True):
                    patch[:] = _square(slide, (x - half, y - half, x + half, y + half), side_px)
                yield here, patches

    def overview(self, longest: int) -> tuple[np.ndarray, float]:
        """The whole image at a small size, uint8 (h, w, 3), and how many pixels of the full size one of its has.

        Args:
            longest: pixels of the longer side.
        """
        with open_slide(self.source, self.section) as slide:
            scale = max(max(slide.width, slide.height) / longest, 1.0)
            shape = max(round(slide.height / scale), 1), max(round(slide.width / scale), 1), 3
            small = np.empty(shape, dtype=np.uint8)
            level = slide.level(scale)
            width, height = slide.levels[level]
            for row in range(0, len(small), _OVERVIEW_ROWS):  # a flat file of any size is read in bands
                band = small[row : row + _OVERVIEW_ROWS]
                top, bottom = row * height / len(small), (row + len(band)) * height / len(small)
                first = math.floor(top)
                pixels = Image.fromarray(slide.region(level, 0, first, width, min(math.ceil(bottom), height)))
                box = (0, top - first, width, min(bottom - first, pixels.height))
                band[:] = np.asarray(pixels.resize((shape[1], len(band)), Image.Resampling.BOX, box=box))
        return small, scale


class ArrayPatches(_BlockPatches):
    """Patches cut beforehand: an HDF5 file with `img` (HEST layout), read when asked for, or an array in memory.

    Args:
        source: path of the HDF5 file, or the array itself; uint8 RGB (patches, H, H, 3) either way.
        side_um: how much tissue a patch shows; a smaller part is cut from the middle. None = not known, the patch is
            used whole whatever is asked for.
        rows: (spots,) row of the source for each spot; all rows in order by default.
        section: name used in errors; the folder's name by default.

    Raises:
        BadSection: if the file cannot be read or has another layout.
    """

    def __init__(
        self,
        source: Path | np.ndarray,
        side_um: float | None = None,
        *,
        rows: np.ndarray | None = None,
        section: str = "",
    ) -> None:
        self.side_um = side_um
        self._source = source
        if isinstance(source, Path):
            self.section, what = section or source.parent.name, f"'img' of {source}"
            with _h5(source, self.section) as file:
                stored = _dataset(file, ("img",), source, self.section)
                check_array(stored, ("patches", "H", "H"), what, self.section)
                count = stored.shape[0]
        else:
            self.section, what = section, "the array of patches"
            check_array(source, ("patches", "H", "H"), what, self.section)
            count = source.shape[0]
        self.rows = np.arange(count) if rows is None else np.asarray(rows, dtype=np.intp)
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < count:
            raise BadSection(
                self.section,
                f"{what} has {count} patches, but rows {self.rows.min()} to {self.rows.max()} were requested",
            )

    @classmethod
    def matched(
        cls,
        path: Path,
        barcodes: Sequence[str],
        side_um: float | None = None,
        *,
        positions: np.ndarray | None = None,
        um_per_px: float | None = None,
        section: str = "",
    ) -> tuple[ArrayPatches, np.ndarray]:
        """Patches found by the file's `barcode`, and the indices of the spots that have one.

        How much tissue a patch shows is what `side_um` says and what the file says, by its attributes or by the
        distance of `coords` from the spots.

        Args:
            path: HDF5 file with `img` (patches, H, H, 3), `barcode` (patches,) or (patches, 1), and where it has them
                `coords` (patches, 2), corners or centres in pixels of the scan.
            barcodes: (spots,) names of the spots.
            side_um: as in the constructor.
            positions: (spots, 2) in pixels of the scan, (x, y); what `coords` are compared with.
            um_per_px: size of a pixel of the scan; what widths in pixels are told by.
            section: as in the constructor.

        Returns:
            The source, with one patch for each kept spot, and kept (kept spots,) int64.

        Raises:
            BadSection: if the file cannot be read, or no spot or a repeated barcode is in it, or if it contradicts
                itself, the positions or `side_um`.
        """
        section = section or path.parent.name
        patches = cls(path, side_um, section=section)
        with _h5(path, section) as file:
            stored = _barcodes(file, path, section)
            facts = facts_of(file, path, len(stored), section)
        found = stored.get_indexer(pd.Index(barcodes))
        kept = np.flatnonzero(found >= 0)
        if not len(kept):
            raise _no_match(section, path, barcodes, stored)
        patches.rows = found[kept]
        places = None if positions is None else np.asarray(positions, dtype=np.float64)[kept]
        patches.side_um = width_um(facts, patches.rows, np.asarray(barcodes)[kept], places, um_per_px, side_um)
        return patches, kept

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """None: a spot without a patch is left out when barcodes are matched."""
        return np.empty(0, dtype=np.int64)

    def blocks(self, rows: np.ndarray, side_px: int, side_um: float) -> Iterator[Block]:
        """Patches in the order of the file, so that each of its blocks is read once."""
        part = 1.0 if self.side_um is None else side_um / self.side_um
        if part > 1 + 1e-6:
            raise BadSection(
                self.section,
                f"its patches show {self.side_um:g} µm of tissue, but {side_um:g} µm were asked for; "
                f"set protocol.patch_um to {self.side_um:g} or less",
            )
        if isinstance(self._source, Path):
            with _h5(self._source, self.section) as file:
                yield from self._blocks(file["img"], rows, side_px, part)
        else:
            yield from self._blocks(self._source, rows, side_px, part)

    def _blocks(self, stored: Any, rows: np.ndarray, side_px: int, part: float) -> Iterator[Block]:
        stored_px = stored.shape[1]
        edge = max(stored_px * (1 - part) / 2, 0.0)
        box = (edge, edge, stored_px - edge, stored_px - edge)
        rows = rows[np.argsort(self.rows[rows], kind="stable")]
        places = self.rows[rows]
        for start in range(0, stored.shape[0], BLOCK):
            low, high = np.searchsorted(places, (start, start + BLOCK))
            if low == high:
                continue
            wanted = stored[start : start + BLOCK][places[low:high] - start]
            for first in range(0, len(wanted), BLOCK):  # several spots may share a patch
                some = wanted[first : first + BLOCK]
                if edge == 0 and stored_px == side_px:
                    patches = np.ascontiguousarray(some.transpose(0, 3, 1, 2))
                else:
                    patches = np.stack([_resized(Image.fromarray(patch), box, side_px) for patch in some])
                yield rows[low + first : low + first + len(some)], patches


def read_embedding(
    path: Path, barcodes: Sequence[str], positions: np.ndarray | None = None, *, section: str = ""
) -> np.ndarray:
    """Features computed beforehand, float32 (spots, width), in the order of `barcodes`.

    HEST-bench writes `embeddings` and `barcodes`. TRIDENT writes `features` and `coords`, the upper left corners of
    the patches in pixels of the slide, and their width as an attribute of `coords`; a spot takes the patch whose
    centre it is.

    Args:
        path: HDF5 file with `embeddings`, `features` or `feats` (rows, width) or (1, rows, width), and either
            `barcode` or `barcodes` (rows,) or `coords` (rows, 2).
        barcodes: (spots,) names of the spots.
        positions: (spots, 2) in pixels, (x, y) of the spot centres; needed where the file has no barcodes.
        section: name used in errors; the folder's name by default.

    Raises:
        BadSection: if the file cannot be read, has another layout or lacks a spot.
    """
    section = section or path.parent.name
    with _h5(path, section) as file:
        stored_features = _dataset(file, ("embeddings", "features", "feats"), path, section)
        if stored_features.dtype.kind not in "iuf":
            raise BadSection(section, f"{path} has features of type {stored_features.dtype}; they have to be numbers")
        features: np.ndarray = np.asarray(stored_features[()], dtype=np.float32)
        if features.ndim == 3 and len(features) == 1:
            features = features[0]
        if "coords" in file and not {"barcode", "barcodes"} & set(file):
            found, rows = _found_by_place(file["coords"], path, positions, section)
            lacks = "patch around it"
        else:
            stored = _barcodes(file, path, section)
            found, rows = stored.get_indexer(pd.Index(barcodes)), len(stored)
            lacks = "features"
            if "coords" in file and rows not in file["coords"].shape[:2]:
                raise BadSection(
                    section, f"{path} has {rows} barcodes, but coords of shape {file['coords'].shape}; write both again"
                )
            if (found < 0).all():
                raise _no_match(section, path, barcodes, stored)
    if features.ndim != 2 or len(features) != rows:
        raise BadSection(section, f"{path} has features {features.shape} for {rows} rows; it has to be (rows, width)")
    lacking = np.flatnonzero(found < 0)
    if len(lacking):
        raise BadSection(
            section,
            f"{path} has no {lacks} for {len(lacking)} of {len(found)} spots, the first is '{barcodes[lacking[0]]}'; "
            f"compute them again for these spots, or take them out of the counts",
        )
    matched: np.ndarray = features[found]
    return matched


def _found_by_place(coords: Any, path: Path, positions: np.ndarray | None, section: str) -> tuple[np.ndarray, int]:
    """Row of the patch centred on each spot, -1 where there is none, and how many rows the file has."""
    side = next((coords.attrs[key] for key in ("patch_size_level0", "patch_size") if key in coords.attrs), None)
    if side is None or positions is None:
        lacking = "its 'coords' have no attribute patch_size_level0" if side is None else "the spots have no positions"
        raise BadSection(
            section, f"{path} names no barcodes and {lacking}, so its rows cannot be matched to spots; add 'barcodes'"
        )
    corners = np.asarray(coords[()], dtype=np.float64)
    if corners.ndim == 3 and len(corners) == 1:
        corners = corners[0]
    if corners.ndim != 2 or corners.shape[1] != 2 or not len(corners):
        raise BadSection(section, f"{path} has 'coords' {corners.shape}; they have to be (rows, 2)")
    # Corners are whole pixels, and a patch is at times one pixel wider than asked for.
    tolerance = max(SLACK_PX, SLACK * float(side))
    centres = np.asarray(positions, dtype=np.float64)
    known = np.isfinite(centres).all(axis=1)
    distance, row = np.full(len(centres), np.inf), np.zeros(len(centres), dtype=np.int64)
    distance[known], row[known] = KDTree(corners + float(side) / 2).query(centres[known])
    found = np.where(distance <= tolerance, row, -1)
    if (found < 0).all():
        raise BadSection(
            section,
            f"no patch of {path} is centred on a spot: the nearest centre is {distance.min():.0f} px away "
            f"({tolerance:.0f} px are allowed); embed patches cut around the spots, in pixels of the same image",
        )
    return found, len(corners)


def _square(slide: Slide, box: tuple[float, float, float, float], side_px: int) -> np.ndarray:
    """The square `box` = (left, top, right, bottom) in pixels of the full size, uint8 (3, side_px, side_px)."""
    level = slide.level((box[2] - box[0]) / side_px)
    width, height = slide.levels[level]
    across, down = slide.scales(level)
    left, top, right, bottom = box[0] / across, box[1] / down, box[2] / across, box[3] / down
    # What the bicubic filter sees beyond the box: of the image where it goes on, white where the box leaves it.
    margin = 2 * math.ceil(max((right - left) / side_px, 1.0)) + 1
    low_x, high_x = _seen(left, right, margin, width)
    low_y, high_y = _seen(top, bottom, margin, height)
    clip = max(low_x, 0), max(low_y, 0), min(high_x, width), min(high_y, height)
    inside = clip[0] < clip[2] and clip[1] < clip[3]
    if inside and clip == (low_x, low_y, high_x, high_y):
        pixels = slide.region(level, *clip)
    else:
        pixels = np.full((high_y - low_y, high_x - low_x, 3), 255, dtype=np.uint8)
        if inside:
            rows, columns = slice(clip[1] - low_y, clip[3] - low_y), slice(clip[0] - low_x, clip[2] - low_x)
            pixels[rows, columns] = slide.region(level, *clip)
    inner = (left - low_x, top - low_y, right - low_x, bottom - low_y)
    return _resized(Image.fromarray(pixels), inner, side_px)


def _seen(low: float, high: float, margin: int, size: int) -> tuple[int, int]:
    """First and last + 1 pixel that matter for a box from `low` to `high` along an axis of `size` pixels."""
    first, last = math.floor(low), math.ceil(high)
    first, last = first - margin, last + margin
    return (max(first, 0) if low >= 0 else first), (min(last, size) if high <= size else last)


def _resized(image: Image.Image, box: tuple[float, float, float, float], side_px: int) -> np.ndarray:
    """The square `box` = (left, top, right, bottom) of an RGB image, uint8 (3, side_px, side_px)."""
    # Pillow widens the filter when it shrinks, so that nothing aliases.
    resized = image.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)


@contextmanager
def _h5(path: Path, section: str) -> Iterator[Any]:
    """An HDF5 file open for reading; damage becomes `BadSection`, also where it shows only while reading."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except PermissionError:
        raise BadSection(section, f"{path} {FORBIDDEN}") from None
    except _BROKEN_H5 as error:
        raise BadSection(
            section, f"{path} cannot be read as HDF5 ({reason(error)}); it is damaged or incomplete, replace it"
        ) from None


def _dataset(file: Any, names: tuple[str, ...], path: Path, section: str) -> Any:
    """The first of `names` that the file has."""
    for name in names:
        if isinstance(file.get(name), h5py.Dataset):
            return file[name]
    wanted = " or ".join(f"'{name}'" for name in names)
    raise BadSection(section, f"{path} has no dataset {wanted}; it has: {', '.join(sorted(file)) or 'nothing'}")


def _barcodes(file: Any, path: Path, section: str) -> pd.Index:
    """The file's barcodes (rows,); HEST writes bytes of shape (rows, 1)."""
    stored = _dataset(file, ("barcode", "barcodes"), path, section)[()]
    if np.shape(stored)[:1] != (np.size(stored),):
        raise BadSection(section, f"{path} has barcodes {np.shape(stored)}; there has to be one for each patch")
    stored = np.ravel(stored)
    index = pd.Index([code.decode(errors="replace") if isinstance(code, bytes) else str(code) for code in stored])
    if not index.is_unique:
        raise BadSection(section, f"{path} has barcode '{index[index.duplicated()][0]}' more than once")
    return index


def _no_match(section: str, path: Path, barcodes: Sequence[str], stored: pd.Index) -> BadSection:
    example = f"'{stored[0]}'" if len(stored) else "nothing"
    counted = f"'{barcodes[0]}'" if len(barcodes) else "nothing"
    return BadSection(
        section,
        f"no barcode of {path} is a spot of the counts: the file has {example}, the counts have {counted}; "
        f"make the names equal, or check that both files are of the same section",
    )
