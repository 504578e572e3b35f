"""Weights by uncertainty: a gene that is predicted badly counts less.

Source: Kendall, Gal and Cipolla, CVPR 2018:

    J = Σ l_j e^(−s_j) / 2 + s_j / 2,   s_j = log σ_j², learnt together with the model

over all genes, primary ones too: their slopes e^(−s_j) / 2 are positive whatever s is. For given losses J is least at
s_j = ln l_j, where every gene's weight is 1 / l_j. Validation has no part in it.

How it differs from the source: a mean over genes instead of a sum, a factor that Adam takes out. There l is a squared
error and σ² its variance; here it is the protocol's loss, by default 1 − correlation, and σ² a name. No weight exceeds
e⁷, about 1,100: the squared error of a silent gene goes to zero, and its s would fall without end.

How it differs from the AGL authors' code (Shiku et al., AAAI 2026): theirs, mean(e^(−s_j) l_j + s_j), is twice this
one, so the same. There s shares the model's learning rate of 3e-5, which moves it by 6e-4 in an epoch of 20 steps and
leaves every weight near 1: most runs are `agl`. Here it has a rate of its own. The presets `paper…` restore theirs.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from agl_bench import LogRange, Range, Selector, Step, TrainingView

LOWEST = -7.0  # of s


class Uncertainty(Selector):
    """Every gene, weighted by one over its learnt variance."""

    reference = "Kendall et al., CVPR 2018"
    learns_from = "training"

    def __init__(
        self,
        view: TrainingView,
        *,
        start: Annotated[float, Range(-5, 5)] = 0.0,
        learning_rate: Annotated[float, LogRange(1e-6, 1.0)] = 3e-3,
    ) -> None:
        super().__init__(view)
        self.learning_rate = learning_rate
        self.log_variance = nn.Parameter(torch.full((len(view.genes.names),), start, dtype=view.dtype))

    @torch.no_grad()
    def observe(self, losses: Tensor, step: Step) -> None:
        """Keep s from falling without end."""
        self.log_variance.clamp_(min=LOWEST)

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean of the weighted losses, and what keeps the weights from going to zero."""
        return (losses * torch.exp(-self.log_variance) + self.log_variance).mean() / 2
