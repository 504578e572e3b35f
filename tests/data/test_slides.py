"""Slides in every supported form give the pixels of the same content; damaged ones are one sentence."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from agl_bench import BadSection, ImagePatches
from agl_bench.data import slides
from agl_bench.data.slides import open_slide

TILE = (64, 64)


def make_pixels(height: int = 300, width: int = 370) -> np.ndarray:
    rough = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


PIXELS = make_pixels()
POSITIONS = np.random.default_rng(1).uniform(0, 300, (60, 2))
ROWS = np.arange(len(POSITIONS))


def write_pyramid(path: Path, *, inside: bool) -> None:
    """Levels inside of the first (OME-TIFF), or after it (as vips and most converters write them)."""
    with tifffile.TiffWriter(path) as file:
        file.write(PIXELS, tile=TILE, photometric="rgb", subifds=2 if inside else None)
        for step in (2, 4):
            small = np.asarray(Image.fromarray(PIXELS).reduce(step))
            file.write(small, tile=TILE, photometric="rgb", subfiletype=1)


def write(folder: Path, form: str) -> Path:
    path = folder / f"{form}.{'ome.tif' if form == 'inside' else 'tif'}"
    if form == "tiles":
        tifffile.imwrite(path, PIXELS, tile=TILE, photometric="rgb")
    elif form == "deflate":
        tifffile.imwrite(path, PIXELS, tile=TILE, photometric="rgb", compression="deflate", predictor=True)
    elif form == "lzw":
        tifffile.imwrite(path, PIXELS, tile=TILE, photometric="rgb", compression="lzw")
    elif form == "big":
        tifffile.imwrite(path, PIXELS, tile=TILE, photometric="rgb", bigtiff=True, byteorder=">")
    elif form == "planar":
        planes = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
        tifffile.imwrite(path, planes, tile=TILE, photometric="rgb", planarconfig="separate")
    elif form == "alpha":
        solid = np.full((*PIXELS.shape[:2], 1), 255, dtype=np.uint8)
        tifffile.imwrite(path, np.concatenate([PIXELS, solid], 2), tile=TILE, photometric="rgb", extrasamples=[2])
    elif form in ("inside", "after"):
        write_pyramid(path, inside=form == "inside")
    elif form == "strips":
        tifffile.imwrite(path, PIXELS, photometric="rgb", rowsperstrip=7)
    return path


def patches_of(path: Path, side_px: int = 16, side_um: float = 16.0) -> np.ndarray:
    return ImagePatches(path, POSITIONS, 1.0).read(ROWS, side_px, side_um)


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("png") / "image.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.mark.parametrize("form", ["tiles", "deflate", "lzw", "big", "planar", "alpha", "inside", "after", "strips"])
@pytest.mark.parametrize(("side_px", "side_um"), [(16, 16.0), (32, 20.0), (30, 41.3)])
def test_same_content_same_patches(tmp_path: Path, png: Path, form: str, side_px: int, side_um: float) -> None:
    path = write(tmp_path, form)
    with open_slide(path, "S") as slide:
        assert isinstance(slide, slides._Tiff)
        assert (slide.width, slide.height) == (370, 300)
    np.testing.assert_array_equal(patches_of(path, side_px, side_um), patches_of(png, side_px, side_um))


def test_large_strips_are_read_in_part(tmp_path: Path, png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "_LARGE_TIFF", 100)
    path = write(tmp_path, "strips")
    with open_slide(path, "S") as slide:
        assert isinstance(slide, slides._Tiff)
    np.testing.assert_array_equal(patches_of(path), patches_of(png))


def test_jpeg_tiles_are_rgb(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    tifffile.imwrite(path, PIXELS, tile=TILE, photometric="rgb", compression="jpeg", compressionargs={"level": 95})
    decoded = tifffile.imread(path)
    Image.fromarray(decoded).save(tmp_path / "decoded.png")
    assert np.abs(decoded.astype(int) - PIXELS).mean() < 3
    np.testing.assert_array_equal(patches_of(path), patches_of(tmp_path / "decoded.png"))


@pytest.mark.parametrize("kind", ["minisblack", "miniswhite"])
def test_grey_tiles(tmp_path: Path, kind: str) -> None:
    grey = PIXELS[:, :, 0].copy()
    path = tmp_path / "grey.tif"
    tifffile.imwrite(path, 255 - grey if kind == "miniswhite" else grey, tile=TILE, photometric=kind)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(patches_of(path), patches_of(tmp_path / "grey.png"))


@pytest.mark.parametrize("form", ["inside", "after"])
def test_the_coarsest_level_that_is_fine_enough(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form)
    with open_slide(path, "S") as slide:
        assert slide.levels == ((370, 300), (185, 150), (93, 75))
        assert [slide.level(scale) for scale in (0.5, 1.0, 1.9, 2.0, 3.9, 4.0, 50.0)] == [0, 0, 0, 1, 1, 2, 2]
    # 64 px of the full size to 16: the pixels of the last level as they are stored
    position = np.array([[128.0, 160.0]])
    patch = ImagePatches(path, position, 1.0).read(np.array([0]), 16, 64.0)[0]
    stored = np.asarray(Image.fromarray(PIXELS).reduce(4))[32:48, 24:40].transpose(2, 0, 1)
    np.testing.assert_array_equal(patch, stored)


def test_a_coarse_level_shows_the_same_tissue(tmp_path: Path, png: Path) -> None:
    inner = (POSITIONS > 40).all(1) & (POSITIONS < 260).all(1)
    coarse, fine = patches_of(write(tmp_path, "after"), 16, 64.0)[inner], patches_of(png, 16, 64.0)[inner]
    shifted = np.abs(coarse[:, :, :, 1:].astype(int) - fine[:, :, :, :-1]).mean()
    assert np.abs(coarse.astype(int) - fine).mean() < shifted / 4


def test_overview(tmp_path: Path, png: Path) -> None:
    for path in (png, write(tmp_path, "tiles")):
        small, scale = ImagePatches(path, POSITIONS, 1.0).overview(74)
        assert small.shape == (60, 74, 3) and scale == 5.0
        np.testing.assert_array_equal(small, np.asarray(Image.fromarray(PIXELS).resize((74, 60), Image.Resampling.BOX)))
    small, scale = ImagePatches(png, POSITIONS, 1.0).overview(4000)
    assert scale == 1.0 and np.array_equal(small, PIXELS)  # never enlarged


@pytest.mark.parametrize("form", ["tiles", "deflate", "inside", "after", "strips"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(tmp_path: Path, form: str, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, form)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(BadSection, match=rf"section 'S': .*{path.name} cannot be read as an image .* replace it"):
        ImagePatches(path, POSITIONS, 1.0, section="S").read(ROWS, 16, 16.0)
    assert capfd.readouterr().err == ""


def test_a_damaged_tile(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, PIXELS, tile=TILE, photometric="rgb", compression="deflate")
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[0]
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"\xff" * 100)
    with pytest.raises(BadSection, match=r"section 'S': .*slide\.tif cannot be read as an image"):
        ImagePatches(path, POSITIONS, 1.0, section="S").read(ROWS, 16, 16.0)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_other_than_eight_bits(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, PIXELS.astype(dtype), tile=TILE, photometric="rgb")
    with pytest.raises(BadSection, match="save it as 8-bit RGB"):
        ImagePatches(path, POSITIONS, 1.0)


def test_too_large_to_decode_whole(png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "_LARGEST_DECODED", 1000)
    with pytest.raises(BadSection, match=r"370 × 300 pixels, too many .* tiled \.tif"):
        ImagePatches(png, POSITIONS, 1.0)


# --- libvips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_streamed_gives_the_same(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyvips")
    path = tmp_path / f"image.{ending}"
    Image.fromarray(PIXELS).save(path)
    monkeypatch.setattr(slides, "BAND", 16)
    before = [patches_of(path, 16, side_um) for side_um in (16.0, 60.5)]
    overview, _ = ImagePatches(path, POSITIONS, 1.0).overview(74)
    monkeypatch.setattr(slides, "_LARGE_STREAM", 100)
    with open_slide(path, "S") as slide:
        assert isinstance(slide, slides._Streamed)
        for top in (280, 0, 100, 90, 3):  # backwards too
            np.testing.assert_array_equal(
                slide.region(0, 5, top, 300, top + 20), np.asarray(Image.open(path))[top : top + 20, 5:300]
            )
            assert len(slide._rows) < 60
    for patches, side_um in zip(before, (16.0, 60.5), strict=True):
        np.testing.assert_array_equal(patches_of(path, 16, side_um), patches)
    np.testing.assert_array_equal(ImagePatches(path, POSITIONS, 1.0).overview(74)[0], overview)


def test_streamed_and_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyvips")
    path = tmp_path / "image.jpg"
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setattr(slides, "_LARGE_STREAM", 100)
    with pytest.raises(BadSection, match=r"section 'S': .*image\.jpg cannot be read as an image"):
        ImagePatches(path, POSITIONS, 1.0, section="S").read(ROWS, 16, 16.0)


# --- OpenSlide -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tiles", "deflate", "after"])
def test_openslide_gives_the_same(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openslide")
    path = write(tmp_path, form)
    before = [patches_of(path, 16, side_um) for side_um in (16.0, 20.5)]
    monkeypatch.setattr(slides, "_OPENSLIDE_ONLY", (".tif",))
    with open_slide(path, "S") as slide:
        assert isinstance(slide, slides._OpenSlide)
    for patches, side_um in zip(before, (16.0, 20.5), strict=True):
        np.testing.assert_array_equal(patches_of(path, 16, side_um), patches)


def write_aperio(path: Path) -> None:
    """As the scanners of Leica write it: full size, thumbnail, coarser level, label, macro."""
    pixels = PIXELS[:296, :368]  # whole multiples of 4, so that both readers mean the same pixel of the coarser level

    def words(what: str) -> str:
        return f"Aperio Image Library v11.2.1\r\n368x296 [0,0 368x296] (64x64) {what}|AppMag = 20|MPP = 0.5"

    look = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}, "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=TILE, description=words("JPEG/RGB Q=95"), **look)
        file.write(pixels[::4, ::4], rowsperstrip=74, description=words("-> 92x74"), **look)
        file.write(np.asarray(Image.fromarray(pixels).reduce(4)), tile=TILE, description=words("JPEG/RGB"), **look)
        for name, kind in (("label", 1), ("macro", 9)):
            words_of = f"Aperio Image Library v11.2.1\r\n{name} 40x40"
            file.write(np.zeros((40, 40, 3), np.uint8), subfiletype=kind, rowsperstrip=40, description=words_of, **look)


def test_aperio_through_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openslide = pytest.importorskip("openslide")
    path = tmp_path / "slide.svs"
    write_aperio(path)
    assert openslide.OpenSlide.detect_format(path) == "aperio"
    levels = ((368, 296), (92, 74))
    with open_slide(path, "S") as slide:
        assert isinstance(slide, slides._Tiff) and slide.levels == levels
    before = [patches_of(path, 16, side_um) for side_um in (16.0, 64.0)]  # of either level
    monkeypatch.setattr(slides, "_OPENSLIDE_ONLY", (".svs",))
    with open_slide(path, "S") as slide:
        assert isinstance(slide, slides._OpenSlide) and slide.levels == levels
    for patches, side_um in zip(before, (16.0, 64.0), strict=True):
        np.testing.assert_array_equal(patches_of(path, 16, side_um), patches)


def test_openslide_errors(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    path = tmp_path / "slide.mrxs"
    for content in (None, b"", b"no slide"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadSection, match=r"section 'S': .*slide\.mrxs cannot be read as an image"):
            ImagePatches(path, POSITIONS, 1.0, section="S")


def test_without_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def absent(name: str, *words: Any, **more: Any) -> Any:
        if name == "openslide":
            raise ImportError(name)
        return imported(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(BadSection, match=r"pip install 'agl-bench\[wsi\]'"):
        ImagePatches(tmp_path / "slide.mrxs", POSITIONS, 1.0)
