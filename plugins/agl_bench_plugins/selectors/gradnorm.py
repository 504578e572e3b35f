"""Tasks whose gradients are kept at one size, but for those that learn slowly. On gene blocks.

Source: Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018 (GradNorm). The weights w of T tasks, Σ w = T, follow the slope
of

    Σ_i | G_i − Ḡ · r_i^α |,   G_i = w_i ‖∇L_i‖,   r_i = (L_i / L_i(0)) / mean of the same over tasks

with Ḡ · r_i^α, Ḡ the mean of G, taken as a constant.

How it differs from the source:
- On gene blocks: the tasks are the primary genes together and pieces of the auxiliary ranking (see blocks.py).
- The gradients are those with respect to the features, not to the weights of the last shared layer.
- w = T · softmax(u), u learnt, keeps the sum and the sign, as LibMTL codes it; the source divides by the sum after each
  step. u moves with Adam in the same step as the model.
- L(0) is the loss of the first training batch (after a warm start: the first one behind it).
- The loss is Σ w·l / Σ w over genes; equal weights are `agl`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from agl_bench import LogRange, Range, Step, TrainingView
from agl_bench_plugins.selectors.blocks import BlockSelector


class GradNorm(BlockSelector):
    """Gene blocks, not genes: one weight for each block of auxiliary genes and one for the primary ones."""

    reference = "Chen et al., ICML 2018 (GradNorm), on gene blocks"
    learns_from = "training"
    first: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        blocks: Annotated[int, LogRange(1, 256)] = 32,
        alpha: Annotated[float, Range(0, 5)] = 1.5,
        learning_rate: Annotated[float, LogRange(1e-5, 1e-1)] = 0.025,
    ) -> None:
        super().__init__(view, blocks)
        self.alpha, self.learning_rate = alpha, learning_rate
        tasks = len(self.members)
        self.logits = nn.Parameter(torch.zeros(tasks, dtype=view.dtype))
        self.register_buffer("first", torch.zeros(tasks, dtype=view.dtype))  # L(0); 0 = not seen yet

    def observe(self, losses: Tensor, step: Step) -> None:
        """Keep the first losses."""
        self.first.copy_(torch.where(self.first > 0, self.first, self.sums(losses.detach())))

    def imbalance(self, losses: Tensor, step: Step) -> Tensor:
        """What the weights minimise, (); a function of them alone."""
        weights = len(self.logits) * torch.softmax(self.logits, 0)
        sizes = weights * self.gradients(losses, step).norm(dim=1)
        left = torch.where(self.first > 0, self.sums(losses.detach()) / self.first, 1)
        rate = left / left.mean()
        return (sizes - (sizes.mean() * rate**self.alpha).detach()).abs().sum()

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean, on which the weights have no slope but that of their imbalance."""
        imbalance = self.imbalance(losses, step)
        weights = torch.softmax(self.logits.detach(), 0)
        return self.mean_by_task(losses, weights) + (imbalance - imbalance.detach())
