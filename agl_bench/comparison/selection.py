"""Which genes selectors choose, how stable that is, whom it helps and what it costs.

Of the gene table of a cell only what is asked for is read, and kept as bits: ten thousand cells of 15,000 genes take
60 MB. "Selected" are auxiliary genes with more than half the weight of a primary one, as everywhere.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import stats

from agl_bench.bench.table import BASELINE, TRUTH
from agl_bench.comparison.gather import LINE, PLACE, UNIT, Gathered
from agl_bench.comparison.statistics import interval, mean_present, unit_of
from agl_bench.training.trainer import HALF

_MOST = 100  # cells of a line that are paired with each other, and units of a place that are compared
_AXES = 32  # gene axes kept, each of one fold and seed
_ORDERS = ("rank", "mean", "detection")  # what a weight may go with
_AXIS = ("gene", "primary", *_ORDERS)  # equal for all selectors of a fold and seed
_GENE_RESAMPLES = 2_000


def summary(gathered: Gathered) -> pd.DataFrame:
    """What each line of the table selects; means over its cells, which are folds × seeds.

    Returns:
        One row per `LINE`.

        selected_mean, selected_sd: selected auxiliary genes (sd: sample; NaN for one cell).
        effective: sum of the auxiliary weights, each counted at most once: the size of a fuzzy set (De Luca and Termini
            1972), k for a selection of k whole genes, and small where all weights are.
        jaccard: of what two cells select of the auxiliary genes that both have, mean over pairs of cells; NaN where
            nothing is selected.
        kuncheva: the same corrected for chance (Kuncheva 2007): 0 = as of random genes, 1 = equal. For selections of
            unequal size the correlation of the two indicators, which is Kuncheva's index where sizes are equal
            (Nogueira and Brown 2016). NaN where a selection is nothing or everything.
        prefix_overlap: share of the selected genes that are among the first as many of the ranking by gene score.
        rank_correlation: Spearman's, of weight and place in that ranking, positive if weight goes to the first genes;
            NaN for equal weights.
        mean_correlation, detection_correlation: likewise, of weight and mean expression, and of weight and the share of
            training spots that have any; NaN for cells that do not hold these.
        selection_*: on planted data, means of those scores.

        Of lines of more than 100 cells, 100 spread evenly are paired.
    """
    cells = gathered.cells
    chosen = _choices(gathered).of(cells)
    truth = [name for name in cells.columns if name.startswith(TRUTH)]
    rows = []
    for key, members in cells.groupby(LINE, sort=True):
        own = [chosen[k] for k in members["key"] if k in chosen]
        jaccard, kuncheva = _stability(_evenly(own, _MOST))
        rows.append(
            {
                **dict(zip(LINE, key, strict=True)),
                "selected_mean": members["selected"].mean(),
                "selected_sd": members["selected"].std(),
                "effective": _mean([c.effective for c in own]),
                "jaccard": jaccard,
                "kuncheva": kuncheva,
                "prefix_overlap": _mean([c.prefix_overlap for c in own]),
                **{f"{name}_correlation": _mean([c.correlation[name] for c in own]) for name in _ORDERS},
                **{name: members[name].mean() for name in truth},
            }
        )
    names = ["selected_mean", "selected_sd", "effective", "jaccard", "kuncheva", "prefix_overlap"]
    names += [f"{name}_correlation" for name in _ORDERS]
    return pd.DataFrame(rows, columns=[*LINE, *names, *truth])


def overlap(gathered: Gathered, place: Mapping[str, Any]) -> pd.DataFrame:
    """Selector × selector: Jaccard of what two select on the same fold and seed, mean over those; NaN where neither
    selects anything.

    Args:
        gathered: the cells.
        place: values of `PLACE`. Of more than 100 folds × seeds, 100 spread evenly are looked at.
    """
    members = _at(gathered.cells, place)
    units = _evenly(list(members.groupby(UNIT, sort=True).groups.values()), _MOST)
    names = sorted(members["selector"].unique())
    total, count = np.zeros((2, len(names), len(names)))
    store = _choices(gathered)
    for rows in units:
        some = members.loc[rows]
        chosen = store.of(some)
        some = some[some["key"].isin(chosen.keys())]
        at = pd.Index(names).get_indexer(some["selector"])
        jaccard, _ = _agreement([chosen[key] for key in some["key"]])
        known = np.isfinite(jaccard)
        total[np.ix_(at, at)] += np.where(known, jaccard, 0)
        count[np.ix_(at, at)] += known
    return pd.DataFrame(total / np.where(count > 0, count, np.nan), index=names, columns=names)


def negative_transfer(
    gathered: Gathered, place: Mapping[str, Any], *, baseline: str = BASELINE, seed: int = 0
) -> pd.DataFrame:
    """PCC of each primary gene against the baseline's, on the folds and seeds where both have one.

    Args:
        gathered: the cells.
        place: values of `PLACE`.
        baseline: whose PCC is subtracted.
        seed: of the bootstrap.

    Returns:
        selector, gene; difference (mean over units, see `statistics`); low, high: its 95 % interval, as in
        `statistics.pairs` with 2,000 resamples and not corrected for the number of genes; NaN for a gene that is
        primary in one fold and seed only. Sorted by selector and difference, worst first.
    """
    members = _at(gathered.cells, place)
    names = sorted(set(members["selector"]) - {baseline})
    columns = ["selector", "gene", "difference", "low", "high"]
    if baseline not in set(members["selector"]) or not names:
        return pd.DataFrame(columns=columns)
    chosen = _choices(gathered).of(members)
    members = members[members["key"].isin(chosen.keys())]
    genes = pd.Index(sorted({gene for c in chosen.values() for gene in c.genes}))
    units = pd.Index(sorted({unit_of(place["evaluation"], fold) for fold in members["fold"]}))
    seeds = pd.Index(sorted(members["seed"].unique()))
    selectors = pd.Index([baseline, *names])
    folds = pd.Index(sorted(members["fold"].unique()))
    pcc = np.full((len(selectors), len(folds), len(seeds), len(genes)), np.nan, dtype=np.float32)
    for row in members.itertuples():
        own = chosen[row.key]
        at = selectors.get_loc(row.selector), folds.get_loc(row.fold), seeds.get_loc(row.seed)
        pcc[at][genes.get_indexer(own.genes)] = own.pcc
    apart = (pcc[1:] - pcc[:1]).astype(float)  # (selectors, folds, seeds, genes)
    owner = units.get_indexer([unit_of(place["evaluation"], fold) for fold in folds])
    found = np.isfinite(apart)
    total, count = np.zeros((2, len(units), len(names), len(seeds), len(genes)))
    np.add.at(total, owner, np.where(found, apart, 0).swapaxes(0, 1))
    np.add.at(count, owner, found.swapaxes(0, 1))
    by_seed = (total / np.where(count > 0, count, np.nan)).transpose(1, 3, 0, 2)  # (selectors, genes, units, seeds)
    flat = by_seed.reshape(-1, len(units), len(seeds))
    low, high = interval(flat, resamples=_GENE_RESAMPLES, seed=seed)
    frame = pd.DataFrame(
        {
            "selector": np.repeat(np.asarray(names, dtype=object), len(genes)),
            "gene": np.tile(genes.to_numpy(), len(names)),
            "difference": mean_present(mean_present(flat, 2), 1),
            "low": low,
            "high": high,
        },
        columns=columns,
    )
    frame = frame[frame["difference"].notna()]
    return frame.sort_values(["selector", "difference", "gene"], ignore_index=True)


def costs(cells: pd.DataFrame) -> pd.DataFrame:
    """Score against cost, one row per `LINE`.

    Returns:
        pcc: mean over cells; seconds: wall time of a cell, mean; pcc_per_hour: pcc / hours of the device (GPU or CPU)
        that one cell takes; peak_memory_mb: the largest of any cell.
    """
    found = cells.groupby(LINE, sort=True).agg(
        pcc=("pcc", "mean"), seconds=("seconds", "mean"), peak_memory_mb=("peak_memory_mb", "max")
    )
    found.insert(2, "pcc_per_hour", found["pcc"] / (found["seconds"] / 3600))
    return found.reset_index()


# What is read of a cell ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """What a cell's gene table says.

    Attributes:
        auxiliary, selected: bits, one per gene of the vocabulary known when it was read.
        effective, prefix_overlap: see `summary`.
        correlation: of the weight with each of `_ORDERS`.
        genes: primary genes.
        pcc: (primary genes,) test PCC.
    """

    auxiliary: np.ndarray
    selected: np.ndarray
    effective: float
    prefix_overlap: float
    correlation: Mapping[str, float]
    genes: tuple[str, ...]
    pcc: np.ndarray


@dataclass(frozen=True)
class _Axis:
    """Genes of a fold and seed: place in the vocabulary of each auxiliary gene, in the order of the table.

    `orders`: average rank by each of `_ORDERS` that the table has; the first gene of the ranking is the highest.
    """

    auxiliary: np.ndarray  # rows
    places: np.ndarray
    bits: np.ndarray
    rank: np.ndarray
    orders: Mapping[str, np.ndarray]
    genes: tuple[str, ...]
    primary: np.ndarray


@dataclass
class _Choices:
    """Reads gene tables once each."""

    folder: Path
    vocabulary: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    known: dict[str, tuple[int, _Choice]] = field(default_factory=dict)
    axes: OrderedDict[bytes, _Axis] = field(default_factory=OrderedDict)

    def of(self, cells: pd.DataFrame) -> dict[str, _Choice]:
        """Choices by key; a cell that has gone since, or is damaged, is left out."""
        found = {}
        for key in cells.sort_values([*PLACE, *UNIT])["key"]:  # cells with the same genes one after the other
            path = self.folder / key / "genes.parquet"
            try:
                written = path.stat().st_mtime_ns
                if key not in self.known or self.known[key][0] != written:
                    self.known[key] = written, self._read(path)
                found[key] = self.known[key][1]
            except (OSError, pa.ArrowException, KeyError):
                continue
        return found

    def _read(self, path: Path) -> _Choice:
        with pa.memory_map(str(path)) as content:
            table = pq.ParquetFile(content)
            axis = self._axis(content, table)
            column = table.read(columns=["weight", "pearson"], use_threads=False)
        every = column["weight"].to_numpy()
        weight = every[axis.auxiliary]
        chosen = weight > HALF
        k = int(chosen.sum())
        selected = np.zeros(len(axis.bits) * 8, dtype=bool)
        selected[axis.places[chosen]] = True
        return _Choice(
            auxiliary=axis.bits,
            selected=np.packbits(selected),
            effective=float(np.clip(weight, 0, 1).sum()),
            prefix_overlap=float((axis.rank[chosen] < k).mean()) if k else np.nan,
            correlation=_correlations(weight, axis.orders),
            genes=axis.genes,
            pcc=column["pearson"].to_numpy()[axis.primary].astype(np.float32),
        )

    def _axis(self, content: pa.MemoryMappedFile, table: pq.ParquetFile) -> _Axis:
        """The gene axis; decoded only where its columns have not been met with the same bytes."""
        digest = hashlib.blake2b(digest_size=16)
        described = table.metadata
        for group in range(described.num_row_groups):
            for at in range(described.num_columns):
                chunk = described.row_group(group).column(at)
                if chunk.path_in_schema in _AXIS:
                    start = chunk.dictionary_page_offset or chunk.data_page_offset
                    content.seek(start)
                    digest.update(content.read_buffer(chunk.total_compressed_size))
        name = digest.digest()
        if name in self.axes:
            self.axes.move_to_end(name)
        else:
            there = [column for column in _AXIS if column in table.schema_arrow.names]
            self.axes[name] = self._decoded(table.read(columns=there, use_threads=False))
            if len(self.axes) > _AXES:
                self.axes.popitem(last=False)
        return self.axes[name]

    def _decoded(self, columns: pa.Table) -> _Axis:
        genes, primary = columns["gene"].combine_chunks().cast(pa.string()), columns["primary"].to_numpy()
        auxiliary, scored = np.flatnonzero(~primary), np.flatnonzero(primary)
        names = genes.take(pa.array(auxiliary))
        new = names.filter(pc.invert(pc.is_in(names, value_set=self.vocabulary)))
        self.vocabulary = pa.concat_arrays([self.vocabulary, new])
        places = pc.index_in(names, value_set=self.vocabulary).to_numpy()
        bits = np.zeros(len(self.vocabulary), dtype=bool)
        bits[places] = True
        orders = {name: columns[name].to_numpy()[auxiliary] for name in _ORDERS if name in columns.column_names}
        orders["rank"] = -orders["rank"]
        return _Axis(
            auxiliary=auxiliary,
            places=places,
            bits=np.packbits(bits),
            rank=-orders["rank"],
            orders={name: stats.rankdata(values) for name, values in orders.items()},
            genes=tuple(genes.take(pa.array(scored)).to_pylist()),
            primary=scored,
        )


@lru_cache(maxsize=4)
def _of_folder(folder: Path) -> _Choices:
    return _Choices(folder)


def _choices(gathered: Gathered) -> _Choices:
    return _of_folder(gathered.store.cells.resolve())


def _correlations(weight: np.ndarray, orders: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Spearman's of the weight with each of `_ORDERS`, given as average ranks; NaN where either is all ties.

    Ranks by an unstable sort, several times as fast as scipy's: it makes no difference where ties share their mean.
    """
    sorting = np.argsort(weight)
    ascending = weight[sorting]
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])[: len(weight)])
    found = dict.fromkeys(_ORDERS, float("nan"))
    if len(first) < 2:
        return found
    end = np.append(first[1:], len(weight))
    ranks = np.empty(len(weight))
    ranks[sorting] = np.repeat((first + end) / 2, end - first)
    apart = ranks - ranks.mean()
    for name, order in orders.items():
        place = order - order.mean()
        if place.any():
            found[name] = float(apart @ place / np.sqrt((apart @ apart) * (place @ place)))
    return found


def _agreement(choices: Sequence[_Choice]) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard and Kuncheva's index of every two: (choices, choices) each, see `summary`."""
    width = max((len(c.auxiliary) for c in choices), default=0)
    there, chosen = (
        np.unpackbits(
            np.stack([np.pad(getattr(c, name), (0, width - len(c.auxiliary))) for c in choices]), axis=1
        ).astype(np.float32)
        for name in ("auxiliary", "selected")
    )
    both = (chosen @ chosen.T).astype(float)
    first = (chosen @ there.T).astype(float)  # selected by the one, on genes that the other has too
    genes = (there @ there.T).astype(float)
    second = first.T
    with np.errstate(divide="ignore", invalid="ignore"):
        jaccard = both / (first + second - both)
        spread = first * (genes - first) * second * (genes - second)
        kuncheva = np.where(spread > 0, (genes * both - first * second) / np.sqrt(spread), np.nan)
    return jaccard, kuncheva


def _stability(choices: Sequence[_Choice]) -> tuple[float, float]:
    """Means over pairs; NaN where no pair has the index."""
    if len(choices) < 2:
        return float("nan"), float("nan")
    upper = np.triu_indices(len(choices), 1)
    jaccard, kuncheva = _agreement(choices)
    return _mean(jaccard[upper]), _mean(kuncheva[upper])


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of those that are defined; NaN where none is."""
    return float(mean_present(np.asarray(values, dtype=float), 0))


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, spread evenly over all of them."""
    if len(items) <= most:
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, most)]


def _at(cells: pd.DataFrame, place: Mapping[str, Any]) -> pd.DataFrame:
    """The cells of a place."""
    keep = np.ones(len(cells), dtype=bool)
    for name in PLACE:
        keep &= (cells[name] == place[name]).to_numpy()
    return cells[keep]
