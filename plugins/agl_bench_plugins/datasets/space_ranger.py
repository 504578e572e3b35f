"""Files that 10x Space Ranger writes, read by what they say: matrices, tables of positions, scale factors.

read_matrix   counts of spots × genes
read_table    positions of the spots of a matrix, from every table that is there; tables that differ are refused
read_scales   scale factors
"""

from __future__ import annotations

import codecs
import gzip
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse

from agl_bench import BadSection

COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
PLACES = list(COLUMNS[4:])
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SEPARATORS = ",;\t "
_SAME_PX = 1.0  # tables of old versions hold whole pixels, rounded or cut off


def read_matrix(files: Sequence[Path], section: str) -> anndata.AnnData:
    """Counts of spots × genes; repeated symbols are told apart as NAME-1, NAME-2, …

    Args:
        files: the .h5 file, and the barcodes of the matrix folder where that is there too; or matrix, features and
            barcodes of the folder.
        section: name used in errors.

    Raises:
        BadSection: if they cannot be read or do not belong together.
    """
    counts = _readable(lambda: _h5(files[0]) if files[0].suffix == ".h5" else _triple(files), files[0], section)
    for path in files[1:] if files[0].suffix == ".h5" else ():
        barcodes = _readable(lambda: _lines(path), path, section)[0]  # noqa: B023  (called here)
        if set(barcodes) != set(counts.obs_names):
            raise BadSection(
                section,
                f"{files[0]} and {path} have different barcodes ({counts.n_obs} and {len(barcodes)}), so they are "
                f"from different runs; remove the wrong one",
            )
    counts.var_names_make_unique()
    return counts


def _h5(path: Path) -> anndata.AnnData:
    # Imported here: it takes seconds, and only reading needs it.
    import scanpy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # they are made so
        return scanpy.read_10x_h5(path, gex_only=True)


def _triple(files: Sequence[Path]) -> anndata.AnnData:
    """Three columns of features as Cell Ranger 3 writes them, or two of before, when all features were genes."""
    matrix, features, barcodes = files
    with (gzip.open if matrix.suffix == ".gz" else open)(matrix, "rb") as file:
        values = scipy.sparse.csr_matrix(scipy.io.mmread(file).T)
    genes, spots = _lines(features), _lines(barcodes)[0]
    if values.shape != (len(spots), len(genes)):
        raise ValueError(
            f"it has {values.shape[0]} spots and {values.shape[1]} genes, but {barcodes.name} has {len(spots)} and "
            f"{features.name} {len(genes)}"
        )
    values = values.astype(np.float32)  # as the other reader has them
    names = genes[1 if 1 in genes else 0].to_numpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # they are made so
        counts = anndata.AnnData(values, obs=pd.DataFrame(index=spots.to_numpy()), var=pd.DataFrame(index=names))
        counts.var["gene_ids"] = genes[0].to_numpy()
        return counts[:, (genes[2] == "Gene Expression").to_numpy()].copy() if 2 in genes else counts


def _lines(path: Path) -> pd.DataFrame:
    """A table of text without header, as it stands: a gene may be called NA or nan."""
    return pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3, encoding="utf-8-sig")


def _readable(read: Callable[[], Any], path: Path, section: str) -> Any:
    try:
        return read()
    except Exception as error:  # noqa: BLE001  (a damaged or foreign file makes the readers raise nearly anything)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadSection(section, f"{path} cannot be read as a Space Ranger matrix ({reason}); copy it again") from None


def read_scales(path: Path, section: str) -> dict[str, object]:
    """The content of scalefactors_json.json."""
    try:
        scales = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadSection(section, f"{path} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(scales, dict):
        raise BadSection(section, f"{path} holds a {type(scales).__name__}, not a JSON object; copy it again")
    return scales


def read_table(paths: Sequence[Path], barcodes: pd.Index, section: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Positions of the spots of a matrix, in their order, and of all spots of the array.

    Args:
        paths: every table of positions that is there; the first is used, the others have to agree.
        barcodes: (spots,) of the matrix.
        section: name used in errors.

    Raises:
        BadSection: if a table cannot be read, lacks a spot, or contradicts another.
    """
    tables = [_read(path, section) for path in paths]
    matched = [_matched(table, barcodes, path, section) for table, path in zip(tables, paths, strict=True)]
    for path, other in zip(paths[1:], matched[1:], strict=True):
        away = np.abs(other - matched[0]).fillna(0.0)
        differs = (away[PLACES] > _SAME_PX).any(axis=1) | (away.drop(columns=PLACES) > 0).any(axis=1)
        if differs.any():
            raise BadSection(
                section,
                f"{paths[0]} and {path.name} differ in the positions of {differs.sum()} of {len(barcodes)} spots, the "
                f"first is '{barcodes[int(np.argmax(differs))]}'; remove the table that does not belong to the image",
            )
    return matched[0], tables[0]


def _read(path: Path, section: str) -> pd.DataFrame:
    """A table by the names of its columns, one row for each barcode."""
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else _text(path)
        named = "barcode" in [str(column).strip().lower() for column in table.columns]
        if not named and not isinstance(table.index, pd.RangeIndex):
            table = table.reset_index(names="barcode")
    except (OSError, ValueError) as error:  # pandas and pyarrow raise their own kinds of ValueError
        reason = str(error).strip().partition("\n")[0]
        raise BadSection(section, f"{path} cannot be read as a table ({reason}); copy it again") from None
    table.columns = [str(column).strip().lower() for column in table.columns]
    lacking = [column for column in COLUMNS if column not in table.columns]
    if lacking:
        raise BadSection(
            section,
            f"{path} has no column {', '.join(lacking)} (it has: {', '.join(map(str, table.columns))}); it needs "
            f"{', '.join(COLUMNS)}",
        )
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise BadSection(section, f"{path} has column {repeated[0]} more than once; keep the right one")
    table = table[list(COLUMNS)].dropna(how="all")
    table["barcode"] = [str(b.decode() if isinstance(b, bytes) else b).strip() for b in table["barcode"]]
    table = table.set_index("barcode")
    if not table.index.is_unique:
        raise BadSection(section, f"{path} has barcode '{table.index[table.index.duplicated()][0]}' more than once")
    for column in table.columns:
        if table[column].dtype.kind not in "iufb":
            raise BadSection(section, f"{path} has text in column {column}; the column must hold numbers")
    odd = ~table["in_tissue"].isin((0, 1))
    if odd.any():
        raise BadSection(
            section,
            f"{path} has {table['in_tissue'][odd].iloc[0]} in column in_tissue for spot '{table.index[odd][0]}'; it "
            f"takes 0 or 1",
        )
    return table.astype(np.float64)


def _text(path: Path) -> pd.DataFrame:
    """A table with or without header, however a spreadsheet or R has written it."""
    with path.open("rb") as file:
        encoding = _MARKS.get(file.read(2), "utf-8-sig")
    with path.open(encoding=encoding) as file:
        head, body = file.readline().rstrip("\r\n"), file.readline()
    separator = max(_SEPARATORS, key=head.count)  # of equally many the first
    names = [name.strip().strip("\"'").strip().lower() for name in head.split(separator)]
    headed = bool(set(names) & set(COLUMNS))
    table: pd.DataFrame = pd.read_csv(
        path,
        sep=separator,
        header=0 if headed else None,
        encoding=encoding,
        skipinitialspace=True,
        decimal="," if separator != "," and "," in body else ".",
    )
    if not headed and table.shape[1] == len(COLUMNS):
        table.columns = list(COLUMNS)
    if headed and "barcode" not in names and str(table.columns[0]).startswith("Unnamed"):  # row names, as R has them
        table = table.rename(columns={table.columns[0]: "barcode"})
    return table


def _matched(table: pd.DataFrame, barcodes: pd.Index, path: Path, section: str) -> pd.DataFrame:
    """The rows of the spots of the matrix, in their order."""
    found = table.index.get_indexer(barcodes)
    lacking = np.flatnonzero(found < 0)
    if len(lacking):
        example = f"'{table.index[0]}'" if len(table) else "nothing"
        raise BadSection(
            section,
            f"{path} has no position for {len(lacking)} of {len(barcodes)} spots, the first is "
            f"'{barcodes[lacking[0]]}' (the file has {example}); check that both files are from the same sample",
        )
    return table.iloc[found]
