"""k auxiliary genes drawn at random, once for each cell.

Source: "Random" of Fig. 3 of Shiku et al., AAAI 2026. Difference: k counts auxiliary genes only, the primary genes
always take part; the draw changes with seed and fold, so that a table averages over draws.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from agl_bench import LogRange, Selector, Step, TrainingView


class RandomK(Selector):
    """A fixed number of auxiliary genes, drawn at random."""

    reference = "Shiku et al., AAAI 2026 (Fig. 3)"
    mask: Tensor

    def __init__(self, view: TrainingView, *, k: Annotated[int, LogRange(1, 50_000)] = 500) -> None:
        super().__init__(view)
        # Drawn by rank, not by column: the same genes whatever order the columns have.
        drawn = torch.zeros(view.genes.auxiliary_count, dtype=view.dtype)
        drawn[torch.randperm(len(drawn), generator=view.generator)[:k]] = 1
        mask = torch.zeros(len(view.genes.names), dtype=drawn.dtype)
        auxiliary = ~view.genes.primary
        mask[auxiliary] = drawn[view.genes.rank[auxiliary]]
        self.register_buffer("mask", mask)

    @property
    def used(self) -> Tensor:
        """The primary genes and the drawn ones; of the mask, which a saved state brings along."""
        return (self.mask > 0) | self.is_primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean over the primary genes and the drawn ones."""
        return self.weighted_mean(losses, self.mask)
