"""A soft choice of exactly k auxiliary genes: the SOFT top-k operator.

Source: Xie, Dai, Chen, Dai, Zhao, Zha, Wei and Pfister, NeurIPS 2020. Scores s_j are carried to the anchors 0 and 1 by
entropic optimal transport at cost (s_j − anchor)², of which k genes must arrive at 1. With two anchors the plan is

    w_j = σ((2 s_j − 1) / ε + c),   c such that Σ w_j = k over auxiliary genes;  w_j = 1 for primary genes

What is learnt (`learns`), on held-out spots after one SGD step:

    scores   one score for each gene, from 1 − ρ_j, the variability ranking of `dkgsb`; k = share · auxiliary genes
    k        the share of genes that are taken; the scores stay. This is `dkgsb` with τ = ε / 2, and k in place of t

How it differs from the source: c is found by halving an interval, to rounding, instead of by 200 rounds of Sinkhorn;
its derivative is that of the implicit function, exact as theirs. The cost is not divided by its largest entry. There a
network makes the scores, and is learnt.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from agl_bench import LogRange, OneStep, Range, Selector, Step, TrainingView

HALVINGS = 50  # of an interval of width 2 / ε ≤ 2000: to 2e-12
EDGE = 1e-9  # c is infinite where no gene is taken, or all


class SoftTopk(Selector):
    """k genes, softly: by learnt scores, or the first k of the ranking with k learnt."""

    reference = "Xie et al., NeurIPS 2020"
    scores: Tensor
    share: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        learns: Literal["scores", "k"] = "scores",
        share: Annotated[float, Range(0, 1)] = 0.5,
        epsilon: Annotated[float, LogRange(1e-3, 1.0)] = 0.1,
        learning_rate: Annotated[float, LogRange(1e-4, 1.0)] = 1e-2,
        inner_rate: Annotated[float, LogRange(1e-4, 10)] = 0.5,
        reach: Literal["late", "all"] = "late",
    ) -> None:
        super().__init__(view)
        self.learns, self.epsilon, self.learning_rate = learns, epsilon, learning_rate
        self.hypergradient = OneStep(inner_rate, reach)
        scores = 1 - view.genes.relative_rank(view.dtype)
        begin = torch.tensor(share, dtype=view.dtype)
        if learns == "scores":
            self.scores = nn.Parameter(scores)
            self.register_buffer("share", begin, persistent=False)
        else:
            self.register_buffer("scores", scores, persistent=False)
            self.cutoff = nn.Parameter(0.5 + torch.logit(begin.clamp(0.01, 0.99)) / 4)  # as of `dkgsb`

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean with the mask of the operator."""
        share = self.share if self.learns == "scores" else torch.sigmoid(4 * (self.cutoff - 0.5))
        mask = soft_top_k(self.scores, ~self.is_primary, share, self.epsilon)
        return self.weighted_mean(losses, mask.to(losses.dtype))


def soft_top_k(scores: Tensor, takes_part: Tensor, share: Tensor, epsilon: float) -> Tensor:
    """Weights in (0, 1) that sum to share · number of those that take part; float64.

    Once differentiable in scores and share.

    Args:
        scores: (genes,).
        takes_part: (genes,) bool; what the weights of the others are means nothing.
        share: () in [0, 1].
        epsilon: of the entropy; small = hard.
    """
    height, count = (2 * scores.double() - 1) / epsilon, takes_part.sum()
    share = share.double().clamp(EDGE, 1 - EDGE)
    with torch.no_grad():
        level = torch.logit(share)
        low, high = level - height.max(), level - height.min()
        for _ in range(HALVINGS):
            shift = (low + high) / 2
            is_low = (torch.sigmoid(height + shift) * takes_part).sum() < share * count
            low, high = torch.where(is_low, shift, low), torch.where(is_low, high, shift)
        shift = (low + high) / 2
        soft = torch.sigmoid(height + shift)
        slope = soft * (1 - soft) * takes_part
    # dc = (dk − Σ w'_j dz_j) / Σ w'_j, with nothing added to c itself.
    surplus = (slope * (height - height.detach())).sum() - count * (share - share.detach())
    return torch.sigmoid(height + shift - surplus / slope.sum().clamp(min=1e-30))
