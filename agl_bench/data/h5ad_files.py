"""What an .h5ad file says, as anndata and pandas read it, in whatever version of the format it was written.

read_h5ad        the whole table, its positions as an array
read_donors      whom the tissue is from, without the counts
read_uns         single values of `uns`, without the counts
read_constants   columns of `obs` with one value for all spots, without the counts
known_names      names that a stored value holds; what stands for "not known" is none
placed           positions in the order (x, y) where columns of a table have names
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from agl_bench.data.slides import reason
from agl_bench.errors import FORBIDDEN, AglBenchError, BadSection

OWNERS = ("patient", "donor")  # keys of `uns` and columns of `obs`, the first that says something counts
_UNKNOWN = frozenset(("", "nan", "na", "n/a", "#n/a", "<na>", "nat", "none", "null", "unknown", "not known"))
_NO_VALUES = (Mapping, pd.DataFrame, anndata.AnnData)  # what `uns` may hold beside values
# Columns of a table of positions, (x, y), lower case. Rows and columns of an array are no pixels and stand not here.
_XY = (
    ("x", "y"),
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("imagecol", "imagerow"),
    ("pixel_x", "pixel_y"),
    ("x_pixel", "y_pixel"),
    ("x_px", "y_px"),
    ("x_coord", "y_coord"),
    ("x_centroid", "y_centroid"),
    ("spatial1", "spatial2"),
    ("spatial_1", "spatial_2"),
    ("0", "1"),
)


def read_h5ad(path: Path, *, section: str = "") -> anndata.AnnData:
    """An .h5ad file as stored, but obsm["spatial"] as an array (spots, 2) in the order (x, y).

    Raises:
        BadSection: if it cannot be read, or its positions are a table that does not say which column is which.
    """
    section = section or path.parent.name
    with _reading(path, section):
        counts = anndata.read_h5ad(path)
        for axis in ("obs_names", "var_names"):
            if isinstance(getattr(counts, axis), pd.CategoricalIndex):  # which is looked up unlike texts
                setattr(counts, axis, getattr(counts, axis).astype(str))
        if "spatial" in counts.obsm:
            counts.obsm["spatial"] = placed(counts.obsm["spatial"], section)
    return counts


def read_donors(path: Path, *, section: str = "") -> tuple[str, ...]:
    """Whom the tissue of an .h5ad file is from: `patient` or `donor` of `uns`, or columns of that name in `obs`.

    One name is the donor. None is a donor that is not known; so are several, for a section cannot be left out with
    both. Reads no counts.

    Raises:
        BadSection: if the file cannot be read, or `uns` and `obs` name different ones.
    """
    section = section or path.parent.name
    with _reading(path, section), h5py.File(path, "r") as file:
        stated, columns = _stated(file, OWNERS), _columns(file, path, OWNERS)
    for key in OWNERS:
        try:
            whole, spots = known_names(stated.get(key)), known_names(columns.get(key))
        except TypeError as error:
            raise BadSection(section, f"uns['{key}'] in {path} {error}; it has to be a name") from None
        if len(whole) == 1 and spots and whole[0] not in spots:
            raise BadSection(
                section,
                f"{path} contradicts itself: uns['{key}'] is '{whole[0]}' and obs['{key}'] is '{spots[0]}'; "
                f"correct one of them, or remove it",
            )
        if whole or spots:
            return whole or spots
    return ()


def read_uns(path: Path, *names: str, section: str = "") -> dict[str, Any]:
    """Single values (numbers, text) of `uns` of an .h5ad file; names that are absent are left out. Reads no counts.

    An array of one value is that value.

    Raises:
        BadSection: if the file cannot be read.
    """
    with _reading(path, section or path.parent.name), h5py.File(path, "r") as file:
        stored = _stated(file, names)
    single = {name: np.ravel(value) for name, value in stored.items() if not isinstance(value, _NO_VALUES)}
    return {name: _text(values[0]) for name, values in single.items() if len(values) == 1}


def read_constants(path: Path, *names: str, section: str = "") -> dict[str, str]:
    """Columns of `obs` of an .h5ad file that hold one text or number for all spots; others are left out.

    Spots without a value do not count. Reads no counts.

    Raises:
        BadSection: if the file cannot be read.
    """
    with _reading(path, section or path.parent.name), h5py.File(path, "r") as file:
        found = {name: known_names(column) for name, column in _columns(file, path, names).items()}
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def known_names(stored: object) -> tuple[str, ...]:
    """The names that a stored value holds, each once, in their order; none for NaN, None, "" and their like.

    Args:
        stored: a text or number, or many of them: an array, a list, a column; nullable and categorical as well.

    Raises:
        TypeError: if it is something else; says what.
    """
    if isinstance(stored, _NO_VALUES):
        raise TypeError(f"is a {type(stored).__name__}")
    values = pd.Series(np.ravel(np.asarray(stored, dtype=object)), dtype=object).dropna().unique()
    names = (_text(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values)
    return tuple(dict.fromkeys(name for name in map(str.strip, map(str, names)) if name.casefold() not in _UNKNOWN))


def placed(stored: Any, section: str) -> Any:
    """Positions in the order (x, y), where they are a table with named columns; anything else as it is.

    Raises:
        BadSection: if the names of the columns do not say which is x and which is y, or say it twice.
    """
    if sparse.issparse(stored):
        return stored.toarray()
    if not isinstance(stored, pd.DataFrame):
        return stored
    columns = {str(column).strip().casefold(): column for column in stored.columns}
    pairs = [[columns[name] for name in pair] for pair in _XY if set(pair) <= set(columns)]
    if len(pairs) != 1 or len(columns) != stored.shape[1]:
        raise BadSection(
            section,
            f"obsm['spatial'] is a table with columns {', '.join(map(str, stored.columns)) or 'of no name'}, "
            f"{'several' if pairs else 'none'} of which name pixel positions; store an array (spots, 2) "
            f"of (x = column, y = row), or name two columns x and y",
        )
    numbers: np.ndarray = stored[pairs[0]].to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers


def _text(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _stated(file: Any, names: Sequence[str]) -> dict[str, Any]:
    """Values of `uns`, in the types of anndata."""
    there = file.get("uns", ())
    return {name: anndata.io.read_elem(there[name]) for name in names if name in there}


def _columns(file: Any, path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Columns of `obs`, in the types of pandas."""
    stored = file.get("obs", ())
    if isinstance(stored, h5py.Group) and stored.attrs.get("encoding-version") == "0.2.0":
        return {name: anndata.io.read_elem(stored[name]) for name in names if name in stored}
    # Before anndata 0.8 a column was not told by itself, before 0.7 its categories stood in `uns`.
    obs = anndata.io.read_elem(stored) if isinstance(stored, h5py.Group) else anndata.read_h5ad(path).obs
    return {name: obs[name] for name in names if name in obs}


@contextmanager
def _reading(path: Path, section: str) -> Iterator[None]:
    """Damage becomes `BadSection`; what libraries think of old files is not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except AglBenchError:
        raise
    except PermissionError:
        raise BadSection(section, f"{path} {FORBIDDEN}") from None
    except Exception as error:  # noqa: BLE001  (a damaged or foreign file makes anndata raise nearly anything)
        said = reason(error).strip().partition("\n")[0]
        raise BadSection(
            section, f"{path} cannot be read as .h5ad ({said}); it is damaged or not an .h5ad file; replace it"
        ) from None
