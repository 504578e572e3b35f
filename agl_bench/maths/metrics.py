"""Scores of a prediction, per gene. A gene that does not vary has no correlation: NaN, counted by whoever averages."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(prediction: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation over spots, per gene (PCC); NaN where either side is constant.

    Args:
        prediction: (spots, genes).
        target: (spots, genes).

    Returns:
        (genes,) float64 in [−1, 1] or NaN.
    """
    p, y = prediction.double(), target.double()
    constant = (p == p[:1]).all(0) | (y == y[:1]).all(0)
    p, y = p - p.mean(0), y - y.mean(0)
    r = (p * y).sum(0) / (p.square().sum(0).sqrt() * y.square().sum(0).sqrt())
    return torch.where(constant, torch.nan, r.clamp(-1, 1))


def spearman(prediction: Tensor, target: Tensor) -> Tensor:
    """Spearman correlation over spots, per gene: Pearson of average ranks; NaN where either side is constant."""
    rho = pearson(_average_ranks(prediction), _average_ranks(target))
    unordered = prediction.isnan().any(0) | target.isnan().any(0)  # sorting would give NaN a rank
    return torch.where(unordered, torch.nan, rho)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over spots, per gene, in squared units of the target.

    Args:
        prediction: (spots, genes).
        target: (spots, genes).

    Returns:
        (genes,) float64.
    """
    return (prediction.double() - target.double()).square().mean(0)


def affine_fit(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares slope and offset per gene that map `prediction` to `target`.

    The correlation loss leaves scale and offset free, so that a squared error means nothing before this fit. A
    prediction that does not vary gets slope 0 and the mean of the target.

    Args:
        prediction: (spots, genes).
        target: (spots, genes).

    Returns:
        slope (genes,), offset (genes,), float64.
    """
    p, y = prediction.double(), target.double()
    pc = p - p.mean(0)
    varies = ~(p == p[:1]).all(0)  # the mean of equal numbers is not always that number
    slope = torch.where(varies, (pc * (y - y.mean(0))).sum(0) / torch.where(varies, pc.square().sum(0), 1), 0)
    return slope, y.mean(0) - slope * p.mean(0)


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks along spots, ties at their mean rank: (spots, genes) -> (spots, genes) float64."""
    ordered, order = values.sort(dim=0)
    position = torch.arange(len(values), dtype=torch.float64, device=values.device)[:, None].expand(values.shape)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = starts.cumsum(0) - 1  # (spots, genes) index of the tie group
    total = torch.zeros(values.shape, dtype=torch.float64, device=values.device).scatter_add_(0, group, position)
    count = torch.zeros_like(total).scatter_add_(0, group, torch.ones_like(total))
    return torch.empty_like(total).scatter_(0, order, (total / count.clamp(min=1)).gather(0, group))
