"""Auxiliary genes whose gradient points the way of the primary one.

Source: Du, Czarnecki, Jayakumar, Farajtabar, Pascanu, Lakshminarayanan, arXiv:1812.02224 (2018). In every training step

    weighted:    w_j = max(0, cos(∇L_j, ∇L_primary))
    unweighted:  w_j = 1 if cos(∇L_j, ∇L_primary) > 0 else 0

L_primary is the mean primary loss of the same batch; w_j = 1 for primary genes.

How it differs from the source:
- Gradients are those with respect to the features, not to the shared parameters: for 15,000 genes they cost as much as
  for one there. How loosely they stand for each other, benchmarks/agreement.md says. Of the parameters the sign alone
  is to be had, by one double backward pass, within the late part of the backbone (`weight = sign_late`) or all of it
  (`sign_all`); the norm of each gene's gradient is not.
- The loss is Σ w·l / Σ w, not the sum.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from agl_bench import Selector, Step, TrainingView
from agl_bench_plugins.selectors.agreement import cosines, dots

WITHIN = {"sign": "features", "sign_late": "late", "sign_all": "all"}


class GradientCosine(Selector):
    """Each auxiliary gene as far as its gradient agrees with that of the primary genes, anew in each step."""

    reference = "Du et al., arXiv:1812.02224 (2018)"

    def __init__(
        self, view: TrainingView, *, weight: Literal["cosine", "sign", "sign_late", "sign_all"] = "cosine"
    ) -> None:
        super().__init__(view)
        self.weight = weight
        self.needs_second_order = weight in ("sign_late", "sign_all")

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean with the positive cosines, or with 1 where the gradients agree."""
        if self.weight == "cosine":
            weights = cosines(self, losses, step).clamp(min=0)
        else:
            weights = (dots(self, losses, step, WITHIN[self.weight]) > 0).to(losses.dtype)
        return self.weighted_mean(losses, weights)
