"""One section written in every layout is one and the same section, whoever reads it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from agl_bench import BadSection, BadSpec, Dataset, MissingData, Section
from agl_bench.bench.cells import CellStore
from agl_bench.bench.describe import section_card
from agl_bench.bench.recorder import NoRecorder
from agl_bench.bench.run import Bench, run_cells
from agl_bench.bench.spec import Campaign
from agl_bench.bench.validate import find_dataset, validate
from agl_bench.data.check import check_section
from agl_bench.data.fingerprint import section_fingerprint
from agl_bench.registry.plugins import Plugins
from agl_bench.testing import check_dataset
from agl_bench_plugins.datasets.folder import Folder
from agl_bench_plugins.datasets.her2st import Her2st
from agl_bench_plugins.datasets.hest import Hest
from agl_bench_plugins.datasets.spatialdata import SpatialDataStores
from agl_bench_plugins.datasets.visium import Visium

LAYOUTS = ("folder", "folder_patches", "hest", "visium_h5", "visium_mtx", "visium_parquet", "spatialdata")
SETTINGS = {"spatialdata": ("spatialdata.um_per_px=7",)}  # what a layout does not say itself
NOWHERE = Path("/nowhere")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover(strict=True)


def open_layout(plugins: Plugins, measured, layout: str, root: Path) -> tuple[str, Dataset]:
    return find_dataset(plugins, str(getattr(measured, layout)(root)), SETTINGS.get(layout, ()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_reads_the_same(plugins: Plugins, measured, layout: str, tmp_path: Path) -> None:
    name, dataset = open_layout(plugins, measured, layout, tmp_path / "data")
    assert name == layout.partition("_")[0]
    assert dataset.names(NOWHERE) == list(dataset.sections(NOWHERE)) == ["S1"]
    section = dataset.read(NOWHERE, "S1")
    check_section(section)
    assert (section.name, section.um_per_px, section.dropped_spots) == ("S1", 7.0, 0)
    assert list(section.counts.obs_names) == measured.barcodes
    assert list(section.counts.var_names) == measured.genes
    np.testing.assert_array_equal(section.counts.X.toarray(), measured.counts)
    np.testing.assert_array_equal(section.counts.obsm["spatial"], measured.positions)
    assert section.patches is not None
    patches = section.patches.read(np.arange(len(measured.barcodes)), 16, 112.0)
    for patch, (x, y) in zip(patches, measured.positions, strict=True):
        np.testing.assert_array_equal(patch, measured.pixels[y - 8 : y + 8, x - 8 : x + 8].transpose(2, 0, 1))
    fingerprint = section_fingerprint(Section("written", measured.table(), 7.0))
    assert section_fingerprint(section) == fingerprint
    files = dataset.files(NOWHERE, "S1")
    assert files and all(path.is_file() for path in files)
    (verdict,) = validate(name, dataset, NOWHERE)
    assert verdict.problems == ()
    assert "80 spots, 30 genes, 7 µm per pixel" in verdict.facts and fingerprint in verdict.facts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_keeps_the_rules_of_the_door(plugins: Plugins, measured, layout: str, tmp_path: Path) -> None:
    _, dataset = open_layout(plugins, measured, layout, tmp_path / "data")
    assert [verdict for verdict in check_dataset(dataset, NOWHERE) if verdict.problem is not None] == []


def test_results_are_the_same_whatever_the_layout(plugins: Plugins, measured, tmp_path: Path) -> None:
    results = {}
    for layout in LAYOUTS:
        if layout == "spatialdata" and importlib.util.find_spec("spatialdata") is None:
            continue  # the extra is not installed; the others are still compared
        root = getattr(measured, layout)(tmp_path / layout)
        name, _ = find_dataset(plugins, str(root), SETTINGS.get(layout, ()))
        given = plugins.entry(name, "dataset").load().settings_at(root)
        campaign = Campaign.of(
            plugins,
            selectors=["pgl"],
            datasets=[name],
            evaluation=["intra"],
            preset="smoke",
            assignments=[
                *(f"{name}.{key}={value}" for key, value in given.items()),
                *SETTINGS.get(layout, ()),
                *("protocol.epochs=1", "protocol.primary_genes=4", "protocol.min_genes_per_spot=1"),
                *("protocol.buffer_um=0", "tiny.patch_px=16"),
            ],
        )
        cells = campaign.cells(plugins, NOWHERE, device="cpu", fingerprint={name: layout})[:1]
        events = list(
            run_cells(cells, Bench(plugins, NOWHERE, torch.device("cpu")), CellStore(tmp_path / "work"), NoRecorder())
        )
        results[layout] = events[-1].result
    first = results.pop("folder")
    assert np.isfinite(first.pcc)
    for layout, result in results.items():
        assert result.scores == first.scores, layout
        assert result.counts == first.counts, layout
        pd.testing.assert_frame_equal(result.genes, first.genes)


def test_fingerprint_knows_no_order_and_every_value(measured) -> None:
    table = measured.table()
    same = section_fingerprint(Section("a", table, 7.0))
    rng = np.random.default_rng(0)
    shuffled = table[rng.permutation(table.n_obs), rng.permutation(table.n_vars)].copy()
    shuffled.X = np.asarray(shuffled.X.toarray(), dtype=np.float64)
    shuffled.obsm["spatial"] *= 2
    assert section_fingerprint(Section("b", shuffled, 3.5)) == same
    for change in ("count", "place", "spot", "gene", "scale"):
        other = table.copy()
        if change == "count":
            other.X.data[5] += 1
        elif change == "place":
            other.obsm["spatial"][3, 1] += 0.01
        elif change == "spot":
            other.obs_names = [*other.obs_names[:-1], "new"]
        elif change == "gene":
            other.var_names = [*other.var_names[:-1], "new"]
        assert section_fingerprint(Section("a", other, 7.1 if change == "scale" else 7.0)) != same, change


# --- Space Ranger ----------------------------------------------------------------------------------------------------


def spatial_of(root: Path) -> Path:
    return root / "S1" / "outs" / "spatial"


def test_size_of_a_pixel_follows_from_the_array(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    scales = spatial_of(root) / "scalefactors_json.json"
    scales.write_text('{"spot_diameter_fullres": 8}')
    # Rounded to whole pixels of 7 µm, the places are off by 1 µm or so.
    assert Visium(path=str(root)).read(NOWHERE, "S1").um_per_px == pytest.approx(7.0, rel=0.01)
    path = spatial_of(root) / "tissue_positions.csv"
    table = pd.read_csv(path)
    angle = np.deg2rad(31)
    x, y = table["array_col"] * 50.0, table["array_row"] * 50 * np.sqrt(3)
    for side in (1, -1):  # rotated, and mirrored too
        table["pxl_col_in_fullres"] = 90 + side * (x * np.cos(angle) - y * np.sin(angle)) / 9
        table["pxl_row_in_fullres"] = 90 + (x * np.sin(angle) + y * np.cos(angle)) / 9
        table.to_csv(path, index=False)
        dataset = Visium(path=str(root), mirrored=side < 0)
        assert dataset.read(NOWHERE, "S1").um_per_px == pytest.approx(9.0, rel=1e-12)
    with pytest.raises(BadSection, match=r"tissue_positions\.csv shows the array mirrored, .*visium\.mirrored=true"):
        Visium(path=str(root)).read(NOWHERE, "S1")


def test_sample_folder_and_its_outs_are_the_same_section(plugins: Plugins, measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    (root / "S1" / "slide.tif").rename(root / "S1" / "outs" / "slide.tif")
    for path in (root, root / "S1", root / "S1" / "outs"):
        name, dataset = find_dataset(plugins, str(path), ())
        assert (name, dataset.names(NOWHERE)) == ("visium", ["S1"])
        check_section(dataset.read(NOWHERE, "S1"))


def test_reduced_image_only_if_asked_for(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    (root / "S1" / "slide.tif").unlink()
    with pytest.raises(MissingData, match=r"no full-resolution image.*visium\.image=hires"):
        Visium(path=str(root)).read(NOWHERE, "S1")
    measured.write_image(spatial_of(root) / "tissue_hires_image.png")
    with pytest.raises(MissingData, match="no full-resolution image"):
        Visium(path=str(root)).read(NOWHERE, "S1")
    with pytest.raises(BadSection, match="tissue_hires_scalef"):
        Visium(path=str(root), image="hires").read(NOWHERE, "S1")
    (spatial_of(root) / "scalefactors_json.json").write_text('{"tissue_hires_scalef": 0.5, "microns_per_pixel": 7.0}')
    # Features are placed in pixels of the full resolution, whatever image is beside them.
    features = write_trident(tmp_path / "features" / "S1.h5", measured)
    section = Visium(path=str(root), image="hires", embeddings=str(tmp_path / "features")).read(NOWHERE, "S1")
    np.testing.assert_array_equal(section.embedding, features)
    assert section.um_per_px == 14.0
    np.testing.assert_array_equal(section.counts.obsm["spatial"], measured.positions / 2)


def test_image_is_named_where_there_are_several(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    measured.write_image(root / "S1" / "other.png")
    with pytest.raises(BadSection, match=r"several images \(other\.png, slide\.tif\).*visium\.image=NAME"):
        Visium(path=str(root)).read(NOWHERE, "S1")
    dataset = Visium(path=str(root), image="other.png")
    assert dataset.files(NOWHERE, "S1")[-1] == root / "S1" / "other.png"
    with pytest.raises(MissingData, match=r"none\.png is not there"):
        Visium(path=str(root), image="none.png").read(NOWHERE, "S1")


def test_spots_beside_the_tissue_are_left_out(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    path = spatial_of(root) / "tissue_positions.csv"
    table = pd.read_csv(path)
    table.loc[[0, 7], "in_tissue"] = 0
    table.sample(frac=1, random_state=0).to_csv(path, index=False)
    section = Visium(path=str(root)).read(NOWHERE, "S1")
    check_section(section)
    assert section.dropped_spots == 2
    kept = np.delete(np.arange(80), [0, 7])
    assert list(section.counts.obs_names) == [measured.barcodes[spot] for spot in kept]
    np.testing.assert_array_equal(section.counts.obsm["spatial"], measured.positions[kept])


def test_antibodies_are_no_genes_and_symbols_are_told_apart(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    with h5py.File(root / "S1" / "outs" / "filtered_feature_bc_matrix.h5", "r+") as file:
        features = file["matrix/features"]
        features["feature_type"][2] = b"Antibody Capture"  # cut to the length of the type
        kinds = np.array(["Gene Expression"] * 30, dtype="S20")
        kinds[2] = b"Antibody Capture"
        del features["feature_type"]
        features["feature_type"] = kinds
        features["name"][4] = features["name"][3]
    section = Visium(path=str(root)).read(NOWHERE, "S1")
    assert list(section.counts.var_names[:4]) == ["GENE00", "GENE01", "GENE03", "GENE03-1"]
    np.testing.assert_array_equal(section.counts.X.toarray(), np.delete(measured.counts, 2, axis=1))


def test_donors_of_samples(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    dataset = Visium(path=str(root), donors=("S1=P3",))
    assert dataset.sections(NOWHERE) == {"S1": "P3"} and dataset.read(NOWHERE, "S1").donor == "P3"
    for wrong in ("S1", "S1=", "S2=P3"):
        with pytest.raises(BadSpec, match=r"visium\.donors has .* section=donor.*S1"):
            Visium(path=str(root), donors=(wrong,)).sections(NOWHERE)
    for unknown in ("nan", "NA", "None"):
        assert Visium(path=str(root), donors=(f"S1={unknown}",)).sections(NOWHERE) == {"S1": ""}
    with pytest.raises(BadSpec, match=r"visium\.donors names 'P3' and 'P4' for section 'S1'; give one"):
        Visium(path=str(root), donors=("S1=P3", "S1=P4")).sections(NOWHERE)


# --- SpatialData -----------------------------------------------------------------------------------------------------


def test_store_with_a_pyramid_and_scaled_shapes(measured, tmp_path: Path) -> None:
    pytest.importorskip("spatialdata", reason="the extra spatialdata is not installed")
    measured.store(scale=0.25, pyramid=True).write(tmp_path / "S1.zarr")
    section = SpatialDataStores(path=str(tmp_path), spot_diameter_um=55).read(NOWHERE, "S1")
    check_section(section)
    assert section.um_per_px == pytest.approx(7.0, rel=1e-12)
    np.testing.assert_allclose(section.counts.obsm["spatial"], measured.positions, rtol=1e-12)
    assert section.facts == {"table": "table", "image": "slide", "shapes": "spots"}
    assert section.patches is not None
    x, y = measured.positions[9]
    patch = section.patches.read(np.array([9]), 16, 16 * section.um_per_px)[0]
    np.testing.assert_array_equal(patch, measured.pixels[y - 8 : y + 8, x - 8 : x + 8].transpose(2, 0, 1))


def test_elements_are_named_where_there_are_several(measured, tmp_path: Path) -> None:
    pytest.importorskip("spatialdata", reason="the extra spatialdata is not installed")
    store = measured.store()
    store.images["other"] = store.images["slide"]
    store.write(tmp_path / "S1.zarr")
    with pytest.raises(BadSection, match=r"2 images \('other', 'slide'\).*spatialdata\.image=NAME"):
        SpatialDataStores(path=str(tmp_path), um_per_px=7).read(NOWHERE, "S1")
    SpatialDataStores(path=str(tmp_path), um_per_px=7, image="slide").read(NOWHERE, "S1")
    for kind in ("table", "image", "shapes"):
        with pytest.raises(BadSection, match=f"no {kind} 'none'; it has: '"):
            SpatialDataStores(path=str(tmp_path), um_per_px=7, **{"image": "slide", kind: "none"}).read(NOWHERE, "S1")
    with pytest.raises(BadSection, match=r"size of a pixel is not known.*spot_diameter_um is 0"):
        SpatialDataStores(path=str(tmp_path), image="slide").read(NOWHERE, "S1")


def test_package_of_stores_is_an_extra(measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spatialdata", None)
    (tmp_path / "S1.zarr").mkdir()
    with pytest.raises(MissingData, match=r"pip install 'agl-bench\[spatialdata\]'"):
        SpatialDataStores(path=str(tmp_path)).read(NOWHERE, "S1")


# --- features computed beforehand ------------------------------------------------------------------------------------


def write_trident(path: Path, measured, *, batch: bool = False, side: float | None = 32, shift: int = 0) -> np.ndarray:
    features = np.random.default_rng(1).normal(size=(len(measured.barcodes), 5)).astype(np.float32)
    order = np.random.default_rng(2).permutation(len(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features[order][None] if batch else features[order]
        file["coords"] = (measured.positions - 16 + shift)[order]
        if side is not None:
            file["coords"].attrs["patch_size"] = 224
            file["coords"].attrs["patch_size_level0"] = side
    return features


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("layout", ["folder", "hest", "visium_h5"])
def test_trident_features_are_matched_by_place(measured, layout: str, batch: bool, tmp_path: Path) -> None:
    root = getattr(measured, layout)(tmp_path / "data")
    path = {"folder": root / "S1" / "embedding.h5"}.get(layout, tmp_path / "features" / "S1.h5")
    features = write_trident(path, measured, batch=batch, shift=1)
    dataset = {
        "folder": Folder(path=str(root)),
        "hest": Hest(ids=("S1",), path=str(root), embeddings=str(tmp_path / "features")),
        "visium_h5": Visium(path=str(root), embeddings=str(tmp_path / "features")),
    }[layout]
    section = dataset.read(NOWHERE, "S1")
    check_section(section)
    np.testing.assert_array_equal(section.embedding, features)
    assert dataset.files(NOWHERE, "S1")[-1] == path


def test_features_that_do_not_fit(measured, tmp_path: Path) -> None:
    root = measured.folder(tmp_path)
    path = root / "S1" / "embedding.h5"

    def refused(message: str) -> None:
        with pytest.raises(BadSection, match=f"section 'S1': .*embedding.h5 {message}"):
            Folder(path=str(root)).read(NOWHERE, "S1")

    write_trident(path, measured, side=None)
    refused("names no barcodes and its 'coords' have no attribute patch_size_level0")
    write_trident(path, measured, shift=1000)
    with pytest.raises(BadSection, match=r"no patch of .*embedding.h5 is centred on a spot: the nearest .* px away"):
        Folder(path=str(root)).read(NOWHERE, "S1")
    write_trident(path, measured)
    with h5py.File(path, "r+") as file:
        file["coords"][file["coords"].shape[0] // 2] = (5000, 5000)
    refused("has no patch around it for 1 of 80 spots")


# --- what is known of a section --------------------------------------------------------------------------------------


def test_spot_diameter_of_visium_is_on_the_card(measured, tmp_path: Path) -> None:
    root = str(measured.visium_h5(tmp_path))
    scales = json.loads((tmp_path / "S1/outs/spatial/scalefactors_json.json").read_text())
    card = section_card(Visium(path=root).read(NOWHERE, "S1"))
    assert card.spot_um == pytest.approx(scales["spot_diameter_fullres"] * card.um_per_px) == pytest.approx(55)
    assert card.facts == {"matrix": "filtered_feature_bc_matrix.h5", "image": "slide.tif"}


def test_image_of_her2st_has_the_size_of_its_positions(measured, tmp_path: Path) -> None:
    root = measured.folder(tmp_path / "her2st")
    dataset, path = Her2st(sections=("S1",)), root / "S1" / "counts.h5ad"
    height, width = measured.pixels.shape[:2]
    for stated in ((), (width, height), (width * 2, height * 2), (height, width)):
        sizes = dict(zip(("image_width", "image_height"), stated, strict=False))
        measured.table(um_per_px=7.0, **sizes).write_h5ad(path)
        if stated in ((), (width, height)):
            check_section(dataset.read(tmp_path, "S1"))
        else:
            with pytest.raises(BadSection, match=f"image.png is {width} × {height} px, .* an image of {stated[0]} × "):
                dataset.read(tmp_path, "S1")


def test_hest_facts_and_donor_column(measured, tmp_path: Path) -> None:
    section = Hest(ids=("S1",), path=str(measured.hest(tmp_path / "hest"))).read(NOWHERE, "S1")
    assert section.facts == {"organ": "Heart", "st_technology": "Visium"}
    root = measured.folder(tmp_path / "mine")
    path = root / "S1" / "counts.h5ad"
    for values, donor in ((["P4"] * 80, "P4"), ([7] * 80, "7"), (["P4"] * 79 + ["P5"], ""), ([None] * 80, "")):
        table = measured.table(um_per_px=7.0)
        table.obs["donor"] = pd.Categorical(values) if values[0] != 7 else values
        table.write_h5ad(path)
        assert Folder(path=str(root)).sections(NOWHERE) == {"S1": donor}
        assert Folder(path=str(root)).read(NOWHERE, "S1").donor == donor
    table.uns["patient"] = "P9"
    table.write_h5ad(path)
    assert Folder(path=str(root)).sections(NOWHERE) == {"S1": "P9"}
    assert json.loads((tmp_path / "hest" / "metadata" / "S1.json").read_text())["organ"] == "Heart"
