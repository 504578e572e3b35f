"""One rectified weight for each auxiliary gene, learnt through one virtual step: MAXL-style per-gene weights.

Source: the module "MAXL" in the code of Shiku et al., AAAI 2026, which their paper does not report:

    w_j = ReLU(l_j) for auxiliary genes, l_j learnt from 1;  w_j = 1 for primary genes

l follows the gradient of the primary loss on held-out spots after one SGD step of the model. It is named after Liu,
Davison and Johns, NeurIPS 2019, and shares with it that virtual step. What they learn is another thing: a network that
makes up labels for an auxiliary classification.

How it differs from the authors' code:
- A ReLU has no slope below 0, so that a gene once at 0 never comes back. Here weights are moved, then clipped at 0, and
  the slope there is that of the identity. `revive = false` restores the ReLU.
- The virtual step goes at a rate of its own. `inner_rate = model` is theirs, 3e-5: it scales every gradient down to
  where only the ε of the outer Adam is left. It moves the last stage and the head alone (`reach`).
- The rate of Adam is 3e-2, so that a weight can cross its range within some thirty outer steps. At theirs, 3e-3, none
  is farther from 1 than .08 after a run on planted tissue, and the selector is `agl`.
- The loss is Σ w·l / Σ w instead of Σ w·l over the number of genes.
- Outer steps as the protocol schedules them. There: 50 passes every five epochs, each on the mean of 512 random subsets
  of a batch, and the first weights of a batch carry over as a constant into the outer loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agl_bench import LogRange, OneStep, Selector, Step, TrainingView


class MaxlWeights(Selector):
    """One learnt weight ≥ 0 for each auxiliary gene (weights of primary genes exist and are not used)."""

    reference = "Liu et al., NeurIPS 2019, per gene as in the code of Shiku et al., AAAI 2026"

    def __init__(
        self,
        view: TrainingView,
        *,
        revive: bool = True,
        learning_rate: Annotated[float, LogRange(1e-4, 1.0)] = 3e-2,
        inner_rate: Annotated[float | Literal["model"], LogRange(1e-6, 10)] = 0.5,
        reach: Literal["late", "all"] = "late",
    ) -> None:
        super().__init__(view)
        self.revive, self.learning_rate = revive, learning_rate
        self.hypergradient = OneStep(None if inner_rate == "model" else inner_rate, reach)
        self.weights = nn.Parameter(torch.ones(len(view.genes.names), dtype=view.dtype))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean."""
        # Those that may revive are ≥ 0 as they are: a ReLU has the slope 0 at 0.
        return self.weighted_mean(losses, self.weights if self.revive else torch.relu(self.weights))

    def learn(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """A step of Adam; weights that end below 0 stand at 0."""
        super().learn(gradients, optimizer)
        if self.revive:
            self.weights.clamp_(min=0)
