"""Conflicting gradients, each without its part against the other. On gene blocks.

Source: Yu, Kumar, Gupta, Levine, Hausman, Finn, NeurIPS 2020 (PCGrad). For each task i, for all others j in random
order

    if ⟨g_i, g_j⟩ < 0:   g_i ← g_i − ⟨g_i, g_j⟩ / ‖g_j‖² · g_j      (g_j as it was at first)

and the model follows Σ_i g_i. `variant = primary` is Pri-PCGrad of Jiang et al., NeurIPS 2023: each auxiliary task is
projected off the primary one alone.

Everything happens in the span of the gradients at first: Σ_i g_i = Σ_b c_b ∇L_b, and their Gram matrix tells c ≥ 1. So
the model is trained on Σ_b c_b L_b.

How it differs from the source:
- On gene blocks: the tasks are the primary genes together and pieces of the auxiliary ranking (see blocks.py).
- Conflict is judged, and c found, by the gradients with respect to the features, not to the shared parameters (what
  that amounts to: benchmarks/agreement.md).
- The loss is divided by the sum of its weights over genes; without any conflict it is `agl`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from agl_bench import LogRange, Step, TrainingView
from agl_bench_plugins.selectors.blocks import BlockSelector


class PcGrad(BlockSelector):
    """Gene blocks, not genes: the gradients of blocks in conflict are projected off each other."""

    reference = "Yu et al., NeurIPS 2020 (PCGrad), on gene blocks"
    order: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        blocks: Annotated[int, LogRange(1, 256)] = 32,
        variant: Literal["full", "primary"] = "full",
    ) -> None:
        super().__init__(view, blocks)
        self.variant = variant
        tasks = len(self.members)
        # In which order each task meets the others, (tasks, tasks); it skips itself.
        self.register_buffer("order", torch.arange(tasks).repeat(tasks, 1))

    def observe(self, losses: Tensor, step: Step) -> None:
        """Draw the orders of this step."""
        if self.variant == "full":
            draws = torch.rand(self.order.shape, generator=self.generator, device=self.generator.device)
            self.order.copy_(draws.argsort(1))

    def coefficients(self, gram: Tensor) -> Tensor:
        """c, (tasks,), from the inner products of the gradients, (tasks, tasks)."""
        squares = gram.diagonal()
        if self.variant == "primary":
            against = torch.where(squares[0] > 0, -gram[0].clamp(max=0) / squares[0], 0).sum()
            return torch.cat([1 + against[None], torch.ones_like(squares[1:])])
        mixed = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)  # row i: g_i in terms of those at first
        own = torch.arange(len(gram), device=gram.device)
        for other in self.order.unbind(1):
            products = (mixed * gram[other]).sum(1)
            is_conflict = (products < 0) & (squares[other] > 0) & (other != own)
            mixed[own, other] -= torch.where(is_conflict, products / squares[other], 0)
        return mixed.sum(0)

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean whose gradient is that of the projected ones, up to its length."""
        gradients = self.gradients(losses, step)
        return self.mean_by_task(losses, self.coefficients(gradients @ gradients.T))
