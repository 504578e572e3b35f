"""Patches of spots, cut from a slide image or taken from an array. The one home of h5py and Pillow.

ImagePatches    cuts from a slide image; the image is decoded once for each size of patch
ArrayPatches    patches cut beforehand: an HDF5 file in the HEST layout, or an array in memory
read_embedding  features computed beforehand, matched to spots by barcode or by place
read_uns        single values of an .h5ad file, without its counts
read_constants  columns of `obs` of an .h5ad file with one value for all spots, without its counts
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial import KDTree

from agl_bench.errors import BadSection

_LARGEST_IMAGE = 1_000_000_000  # pixels; decoding takes four bytes for each
_BLOCK = 256  # patches read from a file at once: 38 MB at 224 × 224
_CORNER_SLACK_PX = 2.0  # how far the centre of an embedded patch may be from its spot, in pixels
_CENTRE_SLACK = 0.05  # or as a share of the patch's width, whichever is more
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes that become RGB
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what Pillow raises, by format
_BROKEN_H5 = (OSError, KeyError, RuntimeError, ValueError)  # what h5py raises, by kind of damage


class _KeptPatches(ABC):
    """Patches read once for each (side_px, side_um) and kept, so that the cells of a grid do not decode again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, float], np.ndarray] = {}  # each uint8 (spots, 3, side_px, side_px)

    def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
        """Patches of the spots `rows`, uint8 (spots, 3, side_px, side_px), each `side_um` wide on the tissue."""
        key = (side_px, side_um)
        if key not in self._kept:
            self._kept[key] = self._read_all(side_px, side_um)
        return self._kept[key][np.asarray(rows, dtype=np.intp)]

    @abstractmethod
    def _read_all(self, side_px: int, side_um: float) -> np.ndarray:
        """Patches of all spots, uint8 (spots, 3, side_px, side_px)."""


class ImagePatches(_KeptPatches):
    """Cuts a square around each spot out of a slide image; white where a square leaves the image.

    The constructor reads the header of the image, `read` decodes it. Coordinates are continuous: pixel 0 reaches from
    0 to 1. A rotation noted in the file (EXIF) is not applied, because coordinates refer to the stored pixels.

    Args:
        source: path of a .jpg, .png or .tif, 8 bits for each channel, or the pixels themselves, uint8
            (height, width, 3): an array, or what has a shape and a dtype and becomes one when it is needed.
        positions: (spots, 2) in pixels, (x = column, y = row) of the spot centres.
        um_per_px: tissue micrometres for one pixel.
        section: name used in errors; the folder's name by default.

    Raises:
        BadSection: if the file is not an image that can be cut from.
    """

    def __init__(self, source: Any, positions: np.ndarray, um_per_px: float, *, section: str = "") -> None:
        super().__init__()
        self.source = source
        self.section = section or (source.parent.name if isinstance(source, Path) else "")
        what = str(source) if isinstance(source, Path) else "its image"
        try:
            self.positions = np.asarray(positions, dtype=np.float64)
        except (TypeError, ValueError):
            raise BadSection(self.section, "the positions of its spots are not numbers") from None
        self.um_per_px = um_per_px
        if isinstance(source, Path):
            with _image(source, self.section) as image:
                self.width, self.height = image.size
                mode = image.mode
            if mode not in _EIGHT_BIT:
                raise BadSection(self.section, f"{what} has pixels of Pillow mode '{mode}'; save it as 8-bit RGB")
        elif len(source.shape) == 3 and source.shape[2] == 3 and source.dtype == np.uint8:
            self.height, self.width = source.shape[:2]
        else:
            raise BadSection(
                self.section, f"{what} is {source.dtype} {source.shape}; it has to be uint8 (height, width, 3)"
            )
        if self.width * self.height > _LARGEST_IMAGE:
            raise BadSection(
                self.section,
                f"{what} has {self.width} × {self.height} pixels, too many to decode at once "
                f"(limit {_LARGEST_IMAGE:.0e}); cut the patches beforehand and give them as patches.h5",
            )

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the positions (spots, 2) in pixels, (x, y), that lie outside the image."""
        x, y = np.asarray(positions, dtype=np.float64).T
        inside = (x >= 0) & (x <= self.width) & (y >= 0) & (y <= self.height)
        return np.flatnonzero(~inside)

    def _read_all(self, side_px: int, side_um: float) -> np.ndarray:
        half = side_um / self.um_per_px / 2
        patches = np.empty((len(self.positions), 3, side_px, side_px), dtype=np.uint8)
        with self._opened() as opened:
            opened.load()
            image = opened if opened.mode == "RGB" else opened.convert("RGB")  # converting copies, even RGB
            for patch, (x, y) in zip(patches, self.positions, strict=True):
                patch[:] = _square(image, (x - half, y - half, x + half, y + half), side_px)
        return patches

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        if isinstance(self.source, Path):
            with _image(self.source, self.section) as image:
                yield image
        else:
            yield Image.fromarray(np.asarray(self.source))


class ArrayPatches(_KeptPatches):
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
        super().__init__()
        self.side_um = side_um
        self._source = source
        if isinstance(source, Path):
            self.section, what = section or source.parent.name, f"'img' of {source}"
            with _h5(source, self.section) as file:
                stored = _dataset(file, ("img",), source, self.section)
                shape, dtype = stored.shape, stored.dtype
        else:
            self.section, what = section, "the array of patches"
            shape, dtype = source.shape, source.dtype
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or dtype != np.uint8:
            raise BadSection(self.section, f"{what} is {dtype} {shape}; it has to be uint8 (patches, H, H, 3)")
        self.rows = np.arange(shape[0]) if rows is None else np.asarray(rows, dtype=np.intp)
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < shape[0]:
            raise BadSection(
                self.section,
                f"{what} has {shape[0]} patches, but rows {self.rows.min()} to {self.rows.max()} were asked for",
            )

    @classmethod
    def matched(
        cls, path: Path, barcodes: Sequence[str], side_um: float | None = None, *, section: str = ""
    ) -> tuple[ArrayPatches, np.ndarray]:
        """Patches found by the file's `barcode`, and the indices of the spots that have one.

        Args:
            path: HDF5 file with `img` (patches, H, H, 3) and `barcode` (patches,) or (patches, 1).
            barcodes: (spots,) names of the spots.
            side_um: as in the constructor.
            section: as in the constructor.

        Returns:
            The source, with one patch for each kept spot, and kept (kept spots,) int64.

        Raises:
            BadSection: if the file cannot be read, or no spot or a repeated barcode is in it.
        """
        section = section or path.parent.name
        with _h5(path, section) as file:
            stored = _barcodes(file, path, section)
        found = stored.get_indexer(pd.Index(barcodes))
        kept = np.flatnonzero(found >= 0)
        if not len(kept):
            raise _no_match(section, path, barcodes, stored)
        return cls(path, side_um, rows=found[kept], section=section), kept

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """None: a spot without a patch is left out when barcodes are matched."""
        return np.empty(0, dtype=np.int64)

    def _read_all(self, side_px: int, side_um: float) -> np.ndarray:
        patches = np.empty((len(self.rows), 3, side_px, side_px), dtype=np.uint8)
        if isinstance(self._source, Path):
            with _h5(self._source, self.section) as file:
                self._fill(patches, file["img"], side_um)
        else:
            self._fill(patches, self._source, side_um)
        return patches

    def _fill(self, patches: np.ndarray, stored: Any, side_um: float) -> None:
        """Read `stored` block by block, so that a large file is never in memory at its full size."""
        stored_px, side_px = stored.shape[1], patches.shape[2]
        part = 1.0 if self.side_um is None else side_um / self.side_um
        if part > 1 + 1e-6:
            raise BadSection(
                self.section,
                f"its patches show {self.side_um:g} µm of tissue, but {side_um:g} µm were asked for; "
                f"set protocol.patch_um to {self.side_um:g} or less",
            )
        edge = max(stored_px * (1 - part) / 2, 0.0)
        box = (edge, edge, stored_px - edge, stored_px - edge)
        spots = np.argsort(self.rows, kind="stable")
        rows = self.rows[spots]
        for start in range(0, stored.shape[0], _BLOCK):
            low, high = np.searchsorted(rows, (start, start + _BLOCK))
            if low == high:
                continue
            block = stored[start : start + _BLOCK]
            wanted = block[rows[low:high] - start]
            if edge == 0 and stored_px == side_px:
                patches[spots[low:high]] = wanted.transpose(0, 3, 1, 2)
            else:
                for spot, patch in zip(spots[low:high], wanted, strict=True):
                    patches[spot] = _square(Image.fromarray(patch), box, side_px)


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
    tolerance = max(_CORNER_SLACK_PX, _CENTRE_SLACK * float(side))
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


def read_uns(path: Path, *names: str, section: str = "") -> dict[str, Any]:
    """Single values (numbers, text) of `uns` of an .h5ad file; names that are absent are left out. Reads no counts.

    Raises:
        BadSection: if the file cannot be read.
    """
    found: dict[str, Any] = {}
    with _h5(path, section or path.parent.name) as file:
        for name in names:
            entry = file.get(f"uns/{name}")
            if isinstance(entry, h5py.Dataset) and entry.shape == ():
                value = entry[()]
                found[name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return found


def read_constants(path: Path, *names: str, section: str = "") -> dict[str, str]:
    """Columns of `obs` of an .h5ad file that hold one text or number for all spots; others are left out.

    Reads no counts.

    Raises:
        BadSection: if the file cannot be read.
    """
    found: dict[str, str] = {}
    with _h5(path, section or path.parent.name) as file:
        for name in names:
            column = file.get(f"obs/{name}")
            if isinstance(column, h5py.Group) and {"codes", "categories"} <= set(column):  # a categorical column
                codes = np.unique(column["codes"][()])
                # Code -1 is an absent value.
                values = column["categories"][()][codes[codes >= 0]] if len(codes) == 1 else np.empty(0)
            else:
                values = np.unique(column[()]) if isinstance(column, h5py.Dataset) else np.empty(0)
            if len(values) == 1:
                found[name] = values[0].decode(errors="replace") if isinstance(values[0], bytes) else str(values[0])
    return found


def _square(image: Image.Image, box: tuple[float, float, float, float], side_px: int) -> np.ndarray:
    """The square `box` = (left, top, right, bottom) of an RGB image, uint8 (3, side_px, side_px)."""
    left, top, right, bottom = box
    if left < 0 or top < 0 or right > image.width or bottom > image.height:
        # Pillow takes no box that leaves the image. The margin is what the bicubic filter sees beyond the box.
        margin = 2 * math.ceil(max((right - left) / side_px, 1.0)) + 1
        x, y = math.floor(left) - margin, math.floor(top) - margin
        canvas = Image.new("RGB", (math.ceil(right) + margin - x, math.ceil(bottom) + margin - y), "white")
        clip = (max(x, 0), max(y, 0), min(x + canvas.width, image.width), min(y + canvas.height, image.height))
        if clip[0] < clip[2] and clip[1] < clip[3]:
            canvas.paste(image.crop(clip), (clip[0] - x, clip[1] - y))
        image, box = canvas, (left - x, top - y, right - x, bottom - y)
    # Pillow widens the filter when it shrinks, so that nothing aliases.
    resized = image.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)


@contextmanager
def _image(path: Path, section: str) -> Iterator[Image.Image]:
    """An image opened by its header; damage becomes `BadSection`, also where it shows only while decoding."""
    guard = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # ordinary slides exceed Pillow's guard; `_LARGEST_IMAGE` is ours
    try:
        with Image.open(path) as image:
            yield image
    except _BROKEN_IMAGE as error:
        raise BadSection(
            section, f"{path} cannot be read as an image ({_reason(error)}); it is damaged or incomplete, replace it"
        ) from None
    finally:
        Image.MAX_IMAGE_PIXELS = guard


@contextmanager
def _h5(path: Path, section: str) -> Iterator[Any]:
    """An HDF5 file open for reading; damage becomes `BadSection`, also where it shows only while reading."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except _BROKEN_H5 as error:
        raise BadSection(
            section, f"{path} cannot be read as HDF5 ({_reason(error)}); it is damaged or incomplete, replace it"
        ) from None


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__


def _dataset(file: Any, names: tuple[str, ...], path: Path, section: str) -> Any:
    """The first of `names` that the file has."""
    for name in names:
        if isinstance(file.get(name), h5py.Dataset):
            return file[name]
    wanted = " or ".join(f"'{name}'" for name in names)
    raise BadSection(section, f"{path} has no dataset {wanted}; it has: {', '.join(sorted(file)) or 'nothing'}")


def _barcodes(file: Any, path: Path, section: str) -> pd.Index:
    """The file's barcodes (rows,); HEST writes bytes of shape (rows, 1)."""
    stored = _dataset(file, ("barcode", "barcodes"), path, section)[()].ravel()
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
