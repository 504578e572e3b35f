"""Adaptive mixing of auxiliary losses, one weight for each auxiliary gene.

Source: Sivasubramanian et al., AAAI 2023 (AMAL), in the form that Shiku et al., AAAI 2026 compare with:

    w_j = σ(l_j / τ) for auxiliary genes, l_j learnt;  w_j = 1 for primary genes

l follows the gradient of the primary loss on held-out spots after one SGD step of the last stage of the model and its
head (`reach = all`: of the whole model).

How it differs from the AMAL paper: that learns a weight for each *training sample* and loss, updates it every ten
epochs with five repeats through the last layer alone and clips it to [0, 2]. A correlation over a batch has no loss for
a single sample, so that weights are per gene here.

How it differs from the AGL authors' code: here the weights are carried over, used from the start, and learnt in every
outer step that the protocol schedules; and the loss is Σ w·l / Σ w. There it is Σ w·l over the number of genes
(`divisor = genes`), and every 20 epochs the weights are re-created and learnt to convergence, on a mean over 64 random
subsets of a batch. That is

    --preset paper_v1 --set protocol.warm_start=none --set protocol.schedule=alternating
        --set protocol.outer_start=0 --set protocol.outer_every=20

Not reproduced: there the weights are used from epoch 100 on only and before it every gene counts alike, while training
stops after 20 epochs without gain, so that most runs are `agl`. The nearest to it is `protocol.warm_start = learners`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from agl_bench import LogRange, OneStep, Selector, Step, TrainingView


class Amal(Selector):
    """One learnt weight for each auxiliary gene (logits of primary genes exist and are not used)."""

    reference = "Sivasubramanian et al., AAAI 2023, per gene as in Shiku et al., AAAI 2026"

    def __init__(
        self,
        view: TrainingView,
        *,
        temperature: Annotated[float, LogRange(1e-3, 1.0)] = 0.01,
        learning_rate: Annotated[float, LogRange(1e-4, 1e-1)] = 3e-3,
        inner_rate: Annotated[float, LogRange(1e-4, 10)] = 0.5,
        reach: Literal["late", "all"] = "late",
        divisor: Literal["weights", "genes"] = "weights",
    ) -> None:
        super().__init__(view)
        self.temperature, self.learning_rate, self.divisor = temperature, learning_rate, divisor
        self.hypergradient = OneStep(inner_rate, reach)
        self.logits = nn.Parameter(torch.zeros(len(view.genes.names), dtype=view.dtype))  # w = ½

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean, or weighted sum over the number of genes, with a weight for each gene."""
        weights = torch.sigmoid(self.logits / self.temperature)
        if self.divisor == "genes":
            return torch.where(self.is_primary, losses, weights * losses).mean()
        return self.weighted_mean(losses, weights)
