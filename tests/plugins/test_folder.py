"""The folder reader on sections that the tests write, and on real her2st sections where they are there."""

from __future__ import annotations

import os
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from agl_bench import BadSection, BadSpec, MissingData, Section
from agl_bench.data.check import check_dataset, check_section
from agl_bench.interfaces.tunable import resolve, tunables
from agl_bench_plugins.datasets.folder import Folder
from agl_bench_plugins.datasets.her2st import Her2st

BARCODES = ["AA-1", "BB-1", "CC-1"]
POSITIONS = np.array([[20.0, 10], [50, 30], [70, 5]])


def write_counts(folder: Path, **uns: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    counts = anndata.AnnData(
        scipy.sparse.csr_matrix(np.arange(6, dtype=np.int32).reshape(3, 2)),
        obs=pd.DataFrame(index=BARCODES),
        var=pd.DataFrame(index=["G1", "G2"]),
        obsm={"spatial": POSITIONS},
        uns={"um_per_px": 2.0, **uns},
    )
    counts.write_h5ad(folder / "counts.h5ad")
    return folder


def write_image(folder: Path, name: str = "image.png") -> Path:
    pixels = np.full((40, 80, 3), 255, dtype=np.uint8)
    for spot, (x, y) in enumerate(POSITIONS.astype(int)):
        pixels[y - 1 : y + 1, x - 1 : x + 1] = (0, 100, spot)
    Image.fromarray(pixels).save(folder / name)
    return folder


def write_patches(path: Path, barcodes: list[str]) -> np.ndarray:
    img = np.random.default_rng(0).integers(0, 256, (len(barcodes), 8, 8, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        file["img"] = img
        file["coords"] = np.zeros((len(barcodes), 2))
        file["barcode"] = np.array(barcodes, dtype="S")[:, None]
    return img


def only(path: Path) -> Section:
    (section,) = Folder(path=str(path)).load(Path("/nowhere"))
    return section


def test_image_section(tmp_path: Path) -> None:
    write_image(write_counts(tmp_path / "S1", patient="P7"))
    section = only(tmp_path)
    check_section(section)
    assert (section.name, section.donor, section.um_per_px, section.dropped_spots) == ("S1", "P7", 2.0, 0)
    assert section.counts.X.format == "csr" and section.counts.X.dtype == np.int32
    assert section.patches is not None
    patches = section.patches.read(np.arange(3), 4, 8.0)  # 8 µm = 4 px: exact pixels
    assert patches[:, :, 1:3, 1:3].reshape(3, 3, 4).transpose(0, 2, 1).tolist() == [[[0, 100, s]] * 4 for s in range(3)]
    assert (patches[:, :, 0] == 255).all() and (patches[:, :, :, 3] == 255).all()


def test_sections_and_files(tmp_path: Path) -> None:
    write_image(write_counts(tmp_path / "mine" / "S2", donor="D2"))
    write_counts(tmp_path / "mine" / "S1", um_per_px=1)
    write_patches(tmp_path / "mine" / "S1" / "patches.h5", BARCODES)
    (tmp_path / "mine" / "notes").mkdir()
    (tmp_path / "mine" / "readme.txt").write_text("text")
    dataset = Folder(path="mine")
    assert list(dataset.sections(tmp_path).items()) == [("S1", ""), ("S2", "D2")]
    for name, files in (("S1", ["counts.h5ad", "patches.h5"]), ("S2", ["counts.h5ad", "image.png"])):
        assert dataset.files(tmp_path, name) == [tmp_path / "mine" / name / file for file in files]
    assert [section.name for section in dataset.load(tmp_path)] == ["S1", "S2"]
    chosen = Folder(path="mine", sections=("S2", "S1"))
    assert list(chosen.sections(tmp_path)) == [section.name for section in chosen.load(tmp_path)] == ["S2", "S1"]


def test_spots_without_a_patch_are_dropped(tmp_path: Path) -> None:
    folder = write_counts(tmp_path / "S1", patch_um=112.0)
    img = write_patches(folder / "patches.h5", ["CC-1", "XX-1", "AA-1"])
    with h5py.File(folder / "embedding.h5", "w") as file:
        file["embeddings"] = np.array([[3.0], [1.0]])
        file["barcodes"] = ["CC-1", "AA-1"]
    section = only(tmp_path)
    check_section(section)
    assert list(section.counts.obs_names) == ["AA-1", "CC-1"] and section.dropped_spots == 1
    assert section.counts.X.toarray().tolist() == [[0, 1], [4, 5]]
    assert section.embedding is not None and section.embedding.tolist() == [[1.0], [3.0]]
    assert section.patches is not None
    np.testing.assert_array_equal(
        section.patches.read(np.arange(2), 4, 56.0), img[[2, 0], 2:6, 2:6].transpose(0, 3, 1, 2)
    )


def test_no_barcode_matches(tmp_path: Path) -> None:
    write_patches(write_counts(tmp_path / "S1") / "patches.h5", ["AA", "BB"])
    with pytest.raises(BadSection, match=r"section 'S1': no barcode .* 'AA', the counts have 'AA-1'"):
        only(tmp_path)


def test_embedding_alone_is_enough(tmp_path: Path) -> None:
    folder = write_counts(tmp_path / "S1")
    with h5py.File(folder / "embedding.h5", "w") as file:
        file["features"] = np.eye(3)
        file["barcode"] = BARCODES
    section = only(tmp_path)
    assert section.patches is None
    assert section.embedding is not None and section.embedding.tolist() == np.eye(3).tolist()


def test_image_is_preferred_to_patches(tmp_path: Path) -> None:
    write_image(write_counts(tmp_path / "S1"))
    write_patches(tmp_path / "S1" / "patches.h5", ["other"])
    assert [path.name for path in Folder(path=str(tmp_path)).files(tmp_path, "S1")] == ["counts.h5ad", "image.png"]
    assert only(tmp_path).dropped_spots == 0


def test_missing_files(tmp_path: Path) -> None:
    def expect(message: str, **settings: object) -> None:
        dataset = Folder(**{"path": str(tmp_path), **settings})  # type: ignore[arg-type]
        for ask in (dataset.sections, dataset.load):
            with pytest.raises(MissingData, match=message):
                ask(tmp_path)

    expect(r"--set folder\.path", path="")
    expect("there is no folder .*nowhere", path="nowhere")
    expect("no subfolder with a counts.h5ad")
    write_counts(tmp_path / "S1")
    expect(r"S1 has no image\.jpg")
    write_image(tmp_path / "S1")
    expect(r"no section 'S9'; choose from S1", sections=("S9",))
    (tmp_path / "S2").mkdir()
    write_image(tmp_path / "S2")
    expect(r"section 'S2': .*counts\.h5ad is not there")
    with pytest.raises(BadSpec, match="'S1' is chosen more than once"):
        Folder(path=str(tmp_path), sections=("S1", "S1")).load(tmp_path)


def test_damaged_counts(tmp_path: Path) -> None:
    folder = write_image(write_counts(tmp_path / "S1"))
    whole = (folder / "counts.h5ad").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (folder / "counts.h5ad").write_bytes(content)
        with pytest.raises(BadSection, match=r"section 'S1': .*counts\.h5ad cannot be read"):
            only(tmp_path)
        with pytest.raises(BadSection, match=r"section 'S1': .*counts\.h5ad cannot be read"):
            Folder(path=str(tmp_path)).sections(tmp_path)
    with h5py.File(folder / "counts.h5ad", "w") as file:
        file.create_group("X").attrs["encoding-type"] = "something else"
    with pytest.raises(BadSection, match="section 'S1'"):
        only(tmp_path)


def test_damaged_image_names_section_and_file(tmp_path: Path) -> None:
    write_image(write_counts(tmp_path / "S1"))
    (tmp_path / "S1" / "image.png").write_bytes(b"text")
    with pytest.raises(BadSection, match=r"section 'S1': .*image\.png cannot be read as an image"):
        only(tmp_path)
    write_image(tmp_path / "S1", "image.jpg")
    with pytest.raises(BadSection, match=r"image\.jpg and image\.png"):
        only(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["IMAGE.PNG", "image.TIF", "Image.Tiff", "image.ome.tif", "image.OME.TIFF", "image.btf", "image.svs", "image.JPG"],
)
def test_image_names(tmp_path: Path, name: str) -> None:
    folder = write_counts(tmp_path / "S1")
    write_image(folder, "plain.png")
    with Image.open(folder / "plain.png") as image:
        kind = {"jpg": "jpeg", "png": "png"}.get(name[-3:].lower(), "tiff")
        image.save(folder / name, format=kind, **({"quality": 98, "subsampling": 0} if kind == "jpeg" else {}))
    (folder / "._image.tif").write_bytes(b"of another system")
    section = only(tmp_path)
    check_section(section)
    assert [path.name for path in Folder(path=str(tmp_path)).files(tmp_path, "S1")] == ["counts.h5ad", name]
    assert section.patches is not None and section.patches.read(np.arange(3), 4, 8.0)[:, 0, 1:3, 1:3].max() < 50


@pytest.mark.parametrize("name", ["a,b", ",", "a, b", "a=b.c"])
def test_a_section_may_have_a_comma_in_its_name(tmp_path: Path, name: str) -> None:
    folder = write_image(write_counts(tmp_path / name))
    given = Folder.settings_at(folder)
    (section,) = Folder(**resolve("folder", tunables(Folder), given)).load(Path("/nowhere"))  # type: ignore[arg-type]
    assert section.name == name


def test_a_name_that_is_not_read_is_told(tmp_path: Path) -> None:
    (write_counts(tmp_path / "S1") / "image.czi").write_bytes(b"ZISRAWFILE")
    with pytest.raises(MissingData, match=r"S1 has no image\.jpg .*it has image\.czi, which is not read"):
        only(tmp_path)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, "wide"])
def test_pixel_size_has_to_be_stated(tmp_path: Path, value: object) -> None:
    write_image(write_counts(tmp_path / "S1", um_per_px=value))
    with pytest.raises(BadSection, match=r"uns\['um_per_px'\] in counts\.h5ad is"):
        only(tmp_path)


def test_settings_are_tunables() -> None:
    assert list(tunables(Folder)) == ["path", "sections", "has_counts"]
    assert tunables(Her2st)["sections"].parse("B4,C2", owner="her2st") == ("B4", "C2")


def test_her2st_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="set AGL_BENCH_DATA to the folder that holds her2st/"):
        Her2st().load(tmp_path)


DATA = Path(os.environ.get("AGL_BENCH_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
real = pytest.mark.skipif(not (DATA / "her2st").is_dir(), reason=f"no real sections in {DATA}; set AGL_BENCH_DATA")


@real
def test_real_her2st() -> None:
    dataset = Her2st()
    assert dataset.sections(DATA) == dict.fromkeys(("C2", "C3", "C4", "C5"), "C")
    sections = dataset.load(DATA)
    check_dataset("her2st", sections)
    for section in sections:
        check_section(section)
    assert [section.counts.shape for section in sections] == [
        (187, 15_706),
        (180, 15_821),
        (184, 15_842),
        (181, 15_721),
    ]
    assert [len(dataset.files(DATA, name)) for name in dataset.sections(DATA)] == [2] * 4


@real
def test_real_patches_lie_on_tissue() -> None:
    (section,) = Her2st(sections=("B4",)).load(DATA)
    assert section.donor == "B" and section.patches is not None
    patches = section.patches.read(np.arange(section.counts.n_obs), 32, 112.0)
    assert patches.shape == (283, 3, 32, 32)
    with_tissue = (patches.mean(axis=(1, 2, 3)) < 215).mean()  # glass is nearly white, stained tissue is not
    assert with_tissue > 0.9
