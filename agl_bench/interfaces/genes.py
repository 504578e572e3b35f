"""The gene axis of a fold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


def order_of(score: np.ndarray, names: np.ndarray, *, nan_first: bool = False) -> np.ndarray:
    """Indices by falling score, (genes,); genes without a score at one end, ties by name."""
    unscored = np.isnan(score)
    return np.lexsort((names, -np.where(unscored, 0, score), ~unscored if nan_first else unscored))


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

    def ranked(self, score: Tensor) -> Tensor:
        """Rank of the auxiliary genes by another score, (genes,) int64; 0 = the highest, NaN last, ties by name.

        Args:
            score: (genes,) float; what it says of primary genes does not matter. Their rank is −1.
        """
        order = torch.from_numpy(order_of(score.numpy(force=True), np.asarray(self.names)))
        auxiliary = order[~self.primary[order]]
        return torch.full_like(self.rank, -1).index_copy_(0, auxiliary, torch.arange(len(auxiliary)))
