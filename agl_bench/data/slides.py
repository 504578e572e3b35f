"""Slide images of any size, read region by region. The one home of tifffile, OpenSlide and libvips.

_Decoded    Pillow: .jpg and .png, decoded once, whole
_Streamed   libvips, where the extra `wsi` is installed: a large .jpg or .png, decoded from top to bottom
_Tiff       tifffile: .tif, .ome.tif, .svs, .ndpi; tiled, pyramidal or large: only the tiles that a region touches
_OpenSlide  OpenSlide, where the extra `wsi` is installed: .mrxs, .scn, .bif, .vms, .dcm
_Pixels     an array, or what is sliced like one: in memory, or chunks of a store

All give the same pixels of the same content: what stored samples mean is decided in `stored_pixels`; what is resized,
and how, is the matter of `patches`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from agl_bench.data.stored_pixels import (
    Layout,
    check_array,
    check_colour_space,
    check_plain,
    colour_space,
    main_series,
    on_glass,
)
from agl_bench.errors import FORBIDDEN, BadSection

if TYPE_CHECKING:
    from tifffile import TiffPageSeries

for _library in ("tifffile", "pyvips"):  # what is wrong with a file is said once, by us
    logging.getLogger(_library).addHandler(logging.NullHandler())
    logging.getLogger(_library).propagate = False
# Where one tile is damaged, zarr lets go of the tasks of the others, and asyncio would print a traceback for each.
logging.getLogger("asyncio").addFilter(lambda record: not re.search(r"\bzarr\b", record.getMessage()))

_LARGEST_DECODED = 1_000_000_000  # pixels of an image that cannot be read in part; Pillow takes four bytes for each
_LARGE_TIFF = 100_000_000  # pixels; a larger file is read in part though it has strips and no tiles
_JPEG_2000_YCBCR = 33003  # Aperio's; tifffile leaves the colours as they are, OpenSlide makes them RGB
_LARGEST_TEXT = 2**28  # bytes of a note or profile in a PNG
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what Pillow raises, by format
_LARGE_STREAM = 150_000_000  # pixels; from here on a .jpg or .png is not decoded whole where libvips is there
BAND = 512  # rows of an image that are read together; regions come in this order
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OPENSLIDE_ONLY = (".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".btf", ".svs", ".ndpi", *_OPENSLIDE_ONLY)
_SAME_SCALE = 1.01  # a level this much too coarse is fine enough


class Slide(ABC):
    """An open image.

    Attributes:
        levels: (width, height) of each level in pixels, the full size first, then coarser ones.
    """

    levels: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """Pixels of the full size."""
        return self.levels[0][0]

    @property
    def height(self) -> int:
        """Pixels of the full size."""
        return self.levels[0][1]

    def level(self, scale: float) -> int:
        """The coarsest level that has a pixel for every `scale` pixels of the full size."""
        fine = [i for i in range(len(self.levels)) if max(self.scales(i)) <= max(scale, 1.0) * _SAME_SCALE]
        return max(fine, key=self.scales)

    def scales(self, level: int) -> tuple[float, float]:
        """Pixels of the full size for one of the level, across and down."""
        width, height = self.levels[level]
        return _scale(self.width, width), _scale(self.height, height)

    @abstractmethod
    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels inside the image, uint8 RGB (bottom − top, right − left, 3), bounds in pixels of the level."""


@contextmanager
def open_slide(source: Any, section: str) -> Iterator[Slide]:
    """An image opened by its header: a path, or pixels (height, width, 3).

    Raises:
        BadSection: if it is no image, holds other than one plane of 8-bit colour or grey, is damaged (also where that
            shows only while reading), is too large to be decoded whole, or needs OpenSlide and there is none.
    """
    if not isinstance(source, Path):
        yield _Pixels(source, section)
    elif source.suffix.lower() in _OPENSLIDE_ONLY:
        with _open_openslide(source, section) as slide:
            yield slide
    elif _is_tiff(source, section):
        with _open_tiff(source, section) as tiff:
            yield tiff
    else:
        with _open_decoded(source, section) as decoded:
            yield decoded


def reason(error: BaseException) -> str:
    """What an error of a library says, without its file name."""
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__


def _scale(full: int, size: int) -> float:
    """How many times smaller a level is: a whole number where its size is that of a division rounded up or down."""
    whole = max(round(full / size), 1)
    return whole if size in (full // whole, -(-full // whole)) else full / size


# Pixels --------------------------------------------------------------------------------------------------------------


class _Pixels(Slide):
    def __init__(self, pixels: Any, section: str) -> None:
        check_array(pixels, ("height", "width"), "its image", section)
        self._pixels = pixels
        self.levels = ((pixels.shape[1], pixels.shape[0]),)

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`."""
        return np.ascontiguousarray(self._pixels[top:bottom, left:right])


# Pillow --------------------------------------------------------------------------------------------------------------


@contextmanager
def _pillow() -> Iterator[None]:
    """Pillow without its guards against bombs, which ordinary slides exceed, and without its warnings."""
    guards = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, _LARGEST_TEXT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = guards


class _Decoded(Slide):
    def __init__(self, image: Image.Image, path: Path, section: str) -> None:
        self._image, self._is_decoded = image, False
        self._path, self._section = path, section
        self.levels = (image.size,)

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`."""
        try:
            with _pillow():
                if not self._is_decoded:
                    self._image.load()
                    self._is_decoded = True
                return on_glass(self._image.crop((left, top, right, bottom)))
        except _BROKEN_IMAGE as error:
            raise _broken(self._section, self._path, error) from None


@contextmanager
def _open_decoded(path: Path, section: str) -> Iterator[Slide]:
    try:
        with _pillow():
            image = Image.open(path)
            check_plain(image, path, section)
    except _BROKEN_IMAGE as error:
        raise _broken(section, path, error) from None
    with image:
        size = image.width * image.height
        is_plain = image.mode == "RGB" and not image.has_transparency_data
        streams = image.format in ("JPEG", "PNG") and is_plain and size > _LARGE_STREAM
        if streams and (pyvips := _libvips()) is not None:
            yield _Streamed(pyvips, path, section, image.size)
            return
        if size > _LARGEST_DECODED:
            raise BadSection(
                section,
                f"{path} has {image.width} × {image.height} pixels, too many to decode at once (limit "
                f"{_LARGEST_DECODED:.0e}); pip install 'agl-bench[wsi]', or save it as a tiled .tif",
            )
        yield _Decoded(image, path, section)


# libvips -------------------------------------------------------------------------------------------------------------


class _Streamed(Slide):
    """Keeps some rows of an image that can only be decoded from top to bottom; begins anew for a region above them.

    libvips and Pillow decode with the same libraries, to the same pixels.
    """

    def __init__(self, pyvips: Any, path: Path, section: str, size: tuple[int, int]) -> None:
        self._pyvips, self._path, self._section = pyvips, path, section
        self.levels = (size,)
        self._first, self._rows = size[1], np.empty((0, size[0], 3), dtype=np.uint8)  # the first region begins

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`."""
        try:
            if top < self._first:
                self._begin()
            while self._first + len(self._rows) < bottom:
                self._read_on(max(top - BAND, 0))
        except self._pyvips.Error as error:
            raise _broken(self._section, self._path, error) from None
        return self._rows[top - self._first : bottom - self._first, left:right].copy()

    def _begin(self) -> None:
        image = self._pyvips.Image.new_from_file(str(self._path), access="sequential", fail_on="error")
        self._source = self._pyvips.Region.new(image)
        self._first, self._rows = 0, np.empty((0, self.width, 3), dtype=np.uint8)

    def _read_on(self, oldest: int) -> None:
        """The next band; rows above `oldest` are not kept."""
        start = self._first + len(self._rows)
        count = min(BAND, self.height - start)
        band = np.frombuffer(self._source.fetch(0, start, self.width, count), dtype=np.uint8)
        kept = self._rows[max(oldest - self._first, 0) :]
        self._rows = np.concatenate([kept, band.reshape(count, self.width, 3)])
        self._first = start - len(kept)


def _libvips() -> Any:
    """The module, None where it or its library is not installed."""
    try:
        import pyvips
    except (ImportError, OSError):
        return None
    return pyvips


# tifffile ------------------------------------------------------------------------------------------------------------


class _Tiff(Slide):
    """The picture of a TIFF file: decoded once, or by the tiles that a region touches, as zarr arrays."""

    def __init__(
        self, series: TiffPageSeries, layouts: Sequence[Layout], is_whole: bool, path: Path, section: str
    ) -> None:
        self._series, self._layouts, self._is_whole = series, layouts, is_whole
        self._arrays: list[Any] = [None] * len(layouts)
        self._path, self._section = path, section
        shapes = [dict(zip(level.axes, level.shape, strict=True)) for level in series.levels]
        self.levels = tuple((shape["X"], shape["Y"]) for shape in shapes)
        for level, layout in zip(series.levels, layouts, strict=True):
            level.keyframe.nodata = layout.white  # of tiles that the scanner did not write

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`."""
        layout = self._layouts[level]
        try:
            stored = np.asarray(self._array(level)[layout.place(left, top, right, bottom)])
        except Exception as error:  # noqa: BLE001  (each codec has its own errors)
            raise _broken(self._section, self._path, error) from None
        return layout.rgb(stored)

    def _array(self, level: int) -> Any:
        if self._arrays[level] is None:
            import zarr

            self._arrays[level] = (
                self._series.asarray()
                if self._is_whole
                else zarr.open_array(self._series.aszarr(level=level), mode="r")
            )
        return self._arrays[level]


@contextmanager
def _open_tiff(path: Path, section: str) -> Iterator[Slide]:
    import tifffile

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tifffile.TiffFile(path))
            found = file.series
            if not found:
                raise EOFError("it holds no image")
            page = found[0].keyframe
            for level in found[0].levels:
                _check_data(level.keyframe, path.stat().st_size)
        except Exception as error:  # noqa: BLE001  (a damaged file makes tifffile raise nearly anything)
            raise _broken(section, path, error) from None
        if page.compression == _JPEG_2000_YCBCR:
            yield stack.enter_context(_open_openslide(path, section))
            return
        series, layouts = main_series(found, path, section)
        is_whole = not (page.is_tiled or len(layouts) > 1 or page.imagewidth * page.imagelength > _LARGE_TIFF)
        yield _Tiff(series, layouts, is_whole, path, section)


def _check_data(page: Any, size: int) -> None:
    """That all tiles or strips of a page are listed, and lie in a file of this many bytes; some may be empty."""
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if not (page.imagewidth and page.imagelength and any(page.databytecounts[: len(page.dataoffsets)])):
        raise EOFError("it holds no pixels")
    if len(ends) < math.prod(page.chunked):
        raise EOFError(f"{len(ends)} of {math.prod(page.chunked)} tiles or strips are listed")
    if max(ends) > size:
        raise EOFError(f"{size} of at least {max(ends)} bytes are there")


def _is_tiff(path: Path, section: str) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(4) in _TIFF_MAGIC
    except OSError as error:
        raise _broken(section, path, error) from None


# OpenSlide -----------------------------------------------------------------------------------------------------------


class _OpenSlide(Slide):
    def __init__(self, slide: Any, path: Path, section: str) -> None:
        self._slide, self._path, self._section = slide, path, section
        self.levels = tuple(slide.level_dimensions)

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`; white where the scanner took no picture."""
        width, height = self.levels[level]
        # OpenSlide takes the corner in pixels of the full size, rounded up so that it falls on the pixel meant.
        corner = (-(-left * self.width // width), -(-top * self.height // height))
        try:
            pixels = self._slide.read_region(corner, level, (right - left, bottom - top))
        except Exception as error:  # noqa: BLE001  (OpenSlideError, and what Pillow raises)
            raise _broken(self._section, self._path, error) from None
        return on_glass(pixels)


@contextmanager
def _open_openslide(path: Path, section: str) -> Iterator[Slide]:
    try:
        import openslide
    except (ImportError, OSError):  # OSError: the package is there and its library is not
        raise BadSection(
            section,
            f"{path} is read with OpenSlide, which is not installed: pip install 'agl-bench[wsi]', "
            "or save the slide as a tiled .tif",
        ) from None
    if not path.is_file():
        raise _broken(section, path, FileNotFoundError("there is no such file"))
    try:
        slide = openslide.OpenSlide(path)
        # The profile of a scanner's own format is the scanner's, whatever class it says it is of.
        scanned = slide.properties.get("openslide.vendor") != "generic-tiff"
        profile = None if scanned else getattr(slide, "color_profile", None)
    except Exception as error:  # noqa: BLE001  (OpenSlideError, OpenSlideUnsupportedFormatError, OSError)
        raise _broken(section, path, error) from None
    with slide:
        check_colour_space(colour_space(profile.tobytes() if profile else None), path, section)
        yield _OpenSlide(slide, path, section)


def _broken(section: str, path: Path, error: BaseException) -> BadSection:
    if isinstance(error, PermissionError):
        return BadSection(section, f"{path} {FORBIDDEN}")
    if isinstance(error, UnidentifiedImageError):
        return BadSection(
            section,
            f"{path} cannot be read as an image (unknown format); it is damaged or incomplete: replace it, or "
            "save it as a tiled 8-bit RGB .tif if another program can read it",
        )
    return BadSection(
        section, f"{path} cannot be read as an image ({reason(error)}); it is damaged or incomplete, replace it"
    )
