"""One loss per gene: (spots, genes)² -> (genes,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

EPSILON = 1e-8  # Shiku et al. 2026, Eq. 5 as coded: added to the product of the two norms


def pearson_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 − Pearson correlation over the batch, per gene (Shiku et al. 2026, Eq. 5).

    A gene whose target or prediction does not vary in the batch has loss 1 and gradient 0: it carries no signal, and
    the square root in the norm would otherwise give it a non-finite first or second derivative.

    Args:
        prediction: (spots, genes), any scale and offset.
        target: (spots, genes), any scale and offset.

    Returns:
        (genes,) in [0, 2].
    """
    p = prediction - prediction.mean(0)
    y = target - target.mean(0)
    pp = (p * p).sum(0)  # (genes,)
    yy = (y * y).sum(0)
    py = (p * y).sum(0)
    # Rounding leaves a constant column with a centred norm of about eps·|mean|·√spots, not with exactly zero.
    rounding = (4 * torch.finfo(p.dtype).eps) ** 2 * p.shape[0]
    still = (pp <= rounding * prediction.detach().square().mean(0)) | (yy <= rounding * target.square().mean(0))
    varies = ~still  # so that NaN stays NaN: a model that has diverged must not look like a constant one
    one = torch.ones((), dtype=p.dtype, device=p.device)
    norms = torch.where(varies, pp, one).sqrt() * torch.where(varies, yy, one).sqrt()
    return 1 - torch.where(varies, py, torch.zeros_like(one)) / (norms + EPSILON)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the batch, per gene.

    Args:
        prediction: (spots, genes).
        target: (spots, genes).

    Returns:
        (genes,), in squared units of the target.
    """
    return (prediction - target).square().mean(0)


LOSSES: dict[str, Loss] = {"pearson": pearson_loss, "squared_error": squared_error}
