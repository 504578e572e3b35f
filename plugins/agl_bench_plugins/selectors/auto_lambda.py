"""Auto-Lambda: one unbounded weight for each auxiliary gene, learnt through one virtual step.

Source: Liu, James, Davison and Johns, TMLR 2022:

    J = Σ_primary l_j + Σ_auxiliary λ_j l_j,   λ_j learnt from 0.1 by Adam

λ follows the gradient of the primary loss after one SGD step of the model. Nothing bounds λ: a gene may be trained
against.

How it differs from the source:
- The derivative −rate · ⟨∇l_j(θ), ∇E(θ')⟩ is exact. Theirs is its finite difference along ∇E, by two more forward
  passes; as the step goes to zero it becomes this.
- The outer loss is that of held-out spots; their "validation" is a second shuffle of the training set.
- J is divided by the number of genes. Σ λ goes through zero, so that the weighted mean of the other selectors is not to
  be had; a constant leaves all directions as they are.
- Primary genes have the weight 1 for ever. There they have a λ too, which begins at 0.1 like all: `start = 1` is their
  proportion.
- A virtual step without momentum and weight decay at a rate of its own (`model`: the model's, as there), of the last
  stage and the head alone (`reach`).
- A gene that is trained against has a correlation for its loss, which is bounded; with a squared error J is not.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from agl_bench import LogRange, OneStep, Range, Selector, Step, TrainingView


class AutoLambda(Selector):
    """One learnt weight of any sign for each auxiliary gene (those of primary genes exist and are not used)."""

    reference = "Liu et al., TMLR 2022"

    def __init__(
        self,
        view: TrainingView,
        *,
        start: Annotated[float, Range(-1, 2)] = 0.1,
        learning_rate: Annotated[float, LogRange(1e-5, 1.0)] = 3e-3,
        inner_rate: Annotated[float | Literal["model"], LogRange(1e-6, 10)] = 0.5,
        reach: Literal["late", "all"] = "late",
    ) -> None:
        super().__init__(view)
        self.learning_rate = learning_rate
        self.hypergradient = OneStep(None if inner_rate == "model" else inner_rate, reach)
        self.weights = nn.Parameter(torch.full((len(view.genes.names),), start, dtype=view.dtype))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted sum over the number of genes."""
        return torch.where(self.is_primary, losses, self.weights * losses).mean()
