"""Weights proportional to what a step on each gene gains on held-out spots.

Source: Grégoire, Chaudhary, Verboven, Applied Intelligence 2024, arXiv:2306.04519 (SLGrad): after a look-ahead θ₁, one
SGD step on the weighted loss of a training batch,

    w_j = max(0, a_j) / Σ_i max(0, a_i),   a_j = ⟨∇L_j, ∇E(θ₁)⟩,   E = mean primary loss of held-out spots

How it differs from the source:
- One weight for each gene, not for each spot and task: a correlation over a batch has no loss for a single spot.
- ∇L_j is that at θ, where the look-ahead begins: it is one `OneStep` gradient for all genes. The source takes both
  gradients at θ₁; the two agree as the rate of the look-ahead goes to zero.
- The gain of a primary gene counts its own row of the head, which no step on an auxiliary gene moves; the source looks
  at shared parameters alone. So the unit below is larger than there, by about half with 64 features.
- The source weighs the main task alike and may drop it. Here every primary gene has the weight 1, and that is the unit:
  the mean of max(0, a) over primary genes, or over all genes, if that is more.
- The weights are found in the outer steps that the protocol schedules and stay until the next one, not anew for each
  batch; so that an epoch does not hang on the last pair of batches, they are a running mean over outer steps
  (`fading = 0`: of the last one alone).
- If nothing agrees, there is no auxiliary gene; the source keeps all weights at zero and does not move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from agl_bench import LogRange, OneStep, Range, Selector, Step, TrainingView


class SlGrad(Selector):
    """Each auxiliary gene by the gain on held-out spots that a step on it promises."""

    reference = "Grégoire et al., Applied Intelligence 2024 (SLGrad), one weight for each gene"
    broken: ClassVar = {
        "test_hypergradient_is_exact": "Σw is detached, so that the gradient for w_j is the alignment of gene j alone"
    }

    def __init__(
        self,
        view: TrainingView,
        *,
        inner_rate: Annotated[float, LogRange(1e-4, 10)] = 0.5,
        reach: Literal["late", "all"] = "late",
        fading: Annotated[float, Range(0, 0.99)] = 0.9,
    ) -> None:
        super().__init__(view)
        self.fading = fading
        self.hypergradient = OneStep(inner_rate, reach)
        self.weights = nn.Parameter(torch.ones(len(view.genes.names), dtype=view.dtype))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean. Σw is a constant whatever the protocol says: then a slope along w_j is of L_j alone."""
        return (self.weights * losses).sum() / self.weights.detach().sum()

    def learn(self, gradients: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Set the weights by the source's formula; the optimiser is not asked."""
        gain = -gradients["weights"].clamp(max=0)  # max(0, a) but for a factor
        unit = torch.maximum(torch.where(self.is_primary, gain, 0).sum() / self.genes.primary_count, gain.mean())
        found = torch.where(self.is_primary, 1, torch.where(unit > 0, gain / unit, 0))
        self.weights.lerp_(found, 1 - self.fading)
