"""Primary Gene Learning: the auxiliary genes are ignored.

Source: the baseline "PGL" of Shiku et al., AAAI 2026. Difference: the head begins with an output for every gene, so
that all selectors start from the same weights; those of auxiliary genes are not computed, and the result equals that of
a narrow head trained alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agl_bench import Selector, Step, TrainingView


class Pgl(Selector):
    """Primary genes only, no auxiliary ones: the floor that a selector has to beat."""

    reference = "Shiku et al., AAAI 2026 (PGL)"

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view)
        self.used = view.genes.primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean of the primary losses."""
        return self.weighted_mean(losses, torch.zeros_like(losses))
