"""Auxiliary Gene Learning with all genes.

Source: "AGL + ALL" of Shiku et al., AAAI 2026: J = mean of the losses of all genes. No difference.
"""

from __future__ import annotations

from torch import Tensor

from agl_bench import Selector, Step


class Agl(Selector):
    """Every auxiliary gene, with the weight of a primary one."""

    reference = "Shiku et al., AAAI 2026 (AGL + ALL)"

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean of all losses."""
        return losses.mean()
