"""The gene axis of a fold: filter, primary genes, ranking of the auxiliary ones. The single home of scanpy."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy import sparse

from agl_bench.data.preprocess import SpotTable
from agl_bench.errors import BadSpec
from agl_bench.interfaces.genes import GeneSplit
from agl_bench.protocol import Protocol


def split_genes(table: SpotTable, training_rows: np.ndarray, protocol: Protocol) -> tuple[GeneSplit, np.ndarray]:
    """Choose the genes of a fold and rank them by variability.

    Primary genes are the `protocol.primary_genes` with the highest score among those detected in at least
    `protocol.primary_detection` of the spots; all others are auxiliary and ranked by the same score. Genes without a
    score come last, ties are broken by name. With `genes_from = "training"` nothing but training spots is looked at.

    Args:
        table: all spots.
        training_rows: rows of the training spots.
        protocol: gene filter, number of primary genes and the spots that decide.

    Returns:
        The split, and the columns of the table that it covers, (genes,).

    Raises:
        BadSpec: if there are more primary genes than genes.
    """
    rows = training_rows if protocol.genes_from == "training" else np.arange(len(table))
    seen = table.rows(rows)
    detected = np.asarray((seen > 0).sum(0)).ravel()
    columns = np.flatnonzero(detected >= protocol.min_spots_per_gene)
    eligible = detected[columns] >= protocol.primary_detection * len(rows)
    if eligible.sum() < protocol.primary_genes:
        raise BadSpec(
            f"protocol.primary_genes = {protocol.primary_genes} is more than the {eligible.sum()} genes that are "
            f"detected in at least {protocol.primary_detection:.0%} of {len(rows)} spots; choose fewer primary genes "
            "or a smaller protocol.primary_detection"
        )
    names = np.asarray(table.genes)[columns]
    score = variability(seen[:, columns])
    order = np.lexsort((names, -np.nan_to_num(score, nan=-np.inf)))  # best first; NaN last; ties by name
    primary = np.zeros(len(columns), dtype=bool)
    primary[order[eligible[order]][: protocol.primary_genes]] = True
    rank = np.full(len(columns), -1, dtype=np.int64)
    auxiliary = order[~primary[order]]
    rank[auxiliary] = np.arange(len(auxiliary))
    return (
        GeneSplit(
            names=tuple(names.tolist()),
            primary=torch.from_numpy(primary),
            rank=torch.from_numpy(rank),
            score=torch.from_numpy(score),
            unscored=int(np.isnan(score[~primary]).sum()),
        ),
        columns,
    )


def variability(expression: sparse.csr_matrix) -> np.ndarray:
    """Normalised dispersion of each gene, scanpy's flavour "seurat" with 20 bins (Shiku et al. 2026, Eq. 2-3).

    Args:
        expression: (spots, genes) ln(1 + …).

    Returns:
        (genes,) float64; NaN where the dispersion is not defined.
    """
    # Late: `agl-bench list` and `--help` must not wait for scanpy.
    import anndata
    import scanpy

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bins with one gene; handled by scanpy as the method describes
            table = scanpy.pp.highly_variable_genes(
                anndata.AnnData(expression), flavor="seurat", n_bins=20, inplace=False
            )
    finally:
        torch.set_num_threads(threads)  # scanpy's numba kernels reset OpenMP's number of threads for the whole process
    return np.asarray(table["dispersions_norm"], dtype=np.float64)
