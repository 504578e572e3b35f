"""Rankings of the auxiliary genes from training spots, for the selectors that take genes by rank. No selector itself.

Sources: variability as in scanpy's three flavours (Satija et al. 2015; Zheng et al. 2017; Stuart et al. 2019), spatial
autocorrelation (Moran 1950), mean and detection are the named scores of the protocol; co-expression with the primary
genes is the field's oldest idea of what an auxiliary gene is, see `coexpression`; random is the control.

How they differ from `protocol.ranking`: that is one ranking for every selector of a table, and looks at the spots that
`protocol.genes_from` names; a prior belongs to one selector, can be tuned, and sees training spots alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from agl_bench import BadSpec, TrainingView, read_gene_scores

Prior = Literal[
    "protocol", "seurat", "cell_ranger", "seurat_v3", "moran", "mean", "detection", "coexpression", "random"
]
VALUES = 2**22  # that are looked at at once
DIGITS = 9  # of a correlation: of two equally correlated genes names decide, and not errors of rounding


def ranked(view: TrainingView, prior: Prior, file: str = "") -> Tensor:
    """Rank of the auxiliary genes, (genes,) int64: 0 = first, −1 = primary gene; NaN last, ties by name.

    Args:
        view: training spots.
        prior: "protocol" is `view.genes.rank` as it is.
        file: lines "gene,score", or names in order; overrides the prior, genes that it does not list come last.

    Raises:
        BadSpec: if the file is malformed or lists no auxiliary gene.
    """
    genes = view.genes
    if file:
        score = torch.from_numpy(read_gene_scores(Path(file), genes.names, setting="prior_file"))
        if bool(score[~genes.primary].isnan().all()):
            raise BadSpec(f"prior_file = '{file}' lists primary genes alone; list auxiliary ones, which are ranked")
    elif prior == "protocol":
        return genes.rank
    elif prior == "random":
        by_name = sorted(range(len(genes.names)), key=genes.names.__getitem__)  # the same draw in any order of columns
        score = torch.empty(len(by_name), dtype=torch.float64)
        score[by_name] = torch.randperm(len(by_name), generator=view.generator).double()
    elif prior == "coexpression":
        strength = correlation(view).abs().nan_to_num(nan=-1).amax(0).round(decimals=DIGITS)
        score = strength.where(strength >= 0, math.nan)
    else:
        score = view.score_genes(prior)
    return genes.ranked(score)


def correlation(view: TrainingView) -> Tensor:
    """Correlation of each primary gene with each gene within sections, (primary genes, genes) float64.

    Deviations are from the mean of the section: a difference between sections, e.g. of staining or depth, is no
    co-expression, and no batch of spots mixes them. NaN for a gene that varies in no section.
    """
    expression, primary = view.expression, view.genes.primary.to(view.expression.device)
    rows_at_once = max(1, VALUES // len(primary))
    cross = torch.zeros(int(primary.sum()), len(primary), dtype=torch.float64, device=expression.device)
    squares = torch.zeros_like(cross[0])
    for index in view.section.unique():
        spots = (view.section == index).nonzero().squeeze(1)
        origin = expression[spots[0]].double()  # of the sums; a gene that does not vary gets exactly 0
        total, own, products = torch.zeros_like(squares), torch.zeros_like(squares), torch.zeros_like(cross)
        for rows in spots.split(rows_at_once):
            value = expression[rows].double() - origin
            total += value.sum(0)
            own += value.square().sum(0)
            products += value[:, primary].T @ value
        squares += own - total.square() / len(spots)
        cross += products - torch.outer(total[primary], total) / len(spots)
    spread = squares.sqrt()
    return (cross / torch.outer(spread[primary], spread)).cpu()
