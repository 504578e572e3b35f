"""Patches from images and arrays, on files that the tests write."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from agl_bench import ArrayPatches, BadSection, ImagePatches, read_embedding
from agl_bench.data.patches import BLOCK, blocks_of


def write_image(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_patch_equals_the_pixels_where_nothing_is_resized(tmp_path: Path) -> None:
    pixels = noise(40, 60, 3)
    source = ImagePatches(write_image(tmp_path / "image.png", pixels), np.array([[30.0, 20.0], [10, 8]]), 0.5)
    patches = source.read(np.array([0, 1]), 8, 4.0)
    assert patches.dtype == np.uint8
    np.testing.assert_array_equal(patches[0], pixels[16:24, 26:34].transpose(2, 0, 1))
    np.testing.assert_array_equal(patches[1], pixels[4:12, 6:14].transpose(2, 0, 1))


def test_position_is_column_then_row(tmp_path: Path) -> None:
    pixels = np.full((100, 200, 3), 255, dtype=np.uint8)
    x, y = 150, 30
    pixels[y - 2 : y + 2, x - 2 : x + 2] = (255, 0, 0)
    pixels[y + 4 : y + 6, x - 1 : x + 1] = (0, 0, 255)  # below, so a larger row
    patch = ImagePatches(write_image(tmp_path / "image.png", pixels), np.array([[x, y]]), 1.0).read(
        np.array([0]), 20, 20.0
    )[0]
    assert patch[:, 9:11, 9:11].reshape(3, -1).T.tolist() == [[255, 0, 0]] * 4
    assert patch[:, 14:16, 9:11].reshape(3, -1).T.tolist() == [[0, 0, 255]] * 4


def test_white_beyond_the_border(tmp_path: Path) -> None:
    pixels = np.zeros((30, 30, 3), dtype=np.uint8)
    source = ImagePatches(write_image(tmp_path / "image.png", pixels), np.array([[0.0, 15], [30, 30], [15, 15]]), 1.0)
    left, corner, middle = source.read(np.arange(3), 10, 10.0)
    assert (left[:, :, :5] == 255).all() and (left[:, :, 5:] == 0).all()
    assert (corner[:, :5, :5] == 0).all() and (corner[:, 5:] == 255).all() and (corner[:, :, 5:] == 255).all()
    assert (middle == 0).all()


def test_border_patch_equals_that_of_a_padded_image(tmp_path: Path) -> None:
    pixels = noise(50, 50, 3)
    padded = np.full((110, 110, 3), 255, dtype=np.uint8)
    padded[30:80, 30:80] = pixels
    spot = np.array([[4.3, 46.1]])
    plain = ImagePatches(write_image(tmp_path / "a.png", pixels), spot, 0.7).read(np.array([0]), 7, 14.0)
    wide = ImagePatches(write_image(tmp_path / "b.png", padded), spot + 30, 0.7).read(np.array([0]), 7, 14.0)
    assert np.abs(plain.astype(int) - wide).max() <= 1  # rounding of the filter's coefficients


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    patch = ImagePatches(write_image(tmp_path / "image.png", stripes), np.array([[32, 32]]), 1.0).read(
        np.array([0]), 4, 64.0
    )
    assert np.abs(patch[:, :, :, 1:-1].astype(int) - 127).max() <= 4


def test_image_is_decoded_once_for_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "image.png", noise(40, 40, 3))
    positions = np.random.default_rng(1).uniform(0, 40, (BLOCK + 9, 2))
    source = ImagePatches(path, positions, 1.0)
    decoded = []
    prepare = PngImageFile.load_prepare  # called when pixels are decoded, not when they are there already
    monkeypatch.setattr(PngImageFile, "load_prepare", lambda self: decoded.append(1) or prepare(self))
    found = np.zeros((len(positions), 3, 8, 8), dtype=np.uint8)
    sizes = []
    for rows, patches in blocks_of(source, np.arange(len(positions)), 8, 8.0):
        found[rows] = patches
        sizes.append(len(rows))
    assert sorted(sizes) == [9, BLOCK]
    assert decoded == [1]
    one_by_one = np.concatenate([source.read(np.array([row]), 8, 8.0) for row in (0, 5, BLOCK + 8)])
    np.testing.assert_array_equal(found[[0, 5, BLOCK + 8]], one_by_one)
    assert len(decoded) == 4  # nothing is kept


def test_rows_in_any_order_and_repeated(tmp_path: Path) -> None:
    image = write_image(tmp_path / "image.png", noise(40, 40, 3))
    for source in (
        ImagePatches(image, np.random.default_rng(1).uniform(0, 40, (7, 2)), 1.0),
        ArrayPatches(noise(7, 8, 8, 3), 8.0, rows=np.array([6, 0, 0, 3, 2, 1, 6])),
    ):
        every = source.read(np.arange(7), 8, 8.0)
        order = np.array([6, 0, 3, 3, 1])
        np.testing.assert_array_equal(source.read(order, 8, 8.0), every[order])


def test_a_source_that_only_reads_is_read_in_blocks() -> None:
    class Plain:
        def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
            return np.broadcast_to((rows % 251).astype(np.uint8)[:, None, None, None], (len(rows), 3, side_px, side_px))

        def outside(self, positions: np.ndarray) -> np.ndarray:
            return np.empty(0, dtype=np.int64)

    blocks = list(blocks_of(Plain(), np.arange(1, 2 * BLOCK), 2, 1.0))
    assert [len(rows) for rows, _ in blocks] == [BLOCK, BLOCK - 1]
    for rows, patches in blocks:
        assert (patches[:, 2, 1, 0] == rows % 251).all()


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode, colour in (("L", 9), ("RGBA", (9, 9, 9, 255)), ("LA", (9, 255))):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (20, 20), colour).save(path)
        assert (ImagePatches(path, np.array([[10, 10]]), 1.0).read(np.array([0]), 4, 4.0) == 9).all()


def test_outside(tmp_path: Path) -> None:
    source = ImagePatches(write_image(tmp_path / "image.png", noise(30, 60, 3)), np.zeros((0, 2)), 1.0)
    positions = np.array([[59.0, 29], [29, 59], [-1, 3], [0, 0], [np.nan, 1]])
    assert source.outside(positions).tolist() == [1, 2, 4]


def test_large_image_needs_no_setting(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    guard = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "image.png"
    Image.new("1", (20_000, 10_000)).save(path)
    assert ImagePatches(path, np.zeros((0, 2)), 1.0).width == 20_000
    assert guard == Image.MAX_IMAGE_PIXELS and not recwarn.list


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0"])
def test_file_that_is_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "S1" / "image.jpg"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(BadSection, match=r"section 'S1': .*image\.jpg cannot be read"):
        ImagePatches(path, np.zeros((1, 2)), 1.0)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_truncated_image(tmp_path: Path, ending: str) -> None:
    path = write_image(tmp_path / f"image.{ending}", noise(200, 200, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadSection, match=r"section 'C2': .* damaged or incomplete"):
        ImagePatches(path, np.full((1, 2), 50.0), 1.0, section="C2").read(np.array([0]), 8, 8.0)


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png", np.zeros((9, 9), dtype=np.uint16))
    with pytest.raises(BadSection, match="8-bit RGB"):
        ImagePatches(path, np.zeros((1, 2)), 1.0)


def write_hest(path: Path, img: np.ndarray, barcodes: list[str]) -> Path:
    with h5py.File(path, "w") as file:
        file["img"] = img
        file["coords"] = np.zeros((len(img), 2), dtype=np.int64)
        file["barcode"] = np.array(barcodes, dtype="S").reshape(-1, 1)
    return path


def test_array_patches_follow_their_rows(tmp_path: Path) -> None:
    img = noise(600, 6, 6, 3)  # more than two blocks
    rows = np.array([599, 0, 255, 256, 0])
    path = write_hest(tmp_path / "patches.h5", img, [f"S{i}" for i in range(600)])
    source = ArrayPatches(path, 112.0, rows=rows)
    np.testing.assert_array_equal(source.read(np.arange(5), 6, 112.0), img[rows].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(source.read(np.array([3]), 6, 112.0), img[[256]].transpose(0, 3, 1, 2))
    assert source.outside(np.full((5, 2), -1.0)).tolist() == []


def test_file_and_memory_give_the_same(tmp_path: Path) -> None:
    img = noise(5, 16, 16, 3)
    path = write_hest(tmp_path / "patches.h5", img, list("abcde"))
    for side_px, side_um in ((16, 112.0), (8, 112.0), (8, 56.0), (20, 100.0)):
        there = ArrayPatches(path, 112.0).read(np.arange(5), side_px, side_um)
        np.testing.assert_array_equal(there, ArrayPatches(img, 112.0).read(np.arange(5), side_px, side_um))


def test_smaller_tissue_is_the_middle_and_larger_is_refused() -> None:
    img = noise(2, 16, 16, 3)
    source = ArrayPatches(img, 112.0, section="S")
    np.testing.assert_array_equal(source.read(np.arange(2), 8, 56.0), img[:, 4:12, 4:12].transpose(0, 3, 1, 2))
    with pytest.raises(BadSection, match=r"show 112 µm .* 200 µm"):
        source.read(np.arange(2), 8, 200.0)
    np.testing.assert_array_equal(
        ArrayPatches(img).read(np.arange(2), 16, 200.0), img.transpose(0, 3, 1, 2)
    )  # extent not known: used whole


def test_patches_are_matched_by_bytes_barcodes(tmp_path: Path) -> None:
    img = noise(3, 4, 4, 3)
    path = write_hest(tmp_path / "patches.h5", img, ["AA-1", "CC-1", "BB-1"])
    source, kept = ArrayPatches.matched(path, ["BB-1", "XX-1", "AA-1"])
    assert kept.tolist() == [0, 2]
    np.testing.assert_array_equal(source.read(np.arange(2), 4, 1.0), img[[2, 0]].transpose(0, 3, 1, 2))


def test_barcodes_that_do_not_fit(tmp_path: Path) -> None:
    path = write_hest(tmp_path / "patches.h5", noise(2, 4, 4, 3), ["AA-1", "BB-1"])
    with pytest.raises(BadSection, match="'AA-1', the counts have 'AA-2'"):
        ArrayPatches.matched(path, ["AA-2", "BB-2"])
    path = write_hest(tmp_path / "patches.h5", noise(2, 4, 4, 3), ["AA-1", "AA-1"])
    with pytest.raises(BadSection, match="'AA-1' more than once"):
        ArrayPatches.matched(path, ["AA-1"])


@pytest.mark.parametrize("array", [noise(2, 3, 4, 4), noise(2, 4, 5, 3), noise(4, 4, 3), np.zeros((2, 4, 4, 3))])
def test_other_layouts_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    path = write_hest(tmp_path / "patches.h5", array, ["a"])
    for source in (path, array):
        with pytest.raises(BadSection, match="uint8 \\(patches, H, H, 3\\)"):
            ArrayPatches(source)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (noise(5, 3, 8, 8), r"uint8 \(5, 3, 8, 8\).* numpy\.moveaxis\(array, 1, -1\)"),
        (noise(3, 3, 8, 8), r"numpy\.moveaxis\(array, 1, -1\)"),
        (noise(5, 8, 8, 4), "leave the fourth channel out"),
        (noise(5, 8, 8, 3) / 255, "float64 .* multiply values from 0 to 1 by 255"),
        (noise(5, 8, 8, 3).astype(np.uint16), "uint16"),
        (noise(5, 8, 9, 3), r"\(patches, H, H, 3\)"),
        (noise(5, 8, 8), r"\(5, 8, 8\)"),
    ],
)
def test_what_to_do_about_another_layout(tmp_path: Path, array: np.ndarray, says: str) -> None:
    path = write_hest(tmp_path / "patches.h5", array, list("abcde")[: len(array)])
    for source in (path, array):
        with pytest.raises(BadSection, match=says):
            ArrayPatches(source)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (noise(3, 20, 30), r"numpy\.moveaxis\(array, 0, -1\)"),
        (noise(20, 30, 4), "leave the fourth channel out"),
        (noise(20, 30, 3).astype(np.float32) / 255, "float32 .* multiply values from 0 to 1 by 255"),
        (noise(20, 30), r"has to be uint8 \(height, width, 3\)"),
        ([[1, 2]], "is list without a shape"),
        (None, "is NoneType without a shape"),
    ],
)
def test_pixels_of_another_layout(pixels: object, says: str) -> None:
    with pytest.raises(BadSection, match=rf"section 'S': its image .*{says}"):
        ImagePatches(pixels, np.zeros((1, 2)), 1.0, section="S")


def test_a_path_may_be_a_text(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png", noise(20, 30, 3))
    assert ImagePatches(str(path), np.zeros((1, 2)), 1.0).width == 30


def test_row_beyond_the_array() -> None:
    with pytest.raises(BadSection, match="2 patches"):
        ArrayPatches(noise(2, 4, 4, 3), rows=np.array([0, 2]))


def test_forbidden_files_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", forbidden)
    monkeypatch.setattr(Path, "open", forbidden)  # chmod stops no test that root runs
    for make in (
        lambda: ArrayPatches(tmp_path / "patches.h5", section="S1"),
        lambda: ImagePatches(tmp_path / "image.png", np.zeros((1, 2)), 1.0, section="S1"),
    ):
        with pytest.raises(
            BadSection, match=r"section 'S1': .* cannot be read: permission denied; change its permissions"
        ):
            make()


def test_corrupt_h5(tmp_path: Path) -> None:
    path = tmp_path / "S1" / "patches.h5"
    path.parent.mkdir()
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 100)
    for read in (lambda: ArrayPatches(path), lambda: ArrayPatches.matched(path, ["a"])):
        with pytest.raises(BadSection, match=r"section 'S1': .*patches\.h5 cannot be read as HDF5"):
            read()
    write_hest(path, noise(50, 16, 16, 3), ["a"])
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(BadSection, match="damaged or incomplete"):
        ArrayPatches(path)
    with h5py.File(path, "w") as file:
        file["other"] = 1
    with pytest.raises(BadSection, match="no dataset 'img'; it has: other"):
        ArrayPatches(path)


def test_damage_that_shows_while_reading(tmp_path: Path) -> None:
    path = tmp_path / "patches.h5"
    img = noise(64, 16, 16, 3)
    with h5py.File(path, "w") as file:
        offset = file.create_dataset("img", data=img, chunks=(64, 16, 16, 3), compression="gzip").id
        chunk = offset.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\0" * 64)
    source = ArrayPatches(path, section="S")
    with pytest.raises(BadSection, match=r"section 'S': .* damaged"):
        source.read(np.arange(2), 16, 112.0)


@pytest.mark.parametrize(
    ("features", "barcode"), [("embeddings", "barcodes"), ("features", "barcode"), ("feats", "barcode")]
)
def test_embedding_is_matched_by_barcode(tmp_path: Path, features: str, barcode: str) -> None:
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    with h5py.File(tmp_path / "embedding.h5", "w") as file:
        file[features] = values
        file[barcode] = np.array([["b"], ["a"], ["c"]], dtype="S")
    read = read_embedding(tmp_path / "embedding.h5", ["a", "b"])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values[[1, 0]])


def test_embedding_errors(tmp_path: Path) -> None:
    path = tmp_path / "embedding.h5"
    with h5py.File(path, "w") as file:
        file["embeddings"] = np.zeros((2, 3))
        file["barcodes"] = ["a", "b"]
    with pytest.raises(BadSection, match="no features for 1 of 2 spots, the first is 'x'"):
        read_embedding(path, ["a", "x"])
    with pytest.raises(BadSection, match="the file has 'a', the counts have 'x'"):
        read_embedding(path, ["x"])
    with h5py.File(path, "w") as file:
        file["embeddings"] = np.zeros((3, 3))
        file["barcodes"] = ["a", "b"]
    with pytest.raises(BadSection, match=r"\(3, 3\) for 2 rows"):
        read_embedding(path, ["a"])
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 3))
    with pytest.raises(BadSection, match="no dataset 'barcode' or 'barcodes'"):
        read_embedding(path, ["a"])
