"""What image files store: one colour in one place whatever the form of the file, or one sentence that refuses it."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from agl_bench import BadSection, ImagePatches
from agl_bench.data import slides
from agl_bench.data.slides import open_slide
from agl_bench.data.stored_pixels import colour_space

Write = Callable[[Path, np.ndarray], None]
HEIGHT, WIDTH = 60, 90
TILE = (16, 16)


def make_pixels() -> np.ndarray:
    """No two quarters alike, so that turned or mirrored pixels differ; runs, so that codecs have something to do."""
    rough = np.random.default_rng(0).integers(0, 256, (HEIGHT // 6, WIDTH // 6, 3), dtype=np.uint8)
    return np.repeat(np.repeat(rough, 6, axis=0), 6, axis=1)


PIXELS = make_pixels()
GREY = PIXELS[:, :, 0].copy()
HALF = np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)
HALF[:, : WIDTH // 2] = 0  # transparent on the left
ON_GLASS = np.where(HALF == 255, PIXELS, np.uint8(255))


def whole(path: Path) -> np.ndarray:
    """All pixels of an image as a patch source sees them."""
    with open_slide(path, "S") as slide:
        return slide.region(0, 0, 0, slide.width, slide.height)


def tiff(path: Path, pixels: np.ndarray, **more: Any) -> Path:
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", "metadata": None} | more)
    return path


def orientation(value: int) -> dict[str, Any]:
    return {"extratags": [(274, 3, 1, value, True)]}


# In the same place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("form", ["strips", "tiles", "planes", "deflate", "large"])
def test_an_orientation_of_tiff_is_not_applied(
    tmp_path: Path, turned: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, more = PIXELS, orientation(turned)
    if form == "tiles":
        more["tile"] = TILE
    elif form == "planes":
        stored, more = PIXELS.transpose(2, 0, 1).copy(), more | {"planarconfig": "separate"}
    elif form == "deflate":
        more["compression"] = "deflate"
    elif form == "large":
        monkeypatch.setattr(slides, "_LARGE_TIFF", 10)
    np.testing.assert_array_equal(whole(tiff(tmp_path / "image.tif", stored, **more)), PIXELS)


@pytest.mark.parametrize("turned", [2, 3, 6, 8])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_nor_is_that_of_exif(tmp_path: Path, turned: int, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look: dict[str, Any] = {"quality": 95} if ending == "jpg" else {"lossless": True} if ending == "webp" else {}
    Image.fromarray(PIXELS).save(tmp_path / f"plain.{ending}", **look)
    exif = Image.Exif()
    exif[274] = turned
    Image.fromarray(PIXELS).save(tmp_path / f"turned.{ending}", exif=exif, **look)
    before = whole(tmp_path / f"plain.{ending}")
    np.testing.assert_array_equal(whole(tmp_path / f"turned.{ending}"), before)
    monkeypatch.setattr(slides, "_LARGE_STREAM", 10)
    np.testing.assert_array_equal(whole(tmp_path / f"turned.{ending}"), before)


# The same colour -----------------------------------------------------------------------------------------------------


def planes(path: Path, pixels: np.ndarray, **more: Any) -> None:
    tiff(path, pixels.transpose(2, 0, 1).copy(), planarconfig="separate", **more)


def palette(path: Path, *, bits: int = 16, **more: Any) -> None:
    colours, index = np.unique(PIXELS.reshape(-1, 3), axis=0, return_inverse=True)
    table = np.zeros((3, 256), dtype=np.uint16)
    table[:, : len(colours)] = colours.T.astype(np.uint16) * (257 if bits == 16 else 1)
    stored = index.reshape(HEIGHT, WIDTH).astype(np.uint8)
    tifffile.imwrite(path, stored, photometric="palette", colormap=table, metadata=None, **more)


def imagej(path: Path, **more: Any) -> None:
    tifffile.imwrite(path, PIXELS, imagej=True, **more)


COLOUR: dict[str, Callable[..., Any]] = {
    "strips": lambda path, **more: tiff(path, PIXELS, rowsperstrip=7, **more),
    "planes": lambda path, **more: planes(path, PIXELS, **more),
    "ome": lambda path, **more: tiff(path.with_suffix(".ome.tif"), PIXELS, metadata={"axes": "YXS"}, **more),
    "big-endian": lambda path, **more: tiff(path, PIXELS, byteorder=">", bigtiff=True, **more),
    "lzw": lambda path, **more: tiff(path, PIXELS, compression="lzw", predictor=True, **more),
    "packbits": lambda path, **more: tiff(path, PIXELS, compression="packbits", **more),
    "zstd": lambda path, **more: tiff(path, PIXELS, compression="zstd", **more),
    "jpeg2000": lambda path, **more: tiff(path, PIXELS, compression="jpeg2000", **more),
    "palette": palette,
    "palette-8": lambda path, **more: palette(path, bits=8, **more),
    "solid": lambda path, **more: tiff(path, np.concatenate([PIXELS, HALF | 255], 2), extrasamples=[2], **more),
    "solid-planes": lambda path, **more: planes(
        path, np.concatenate([PIXELS, HALF | 255], 2), extrasamples=[1], **more
    ),
}


@pytest.mark.parametrize("tile", [{}, {"tile": TILE}], ids=["flat", "tiled"])
@pytest.mark.parametrize("form", COLOUR)
def test_colour(tmp_path: Path, form: str, tile: dict[str, Any]) -> None:
    COLOUR[form](tmp_path / "image.tif", **tile)
    (path,) = tmp_path.iterdir()
    np.testing.assert_array_equal(whole(path), PIXELS)


GREYS: dict[str, Callable[..., Any]] = {
    "grey": lambda path, **more: tiff(path, GREY, **more | {"photometric": "minisblack"}),
    "white is zero": lambda path, **more: tiff(path, 255 - GREY, **more | {"photometric": "miniswhite"}),
    "alpha": lambda path, **more: tiff(
        path,
        np.dstack([GREY, HALF | 255]),
        **more | {"photometric": "minisblack", "extrasamples": [2], "planarconfig": "contig"},
    ),
}


@pytest.mark.parametrize("tile", [{}, {"tile": TILE}], ids=["flat", "tiled"])
@pytest.mark.parametrize("form", GREYS)
def test_grey(tmp_path: Path, form: str, tile: dict[str, Any]) -> None:
    GREYS[form](tmp_path / "image.tif", **tile)
    np.testing.assert_array_equal(whole(tmp_path / "image.tif"), np.repeat(GREY[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["minisblack", "miniswhite"])
def test_two_levels(tmp_path: Path, kind: str) -> None:
    stored = GREY > 127
    tiff(tmp_path / "image.tif", stored if kind == "minisblack" else ~stored, photometric=kind)
    expected = np.repeat(np.where(stored, 255, 0)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(whole(tmp_path / "image.tif"), expected)
    Image.fromarray(stored).save(tmp_path / "image.png")
    np.testing.assert_array_equal(whole(tmp_path / "image.png"), expected)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("tile", [{}, {"tile": (64, 64)}], ids=["flat", "tiled"])
def test_ycbcr_of_jpeg_becomes_rgb(tmp_path: Path, subsampling: tuple[int, int], tile: dict[str, Any]) -> None:
    more = {"compression": "jpeg", "compressionargs": {"level": 98}, "subsampling": subsampling}
    got = whole(tiff(tmp_path / "image.tif", PIXELS, **more, **tile))
    assert np.abs(got.astype(int) - PIXELS).mean() < (6 if subsampling == (1, 1) else 20)
    with tifffile.TiffFile(tmp_path / "image.tif") as file:
        assert file.pages[0].photometric.name == "YCBCR"


def test_a_flat_jpeg_tiff_has_the_pixels_that_libtiff_gives(tmp_path: Path) -> None:
    path = tiff(tmp_path / "image.tif", PIXELS, compression="jpeg", rowsperstrip=16)
    with Image.open(path) as image:
        np.testing.assert_array_equal(whole(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("turns", ["P", "L", "RGB", "RGBA", "LA", "16-colour", "4-bit grey", "interlaced"])
def test_png(tmp_path: Path, turns: str) -> None:
    path, image, expected = tmp_path / "image.png", Image.fromarray(PIXELS), PIXELS
    if turns == "L":
        image = Image.fromarray(GREY)
        expected = np.repeat(GREY[:, :, None], 3, axis=2)
    elif turns == "LA":
        image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(HALF[:, :, 0])])
        expected = np.where(HALF == 255, GREY[:, :, None], np.uint8(255)).repeat(3, axis=2)
    elif turns == "RGBA":
        image, expected = Image.fromarray(np.concatenate([PIXELS, HALF], 2)), ON_GLASS
    elif turns in ("P", "16-colour"):
        image = image.quantize(256 if turns == "P" else 16)
        expected = np.asarray(image.convert("RGB"))
    if turns == "4-bit grey":
        rows = b"".join(b"\0" + bytes([0x0F] * (WIDTH // 2)) for _ in range(HEIGHT))
        write_png(path, 4, 0, rows)
        expected = np.tile(np.array([0, 255], np.uint8), (HEIGHT, WIDTH // 2))[:, :, None].repeat(3, 2)
    else:
        image.save(path)
    np.testing.assert_array_equal(whole(path), expected)


def write_png(path: Path, bits: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    head = WIDTH.to_bytes(4) + HEIGHT.to_bytes(4) + bytes([bits, colour, 0, 0, 0])
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def png_rows(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def test_one_colour_of_a_png_may_be_transparent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = PIXELS[0, 0]
    write_png(tmp_path / "image.png", 8, 2, png_rows(PIXELS), (b"tRNS", b"".join(b"\0" + bytes([c]) for c in key)))
    expected = np.where((key == PIXELS).all(2, keepdims=True), np.uint8(255), PIXELS)
    for stream in (10, 10**9):
        monkeypatch.setattr(slides, "_LARGE_STREAM", stream)
        np.testing.assert_array_equal(whole(tmp_path / "image.png"), expected)


@pytest.mark.parametrize("tile", [{}, {"tile": TILE}], ids=["flat", "tiled"])
@pytest.mark.parametrize("kind", [1, 2])
def test_what_is_transparent_is_glass(tmp_path: Path, kind: int, tile: dict[str, Any]) -> None:
    colours = PIXELS * (HALF == 255) if kind == 1 else PIXELS  # associated: multiplied by it
    path = tiff(tmp_path / "image.tif", np.concatenate([colours, HALF], 2), extrasamples=[kind], **tile)
    np.testing.assert_array_equal(whole(path), ON_GLASS)


def test_half_transparent_is_half_glass(tmp_path: Path) -> None:
    dark = np.full((HEIGHT, WIDTH, 1), 128, dtype=np.uint8)
    Image.fromarray(np.concatenate([PIXELS, dark], 2)).save(tmp_path / "image.png")
    tiff(tmp_path / "image.tif", np.concatenate([PIXELS, dark], 2), extrasamples=[2], tile=TILE)
    expected = PIXELS * (128 / 255) + 255 * (127 / 255)
    for name in ("image.png", "image.tif"):
        assert np.abs(whole(tmp_path / name) - expected).max() <= 1


def test_a_tile_that_was_not_written_is_glass(tmp_path: Path) -> None:
    path = tiff(tmp_path / "image.tif", PIXELS, tile=TILE)
    with tifffile.TiffFile(path, mode="r+") as file:
        counts, offsets = file.pages[0].tags["TileByteCounts"], file.pages[0].tags["TileOffsets"]
        counts.overwrite((0, *counts.value[1:]))
        offsets.overwrite((0, *offsets.value[1:]))
    got = whole(path)
    assert (got[:16, :16] == 255).all()
    np.testing.assert_array_equal(got[16:], PIXELS[16:])


# Refused -------------------------------------------------------------------------------------------------------------


def write_pages(path: Path, pages: list[np.ndarray], **more: Any) -> None:
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            file.write(page, photometric="rgb", metadata=None, **more)


def stack(axes: str, *sizes: int) -> np.ndarray:
    assert len(axes) == len(sizes)
    return np.random.default_rng(0).integers(0, 255, (*sizes, HEIGHT, WIDTH), dtype=np.uint8)


REFUSED: dict[str, tuple[str, Write]] = {
    "16 bits": (r"uint16 .*16-bit .* 8-bit RGB: divide by 256", lambda p, x: tiff(p, x.astype(np.uint16) * 257)),
    "14 bits": ("uint16", lambda p, x: tiff(p, x.astype(np.uint16) * 64, tile=TILE)),
    "12 bits packed": ("12-bit", lambda p, x: tiff(p, x.astype(np.uint16) * 16, bitspersample=12)),
    "16-bit grey": ("uint16", lambda p, x: tiff(p, x[:, :, 0].astype(np.uint16), photometric="minisblack")),
    "float 0 to 1": (
        r"float32 .*32-bit floating point.* multiply values from 0 to 1 by 255",
        lambda p, x: tiff(p, (x / 255).astype(np.float32)),
    ),
    "float tiled": ("float32", lambda p, x: tiff(p, x.astype(np.float32), tile=TILE)),
    "double": ("float64", lambda p, x: tiff(p, x.astype(np.float64))),
    "signed": ("int8", lambda p, x: tiff(p, (x // 2).astype(np.int8))),
    "32-bit integers": ("int32", lambda p, x: tiff(p, x.astype(np.int32), tile=TILE)),
    "4-bit grey": (
        "4-bit",
        lambda p, x: tiff(p, x[:, :, 0] // 16, photometric="minisblack", bitspersample=4),
    ),
    "two channels": (
        "1 more than its colour",
        lambda p, x: tiff(p, x[:, :, :2].copy(), photometric="minisblack", planarconfig="contig"),
    ),
    "three grey channels": (
        "2 more than its colour .*photometric='rgb'",
        lambda p, x: tiff(p, x, photometric="minisblack", planarconfig="contig"),
    ),
    "a fourth channel": (
        "1 more than its colour",
        lambda p, x: tiff(p, np.concatenate([x, HALF], 2), extrasamples=["unspecified"]),
    ),
    "five channels": ("2 more than its colour", lambda p, x: tiff(p, np.concatenate([x, HALF, HALF], 2), tile=TILE)),
    "five planes": ("2 more", lambda p, x: planes(p, np.concatenate([x, HALF, HALF], 2))),
    "inks": (r"\(8-bit whole numbers, CMYK", lambda p, x: tiff(p, np.dstack([x, HALF]), photometric="separated")),
    "inks tiled": ("CMYK", lambda p, x: tiff(p, np.dstack([x, HALF]), photometric="separated", tile=TILE)),
    "Lab": ("CIELAB", lambda p, x: tiff(p, x, photometric="cielab")),
    "raw YCbCr": ("YCbCr.*not compressed as JPEG", lambda p, x: tiff(p, x, photometric="ycbcr")),
    "YCbCr in LZW": ("YCbCr", lambda p, x: tiff(p, x, photometric="ycbcr", compression="lzw", tile=TILE)),
    "Pillow YCbCr": ("YCbCr", lambda p, x: Image.fromarray(x).convert("YCbCr").save(p)),
    "pages": (r"several planes .*\(axes 3 I × 60 Y × 90 X × 3 S\)", lambda p, x: write_pages(p, [x, x, x])),
    "pages of tiles": ("several planes", lambda p, x: write_pages(p, [x, 255 - x], tile=TILE)),
    "stack of Pillow": (
        "several planes",
        lambda p, x: Image.fromarray(x).save(p, save_all=True, append_images=[Image.fromarray(255 - x)]),
    ),
    "rows as pages": ("several planes", lambda p, x: tifffile.imwrite(p, x, photometric="minisblack")),
    "ImageJ composite": (
        "axes 3 C .*photometric='rgb'",
        lambda p, x: tifffile.imwrite(p, stack("C", 3), imagej=True, metadata={"axes": "CYX"}),
    ),
    "ImageJ stack": (
        "plane in focus",
        lambda p, x: tifffile.imwrite(p, stack("Z", 4), imagej=True, metadata={"axes": "ZYX"}),
    ),
    "ImageJ hyperstack": (
        "axes 2 T × 3 Z × 2 C",
        lambda p, x: tifffile.imwrite(p, stack("TZC", 2, 3, 2), imagej=True, metadata={"axes": "TZCYX"}),
    ),
    "ImageJ 16 bits": (
        "uint16",
        lambda p, x: tifffile.imwrite(p, x[:, :, 0].astype(np.uint16), imagej=True, metadata={"axes": "YX"}),
    ),
}
OME: dict[str, tuple[str, Any]] = {
    "fluorescence": ("axes 4 C", (stack("C", 4), {"axes": "CYX"})),
    "three channels": ("axes 3 C", (stack("C", 3), {"axes": "CYX"})),
    "focus": ("axes 5 Z", (stack("Z", 5), {"axes": "ZYX"})),
    "all": ("axes 2 T × 2 C × 3 Z", (stack("TCZ", 2, 2, 3), {"axes": "TCZYX"})),
    "colour in focus": ("axes 3 Z .* 3 S", (np.stack([PIXELS] * 3), {"axes": "ZYXS"})),
}


def is_refused(path: Path, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadSection, match=rf"section 'S': .*{path.name} .*{says}") as found:
        ImagePatches(path, np.zeros((1, 2)), 1.0, section="S")
    assert "\n" not in str(found.value) and len(str(found.value)) < 600
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", REFUSED)
def test_refused(tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    says, write = REFUSED[form]
    write(tmp_path / "image.tif", PIXELS)
    capfd.readouterr()
    is_refused(tmp_path / "image.tif", says, capfd)


@pytest.mark.parametrize("tile", [{}, {"tile": TILE}], ids=["flat", "tiled"])
@pytest.mark.parametrize("form", OME)
def test_ome_refused(tmp_path: Path, form: str, tile: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    says, (pixels, metadata) = OME[form]
    photometric = "rgb" if "S" in metadata["axes"] else "minisblack"
    tifffile.imwrite(tmp_path / "image.ome.tif", pixels, photometric=photometric, metadata=metadata, **tile)
    is_refused(tmp_path / "image.ome.tif", says, capfd)


def test_several_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(PIXELS, photometric="rgb", metadata={"axes": "YXS"})
        file.write(PIXELS[:50, :80].copy(), photometric="rgb", metadata={"axes": "YXS"})
    is_refused(path, r"holds 2 pictures \(90 × 60, 80 × 50 pixels\)", capfd)
    path = tmp_path / "small_first.tif"
    write_pages(path, [PIXELS[::4, ::4].copy(), PIXELS])
    is_refused(path, r"holds 2 pictures \(23 × 15, 90 × 60", capfd)


@pytest.mark.parametrize(("kind", "is_fine"), [(0x010001, True), (0x010002, True), (0, False), (0x020002, False)])
def test_previews_of_a_camera(tmp_path: Path, kind: int, is_fine: bool, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.jpg"
    small = Image.fromarray(PIXELS[::4, ::4])
    Image.fromarray(PIXELS).save(path, "MPO", save_all=True, append_images=[small], quality=98, subsampling=0)
    with Image.open(path) as image:
        entry = image.mpinfo[0xB002][1]
    stored = path.read_bytes()
    at = stored.index(entry["Size"].to_bytes(4, "little")) - 4  # the kind stands before the size
    path.write_bytes(stored[:at] + kind.to_bytes(4, "little") + stored[at + 4 :])
    if is_fine:
        assert np.abs(whole(path).astype(int) - PIXELS).mean() < 3
    else:
        is_refused(path, "holds 2 pictures", capfd)


def test_a_picture_in_another_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:a"><Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{WIDTH}" SizeY="{HEIGHT}" SizeC="3" '
        'SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1">'
        '<UUID FileName="other.ome.tif">urn:uuid:b</UUID></TiffData></Pixels></Image></OME>'
    )
    other = words.replace('UUID="urn:uuid:a"', 'UUID="urn:uuid:b"')
    tiff(tmp_path / "other.ome.tif", 255 - PIXELS, description=other)
    tiff(tmp_path / "image.ome.tif", PIXELS, description=words)
    is_refused(tmp_path / "image.ome.tif", "refers to pixels in other files", capfd)


@pytest.mark.parametrize("form", ["slide.tif", "slide.ome.tif", "slide.svs"])
def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "section").mkdir()
    tifffile.imwrite(tmp_path / "scans" / form, PIXELS, photometric="rgb", tile=TILE)
    (tmp_path / "section" / "image.tif").symlink_to(tmp_path / "scans" / form)
    (tmp_path / "again.tif").symlink_to(Path("section") / "image.tif")
    (tmp_path / "folder").symlink_to(tmp_path / "scans")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "section" / "image.tif", Path("again.tif"), Path("folder") / form):
        np.testing.assert_array_equal(whole(path), PIXELS)


def test_colours_that_are_not_stated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiff(tmp_path / "image.tif", GREY, photometric="minisblack")
    tag = (262).to_bytes(2, "little") + (3).to_bytes(2, "little")
    path.write_bytes(path.read_bytes().replace(tag, (65_000).to_bytes(2, "little") + tag[2:]))
    is_refused(path, "colours not stated", capfd)


@pytest.mark.parametrize("subfiletype", [0, 1])
def test_a_thumbnail_behind_the_picture_is_no_second_one(tmp_path: Path, subfiletype: int) -> None:
    path = tmp_path / "image.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(PIXELS, photometric="rgb", metadata=None)
        file.write(PIXELS[:20, :30].copy(), photometric="rgb", metadata=None, subfiletype=subfiletype)
    np.testing.assert_array_equal(whole(path), PIXELS)


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_sixteen_bits_of_a_png(tmp_path: Path, colour: int, capfd: pytest.CaptureFixture[str]) -> None:
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    write_png(tmp_path / "image.png", 16, colour, png_rows(np.zeros((HEIGHT, WIDTH, samples), dtype=">u2")))
    is_refused(tmp_path / "image.png", "more than 8 bits .* 8-bit RGB", capfd)


@pytest.mark.parametrize("ending", ["png", "webp", "gif"])
def test_films(tmp_path: Path, ending: str, capfd: pytest.CaptureFixture[str]) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(tmp_path / f"image.{ending}", save_all=True, append_images=frames[1:])
    is_refused(tmp_path / f"image.{ending}", "holds 2 pictures", capfd)


@pytest.mark.parametrize(("ending", "says"), [("jp2", "JPEG2000"), ("ppm", "PPM"), ("tga", "TGA"), ("ico", "ICO")])
def test_formats_whose_pixels_may_be_anything(
    tmp_path: Path, ending: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / f"image.{ending}")
    is_refused(tmp_path / f"image.{ending}", f"format {says}; save it as 8-bit RGB", capfd)


def test_inks_of_a_jpeg(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(PIXELS).convert("CMYK").save(tmp_path / "image.jpg")
    is_refused(tmp_path / "image.jpg", r"CMYK.* sRGB", capfd)


def test_another_program_s_format_is_not_called_damaged_alone(tmp_path: Path) -> None:
    (tmp_path / "image.tif").write_bytes(b"ZISRAWFILE" + bytes(500))
    with pytest.raises(BadSection, match=r"unknown format.* save it as a tiled 8-bit RGB \.tif"):
        ImagePatches(tmp_path / "image.tif", np.zeros((1, 2)), 1.0)


# Colour spaces -------------------------------------------------------------------------------------------------------


def profile(gamma: float = 2.2, *, swapped: bool = False, kind: bytes = b"mntr") -> bytes:
    """A matrix profile as programs embed it: sRGB's primaries (red and green swapped), a power for the curve."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    made[12:16] = kind
    for entry in range(int.from_bytes(made[128:132])):
        at = 132 + 12 * entry
        name, offset = bytes(made[at : at + 4]), int.from_bytes(made[at + 4 : at + 8])
        if name in (b"rTRC", b"gTRC", b"bTRC") and gamma != 2.2:
            made[offset : offset + 16] = (
                b"curv" + bytes(4) + (1).to_bytes(4) + round(gamma * 256).to_bytes(2) + bytes(2)
            )
        if swapped and name in (b"rXYZ", b"gXYZ"):
            made[at : at + 4] = b"gXYZ" if name == b"rXYZ" else b"rXYZ"
    return bytes(made)


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        (profile(), False),
        (profile(1.0), True),
        (profile(1.8), True),
        (profile(swapped=True), True),
        (profile(1.0, kind=b"scnr"), False),
        (b"", False),
        (b"no profile" * 30, False),
    ],
    ids=["sRGB", "linear", "1.8", "other primaries", "scanner", "none", "damaged"],
)
@pytest.mark.parametrize("form", ["image.jpg", "image.png", "flat.tif", "tiled.tif"])
def test_profiles(tmp_path: Path, stated: bytes, named: bool, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / form
    if form.endswith("tif"):
        tiff(path, PIXELS, iccprofile=stated or None, **({"tile": TILE} if form == "tiled.tif" else {}))
    else:
        Image.fromarray(PIXELS).save(path, icc_profile=stated or None, quality=98, subsampling=0)
    if named:
        is_refused(path, "has colour space 'sRGB built-in'.* convert it to sRGB", capfd)
    else:
        assert np.abs(whole(path).astype(int) - PIXELS).mean() < 3


def test_openslide_follows_the_same_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openslide")
    monkeypatch.setattr(slides, "_OPENSLIDE_ONLY", (".tif",))
    for stated in (None, profile(), profile(1.0, kind=b"scnr")):
        path = tiff(tmp_path / "image.tif", PIXELS, tile=TILE, compression="deflate", iccprofile=stated)
        np.testing.assert_array_equal(whole(path), PIXELS)
    path = tiff(tmp_path / "image.tif", PIXELS, tile=TILE, compression="deflate", iccprofile=profile(swapped=True))
    with pytest.raises(BadSection, match="convert it to sRGB"):
        whole(path)


@pytest.mark.parametrize(("gamma", "is_fine"), [(45455, True), (47000, True), (100000, False), (55556, False)])
def test_gamma_of_a_png(tmp_path: Path, gamma: int, is_fine: bool, capfd: pytest.CaptureFixture[str]) -> None:
    write_png(tmp_path / "image.png", 8, 2, png_rows(PIXELS), (b"gAMA", gamma.to_bytes(4)))
    if is_fine:
        np.testing.assert_array_equal(whole(tmp_path / "image.png"), PIXELS)
    else:
        is_refused(tmp_path / "image.png", "gamma", capfd)
    write_png(tmp_path / "told.png", 8, 2, png_rows(PIXELS), (b"sRGB", b"\0"), (b"gAMA", gamma.to_bytes(4)))
    np.testing.assert_array_equal(whole(tmp_path / "told.png"), PIXELS)


@pytest.mark.parametrize(
    ("primaries", "is_fine"),
    [
        ((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), True),
        ((0.31269, 0.32899, 0.63999, 0.33001, 0.3, 0.6, 0.15, 0.05999), True),
        ((0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07), True),  # SMPTE C
        ((0.0,) * 8, True),  # says nothing
        ((0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), False),  # Adobe RGB
        ((0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), False),  # Display P3
        ((0.3457, 0.3585, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), False),  # another white
    ],
)
def test_primaries_of_a_png(
    tmp_path: Path, primaries: tuple[float, ...], is_fine: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    chunk = (b"cHRM", b"".join(round(value * 100_000).to_bytes(4) for value in primaries))
    write_png(tmp_path / "image.png", 8, 2, png_rows(PIXELS), chunk)
    if is_fine:
        np.testing.assert_array_equal(whole(tmp_path / "image.png"), PIXELS)
    else:
        is_refused(tmp_path / "image.png", "has colour space 'primaries", capfd)
    write_png(tmp_path / "told.png", 8, 2, png_rows(PIXELS), (b"sRGB", b"\0"), chunk)
    np.testing.assert_array_equal(whole(tmp_path / "told.png"), PIXELS)


@pytest.mark.parametrize("stated", [profile(1.0), profile(1.8), profile(swapped=True)])
def test_a_profile_in_a_format_of_scanners_is_the_scanner_s(
    tmp_path: Path, stated: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiff(
        tmp_path / "slide.svs",
        PIXELS,
        tile=TILE,
        compression="deflate",
        iccprofile=stated,
        description=f"Aperio Image Library v12.0.15\r\n{PIXELS.shape[1]}x{PIXELS.shape[0]}|AppMag = 20|MPP = 0.5",
    )
    np.testing.assert_array_equal(whole(path), PIXELS)
    pytest.importorskip("openslide")
    monkeypatch.setattr(slides, "_OPENSLIDE_ONLY", (".svs",))
    np.testing.assert_array_equal(whole(path), PIXELS)


def test_a_profile_of_grey() -> None:
    assert colour_space(None) == colour_space(b"") == ""
    made = profile(1.0)
    assert colour_space(made[:16] + b"CMYK" + made[20:]) == ""  # of other pixels than these: no program applies it


# Libraries are silent ------------------------------------------------------------------------------------------------


def test_no_library_speaks_for_itself(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    index = Image.fromarray(PIXELS).quantize(16)
    index.info["transparency"] = bytes([255] * 16)  # Pillow advises to convert it
    index.save(tmp_path / "palette.png")
    Image.fromarray(PIXELS).save(tmp_path / "note.png", pnginfo=_long_note())
    tiff(tmp_path / "odd.tif", PIXELS, description="<OME half")
    Image.fromarray(PIXELS).save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    for path in sorted(tmp_path.iterdir()):
        assert whole(path).shape == PIXELS.shape
    assert not recwarn.list and capfd.readouterr() == ("", "")


def _long_note() -> Any:
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("Raw profile type 8bim", "x" * 2_000_000, zip=True)
    return note


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tag", "says"), [(324, "no pixels"), (325, ""), (256, "no pixels")])
def test_a_lost_tag(tmp_path: Path, tag: int, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiff(tmp_path / "image.tif", PIXELS, tile=TILE)
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].tags[tag].offset
    raw = bytearray(path.read_bytes())
    raw[at : at + 2] = (65_000).to_bytes(2, "little")
    path.write_bytes(raw)
    is_refused(path, f"cannot be read as an image .*{says}", capfd)


READ = """
import sys, numpy as np
from pathlib import Path
from agl_bench import BadSection, ImagePatches
try:
    ImagePatches(Path(sys.argv[1]), np.array([[40.0, 30]]), 1.0).read(np.array([0]), 8, 60.0)
except BadSection as error:
    print(error)
"""


def test_damaged_tiles_leave_no_tracebacks_behind(tmp_path: Path) -> None:
    path = tiff(tmp_path / "image.tif", PIXELS, tile=TILE, compression="deflate")
    with tifffile.TiffFile(path) as file:
        starts = file.pages[0].dataoffsets
    with path.open("r+b") as raw:
        for start in starts:
            raw.seek(start)
            raw.write(b"\xff\xff\xff\xff")
    ended = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    assert "image.tif cannot be read as an image" in ended.stdout and ended.stderr == ""


@pytest.mark.parametrize("ending", ["tif", "png", "jpg"])
def test_a_flipped_bit_is_never_a_traceback(tmp_path: Path, ending: str, capfd: pytest.CaptureFixture[str]) -> None:
    path, rng, refused = tmp_path / f"image.{ending}", np.random.default_rng(0), 0
    if ending == "tif":
        tiff(path, PIXELS, tile=TILE, compression="deflate")
    else:
        Image.fromarray(PIXELS).save(path)
    sound = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(sound)
        damaged[rng.integers(0, 600)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        try:
            patches = ImagePatches(path, np.array([[8.0, 8], [40, 30]]), 1.0, section="S").read(np.arange(2), 8, 8.0)
            assert patches.shape == (2, 3, 8, 8)
        except BadSection:
            refused += 1
    assert refused and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "magic", [b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM"]
)
def test_a_good_beginning_is_not_enough(tmp_path: Path, magic: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    rest = np.random.default_rng(1).integers(0, 256, 2000, dtype=np.uint8).tobytes()
    (tmp_path / "image.tif").write_bytes(magic + rest)
    is_refused(tmp_path / "image.tif", "cannot be read as an image", capfd)
