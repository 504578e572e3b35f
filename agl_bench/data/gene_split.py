"""The gene axis of a fold: filter, scores, primary genes, ranking of the auxiliary ones. The single home of scanpy.

Scores are computed from sums over blocks of spots, so that nothing of size spots × genes is copied; the one exception,
"seurat_v3", says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from agl_bench.data.gene_files import read_gene_names, read_gene_scores
from agl_bench.data.neighbours import neighbour_weights
from agl_bench.data.preprocess import NORMAL_MAD, SpotTable
from agl_bench.errors import BadSpec
from agl_bench.interfaces.genes import GeneSplit, order_of
from agl_bench.protocol import Protocol

BLOCK = 2048  # spots that are looked at at once
BINS = 20  # of the mean, flavour "seurat"
FEWEST_FITTED = 20  # genes that vary; scikit-misc's fit of fewer fails, of a few it ends the process
VOTE = 0.25  # of the median count of a section: a spot with less has no say in "pearson_residuals"
FREQUENT = 0.25  # of the spots: genes detected in so many say how much a gene of the section varies
RESIDUALS = 2**20  # that are looked at at once
DIGITS = 9  # of a score after the point: of two genes alone in a bin, say, names decide and not errors of rounding


def split_genes(table: SpotTable, training_rows: np.ndarray, protocol: Protocol) -> tuple[GeneSplit, np.ndarray]:
    """Choose the genes of a fold and rank the auxiliary ones.

    Primary genes are the `protocol.primary_genes` with the highest `protocol.primary_score` among those detected in at
    least `protocol.primary_detection` of the spots, or those of `protocol.primary_file`, which stay in whatever the
    filter says; all others are auxiliary and ranked by `protocol.ranking` or `protocol.ranking_file`. Ties are broken
    by name. Genes without a score are never preferred as primary ones and rank where `protocol.nan_scores` says; those
    that a file does not list rank last. With `genes_from = "training"` nothing but training spots is looked at.

    Args:
        table: all spots.
        training_rows: rows of the training spots.
        protocol: gene filter, scores or files, and the spots that decide.

    Returns:
        The split, and the columns of the table that it covers, (genes,).

    Raises:
        BadSpec: if there are more primary genes than genes, or a file is malformed or names other genes.
    """
    rows = training_rows if protocol.genes_from == "training" else np.arange(len(table))
    detected = detection(table, rows)
    kept = detected >= protocol.min_spots_per_gene
    panel = np.asarray(table.genes)
    chosen = _listed_primary(panel, protocol)
    kept[chosen] = True
    columns = np.flatnonzero(kept)
    names = panel[columns]
    scores: dict[str, np.ndarray] = {}

    def score_by(name: str) -> np.ndarray:
        if name not in scores:
            scores[name] = score_genes(name, table, rows, columns)
        return scores[name]

    primary = np.zeros(len(columns), dtype=bool)
    if protocol.primary_file:
        primary[np.searchsorted(columns, chosen)] = True
    else:
        eligible = detected[columns] >= protocol.primary_detection * len(rows)
        if eligible.sum() < protocol.primary_genes:
            raise BadSpec(
                f"protocol.primary_genes = {protocol.primary_genes} is more than the {eligible.sum()} genes that are "
                f"detected in at least {protocol.primary_detection:.0%} of {len(rows)} spots; choose fewer primary "
                "genes or a smaller protocol.primary_detection"
            )
        best = order_of(score_by(protocol.primary_score), names)
        primary[best[eligible[best]][: protocol.primary_genes]] = True

    score = (
        read_gene_scores(Path(protocol.ranking_file), names.tolist(), setting="protocol.ranking_file")
        if protocol.ranking_file
        else score_by(protocol.ranking)
    )
    order = order_of(score, names, nan_first=protocol.nan_scores == "first" and not protocol.ranking_file)
    rank = np.full(len(columns), -1, dtype=np.int64)
    auxiliary = order[~primary[order]]
    rank[auxiliary] = np.arange(len(auxiliary))
    ranked = score[~primary]
    _, places, sizes = np.unique(ranked[~np.isnan(ranked)], return_inverse=True, return_counts=True)
    return (
        GeneSplit(
            names=tuple(names.tolist()),
            primary=torch.from_numpy(primary),
            rank=torch.from_numpy(rank),
            score=torch.from_numpy(score),
            unscored=int(np.isnan(ranked).sum()),
            tied=int((sizes[places] > 1).sum()),
        ),
        columns,
    )


def _listed_primary(panel: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Columns of the genes that `protocol.primary_file` names, sorted; none without a file."""
    if not protocol.primary_file:
        return np.empty(0, dtype=np.int64)
    listed = np.asarray(read_gene_names(Path(protocol.primary_file), setting="protocol.primary_file"))
    absent = listed[~np.isin(listed, panel)]
    if len(absent):
        raise BadSpec(
            f"protocol.primary_file = '{protocol.primary_file}': the panel of {len(panel)} genes lacks {len(absent)} "
            f"of its {len(listed)} genes, first {absent[0]}; take them out or use the panel's names, such as {panel[0]}"
        )
    return np.flatnonzero(np.isin(panel, listed))


def score_genes(name: str, table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A score of each gene, the higher the better.

    Args:
        name: "pearson_residuals", "seurat_v3" (variability of counts), "seurat", "cell_ranger" (of the normalised
            values), "moran" (spatial autocorrelation), "mean" (of the normalised values) or "detection" (share of the
            spots that have any).
        table: all spots.
        rows: those that decide.
        columns: the genes; some scores compare a gene with the others.

    Returns:
        (columns,) float64, rounded to `DIGITS`; NaN where the score is not defined.
    """
    return SCORES[name](table, rows, columns).round(DIGITS)


def detection(table: SpotTable, rows: np.ndarray) -> np.ndarray:
    """In how many of the spots each gene of the table is detected, (genes,) int."""
    detected = np.zeros(len(table.genes), dtype=np.int64)
    for block in _blocks(table, rows):
        detected += np.bincount(block.indices[block.data > 0], minlength=len(detected))
    return detected


def moments(
    table: SpotTable, rows: np.ndarray, change: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample variance (n − 1) of each gene of the table over the spots, (genes,) float64 each.

    Blocks are joined by Chan et al.'s update of the sum of squared deviations, which gives exactly 0 for a gene that
    does not vary.

    Args:
        table: all spots.
        rows: those that decide.
        change: applied to the values first; must keep 0.
    """
    seen, mean, squares = 0, np.zeros(len(table.genes)), np.zeros(len(table.genes))
    for block in _blocks(table, rows):
        value = change(block.data).astype(np.float64)
        here = np.bincount(block.indices, value, minlength=len(mean)) / block.shape[0]
        zeros = block.shape[0] - np.bincount(block.indices, minlength=len(mean))
        spread = np.bincount(block.indices, (value - here[block.indices]) ** 2, minlength=len(mean)) + zeros * here**2
        step, total = here - mean, seen + block.shape[0]
        mean += step * (block.shape[0] / total)
        squares += spread + step**2 * (seen * block.shape[0] / total)
        seen = total
    return mean, squares / max(seen - 1, 1)


def seurat(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Normalised dispersion, scanpy's flavour "seurat" with 20 bins (Shiku et al. 2026, Eq. 2-3).

    ln(variance / mean) of exp(value) − 1, as z-score within equal bins of ln(1 + mean); 1 for a gene alone in its bin.
    """
    mean, dispersion = _dispersion(*moments(table, rows, np.expm1), columns)
    with np.errstate(divide="ignore"):
        dispersion = np.log(np.where(dispersion == 0, np.nan, dispersion))
    genes = pd.DataFrame({"bin": pd.cut(np.log1p(mean), BINS), "dispersion": dispersion})
    groups = genes.groupby("bin", observed=True)["dispersion"]
    centre, width = groups.transform("mean"), groups.transform("std")
    alone = width.isna()
    score: np.ndarray = ((dispersion - centre.where(~alone, 0)) / width.where(~alone, centre)).to_numpy()
    return score


def cell_ranger(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Normalised dispersion, scanpy's flavour "cell_ranger".

    variance / mean of the values, less the median and in units of the median absolute deviation of the genes between
    the same two of the 10th, 15th, … 100th percentiles of the mean.
    """
    mean, dispersion = _dispersion(*moments(table, rows), columns)
    # Equal percentiles, e.g. of many genes that nobody has, bound one bin; scanpy refuses them.
    edges = np.unique(np.concatenate([[-np.inf], np.percentile(mean, np.arange(10, 105, 5)), [np.inf]]))
    genes = pd.DataFrame({"bin": pd.cut(mean, edges), "dispersion": dispersion})
    centre = genes.groupby("bin", observed=True)["dispersion"].transform("median")
    genes["deviation"] = (genes["dispersion"] - centre).abs()
    width = genes.groupby("bin", observed=True)["deviation"].transform("median") / NORMAL_MAD
    with np.errstate(divide="ignore", invalid="ignore"):
        score: np.ndarray = (dispersion - centre.to_numpy()) / width.to_numpy()
    return score


def _dispersion(mean: np.ndarray, variance: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance / mean of the genes; a mean of 0 is taken as 1e-12, as scanpy does."""
    mean = np.where(mean[columns] == 0, 1e-12, mean[columns])
    return mean, variance[columns] / mean


def pearson_residuals(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Variance of the Pearson residuals of raw counts within sections, mean over their spots; NaN without a count.

    Analytic residuals (Lause et al. 2021): (x − μ) / √(μ + φ μ²), clipped to ±√n, with μ = count of the spot × share of
    the gene in the section. So a spot weighs by its counts, and a few cannot carry a score; those with less than `VOTE`
    of the section's median count, whose residuals are mostly noise, have no say. φ is that of the section's median gene
    and not the authors' 0.01, with which abundant genes come first, however ordinary their variability.

    Raises:
        BadSpec: if there are no counts.
    """
    if not table.has_counts:
        raise _needs_counts("pearson_residuals")
    squares, counts, voters = np.zeros(len(columns)), np.zeros(len(columns)), 0
    for section in np.unique(table.section[rows]):
        here = rows[table.section[rows] == section]
        here = here[table.total[here] >= VOTE * np.median(table.total[here])]
        variance, sums = _residual_variance(table, here, columns)
        squares, counts, voters = squares + len(here) * variance, counts + sums, voters + len(here)
    score: np.ndarray = np.where(counts > 0, squares / voters, np.nan)
    return score


def _residual_variance(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance of each gene's residuals in the spots of a section, and its counts there, (genes,) float64 each."""
    total, spots = table.total[rows], len(rows)
    sums, squares, by_depth, detected = np.zeros((4, len(columns)))
    for start in range(0, spots, BLOCK):
        block = table.counts(rows[start : start + BLOCK], columns).astype(np.float64)
        sums += np.asarray(block.sum(0)).ravel()
        by_depth += block.T @ total[start : start + BLOCK]
        detected += np.bincount(block.indices[block.data > 0], minlength=len(columns))
        squares += np.bincount(block.indices, block.data**2, minlength=len(columns))
    share = sums / max(total.sum(), 1.0)
    expected = share**2 * (total**2).sum()  # Σ μ² over spots; Σ (x − μ)² follows from the sums
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = (squares - 2 * share * by_depth + expected - sums) / expected
    told = excess[detected >= FREQUENT * spots] if (detected >= FREQUENT * spots).any() else excess[sums > 0]
    overdispersion = max(float(np.median(told)), 0.0) if len(told) else 0.0
    first, second, clip = np.zeros(len(columns)), np.zeros(len(columns)), np.sqrt(spots)
    step = max(1, RESIDUALS // max(len(columns), 1))
    for start in range(0, spots, step):
        block = table.counts(rows[start : start + step], columns).toarray().astype(np.float64)
        mean = total[start : start + step, None] * share
        with np.errstate(divide="ignore", invalid="ignore"):
            residual = np.nan_to_num((block - mean) / np.sqrt(mean + overdispersion * mean**2)).clip(-clip, clip)
        first += residual.sum(0)
        second += (residual**2).sum(0)
    return np.maximum(second / spots - (first / spots) ** 2, 0), sums


def seurat_v3(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Variance of clipped, standardised raw counts, scanpy's flavour "seurat_v3"; holds the counts in memory.

    Raises:
        BadSpec: if there are no counts, scikit-misc is missing, or the trend of the variance cannot be fitted.
    """
    if not table.has_counts:
        raise _needs_counts("seurat_v3")
    counts = table.counts(rows, columns)
    varying = int(np.sum(counts.max(0).toarray() > counts.min(0).toarray()))
    if varying < FEWEST_FITTED:
        raise BadSpec(
            f"score seurat_v3 fits a trend through the genes that vary and needs {FEWEST_FITTED}, there are {varying} "
            f"on {len(rows)} spots; use seurat or moran"
        )
    # Late: `agl-bench list` and `--help` must not wait for scanpy.
    import anndata
    import scanpy

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = scanpy.pp.highly_variable_genes(
                anndata.AnnData(counts),
                flavor="seurat_v3",
                n_top_genes=len(columns),
                check_values=False,  # the sections have been checked
                inplace=False,
            )
    except ImportError:
        raise BadSpec("score seurat_v3 needs scikit-misc; run pip install scikit-misc, or use seurat") from None
    except ValueError as error:  # of loess
        raise BadSpec(
            f"score seurat_v3 cannot be computed for {len(columns)} genes on {len(rows)} spots: the fit of their "
            f"variances fails ({_plain(error)}); use seurat or moran"
        ) from None
    finally:
        torch.set_num_threads(threads)  # scanpy's numba kernels reset OpenMP's number of threads for the whole process
    return np.asarray(found["variances_norm"], dtype=np.float64)


def _needs_counts(score: str) -> BadSpec:
    return BadSpec(f"score {score} needs raw counts, and the dataset has none; use seurat, cell_ranger or moran")


def _plain(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    return " ".join((text.decode() if isinstance(text, bytes) else str(text)).split())


def moran(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Moran's I of the normalised values among neighbouring spots, mean over the sections where it is defined.

    I = (n / Σw) Σᵢⱼ wᵢⱼ zᵢ zⱼ / Σᵢ zᵢ², z = x − mean of the section: a difference between sections is no pattern.
    """
    total, defined = np.zeros(len(table.genes)), np.zeros(len(table.genes))
    for section in np.unique(table.section[rows]):
        here = rows[table.section[rows] == section]
        here = here[np.lexsort(table.position[here].T)]  # neighbours in few blocks, whatever the order of the rows
        value = _moran_of_section(table, here)
        known = ~np.isnan(value)
        total[known] += value[known]
        defined += known
    with np.errstate(invalid="ignore"):
        score: np.ndarray = (total / defined)[columns]
    return score


def _moran_of_section(table: SpotTable, rows: np.ndarray) -> np.ndarray:
    """Moran's I of each gene of the table, (genes,) float64; NaN where it does not vary or no spot has a neighbour."""
    weights = neighbour_weights(table.position[rows].astype(np.float64))
    out, into = np.asarray(weights.sum(1)).ravel(), np.asarray(weights.sum(0)).ravel()
    mean, variance = moments(table, rows)
    cross, sums = np.zeros(len(mean)), np.zeros(len(mean))
    for start in range(0, len(rows), BLOCK):
        block = slice(start, min(start + BLOCK, len(rows)))
        near = weights[block]
        needed = np.union1d(near.indices, np.arange(block.start, block.stop))
        values = table.rows(rows[needed]).astype(np.float64)
        own = values[np.searchsorted(needed, np.arange(block.start, block.stop))]
        cross += np.asarray(own.multiply(near[:, needed] @ values).sum(0)).ravel()
        sums += own.T @ (out[block] + into[block])
    among = cross - mean * sums + mean**2 * out.sum()  # Σᵢⱼ wᵢⱼ (xᵢ − m)(xⱼ − m), without centring sparse values
    with np.errstate(divide="ignore", invalid="ignore"):
        value: np.ndarray = len(rows) / out.sum() * among / np.where(variance > 0, variance * (len(rows) - 1), np.nan)
    return value


def _mean(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    mean: np.ndarray = moments(table, rows)[0][columns]
    return mean


def _detection_share(table: SpotTable, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    share: np.ndarray = detection(table, rows)[columns] / len(rows)
    return share


def _blocks(table: SpotTable, rows: np.ndarray) -> Iterator[sparse.csr_matrix]:
    for start in range(0, len(rows), BLOCK):
        yield table.rows(rows[start : start + BLOCK])


SCORES: dict[str, Callable[[SpotTable, np.ndarray, np.ndarray], np.ndarray]] = {
    "pearson_residuals": pearson_residuals,
    "seurat": seurat,
    "cell_ranger": cell_ranger,
    "seurat_v3": seurat_v3,
    "moran": moran,
    "mean": _mean,
    "detection": _detection_share,
}
