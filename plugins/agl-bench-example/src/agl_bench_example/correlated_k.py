"""The k auxiliary genes that are most correlated with a primary gene over the training spots."""

from typing import Annotated

import torch
from torch import Tensor

from agl_bench import LogRange, Selector, Step, TrainingView


class CorrelatedK(Selector):
    """A fixed number of auxiliary genes, those most co-expressed with any primary gene."""

    reference = "agl-bench example"
    mask: Tensor

    def __init__(self, view: TrainingView, *, k: Annotated[int, LogRange(1, 50_000)] = 500) -> None:
        super().__init__(view)
        centred = view.expression - view.expression.mean(0)
        unit = centred / centred.norm(dim=0).clamp(min=1e-12)  # (spots, genes); a constant gene stays 0
        primary = view.genes.primary.to(unit.device)
        strength = (unit[:, primary].T @ unit).abs().amax(0)  # (genes,) largest |r| with a primary gene
        strength[primary] = -1
        chosen = strength.topk(min(k, view.genes.auxiliary_count)).indices
        self.register_buffer("mask", torch.zeros_like(strength).index_fill(0, chosen, 1))

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean over the primary genes and the chosen ones."""
        return self.weighted_mean(losses, self.mask)
