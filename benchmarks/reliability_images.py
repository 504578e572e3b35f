"""Images in bad or odd forms, beside counts that are sound. Part of `reliability_files`."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import tifffile
from PIL import Image, ImageCms
from reliability import Trial
from reliability_sections import Truth, section, tried

KIND = "image"
TILE = (64, 64)
Write = Callable[[Path, np.ndarray], object]  # into the section's folder


def rgb(name: str = "image.tif", **more: object) -> Write:
    """A TIFF file of the pixels as they are."""
    return lambda home, pixels: tifffile.imwrite(home / name, pixels, **{"photometric": "rgb", "metadata": None} | more)


def turned(value: int, **more: object) -> Write:
    """A TIFF file with an orientation."""
    return rgb(extratags=[(274, 3, 1, value, True)], **more)


def planes(home: Path, pixels: np.ndarray, **more: object) -> None:
    """Colour in planes."""
    stored = pixels.transpose(2, 0, 1).copy()
    tifffile.imwrite(home / "image.tif", stored, photometric="rgb", planarconfig="separate", **more)


def wide(factor: int, **more: object) -> Write:
    """16 bits of which some are used."""
    return lambda home, pixels: rgb(**more)(home, pixels.astype(np.uint16) * factor)


def ome(axes: str, count: int) -> Write:
    """Planes of single channels or depths; the first are the true ones."""

    def write(home: Path, pixels: np.ndarray) -> None:
        stored = np.concatenate([pixels.transpose(2, 0, 1)] * 2)[:count]
        tifffile.imwrite(home / "image.ome.tif", stored, photometric="minisblack", metadata={"axes": axes})

    return write


def imagej(axes: str) -> Write:
    """A composite or stack of ImageJ."""
    return lambda home, pixels: tifffile.imwrite(
        home / "image.tif", pixels.transpose(2, 0, 1).copy(), imagej=True, metadata={"axes": axes}
    )


def pages(*views: Callable[[np.ndarray], np.ndarray], **more: object) -> Write:
    """A file of several pictures."""

    def write(home: Path, pixels: np.ndarray) -> None:
        with tifffile.TiffWriter(home / "image.tif") as file:
            for view in views:
                file.write(np.ascontiguousarray(view(pixels)), photometric="rgb", metadata=None, **more)

    return write


def channels(*kinds: int | str, **more: object) -> Write:
    """Red, green, blue and more."""

    def write(home: Path, pixels: np.ndarray) -> None:
        extra = [np.full(pixels.shape[:2], 255, dtype=np.uint8)] * len(kinds)
        rgb(extrasamples=list(kinds), **more)(home, np.dstack([pixels, *extra]))

    return write


def saved(name: str, mode: str = "RGB", **more: object) -> Write:
    """By Pillow, in a mode of its own."""
    return lambda home, pixels: Image.fromarray(pixels).convert(mode).save(home / name, **more)


def through(mode: str, name: str) -> Write:
    """A palette of 256 colours, or ink."""
    return lambda home, pixels: (
        Image.fromarray(pixels).quantize(256) if mode == "P" else Image.fromarray(pixels).convert(mode)
    ).save(home / name)


def exif(name: str, value: int) -> Write:
    """With an orientation in its EXIF data."""
    stated = Image.Exif()
    stated[274] = value
    look = {"quality": 95} if name.endswith("jpg") else {}
    return lambda home, pixels: Image.fromarray(pixels).save(home / name, exif=stated, **look)


def film(name: str) -> Write:
    """Two frames."""
    return lambda home, pixels: Image.fromarray(pixels).save(
        home / name, save_all=True, append_images=[Image.fromarray(255 - pixels)]
    )


def png_of_16_bits(home: Path, pixels: np.ndarray) -> None:
    """14 of them used; Pillow writes no such file."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    height, width = pixels.shape[:2]
    rows = (pixels.astype(">u2") * 64).reshape(height, -1)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = width.to_bytes(4) + height.to_bytes(4) + bytes([16, 2, 0, 0, 0])
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    (home / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def profile() -> bytes:
    """sRGB with red and green swapped: values are not colours."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(int.from_bytes(made[128:132])):
        at = 132 + 12 * entry
        swapped = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(made[at : at + 4]))
        made[at : at + 4] = swapped or made[at : at + 4]
    return bytes(made)


def cut(name: str, share: float) -> Write:
    """A copy that broke off."""

    def write(home: Path, pixels: np.ndarray) -> None:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format={"jpg": "jpeg", "png": "png", "tif": "tiff"}[name[-3:]])
        (home / name).write_bytes(stream.getvalue()[: int(len(stream.getvalue()) * share)])

    return write


def damaged_tiles(home: Path, pixels: np.ndarray) -> None:
    """Every second tile begins with other bytes."""
    rgb(tile=TILE, compression="deflate")(home, pixels)
    with tifffile.TiffFile(home / "image.tif") as file:
        starts = file.pages[0].dataoffsets
    with (home / "image.tif").open("r+b") as stream:
        for start in starts[::2]:
            stream.seek(start)
            stream.write(b"\xff" * 8)


def patches(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, Truth], None]:
    """patches.h5 instead of an image, in a layout of its own."""

    def write(home: Path, truth: Truth) -> None:
        corners = (truth.xy - 56).round().astype(int)
        squares = np.stack([truth.pixels[y : y + 112, x : x + 112] for x, y in corners])
        with h5py.File(home / "patches.h5", "w") as file:
            file["img"], file["barcode"] = change(squares), np.array(truth.names, dtype="S")

    return write


IMAGES: dict[str, Write] = {
    **{f"TIFF, orientation {value}": turned(value) for value in (2, 3, 4, 6)},
    **{f"tiled TIFF, orientation {value}": turned(value, tile=TILE) for value in (3, 8)},
    "JPEG, EXIF orientation 6": exif("image.jpg", 6),
    "PNG, EXIF orientation 3": exif("image.png", 3),
    "TIFF, colour in planes": planes,
    "tiled TIFF, colour in planes": lambda home, pixels: planes(home, pixels, tile=TILE),
    "TIFF, 16 bits": wide(257),
    "tiled TIFF, 16 bits": wide(257, tile=TILE),
    "TIFF, 14 bits in 16": wide(64),
    "TIFF, 12 bits in 16": wide(16),
    "PNG, 14 bits in 16": png_of_16_bits,
    "TIFF, floating point 0 to 1": lambda home, pixels: rgb()(home, (pixels / 255).astype(np.float32)),
    "tiled TIFF, floating point 0 to 255": lambda home, pixels: rgb(tile=TILE)(home, pixels.astype(np.float32)),
    "OME-TIFF, three channels": ome("CYX", 3),
    "OME-TIFF, four channels": ome("CYX", 4),
    "OME-TIFF, five depths": ome("ZYX", 5),
    "ImageJ composite": imagej("CYX"),
    "ImageJ stack": imagej("ZYX"),
    "TIFF of three pages": pages(lambda p: p, lambda p: p[::-1], lambda p: p[:, ::-1]),
    "tiled TIFF of two pages": pages(lambda p: p, lambda p: p[::-1], tile=TILE),
    "TIFF of two sizes": pages(lambda p: p, lambda p: p[:-9, :-9]),
    "TIFF, thumbnail first": pages(lambda p: p[::4, ::4], lambda p: p),
    "TIFF, label behind": pages(lambda p: p, lambda p: p[:40, :40]),
    "TIFF, transparency": channels("unassalpha"),
    "TIFF, premultiplied transparency": channels("assocalpha", tile=TILE),
    "TIFF, a fourth channel": channels("unspecified"),
    "TIFF, five channels": channels("unspecified", "unspecified", tile=TILE),
    "TIFF, two channels": lambda home, pixels: rgb(photometric="minisblack", planarconfig="contig")(
        home, pixels[:, :, :2].copy()
    ),
    "TIFF, three grey channels": rgb(photometric="minisblack", planarconfig="contig"),
    "TIFF, CMYK": through("CMYK", "image.tif"),
    "JPEG, CMYK": through("CMYK", "image.jpg"),
    "TIFF, CIELAB": rgb(photometric="cielab"),
    "TIFF, YCbCr": through("YCbCr", "image.tif"),
    "TIFF, YCbCr of JPEG": rgb(compression="jpeg", compressionargs={"level": 98}, tile=TILE),
    "TIFF, JPEG 2000": rgb(compression="jpeg2000", tile=TILE),
    "TIFF, LZW, big-endian, BigTIFF": rgb(compression="lzw", byteorder=">", bigtiff=True),
    "PNG, palette": through("P", "image.png"),
    "TIFF, palette": through("P", "image.tif"),
    "PNG, transparency": saved("image.png", "RGBA"),
    "PNG of two frames": film("image.png"),
    "TIFF, profile with other primaries": rgb(iccprofile=profile()),
    "JPEG, profile with other primaries": lambda home, pixels: Image.fromarray(pixels).save(
        home / "image.jpg", icc_profile=profile()
    ),
    "GIF named .png": lambda home, pixels: Image.fromarray(pixels).quantize(256).save(home / "image.png", format="GIF"),
    "TIFF named .jpg": rgb("image.jpg"),
    "JPEG 2000 named .jpg": lambda home, pixels: Image.fromarray(pixels).save(home / "image.jpg", format="JPEG2000"),
    "CZI named .tif": lambda home, _: (home / "image.tif").write_bytes(b"ZISRAWFILE" + bytes(1000)),
    "empty": lambda home, _: (home / "image.png").touch(),
    "text named .jpg": lambda home, _: (home / "image.jpg").write_text("no image", encoding="utf-8"),
    **{f"half a {ending}": cut(f"image.{ending}", 0.5) for ending in ("jpg", "png", "tif")},
    "tiled TIFF, damaged tiles": damaged_tiles,
    "another section's image": lambda home, pixels: rgb()(home, np.full_like(pixels, 240)),
    "half the size": lambda home, pixels: rgb()(home, pixels[::2, ::2].copy()),
    **{
        f"named {name}": rgb(name, tile=TILE)
        for name in ("image.svs", "image.TIF", "image.ome.tif", "Image.Tiff", "image.btf")
    },
    "named image.czi": rgb("image.czi"),
    "image.png and image.tif": lambda home, pixels: [rgb()(home, pixels), saved("image.png")(home, pixels[::-1])],
}
PATCHES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "patches.h5": lambda x: x,
    "patches.h5, channels first": lambda x: x.transpose(0, 3, 1, 2),
    "patches.h5, floating point 0 to 1": lambda x: (x / 255).astype(np.float32),
    "patches.h5, four channels": lambda x: np.concatenate([x, x[..., :1]], axis=3),
    "patches.h5, 16 bits": lambda x: x.astype(np.uint16) * 257,
    "patches.h5, not square": lambda x: x[:, :, :-10],
}


def trials(folder: Path, quick: bool) -> list[Trial]:
    """All images, or a few of them."""
    truth = section()
    found = []
    some = ("TIFF, orientation 3", "OME-TIFF, three channels")
    for number, (name, write) in enumerate(IMAGES.items()):
        if quick and name not in some:
            continue
        home = folder / f"i{number}" / "s0"
        home.mkdir(parents=True)
        truth.table().write_h5ad(home / "counts.h5ad")
        write(home, truth.pixels)
        found.append(tried(KIND, name, f"folder:{home.parent}", truth))
    for number, (name, change) in enumerate(PATCHES.items()):
        if quick:
            break
        home = folder / f"p{number}" / "s0"
        home.mkdir(parents=True)
        truth.table(patch_um=112.0).write_h5ad(home / "counts.h5ad")
        patches(change)(home, truth)
        found.append(tried(KIND, name, f"folder:{home.parent}", truth))
    return found
