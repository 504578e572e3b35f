"""Sections whose spots have each other's patches: what still scores on them is not read from the tissue at the spot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from agl_bench.interfaces.spots import PatchSource, Section
from agl_bench.maths.seeds import seed_for


@dataclass(frozen=True)
class ShuffledPatches:
    """The patches of another source, dealt to the spots anew.

    Attributes:
        source: whose patches.
        order: (spots,) the row of `source` whose patch each spot gets.
    """

    source: PatchSource
    order: np.ndarray

    def read(self, rows: np.ndarray, side_px: int, side_um: float) -> np.ndarray:
        """As `PatchSource.read`."""
        return self.source.read(self.order[rows], side_px, side_um)

    def outside(self, positions: np.ndarray) -> np.ndarray:
        """As `PatchSource.outside`; positions stay as they are."""
        return self.source.outside(positions)


def shuffle_patches(section: Section, seed: int) -> Section:
    """The section with patches and embeddings permuted over all of its spots, before any fold; the rest is shared."""
    rng = np.random.default_rng(seed_for(seed, "shuffled patches", section.name))
    order = rng.permutation(section.counts.n_obs)
    return replace(
        section,
        patches=None if section.patches is None else ShuffledPatches(section.patches, order),
        embedding=None if section.embedding is None else section.embedding[order],
    )
