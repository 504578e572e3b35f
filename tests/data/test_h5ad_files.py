"""Donors, names and positions of .h5ad files, in the versions and types that anndata and pandas have written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from agl_bench import BadSection, known_names, read_constants, read_donors, read_h5ad, read_uns

SPOTS = ["a", "b", "c"]
POSITIONS = np.array([[1.0, 10], [2, 20], [3, 30]])


@pytest.fixture(autouse=True)
def no_warnings():
    """What libraries think of old files reaches nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write(path: Path, *, obs: dict[str, Any] | None = None, spatial: Any = POSITIONS, **uns: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = anndata.AnnData(
            scipy.sparse.csr_matrix(np.arange(6.0).reshape(3, 2)),
            obs=pd.DataFrame(obs or {}, index=SPOTS),
            var=pd.DataFrame(index=["G1", "G2"]),
            obsm={"spatial": spatial},
            uns=uns,
        )
        table.write_h5ad(path)
    return path


def as_version_0_7(path: Path, column: str) -> Path:
    """Codes in `obs`, categories beside them, as anndata wrote them before 0.8."""
    with h5py.File(path, "a") as file:
        obs = file["obs"]
        categories, codes = obs[column]["categories"][()], obs[column]["codes"][()]
        del obs[column]
        beside = obs.create_group("__categories").create_dataset(
            column, data=categories, dtype=h5py.string_dtype() if categories.dtype.kind == "O" else None
        )
        obs.create_dataset(column, data=codes).attrs["categories"] = beside.ref
        obs.attrs["encoding-version"] = "0.1.0"
    return path


def as_version_0_6(path: Path, column: str) -> Path:
    """`obs` as one compound array with codes, categories in `uns`, as anndata wrote them before 0.7."""
    with h5py.File(path, "a") as file:
        categories, codes = file["obs"][column]["categories"][()], file["obs"][column]["codes"][()]
        for axis, names in (("obs", SPOTS), ("var", ["G1", "G2"])):
            del file[axis]
            fields = [("index", "S8")] + ([(column, "i1")] if axis == "obs" else [])
            rows = zip(names, codes, strict=True) if axis == "obs" else zip(names, strict=True)
            file[axis] = np.array(list(rows), dtype=fields)
        file["uns"].create_dataset(f"{column}_categories", data=categories, dtype=h5py.string_dtype())
    return path


COLUMNS = {
    "texts": (["P1"] * 3, ("P1",)),
    "categories": (pd.Categorical(["P1"] * 3), ("P1",)),
    "categories_of_numbers": (pd.Categorical([7] * 3), ("7",)),
    "unused_categories": (pd.Categorical(["P1"] * 3, categories=["P0", "P1"]), ("P1",)),
    "numbers": ([7] * 3, ("7",)),
    "numbers_as_floats": ([7.0, np.nan, 7.0], ("7",)),
    "nullable_numbers": (pd.array([7, None, 7], dtype="Int64"), ("7",)),
    "nullable_booleans": (pd.array([True, None, True], dtype="boolean"), ("True",)),
    "one_is_missing": (pd.Categorical(["P1", None, "P1"]), ("P1",)),
    "all_missing": (pd.Categorical([None] * 3), ()),
    "nan": ([np.nan] * 3, ()),
    "empty": ([""] * 3, ()),
    "the_text_nan": (["nan", "NaN", "None"], ()),
    "several": (["P1", "P2", "P1"], ("P1", "P2")),
}


@pytest.mark.parametrize("key", ["patient", "donor"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_donor_columns(tmp_path: Path, kind: str, key: str) -> None:
    column, known = COLUMNS[kind]
    path = write(tmp_path / "a.h5ad", obs={key: column})
    assert read_donors(path) == known
    assert read_constants(path, key, "absent") == ({key: known[0]} if len(known) == 1 else {})


@pytest.mark.parametrize("rewrite", [as_version_0_7, as_version_0_6])
@pytest.mark.parametrize("values", [["P1"] * 3, ["P1", None, "P1"], [None] * 3, ["P1", "P2", "P2"]])
def test_donor_columns_of_old_files(tmp_path: Path, rewrite: Any, values: list[str | None]) -> None:
    column = pd.Categorical(values, categories=["P1", "P2"])
    path = rewrite(write(tmp_path / "a.h5ad", obs={"patient": column}), "patient")
    assert read_donors(path) == tuple(dict.fromkeys(v for v in values if v))
    assert list(read_h5ad(path).obs_names) == SPOTS


@pytest.mark.parametrize(
    ("stored", "known"),
    [
        ("P1", ("P1",)), (" P1 ", ("P1",)), (3, ("3",)), (3.0, ("3",)), (np.int64(3), ("3",)), (["P1"], ("P1",)),
        (np.array([b"P1"]), ("P1",)), (np.array([3]), ("3",)), (np.array(3.0), ("3",)),
        (pd.Categorical(["P1"]), ("P1",)),
        (pd.array([3], dtype="Int64"), ("3",)), (["P1", "P1"], ("P1",)), (["P1", "P2"], ("P1", "P2")), ("", ()),
        (np.nan, ()), ("nan", ()), ("N/A", ()), ([""], ()), (np.array([np.nan]), ()),
    ],
)  # fmt: skip
def test_donor_of_the_whole_file(tmp_path: Path, stored: Any, known: tuple[str, ...]) -> None:
    assert read_donors(write(tmp_path / "a.h5ad", donor=stored)) == known == known_names(stored)


def test_donors_that_contradict(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", obs={"patient": ["P2"] * 3}, patient="P1")
    with pytest.raises(BadSection, match=r"uns\['patient'\] is 'P1' and obs\['patient'\] is 'P2'; correct"):
        read_donors(path, section="S1")
    assert read_donors(write(path, obs={"patient": ["P1"] * 3}, patient="nan")) == ("P1",)
    assert read_donors(write(path, obs={"patient": ["P1"] * 3}, donor="D1")) == ("P1",)
    assert read_donors(write(path, obs={"patient": pd.Categorical([None] * 3)}, donor="D1")) == ("D1",)
    with pytest.raises(BadSection, match=r"uns\['donor'\] .* is a dict; it has to be a name"):
        read_donors(write(path, donor={"name": "P1"}))


def test_values_of_uns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.h5ad", one=[0.5], none=np.zeros(0), two=[1, 2], text="0.5", table=pd.DataFrame({"a": [1]})
    )
    assert read_uns(path, "one", "none", "two", "text", "table", "absent") == {"one": 0.5, "text": "0.5"}


def named(*columns: str) -> pd.DataFrame:
    x_first = pd.DataFrame(POSITIONS, columns=["x", "y"])
    places = {"x": "x", "pxl_col_in_fullres": "x", "imagecol": "x", "X": "x", "0": "x"}
    return pd.DataFrame({c: x_first[places.get(c, "y")] for c in columns}).set_axis(SPOTS)


@pytest.mark.parametrize(
    "columns",
    [("x", "y"), ("y", "x"), ("pxl_row_in_fullres", "pxl_col_in_fullres"), ("imagerow", "imagecol"), ("Y", "X"),
     ("0", "1"), ("in_tissue", "y", "array_row", "x")],
)  # fmt: skip
def test_positions_by_name(tmp_path: Path, columns: tuple[str, ...]) -> None:
    counts = read_h5ad(write(tmp_path / "a.h5ad", spatial=named(*columns)))
    assert isinstance(counts.obsm["spatial"], np.ndarray)
    np.testing.assert_array_equal(counts.obsm["spatial"], POSITIONS)


def test_positions_as_they_come(tmp_path: Path) -> None:
    nullable = named("y", "x").astype("Int64")
    nullable.iloc[1, 0] = pd.NA
    found = read_h5ad(write(tmp_path / "a.h5ad", spatial=nullable)).obsm["spatial"]
    np.testing.assert_array_equal(found, [[1, 10], [2, np.nan], [3, 30]])
    sparse = read_h5ad(write(tmp_path / "a.h5ad", spatial=scipy.sparse.csr_matrix(POSITIONS))).obsm["spatial"]
    np.testing.assert_array_equal(sparse, POSITIONS)


@pytest.mark.parametrize(
    "columns", [("row", "col"), ("a", "b"), ("x", "y", "imagecol", "imagerow"), ("x",), ("x", "X", "y")]
)
def test_positions_that_are_not_named(tmp_path: Path, columns: tuple[str, ...]) -> None:
    path = write(tmp_path / "a.h5ad", spatial=named(*columns))
    with pytest.raises(BadSection, match=r"section 'S1': obsm\['spatial'\] is a table with columns .*name two columns"):
        read_h5ad(path, section="S1")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "S1" / "a.h5ad"
    path.parent.mkdir()
    for content in (b"", b"text", b"\x89HDF\r\n\x1a\n" + b"x" * 100):
        path.write_bytes(content)
        for read in (read_h5ad, read_donors, lambda p: read_uns(p, "a"), lambda p: read_constants(p, "a")):
            with pytest.raises(BadSection, match=r"section 'S1': .*a\.h5ad cannot be read as \.h5ad"):
                read(path)
    with h5py.File(write(path, obs={"donor": pd.Categorical(["P1"] * 3)}), "a") as file:
        del file["obs/donor/categories"]
    with pytest.raises(BadSection, match="cannot be read"):
        read_donors(path)
