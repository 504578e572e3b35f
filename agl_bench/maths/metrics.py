"""Scores of a prediction, per gene. A gene that does not vary has no correlation: NaN, counted by whoever averages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**19  # values gathered from neighbours at once, 4 MiB of float64: they stay in the processor's cache


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


def moran(values: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """Moran's I, the correlation of a map with itself at neighbouring spots, per gene; NaN where it does not vary.

    I = (n / Σ w_ij) · Σ_ij w_ij z_i z_j / Σ_i z_i²,   z = value − mean (Moran 1950).

    Args:
        values: (spots, genes) of one section.
        neighbours: (spots, most) int64, the spots around each; where there are fewer, any spot with weight 0.
        weights: (spots, most), 1 for a neighbour. A spot is no neighbour of itself.

    Returns:
        (genes,) float64; NaN also where no spot has a neighbour.
    """
    z = values.double()
    constant = (z == z[:1]).all(0)
    z = z - z.mean(0)
    weights = weights.double()
    products = torch.zeros(z.shape[1], dtype=z.dtype, device=z.device)
    for start, rows in _blocks(neighbours, z.shape[1]):
        around = torch.einsum("sk,skg->sg", weights[start : start + len(rows)], z[rows])
        products += (z[start : start + len(rows)] * around).sum(0)
    return torch.where(constant, torch.nan, len(z) / weights.sum() * products / z.square().sum(0))


def structural_similarity(prediction: Tensor, target: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """Mean structural similarity (SSIM) of two maps on irregular spots, per gene; NaN where the target is constant.

    With local means μ, variances σ² and covariance σ_py under the weights around each spot (Wang et al. 2004, Eq. 13):

        SSIM = (2 μ_p μ_y + C₁)(2 σ_py + C₂) / ((μ_p² + μ_y² + C₁)(σ_p² + σ_y² + C₂)),   mean over spots,

    C₁ = (0.01 L)², C₂ = (0.03 L)², L the range of the target over the spots. The weights take the place of the
    Gaussian window of an image; they are scaled to a sum of 1 around each spot, at the border too.

    Args:
        prediction: (spots, genes) of one section, in the units of the target.
        target: (spots, genes).
        neighbours: (spots, most) int64, the spots around each, itself included; padded with any spot at weight 0.
        weights: (spots, most) ≥ 0, some > 0 at each spot.

    Returns:
        (genes,) float64.
    """
    p, y = prediction.double(), target.double()
    size = y.amax(0) - y.amin(0)
    c1, c2 = (0.01 * size).square(), (0.03 * size).square()
    weights = weights.double() / weights.double().sum(1, keepdim=True)
    total = torch.zeros(y.shape[1], dtype=y.dtype, device=y.device)
    for start, rows in _blocks(neighbours, y.shape[1]):
        w = weights[start : start + len(rows), None]  # (spots, 1, most)
        here_p, here_y = p[rows], y[rows]  # (spots, most, genes)
        mean_p, mean_y = w @ here_p, w @ here_y
        here_p.sub_(mean_p), here_y.sub_(mean_y)
        covariance = w @ (here_p * here_y)
        variances = w @ here_p.square_().add_(here_y.square_())
        luminance = (2 * mean_p * mean_y + c1) / (mean_p.square() + mean_y.square() + c1)
        total += (luminance * (2 * covariance + c2) / (variances + c2)).sum((0, 1))
    return torch.where(size == 0, torch.nan, total / len(y))


def _blocks(neighbours: Tensor, genes: int) -> Iterator[tuple[int, Tensor]]:
    """Some rows of `neighbours` at a time, with the first one's index, so that a gathered block stays small."""
    size = max(1, BLOCK // max(1, neighbours.shape[1] * genes))
    for start in range(0, len(neighbours), size):
        yield start, neighbours[start : start + size]


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
