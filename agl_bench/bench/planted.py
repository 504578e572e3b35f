"""How a selection compares with the truth of planted data. Read after training; no method ever sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agl_bench.interfaces.genes import GeneSplit
from agl_bench.training.trainer import HALF


def utilities(truth: Mapping[str, float], genes: GeneSplit) -> Tensor:
    """What each gene of a fold is worth as an auxiliary one: (genes,) float64, 0 for primary and unknown genes."""
    worth = torch.tensor([truth.get(name, 0.0) for name in genes.names], dtype=torch.float64)
    return worth * ~genes.primary


def best_cutoff(genes: GeneSplit, utility: Tensor) -> int:
    """k*: the shortest prefix of the auxiliary ranking with the highest total utility, in auxiliary genes."""
    ranked = torch.zeros(genes.auxiliary_count, dtype=torch.float64)
    auxiliary = ~genes.primary
    ranked[genes.rank[auxiliary]] = utility[auxiliary]
    # In whole 1024ths of a gene: sums of decimal fractions must not decide between equal prefixes.
    gained = torch.cat([torch.zeros(1, dtype=torch.int64), (1024 * ranked).round().long().cumsum(0)])
    return int(gained.argmax())


def selection_scores(genes: GeneSplit, utility: Tensor, weights: Tensor) -> dict[str, float]:
    """Scores of a selection: auxiliary genes with more than half the weight of a primary one count as selected.

    A score that is not defined is left out: precision where nothing is selected, recall where nothing helps.

    Args:
        genes: gene axis of the fold.
        utility: from `utilities`.
        weights: (genes,) effective weights, a primary gene 1.

    Returns:
        selection_precision: share of the selected genes that help.
        selection_recall: share of the helpful genes that are selected.
        selection_k_minus_planted: number of selected genes minus k*.
    """
    selected = (weights > HALF) & ~genes.primary
    helps = utility > 0
    both = int((selected & helps).sum())
    scores = {"selection_k_minus_planted": float(int(selected.sum()) - best_cutoff(genes, utility))}
    if selected.any():
        scores["selection_precision"] = both / int(selected.sum())
    if helps.any():
        scores["selection_recall"] = both / int(helps.sum())
    return scores
