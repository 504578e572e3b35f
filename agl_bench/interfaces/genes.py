"""The gene axis of a fold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class GeneSplit:
    """Which genes are scored at test (primary) and in which order the others (auxiliary) are ranked.

    Attributes:
        names: (genes,) gene symbols.
        primary: (genes,) bool; True = scored at test.
        rank: (genes,) int64; 0 = first auxiliary gene, e.g. the most variable, −1 = primary gene.
        score: (genes,) float; the value that the ranking sorts, NaN where it is not defined.
        unscored: how many auxiliary genes had no score; they rank last, unless the protocol says first.
        tied: how many auxiliary genes share their score with another one, so that their names decided.
    """

    names: tuple[str, ...]
    primary: Tensor
    rank: Tensor
    score: Tensor
    unscored: int = 0
    tied: int = 0

    @property
    def auxiliary_count(self) -> int:
        """Number of auxiliary genes."""
        return len(self.names) - self.primary_count

    @cached_property
    def primary_count(self) -> int:
        """Number of primary genes."""
        return int(self.primary.sum())

    def relative_rank(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ρ = rank / (auxiliary − 1), in [0, 1] for auxiliary genes and 0 for primary genes (method: DkGSB, Eq. 6)."""
        return self.rank.clamp(min=0).to(dtype) / max(self.auxiliary_count - 1, 1)
