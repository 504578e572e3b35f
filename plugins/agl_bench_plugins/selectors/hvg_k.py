"""The k first auxiliary genes of a ranking, by default the most variable ones.

Source: "HVG" of Fig. 3 of Shiku et al., AAAI 2026, there with k of 5,000, 10,000 and 15,000. Differences: k counts
auxiliary genes only, the primary genes always take part; where there are fewer than k auxiliary genes, all are taken.
The ranking is the protocol's unless `prior` names another one, or `prior_file` a file of one.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from agl_bench import LogRange, Selector, Step, TrainingView
from agl_bench_plugins.selectors.priors import Prior, ranked


class HvgK(Selector):
    """A fixed number of the most variable auxiliary genes, or of the first by another prior."""

    reference = "Shiku et al., AAAI 2026 (Fig. 3)"
    mask: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        k: Annotated[int, LogRange(1, 50_000)] = 500,
        prior: Prior = "protocol",
        prior_file: str = "",
    ) -> None:
        super().__init__(view)
        rank = ranked(view, prior, prior_file)
        self.register_buffer("mask", (rank < k).to(view.dtype))

    @property
    def used(self) -> Tensor:
        """The primary genes and the first k; of the mask, which a saved state brings along."""
        return (self.mask > 0) | self.is_primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean over the primary genes and the first k auxiliary ones."""
        return self.weighted_mean(losses, self.mask)
