"""Features computed beforehand by any encoder, frozen: the trunk is the identity.

Source: the `embedding.h5` of a section (HEST and TRIDENT layout: embeddings, barcodes). Only the linear head is
trained, which makes pathology foundation models usable without running them here.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from agl_bench import Backbone, BadSpec, LogRange, Spots


class Embedding(Backbone):
    """Frozen precomputed embeddings."""

    sees = "embedding"
    reference = "HEST-Benchmark and TRIDENT embedding files"

    def __init__(
        self,
        example: Spots,
        *,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 1e-3,
    ) -> None:
        super().__init__(example)
        if example.embedding is None:
            raise BadSpec("the sections have no embedding; put embedding.h5 beside the counts of each section")
        self.width, self.learning_rate = example.embedding.shape[1], learning_rate

    def forward(self, spots: Spots) -> Tensor:
        """The embedding itself (spots, width)."""
        assert spots.embedding is not None
        return spots.embedding
