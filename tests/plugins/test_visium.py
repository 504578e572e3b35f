"""What Space Ranger says twice is compared, and its tables and matrices are read however they were written."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from agl_bench import AglBenchError, BadSection, BadSpec, MissingData
from agl_bench.bench.validate import find_dataset
from agl_bench.data.check import check_section
from agl_bench.registry.plugins import Plugins
from agl_bench_plugins.datasets.visium import Visium

NOWHERE = Path("/nowhere")
PLACES = ["pxl_col_in_fullres", "pxl_row_in_fullres"]


def spatial_of(root: Path) -> Path:
    return root / "S1" / "outs" / "spatial"


def table_of(root: Path) -> pd.DataFrame:
    return pd.read_csv(spatial_of(root) / "tissue_positions.csv")


def write_table(root: Path, table: pd.DataFrame, **how: Any) -> None:
    table.to_csv(spatial_of(root) / "tissue_positions.csv", **{"index": False, **how})


def state(root: Path, **scales: object) -> None:
    path = spatial_of(root) / "scalefactors_json.json"
    stated = json.loads(path.read_text()) | scales
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


def picture(root: Path, measured: Any, factor: float, name: str = "tissue_hires_image.png", pixels=None) -> None:
    image = Image.fromarray(measured.pixels if pixels is None else pixels)
    size = max(round(image.width * factor), 1), max(round(image.height * factor), 1)
    image.resize(size, Image.Resampling.BOX).save(spatial_of(root) / name)


def said(root: Path, **settings: Any) -> str:
    """The sentence about the sample, "" where it is sound."""
    try:
        check_section(Visium(path=str(root), **settings).read(NOWHERE, "S1"))
    except AglBenchError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


# --- tables as they come ---------------------------------------------------------------------------------------------


def as_r(table: pd.DataFrame, path: Path) -> None:
    """write.csv(table, row.names = barcodes)."""
    table.set_index("barcode").to_csv(path, index_label="", quoting=csv.QUOTE_NONNUMERIC)


def as_r_table(table: pd.DataFrame, path: Path) -> None:
    """write.table: names of the columns have one field less."""
    text = table.set_index("barcode").to_csv(sep=" ", quoting=csv.QUOTE_NONNUMERIC)
    path.write_text(text.partition(" ")[2])


def as_german(table: pd.DataFrame, path: Path) -> None:
    floats = table.astype(dict.fromkeys(PLACES, float))
    floats.to_csv(path, index=False, sep=";", decimal=",", float_format="%.2f", encoding="utf-8-sig")


def as_windows(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, lineterminator="\r\n")
    path.write_bytes(path.read_bytes() + b"\r\n\r\n,,,,,\r\n")


WRITERS: dict[str, Callable[[pd.DataFrame, Path], Any]] = {
    "quoted": lambda table, path: table.to_csv(path, index=False, quoting=csv.QUOTE_ALL),
    "quoted text": lambda table, path: table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC),
    "byte-order mark": lambda table, path: table.to_csv(path, index=False, encoding="utf-8-sig"),
    "two bytes": lambda table, path: table.to_csv(path, index=False, sep="\t", encoding="utf-16"),
    "capitals": lambda table, path: table.rename(columns=str.title).to_csv(path, index=False),
    "spaces": lambda table, path: path.write_text(table.to_csv(index=False).replace(",", ", ")),
    "index": lambda table, path: table.to_csv(path),
    "other order": lambda table, path: table[table.columns[::-1]].to_csv(path, index=False),
    "more columns": lambda table, path: table.assign(cluster="a").to_csv(path, index=False),
    "tabs": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "semicolons": lambda table, path: table.to_csv(path, index=False, sep=";"),
    "no header": lambda table, path: table.to_csv(path, index=False, header=False),
    "no header, quoted": lambda table, path: table.to_csv(path, index=False, header=False, quoting=csv.QUOTE_ALL),
    "truth values": lambda table, path: table.assign(in_tissue=table["in_tissue"] == 1).to_csv(path, index=False),
    "fractions": lambda table, path: table.astype(dict.fromkeys(PLACES, float)).to_csv(path, index=False),
    "R": as_r,
    "R table": as_r_table,
    "German": as_german,
    "Windows": as_windows,
}


@pytest.mark.parametrize("how", WRITERS)
def test_table_is_read_however_it_was_written(measured, tmp_path: Path, how: str) -> None:
    root = measured.visium_h5(tmp_path)
    table = table_of(root)
    table.loc[3, "in_tissue"] = 0
    WRITERS[how](table, spatial_of(root) / "tissue_positions.csv")
    section = Visium(path=str(root)).read(NOWHERE, "S1")
    kept = np.delete(np.arange(80), 3)
    assert list(section.counts.obs_names) == [measured.barcodes[spot] for spot in kept]
    np.testing.assert_array_equal(section.counts.obsm["spatial"], measured.positions[kept])


@pytest.mark.parametrize("index", [False, True])
def test_parquet_with_barcodes_as_index(measured, tmp_path: Path, index: bool) -> None:
    root = measured.visium_parquet(tmp_path)
    path = spatial_of(root) / "tissue_positions.parquet"
    table = pd.read_parquet(path)
    (table.set_index("barcode") if index else table.convert_dtypes()).to_parquet(path)
    np.testing.assert_array_equal(Visium(path=str(root)).read(NOWHERE, "S1").counts.obsm["spatial"], measured.positions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(in_tissue=2), "has 2 in column in_tissue for spot 'AA0000-1'; it takes 0 or 1"),
        (lambda t: t.assign(Array_Row=0), "has column array_row more than once"),
        (lambda t: t.drop(columns=["barcode"]), "has no column barcode"),
    ],
)
def test_table_that_says_nothing_clear(measured, tmp_path: Path, change: Callable, message: str) -> None:
    root = measured.visium_h5(tmp_path)
    write_table(root, change(table_of(root)))
    assert message in said(root)


# --- matrices of old versions ----------------------------------------------------------------------------------------


def rewrite_features(root: Path, columns: int, *, packed: bool = True, called: str = "features.tsv") -> None:
    folder = root / "S1" / "outs" / "filtered_feature_bc_matrix"
    with gzip.open(folder / "features.tsv.gz", "rt") as file:
        lines = ["\t".join(line.rstrip("\n").split("\t")[:columns]) for line in file]
    (folder / "features.tsv.gz").unlink()
    if packed:
        with gzip.open(folder / f"{called}.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
        return
    (folder / called).write_text("\n".join(lines) + "\n")
    for name in ("matrix.mtx", "barcodes.tsv"):
        (folder / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
        (folder / f"{name}.gz").unlink()


@pytest.mark.parametrize(
    ("columns", "packed", "called"),
    [(2, True, "features.tsv"), (2, True, "genes.tsv"), (2, False, "genes.tsv"), (3, False, "features.tsv")],
)
def test_features_of_old_versions(measured, tmp_path: Path, columns: int, packed: bool, called: str) -> None:
    root = measured.visium_mtx(tmp_path)
    rewrite_features(root, columns, packed=packed, called=called)
    dataset = Visium(path=str(root))
    section = dataset.read(NOWHERE, "S1")
    assert list(section.counts.var_names) == measured.genes
    np.testing.assert_array_equal(section.counts.X.toarray(), measured.counts)
    assert f"{called}{'.gz' if packed else ''}" in [path.name for path in dataset.files(NOWHERE, "S1")]


def test_genes_are_called_as_they_are(measured, tmp_path: Path) -> None:
    measured.genes[3:7] = ["NA", "null", "nan", '"quoted']
    section = Visium(path=str(measured.visium_mtx(tmp_path))).read(NOWHERE, "S1")
    assert list(section.counts.var_names) == measured.genes


def test_matrix_and_its_folder_agree(measured, tmp_path: Path) -> None:
    root = measured.visium_mtx(tmp_path / "a")
    h5 = measured.visium_h5(tmp_path / "b")
    shutil.copy(h5 / "S1" / "outs" / "filtered_feature_bc_matrix.h5", root / "S1" / "outs")
    assert said(root) == ""
    folder = root / "S1" / "outs" / "filtered_feature_bc_matrix"
    with gzip.open(folder / "barcodes.tsv.gz", "wt") as file:
        file.write("\n".join(measured.barcodes[:70]) + "\n")
    assert "have different barcodes (80 and 70)" in said(root)


# --- positions, array, scale factors ---------------------------------------------------------------------------------


def test_tables_that_agree_pass_and_stale_ones_are_named(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    true = table_of(root)
    for name in ("tissue_positions.parquet", "tissue_positions_list.csv"):
        measured.write_positions(spatial_of(root) / name)
    assert said(root) == ""
    assert len(Visium(path=str(root)).files(NOWHERE, "S1")) == 6
    write_table(root, true.assign(**{place: true[place] + 0.4 for place in PLACES}))
    assert said(root) == ""  # whole pixels of an old table
    for stale in (
        true.assign(**{place: true[place] * 0.5 for place in PLACES}),
        true.assign(**{place: true[place] + 30 for place in PLACES}),
        true.assign(in_tissue=[0, *[1] * 79]),
        true.assign(barcode=np.roll(true["barcode"], 1)),
        true.assign(pxl_col_in_fullres=true[PLACES[1]], pxl_row_in_fullres=true[PLACES[0]]),
    ):
        write_table(root, stale)
        sentence = said(root)
        assert "tissue_positions.csv and tissue_positions.parquet differ in the positions of" in sentence
    write_table(root, true)
    stale.to_parquet(spatial_of(root) / "tissue_positions.parquet")
    assert "tissue_positions.csv and tissue_positions.parquet differ in the positions" in said(root)


def turned(table: pd.DataFrame, degrees: float, stretch: float = 1.0) -> pd.DataFrame:
    angle = np.deg2rad(degrees)
    x, y = table["array_col"] * 50 / 7.0, table["array_row"] * 50 * np.sqrt(3) / 7.0 * stretch
    across, down = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    return table.assign(pxl_col_in_fullres=across - across.min() + 20, pxl_row_in_fullres=down - down.min() + 20)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: turned(t, 3),
        lambda t: turned(t, 90),
        lambda t: turned(t, 180),
        lambda t: turned(t, 200, stretch=1.03),
        lambda t: t.assign(array_row=t["array_row"] + 40, array_col=t["array_col"] + 60),  # a part of the array
        lambda t: pd.concat([t, t.tail(8).assign(barcode=[f"off{i}-1" for i in range(8)], in_tissue=0)]),
    ],
)
def test_sound_positions_pass(measured, tmp_path: Path, change: Callable) -> None:
    measured.pixels = np.random.default_rng(0).integers(60, 220, (260, 260, 3), dtype=np.uint8)
    root = measured.visium_h5(tmp_path)
    write_table(root, change(table_of(root)))
    assert said(root) == ""


def swapped(names: list[str]) -> Callable:
    return lambda t: t.rename(columns=dict(zip(names, names[::-1], strict=True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.assign(**t[PLACES].sample(frac=1, random_state=0).reset_index(drop=True)),
            "off its place on the array (",
        ),
        (
            lambda t: t.assign(**t[PLACES].iloc[[1, 0, *range(2, 80)]].reset_index(drop=True)),
            "off its place on the array (2 spots)",
        ),
        (lambda t: t.assign(array_col=t["array_col"] // 2), "off its place on the array ("),
        (swapped(["array_row", "array_col"]), "do not belong together"),
        (swapped(PLACES), "shows the array mirrored"),
        (lambda t: t.assign(pxl_col_in_fullres=t[PLACES[0]].max() + 20 - t[PLACES[0]]), "shows the array mirrored"),
        (lambda t: t.assign(pxl_row_in_fullres=t[PLACES[1]] * 0.5), "do not belong together"),
        (lambda t: t.assign(**{p: t[p] * 0.5 for p in PLACES}), "states 7 µm per pixel, but in tissue_positions.csv"),
        (lambda t: t.assign(**{p: t[p] * 1.2 for p in PLACES}), "states 7 µm per pixel, but in tissue_positions.csv"),
    ],
)
def test_positions_that_contradict_the_array(measured, tmp_path: Path, change: Callable, message: str) -> None:
    root = measured.visium_h5(tmp_path)
    write_table(root, change(table_of(root)))
    assert message in said(root)


@pytest.mark.parametrize("reversed_", ["array_row", "array_col"])
@pytest.mark.parametrize(("rows", "columns", "larger"), [(78, 128, False), (128, 224, True)])
def test_larger_arrays_are_numbered_from_the_other_side(
    measured, tmp_path: Path, reversed_: str, rows: int, columns: int, larger: bool
) -> None:
    root = measured.visium_h5(tmp_path)
    table = table_of(root)
    across, down = table["array_col"] * 50 / 7.0, table["array_row"] * 50 * np.sqrt(3) / 7.0
    last = table[reversed_].max()
    numbered = table.assign(pxl_col_in_fullres=across + 20, pxl_row_in_fullres=down + 20)
    numbered[reversed_] = last + last % 2 - numbered[reversed_]  # an even one, so that even rows have even columns
    corner = numbered.tail(1).assign(barcode="corner-1", in_tissue=0, array_row=rows - 1, array_col=columns - 1)
    step = {"array_row": 50 * np.sqrt(3) / 7.0, "array_col": 50 / 7.0}
    for name, place in (("array_row", "pxl_row_in_fullres"), ("array_col", "pxl_col_in_fullres")):
        moved = (corner[name] - numbered[name].iloc[-1]) * step[name] * (-1 if name == reversed_ else 1)
        corner[place] = numbered[place].iloc[-1] + moved
    write_table(root, pd.concat([numbered, corner]))
    assert ("shows the array mirrored" in said(root)) is not larger
    assert said(root, mirrored=True) == ""


@pytest.mark.parametrize("spot_um", [52, 55, 65])
def test_spots_as_space_ranger_states_them(measured, tmp_path: Path, spot_um: float) -> None:
    root = measured.visium_h5(tmp_path)
    state(root, spot_diameter_fullres=spot_um / 7, microns_per_pixel=None)
    assert said(root) == ""


@pytest.mark.parametrize("factor", [0.17, 0.5, 2.0, 4.0])
def test_positions_of_another_image_than_the_spots(measured, tmp_path: Path, factor: float) -> None:
    measured.pixels = np.tile(measured.pixels, (5, 5, 1))
    root = measured.visium_h5(tmp_path)
    table = table_of(root)
    write_table(root, table.assign(**{place: table[place] * factor for place in PLACES}))
    state(root, microns_per_pixel=None)
    assert f"spot_diameter_fullres in scalefactors_json.json is {55 / factor:.3g}"[:-1] in said(root)


@pytest.mark.parametrize("stated", [7.0, None])
def test_spot_without_a_place_is_told(measured, tmp_path: Path, stated: float | None) -> None:
    root = measured.visium_h5(tmp_path)
    picture(root, measured, 0.5)
    table = table_of(root).astype(dict.fromkeys(PLACES, float))
    table.loc[3, PLACES] = np.nan
    write_table(root, table)
    state(root, microns_per_pixel=stated, tissue_hires_scalef=0.5)
    assert "spot 'TA0003-1' has no finite position (1 spots)" in said(root)


def test_few_spots_are_placed_by_the_whole_array(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    table = table_of(root)
    table["in_tissue"] = [*[1] * 2, *[0] * 78]
    write_table(root, table)
    state(root, microns_per_pixel=None)
    section = Visium(path=str(root)).read(NOWHERE, "S1")
    assert section.counts.n_obs == 2 and section.um_per_px == pytest.approx(7, rel=0.01)


# --- pictures and the image ------------------------------------------------------------------------------------------


def test_image_and_its_reduced_pictures_agree(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    picture(root, measured, 0.5)
    picture(root, measured, 0.2, "tissue_lowres_image.png")
    state(root, tissue_hires_scalef=0.5, tissue_lowres_scalef=0.2)
    assert said(root) == said(root, image="hires") == ""
    assert [path.name for path in Visium(path=str(root)).files(NOWHERE, "S1")][-3:] == [
        "tissue_hires_image.png",
        "tissue_lowres_image.png",
        "slide.tif",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.resize((image.width * 2, image.height * 2)), "was made from one of 1"),
        (lambda image: image.resize((image.width // 2, image.height // 2)), "was made from one of 1"),
        (lambda image: image.crop((30, 0, image.width, image.height)), "was made from one of 1"),
        (lambda image: image.rotate(90, expand=True), "was made from one of 1"),
        (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "shows different tissue"),
        (lambda image: image.rotate(180), "shows different tissue"),
        (lambda image: image.rotate(0, translate=(0, 25)), "shows different tissue"),
    ],
)
def test_image_that_space_ranger_was_not_given(measured, tmp_path: Path, change: Callable, message: str) -> None:
    root = measured.visium_h5(tmp_path)
    picture(root, measured, 0.5)
    state(root, tissue_hires_scalef=0.5)
    change(Image.fromarray(measured.pixels)).save(root / "S1" / "slide.tif")
    sentence = said(root)
    assert "slide.tif" in sentence and "tissue_hires_image.png" in sentence and message in sentence


def test_reduced_pictures_of_two_runs(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    (root / "S1" / "slide.tif").unlink()
    picture(root, measured, 0.5)
    picture(root, measured, 0.3, "tissue_lowres_image.png")
    state(root, tissue_hires_scalef=0.5, tissue_lowres_scalef=0.1)
    assert "is not from the same image as tissue_hires_image.png" in said(root, image="hires")


@pytest.mark.parametrize("name", ["tissue_hires_image.png", "tissue_lowres_image.png", "detected_tissue_image.jpg"])
def test_reduced_picture_is_not_taken_for_the_image(measured, tmp_path: Path, name: str) -> None:
    root = measured.visium_h5(tmp_path)
    picture(root, measured, 1.0, name)
    assert "is a reduced picture made by Space Ranger" in said(root, image=f"spatial/{name}")
    shutil.move(spatial_of(root) / name, root / "S1" / name)
    (root / "S1" / "slide.tif").unlink()
    assert "is a reduced picture made by Space Ranger" in said(root)


def test_picture_of_the_instrument_is_taken_only_if_named(measured, tmp_path: Path) -> None:
    root = measured.visium_h5(tmp_path)
    measured.write_image(root / "S1" / "outs" / "cytassist_image.tiff")
    assert said(root) == said(root, image="cytassist_image.tiff") == ""
    (root / "S1" / "slide.tif").rename(root / "S1" / "slide.OME.TIF")
    assert said(root) == ""
    (root / "S1" / "slide.OME.TIF").unlink()
    assert "there is no full-resolution image" in said(root)


# --- Visium HD -------------------------------------------------------------------------------------------------------


def write_bins(root: Path, measured: Any, width: int = 16, um_per_px: float = 4.0, **scales: object) -> Path:
    """A folder of bins, 8 × 10 of them, and the image beside binned_outputs/."""
    measured.visium_h5(root / "old")
    outs = root / "mine" / "outs"
    bins = outs / "binned_outputs" / f"square_{width:03d}um"
    bins.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / "old" / "S1" / "outs", bins)
    shutil.copy(root / "old" / "S1" / "slide.tif", outs / "slide.tif")
    shutil.rmtree(root / "old")
    row, column = np.divmod(np.arange(80), 10)
    names = [f"s_{width:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)]
    with h5py.File(bins / "filtered_feature_bc_matrix.h5", "r+") as file:
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array(names, "S")
    step = width / um_per_px
    pd.DataFrame(
        {
            "barcode": names,
            "in_tissue": 1,
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": row * step + 30.5,
            "pxl_col_in_fullres": 100 - column * step,  # seen from its back
        }
    ).to_parquet(bins / "spatial" / "tissue_positions.parquet")
    (bins / "spatial" / "tissue_positions.csv").unlink()
    stated = {"bin_size_um": float(width), "microns_per_pixel": um_per_px, "spot_diameter_fullres": step} | scales
    (bins / "spatial" / "scalefactors_json.json").write_text(json.dumps(stated))
    return bins


@pytest.mark.parametrize("width", [8, 16])
def test_bins_of_visium_hd(measured, tmp_path: Path, width: int) -> None:
    bins = write_bins(tmp_path, measured, width)
    outs = bins.parents[1]
    for path, settings in ((bins, ()), (outs, (f"visium.bins={width}",)), (outs.parent, (f"visium.bins={width}",))):
        name, dataset = find_dataset(Plugins.discover(strict=True), str(path), settings)
        assert (name, dataset.names(NOWHERE)) == ("visium", ["mine"])
        section = dataset.read(NOWHERE, "mine")
        check_section(section)
        assert (section.um_per_px, section.facts["bins"]) == (4.0, f"{width} µm")
        assert section.counts.n_obs == 80 and section.patches is not None
        assert dataset.files(NOWHERE, "mine")[-1] == outs / "slide.tif"


def test_visium_hd_says_what_to_give(measured, tmp_path: Path) -> None:
    bins = write_bins(tmp_path, measured)
    outs = bins.parents[1]
    with pytest.raises(MissingData, match=r"of Visium HD.*\(square_016um\); choose with --set visium\.bins=16 or 8"):
        Visium(path=str(outs)).read(NOWHERE, "mine")
    with pytest.raises(MissingData, match=r"no folder .*square_008um \(there is: square_016um\)"):
        Visium(path=str(outs), bins=8).read(NOWHERE, "mine")
    with pytest.raises(BadSpec, match=r"visium\.bins is 8, but section 'mine' has bins of 16 µm"):
        Visium(path=str(bins), bins=8).read(NOWHERE, "mine")
    with pytest.raises(BadSpec, match=r"visium\.bins is 16, but section 'S1' has spots"):
        Visium(path=str(measured.visium_h5(tmp_path / "spots")), bins=16).read(NOWHERE, "S1")
    for fine in (Visium(path=str(outs), bins=2), Visium(path=str(write_bins(tmp_path / "fine", measured, 2)))):
        with pytest.raises(BadSection, match=r"Visium HD bins of 2 µm .* use those of 8 or 16 µm"):
            fine.read(NOWHERE, "mine")


@pytest.mark.parametrize(
    ("scales", "change", "message"),
    [
        ({"bin_size_um": 8.0}, None, "its barcodes name bins of 16 µm, but scalefactors_json.json states"),
        ({"microns_per_pixel": 2.0}, None, "states 2 µm per pixel, but in tissue_positions.parquet"),
        ({"spot_diameter_fullres": 13.75}, None, "is 55 µm at 4 µm per pixel, but bins are 16 µm wide"),
        ({}, lambda t: t.assign(array_row=t["array_row"][::-1].to_numpy()), "array_row or array_col of bin"),
        ({}, lambda t: t.assign(**{p: t[p].sample(frac=1).to_numpy() for p in PLACES}), "off its place on the array"),
    ],
)
def test_bins_that_contradict_themselves(measured, tmp_path: Path, scales: dict, change, message: str) -> None:
    bins = write_bins(tmp_path, measured, **scales)
    path = bins / "spatial" / "tissue_positions.parquet"
    if change is not None:
        change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(BadSection) as caught:
        Visium(path=str(bins)).read(NOWHERE, "mine")
    assert message in str(caught.value)
