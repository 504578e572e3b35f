"""Colour and texture of a patch in 79 numbers, behind one trained layer: a strong, cheap image baseline.

Own design, of parts that scikit-image has: stain separation (Ruifrok and Johnston, 2001), grey-level co-occurrence
(Haralick et al., 1973), uniform local binary patterns (Ojala et al., 2002), edges, haematoxylin at several scales, and
its blobs, which are mostly nuclei. How a patch is turned changes none of them but by rounding, so that augmentation
does nothing here. Each is centred and divided by fixed numbers, so that no statistic of the sections at hand is needed;
they are rounded from sections C2 to C5 of her2st, of whose test spots the pictures, and no expression, thus took part
to a digit or two. The shared layer is that of `embedding`. It sees the image, and a network may well lose against
it: it competes with the other backbones and is no control such as `position`, which bounds what needs no image.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from agl_bench import Backbone, LogRange, Range, Spots
from agl_bench_plugins.backbones.patch_statistics import STATISTICS, statistics


class StainStatistics(Backbone):
    """Colour and texture statistics of H&E, no network: a cheap image baseline."""

    reference = "agl-bench; features of scikit-image"
    frozen, splits, late_prefixes = True, True, ("shared.",)
    late_settings: ClassVar[tuple[str, ...]] = ("learning_rate", "width")
    made_with: ClassVar[tuple[str, ...]] = ("scikit-image", "scipy", "numpy")

    def __init__(
        self,
        example: Spots,
        *,
        width: Annotated[int, LogRange(2, 4096)] = 64,
        patch_px: Annotated[int, Range(16, 512)] = 64,
        learning_rate: Annotated[float, LogRange(1e-7, 1e-1)] = 3e-3,
    ) -> None:
        super().__init__(example)
        self.width, self.patch_px, self.learning_rate = width, patch_px, learning_rate
        self.shared = nn.Sequential(nn.LayerNorm(STATISTICS), nn.Linear(STATISTICS, width), nn.SiLU())

    def encode(self, spots: Spots) -> Tensor:
        """Statistics (spots, 79) of the type of the patches, made on the host."""
        assert spots.patches is not None
        pixels = spots.patches.permute(0, 2, 3, 1).cpu().double().numpy()
        return torch.from_numpy(statistics(pixels)).to(spots.patches)

    def early(self, spots: Spots) -> Tensor:
        """The statistics, or what was kept of them in place of patches."""
        if spots.patches is not None:
            return self.encode(spots)
        assert spots.embedding is not None
        return spots.embedding

    def late(self, hidden: Tensor) -> Tensor:
        """Features (spots, width) from statistics."""
        features: Tensor = self.shared(hidden)
        return features
