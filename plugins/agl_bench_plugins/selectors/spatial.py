"""The auxiliary genes whose expression has a pattern on the tissue.

Source: Moran, Biometrika 1950, and Geary, The Incorporated Statistician 1954, with moments under normality of Cliff and
Ord, Spatial Processes, 1981; spatially variable genes are found so by e.g. squidpy (Palla et al., Nature Methods 2022):

    I = n/S₀ · Σᵢⱼ wᵢⱼ zᵢ zⱼ / Σᵢ zᵢ²               E = −1/(n−1)   V = (n²S₁ − nS₂ + 3S₀²) / ((n²−1) S₀²) − E²
    C = (n−1)/2S₀ · Σᵢⱼ wᵢⱼ (zᵢ − zⱼ)² / Σᵢ zᵢ²      E = 1          V = ((2S₁+S₂)(n−1) − 4S₀²) / (2(n+1) S₀²)

w: weights of neighbouring spots, S₀, S₁, S₂ the usual sums of them; z: deviations from the section's mean.

How it differs: of every section (I − E)/√V or (E − C)/√V, joined with weights 1/√V, make one z for each gene. Kept are
the genes whose one-sided p passes Benjamini and Hochberg (1995), or the k with the highest z. No permutations, so that
it costs a few products; the moments mislead for genes that hardly any spot has: those below `detection` are not taken.
`hvg_k` with `prior = moran` takes a fixed number by the mean of I, in which all sections count alike.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from agl_bench import LogRange, Range, Selector, Step, TrainingView, neighbour_weights

GENES = 1024  # that are looked at at once


class Spatial(Selector):
    """Spatially variable auxiliary genes, as many as a false discovery rate allows or a fixed number."""

    reference = "Moran 1950 and Geary 1954, moments of Cliff and Ord 1981"
    mask: Tensor

    def __init__(
        self,
        view: TrainingView,
        *,
        statistic: Literal["moran", "geary"] = "moran",
        choose: Literal["fdr", "k"] = "fdr",
        fdr: Annotated[float, LogRange(1e-12, 0.5)] = 0.01,
        k: Annotated[int, LogRange(1, 50_000)] = 500,
        detection: Annotated[float, Range(0, 1)] = 0.1,
    ) -> None:
        super().__init__(view)
        z = spatial_z(view, statistic)
        tested = ~z.isnan() & (view.score_genes("detection") >= detection) & ~view.genes.primary
        if choose == "k":
            chosen = tested & (view.genes.ranked(z.where(tested, math.nan)) < k)
        else:
            p = stats.norm.sf(z[tested].numpy())
            chosen = tested.clone()
            chosen[tested] = torch.from_numpy(stats.false_discovery_control(p) <= fdr)
        self.register_buffer("mask", chosen.to(view.dtype))

    @property
    def used(self) -> Tensor:
        """The primary genes and the chosen ones; of the mask, which a saved state brings along."""
        return (self.mask > 0) | self.is_primary

    def forward(self, losses: Tensor, step: Step) -> Tensor:
        """Mean over the primary genes and the chosen ones."""
        return self.weighted_mean(losses, self.mask)


def spatial_z(view: TrainingView, statistic: Literal["moran", "geary"]) -> Tensor:
    """Spatial autocorrelation of each gene in standard deviations, (genes,) float64; NaN where no section has any."""
    section, position = view.section.numpy(force=True), view.position.numpy(force=True).astype(np.float64)
    total, precision = np.zeros(len(view.genes.names)), np.zeros(len(view.genes.names))
    for index in np.unique(section):
        spots = np.flatnonzero(section == index)
        weights, n = neighbour_weights(position[spots]), len(spots)
        both = weights + weights.T
        ends = np.asarray(both.sum(1)).ravel()
        s0, s1, s2 = weights.sum(), both.power(2).sum() / 2, (ends**2).sum()
        if n < 4 or s0 == 0:
            continue
        mean, variance = 0.0, ((2 * s1 + s2) * (n - 1) - 4 * s0**2) / (2 * (n + 1) * s0**2)  # of 1 − C
        if statistic == "moran":
            mean = -1 / (n - 1)
            variance = (n * n * s1 - n * s2 + 3 * s0**2) / ((n * n - 1) * s0**2) - mean**2
        if variance < 1e-9:  # all spots are neighbours of each other: there is no pattern to see
            continue
        rows = torch.from_numpy(spots).to(view.expression.device)
        for start in range(0, len(total), GENES):
            block = slice(start, start + GENES)
            value = view.expression[:, block][rows].double().numpy(force=True)
            z = value - value[0]  # exactly 0 where a gene does not vary
            z -= z.mean(0)
            varies = z.any(0)
            square, near = (z * z).sum(0) + ~varies, (z * (weights @ z)).sum(0)
            moran, geary = n / s0 * near / square, (n - 1) / (2 * s0) * (ends @ (z * z) - 2 * near) / square
            found = moran if statistic == "moran" else 1 - geary
            total[block] += varies * (found - mean) / variance
            precision[block] += varies / variance
    with np.errstate(invalid="ignore"):
        return torch.from_numpy((total / np.sqrt(precision)).round(9))
