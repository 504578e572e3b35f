"""Weights that follow how well each auxiliary gene has agreed with the primary genes of late.

Source: Lin, Baweja, Kantor, Held, NeurIPS 2019 (OL-AUX), one auxiliary task for each gene. Every n training steps

    w_j ← w_j + β Σ_{last n steps} a_j,   a_j = ⟨∇L_j, ∇L_primary⟩ or their cosine,   w_j = 1 at first

L_primary is the mean primary loss of the same batch; w_j = 1 for primary genes throughout.

How it differs from the source:
- a_j is the cosine of the gradients with respect to the features, as ForkMerge's code has it (there of the shared
  parameters), so that β does not depend on the scale of the losses; n = 5 is that code's, too. `measure = dot` is the
  inner product of the paper, `dot_late` and `dot_all` that of the parameters of the late part and of all of the model,
  which features stand in for but loosely (benchmarks/agreement.md).
- β is 0.1 instead of 10⁻⁴ there, since trainings here have hundreds of steps rather than tens of thousands, and cosines
  of single genes are small: at 10⁻² nearly every weight ends within .15 of 1, and the selector is `agl`.
- Neither the paper nor the code bounds w; a gene of negative weight is then trained to be wrong. Here the sum runs
  free as there, but below zero the gene only rests: its weight is max(0, w_j). `negative = kept` trains on negative
  weights, too, with Σ w·l / Σ |w| for the loss; a squared error, which has no upper bound, may then grow without end.
- The loss is Σ w·l / Σ w, not the sum.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from agl_bench import LogRange, Selector, Step, TrainingView
from agl_bench_plugins.selectors.agreement import cosines, dots

WITHIN = {"dot": "features", "dot_late": "late", "dot_all": "all"}


class OlAux(Selector):
    """One running weight for each auxiliary gene (those of primary genes exist and are not used)."""

    reference = "Lin et al., NeurIPS 2019 (OL-AUX), one task for each gene"
    weights: Tensor
    agreed: Tensor
    seen: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        horizon: Annotated[int, LogRange(1, 1000)] = 5,
        beta: Annotated[float, LogRange(1e-6, 1e4)] = 0.1,
        measure: Literal["cosine", "dot", "dot_late", "dot_all"] = "cosine",
        negative: Literal["rest", "kept"] = "rest",
    ) -> None:
        super().__init__(view)
        self.horizon, self.beta, self.measure, self.negative = horizon, beta, measure, negative
        self.needs_second_order = measure in ("dot_late", "dot_all")
        genes = len(view.genes.names)
        self.register_buffer("weights", torch.ones(genes, dtype=view.dtype))
        self.register_buffer("agreed", torch.zeros(genes, dtype=view.dtype))  # since the weights last moved
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # training steps

    def observe(self, losses: Tensor, step: Step) -> None:
        """Add up the agreement; every `horizon` steps move the weights by it and begin anew."""
        measure = self.measure
        found = cosines(self, losses, step) if measure == "cosine" else dots(self, losses, step, WITHIN[measure])
        self.agreed += found
        self.seen += 1
        is_due = self.seen % self.horizon == 0  # stays on the device
        self.weights += torch.where(is_due, self.beta * self.agreed, 0)
        self.agreed.copy_(torch.where(is_due, 0, self.agreed))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean with the running weights."""
        if self.negative == "rest":
            return self.weighted_mean(losses, self.weights.clamp(min=0))
        weights = torch.where(self.is_primary, 1, self.weights)
        return (weights * losses).sum() / weights.abs().sum()
