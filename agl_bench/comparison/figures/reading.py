"""What figures need of the tables of single cells, read in as few columns and cells as they can show."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from agl_bench.bench.table import BASELINE
from agl_bench.comparison.gather import UNIT, Gathered
from agl_bench.errors import NotKept

_COVERED = 0.9  # of the spots at which the most widely predicted gene is
_SCHEMA = pa.schema(
    {
        "gene": pa.dictionary(pa.int32(), pa.string()),
        "primary": pa.bool_(),
        "rank": pa.int32(),
        "weight": pa.float32(),
        "pearson": pa.float32(),
    }
)
_GENES = list(_SCHEMA.names)


def sampled(cells: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many units of a place, evenly over folds and seeds; those that most selectors share come first.

    All selectors keep the same units, so that what is drawn stays paired.
    """
    shared = cells.groupby(UNIT)["selector"].nunique().sort_index()
    full = shared[shared == shared.max()]
    units = full if len(full) >= most else shared
    if len(units) > most:
        units = units.iloc[[round(i * (len(units) - 1) / max(most - 1, 1)) for i in range(most)]]
    return cells[pd.MultiIndex.from_frame(cells[UNIT]).isin(units.index)]


def genes_of(gathered: Gathered, cells: pd.DataFrame) -> pd.DataFrame:
    """Gene tables of some cells, one below the other.

    Cells that have gone since, or are damaged, are left out: the report names them.

    Returns:
        selector, key, fold, seed, gene (categories, as the first two), primary, rank (−1 = primary), weight, pearson.
    """
    parts, there = [], []
    for row, key in enumerate(cells["key"]):
        path = gathered.store.cells / key / "genes.parquet"
        try:  # names as a dictionary: they are shared by all cells, and never become objects
            table = pq.read_table(path, columns=_GENES, read_dictionary=["gene"], use_threads=False)
        except (OSError, ValueError):
            continue
        parts.append(table.cast(_SCHEMA))
        there.append(row)
    if not parts:
        return pd.DataFrame(columns=["selector", "key", *UNIT, *_GENES])
    whole = pa.concat_tables(parts).unify_dictionaries().to_pandas()
    own = cells.iloc[there][["selector", "key", *UNIT]].astype(dict.fromkeys(("selector", "key", "fold"), "category"))
    repeated = own.iloc[np.repeat(np.arange(len(own)), [len(part) for part in parts])]
    return pd.concat([repeated.reset_index(drop=True), whole], axis=1)


def per_gene(genes: pd.DataFrame, *, baseline: str = BASELINE) -> pd.DataFrame:
    """For each selector and primary gene: pearson, mean over cells, and difference to the baseline, same units."""
    primary = genes.loc[genes["primary"].astype(bool), ["selector", *UNIT, "gene", "pearson"]]
    primary = primary.astype({"selector": str, "fold": str, "gene": str})
    own = primary[primary["selector"] == baseline].drop(columns="selector").rename(columns={"pearson": "base"})
    paired = primary.merge(own, on=[*UNIT, "gene"], how="left")
    paired["difference"] = paired["pearson"] - paired["base"]
    return paired.groupby(["selector", "gene"], as_index=False)[["pearson", "difference"]].mean()


def courses_of(gathered: Gathered, cells: pd.DataFrame) -> dict[str, list[pd.DataFrame]]:
    """`Result.outer` of cells by selector, with best = the last pass of the epoch whose state was tested.

    Selectors whose first cell made no outer step learn nothing there, and their other cells are not read.
    """
    found: dict[str, list[pd.DataFrame]] = {}
    for selector, own in cells.groupby("selector", sort=False):
        for cell in own.itertuples():
            outer = _table(gathered, cell.key, "outer", ["epoch", "selected", "validation_pcc"])
            if outer is None:
                continue
            if outer.empty:
                break
            tested = outer.index[outer["epoch"] <= cell.best_epoch]  # an epoch may have no outer step
            found.setdefault(str(selector), []).append(outer.assign(best=outer.index == tested.max()))
    return found


def _table(gathered: Gathered, key: str, name: str, columns: Sequence[str]) -> pd.DataFrame | None:
    """A table of a cell, or None where the cell has none that can be read."""
    try:
        return pd.read_parquet(gathered.store.cells / key / f"{name}.parquet", columns=list(columns))
    except (OSError, ValueError):
        return None


def sweep_lines(cells: pd.DataFrame, pairs: pd.DataFrame, *, baseline: str = BASELINE) -> pd.DataFrame:
    """What `choice.sweep` draws of one place: differences to the baseline if it is there, else PCC ± sd."""
    grouped = cells.groupby("selector", sort=False)
    lines = grouped.agg(
        selected=("selected", "mean"), selected_sd=("selected", "std"), mean=("pcc", "mean"), sd=("pcc", "std")
    ).fillna({"selected_sd": 0.0, "sd": 0.0})
    own = pairs[pairs["b"] == baseline].set_index("a")
    if len(own):
        for name, column in (("value", "difference"), ("low", "low"), ("high", "high")):
            lines[name] = own[column].reindex(lines.index)
        lines.loc[lines.index == baseline, "value"] = 0.0
    else:
        lines = lines.assign(value=lines["mean"], low=lines["mean"] - lines["sd"], high=lines["mean"] + lines["sd"])
    lines = lines.reset_index()
    parts = [_without_k(label) for label in lines["selector"]]
    lines["name"] = [name for name, _ in parts]
    has_k = pd.Series([found for _, found in parts], index=lines.index)
    lines["swept"] = has_k & (lines["name"].where(has_k).map(lines["name"].where(has_k).value_counts()) > 1)
    return lines


def few_of_sweeps(lines: pd.DataFrame) -> list[str]:
    """Selectors for figures with a panel or a row each: of each sweep only the middle k.

    Args:
        lines: of `sweep_lines`.
    """
    swept = lines[lines["swept"]].sort_values("selected", kind="stable")
    middle = {str(own["selector"].iloc[len(own) // 2]) for _, own in swept.groupby("name")}
    return [s for s, is_swept in zip(lines["selector"], lines["swept"], strict=True) if not is_swept or s in middle]


def _without_k(label: str) -> tuple[str, bool]:
    """A selector's label without its setting k, and whether it has one."""
    name, _, settings = label.partition("(")
    items = settings.rstrip(")").split(", ") if settings else []
    rest = [item for item in items if not item.startswith("k=")]
    return (f"{name}({', '.join(rest)})" if rest else name), len(rest) < len(items)


def predictions_of(gathered: Gathered, cells: pd.DataFrame, selectors: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Predicted and measured expression of the test spots of one section, the one with most of them, of one seed.

    Args:
        gathered: where the cells are.
        cells: of one place.
        selectors: of which; those whose cells keep no predictions are left out.

    Returns:
        selector -> one row per spot, with the column fold beside those of the kept table; every selector has the same
        spots, each once.
    """
    for _, units in cells.groupby("seed"):
        tables = {}
        for selector in selectors:
            own = units[units["selector"] == selector]
            parts = [_predictions(gathered, cell.key, cell.fold) for cell in own.itertuples()]
            parts = [part for part in parts if part is not None]
            if parts:
                tables[selector] = pd.concat(parts, ignore_index=True)
        if tables:
            break
    else:
        return {}
    spots = {
        name: table.drop_duplicates(["section", "spot"]).set_index(["section", "spot"])
        for name, table in tables.items()
    }
    shared = functools.reduce(lambda a, b: a.intersection(b), (table.index for table in spots.values()))
    if not len(shared):
        return {}
    section = shared.get_level_values("section").value_counts().sort_index().idxmax()
    rows = shared[shared.get_level_values("section") == section].sort_values()
    return {name: table.loc[rows].reset_index() for name, table in spots.items()}


def _predictions(gathered: Gathered, key: str, fold: str) -> pd.DataFrame | None:
    try:
        return gathered.store.predictions(key).assign(fold=fold)
    except NotKept:
        return None


def shown_genes(tables: Mapping[str, pd.DataFrame], genes: pd.DataFrame) -> list[str]:
    """The best, the middle and the worst predicted of the primary genes that are predicted at most spots.

    Folds differ in their primary genes: hardly one may be predicted at every spot of a section.

    Args:
        tables: of `predictions_of`.
        genes: of `per_gene`.
    """
    mark = "predicted:"
    covered = pd.DataFrame({s: t.filter(regex=f"^{mark}").notna().mean() for s, t in tables.items()}).min(axis=1)
    covered = covered[covered >= _COVERED * covered.max()]
    known = {str(name).removeprefix(mark) for name in covered.index}
    means = genes[genes["gene"].isin(known)].groupby("gene")["pearson"].mean().dropna()
    ranked = [str(g) for g in means.sort_values(ascending=False, kind="stable").index]
    return list(dict.fromkeys(ranked[i] for i in (0, len(ranked) // 2, len(ranked) - 1))) if ranked else []
