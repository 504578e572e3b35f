"""Differentiable top-k gene selection by bi-level optimisation.

Source: Shiku et al., AAAI 2026, Eq. 6 and Algorithm 1. Auxiliary genes are ranked by variability; one learnable
cut-off t decides how long a prefix of the ranking takes part:

    w_j = σ((t − ρ_j) / τ),   ρ_j = rank_j / (auxiliary − 1),   w_j = 1 for primary genes

t follows the gradient of the primary loss on held-out spots after a look-ahead of `steps` inner steps.

Differences from the paper and its released code:
- t = σ(4 (u − ½)) with u learnt. The slope is 1 at the start t = ½ and t cannot leave (0, 1), where the authors' free t
  gets no gradient any more. `bounded = false` restores the free t.
- Inner steps are plain SGD by default, whose hypergradient is steadier at small scale; `inner = adam` takes fresh Adam
  steps at the model's learning rate, as the authors do.
- Σw is differentiated unless the protocol detaches it, and there is no division by a left-over 64.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from agl_bench import SGD, Adam, LogRange, Range, Selector, Step, TrainingView, Unrolled


class Dkgsb(Selector):
    """A prefix of the variability ranking whose length is learnt on held-out spots."""

    reference = "Shiku et al., AAAI 2026 (DkGSB)"
    rho: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        temperature: Annotated[float, LogRange(1e-3, 1e-1)] = 0.01,
        start: Annotated[float, Range(0.01, 0.99)] = 0.5,
        bounded: bool = True,
        learning_rate: Annotated[float, LogRange(1e-4, 1e-1)] = 3e-3,
        steps: Annotated[int, Range(1, 12)] = 3,
        inner: Literal["sgd", "adam"] = "sgd",
        inner_rate: Annotated[float, LogRange(1e-4, 10)] = 0.5,
    ) -> None:
        super().__init__(view)
        self.temperature, self.bounded, self.learning_rate = temperature, bounded, learning_rate
        self.hypergradient = Unrolled(steps, SGD(inner_rate) if inner == "sgd" else Adam())
        dtype = view.expression.dtype
        self.register_buffer("rho", view.genes.relative_rank(dtype), persistent=False)
        begin = torch.tensor(start, dtype=dtype)
        self.cutoff = nn.Parameter(0.5 + torch.logit(begin) / 4 if bounded else begin)

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean with a soft step at the cut-off."""
        t = torch.sigmoid(4 * (self.cutoff - 0.5)) if self.bounded else self.cutoff
        return self.weighted_mean(losses, torch.sigmoid((t - self.rho) / self.temperature))
