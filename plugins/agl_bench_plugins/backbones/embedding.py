"""Features computed beforehand by any encoder, frozen, behind one trained layer that all genes share.

Source: the `embedding.h5` of a section (HEST and TRIDENT layout: embeddings, barcodes), which makes pathology
foundation models usable without running them here. The shared layer is not in the source: with a linear head straight
on frozen features every gene would have weights of its own and nothing else, so that no auxiliary gene could help or
harm a primary one, and all selectors would be equal.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from agl_bench import Backbone, BadSpec, LogRange, Spots


class Embedding(Backbone):
    """Frozen precomputed embeddings behind one shared layer."""

    sees = "embedding"
    splits, late_prefixes = True, ("shared.",)
    reference = "HEST-Benchmark and TRIDENT embedding files"

    def __init__(
        self,
        example: Spots,
        *,
        width: Annotated[int, LogRange(2, 4096)] = 128,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 1e-3,
    ) -> None:
        super().__init__(example)
        if example.embedding is None:
            raise BadSpec("the sections have no embedding; put embedding.h5 beside the counts of each section")
        self.width, self.learning_rate = width, learning_rate
        features = example.embedding.shape[1]
        self.shared = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.SiLU())

    def early(self, spots: Spots) -> Tensor:
        """The embedding itself."""
        assert spots.embedding is not None
        return spots.embedding

    def late(self, hidden: Tensor) -> Tensor:
        """Features (spots, width) from embeddings."""
        features: Tensor = self.shared(hidden)
        return features
