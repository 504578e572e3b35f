"""Slide images of any size, read region by region. The one home of tifffile, OpenSlide and libvips.

_Decoded    Pillow: .jpg, .png and plain .tif, decoded once, whole
_Streamed   libvips, where the extra `wsi` is installed: a large .jpg or .png, decoded from top to bottom
_Tiled      tifffile: tiled, pyramidal or large .tif, .ome.tif, .svs, .ndpi; only the tiles that a region touches
_OpenSlide  OpenSlide, where the extra `wsi` is installed: .mrxs, .scn, .bif, .vms, .dcm
_Pixels     an array, or what is sliced like one: in memory, or chunks of a store

All give the same pixels of the same content; what is resized, and how, is the matter of `patches`.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from agl_bench.errors import BadSection

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what is wrong with a file is said once, by us

_LARGEST_DECODED = 1_000_000_000  # pixels of an image that cannot be read in part; Pillow takes four bytes for each
_LARGE_TIFF = 100_000_000  # pixels; a larger file is read in part though it has strips and no tiles
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes that become RGB
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what Pillow raises, by format
_LARGE_STREAM = 150_000_000  # pixels; from here on a .jpg or .png is not decoded whole where libvips is there
BAND = 512  # rows of an image that are read together; regions come in this order
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OPENSLIDE_ONLY = (".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm")
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
        BadSection: if it is no image, has other than 8-bit pixels, is damaged (also where that shows only while
            reading), is too large to be decoded whole, or needs OpenSlide and there is none.
    """
    if not isinstance(source, Path):
        yield _Pixels(source, section)
    elif source.suffix.lower() in _OPENSLIDE_ONLY:
        with _open_openslide(source, section) as slide:
            yield slide
    elif _is_tiff(source, section) and _is_read_in_part(source):
        with _open_tiled(source, section) as tiled:
            yield tiled
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
        if len(pixels.shape) != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise BadSection(
                section, f"its image is {pixels.dtype} {tuple(pixels.shape)}; it has to be uint8 (height, width, 3)"
            )
        self._pixels = pixels
        self.levels = ((pixels.shape[1], pixels.shape[0]),)

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`."""
        return np.ascontiguousarray(self._pixels[top:bottom, left:right])


# Pillow --------------------------------------------------------------------------------------------------------------


class _Decoded(Slide):
    def __init__(self, image: Image.Image) -> None:
        self._image, self._is_decoded = image, False
        self.levels = (image.size,)

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`."""
        if not self._is_decoded:
            self._image.load()
            if self._image.mode != "RGB":
                self._image = self._image.convert("RGB")  # converting copies, even RGB
            self._is_decoded = True
        return np.asarray(self._image.crop((left, top, right, bottom)))


@contextmanager
def _open_decoded(path: Path, section: str) -> Iterator[Slide]:
    guard = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # ordinary slides exceed Pillow's guard; `_LARGEST_DECODED` is ours
    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BIT:
                raise BadSection(section, f"{path} has pixels of Pillow mode '{image.mode}'; save it as 8-bit RGB")
            size = image.width * image.height
            streams = image.format in ("JPEG", "PNG") and image.mode == "RGB" and size > _LARGE_STREAM
            if streams and (pyvips := _libvips()) is not None:
                yield _Streamed(pyvips, path, section, image.size)
                return
            if size > _LARGEST_DECODED:
                raise BadSection(
                    section,
                    f"{path} has {image.width} × {image.height} pixels, too many to decode at once (limit "
                    f"{_LARGEST_DECODED:.0e}); pip install 'agl-bench[wsi]', or save it as a tiled .tif",
                )
            yield _Decoded(image)
    except _BROKEN_IMAGE as error:
        raise _broken(section, path, error) from None
    finally:
        Image.MAX_IMAGE_PIXELS = guard


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


class _Tiled(Slide):
    """The first series of a TIFF file; its levels are zarr arrays that decode the tiles that a region touches."""

    def __init__(self, series: TiffPageSeries, path: Path, section: str) -> None:
        import zarr

        page = series.keyframe
        kind = page.photometric.name
        axes = series.axes.replace("C", "S")
        if series.dtype != np.uint8 or axes not in ("YX", "YXS", "SYX") or kind not in _RGB_OR_GREY:
            raise BadSection(
                section, f"{path} has {series.dtype} pixels ({kind}, axes {series.axes}); save it as 8-bit RGB"
            )
        self._inverted = kind == "MINISWHITE"
        self._axes, self._path, self._section = axes, path, section
        self._arrays: list[Any] = [
            zarr.open_array(series.aszarr(level=level), mode="r") for level in range(len(series.levels))
        ]
        shapes = [dict(zip(axes, level.shape, strict=True)) for level in series.levels]
        self.levels = tuple((shape["X"], shape["Y"]) for shape in shapes)

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See `Slide`."""
        place: tuple[slice, ...] = (slice(top, bottom), slice(left, right))
        if self._axes == "SYX":
            place = (slice(0, 3), *place)
        try:
            pixels = np.asarray(self._arrays[level][place])
        except Exception as error:  # noqa: BLE001  (each codec has its own errors)
            raise _broken(self._section, self._path, error) from None
        if self._axes == "SYX":
            pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        if self._inverted:
            pixels = 255 - pixels
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.shape[2] < 3:
            pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
        return np.ascontiguousarray(pixels[:, :, :3])


_RGB_OR_GREY = ("RGB", "YCBCR", "MINISBLACK", "MINISWHITE")  # tifffile turns YCbCr of a JPEG into RGB


@contextmanager
def _open_tiled(path: Path, section: str) -> Iterator[Slide]:
    import tifffile

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tifffile.TiffFile(path))
            series = file.series[0]
            end = max(_end(level.keyframe) for level in series.levels)
        except Exception as error:  # noqa: BLE001  (a damaged file makes tifffile raise nearly anything)
            raise _broken(section, path, error) from None
        if end > path.stat().st_size:
            raise _broken(section, path, EOFError(f"{path.stat().st_size} of at least {end} bytes are there"))
        yield _Tiled(series, path, section)


def _end(page: Any) -> int:
    """Where the last tile or strip of a page ends in its file."""
    return max((offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)


def _is_tiff(path: Path, section: str) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(4) in _TIFF_MAGIC
    except OSError as error:
        raise _broken(section, path, error) from None


def _is_read_in_part(path: Path) -> bool:
    """Whether a TIFF file has tiles or levels, or is too large to be decoded whole; what is damaged is not."""
    import tifffile

    try:
        file: TiffFile
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            page = series.keyframe
            return bool(page.is_tiled or len(series.levels) > 1 or page.imagewidth * page.imagelength > _LARGE_TIFF)
    except Exception:  # noqa: BLE001  (Pillow says what is wrong with it)
        return False


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
        glass = Image.new("RGBA", pixels.size, "white")
        return np.asarray(Image.alpha_composite(glass, pixels).convert("RGB"))


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
    except Exception as error:  # noqa: BLE001  (OpenSlideError, OpenSlideUnsupportedFormatError, OSError)
        raise _broken(section, path, error) from None
    with slide:
        yield _OpenSlide(slide, path, section)


def _broken(section: str, path: Path, error: BaseException) -> BadSection:
    if isinstance(error, PermissionError):
        return BadSection(section, f"{path} may not be read by this user; change its permissions")
    return BadSection(
        section, f"{path} cannot be read as an image ({reason(error)}); it is damaged or incomplete, replace it"
    )
