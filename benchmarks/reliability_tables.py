"""Matrices and metadata of AnnData files, as strangers write them. For `reliability_files`.

Sound forms that look odd stand among the bad ones: they have to be read right.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from PIL import Image
from reliability import Trial
from reliability_sections import Judge, Prepared, Truth, difference, section, tried
from scipy import sparse

MATRIX, METADATA = "matrix", "metadata"
LINEAR = ("--set", "folder.has_counts=false")


def written(home: Path, truth: Truth, table: anndata.AnnData, edit: Callable[[h5py.File], object] | None = None) -> str:
    """A section of a folder: the table, edited as a file, and its image. What the commands are given."""
    place = home / "s0"
    place.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the writer
        table.write_h5ad(place / "counts.h5ad")
    if edit is not None:
        with h5py.File(place / "counts.h5ad", "a") as file:
            edit(file)
    Image.fromarray(truth.pixels).save(place / "image.png")
    return f"folder:{home}"


def trials(folder: Path, quick: bool) -> list[Trial]:
    """All of them, or a few if `quick`."""
    cases = [*_matrices(), *_names(), *_donors(), *_numbers(), *_positions(), *_litter()]
    made = []
    for number, (kind, name, make) in enumerate(cases):
        if not quick or number % 20 == 0:
            truth = section()
            spec, judge, words = make(folder / f"{number:03d}", truth)
            made.append(tried(kind, name, spec, judge, *words))
    return made


Made = tuple[str, Truth | Judge, tuple[str, ...]]  # what the commands are given, what is true, further words
Case = tuple[str, str, Callable[[Path, Truth], Made]]


def _with_matrix(change: Callable[[Truth], Any], words: tuple[str, ...] = ()) -> Callable[[Path, Truth], Made]:
    def make(home: Path, truth: Truth) -> Made:
        table = truth.table()
        table.X = change(truth)
        return written(home, truth, table), truth, words

    return make


def _edited(edit: Callable[[h5py.File], object], words: tuple[str, ...] = ()) -> Callable[[Path, Truth], Made]:
    def make(home: Path, truth: Truth) -> Made:
        return written(home, truth, truth.table(), edit), truth, words

    return make


def _matrices() -> Iterator[Case]:
    for kind in ("bool", "int8", "uint8", "int64", "uint64", "float16", "float32", "float64", "longdouble"):
        yield MATRIX, f"dense {kind}", _with_matrix(lambda t, kind=kind: _as(t, kind))
    for kind in (">i4", ">f8", ">f4"):
        yield MATRIX, f"big-endian {kind}, dense", _with_matrix(lambda t, kind=kind: t.counts.astype(kind))
        yield MATRIX, f"big-endian {kind}, sparse", _edited(lambda file, kind=kind: _retype(file, kind))
    yield MATRIX, "float16 values, sparse", _edited(lambda file: _retype(file, "f2"))
    yield MATRIX, "CSC", _with_matrix(lambda t: sparse.csc_matrix(t.counts))
    yield MATRIX, "explicit zeros", _with_matrix(_with_zeros)
    yield MATRIX, "unsorted columns", _edited(_unsort)
    yield MATRIX, "entries in parts", _edited(_split)
    yield MATRIX, "entries in parts, uint8 sums over 255", _large_parts
    for name, value in (("2^24 + 1", 2**24 + 1), ("2^31 + 1", 2**31 + 1), ("2^53 + 2", 2**53 + 2)):
        yield MATRIX, f"a count of {name}, int64", _with_matrix(lambda t, v=value: _counted(t, v, np.int64))
    yield MATRIX, "a count of 2^63, uint64", _with_matrix(lambda t: _counted(t, 2**63, np.uint64))
    yield MATRIX, "a count of 3000 rounded to float16", _with_matrix(lambda t: _counted(t, 3001, np.float16))
    for value in (0.5, -1.0, np.nan, np.inf):
        yield MATRIX, f"a count of {value}", _with_matrix(lambda t, v=value: _counted(t, v, np.float64))
    yield MATRIX, "logarithms", _with_matrix(lambda t: np.log1p(t.counts.astype(np.float32)))
    yield MATRIX, "texts", _edited(lambda file: _replace(file, "X", np.full((30, 30), "1", dtype="S1")))
    yield MATRIX, "complex", _edited(lambda file: _replace(file, "X", np.ones((30, 30), dtype=np.complex64)))
    yield MATRIX, "one gene fewer than names", _edited(lambda file: _replace(file, "X", np.ones((30, 29))))
    yield MATRIX, "columns beyond the last gene", _edited(lambda file: file["X/indices"].write_direct(_beyond(file)))
    yield MATRIX, "linear values without counts", _with_matrix(lambda t: t.counts * np.float32(25), LINEAR)
    yield MATRIX, "values of 1e30 without counts", _with_matrix(lambda t: t.counts * np.float32(1e30), LINEAR)
    yield MATRIX, "z-scores without counts", _with_matrix(lambda t: t.counts - np.float32(1), LINEAR)


def _as(truth: Truth, kind: str) -> np.ndarray:
    if kind == "bool":
        truth.counts = (truth.counts > 0).astype(np.int32)
    truth.counts = np.minimum(truth.counts, 100)
    return truth.counts.astype(kind)


def _counted(truth: Truth, value: float, kind: Any) -> np.ndarray:
    counts = truth.counts.astype(kind)
    counts[3, 4] = value
    truth.counts = counts
    return counts


def _with_zeros(truth: Truth) -> sparse.csr_matrix:
    counts = sparse.csr_matrix(truth.counts + 1)
    counts.data -= 1
    return counts


def _replace(file: h5py.File, name: str, value: np.ndarray) -> None:
    del file[name]
    file[name] = value


def _retype(file: h5py.File, kind: str) -> None:
    _replace(file, "X/data", file["X/data"][()].astype(kind))


def _beyond(file: h5py.File) -> np.ndarray:
    columns = file["X/indices"][()]
    columns[5] = 1_000_000
    return columns


def _unsort(file: h5py.File) -> None:
    data, columns, starts = (file[f"X/{part}"][()] for part in ("data", "indices", "indptr"))
    for start, end in itertools.pairwise(starts):
        data[start:end], columns[start:end] = data[start:end][::-1].copy(), columns[start:end][::-1].copy()
    file["X/data"][...], file["X/indices"][...] = data, columns


def _split(file: h5py.File, kind: str = "i4") -> None:
    """Each entry as two that are one less and one."""
    data, columns, starts = (file[f"X/{part}"][()] for part in ("data", "indices", "indptr"))
    parts = np.stack([data - data // 2, data // 2], axis=1).ravel().astype(kind)
    for name, value in (("data", parts), ("indices", np.repeat(columns, 2)), ("indptr", starts * 2)):
        _replace(file, f"X/{name}", value)


def _large_parts(home: Path, truth: Truth) -> Made:
    truth.counts[3, 4] = 300
    return written(home, truth, truth.table(), lambda file: _split(file, "u1")), truth, ()


def _named(axis: str, stored: Any, judge: Judge | None = None) -> Callable[[Path, Truth], Made]:
    """The index of `obs` or `var` replaced in the file."""

    def make(home: Path, truth: Truth) -> Made:
        def edit(file: h5py.File) -> None:
            key = file[axis].attrs["_index"]
            names = truth.names if axis == "obs" else truth.genes
            value = stored(names)
            del file[axis][key]
            anndata.io.write_elem(file[axis], key, value)

        return written(home, truth, truth.table(), edit), judge or truth, ()

    return make


def _symbols(truth: Truth, *symbols: str) -> Truth:
    truth.genes[: len(symbols)] = symbols
    return truth


def _names() -> Iterator[Case]:
    for axis in ("obs", "var"):
        yield METADATA, f"names of {axis} as bytes", _named(axis, lambda names: np.array(names, dtype="S"))
        yield METADATA, f"names of {axis} as categories", _named(axis, pd.Categorical)
        yield (
            METADATA,
            f"one name of {axis} empty",
            _named(axis, lambda names: np.array([*names[:-1], ""], dtype=object)),
        )
        yield (
            METADATA,
            f"two names of {axis} alike",
            _named(axis, lambda names: np.array([*names[:-1], names[0]], object)),
        )
    for symbols in (("NA",), ("NA", "null", "nan"), ("None", "NaN", "N/A"), ("TRUE", "1", "1e5"), ("MARCH1", "1-Mar")):
        yield (
            METADATA,
            f"genes called {', '.join(symbols)}",
            lambda home, truth, s=symbols: (written(home, _symbols(truth, *s), truth.table()), truth, ()),
        )
    yield METADATA, "a symbol of two genes, in another order in each section", _exchanged


def _exchanged(home: Path, truth: Truth) -> Made:
    ids = [f"ENSG{number:011d}" for number in range(len(truth.genes))]
    for name in ("s0", "s1"):
        table = truth.table()
        table.var["gene_ids"] = ids if name == "s0" else [ids[1], ids[0], *ids[2:]]
        written(home / "of" / name, truth, table)
        (home / "of" / name / "s0").rename(home / name)

    def judge(found: Mapping[str, Prepared]) -> str:
        return "" if len(found) == 2 else f"{len(found)} sections"

    return f"folder:{home}", judge, ("--set", "folder.sections=s0,s1")


def _donor(donor: str, change: Callable[[anndata.AnnData], object], edit: Any = None) -> Callable[[Path, Truth], Made]:
    def make(home: Path, truth: Truth) -> Made:
        table = truth.table()
        change(table)

        def judge(found: Mapping[str, Prepared]) -> str:
            said = found["s0"].donor
            return difference(truth, found["s0"]) or ("" if said == donor else f"donor '{said}' instead of '{donor}'")

        return written(home, truth, table, edit), judge, ()

    return make


def _donors() -> Iterator[Case]:
    columns: dict[str, tuple[Callable[[int], Any], str]] = {
        "texts": (lambda n: ["P1"] * n, "P1"),
        "categories": (lambda n: pd.Categorical(["P1"] * n, categories=["P0", "P1"]), "P1"),
        "whole numbers": (lambda n: [7] * n, "7"),
        "floats with NaN": (lambda n: [7.0] * (n - 1) + [np.nan], "7"),
        "nullable numbers": (lambda n: pd.array([7] * (n - 1) + [None], dtype="Int64"), "7"),
        "nullable booleans": (lambda n: pd.array([True] * (n - 1) + [None], dtype="boolean"), "True"),
        "categories with NaN": (lambda n: pd.Categorical(["P1"] * (n - 1) + [None]), "P1"),
        "NaN": (lambda n: [np.nan] * n, ""),
        "the text nan": (lambda n: ["nan"] * n, ""),
        "empty texts": (lambda n: [""] * n, ""),
        "two donors": (lambda n: ["P1"] * (n - 1) + ["P2"], ""),
    }
    for name, (values, donor) in columns.items():
        for key in ("patient", "donor"):
            yield METADATA, f"obs['{key}'] of {name}", _donor(donor, lambda t, v=values, k=key: _column(t, k, v))
    yield METADATA, "obs['patient'] of anndata 0.7", _donor("P1", lambda t: _column(t, "patient", _two), _version_0_7)
    stored = {"P1": "P1", "an array of one": ["P1"], "3": 3, "3.0": 3.0, "bytes": np.array([b"P1"])}
    for name, value in (*stored.items(), ("NaN", np.nan), ("the text None", "None"), ("an empty text", "")):
        donor = {"3": "3", "3.0": "3"}.get(name, "P1" if name in stored else "")
        yield METADATA, f"uns['donor'] is {name}", _donor(donor, lambda t, v=value: t.uns.update(donor=v))
    yield METADATA, "uns['donor'] is a dict", _donor("", lambda t: t.uns.update(donor={"id": "P1"}))
    yield METADATA, "uns and obs name different donors", _donor("", _contradicting)


def _column(table: anndata.AnnData, key: str, values: Callable[[int], Any]) -> None:
    table.obs[key] = values(table.n_obs)


def _two(spots: int) -> pd.Categorical:
    return pd.Categorical(["P1"] * spots, categories=["P0", "P1"])


def _contradicting(table: anndata.AnnData) -> None:
    table.obs["patient"], table.uns["patient"] = "P2", "P1"


def _version_0_7(file: h5py.File) -> None:
    obs = file["obs"]
    categories, codes = obs["patient/categories"][()], obs["patient/codes"][()]
    del obs["patient"]
    beside = obs.create_group("__categories").create_dataset("patient", data=categories, dtype=h5py.string_dtype())
    obs.create_dataset("patient", data=codes.astype("i1")).attrs["categories"] = beside.ref
    obs.attrs["encoding-version"] = "0.1.0"


def _numbers() -> Iterator[Case]:
    values = {
        "a text": "1.0",
        "an array of one": [1.0],
        "an array without axes": np.array(1.0),
        "bytes": np.array([b"1"]),
    }
    bad = {
        "two numbers": [1.0, 1.0],
        "NaN": np.nan,
        "0": 0.0,
        "negative": -1.0,
        "true": True,
        "a unit": "1 um",
        "a dict": {"x": 1},
    }
    for name, value in (values | bad).items():
        yield METADATA, f"uns['um_per_px'] is {name}", _uns(value)


def _uns(value: Any) -> Callable[[Path, Truth], Made]:
    return lambda home, truth: (written(home, truth, truth.table(um_per_px=value)), truth, ())


def _placed(columns: tuple[str, ...]) -> Callable[[Path, Truth], Made]:
    def make(home: Path, truth: Truth) -> Made:
        table = truth.table()
        x_names = ("x", "X", "pxl_col_in_fullres", "imagecol", "0")
        table.obsm["spatial"] = pd.DataFrame(
            {c: truth.xy[:, 0 if c in x_names else 1] for c in columns}, index=table.obs_names
        )
        return written(home, truth, table), truth, ()

    return make


def _positions() -> Iterator[Case]:
    pairs = (("x", "y"), ("y", "x"), ("Y", "X"), ("pxl_row_in_fullres", "pxl_col_in_fullres"), ("imagerow", "imagecol"))
    for columns in (*pairs, ("0", "1"), ("array_row", "y", "x"), ("row", "column"), ("a", "b"), ("y",)):
        yield METADATA, f"positions as a table of {', '.join(columns)}", _placed(columns)
    changes: dict[str, Callable[[np.ndarray], Any]] = {
        "sparse": sparse.csr_matrix,
        "whole numbers": lambda xy: np.rint(xy).astype(int),
        "of three columns": lambda xy: np.c_[xy, xy[:, 0]],
        "with NaN": lambda xy: np.where(np.arange(len(xy))[:, None] == 3, np.nan, xy),
    }
    for name, change in changes.items():
        yield METADATA, f"positions {name}", _moved(change)


def _moved(change: Callable[[np.ndarray], Any]) -> Callable[[Path, Truth], Made]:
    def make(home: Path, truth: Truth) -> Made:
        table = truth.table()
        table.obsm["spatial"] = change(truth.xy)
        return written(home, truth, table), truth, ()

    return make


def _litter() -> Iterator[Case]:
    for name in (".DS_Store", "._s0", "Thumbs.db", "desktop.ini", "~$notes.docx", ".~lock.notes.odt#", "s0.lock"):
        yield METADATA, f"{name} beside and in the section", _left(name, is_folder=False)
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", "s0.part"):
        yield METADATA, f"{name}/ with a copy of the counts", _left(name, is_folder=True)


def _left(name: str, is_folder: bool) -> Callable[[Path, Truth], Made]:
    def make(home: Path, truth: Truth) -> Made:
        spec = written(home, truth, truth.table())
        for place in (home, home / "s0"):
            if is_folder:
                (place / name).mkdir()
                (place / name / "counts.h5ad").write_bytes((home / "s0" / "counts.h5ad").read_bytes())
            else:
                (place / name).write_bytes(b"\0\5\x16\7" + bytes(60))
        return spec, truth, ()

    return make
