"""What an image file stores, and how it becomes 8-bit RGB: decided from the header, before a decoder is chosen.

One rule for every form of file: a patch is cut from one plane of 8-bit colour or grey, as a microscope sees tissue in
bright field. What is exactly convertible is converted (grey, palettes, two levels, white as zero, planes of colour,
transparency on white glass); anything else is refused with what was found and what to do about it.

Positions refer to the pixels as they are stored. An orientation (EXIF, TIFF) is not applied, in no format, because
tifffile, OpenSlide, libvips and the programs built on them do not either. A profile of a scanner is not applied, as
encoders and other tools take values as the scanner wrote them; an image that a program saved in another colour space
than sRGB is refused, because there values and colours differ.

main_series   the picture of a TIFF file, by the axes that tifffile finds
Layout        how stored samples of a TIFF level become RGB
check_plain   what holds for images that Pillow or libvips decode
check_array   what holds for pixels that are an array
colour_space  the name of a colour space that values would have to be converted from
on_glass      an image with its transparent parts on white
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from agl_bench.errors import BadSection

if TYPE_CHECKING:
    from tifffile import TiffPageSeries

_COLOURS = {"MINISBLACK": 1, "MINISWHITE": 1, "PALETTE": 1, "RGB": 3, "YCBCR": 3}  # samples of a colour
_ALPHA = {"ASSOCALPHA": "associated", "UNASSALPHA": "unassociated"}
_JPEG = (6, 7, 33007, 34892)  # TIFF compressions whose YCbCr tifffile turns into RGB
_BESIDE = ("thumbnail", "label", "macro", "map", "overview", "other", "preview")  # series that scanners add
_SCANNERS = {"svs", "ndpi", "scn", "bif", "philips", "qpi", "avs"}  # formats that scanners write, by tifffile's names
_ANOTHER = 0.3  # share of the main picture's area from which on a further one is no thumbnail or label
_PLAIN = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # Pillow's formats of which all is known that matters here
_PICTURES = 0xB002  # tag of a .jpg that lists the pictures in it
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")  # Pillow's modes that become RGB
_SAME_COLOUR = 10  # levels of 255 that a colour may move; curves of power 2.2 are within it of sRGB
_SCREEN_GAMMA = 0.4545  # of a PNG
_SCREEN_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green and blue
_SAME_PRIMARIES = 0.02  # those of older screens (SMPTE C, EBU) differ less from sRGB's, those of wider spaces more
_TO_RGB = "save it as 8-bit RGB"
_SCALED = (
    f"scale the values and {_TO_RGB}: divide by 256 where they fill 16 bits, by 64 for 14, by 16 for 12; multiply "
    "values from 0 to 1 by 255"
)


@dataclass(frozen=True)
class Layout:
    """How stored samples of a level of a TIFF file become RGB.

    Attributes:
        axes: of the stored array: YX, YXS or SYX.
        inverted: whether 0 is white.
        palette: (colours, 3) uint8 where samples are indices.
        alpha: "" for none, "associated" where colours are multiplied by it, or "unassociated".
    """

    axes: str
    inverted: bool = False
    palette: np.ndarray | None = None
    alpha: str = ""

    @property
    def white(self) -> int:
        """The sample that stands for glass where the scanner wrote no tile."""
        return 0 if self.inverted or self.palette is not None else 255

    def place(self, left: int, top: int, right: int, bottom: int) -> tuple[slice, ...]:
        """Where a region lies in the stored array."""
        inside = slice(top, bottom), slice(left, right)
        return (slice(None), *inside) if self.axes == "SYX" else inside

    def rgb(self, stored: np.ndarray) -> np.ndarray:
        """Stored samples as uint8 (height, width, 3)."""
        if self.palette is not None:
            colours: np.ndarray = self.palette[stored]
            return colours
        samples = np.where(stored, np.uint8(255), np.uint8(0)) if stored.dtype == bool else stored
        if self.axes == "YX":
            samples = samples[:, :, None]
        elif self.axes == "SYX":
            samples = samples.transpose(1, 2, 0)
        colours = samples[:, :, :-1] if self.alpha else samples
        if self.inverted:
            colours = 255 - colours
        if colours.shape[2] == 1:
            colours = np.repeat(colours, 3, axis=2)
        if self.alpha:
            return _blended(colours, samples[:, :, -1:], self.alpha)
        return np.ascontiguousarray(colours)


def _blended(colours: np.ndarray, alpha: np.ndarray, kind: str) -> np.ndarray:
    """Colours (h, w, 3) on white glass."""
    if kind == "unassociated":
        return on_glass(Image.fromarray(np.concatenate([colours, alpha], axis=2)))
    light: np.ndarray = np.minimum(colours.astype(np.uint16) + (255 - alpha.astype(np.uint16)), 255)
    return light.astype(np.uint8)


def on_glass(image: Image.Image) -> np.ndarray:
    """An image of Pillow as uint8 (height, width, 3); white shows through where it is transparent."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


# TIFF ----------------------------------------------------------------------------------------------------------------


def main_series(found: Sequence[TiffPageSeries], path: Path, section: str) -> tuple[TiffPageSeries, list[Layout]]:
    """The picture of a TIFF file, and the layout of each of its levels.

    Args:
        found: all series of the file.
        path: of the file, for errors.
        section: name used in errors.

    Raises:
        BadSection: if it holds several planes or pictures, or other than 8-bit colour or grey.
    """
    main = found[0]
    _check_planes(main, path, section)
    _check_beside(found, path, section)
    for level in main.levels:
        if level.axes != main.axes:
            raise BadSection(section, f"{path} has levels with different axes ({main.axes}, {level.axes}); {_TO_RGB}")
    return main, [_layout(level, path, section) for level in main.levels]


def _check_planes(series: TiffPageSeries, path: Path, section: str) -> None:
    """One plane, whose samples lie in one page of this file."""
    page = series.keyframe
    axes = series.axes.replace("C", "S")
    samples = dict(zip(axes, series.shape, strict=True)).get("S", 1)
    if axes in ("YX", "YXS", "SYX") and samples == page.samplesperpixel and len(series.pages) == 1:
        if not series.is_multifile and Path(page.parent.filehandle.path) == path.resolve():  # tifffile follows links
            return
        raise BadSection(section, f"{path} refers to pixels in other files; {_TO_RGB}, all in one file")
    sizes = " × ".join(f"{size} {axis}" for axis, size in zip(series.axes, series.shape, strict=True))
    if page.imagedepth > 1 or "Z" in series.axes:
        cure = f"take the plane in focus and {_TO_RGB}"
    elif "C" in series.axes:
        cure = (
            f"take the bright-field scan and {_TO_RGB}; where its channels are red, green and blue, write them with "
            "tifffile.imwrite(path, numpy.moveaxis(channels, 0, -1), photometric='rgb')"
        )
    else:
        cure = f"take the page that the positions refer to and {_TO_RGB}, one page in one file"
    raise BadSection(section, f"{path} holds several planes of pixels (axes {sizes}); {cure}")


def _check_beside(found: Sequence[TiffPageSeries], path: Path, section: str) -> None:
    """No second picture but thumbnails, labels and reduced copies."""
    first = found[0].keyframe
    sizes = [first.imagewidth * first.imagelength]
    for series in found[1:]:
        page = series.keyframe
        if series.name.lower() not in _BESIDE and not page.is_reduced:
            sizes.append(page.imagewidth * page.imagelength)
    if max(sizes[1:], default=0) > sizes[0] * _ANOTHER:
        pages = [series.keyframe for series in found]
        listing = ", ".join(f"{page.imagewidth} × {page.imagelength}" for page in pages[:5])
        raise BadSection(
            section,
            f"{path} holds {len(pages)} pictures ({listing} pixels{', …' * (len(pages) > 5)}), and it is unclear "
            f"which one is meant; save the one that the positions refer to as a separate file",
        )


def _layout(level: TiffPageSeries, path: Path, section: str) -> Layout:
    """How a level's samples become RGB."""
    page = level.keyframe
    kind = getattr(page.photometric, "name", "colours not stated")
    bits = "two-level" if level.dtype == bool else f"{page.bitspersample}-bit {_KINDS.get(level.dtype.kind, 'unknown')}"
    samples = page.samplesperpixel
    what = f"{path} has {level.dtype} pixels ({bits}, {_CALLED.get(kind, kind)}, {samples} samples per pixel)"
    if kind not in _COLOURS:
        raise BadSection(section, f"{what}; convert its colours to sRGB and {_TO_RGB}")
    if not (
        (level.dtype == np.uint8 and (page.bitspersample == 8 or kind == "PALETTE"))
        or (level.dtype == bool and _COLOURS[kind] == samples == 1)
    ):
        raise BadSection(section, f"{what}; {_SCALED}")
    if kind == "YCBCR" and not (page.compression in _JPEG and page.planarconfig == 1 and samples == 3):
        raise BadSection(section, f"{what}, not compressed as JPEG; convert its colours to sRGB and {_TO_RGB}")
    extra = [_ALPHA.get(getattr(code, "name", "")) for code in page.extrasamples]
    beyond = samples - _COLOURS[kind]
    alpha = extra[0] if len(extra) == 1 and beyond == 1 and kind in ("RGB", "MINISBLACK") else None
    if beyond and not alpha:
        raise BadSection(
            section,
            f"{what}, {beyond} more than its colour needs, and no transparency; keep red, green and blue and {_TO_RGB} "
            "with tifffile.imwrite(path, pixels, photometric='rgb')",
        )
    profile = page.tags.valueof("InterColorProfile")
    if isinstance(profile, bytes) and not page.parent.flags & _SCANNERS:  # theirs is of the scanner, of any class
        check_colour_space(colour_space(profile), path, section)
    palette = _palette(page.colormap) if kind == "PALETTE" else None
    return Layout(level.axes.replace("C", "S"), kind == "MINISWHITE", palette, alpha or "")


_CALLED = {"SEPARATED": "CMYK", "MINISBLACK": "grey", "MINISWHITE": "grey, 0 = white", "YCBCR": "YCbCr"}
_KINDS = {"u": "whole numbers", "i": "signed numbers", "f": "floating point", "c": "complex", "b": "levels"}


def _palette(colormap: Any) -> np.ndarray:
    """A TIFF colour map (3, colours) as uint8 (256, 3); some writers fill 8 of its 16 bits."""
    wide = np.asarray(colormap)
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: wide.shape[1]] = (wide >> 8 if wide.max(initial=0) > 255 else wide).T
    return palette


# Other formats -------------------------------------------------------------------------------------------------------


def check_plain(image: Image.Image, path: Path, section: str) -> None:
    """Refuse an opened image, not yet decoded, that is other than one picture of 8-bit colour or grey.

    Raises:
        BadSection: with what it is.
    """
    frames = getattr(image, "n_frames", 1)
    if image.format == "MPO":  # cameras put previews behind the picture
        entries = image.mpinfo[_PICTURES]  # type: ignore[attr-defined]
        frames -= sum("Thumbnail" in entry["Attribute"]["MPType"] for entry in entries)
    depth = str(getattr(image, "tile", ""))  # the decoder's arguments; of a PNG, e.g. RGB;16B
    if image.format not in (*_PLAIN, "MPO"):
        raise BadSection(section, f"{path} is a file of format {image.format}; {_TO_RGB}, as .tif, .png or .jpg")
    if frames > 1:
        raise BadSection(section, f"{path} holds {frames} pictures; {_TO_RGB}, one picture in one file")
    if image.mode == "CMYK":
        raise BadSection(section, f"{path} has CMYK pixels; convert its colours to sRGB and {_TO_RGB}")
    if image.mode not in _EIGHT_BIT or ";16" in depth:
        raise BadSection(section, f"{path} has pixels with more than 8 bits (Pillow mode '{image.mode}'); {_SCALED}")
    name = colour_space(image.info.get("icc_profile"))
    if not (name or image.info.get("icc_profile") or "srgb" in image.info):
        name = _stated_space(image.info)
    check_colour_space(name, path, section)


def _stated_space(info: Mapping[Any, Any]) -> str:
    """What a PNG without a profile says of its colours, "" where that is sRGB or nothing."""
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if gamma and abs(gamma / _SCREEN_GAMMA - 1) >= 0.1:
        return f"gamma {gamma:g}"
    if primaries and all(primaries) and np.abs(np.subtract(primaries, _SCREEN_PRIMARIES)).max() > _SAME_PRIMARIES:
        return "primaries " + ", ".join(f"{value:g}" for value in primaries[2:])
    return ""


def check_array(array: Any, axes: tuple[str, ...], what: str, section: str) -> None:
    """Refuse an array, or what is sliced like one, that is other than uint8 with colour last.

    Args:
        array: with `shape` and `dtype`.
        axes: names of the axes before the colour; those of one name are equally long.
        what: the array is called in errors.
        section: name used in errors.

    Raises:
        BadSection: with what it is.
    """
    shape = tuple(getattr(array, "shape", ()))
    dtype = getattr(array, "dtype", type(array).__name__)
    sizes = dict(zip(axes, shape, strict=False))
    if shape == (*(sizes.get(axis) for axis in axes), 3) and dtype == np.uint8:
        return
    cure = ""
    first = len(axes) - 2  # where colour stands that comes before rows and columns
    if len(shape) == len(axes) + 1 and shape[first] == 3:
        cure = f"; put its colours last: numpy.moveaxis(array, {first}, -1)"
    elif shape and shape[-1] == 4:
        cure = "; leave the fourth channel out if it is transparency"
    elif getattr(dtype, "kind", "") == "f":
        cure = "; multiply values from 0 to 1 by 255, round them and call .astype(numpy.uint8)"
    raise BadSection(
        section, f"{what} is {dtype} {shape or 'without a shape'}; it has to be uint8 ({', '.join(axes)}, 3){cure}"
    )


def check_colour_space(name: str, path: Path, section: str) -> None:
    """Refuse a colour space that `colour_space` has named."""
    if name:
        raise BadSection(
            section,
            f"{path} has colour space '{name}', in which values mean other colours than in sRGB; convert it to sRGB "
            f"and {_TO_RGB} (vips icc_transform OLD NEW srgb), or remove the profile if it is wrong",
        )


def colour_space(profile: bytes | None) -> str:
    """The name of the colour space in which a program has saved an image; "" for sRGB and what is as good.

    Also "" for the profile of a scanner, whose values are taken as they are, and for what is no profile of colours.
    """
    mode = {b"RGB ": "RGB", b"GRAY": "L"}.get(profile[16:20]) if profile else None
    if not profile or mode is None or profile[12:16] == b"scnr":
        return ""
    from PIL import ImageCms

    steps = np.arange(0, 256, 51 if mode == "RGB" else 1, dtype=np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * len(mode)), axis=-1).reshape(1, -1, len(mode))
    before = Image.fromarray(colours if mode == "RGB" else colours[:, :, 0])
    try:
        stated = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        to_srgb = ImageCms.buildTransform(stated, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
        after = ImageCms.applyTransform(before, to_srgb)
        name = ImageCms.getProfileDescription(stated).strip()
    except (ImageCms.PyCMSError, OSError, ValueError):
        return ""  # not readable: no program applies it
    assert after is not None
    moved = np.abs(np.asarray(after, dtype=np.int16) - np.asarray(before.convert("RGB"), dtype=np.int16))
    return (name or "unnamed profile") if moved.max() > _SAME_COLOUR else ""
