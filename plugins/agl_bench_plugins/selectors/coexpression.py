"""Each auxiliary gene by how strongly it is co-expressed with the primary genes.

Source: own design, after the field's idea that a gene which varies with a primary gene teaches the representation what
that one needs:

    w_j = max_p |r_pj|^γ   or   mean_p |r_pj|^γ   over primary genes p;   w_p = 1

r is the correlation over the training spots, within sections (`priors.correlation`). With γ = 2 and `reduce = max`, w_j
is the share of gene j's variance that its best primary gene explains.

How it differs from `hvg_k` with `prior = coexpression` and from the example's `correlated_k`, which take k genes whole
and the others not at all: here nothing is cut off, and γ decides how fast the weight falls. `correlated_k` also lets
differences between sections count as correlation. `sign = positive` ignores negative correlations; a linear head can
use both.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from agl_bench import LogRange, Selector, Step, TrainingView
from agl_bench_plugins.selectors.priors import correlation


class Coexpression(Selector):
    """A fixed weight for each auxiliary gene: a power of its correlation with the primary genes."""

    reference = "agl-bench"
    weights: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        power: Annotated[float, LogRange(0.25, 16)] = 2.0,
        reduce: Literal["max", "mean"] = "max",
        sign: Literal["either", "positive"] = "either",
    ) -> None:
        super().__init__(view)
        found = correlation(view).nan_to_num(0)  # a gene that does not vary is correlated with none
        strength = (found.abs() if sign == "either" else found.clamp(min=0)).clamp(max=1).pow(power)
        weights = strength.amax(0) if reduce == "max" else strength.mean(0)
        self.register_buffer("weights", weights.to(view.dtype))

    @property
    def used(self) -> Tensor:
        """The primary genes and those that are correlated at all."""
        return (self.weights > 0) | self.is_primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Weighted mean."""
        return self.weighted_mean(losses, self.weights)
