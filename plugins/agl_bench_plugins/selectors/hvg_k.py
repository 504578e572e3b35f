"""The k most variable auxiliary genes.

Source: "HVG" of Fig. 3 of Shiku et al., AAAI 2026, there with k of 5,000, 10,000 and 15,000. Difference: k counts
auxiliary genes only, the primary genes always take part; where there are fewer than k auxiliary genes, all are taken.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from agl_bench import LogRange, Selector, Step, TrainingView


class HvgK(Selector):
    """A fixed number of the most variable auxiliary genes."""

    reference = "Shiku et al., AAAI 2026 (Fig. 3)"
    mask: Tensor

    def __init__(self, view: TrainingView, *, k: Annotated[int, LogRange(1, 50_000)] = 500) -> None:
        super().__init__(view)
        self.register_buffer("mask", (view.genes.rank < k).to(view.dtype), persistent=False)
        self.used = (self.mask > 0) | view.genes.primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean over the primary genes and the first k auxiliary ones."""
        return self.weighted_mean(losses, self.mask)
