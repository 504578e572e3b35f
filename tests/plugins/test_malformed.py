"""Every malformed input gives exactly one sentence that names the section and says what to do."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from agl_bench import AglBenchError
from agl_bench.bench.validate import find_dataset, validate
from agl_bench.cli import main
from agl_bench.registry.plugins import Plugins

STORE = ("spatialdata.um_per_px=7",)
CASES: list[Any] = []
Damage = Callable[[Path, Any], None]


def case(layout: str, message: str, *settings: str) -> Callable[[Damage], Damage]:
    """Register a damage to files that `layout` has written, and what has to be said about it."""

    def register(damage: Damage) -> Damage:
        CASES.append(pytest.param(layout, damage, message, settings, id=f"{layout}-{damage.__name__}"))
        return damage

    return register


# --- AnnData folders -------------------------------------------------------------------------------------------------


def counts_of(root: Path) -> Path:
    return root / "S1" / "counts.h5ad"


def edit(path: Path, change: Callable[[anndata.AnnData], anndata.AnnData | None]) -> None:
    table = anndata.read_h5ad(path)
    changed = change(table)
    (table if changed is None else changed).write_h5ad(path)


def set_counts(value: float, dtype: str = "float32") -> Damage:
    def damage(root: Path, measured: Any) -> None:
        def change(table: anndata.AnnData) -> None:
            table.X = table.X.astype(dtype)
            table.X.data[17] = value

        edit(counts_of(root), change)

    return damage


for name, value, dtype, message in (
    ("fraction", 0.5, "float32", "is 0.5, not a whole number; give raw counts"),
    ("negative_float", -3, "float32", "is -3; raw counts are not negative"),
    ("negative_whole", -3, "int32", "is -3; raw counts are not negative"),
    ("nan", np.nan, "float64", "is nan; raw counts are finite"),
    ("infinite", np.inf, "float32", "is inf; raw counts are finite"),
):
    damage = set_counts(value, dtype)
    damage.__name__ = f"count_{name}"
    case("folder", f"the count of spot .* gene .* {message}")(damage)


@case("folder", "counts.X holds complex64; counts have to be numbers")
def counts_of_another_type(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda t: anndata.AnnData(t.X.toarray().astype("complex64"), t.obs, t.var, t.uns, t.obsm))


@case("folder", "all of its counts are zero")
def counts_all_zero(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda t: anndata.AnnData(scipy.sparse.csr_matrix(t.shape), t.obs, t.var, t.uns, t.obsm))


@case("folder", r"counts\.X is empty; put the raw counts")
def counts_without_x(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda t: anndata.AnnData(obs=t.obs, var=t.var, uns=t.uns, obsm=t.obsm))


@case("folder", r"not a whole number; give raw counts, not normalised ones; .*layers\['counts'\]")
def counts_normalised_with_a_layer(root: Path, measured: Any) -> None:
    def change(table: anndata.AnnData) -> None:
        table.layers["counts"] = table.X.copy()
        table.X = table.X.astype("float32").log1p()

    edit(counts_of(root), change)


@case("folder", r"counts\.h5ad cannot be read")
def counts_truncated(root: Path, measured: Any) -> None:
    whole = counts_of(root).read_bytes()
    counts_of(root).write_bytes(whole[: len(whole) // 2])


@case("folder", r"counts\.h5ad cannot be read")
def counts_empty_file(root: Path, measured: Any) -> None:
    counts_of(root).write_bytes(b"")


@case("folder", r"counts\.h5ad is not there")
def counts_is_a_directory(root: Path, measured: Any) -> None:
    counts_of(root).unlink()
    counts_of(root).mkdir()


@case("folder", r"counts\.h5ad cannot be read as \.h5ad")
def counts_of_another_layout(root: Path, measured: Any) -> None:
    with h5py.File(counts_of(root), "w") as file:
        file.create_group("X").attrs["encoding-type"] = "something else"


@case("folder", r"it has no spots; check the file")
def no_spots(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda t: t[:0].copy())


@case("folder", r"it has no genes; check the file")
def no_genes(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda t: t[:, :0].copy())


@case("folder", r"it has one gene, 'GENE00'; a primary and an auxiliary gene are needed")
def one_gene(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda t: t[:, :1].copy())


@case("folder", r"spot 'CA0001-1' occurs more than once \(1 repeated\)")
def spot_named_twice(root: Path, measured: Any) -> None:
    def change(table: anndata.AnnData) -> None:
        table.obs_names = ["CA0001-1", *table.obs_names[1:]]

    edit(counts_of(root), change)


@case("folder", r"gene 'GENE01' occurs more than once \(1 repeated\)")
def gene_named_twice(root: Path, measured: Any) -> None:
    def change(table: anndata.AnnData) -> None:
        table.var_names = ["GENE01", *table.var_names[1:]]

    edit(counts_of(root), change)


def set_positions(change: Callable[[np.ndarray], Any]) -> Damage:
    return lambda root, measured: edit(
        counts_of(root), lambda table: table.obsm.update(spatial=change(table.obsm["spatial"]))
    )


def replaced(row: int, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(positions: np.ndarray) -> np.ndarray:
        positions[row] = value
        return positions

    return change


for name, change, message in (
    ("negative", replaced(3, (-4, 30)), r"at x = -4, y = 30 has a negative coordinate \(1 spots\)"),
    ("nan", replaced(3, (np.nan, 30)), r"has no finite position \(1 spots\)"),
    ("beyond_the_image", replaced(3, (4000, 30)), r"at x = 4000, y = 30 lies outside the image \(1 spots\)"),
    ("of_two_spots_alike", lambda p: replaced(3, p[4])(p), r"shares its place .* \(2 spots\)"),
    ("swapped", lambda p: p[:, ::-1].copy(), r"lies outside the image .* not swapped"),
    ("of_three_dimensions", lambda p: np.c_[p, p[:, 0]], r"obsm\['spatial'\] is float64 \(80, 3\)"),
    ("of_a_smaller_copy_of_a_larger_image", lambda p: p * 40, r"lies outside the image .* not of a smaller copy"),
):
    damage = set_positions(change)
    damage.__name__ = f"positions_{name}"
    case("folder", message)(damage)


@case("folder", r"obsm\['spatial'\] is missing")
def positions_absent(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda table: table.obsm.pop("spatial") is None or None)


for name, value, message in (
    ("zero", 0.0, r"uns\['um_per_px'\] in counts.h5ad is .*0.0.*; it has to be a positive number"),
    ("negative", -1.0, r"uns\['um_per_px'\] in counts.h5ad is .*-1.0"),
    ("of_text", "wide", r"uns\['um_per_px'\] in counts.h5ad is 'wide'"),
    ("in_metres", 7e-6, "neighbouring spots are .* µm apart, which no array of spots is"),
    ("a_thousandfold", 7e3, "neighbouring spots are .* µm apart, which no array of spots is"),
):

    def damage(root: Path, measured: Any, value: object = value) -> None:
        edit(counts_of(root), lambda table: table.uns.update(um_per_px=value))

    damage.__name__ = f"pixel_size_{name}"
    case("folder", message)(damage)


@case("folder", r"uns\['um_per_px'\] is missing in counts\.h5ad")
def pixel_size_absent(root: Path, measured: Any) -> None:
    edit(counts_of(root), lambda table: table.uns.pop("um_per_px") and None)


def image_of(root: Path) -> Path:
    return root / "S1" / "image.png"


@case("folder", r"80 of 80 spots looked at lie on bare glass.* check that the image is of this section")
def image_of_another_section(root: Path, measured: Any) -> None:
    glass = np.full_like(measured.pixels, 236)
    glass[:15] = measured.pixels[:15]  # its tissue is elsewhere
    Image.fromarray(glass).save(image_of(root))


@case("folder", r"lies outside the image")
def image_of_a_smaller_section(root: Path, measured: Any) -> None:
    Image.fromarray(measured.pixels[:60, :60]).save(image_of(root))


@case("folder", r"image\.jpg cannot be read as an image .* damaged or incomplete")
def image_truncated(root: Path, measured: Any) -> None:
    image_of(root).unlink()
    path = root / "S1" / "image.jpg"
    measured.write_image(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # the header is whole: only decoding shows it


@case("folder", r"image\.png cannot be read as an image")
def image_of_text(root: Path, measured: Any) -> None:
    image_of(root).write_text("no picture")


@case("folder", r"image\.png has pixels with more than 8 bits \(Pillow mode 'I;16'\); .* save it as 8-bit RGB")
def image_of_16_bits(root: Path, measured: Any) -> None:
    Image.fromarray(measured.pixels[..., 0].astype(np.uint16)).save(image_of(root))


@case("folder", r"it has image\.png and image\.tif; keep the one that is meant")
def image_twice(root: Path, measured: Any) -> None:
    measured.write_image(root / "S1" / "image.tif")


@case("folder", r"has no image\.jpg")
def image_is_a_directory(root: Path, measured: Any) -> None:
    image_of(root).unlink()
    image_of(root).mkdir()


def write_features(root: Path, values: np.ndarray, barcodes: list[str]) -> None:
    with h5py.File(root / "S1" / "embedding.h5", "w") as file:
        file["embeddings"], file["barcodes"] = values, barcodes


@case("folder", r"the embedding of spot 'CA0001-1' is not finite \(1 spots\)")
def features_not_finite(root: Path, measured: Any) -> None:
    values = np.ones((80, 3))
    values[1] = np.nan
    write_features(root, values, measured.barcodes)


@case("folder", r"embedding\.h5 has no features for 1 of 80 spots, the first is '[ACGT]+0079-1'")
def features_of_too_few_spots(root: Path, measured: Any) -> None:
    write_features(root, np.ones((79, 3)), measured.barcodes[:-1])


@case("folder", r"embedding\.h5 has features of type .*; they have to be numbers")
def features_of_text(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "embedding.h5", "w") as file:
        file["embeddings"], file["barcodes"] = np.full((80, 2), b"x"), measured.barcodes


# --- patches cut beforehand ------------------------------------------------------------------------------------------


@case("folder_patches", r"no barcode of .*patches\.h5 is a spot of the counts: the file has 'other-0'")
def patches_of_other_barcodes(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        file["barcode"][:] = np.array([f"other-{s}" for s in range(80)], dtype="S8")[:, None]


@case("folder_patches", r"patches\.h5 has barcode 'AA0000-1' more than once")
def patches_of_repeated_barcodes(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        file["barcode"][1] = file["barcode"][0]


@case("folder_patches", r"'img' of .*patches\.h5 is float32 \(80, 16, 16, 3\); it has to be uint8")
def patches_of_floats(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        values = file["img"][()] / np.float32(255)
        del file["img"]
        file["img"] = values


@case("folder_patches", r"patches\.h5 has no dataset 'img'; it has: barcode, coords")
def patches_without_pictures(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        del file["img"]


@case("folder_patches", r"patches\.h5 cannot be read as HDF5 .* damaged or incomplete")
def patches_truncated(root: Path, measured: Any) -> None:
    path = root / "S1" / "patches.h5"
    path.write_bytes(path.read_bytes()[:2000])


@case("folder_patches", r"80 of 80 spots looked at lie on bare glass")
def patches_of_glass(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        file["img"][:] = 255


@case(
    "folder_patches",
    r"patches\.h5 has 80 images, 77 barcodes, 80 coords, so it is unclear which image belongs to which barcode",
)
def patches_of_more_than_are_named(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        named = np.delete(file["barcode"][()], [3, 4, 40], axis=0)
        del file["barcode"]
        file["barcode"] = named


@case("folder_patches", r"has the patch of spot '\w+-1' cut \d+ px away from the spot \(8 of 80 spots\)")
def patches_of_exchanged_barcodes(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        file["barcode"][:] = np.roll(file["barcode"][()], 1, axis=0)


@case("folder_patches", r"a patch shows 224 µm of tissue, but 112 µm is stated elsewhere")
def patches_wider_than_stated(root: Path, measured: Any) -> None:
    with h5py.File(root / "S1" / "patches.h5", "r+") as file:
        file["img"].attrs.update({"patch_size_src": 32, "patch_size_target": 16, "pixel_size": 7.0})


@case("folder", r"contradicts array_row and array_col of obs for spot '\w+-1' \(2 spots\)")
def positions_of_exchanged_spots(root: Path, measured: Any) -> None:
    def change(table: anndata.AnnData) -> None:
        table.obs["array_row"], table.obs["array_col"] = measured.array[np.r_[1, 0, 2:80]].T

    edit(counts_of(root), change)


@case("folder", r"its spots are 50\.1 µm apart, but Visium spots are 100 µm apart; um_per_px is about 6\.9\d, not 3\.5")
def pixel_size_of_another_scan(root: Path, measured: Any) -> None:
    def change(table: anndata.AnnData) -> None:
        table.obs["array_row"], table.obs["array_col"] = measured.array.T
        table.uns["um_per_px"] = 3.5

    edit(counts_of(root), change)


# --- HEST-1k ---------------------------------------------------------------------------------------------------------


@case("hest", r"S1\.json cannot be read as JSON .*; fetch it again")
def metadata_broken(root: Path, measured: Any) -> None:
    (root / "metadata" / "S1.json").write_text('{"patient": ')


@case("hest", r"S1\.json holds a list, not an object with names")
def metadata_of_another_kind(root: Path, measured: Any) -> None:
    (root / "metadata" / "S1.json").write_text("[1, 2]")


@case("hest", r"slide 'S1': .*S1\.h5 is not there; run `agl-bench fetch hest")
def slide_without_patches(root: Path, measured: Any) -> None:
    (root / "patches" / "S1.h5").unlink()


def state(root: Path, **metadata: object) -> None:
    path = root / "metadata" / "S1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | metadata))


@case("hest", r"according to pixel_size_um_estimated its spots are 48\.6 µm apart, but .* has spots 100 µm apart")
def metadata_of_another_magnification(root: Path, measured: Any) -> None:
    state(root, pixel_size_um_estimated=3.5)


@case("hest", r"according to pixel_size_um_estimated its spots are 194 µm apart, but .* has spots 100 µm apart")
def metadata_of_half_the_magnification(root: Path, measured: Any) -> None:
    state(root, pixel_size_um_estimated=14.0)


@case("hest", r"according to pixel_size_um_estimated its spots are 97\.2 µm apart, but .* has spots 200 µm apart")
def metadata_of_another_array(root: Path, measured: Any) -> None:
    state(root, st_technology="Spatial Transcriptomics", inter_spot_dist=200.0)


@case("hest", r"spot '\w+-1' at x = \d+, y = \d+ lies outside the scan, which is 100 × 80 px by its metadata")
def metadata_of_a_smaller_scan(root: Path, measured: Any) -> None:
    state(root, fullres_px_width=100, fullres_px_height=80)


@case("hest", r"patches/S1\.h5 was cut at 0\.5 µm per pixel, but the slide has 7 µm per pixel")
def patches_of_another_scan(root: Path, measured: Any) -> None:
    with h5py.File(root / "patches" / "S1.h5", "r+") as file:
        file["img"].attrs.update({"patch_size_src": 16, "pixel_size": 0.5})


@case("hest", r"patches/S1\.h5 has 80 images, 79 barcodes")
def patches_of_a_masked_list(root: Path, measured: Any) -> None:
    with h5py.File(root / "patches" / "S1.h5", "r+") as file:
        barcodes = file["barcode"][1:]
        del file["barcode"], file["coords"]
        file["barcode"] = barcodes


@case("hest", r"S1\.h5ad cannot be read as \.h5ad")
def slide_of_text(root: Path, measured: Any) -> None:
    (root / "st" / "S1.h5ad").write_text("text")


@case("hest", r"metadata state no pixel_size_um_estimated, and .* spots lie on top of each other")
def slide_of_one_place(root: Path, measured: Any) -> None:
    (root / "metadata" / "S1.json").unlink()
    edit(root / "st" / "S1.h5ad", lambda table: table.obsm.update(spatial=np.full((80, 2), 50.0)))


@case("hest", r"its metadata state no pixel_size_um_estimated, .*obsm\['spatial'\]")
def slide_without_usable_places(root: Path, measured: Any) -> None:
    (root / "metadata" / "S1.json").unlink()
    edit(root / "st" / "S1.h5ad", lambda table: table.obsm.update(spatial=np.full((80, 2), np.nan)))


# --- Space Ranger ----------------------------------------------------------------------------------------------------


def outs(root: Path) -> Path:
    return root / "S1" / "outs"


def edit_positions(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> None:
    path = outs(root) / "spatial" / "tissue_positions.csv"
    table = pd.read_csv(path)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)


@case("visium_h5", r"filtered_feature_bc_matrix\.h5 cannot be read as a Space Ranger matrix")
def matrix_truncated(root: Path, measured: Any) -> None:
    path = outs(root) / "filtered_feature_bc_matrix.h5"
    path.write_bytes(path.read_bytes()[:3000])


@case("visium_h5", r"filtered_feature_bc_matrix\.h5 cannot be read as a Space Ranger matrix")
def matrix_of_another_layout(root: Path, measured: Any) -> None:
    with h5py.File(outs(root) / "filtered_feature_bc_matrix.h5", "w") as file:
        file["img"] = np.zeros(3)


@case("visium_h5", r"the count of spot .* is 0\.25, not a whole number")
def matrix_of_floats(root: Path, measured: Any) -> None:
    with h5py.File(outs(root) / "filtered_feature_bc_matrix.h5", "r+") as file:
        values = file["matrix/data"][()].astype(np.float32)
        values[3] = 0.25
        del file["matrix/data"]
        file["matrix/data"] = values


@case("visium_h5", r"has neither the file filtered_feature_bc_matrix\.h5 nor the folder")
def matrix_absent(root: Path, measured: Any) -> None:
    (outs(root) / "filtered_feature_bc_matrix.h5").unlink()


@case("visium_h5", r"scalefactors_json\.json is not there")
def scale_factors_absent(root: Path, measured: Any) -> None:
    (outs(root) / "spatial" / "scalefactors_json.json").unlink()


@case("visium_h5", r"scalefactors_json\.json cannot be read as JSON")
def scale_factors_broken(root: Path, measured: Any) -> None:
    (outs(root) / "spatial" / "scalefactors_json.json").write_text("{spot_diameter")


@case("visium_h5", r"scalefactors_json\.json holds a list, not a JSON object")
def scale_factors_of_another_kind(root: Path, measured: Any) -> None:
    (outs(root) / "spatial" / "scalefactors_json.json").write_text("[0.1]")


@case("visium_h5", r"does not state a positive tissue_hires_scalef", "visium.image=hires")
def scale_factor_of_the_reduced_image_absent(root: Path, measured: Any) -> None:
    measured.write_image(outs(root) / "spatial" / "tissue_hires_image.png")


@case("visium_h5", r"tissue_positions\.csv is not there \(nor tissue_positions\.parquet nor")
def positions_file_absent(root: Path, measured: Any) -> None:
    (outs(root) / "spatial" / "tissue_positions.csv").unlink()


@case("visium_h5", r"tissue_positions\.csv cannot be read as a table")
def positions_file_empty(root: Path, measured: Any) -> None:
    (outs(root) / "spatial" / "tissue_positions.csv").write_text("")


@case("visium_h5", r"tissue_positions\.csv has no column pxl_row_in_fullres \(it has: barcode")
def positions_column_absent(root: Path, measured: Any) -> None:
    edit_positions(root, lambda table: table.drop(columns="pxl_row_in_fullres"))


@case("visium_h5", r"tissue_positions\.csv has barcode 'AA0000-1' more than once")
def positions_barcode_twice(root: Path, measured: Any) -> None:
    edit_positions(root, lambda table: pd.concat([table, table.iloc[:1]]))


@case("visium_h5", r"tissue_positions\.csv has no position for 80 of 80 spots, .* \(the file has 'x-AA0000-1'\)")
def positions_of_another_sample(root: Path, measured: Any) -> None:
    edit_positions(root, lambda table: table.assign(barcode="x-" + table["barcode"]))


@case("visium_h5", r"has text in column pxl_col_in_fullres; the column must hold numbers")
def positions_of_text(root: Path, measured: Any) -> None:
    edit_positions(root, lambda table: table.assign(pxl_col_in_fullres="left"))


@case("visium_h5", r"puts spot '.*' off its place on the array")
def positions_of_shuffled_rows(root: Path, measured: Any) -> None:
    places = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    edit_positions(
        root, lambda table: table.assign(**table[places].sample(frac=1, random_state=0).reset_index()[places])
    )


@case("visium_h5", r"it has no spots; check the file")
def no_spot_on_tissue(root: Path, measured: Any) -> None:
    edit_positions(root, lambda table: table.assign(in_tissue=0))


@case("visium_h5", r"there is no full-resolution image in .*visium\.image=hires")
def full_resolution_image_absent(root: Path, measured: Any) -> None:
    (root / "S1" / "slide.tif").unlink()


@case("visium_h5", r"slide\.tif cannot be read as an image")
def full_resolution_image_truncated(root: Path, measured: Any) -> None:
    path = root / "S1" / "slide.tif"
    path.write_bytes(path.read_bytes()[:1000])


@case("visium_h5", r"tissue_positions_list\.csv has no column barcode, .* \(it has: 0, 1, 2, 3, 4\)")
def positions_without_header_of_five_columns(root: Path, measured: Any) -> None:
    (outs(root) / "spatial" / "tissue_positions.csv").unlink()
    (outs(root) / "spatial" / "tissue_positions_list.csv").write_text("AA0000-1,1,0,0,20\n")


@case("visium_parquet", r"tissue_positions\.parquet cannot be read as a table")
def positions_parquet_of_text(root: Path, measured: Any) -> None:
    (outs(root) / "spatial" / "tissue_positions.parquet").write_text("text")


@case("visium_mtx", r"features\.tsv\.gz is not there")
def triple_incomplete(root: Path, measured: Any) -> None:
    (outs(root) / "filtered_feature_bc_matrix" / "features.tsv.gz").unlink()


@case("visium_mtx", r"matrix\.mtx\.gz cannot be read as a Space Ranger matrix")
def triple_of_other_lengths(root: Path, measured: Any) -> None:
    path = outs(root) / "filtered_feature_bc_matrix" / "barcodes.tsv.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(f"{barcode}\n" for barcode in measured.barcodes[:-1])


@case("visium_mtx", r"matrix\.mtx\.gz cannot be read as a Space Ranger matrix")
def triple_truncated(root: Path, measured: Any) -> None:
    path = outs(root) / "filtered_feature_bc_matrix" / "matrix.mtx.gz"
    path.write_bytes(path.read_bytes()[:200])


# --- SpatialData -----------------------------------------------------------------------------------------------------


@case("spatialdata", r"S1\.zarr cannot be read as a SpatialData store", *STORE)
def store_of_text(root: Path, measured: Any) -> None:
    for path in (root / "S1.zarr").rglob("zarr.json"):
        path.write_text("{")


@case("spatialdata", r"its store has 0 tables \(none\)", *STORE)
def store_of_nothing(root: Path, measured: Any) -> None:
    from spatialdata import SpatialData

    SpatialData().write(root / "S1.zarr", overwrite=True)


@case("spatialdata", r"the size of a pixel is not known")
def store_without_pixel_size(root: Path, measured: Any) -> None:
    pass  # as written: nothing in it says how large a pixel is


def rewrite(root: Path, store: Any) -> None:
    store.write(root / "S1.zarr", overwrite=True)


@case("spatialdata", r"image 'slide' holds uint16; scale its values to 0 to 255, and write it as uint8", *STORE)
def store_of_16_bits(root: Path, measured: Any) -> None:
    measured.pixels = measured.pixels.astype(np.uint16)
    rewrite(root, measured.store())


@case("spatialdata", r"shapes 'spots' have no instance '1000' of spot 'AA0000-1' \(1 spots\)", *STORE)
def store_with_an_unknown_instance(root: Path, measured: Any) -> None:
    store = measured.store()
    store["table"].obs.loc["AA0000-1", "spot"] = 1000
    rewrite(root, store)


@case("spatialdata", r"table 'table' annotates spots, which are no shapes of the store; it has: none", *STORE)
def store_without_shapes(root: Path, measured: Any) -> None:
    store = measured.store()
    del store.shapes["spots"]
    rewrite(root, store)


@case("spatialdata", r"share no coordinate system", *STORE)
def store_of_two_worlds(root: Path, measured: Any) -> None:
    from spatialdata.transformations import Identity, set_transformation

    store = measured.store()
    set_transformation(store["spots"], {"elsewhere": Identity()}, set_all=True)
    rewrite(root, store)


@case("spatialdata", r"table 'table' does not say which shapes it annotates", *STORE)
def store_of_an_unattached_table(root: Path, measured: Any) -> None:
    store = measured.store()
    del store["table"].uns["spatialdata_attrs"]
    rewrite(root, store)


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover(strict=True)


def told(plugins: Plugins, path: Path, settings: tuple[str, ...]) -> list[str]:
    """Every sentence about `path`."""
    try:
        name, dataset = find_dataset(plugins, str(path), settings)
        verdicts = list(validate(name, dataset, Path("/nowhere")))
    except AglBenchError as error:
        return [str(error)]
    return [problem for verdict in verdicts for problem in verdict.problems]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layout", "damage", "message", "settings"), CASES)
def test_one_sentence(
    plugins: Plugins, measured, layout: str, damage: Damage, message: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    root = getattr(measured, layout)(tmp_path / "data")
    damage(root, measured)
    (sentence,) = told(plugins, root, settings)
    assert "\n" not in sentence and "'S1'" in sentence
    assert re.search(message, sentence), sentence


def test_there_are_enough() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layout", "damage", "message", "settings"), CASES[::7])
def test_command_refuses(
    measured,
    layout: str,
    damage: Damage,
    message: str,
    settings: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = getattr(measured, layout)(tmp_path / "data")
    damage(root, measured)
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(root), *(word for text in settings for word in ("--set", text))])
    said = capsys.readouterr()
    assert caught.value.code == 2
    (line,) = said.err.strip().splitlines()
    assert line.startswith("agl-bench: ") and "Traceback" not in said.out


def test_every_problem_of_every_section(plugins: Plugins, measured, tmp_path: Path) -> None:
    root = measured.folder(tmp_path)
    for name in ("S2", "S3", "S4"):
        (root / "S1").rename(root / name)
        measured.folder(root / "new")
        (root / "new" / "S1").rename(root / "S1")
        (root / "new").rmdir()

    def spoil(table: anndata.AnnData) -> None:
        table.var_names = ["GENE01", *table.var_names[1:]]
        table.X.data[0] = -1
        table.obsm["spatial"][2] = (-1, 5)

    edit(root / "S1" / "counts.h5ad", spoil)
    (root / "S2" / "counts.h5ad").write_text("text")
    edit(root / "S3" / "counts.h5ad", lambda table: table.uns.pop("um_per_px") and None)
    name, dataset = find_dataset(plugins, str(root), ())
    verdicts = {verdict.section: verdict for verdict in validate(name, dataset, tmp_path)}
    assert [len(verdicts[name].problems) for name in ("S1", "S2", "S3", "S4")] == [3, 1, 1, 0]
    assert verdicts["S4"].facts and not verdicts["S1"].facts


def test_sections_are_compared(plugins: Plugins, measured, tmp_path: Path) -> None:
    measured.folder(tmp_path)
    (tmp_path / "S1").rename(tmp_path / "S2")
    measured.genes = [f"OTHER{gene}" for gene in range(30)]
    measured.folder(tmp_path / "new")
    (tmp_path / "new" / "S1").rename(tmp_path / "S1")
    (sentence,) = told(plugins, tmp_path, ())
    assert "section 'S2': no gene of it is in all of 'S1'" in sentence


def test_layout_is_recognised_or_refused(plugins: Plugins, measured, tmp_path: Path) -> None:
    (sentence,) = told(plugins, tmp_path / "nowhere", ())
    assert "unknown dataset or path" in sentence and "Known:" in sentence
    (tmp_path / "notes").mkdir()
    (sentence,) = told(plugins, tmp_path / "notes", ())
    assert "no layout that is known (folder, hest, spatialdata, visium)" in sentence
    measured.folder(tmp_path / "both")
    (tmp_path / "both" / "S9.zarr").mkdir()
    (sentence,) = told(plugins, tmp_path / "both", ())
    assert "has the layout of 'folder' and of 'spatialdata'" in sentence
    measured.folder(tmp_path / "mine")
    name, dataset = find_dataset(plugins, str(tmp_path / "mine" / "S1"), ())
    assert (name, dataset.names(tmp_path)) == ("folder", ["S1"])


def test_reader_that_fails_is_named(plugins: Plugins, measured, tmp_path: Path, monkeypatch) -> None:
    root = measured.folder(tmp_path)
    name, dataset = find_dataset(plugins, str(root), ())
    monkeypatch.setattr(dataset, "read", lambda root, name: json.loads("x"))
    (verdict,) = validate(name, dataset, tmp_path)
    assert "section 'S1': its reader fails with JSONDecodeError" in verdict.problems[0]
